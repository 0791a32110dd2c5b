"""Regions: a part of a picture, named by the picture's path or address and a media fragment.

    photos/street.jpg#xywh=160,120,320,240
    photos/street.jpg#xywh=percent:25,25,50,50
    dataset:detection:canvases?split=test#7#xywh=4,8,20,30

The form is that of the W3C recommendation "Media Fragments URI 1.0 (basic)", section 4.2.2: x, y, width and height as
whole numbers, in pixels unless ``percent:`` says otherwise, from the top left corner of the upright picture. A gallery
keeps such an address for an object in a picture, so that the object is cut out again when an upgrade reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from bowerbird.errors import DataError

MARK = "#xywh="
_VALUE = re.compile(r"(?:(pixel|percent):)?([0-9]+),([0-9]+),([0-9]+),([0-9]+)")


@dataclass(frozen=True)
class Region:
    """``x``, ``y``, ``width`` and ``height`` of a part of a picture, in pixels or in ``percent`` of its sides."""

    x: int
    y: int
    width: int
    height: int
    percent: bool = False

    def __str__(self) -> str:
        return f"xywh={'percent:' if self.percent else ''}{self.x},{self.y},{self.width},{self.height}"

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels, in a picture of ``width`` x ``height``.

        Of percents, every pixel that the region touches. What reaches over the right or the lower edge is cut off, as
        the recommendation says.

        Raises:
            DataError: The region has no area, or lies outside the picture.
        """
        if not self.width or not self.height:
            raise DataError(f"the region {self} has no area: it is {self.width} wide and {self.height} high")
        left, top, right, bottom = self.x, self.y, self.x + self.width, self.y + self.height
        if self.percent:
            left, top = left * width // 100, top * height // 100
            right, bottom = -(-right * width // 100), -(-bottom * height // 100)  # rounded up
        if left >= width or top >= height:
            raise DataError(f"the region {self} lies outside the picture, which has {width} x {height} pixels")
        return left, top, min(right, width), min(bottom, height)


def split_region(source: str | Path) -> tuple[str, Region | None]:
    """A path or address without its region, and the region; ``None`` where it has none.

    A file whose whole name is ``source`` is that file: names may hold ``#``.

    Raises:
        DataError: What follows ``#xywh=`` is no region.
    """
    text = str(source)
    if MARK not in text or Path(text).is_file():
        return text, None
    base, _, value = text.rpartition(MARK)
    found = _VALUE.fullmatch(unquote(value))
    if found is None:
        raise DataError(
            f"{text!r}: {value!r} is no region; expected {MARK}x,y,w,h in whole pixels, or {MARK}percent:x,y,w,h"
        )
    x, y, width, height = map(int, found.groups()[1:])
    return base, Region(x, y, width, height, percent=found[1] == "percent")


def region_around(box: Sequence[float], *, width: int, height: int) -> Region | None:
    """The region of every pixel that a box touches, in a picture of ``width`` x ``height``; ``None`` where none is.

    Args:
        box: x1 y1 x2 y2 in pixels; what lies outside the picture is cut off.
    """
    x1, y1, x2, y2 = box
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    right, bottom = min(width, math.ceil(x2)), min(height, math.ceil(y2))
    if right <= left or bottom <= top:
        return None
    return Region(left, top, right - left, bottom - top)


def region_uri(source: str | Path, region: Region) -> str:
    """The address of a region of the picture at ``source``, a path or the address of a data set's item."""
    return f"{source}#{region}"
