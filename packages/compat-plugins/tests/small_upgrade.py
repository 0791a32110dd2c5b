"""A plugin for tests of objectives in the real loop: a small network, noisy patterns, and a run of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Dataset, Encoder, Features
from bowerbird.recipe import load_recipe
from bowerbird.records import DatasetRecord, EncoderRecord
from bowerbird.train.loop import train

BOWERBIRD_API = "1.0"
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox")


class NetConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    freeze_trunk: bool = False


class Net(Encoder):
    """8 x 8 pixels through one hidden layer, D = 6."""

    preprocessing = Preprocessing(size=8, interpolation="bilinear")
    embed_dim = 6

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.trunk = nn.Linear(192, 32)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(32, 6))
        self.is_frozen = config.freeze_trunk
        self.trunk.requires_grad_(not self.is_frozen)

    @classmethod
    def build(cls, config: NetConfig) -> Self:
        return cls(config)

    def forward(self, batch: Batch) -> Features:
        cached = batch.get("frozen_features")
        return Features(pooled=self.head(self.trunk(batch["image"].flatten(1)) if cached is None else cached))

    def frozen_trunk(self, batch: Batch) -> Tensor | None:
        return self.trunk(batch["image"].flatten(1)) if self.is_frozen else None


class Patterns(Dataset):
    """Six noisy patterns, 20 pictures of each.

    The split ``old`` has the first three, ``open`` the others, ``new`` all in another order.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        patterns = np.random.default_rng(7).uniform(90, 160, (len(NAMES), 8, 8, 3))
        rng = np.random.default_rng(len(classes))
        self._labels = [i % len(classes) for i in range(20 * len(classes))]
        chosen = patterns[[NAMES.index(classes[label]) for label in self._labels]]
        self._pixels = np.clip(chosen + rng.normal(0, 45, chosen.shape), 0, 255).astype(np.uint8)

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        return cls({"old": NAMES[:3], "open": NAMES[3:], "new": NAMES[::-1]}.get(split or "", NAMES))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.fromarray(self._pixels[index]), "label": self._labels[index], "item_id": str(index)}

    @property
    def item_ids(self) -> Sequence[str]:
        return [str(i) for i in range(len(self))]

    def labels(self) -> Sequence[int]:
        return self._labels


@hookimpl
def bowerbird_encoders() -> Iterator[EncoderRecord]:
    yield EncoderRecord(
        name="small:net", target="small_upgrade:Net", config="small_upgrade:NetConfig", summary="Small."
    )


@hookimpl
def bowerbird_datasets() -> Iterator[DatasetRecord]:
    yield DatasetRecord(
        name="small:patterns",
        target="small_upgrade:Patterns",
        summary="Patterns.",
        provides=("image", "label", "item_id"),
        splits=("old", "open", "new", "all"),
    )


def run(
    folder: Path, objective: str, *, split: str, epochs: int = 12, seed: int = 0, encoder: str = "", settings: str = ""
) -> Path:
    """Folder of a finished run in ``folder``; ``objective``, ``encoder`` and ``settings`` are lines of TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f"""
name = "test"
[encoder]
use = "small:net"
{encoder}
[dataset]
use = "small:patterns"
split = "{split}"
[objective]
{objective}
[train]
epochs = {epochs}
batch_size = 24
lr = 0.01
seed = {seed}
device = "cpu"
{settings}
"""
    )
    assert train(load_recipe(recipe), folder / "run").finished
    return folder / "run"
