"""Pictures composed of the items of other data sets: the parts that canvases of several plugins share.

What these functions return for a generator in a given state never changes: measured results depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.errors import DataError

Paper = Literal["dark", "light"]

_CELLS = (3, 7, 16, 40)  # cells across a canvas of the four noises that make its texture
_DIFFERENT = 25  # grey values of 0..255 that a pixel of an item must differ by from the paper it was drawn on
_TRIES = 60  # places tried for an item that shall not cover others


def texture(size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    """A coloured texture of (width, height) pixels: the mean of smooth noises of four sizes around a random colour."""
    colour = generator.integers(40, 216, 3, dtype=np.uint8)
    canvas = Image.new("RGB", size, tuple(colour.tolist()))
    for cells in _CELLS:
        noise = Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        canvas = Image.blend(canvas, noise.resize(size, Image.Resampling.BICUBIC), 0.3)
    return canvas


def scaled_to(picture: Image.Image, longer: int) -> Image.Image:
    """``picture`` with ``longer`` pixels on its longer side."""
    scale = longer / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BILINEAR)


def foreground(picture: Image.Image, paper: Paper) -> NDArray[np.bool_]:
    """bool ``(h, w)``, the pixels that are not paper; all of them where nothing can be told from the paper."""
    if paper == "dark":
        mask = np.asarray(picture.convert("L")) > _DIFFERENT
    else:
        mask = np.asarray(picture.convert("RGB")).min(axis=2) < 255 - _DIFFERENT
    return mask if mask.any() else np.ones_like(mask)


def free_place(
    canvas: tuple[int, int],
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
    generator: np.random.Generator,
) -> tuple[int, int]:
    """(left, top) of a random place for ``size`` on ``canvas`` (width, height) that covers little of ``taken``.

    The first of 60 random places that covers none of the boxes (left, top, right, bottom), or the one that covers the
    fewest pixels of them.
    """
    best, least = (0, 0), np.inf
    for _ in range(_TRIES):
        left, top = (int(generator.integers(whole - part + 1)) for whole, part in zip(canvas, size, strict=True))
        covered = sum(
            max(0, min(left + size[0], r) - max(left, x)) * max(0, min(top + size[1], b) - max(top, y))
            for x, y, r, b in taken
        )
        if covered < least:
            best, least = (left, top), covered
        if not covered:
            break
    return best


def item_classes(items: Dataset, key: str | None, where: str) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes of ``items`` and the class index of each item, without decoding images.

    Args:
        key: Entry of the items' metadata that is their class; ``None``: their label.
        where: Beginning of the message of an error.

    Raises:
        DataError: The items have no labels, or no such metadata.
    """
    if not items.classes or len(items) == 0:
        raise DataError(f"{where} have no classes; name a data set with labels")
    if key is None:
        return list(items.classes), np.asarray(items.labels(), np.int64)
    metadata: Sequence[Mapping[str, Any]] = items.metadata() or ()
    known = sorted(metadata[0]) if metadata else []
    if key not in known:
        raise DataError(f"{where} have no metadata {key!r} (class_key); they have {', '.join(known) or 'none'}")
    values = [str(entry[key]) for entry in metadata]
    names = sorted(set(values))
    return names, np.asarray([names.index(value) for value in values], np.int64)
