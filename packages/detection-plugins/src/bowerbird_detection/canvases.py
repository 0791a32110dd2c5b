"""``detection:canvases``: pictures of several objects, composed of the items of other data sets on textured grounds.

Boxes, masks and keypoints are exact, the long tail of the classes is set, nothing is downloaded. Made to study
detectors where no annotated photographs are at hand.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.compose import Paper, foreground, free_place, item_classes, scaled_to, texture
from bowerbird.data.uris import open_dataset
from bowerbird.errors import DataError
from bowerbird.protocols import Objects
from bowerbird_detection.data_configs import CanvasesConfig, ItemSource
from bowerbird_detection.detection_set import DetectionSet

KEYPOINTS = ("top", "bottom", "left", "right")
VISIBLE, HIDDEN = 2, 1


@dataclass(frozen=True)
class _Layout:
    """Where things are on a canvas. Boxes are left, top, right, bottom; ``masks`` (R, h, w) what is seen of each."""

    size: tuple[int, int]
    pasted: Sequence[tuple[Image.Image, tuple[int, int], NDArray[np.bool_]]]  # picture, left and top, its pixels
    labels: Sequence[int]
    masks: NDArray[np.bool_]
    keypoints: NDArray[np.float32]


class Canvases(DetectionSet):
    """Canvas i of a split is a function of the settings, the split and i.

    Later objects hide earlier ones; boxes and masks are of what is seen, and an object that is hidden altogether is not
    annotated. Keypoints are the middles of the outermost pixels of the whole object, hidden (1) where a later one
    covers them. Classes are named as in their source; with several sources SOURCE/CLASS.
    """

    has_masks = True

    def __init__(self, sources: Sequence[_Items], config: CanvasesConfig, split: str | None) -> None:
        self.sources, self.config, self.part = sources, config, split or "all"
        several = len(sources) > 1
        self.classes = tuple(f"{s.name}/{one}" if several else one for s in sources for one in s.classes)
        if len(set(self.classes)) < len(self.classes):
            raise DataError("detection:canvases: two of the sources have the same name and classes of the same names")
        self.keypoint_names = KEYPOINTS if config.keypoints else ()
        self._starts = np.cumsum([0, *(len(s.classes) for s in sources)])
        self._count = config.counts.get(self.part, config.count)
        self._ids = [f"{self.part}/{i:06d}" for i in range(self._count)]
        self._layout = lru_cache(maxsize=4)(self._make_layout)

    @classmethod
    def build(cls, config: CanvasesConfig | None = None, split: str | None = None) -> Self:
        """``split`` is that of the sources. Raises as they do, and ``DataError`` for a source without classes."""
        config = config or CanvasesConfig()
        return cls([_Items(source, split) for source in config.sources], config, split)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_layout"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._layout = lru_cache(maxsize=4)(self._make_layout)

    def __len__(self) -> int:
        return self._count

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def size(self, index: int) -> tuple[int, int]:
        return self._sides(self._generator(index))

    def objects(self, index: int) -> Objects:
        layout = self._layout(index)
        boxes = np.zeros((len(layout.labels), 4), np.float32)
        for box, mask in zip(boxes, layout.masks, strict=True):
            top, left, bottom, right = _extent(mask)
            box[:] = left, top, right, bottom
        return Objects(
            boxes=torch.from_numpy(boxes),
            labels=torch.tensor(layout.labels, dtype=torch.int64),
            masks=torch.from_numpy(layout.masks.copy()),
            keypoints=torch.from_numpy(layout.keypoints.copy()) if self.keypoint_names else None,
        )

    def image(self, index: int) -> Image.Image:
        layout = self._layout(index)
        height, width = layout.size
        # A generator of its own, so that objects are known without drawing the ground.
        canvas = texture((width, height), np.random.default_rng([*self._key(index), 1]))
        for picture, place, mask in layout.pasted:
            canvas.paste(picture, place, Image.fromarray(mask))
        return canvas

    def _key(self, index: int) -> list[int]:
        return [self.config.seed, zlib.crc32(self.part.encode()), index]

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([*self._key(index), 0])

    def _sides(self, generator: np.random.Generator) -> tuple[int, int]:
        low, high = self.config.canvas_size
        height, width = generator.integers(low, high + 1, 2).tolist()
        return height, width

    @cached_property
    def planned_labels(self) -> list[list[int]]:
        """Classes of the objects of every canvas, the numbers of each class exactly as ``tail`` says."""
        generator = np.random.default_rng([self.config.seed, zlib.crc32(self.part.encode())])
        low, high = self.config.items
        numbers = generator.integers(low, high + 1, self._count)
        numbers[generator.random(self._count) < self.config.empty] = 0
        tail = 1.0 if self.part in self.config.balanced_splits else self.config.tail
        counts = geometric_counts(int(numbers.sum()), len(self.classes), tail)
        if self.config.tail_order == "shuffled":  # alike in every split
            counts = counts[np.random.default_rng(self.config.seed).permutation(len(counts))]
        labels = generator.permutation(np.repeat(np.arange(len(counts)), counts))
        return [part.tolist() for part in np.split(labels, np.cumsum(numbers)[:-1])]

    def _make_layout(self, index: int) -> _Layout:
        generator = self._generator(index)
        height, width = self._sides(generator)
        low, high = self.config.distractors
        shown: list[int | None] = [None] * int(generator.integers(low, high + 1))
        shown += self.planned_labels[index]
        pasted, labels, points = [], [], []
        taken: list[tuple[int, int, int, int]] = []
        masks: list[NDArray[np.bool_]] = []
        for label in shown:
            drawn = int(generator.integers(len(self.classes))) if label is None else label
            position = int(np.searchsorted(self._starts, drawn, side="right")) - 1
            source = self.sources[position]
            picture = source.picture(drawn - int(self._starts[position]), generator)
            sizes = self.config.item_size
            picture = scaled_to(picture, int(generator.integers(sizes[0], sizes[1] + 1)))
            if label is None:
                picture = scrambled(picture, generator)
            mask = foreground(picture, source.paper)
            left, top = free_place((width, height), picture.size, taken, generator)
            taken.append((left, top, left + picture.width, top + picture.height))
            pasted.append((picture, (left, top), mask))
            whole = np.zeros((height, width), bool)
            whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
            for earlier in masks:
                earlier &= ~whole
            if label is not None:
                labels.append(label)
                masks.append(whole)
                points.append(extreme_points(whole))
        seen = [i for i, mask in enumerate(masks) if mask.any()]
        visible = np.zeros((len(seen), height, width), bool)
        keypoints = np.zeros((len(seen), len(KEYPOINTS), 3), np.float32)
        for row, i in enumerate(seen):
            visible[row] = masks[i]
            keypoints[row, :, :2] = points[i]
            x, y = points[i].astype(np.int64).T
            keypoints[row, :, 2] = np.where(masks[i][y, x], VISIBLE, HIDDEN)
        return _Layout((height, width), pasted, [labels[i] for i in seen], visible, keypoints)


class _Items:
    """Items of another data set by class."""

    def __init__(self, source: ItemSource, split: str | None) -> None:
        inner = source.splits.get(split, split) if split is not None else None
        self.items, _ = open_dataset(source.source, inner)
        self.paper: Paper = source.paper
        self.name = source.source.partition("?")[0].partition(":")[2]
        where = f"detection:canvases: the items of {source.source!r}{f', split {inner!r},' if inner else ''}"
        self.classes, labels = item_classes(self.items, source.class_key, where)
        self.positions = [np.flatnonzero(labels == label) for label in range(len(self.classes))]
        lacking = [name for name, found in zip(self.classes, self.positions, strict=True) if not len(found)]
        if lacking:
            raise DataError(f"{where} have no item of the class {lacking[0]!r}; take another split")

    def picture(self, label: int, generator: np.random.Generator) -> Image.Image:
        positions = self.positions[label]
        picture: Image.Image = self.items[int(positions[generator.integers(len(positions))])]["image"]
        return picture


def geometric_counts(total: int, classes: int, tail: float) -> NDArray[np.int64]:
    """``(classes,)`` whole numbers that sum to ``total`` and fall geometrically, the first ``tail`` times the last.

    What rounding leaves goes to the largest remainders. Where the last class would get less than one, every class gets
    one first and the rest falls geometrically; where there are fewer than classes, the first classes get one each.
    """
    if total < classes:
        return (np.arange(classes) < total).astype(np.int64)
    weights = tail ** (-np.arange(classes) / max(1, classes - 1))
    weights /= weights.sum()
    shares = total * weights if total * weights.min() >= 1 else 1 + (total - classes) * weights
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: total - counts.sum()]] += 1
    return counts


def scrambled(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """``picture`` with its four quarters in another order, each turned by half: like an item, but none."""
    width, height = picture.width // 2, picture.height // 2
    result = picture.copy()
    right, bottom = picture.width - width, picture.height - height
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
    shift = int(generator.integers(1, 4))
    for i, (left, top) in enumerate(corners):
        x, y = corners[(i + shift) % 4]
        quarter = picture.crop((x, y, x + width, y + height)).transpose(Image.Transpose.ROTATE_180)
        result.paste(quarter, (left, top))
    return result


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def extreme_points(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """``(4, 2)``: x and y of the topmost, bottommost, leftmost and rightmost pixel of a mask, of its middle.

    Of several pixels that are outermost on a side, the middle one.
    """
    top, left, bottom, right = _extent(mask)

    def middle(line: NDArray[np.bool_]) -> int:
        found = np.flatnonzero(line)
        return int(found[len(found) // 2])

    points = [
        (middle(mask[top]), top), (middle(mask[bottom - 1]), bottom - 1),
        (left, middle(mask[:, left])), (right - 1, middle(mask[:, right - 1])),
    ]  # fmt: skip
    return np.asarray(points, np.float32) + 0.5
