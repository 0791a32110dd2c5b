"""Boxes in pictures, and pairs of crops that share some.

A box is (left, top, right, bottom) in pixels of the picture; (0, 0, width, height) is all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird_mim.views import random_crop_box

CropBox = tuple[int, int, int, int]  # left, top, right, bottom

_DRAWS = 50  # of a random box, until it overlaps the others little enough


def check_boxes(boxes: ArrayLike | Tensor, size: tuple[int, int]) -> NDArray[np.float64]:
    """``boxes`` as float64 ``(M, 4)``.

    Raises:
        InputError: Another shape, or a box that is empty, not finite or not inside the picture of ``size``
            (width, height).
    """
    array = np.asarray(boxes, np.float64)
    if array.size == 0:
        array = array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise InputError(f"boxes have shape {array.shape}; expected (M, 4): left, top, right, bottom in pixels")
    width, height = size
    left, top, right, bottom = array.T
    inside = (left >= 0) & (left < right) & (right <= width) & (top >= 0) & (top < bottom) & (bottom <= height)
    if not inside.all():
        first = int(np.flatnonzero(~inside)[0])
        raise InputError(
            f"box {first} = {array[first].tolist()} is not inside the picture of {width} x {height} pixels: expected "
            f"0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        )
    return array


def filter_proposals(
    boxes: ArrayLike | Tensor, min_side: float = 64, max_aspect: float = 3.0, max_iou: float = 0.5
) -> Tensor:
    """The boxes ``(M', 4)`` that are large and square enough and do not repeat an earlier one, in their order.

    Args:
        boxes: ``(M, 4)``, left, top, right, bottom; the best come first.
        min_side: Smallest width and height in pixels.
        max_aspect: Largest ratio of the longer side to the shorter one.
        max_iou: A box is dropped where its intersection over union with a kept one is not below this.

    Raises:
        InputError: Another shape, or limits that no box can meet.
    """
    _check_limits(min_side, max_aspect, max_iou)
    kept = torch.as_tensor(boxes)
    if kept.numel() == 0:
        return kept.reshape(0, 4)
    if kept.ndim != 2 or kept.shape[1] != 4:
        raise InputError(f"boxes have shape {tuple(kept.shape)}; expected (M, 4): left, top, right, bottom in pixels")
    array = kept.detach().cpu().numpy().astype(np.float64)
    width, height = array[:, 2] - array[:, 0], array[:, 3] - array[:, 1]
    short, long = np.minimum(width, height), np.maximum(width, height)
    chosen: list[int] = []
    for i in np.flatnonzero((short >= min_side) & (short > 0) & (long <= max_aspect * short)):
        if (iou(array[i], array[chosen]) < max_iou).all():
            chosen.append(int(i))
    return kept[chosen]


def iou(box: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of ``box`` ``(4,)`` with each of ``others`` ``(M, 4)``: ``(M,)``."""
    box, others = np.asarray(box, np.float64), np.asarray(others, np.float64).reshape(-1, 4)
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return shared / ((box[2:] - box[:2]).prod() + areas - shared)


def _check_limits(min_side: float, max_aspect: float, max_iou: float) -> None:
    if not (min_side >= 0 and max_aspect >= 1 and 0 < max_iou <= 1):
        raise InputError(
            f"min_side = {min_side}, max_aspect = {max_aspect}, max_iou = {max_iou}: expected min_side >= 0, "
            "max_aspect >= 1 and max_iou above 0, at most 1"
        )


# ------------------------------------------------------------------------------------------------ pairs of crops


@dataclass(frozen=True)
class ScenePair:
    """``crop1``, ``crop2``: whole pixels; ``boxes``: float32 ``(K, 4)``, all inside both crops."""

    crop1: CropBox
    crop2: CropBox
    boxes: Tensor


def scene_overlap(crop1: Sequence[int], crop2: Sequence[int], min_side: int = 1) -> CropBox | None:
    """What two crops share; ``None`` where it is narrower or lower than ``min_side`` pixels."""
    left, top = max(crop1[0], crop2[0]), max(crop1[1], crop2[1])
    right, bottom = min(crop1[2], crop2[2]), min(crop1[3], crop2[3])
    return (left, top, right, bottom) if min(right - left, bottom - top) >= min_side else None


def boxes_inside(boxes: ArrayLike | Tensor, region: Sequence[float]) -> NDArray[np.bool_]:
    """``(M,)``: which of ``boxes`` ``(M, 4)`` lie wholly in ``region``; they may touch its edges."""
    array = np.asarray(boxes)
    left, top, right, bottom = array.T
    return (left >= region[0]) & (top >= region[1]) & (right <= region[2]) & (bottom <= region[3])


def sample_overlapping_scenes(
    size: tuple[int, int],
    boxes: ArrayLike | Tensor,
    num_instances: int = 4,
    tries: int = 20,
    rng: np.random.Generator | None = None,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    min_side: int = 64,
    max_aspect: float = 3.0,
    max_iou: float = 0.5,
) -> ScenePair:
    """Two random crops with at least K boxes inside both, and K of these boxes (UniVIP, algorithm 1).

    Both crops are drawn again at every try. Of more than K boxes in the overlap K are drawn at random; they keep their
    order. Where no try succeeds, the one with the most boxes is taken and random boxes in its overlap are added behind
    (at least ``min_side``, at most ``max_aspect``, IoU below ``max_iou`` as far as there is room). Where no overlap was
    ``min_side`` wide and high, both crops are the whole picture.

    Args:
        size: (width, height) of the picture.
        boxes: ``(M, 4)`` proposals in pixels of the picture, M from 0.
        num_instances: K. With 0 any two crops do.
        tries: Number of tries.
        rng: Where everything random comes from; by default a new generator.
        scale, ratio: Of a crop, as in ``random_crop_box``.

    Raises:
        InputError: A box outside the picture, a number or a limit that cannot be met, or ``rng`` of another kind.
    """
    width, height = size
    if width < 1 or height < 1 or num_instances < 0 or tries < 1:
        raise InputError(
            f"size = {size}, num_instances = {num_instances}, tries = {tries}: expected sides and tries of at least 1 "
            "and num_instances of at least 0"
        )
    _check_limits(min_side, max_aspect, max_iou)
    if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise InputError(
            f"scale = {tuple(scale)}, ratio = {tuple(ratio)}: expected 0 < low <= high, and high at most 1 for scale, "
            "shares of the picture"
        )
    rng = np.random.default_rng() if rng is None else rng
    if not isinstance(rng, np.random.Generator):
        raise InputError(f"rng = {rng!r}: expected a numpy.random.Generator")
    known = check_boxes(boxes, size)
    usable = max(1, min(min_side, width, height))
    whole = (0, 0, width, height)
    best: tuple[CropBox, CropBox, CropBox] = (whole, whole, whole)  # and their overlap
    most = (-1, 0)  # boxes and area of the best overlap
    for _ in range(tries):
        crop1 = random_crop_box(size, rng, scale=scale, ratio=ratio)
        crop2 = random_crop_box(size, rng, scale=scale, ratio=ratio)
        overlap = scene_overlap(crop1, crop2)
        count = int(boxes_inside(known, overlap).sum()) if overlap else 0
        if count >= num_instances:
            best = crop1, crop2, overlap or crop1
            break
        if overlap and scene_overlap(crop1, crop2, usable):
            score = (count, (overlap[2] - overlap[0]) * (overlap[3] - overlap[1]))
            if score > most:
                best, most = (crop1, crop2, overlap), score
    crop1, crop2, region = best
    shared = known[boxes_inside(known, region)]
    if len(shared) > num_instances:
        shared = shared[np.sort(rng.choice(len(shared), num_instances, replace=False))]
    missing = num_instances - len(shared)
    if missing > 0:
        shared = np.concatenate([shared, random_boxes(region, missing, rng, min_side, max_aspect, max_iou, shared)])
    return ScenePair(crop1, crop2, torch.from_numpy(shared.astype(np.float32)))


def random_boxes(
    region: CropBox,
    count: int,
    rng: np.random.Generator,
    min_side: int = 64,
    max_aspect: float = 3.0,
    max_iou: float = 0.5,
    known: ArrayLike = (),
) -> NDArray[np.float64]:
    """``(count, 4)`` random boxes of whole pixels in ``region``.

    Sides are at least ``min_side`` (or the region's shorter side), ratios at most ``max_aspect``. Of 50 draws the first
    is taken whose IoU with the boxes before and with ``known`` is below ``max_iou``, else the one with the smallest.
    """
    boxes = np.asarray(known, np.float64).reshape(-1, 4)
    given = len(boxes)
    for _ in range(count):
        best, least = None, math.inf
        for _ in range(_DRAWS):
            box = _random_box(region, rng, min_side, max_aspect)
            largest = iou(box, boxes).max(initial=0.0)
            if largest < least:
                best, least = box, largest
            if largest < max_iou:
                break
        boxes = np.concatenate([boxes, [best]])
    return boxes[given:]


def _random_box(region: CropBox, rng: np.random.Generator, min_side: int, max_aspect: float) -> tuple[int, ...]:
    """Width log-uniform, height uniform within the ratio, then a uniform place."""
    width, height = region[2] - region[0], region[3] - region[1]
    low = max(1, min(math.ceil(min_side), width, height))
    widest = min(width, math.floor(height * max_aspect))
    w = round(math.exp(rng.uniform(math.log(low), math.log(widest))))
    shortest, tallest = max(low, math.ceil(w / max_aspect)), min(height, math.floor(w * max_aspect))
    h = int(rng.integers(shortest, tallest + 1))
    left = region[0] + int(rng.integers(width - w + 1))
    top = region[1] + int(rng.integers(height - h + 1))
    return left, top, left + w, top + h
