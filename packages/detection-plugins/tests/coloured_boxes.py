"""A detection set that costs nothing: rectangles in the colours of their classes on grey noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from bowerbird.protocols import Objects
from bowerbird_detection.detection_set import DetectionSet

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))


class ColouredBoxes(DetectionSet):
    """``count`` pictures of 48 x 64 pixels with 1 to 3 rectangles; picture 0 of a set of more than 3 has none.

    Class 0 is in every other picture at least, class 2 in one. Two keypoints: upper left and lower right corner.
    """

    classes = ("red", "green", "blue")
    keypoint_names = ("first", "last")
    has_masks = True

    def __init__(self, count: int = 4, *, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self._ids = [f"boxes/{i}" for i in range(count)]
        self._pixels: list[Any] = []
        self._objects: list[Objects] = []
        for i in range(count):
            pixels = generator.integers(90, 140, (48, 64, 3)).astype(np.uint8)
            boxes, labels = [], []
            for column in range(0 if i == 0 and count > 3 else 1 + i % 3):
                left, top = column * 21 + int(generator.integers(0, 5)), int(generator.integers(0, 20))
                right, bottom = left + int(generator.integers(10, 16)), top + int(generator.integers(12, 26))
                label = 2 if (i, column) == (2, 0) else int(i % 2 and column % 2)
                pixels[top:bottom, left:right] = COLOURS[label]
                boxes.append([left, top, right, bottom])
                labels.append(label)
            found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            self._pixels.append(pixels)
            self._objects.append(
                Objects(
                    boxes=found,
                    labels=torch.tensor(labels, dtype=torch.int64),
                    masks=torch.stack([_inside(box) for box in boxes]) if boxes else torch.zeros(0, 48, 64).bool(),
                    keypoints=torch.cat([found.reshape(-1, 2, 2), torch.full((len(boxes), 2, 1), 2.0)], dim=2),
                    crowd=torch.zeros(len(boxes), dtype=torch.bool),
                )
            )

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        return cls()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def objects(self, index: int) -> Objects:
        return self._objects[index]

    def size(self, index: int) -> tuple[int, int]:
        return 48, 64

    def pictures(self) -> list[torch.Tensor]:
        """``(3, 48, 64)`` each, in 0..1."""
        return [torch.from_numpy(pixels).permute(2, 0, 1) / 255 for pixels in self._pixels]


def _inside(box: Sequence[int]) -> torch.Tensor:
    left, top, right, bottom = box
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "shorter_side": 48,
    "longer_side": 64,
    "embed_size": 32,
    "fpn_width": 16,
    "head_width": 32,
    "mask_width": 16,
    "keypoint_width": 16,
    "anchor_scale": 4.0,
    "proposals_train": 60,
    "proposals_test": 40,
    "rois": 32,
}
