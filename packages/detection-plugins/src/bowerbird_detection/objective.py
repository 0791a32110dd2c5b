"""``detection:detector``: trains any ``Detector`` with its own losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Detector, Encoder, ItemTransform, LossOutput, Objective, Objects
from bowerbird_detection.configs import DetectionConfig

NEEDS = ("image", "image_size", "boxes", "box_labels")


class DetectionObjective(Objective):
    """The sum of a detector's losses.

    Args:
        encoder: The detector, with its classes.
        views: What makes a picture and its objects ready in the processes that read the data.
    """

    def __init__(self, encoder: Detector, views: ItemTransform) -> None:
        super().__init__()
        self.encoder: Detector = encoder
        self.views = views

    @classmethod
    def build(cls, config: DetectionConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for another encoder than a detector, and for data without classes."""
        detector = detector_of(encoder, "detection:detector")
        detector.open(classes_of(context))
        return cls(detector, PlainViews())

    def item_transform(self) -> ItemTransform:
        return self.views

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = self.encoder.parameter_groups()
        return super().parameter_groups() if groups is None else groups

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``image (B, 3, H, W)`` in 0..1, ``image_size``, ``boxes``, ``box_labels`` and, where they are there,
        ``masks``, ``keypoints`` and ``crowd``. Raises ``InputError``."""
        images, objects = pictures_of(batch)
        losses = dict(self.encoder.losses(images, objects))
        total = torch.stack(list(losses.values())).sum()
        return LossOutput(total=total, parts=losses, stats={"objects": sum(len(found.boxes) for found in objects)})


def detector_of(encoder: Encoder, method: str) -> Detector:
    """Raises ``RecipeError`` where ``encoder`` finds no objects."""
    if not isinstance(encoder, Detector):
        raise RecipeError(
            f"encoder: {method} trains detectors such as detection:torchvision, not a {type(encoder).__name__}"
        )
    return encoder


def classes_of(context: BuildContext) -> Sequence[str]:
    if not context.classes:
        raise RecipeError("dataset: it names no classes, so there is nothing to detect")
    return context.classes


def pictures_of(batch: Batch) -> tuple[list[Tensor], list[Objects]]:
    """Single pictures ``(3, h, w)`` without padding, and their objects. Raises ``InputError`` for another form."""
    lacking = [key for key in NEEDS if key not in batch]
    if lacking:
        raise InputError(f"the batch lacks {', '.join(lacking)}; it has {', '.join(batch)}")
    image, sizes = batch["image"], batch["image_size"]
    if image.ndim != 4 or image.shape[1] != 3 or sizes.shape != (len(image), 2):
        raise InputError(
            f"image {tuple(image.shape)} and image_size {tuple(sizes.shape)}; expected (B, 3, H, W) and (B, 2)"
        )
    lists = {key: batch[key] for key in ("boxes", "box_labels", "masks", "keypoints", "crowd") if key in batch}
    for key, values in lists.items():
        if len(values) != len(image):
            raise InputError(f"{key} of {len(values)} pictures in a batch of {len(image)}")
    images, objects = [], []
    for i, (height, width) in enumerate(sizes.tolist()):
        if not (0 < height <= image.shape[2] and 0 < width <= image.shape[3]):
            raise InputError(
                f"image_size[{i}] = {height} x {width} does not fit in a batch of {image.shape[2]} x {image.shape[3]}"
            )
        images.append(image[i, :, :height, :width])

        def entry(key: str, kind: torch.dtype, i: int = i) -> Tensor | None:
            values = lists[key][i] if key in lists else None
            return None if values is None else torch.as_tensor(values, dtype=kind, device=image.device)

        boxes, labels = entry("boxes", torch.float32), entry("box_labels", torch.int64)
        assert boxes is not None and labels is not None
        objects.append(
            Objects(
                boxes=boxes.reshape(-1, 4),
                labels=labels,
                masks=entry("masks", torch.bool),
                keypoints=entry("keypoints", torch.float32),
                crowd=entry("crowd", torch.bool),
            )
        )
    return images, objects


class PlainViews:
    """A picture and its objects as they are, as entries of a batch."""

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        lacking = [key for key in ("image", "boxes", "box_labels") if key not in item]
        if lacking:
            raise InputError(f"items have no {', '.join(lacking)}; choose a data set whose pictures have objects")
        image = item["image"]
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        made: dict[str, Any] = {"image": torch.from_numpy(np.ascontiguousarray(pixels))}
        made["image_size"] = torch.tensor([image.height, image.width])
        made["boxes"] = torch.as_tensor(item["boxes"], dtype=torch.float32).reshape(-1, 4)
        made["box_labels"] = [int(label) for label in item["box_labels"]]
        for key, kind in (("masks", torch.bool), ("keypoints", torch.float32), ("crowd", torch.bool)):
            if key in item:
                made[key] = torch.as_tensor(item[key], dtype=kind)
        return made
