"""``domain:canvases``: small segmentation sets that look different, composed of the items of other data sets.

Every set has its own source of items, its own look and its own classes. Made to study training on several segmentation
sets where no annotated photographs are at hand.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bowerbird.data.compose import Paper, foreground, item_classes, scaled_to
from bowerbird.data.uris import open_dataset
from bowerbird.errors import DataError
from bowerbird_domain.segmentation_sets import SegmentationSets

Pair = Annotated[tuple[int, int], Field(strict=False)]

_TRIES = 20  # places tried for an item that shall not cover others


class CanvasSet(BaseModel):
    """Items, look and classes of one set."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(default="core:digits", description="Data set of the items, NAME or NAME?key=value.")
    splits: dict[str, str] = Field(
        default={}, description="Split of the canvases -> split of the source, where that has another name."
    )
    count: int | None = Field(default=None, ge=1, description="Canvases of this set; by default those of all sets.")
    paper: Paper = Field(default="dark", description="What the source's items are drawn on.")
    class_key: str | None = Field(
        default=None, description="Take the class from this entry of the source's metadata instead of its label."
    )
    groups: int | None = Field(
        default=None, ge=1, description="Merge neighbouring classes of the source into so many; by default none."
    )
    inverted: bool = Field(default=False, description="Swap light and dark.")
    tint: Annotated[tuple[float, float, float], Field(strict=False)] = Field(
        default=(1.0, 1.0, 1.0), description="Factors of red, green and blue, 0 to 1."
    )
    noise: float = Field(
        default=0.0, ge=0, le=1, description="Deviation of noise in every pixel; 1: from black to white."
    )

    @model_validator(mode="after")
    def _factors(self) -> Self:
        if not all(0 <= factor <= 1 for factor in self.tint):
            raise ValueError(f"tint = {list(self.tint)}: expected three factors from 0 to 1")
        return self


def _two_looks() -> dict[str, CanvasSet]:
    return {
        "plain": CanvasSet(),
        "inverted": CanvasSet(groups=5, inverted=True, tint=(1.0, 0.8, 0.5), noise=0.1),
    }


def three_sources() -> dict[str, Any]:
    """Digits, clothes and emoji, each on its own paper and with its own classes. Needs ``bowerbird-emoji``."""
    return {
        "canvas_size": 64,
        "items": [2, 4],
        "item_size": [18, 28],
        "sets": {
            "digits": {"source": "core:digits"},
            "clothes": {"source": "core:fashion-mnist", "inverted": True, "tint": [0.9, 1.0, 0.8]},
            "emoji": {
                "source": "emoji:styles", "splits": {"train": "seen", "test": "unseen"}, "paper": "light",
                "class_key": "category", "noise": 0.05,
            },
        },
    }  # fmt: skip


class CanvasesConfig(BaseModel):
    """Settings of ``domain:canvases``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sets: dict[str, CanvasSet] = Field(
        default_factory=_two_looks,
        description="Name -> settings of every set. By default digits, grey on black, and the same inverted, tinted "
        "and noisy, with classes merged by twos.",
    )
    count: int = Field(default=120, ge=1, description="Canvases of every set, in every split.")
    canvas_size: int = Field(default=16, ge=4, le=1024, description="Side of a canvas in pixels.")
    items: Pair = Field(default=(2, 2), description="Fewest and most items on a canvas.")
    item_size: Pair = Field(default=(8, 8), description="Smallest and largest longer side of an item in pixels.")
    only: str | None = Field(default=None, description="Keep this set alone; its canvases stay the same.")
    seed: int = Field(default=0, ge=0, description="Of items, places, sizes and noise.")

    @model_validator(mode="after")
    def _items_fit(self) -> Self:
        for name in ("items", "item_size"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name} = {[low, high]}: expected two whole numbers, 1 <= smaller <= larger")
        if self.item_size[1] > self.canvas_size:
            raise ValueError(
                f"item_size = {list(self.item_size)} does not fit on a canvas of {self.canvas_size} pixels"
            )
        if not self.sets or any(not name or "/" in name for name in self.sets):
            raise ValueError(f"sets: expected at least one, with names without a slash; found {list(self.sets)}")
        if self.only is not None and self.only not in self.sets:
            raise ValueError(f"only = {self.only!r}: there are the sets {', '.join(self.sets)}")
        return self


class Canvases(SegmentationSets):
    """Canvas i of a set shows random items of its source's split at random places; later items hide earlier ones.

    A canvas is a function of ``seed``, the name of its set, the split and its number, and of nothing else in the
    settings of other sets. Class 0 is the background.
    """

    def __init__(self, sources: Mapping[str, _Source], config: CanvasesConfig, split: str | None) -> None:
        counts = {name: config.sets[name].count or config.count for name in sources}
        part = split or "all"
        ids = [f"{name}/{part}/{i:06d}" for name, count in counts.items() for i in range(count)]
        super().__init__({name: source.classes for name, source in sources.items()}, counts, ids)
        self.sources, self.config, self.part = sources, config, part

    @classmethod
    def build(cls, config: CanvasesConfig | None = None, split: str | None = None) -> Self:
        """``split`` is that of the sources. Raises as they do, and ``DataError`` for a source without classes."""
        config = config or CanvasesConfig()
        chosen = config.sets if config.only is None else {config.only: config.sets[config.only]}
        return cls({name: _Source(look, split) for name, look in chosen.items()}, config, split)

    def read(self, domain: int, position: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        name = self.domains[domain]
        key = zlib.crc32(f"{name}/{self.part}".encode())
        generator = np.random.default_rng([self.config.seed, key, position])
        source, look, side = self.sources[name], self.config.sets[name], self.config.canvas_size
        canvas = np.zeros((side, side, 3), np.float32)
        label_map = np.zeros((side, side), np.uint8)
        taken = np.zeros((side, side), bool)
        low, high = self.config.items
        for _ in range(int(generator.integers(low, high + 1))):
            picture, label = source.item(int(generator.integers(len(source))))
            longer = int(generator.integers(self.config.item_size[0], self.config.item_size[1] + 1))
            pixels, mask = _drawn(picture, longer, look.paper)
            top, left = _free_place(taken, mask.shape, generator)
            rows, columns = slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1])
            canvas[rows, columns][mask] = pixels[mask]
            label_map[rows, columns][mask] = label + 1
            taken[rows, columns] = True
        if look.inverted:
            canvas = 1 - canvas
        canvas = canvas * np.asarray(look.tint, np.float32)
        canvas = canvas + look.noise * generator.standard_normal(canvas.shape, dtype=np.float32)
        return Image.fromarray(np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)), label_map


class _Source:
    """Items of another data set with the classes that a set of canvases gives them."""

    def __init__(self, look: CanvasSet, split: str | None) -> None:
        split = look.splits.get(split, split) if split is not None else None
        self.items, _ = open_dataset(look.source, split)
        where = f"domain:canvases: the items of {look.source!r}{f', split {split!r},' if split else ''}"
        names, self.labels = item_classes(self.items, look.class_key, where)
        if look.groups is not None:
            if look.groups > len(names):
                raise DataError(f"{where} have {len(names)} classes, which cannot make groups = {look.groups}")
            merged = np.arange(len(names)) * look.groups // len(names)
            self.labels = merged[self.labels]
            names = ["-".join(np.asarray(names)[merged == group]) for group in range(look.groups)]
        if len(names) > 254:
            raise DataError(f"{where} have {len(names)} classes; a label map holds 254 and the background. Set groups")
        self.classes = ("background", *names)

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, position: int) -> tuple[Image.Image, int]:
        picture: Image.Image = self.items[position]["image"]
        return picture, int(self.labels[position])


def _drawn(picture: Image.Image, longer: int, paper: Paper) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pixels (h, w, 3) in 0..1 of an item with ``longer`` as its longer side, and which of them are not paper."""
    picture = scaled_to(picture, longer)
    mask = foreground(picture, paper)
    return (np.asarray(picture) / 255).astype(np.float32), mask


def _free_place(taken: NDArray[np.bool_], size: tuple[int, ...], generator: np.random.Generator) -> tuple[int, int]:
    """(top, left) of a random place for ``size`` that covers as little of ``taken`` as can be found."""
    best, least = (0, 0), taken.size + 1
    for _ in range(_TRIES):
        top, left = (int(generator.integers(whole - part + 1)) for whole, part in zip(taken.shape, size, strict=True))
        covered = int(taken[top : top + size[0], left : left + size[1]].sum())
        if covered < least:
            best, least = (top, left), covered
        if not covered:
            break
    return best
