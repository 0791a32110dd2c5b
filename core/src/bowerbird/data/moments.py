"""Moments: a stretch of a video, named by the video's path or address and a media fragment.

    clips/match.mp4#t=12.5,20
    clips/match.mp4#t=1:02:00
    dataset:videotext:moving?split=test#test/000007#t=0,0.5

The form is that of the W3C recommendation "Media Fragments URI 1.0 (basic)", section 4.2.1 (normal play time): start
and end in seconds, or as ``mm:ss`` or ``hh:mm:ss``, from the first frame; the start belongs to the moment, the end does
not. Without a start it is the beginning, without an end the end of the video. A gallery keeps such an address for a
clip of a longer video, so that the clip is read again when an upgrade encodes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from bowerbird.errors import DataError

MARK = "#t="
SHORTEST = 0.001  # seconds: addresses are in milliseconds
_TIME = re.compile(r"(?:(?:([0-9]+):)?([0-5]?[0-9]):(?=[0-5]?[0-9](?![0-9])))?([0-9]+(?:\.[0-9]*)?)")


@dataclass(frozen=True)
class Moment:
    """From ``start`` (included) to ``end`` (not included; ``None``: of the video), in seconds from the first frame."""

    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < math.inf or (self.end is not None and not self.start < self.end < math.inf):
            raise DataError(f"the moment {self} is empty: a moment starts at 0 or later, and ends after its start")

    def __str__(self) -> str:
        return f"t={_seconds(self.start)}" + ("" if self.end is None else f",{_seconds(self.end)}")

    def inside(self, outer: Moment | None) -> Moment:
        """This moment of the clip ``outer``, as a moment of the video that ``outer`` is a clip of.

        Raises:
            DataError: It starts where ``outer`` has ended.
        """
        if outer is None:
            return self
        ends = [end for end in (outer.end, None if self.end is None else outer.start + self.end) if end is not None]
        start = outer.start + self.start
        if ends and start >= min(ends):
            raise DataError(f"the moment {self} lies outside the clip {outer}")
        return Moment(start, min(ends) if ends else None)


def split_moment(source: str | Path) -> tuple[str, Moment | None]:
    """A path or address without its moment, and the moment; ``None`` where it has none.

    A file whose whole name is ``source`` is that file: names may hold ``#``.

    Raises:
        DataError: What follows ``#t=`` is no moment.
    """
    text = str(source)
    if MARK not in text or Path(text).is_file():
        return text, None
    base, _, value = text.rpartition(MARK)
    first, comma, second = unquote(value).removeprefix("npt:").partition(",")
    start, end = _TIME.fullmatch(first), _TIME.fullmatch(second)
    if not (start or (comma and not first)) or not (end or not comma):
        raise DataError(
            f"{text!r}: {value!r} is no moment; expected {MARK}start,end in seconds, such as {MARK}12.5,20; "
            "one of the two may be missing"
        )
    try:
        return base, Moment(_parsed(start) if start else 0.0, _parsed(end) if end else None)
    except DataError as error:
        raise DataError(f"{text!r}: {error}") from None


def moment_uri(source: str | Path, moment: Moment) -> str:
    """The address of a moment of the video at ``source``, a path or the address of a data set's item."""
    return f"{source}#{moment}"


def clips_of(seconds: float, length: float) -> Iterator[Moment]:
    """A video of ``seconds`` cut into moments of ``length`` seconds, in order.

    The last reaches to the end; where less than half a length would be left, the one before takes it in.

    Raises:
        DataError: ``length`` is below a millisecond, the resolution of addresses, or not finite.
    """
    if not SHORTEST <= length < math.inf:
        raise DataError(f"a video cannot be cut into clips of {length} s; expected a number from {SHORTEST}")
    count = max(1, int(seconds / length + 0.5))
    for number in range(count):
        yield Moment(number * length, seconds if number == count - 1 else (number + 1) * length)


def _parsed(found: re.Match[str]) -> float:
    hours, minutes, seconds = found.groups()
    return 3600.0 * int(hours or 0) + 60.0 * int(minutes or 0) + float(seconds)


def _seconds(value: float) -> str:
    """In milliseconds, without trailing zeros."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
