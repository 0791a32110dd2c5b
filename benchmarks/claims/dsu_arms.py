"""The arms of dsu.toml and dsu-digits.toml: a small network trained in some looks or styles and used in others."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
import torch
from pretraining_arms import Pretrained, Values, dataset, features_of, pictures, pretrain, register
from pydantic import BaseModel
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Dataset, Encoder, Features
from bowerbird.records import EncoderRecord
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision
from bowerbird_domain.configs import LOOKS
from bowerbird_domain.evaluators import domains_of

BOWERBIRD_API = "1.0"
STYLES = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji")


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="claims-dsu:cnn",
        target=f"{__name__}:CNN",
        config=f"{__name__}:CNNConfig",
        summary="Three convolution blocks, for the claims of DSU.",
    )


class CNNConfig(BaseModel):
    size: int = 16


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class CNN(Encoder):
    """32, 64 and 64 channels at full, half and a quarter of the size, then the mean over positions."""

    embed_dim = 64

    def __init__(self, size: int) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(
            size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear", resize="squash"
        )
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.block2, self.block3 = block(32, 64), block(64, 64)

    @classmethod
    def build(cls, config: CNNConfig) -> Self:
        return cls(config.size)

    def forward(self, batch: Batch) -> Features:
        x = self.pool1(torch.relu(self.bn1(self.conv1(batch["image"]))))
        return Features(pooled=self.block3(self.pool2(self.block2(x))).mean(dim=(2, 3)))


def run(plan: Mapping[str, Any], seed: int) -> Values:
    register("claims-dsu", sys.modules[__name__])
    values: Values = {}
    worlds = [("digits", digits)] if "looks" in plan else []
    worlds += [("emoji", emoji)] if "emoji" in plan else []
    for arm in plan["arms"]:
        for world, measured in worlds:
            found = measured(plan, arm, seed)
            values |= {f"{arm['name']}.{world}.{key}": value for key, value in found.items()}
    return values | {
        f"{arm['name']}.digits.seen - 0.01": values[f"{arm['name']}.digits.seen"] - 0.01 for arm in plan["arms"]
    }


def trained(
    plan: Mapping[str, Any], arm: Mapping[str, Any], seed: int, items: Dataset, *, epochs: int, size: int
) -> Pretrained:
    recipe = dict(plan["recipe"]) | ({"modifier": [arm["modifier"]]} if "modifier" in arm else {})
    return pretrain(recipe, items, seed, {"train.epochs": epochs, "encoder.size": size})


def digits(plan: Mapping[str, Any], arm: Mapping[str, Any], seed: int) -> Values:
    settings = {"unseen": plan["looks"]["unseen"], "size": plan["looks"]["size"], "seed": seed}
    parts = {split: dataset("domain:looks", split, **settings) for split in ("train", "validation", "test")}
    made = trained(plan, arm, seed, parts["train"], epochs=plan["looks"]["epochs"], size=plan["looks"]["size"])
    vectors = {
        split: features_of(made.encoder, pictures(made.encoder, items), "pooled") for split, items in parts.items()
    }
    looks = {split: domains_of(items, "domain:looks") for split, items in parts.items()}
    right = {
        split: predicted(made, vectors[split]) == np.asarray(parts[split].labels()) for split in ("validation", "test")
    }
    values = {look: float(right["test"][looks["test"] == look].mean()) for look in LOOKS if look in settings["unseen"]}
    plain = vectors["validation"][looks["validation"] == "plain"]
    gaps = [
        np.linalg.norm(vectors["test"][looks["test"] == look].mean(axis=0) - plain.mean(axis=0)) / spread(plain)
        for look in settings["unseen"]
    ]
    return values | {
        "unseen": float(np.mean(list(values.values()))),
        "seen": float(right["validation"].mean()),
        "gap": float(np.mean(gaps)),
        "mAP": mean_precision(vectors["test"], parts["test"].labels(), vectors["train"], parts["train"].labels()),
    }


def emoji(plan: Mapping[str, Any], arm: Mapping[str, Any], seed: int) -> Values:
    unseen, size = STYLES[seed % len(STYLES)], plan["emoji"]["size"]
    settings = {"source": f"emoji:styles?size={size}", "unseen": [unseen], "validation_fraction": 0.0}
    items = dataset("domain:left-out", "train", source_split="seen", **settings)
    made = trained(plan, arm, seed, items, epochs=plan["emoji"]["epochs"], size=size)
    others = dataset("domain:left-out", "all", source_split="unseen", **settings)
    vectors = features_of(made.encoder, pictures(made.encoder, others), "pooled")
    labels, styles = np.asarray(others.labels()), domains_of(others, "emoji:styles")

    def search(queries: np.ndarray, gallery: np.ndarray) -> float:
        return mean_precision(vectors[queries], labels[queries], vectors[gallery], labels[gallery])

    known = [style for style in STYLES if style != unseen]
    seen = [search(styles == style, (styles != style) & (styles != unseen)) for style in known]
    return {"mAP": search(styles == unseen, styles != unseen), "seen mAP": float(np.mean(seen))}


@torch.no_grad()
def predicted(made: Pretrained, vectors: np.ndarray) -> np.ndarray:
    logits: Tensor = made.objective.logits(torch.from_numpy(vectors))  # type: ignore[operator]
    return logits.argmax(dim=1).numpy()


def spread(vectors: np.ndarray) -> float:
    """Root of the mean squared distance to the mean."""
    return float(np.sqrt(np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean()))


def mean_precision(queries: np.ndarray, query_labels: Any, gallery: np.ndarray, gallery_labels: Any) -> float:
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (queries, gallery)]
    ranked = RankedList.from_scores(unit[0] @ unit[1].T)
    return float(average_precision(ranked, Relevance.from_labels(np.asarray(query_labels), np.asarray(gallery_labels))))
