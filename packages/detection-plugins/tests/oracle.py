"""A detector for tests of evaluators: it has looked up the annotations, and errs as it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from bowerbird.protocols import Detector, Objects
from bowerbird_detection.detection_set import DetectionSet

Change = Callable[[Objects, np.random.Generator], Objects]


class Oracle(Detector):
    embed_dim = 1

    def __init__(self, dataset: DetectionSet, change: Change | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.classes = tuple(dataset.classes)
        self.change = change or (lambda objects, generator: objects)
        self.known = {self._key(np.asarray(dataset.image(i))): dataset.objects(i) for i in range(len(dataset))}
        self.modes: list[bool] = []

    @staticmethod
    def _key(pixels: np.ndarray) -> bytes:
        return np.ascontiguousarray(pixels, np.uint8).tobytes()

    def detect(self, images: Sequence[Tensor]) -> list[Objects]:
        assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)
        self.modes.append(self.training)
        keys = [self._key(np.rint(image.numpy().transpose(1, 2, 0) * 255)) for image in images]
        return [
            self.change(
                replace(self.known[key], scores=torch.ones(len(self.known[key].boxes)), crowd=None),
                np.random.default_rng(len(key) + key[0]),
            )
            for key in keys
        ]


def chosen(objects: Objects, rows: np.ndarray | Tensor) -> Objects:
    """The objects at ``rows``."""
    rows = torch.as_tensor(rows)
    return Objects(**{
        name: None if value is None else value if name == "presence" else value[rows]
        for name, value in vars(objects).items()
    })  # fmt: skip


def noisy(objects: Objects, generator: np.random.Generator) -> Objects:
    """Boxes, keypoints and masks moved by some pixels, some wrong classes, random scores, some objects twice."""
    rows = generator.integers(0, max(1, len(objects.boxes)), 2 * len(objects.boxes))
    objects = chosen(objects, rows)
    count = len(objects.boxes)
    shift = torch.from_numpy(generator.normal(0, 1.5, (count, 4))).float()
    boxes = objects.boxes + shift
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    wrong = torch.from_numpy(generator.random(count) < 0.2)
    masks, keypoints = objects.masks, objects.keypoints
    if masks is not None and count:
        masks = torch.stack([torch.roll(mask, generator.integers(-2, 3, 2).tolist(), (0, 1)) for mask in masks])
    if keypoints is not None:
        keypoints = keypoints.clone()
        keypoints[..., :2] += torch.from_numpy(generator.normal(0, 1.5, (*keypoints.shape[:2], 2))).float()
        keypoints[..., 2] = 1
    scores = torch.from_numpy(generator.random(count)).float()
    return Objects(boxes, torch.where(wrong, (objects.labels + 1) % 3, objects.labels), scores, masks, keypoints)
