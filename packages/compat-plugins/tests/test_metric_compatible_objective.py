"""``compat:metric-compatible`` as it is trained, and the reverse transform that comes out of the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_upgrade
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bowerbird.batch import Batch
from bowerbird.encoders import load_encoder
from bowerbird.errors import DataError, RecipeError
from bowerbird.protocols import BuildContext, TrainedRun
from bowerbird.registry import get_registry
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, TinyEncoder
from bowerbird_compat.online_backfilling import MetricCompatibleLoss
from bowerbird_compat.online_backfilling_objective import (
    MetricCompatibleConfig,
    MetricCompatibleObjective,
    reverse_transform_of,
)


def batch(seed: int) -> Batch:
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "label": torch.arange(12) % 3, "index": torch.arange(12)}


def context(given: Batch) -> BuildContext:
    torch.manual_seed(1)
    old = TrainedRun(path=Path("old"), encoder=TinyEncoder(5), objective_state={}, classes=(), recipe={})
    return SimpleBuildContext(classes=["a", "b", "c"], runs={"old": old}, batches=[given])


class TestContract(ObjectiveContract):
    name = "compat:metric-compatible"
    config: dict[str, Any] = {"old_run": "old", "measure": False}

    def make_context(self) -> BuildContext:
        torch.manual_seed(1)
        old = TrainedRun(path=Path("old"), encoder=TinyEncoder(5), objective_state={}, classes=(), recipe={})
        classes = [f"class-{i}" for i in range(self.num_classes)]
        return SimpleBuildContext(classes=classes, runs={"old": old}, batches=[self.make_batch(seed=9)])


def test_the_loss_is_the_weighted_sum_of_classification_and_the_terms_of_the_paper():
    given = batch(0)
    torch.manual_seed(0)
    config = MetricCompatibleConfig(old_run="old", classification_weight=0.5, regression_weight=2.0, temperature=0.2)
    objective = MetricCompatibleObjective.build(config, TinyEncoder(7), context(given)).eval()
    out = objective(given)
    n = objective.encoder(given).pooled
    old = objective.old_vectors.get(given["index"])
    loss = MetricCompatibleLoss(0.2, include_new_side=True, weights=(2.0, 1.0, 1.0))
    expected = loss(objective.reverse(F.normalize(n)), old, n, given["label"])["total"]
    classification = F.cross_entropy(objective.classifier(n), given["label"])
    assert_close(out.total, expected + 0.5 * classification)
    assert set(out.parts) == {"classification", "rqt_cos", "mcl_old", "mcl_new"}
    assert objective.relations() == []
    out.total.backward()
    assert objective.reverse.linear.weight.grad.abs().sum() > 0


def test_a_recipe_without_an_old_model_is_refused():
    with pytest.raises(RecipeError, match=r"compat:metric-compatible needs the old model: set objective\.old_run"):
        MetricCompatibleObjective.build(MetricCompatibleConfig(), TinyEncoder(7), context(batch(0)))


@pytest.fixture
def small() -> Iterator[None]:
    get_registry().register_module("small", small_upgrade)
    yield
    get_registry().unregister("small")


def test_a_run_on_cached_features_gives_an_encoder_and_the_way_into_the_old_space(small, tmp_path):
    old_run = small_upgrade.run(tmp_path / "old", 'use = "core:softmax"', split="old", epochs=4)
    made = small_upgrade.run(
        tmp_path / "new", f'use = "compat:metric-compatible"\nold_run = "{old_run}"', split="all", epochs=15,
        encoder="freeze_trunk = true", settings="cache_trunk = true",
    )  # fmt: skip
    transform = reverse_transform_of(made)
    old, new = (load_encoder(path, device="cpu") for path in (old_run, made))
    assert (transform.source, transform.target) == (new.fingerprint, old.fingerprint)
    data = small_upgrade.Patterns.build(None, "all")
    images = [data[i]["image"] for i in range(len(data))]
    o, n = old.encode(images), new.encode(images)
    own = np.sum(transform(n) * o, axis=1).mean()
    assert own > np.sum(transform(n) * np.roll(o, 1, axis=0), axis=1).mean() + 0.1
    with pytest.raises(DataError, match="has no reverse transform"):
        reverse_transform_of(old_run)
