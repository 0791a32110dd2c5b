"""The arms of dpt.toml: a small pyramid transformer classifies one garment that lies anywhere on a canvas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pretraining_arms import Pretrained, Values, dataset, pictures, pretrain
from torch import Tensor

from bowerbird.data.dataset import Dataset
from bowerbird_detection.depatch import DeformablePatchEmbed, box_sampling_grid


@dataclass(frozen=True)
class OneObject(Dataset):
    """Canvases with one object each, kept in memory. Labels are those of the objects, ``boxes`` (N, 4) their places."""

    images: Sequence[Image.Image]
    targets: NDArray[np.int64]
    boxes: NDArray[np.float32]
    names: Sequence[str]

    @classmethod
    def build(cls, config: Any, split: str | None) -> OneObject:
        canvases = dataset("detection:canvases", split, **config)
        items = [canvases[i] for i in range(len(canvases))]
        return cls(
            images=[item["image"] for item in items],
            targets=np.array([item["box_labels"][0] for item in items]),
            boxes=np.stack([item["boxes"][0] for item in items]),
            names=canvases.classes,
        )

    @property
    def classes(self) -> Sequence[str]:  # type: ignore[override]
        return self.names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.targets[index]), "item_id": self.item_ids[index]}

    @property
    def item_ids(self) -> Sequence[str]:
        return [str(i) for i in range(len(self))]

    def labels(self) -> Sequence[int]:
        return self.targets.tolist()


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<value>``: accuracies, number of parameters, and what ``reading`` gives; the plan says what they are.

    The seed sets the canvases (training and test), the first weights and the order of batches.
    """
    settings = {**plan["canvases"], "seed": seed}
    train = OneObject.build({**settings, "count": plan["train"], "item_size": plan["sizes"]["trained"]}, "train")
    tests = {
        name: OneObject.build({**settings, "count": plan["test"], "item_size": size}, "test")
        for name, size in plan["sizes"].items()
    }
    values: Values = {}
    for arm in plan["arms"]:
        made = pretrain(plan["recipe"], train, seed, arm.get("set", {}))
        right = {name: correct(made, test) for name, test in tests.items()}
        found = {
            "accuracy": right["trained"].mean(),
            "off-centre": right["trained"][off_centre(tests["trained"], plan["canvases"]["canvas_size"])].mean(),
            "smaller": right["smaller"].mean(),
            "larger": right["larger"].mean(),
            "parameters": sum(parameter.numel() for parameter in made.objective.parameters()),
        }
        found |= reading(made, tests["trained"])
        values |= {f"{arm['name']}.{key}": float(value) for key, value in found.items()}
    return values


def off_centre(test: OneObject, side: int) -> NDArray[np.bool_]:
    """The third of the canvases whose object lies farthest from the middle (the larger of the two distances)."""
    middles = (test.boxes[:, :2] + test.boxes[:, 2:]) / 2
    distance = np.abs(middles - side / 2).max(axis=1)
    chosen = np.zeros(len(test), bool)
    chosen[np.argsort(-distance, kind="stable")[: len(test) // 3]] = True
    return chosen


@torch.no_grad()
def correct(made: Pretrained, test: OneObject) -> NDArray[np.bool_]:
    images = pictures(made.encoder, test)
    logits = [made.objective.logits(made.encoder({"image": part}).pooled) for part in images.split(250)]  # type: ignore[operator]
    return torch.cat(logits).argmax(dim=1).numpy() == test.targets


@torch.no_grad()
def reading(made: Pretrained, test: OneObject) -> Values:
    """What DePatch reads: ``on object``, the share of its points within the object's box, and ``moved``, the mean shift
    of its boxes along an axis, in patches. Empty for an arm without it."""
    stages: Any = made.encoder.stages
    embed = stages[1].embed
    if not isinstance(embed, DeformablePatchEmbed):
        return {}
    images = pictures(made.encoder, test)
    maps = [to_maps(*stages[0](part)) for part in images.split(250)]
    boxes = torch.cat([embed.boxes(part) for part in maps])  # (N, L, 4)
    points = box_sampling_grid(boxes, embed.points_per_side)
    objects = torch.from_numpy(test.boxes)[:, None] / images.shape[-1]
    inside = (points >= objects[..., :2]).all(dim=2) & (points < objects[..., 2:]).all(dim=2)
    rows, columns = (side // embed.patch_size for side in maps[0].shape[2:])
    middles = torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns).flip(1)
    shift = ((boxes[..., :2] + boxes[..., 2:]) / 2 - middles) * torch.tensor([columns, rows])
    return {"on object": float(inside.float().mean()), "moved": float(shift.abs().mean())}


def to_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)
