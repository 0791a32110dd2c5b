"""What makes a picture and its objects ready for training a detector: torchvision's transforms v2 on tv_tensors.

Runs in the processes that read the data. Everything random comes from the numpy generator of the item; torch's own
generator is seeded from it and put back, so that results depend neither on the process nor on the order of items.

R objects, K keypoints, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bowerbird.errors import InputError
from bowerbird_detection.data_configs import AugmentationConfig

_SMALLEST_CROPPED = 8  # pixels; RandomIoUCrop takes 0.3 of a side and divides by it


class DetectionTransform:
    """Entries of the batch from one item of a ``DetectionSet``.

    ``image`` float32 ``(3, h, w)`` in 0..1, ``image_size`` int64 ``(2,)``, ``boxes`` float32 ``(R, 4)``, ``box_labels``
    (R class indices), ``crowd`` bool ``(R,)``, ``index``, and where the item has them ``masks`` bool ``(R, h, w)`` and
    ``keypoints`` float32 ``(R, K, 3)``. Objects that were cropped away, or of which less than ``min_side`` is left, are
    left out; a keypoint outside the picture gets visibility 0.
    """

    def __init__(self, config: AugmentationConfig | None = None) -> None:
        self.config = config or AugmentationConfig()
        self._iou_crop = v2.RandomIoUCrop()
        self._photometric = v2.RandomPhotometricDistort(p=1.0)

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Raises ``InputError`` for items without objects' boxes."""
        c = self.config
        sample = _sample(item)
        with torch_seeded_by(generator):
            if generator.random() < c.iou_crop and len(sample["boxes"]) and min(_size(sample)) >= _SMALLEST_CROPPED:
                sample = self._iou_crop(sample)
            if c.short_side:
                scale = int(generator.choice(c.short_side)) / min(_size(sample))
                limit = np.inf if c.max_side is None else c.max_side / max(_size(sample))
                sample = _scaled(sample, min(scale, limit))
            if c.scale_jitter is not None and c.target_size is not None:
                sample = _jittered(sample, c.target_size, generator.uniform(*c.scale_jitter), generator)
            if generator.random() < c.flip:
                sample = _flipped(sample, item.get("keypoint_mirror"))
            if generator.random() < c.photometric:
                sample = self._photometric(sample)
        return self._entries(sample, item)

    def _entries(self, sample: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
        height, width = _size(sample)
        boxes = F.clamp_bounding_boxes(sample["boxes"])
        _, kept = F.sanitize_bounding_boxes(boxes, min_size=self.config.min_side, min_area=0.0)
        if "masks" in sample:
            kept &= sample["masks"].flatten(1).bool().any(dim=1)
        made: dict[str, Any] = {
            "image": F.to_dtype(sample["image"], torch.float32, scale=True).as_subclass(Tensor),
            "image_size": torch.tensor([height, width]),
            "boxes": boxes.as_subclass(Tensor)[kept],
            "box_labels": sample["labels"][kept].tolist(),
            "crowd": sample["crowd"][kept],
        }
        if "masks" in sample:
            made["masks"] = sample["masks"].as_subclass(Tensor)[kept].bool()
        if "keypoints" in sample:
            points, seen = sample["keypoints"].as_subclass(Tensor)[kept], sample["visibility"][kept]
            inside = (points >= 0).all(dim=2) & (points[..., 0] <= width) & (points[..., 1] <= height)
            made["keypoints"] = torch.cat([points, torch.where(inside, seen, 0)[..., None]], dim=2)
            made["keypoints"][made["keypoints"][..., 2] == 0] = 0
        return made | ({"index": item["index"]} if "index" in item else {})


@contextmanager
def torch_seeded_by(generator: np.random.Generator) -> Iterator[None]:
    """torch's generator of the CPU starts from a number of ``generator``, and is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would also seed the accelerators, which the fork does not put back.
        torch.default_generator.manual_seed(int(generator.integers(2**63)))
        yield


def _sample(item: dict[str, Any]) -> dict[str, Any]:
    lacking = [key for key in ("image", "boxes", "box_labels") if key not in item]
    if lacking:
        raise InputError(f"items have no {', '.join(lacking)}; choose a data set whose pictures have objects")
    image = tv_tensors.Image(F.pil_to_tensor(item["image"]))
    size = (image.shape[1], image.shape[2])
    boxes = torch.as_tensor(item["boxes"], dtype=torch.float32).reshape(-1, 4)
    sample: dict[str, Any] = {
        "image": image,
        "boxes": tv_tensors.BoundingBoxes(boxes.clone(), format="XYXY", canvas_size=size),
        "labels": torch.as_tensor(item["box_labels"], dtype=torch.int64),
        "crowd": torch.as_tensor(item.get("crowd", np.zeros(len(boxes))), dtype=torch.bool),
    }
    if "masks" in item:
        masks = torch.as_tensor(item["masks"]).reshape(-1, *size)
        sample["masks"] = tv_tensors.Mask(masks.to(torch.uint8))
    if "keypoints" in item:
        points = torch.as_tensor(item["keypoints"], dtype=torch.float32)
        sample["keypoints"] = tv_tensors.KeyPoints(points[..., :2].clone(), canvas_size=size)
        sample["visibility"] = points[..., 2]
    return sample


def _size(sample: dict[str, Any]) -> tuple[int, int]:
    height, width = sample["image"].shape[1:]
    return int(height), int(width)


def _map(sample: dict[str, Any], function: Any, *arguments: Any, **more: Any) -> dict[str, Any]:
    """``function`` applied to everything that has a place in the picture."""
    return {
        key: function(value, *arguments, **more) if isinstance(value, tv_tensors.TVTensor) else value
        for key, value in sample.items()
    }


def _scaled(sample: dict[str, Any], scale: float) -> dict[str, Any]:
    return _map(sample, F.resize, [max(1, round(side * scale)) for side in _size(sample)])


def _jittered(sample: dict[str, Any], target: int, factor: float, generator: np.random.Generator) -> dict[str, Any]:
    """Scaled to fit in a square of ``target`` times ``factor`` pixels, and cropped to ``target`` at a random place."""
    sample = _scaled(sample, target * factor / max(_size(sample)))
    size = _size(sample)
    kept = [min(side, target) for side in size]
    top, left = (int(generator.integers(side - part + 1)) for side, part in zip(size, kept, strict=True))
    return _map(sample, F.crop, top, left, *kept)


def _flipped(sample: dict[str, Any], mirror: tuple[int, ...] | None) -> dict[str, Any]:
    width = _size(sample)[1]
    points = sample.get("keypoints")
    sample = _map(sample, F.horizontal_flip)
    if points is not None:
        order = list(mirror) if mirror is not None else list(range(points.shape[1]))
        # Of the original points: torchvision mirrors points about the middle of pixel numbers, but boxes about the
        # middle of the picture, so that a point would leave its box by a pixel.
        mirrored = points.as_subclass(Tensor).clone()
        mirrored[..., 0] = width - mirrored[..., 0]
        sample["keypoints"] = tv_tensors.wrap(mirrored[:, order], like=points)
        sample["visibility"] = sample["visibility"][:, order]
    return sample
