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
from bowerbird_detection.detection_set import COMMON_UP_TO, RARE_UP_TO, detection_set, frequency_groups
from bowerbird_detection.detectors import TorchvisionDetector
from bowerbird_detection.transforms import DetectionTransform

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
        if isinstance(detector, TorchvisionDetector) and detector.class_loss == "acsl":
            detector.use_class_loss("acsl", class_frequency=frequency_columns(context))
        return cls(detector, DetectionTransform(config))

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


def frequency_columns(context: BuildContext, **limits: int) -> Tensor:
    """``(C + 1,)``: the group of every class, 0 rare, 1 common, 2 frequent, behind the background's -1.

    Args:
        limits: ``rare_up_to`` and ``common_up_to`` of ``bowerbird_detection.detection_set.frequency_groups``.

    Raises:
        RecipeError: The context has no data set whose pictures have objects.
    """
    if context.dataset is None:
        raise RecipeError("acsl counts the pictures of every class, and there is no training data to count in")
    whole, positions = detection_set(context.dataset, "acsl")
    counts = whole.image_counts(positions)
    rare, common = limits.get("rare_up_to", RARE_UP_TO), limits.get("common_up_to", COMMON_UP_TO)
    return torch.from_numpy(np.concatenate([[-1], frequency_groups(counts, rare, common)]))


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
