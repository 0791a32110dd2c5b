"""``mim:canvases``: items of another data set on textured canvases, with their boxes, masks and classes.

Pictures with several objects, or with one object in a part of the picture, whose truth is known. Made to study methods
for such pictures where no annotated photographs are at hand.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bowerbird.data import subset
from bowerbird.data.compose import foreground, free_place, scaled_to, texture
from bowerbird.data.dataset import Dataset
from bowerbird.data.uris import open_dataset
from bowerbird.errors import DataError

Pair = Annotated[tuple[int, int], Field(strict=False)]


class CanvasesConfig(BaseModel):
    """Settings of ``mim:canvases``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(
        default="core:fashion-mnist", description="Data set of the items, NAME or NAME?key=value; its splits are ours."
    )
    count: int | None = Field(
        default=None, ge=1, description="Number of canvases; by default one around every item of the source."
    )
    canvas_size: int = Field(default=96, ge=8, le=1024, description="Side of a canvas in pixels.")
    items: Pair = Field(default=(4, 6), description="Fewest and most items on a canvas.")
    item_size: Pair = Field(default=(20, 36), description="Smallest and largest longer side of an item in pixels.")
    background: Literal["dark", "none"] = Field(
        default="dark",
        description="dark: leave out the black around the source's items; none: paste whole pictures.",
    )
    part: Literal["canvases", "items"] = Field(
        default="canvases", description="items: every box of every canvas, cut out as a picture of its own."
    )
    seed: int = Field(default=0, ge=0, description="Of places, sizes, companions and textures.")

    @model_validator(mode="after")
    def _items_fit(self) -> Self:
        for name in ("items", "item_size"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} = {[low, high]}: expected two whole numbers, 1 <= fewest <= most")
        if self.item_size[1] > self.canvas_size or self.items[1] * self.item_size[1] ** 2 > self.canvas_size**2:
            raise ValueError(
                f"items = {list(self.items)}, item_size = {list(self.item_size)}: {self.items[1]} items of "
                f"{self.item_size[1]} pixels do not fit on a canvas of {self.canvas_size} pixels (canvas_size)"
            )
        return self


class Canvases(Dataset):
    """Canvas i shows item i of the source and random companions from the same split; ids are those of the source.

    Its keys: ``image`` (RGB); ``boxes`` float32 ``(R, 4)``, left, top, right, bottom in pixels, around what is pasted;
    ``masks`` bool ``(R, H, W)``, the pixels of each item that no later item covers; ``box_labels``, R class indices;
    ``label``, the class of item i, whose box is the first. With ``part = "items"`` a picture is the square around one
    box (a tenth of its side added), with one box, mask and label; its id ends with ``/box-K``.
    """

    def __init__(self, source: Dataset, config: CanvasesConfig) -> None:
        self.source, self.config = source, config
        self._latest: tuple[int, dict[str, Any]] | None = None  # boxes of a canvas are mostly read one after the other
        self.classes = source.classes

    @classmethod
    def build(cls, config: CanvasesConfig | None = None, split: str | None = None) -> Self:
        """Raises ``UnknownNameError`` for another data set or split, ``DataError`` where it has too few items."""
        config = config or CanvasesConfig()
        source, _ = open_dataset(config.source, split)
        if not source.classes:
            raise DataError(
                f"mim:canvases: the items of {config.source!r} have no classes; name a data set with labels"
            )
        if config.count is not None:
            if config.count > len(source):
                raise DataError(
                    f"mim:canvases: count = {config.count}, but {config.source!r}"
                    f"{f', split {split!r},' if split else ''} has {len(source)} items; one canvas is made around each"
                )
            source = subset(source, range(config.count))
        return cls(source, config)

    def __len__(self) -> int:
        return len(self._parts) if self.config.part == "items" else len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        if self.config.part == "canvases":
            return self.canvas(index)
        canvas, box = self._parts[index]
        latest = self._latest
        if latest is None or latest[0] != canvas:
            latest = self._latest = canvas, self.canvas(canvas)
        return self._cut_out(latest[1], box) | {"item_id": self.item_ids[index]}

    @cached_property
    def item_ids(self) -> Sequence[str]:
        ids = list(self.source.item_ids)
        if self.config.part == "canvases":
            return ids
        return [f"{ids[canvas]}/box-{box}" for canvas, box in self._parts]

    def labels(self) -> Sequence[int]:
        known = self.source.labels()
        if self.config.part == "canvases":
            return known
        return [known[position] for i in range(len(self.source)) for position in self._shown(i)[1]]

    @cached_property
    def _parts(self) -> list[tuple[int, int]]:
        """Canvas and box of every item that is cut out."""
        return [(i, box) for i in range(len(self.source)) for box in range(len(self._shown(i)[1]))]

    def _shown(self, index: int) -> tuple[np.random.Generator, list[int]]:
        """The generator of canvas ``index`` and the positions in the source of what it shows."""
        # By id, not by position: a canvas keeps its texture whatever else is in the split.
        generator = np.random.default_rng([self.config.seed, zlib.crc32(self._source_ids[index].encode())])
        low, high = self.config.items
        others = generator.integers(len(self.source), size=generator.integers(low, high + 1) - 1)
        return generator, [index, *others.tolist()]

    @cached_property
    def _source_ids(self) -> list[str]:
        return list(self.source.item_ids)

    def canvas(self, index: int) -> dict[str, Any]:
        """Canvas ``index`` with everything that is known of it."""
        generator, shown = self._shown(index)
        side = self.config.canvas_size
        canvas = texture((side, side), generator)
        masks = np.zeros((len(shown), side, side), bool)
        boxes = np.zeros((len(shown), 4), np.float32)
        labels: list[int] = []
        taken: list[tuple[int, int, int, int]] = []
        for k, position in enumerate(shown):
            item = self.source[position]
            sizes = self.config.item_size
            picture = scaled_to(item["image"], int(generator.integers(sizes[0], sizes[1] + 1)))
            width, height = picture.size
            mask = self._mask(picture)
            left, top = free_place((side, side), (width, height), taken, generator)
            taken.append((left, top, left + width, top + height))
            canvas.paste(picture, (left, top), Image.fromarray(mask))
            whole = np.zeros((side, side), bool)
            whole[top : top + height, left : left + width] = mask
            masks[:k] &= ~whole
            masks[k] = whole
            rows, columns = np.flatnonzero(whole.any(axis=1)), np.flatnonzero(whole.any(axis=0))
            boxes[k] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            labels.append(int(item["label"]))
        return {
            "image": canvas,
            "label": labels[0],
            "item_id": self._source_ids[index],
            "boxes": boxes,
            "masks": masks,
            "box_labels": labels,
        }

    def _mask(self, picture: Image.Image) -> NDArray[np.bool_]:
        """Which pixels of ``picture`` are pasted; all of them where everything is dark."""
        if self.config.background == "dark":
            return foreground(picture, "dark")
        return np.ones((picture.height, picture.width), bool)

    def _cut_out(self, canvas: dict[str, Any], box: int) -> dict[str, Any]:
        left, top, right, bottom = canvas["boxes"][box]
        side = min(self.config.canvas_size, round(max(right - left, bottom - top) * 1.1))
        x, y = (
            int(np.clip(round((low + high - side) / 2), 0, self.config.canvas_size - side))
            for low, high in ((left, right), (top, bottom))
        )
        return {
            "image": canvas["image"].crop((x, y, x + side, y + side)),
            "label": canvas["box_labels"][box],
            "boxes": canvas["boxes"][[box]] - np.array([x, y, x, y], np.float32),
            "masks": canvas["masks"][[box], y : y + side, x : x + side],
            "box_labels": [canvas["box_labels"][box]],
        }
