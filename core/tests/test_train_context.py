"""What an objective sees of the training split while it is built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.protocols import Encoder, Features
from bowerbird.testing import SyntheticDataset
from bowerbird.train.data import cache_trunk
from bowerbird.train.run import TrainContext

CPU = torch.device("cpu")


class Frozen(Encoder):
    """A frozen trunk that counts how often it runs, and a head."""

    preprocessing = Preprocessing(size=8)
    embed_dim = 5

    def __init__(self, trunk_seed: int, head_seed: int) -> None:
        super().__init__()
        torch.manual_seed(trunk_seed)
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)).requires_grad_(False)
        torch.manual_seed(head_seed)
        self.head = nn.Linear(7, 5)
        self.calls = 0

    def frozen_trunk(self, batch: Batch) -> Tensor:
        self.calls += 1
        return self.trunk(batch["image"])

    def forward(self, batch: Batch) -> Features:
        features = batch.get("frozen_features")
        return Features(pooled=self.head(self.frozen_trunk(batch) if features is None else features))


def embeddings(context: TrainContext, encoder: Encoder) -> tuple[Tensor, Tensor]:
    batches = list(context.eval_batches(encoder))
    with torch.no_grad():
        return torch.cat([encoder(b).pooled for b in batches]), torch.cat([b["label"] for b in batches])


@pytest.fixture
def context(tmp_path: Path) -> TrainContext:
    context = TrainContext(SyntheticDataset(num_items=24), total_steps=1, seed=0, device=CPU)
    trained = Frozen(0, 1)
    context.trunk = (trained, cache_trunk(trained, context.dataset, tmp_path / "t.npy", device=CPU, with_labels=True))
    return context


def test_an_old_encoder_on_the_same_frozen_trunk_reads_its_cache_and_gives_the_same(context: TrainContext) -> None:
    old = Frozen(0, 2)
    found, labels = embeddings(context, old)
    assert old.calls == 0
    assert labels.tolist() == list(context.dataset.labels())
    context.trunk = None
    expected, _ = embeddings(context, old)
    assert old.calls > 0
    torch.testing.assert_close(found, expected)


def test_an_encoder_with_other_weights_or_another_preparation_of_pictures_does_not(context: TrainContext) -> None:
    other, prepared = Frozen(3, 2), Frozen(0, 2)
    prepared.preprocessing = Preprocessing(size=8, mean=(0.1, 0.1, 0.1))
    for encoder in (other, prepared):
        found, _ = embeddings(context, encoder)
        assert encoder.calls > 0
        context.trunk, kept = None, context.trunk
        torch.testing.assert_close(found, embeddings(context, encoder)[0])
        context.trunk = kept
