"""What is wrong with annotation files: found while a data set is opened, so that no epoch ends for one bad entry.

A data set of hundreds of thousands of pictures has bad entries. Each is reported by file and id; one warning says what
was left out and why, or the first one is an error.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from faster_coco_eval import mask as rle_masks
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.images import MAX_PIXELS, image_size, open_image
from bowerbird.errors import DataError, InputError
from bowerbird.files import write_atomically

Bad = Literal["drop", "raise"]
Check = Literal["sizes", "files", "none"]
Segmentation = dict[str, Any] | list[NDArray[np.float32]]  # COCO's run lengths, or polygons x y x y ...

TOLERANCE = 1.0  # pixels by which a box may leave its picture: annotators' rounding
_HUGE = 1e9  # pixels; what is larger is no coordinate
_SHOWN = 3  # ids named for each kind of problem in the warning


class AnnotationWarning(UserWarning):
    """Some entries of an annotation file are not used, or not as they are."""


@dataclass(frozen=True)
class Problem:
    """One bad entry.

    Attributes:
        file: The annotation file.
        entry: Which entry of it, such as ``annotation 17`` or ``picture 4 (a.jpg)``.
        kind: What is wrong, the same text for all problems of a kind.
        detail: What was found.
        done: ``dropped`` or ``repaired``.
    """

    file: str
    entry: str
    kind: str
    detail: str
    done: str


@dataclass
class Problems:
    """Collects what is wrong with a file; with ``bad = "raise"`` the first one is a ``DataError``."""

    file: Path
    bad: Bad
    found: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, entry: str, kind: str, detail: str = "", *, done: str = "dropped") -> None:
        """Raises ``DataError`` with ``bad = "raise"``."""
        problem = Problem(str(self.file), entry, kind, detail, done)
        if self.bad == "raise":
            raise DataError(
                f"{problem.file!r}, {entry}: {kind}{f': {detail}' if detail else ''}. Correct the file, or set bad = "
                f"'drop' to go on without such entries"
            )
        self.found.append(problem)

    def note(self, text: str) -> None:
        """Something that is as it may be, but that a reader of the report wants to know."""
        self.notes.append(text)

    def conclude(self, kept: str, report: Path | None) -> None:
        """Warn once of everything found, and write ``report`` (one JSON object a line), if it is asked for.

        Args:
            kept: What is left, for the warning.

        Raises:
            InputError: The folder of ``report`` does not exist.
        """
        if report is not None:
            if report.is_dir() or not report.parent.is_dir():
                raise InputError(f"report = {str(report)!r}: expected a file in a folder that is there")
            lines = [json.dumps(asdict(one)) for one in self.found]
            lines += [json.dumps({"file": str(self.file), "note": text}) for text in self.notes]
            write_atomically(report, "".join(f"{line}\n" for line in lines))
        if self.found:
            kinds = Counter((one.done, one.kind) for one in self.found)
            parts = [f"{count} {done}, {kind} ({self._named(done, kind)})" for (done, kind), count in kinds.items()]
            warnings.warn(
                f"{str(self.file)!r}: {len(self.found)} bad entries: {'; '.join(parts)}. {kept}",
                AnnotationWarning,
                stacklevel=4,
            )

    def nothing_left(self, pictures: int) -> DataError:
        """The error where none of ``pictures`` is left, with the first reason."""
        first = [f"{one.entry}: {one.kind}{f': {one.detail}' if one.detail else ''}" for one in self.found[:1]]
        why = "; ".join([*first, *self.notes[-1:]])
        return DataError(f"{str(self.file)!r}: none of its {pictures} pictures can be used{f' ({why})' if why else ''}")

    def _named(self, done: str, kind: str) -> str:
        entries = [one.entry for one in self.found if (one.done, one.kind) == (done, kind)]
        return ", ".join(entries[:_SHOWN]) + (", ..." if len(entries) > _SHOWN else "")


def checked_box(
    corners: Any, size: tuple[int, int], entry: str, problems: Problems
) -> tuple[float, float, float, float] | None:
    """A box (x1, y1, x2, y2) that lies in a picture of ``size`` (height, width); ``None`` where there is none.

    A part outside the picture is cut off, and reported where it is more than a pixel.
    """
    if not isinstance(corners, list) or len(corners) != 4 or not all(map(is_number, corners)):
        problems.add(entry, "box is not four numbers", f"{corners}")
        return None
    left, top, right, bottom = (float(value) for value in corners)
    if right <= left or bottom <= top:
        problems.add(entry, "box without area", f"from ({left:g}, {top:g}) to ({right:g}, {bottom:g})")
        return None
    height, width = size
    box = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    detail = f"({left:g}, {top:g}) to ({right:g}, {bottom:g}) in a picture of {width} x {height} pixels"
    if box[2] <= box[0] or box[3] <= box[1]:
        problems.add(entry, "box outside its picture", detail)
        return None
    if max(-left, -top, right - width, bottom - height) > TOLERANCE:
        problems.add(entry, "box partly outside its picture", detail, done="repaired")
    return box


def checked_segmentation(
    segmentation: Any, size: tuple[int, int], entry: str, problems: Problems
) -> Segmentation | None:
    """A mask of a picture of ``size`` as COCO's run lengths (compressed) or polygons; ``None`` where it is neither."""
    if isinstance(segmentation, dict):
        return _checked_run_lengths(segmentation, size, entry, problems)
    if not isinstance(segmentation, list) or not segmentation:
        problems.add(entry, "mask is neither polygons nor run lengths", f"{type(segmentation).__name__}")
        return None
    polygons = [_checked_polygon(polygon, size) for polygon in segmentation]
    reasons = [found for found in polygons if isinstance(found, str)]
    kept = [found for found in polygons if not isinstance(found, str)]
    if reasons:
        problems.add(entry, "polygon cannot be used", reasons[0], done="repaired" if kept else "dropped")
    return kept or None


def _checked_run_lengths(
    rle: dict[str, Any], size: tuple[int, int], entry: str, problems: Problems
) -> dict[str, Any] | None:
    if rle.get("size") != list(size):
        problems.add(entry, "run lengths do not match the picture", f"size {rle.get('size')}, picture {list(size)}")
        return None
    counts = rle.get("counts")
    try:
        if isinstance(counts, list):
            total = sum(counts)
            if min(counts, default=0) < 0 or total != size[0] * size[1]:
                raise ValueError(f"they sum to {total}, the picture has {size[0] * size[1]} pixels")
            rle = rle_masks.frPyObjects({"size": list(size), "counts": counts}, *size)
            counts = rle["counts"]
        if not isinstance(counts, str | bytes):
            raise ValueError(f"counts are of type {type(counts).__name__}")
        rle = {"size": list(size), "counts": counts}
        if not rle_masks.decode(rle).any():
            problems.add(entry, "empty mask")
            return None
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        problems.add(entry, "run lengths do not match the picture", str(error))
        return None
    return rle


def _checked_polygon(polygon: Any, size: tuple[int, int]) -> NDArray[np.float32] | str:
    """The polygon, or why it is none. Rasterising one with infinite or huge numbers would end the process."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return f"expected three points or more, x y x y ...; found {str(polygon)[:40]}"
    try:
        numbers = np.asarray(polygon)
    except ValueError:  # lists of different lengths in it
        return "it holds something else than numbers"
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
        return "it holds something else than finite numbers"
    x, y = numbers[0::2], numbers[1::2]
    height, width = size
    if x.min() < -width or y.min() < -height or x.max() > 2 * width or y.max() > 2 * height:
        return f"its points are far outside the picture: x {x.min():g} to {x.max():g}, y {y.min():g} to {y.max():g}"
    if x[:-1] @ y[1:] + x[-1] * y[0] == y[:-1] @ x[1:] + y[-1] * x[0]:
        return "it has no area"
    return numbers.astype(np.float32)


def is_number(value: Any) -> bool:
    """Whether it is a number that a picture may have: finite, and small enough for floating point."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


# ------------------------------------------------------------------------------------------------------------ masks


def run_lengths(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's compressed run lengths of a checked segmentation; polygons of one object are joined."""
    if isinstance(segmentation, dict):
        return segmentation
    parts = rle_masks.frPyObjects([polygon.tolist() for polygon in segmentation], *size)
    joined: dict[str, Any] = rle_masks.merge(parts)
    return joined


def decoded(segmentation: Segmentation, size: tuple[int, int]) -> NDArray[np.bool_]:
    """bool ``(h, w)``."""
    mask: NDArray[np.uint8] = rle_masks.decode(run_lengths(segmentation, size))
    return mask.astype(bool)


def box_around(segmentation: Segmentation, size: tuple[int, int]) -> list[float]:
    """x1, y1, x2, y2 of the smallest box around a mask."""
    x, y, width, height = rle_masks.toBbox(run_lengths(segmentation, size)).tolist()
    return [x, y, x + width, y + height]


# --------------------------------------------------------------------------------------------------------- pictures


def found_sizes(
    files: Sequence[Path], said: Sequence[tuple[int, int] | None], check: Check
) -> list[tuple[int, int] | str]:
    """Upright (height, width) of every file, or why it cannot be used.

    Args:
        said: What the annotations say of each.
        check: ``sizes`` reads the header of every file, ``files`` only of those of which nothing is said, and sees that
            the others are there; ``none`` trusts the annotations.
    """

    def one(file: Path, size: tuple[int, int] | None) -> tuple[int, int] | str:
        try:
            if check == "sizes" or size is None:
                return image_size(file)
            if size[0] * size[1] > MAX_PIXELS:
                return f"it is said to have {size[1]} x {size[0]} pixels; the limit is {MAX_PIXELS:,}"
            return size if check == "none" or file.is_file() else f"{str(file)!r} does not exist"
        except (DataError, OSError) as error:  # OSError: a name that no file can have
            return str(error)

    with ThreadPoolExecutor(8, thread_name_prefix="bowerbird-headers") as pool:
        return list(pool.map(one, files, said))


def checked_picture(file: Path, said: tuple[int, int]) -> Image.Image:
    """The picture of ``file``. Raises ``DataError`` where it cannot be read or is not of the size that is said."""
    image = open_image(file)
    found = (image.height, image.width)
    if found != said:
        raise DataError(f"{str(file)!r}: {other_size(found, said)}")
    return image


def other_size(found: tuple[int, int], said: tuple[int, int]) -> str:
    """What is wrong where a picture (height, width) is not as large as its annotations say."""
    turned = "; its EXIF orientation turns it" if found == said[::-1] else ""
    return f"it has {found[1]} x {found[0]} pixels, its annotations are for {said[1]} x {said[0]}{turned}"
