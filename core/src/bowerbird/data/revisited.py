"""``core:revisited``: revisited Oxford and revisited Paris, buildings under hard views.

F. Radenovic et al.: Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking, CVPR 2018, arXiv:1803.11285.
Read from a local copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.benchmark_configs import REVISITED_LAYOUT, RevisitedConfig
from bowerbird.data.dataset import Dataset
from bowerbird.data.files import BenchmarkImages, check_split, need_file
from bowerbird.data.images import open_image
from bowerbird.data.plain_pickle import load_plain_pickle
from bowerbird.errors import DataError, InputError

if TYPE_CHECKING:
    from bowerbird.retrieval.metrics import Relevance

BENCHMARKS = ("roxford5k", "rparis6k")
SPLITS = ("query", "gallery")
GRADES = ("easy", "hard", "junk")


@dataclass(frozen=True)
class GroundTruth:
    """What ``gnd_*.pkl`` holds, checked. Positions count in ``gallery``.

    Attributes:
        queries, gallery: Names of the images, without ``.jpg``.
        boxes: Per query left, top, right, bottom in pixels.
        easy, hard, junk: Per query int64 positions.
    """

    queries: Sequence[str]
    gallery: Sequence[str]
    boxes: Sequence[tuple[float, float, float, float]]
    easy: Sequence[NDArray[np.int64]]
    hard: Sequence[NDArray[np.int64]]
    junk: Sequence[NDArray[np.int64]]


def read_ground_truth(path: Path) -> GroundTruth:
    """The ground truth of a ``.pkl`` (read without running code) or ``.json`` file.

    Both hold ``{"imlist": [...], "qimlist": [...], "gnd": [...]}``; an entry of ``gnd`` is ``{"bbx": [left, top, right,
    bottom], "easy": [...], "hard": [...], "junk": [...]}``.

    Raises ``DataError``, naming the file, the query and what is wrong.
    """
    need_file(path, REVISITED_LAYOUT)
    if path.suffix == ".json":
        try:
            data = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is no JSON: {error}.") from error
    else:
        data = load_plain_pickle(path)
    if not isinstance(data, Mapping) or not {"imlist", "qimlist", "gnd"} <= data.keys():
        found = ", ".join(map(repr, data)) if isinstance(data, Mapping) else type(data).__name__
        raise DataError(f"{path} holds {found}; expected a dict with imlist, qimlist and gnd.")
    gallery, queries = (_names(path, key, data[key]) for key in ("imlist", "qimlist"))
    rows = data["gnd"]
    if not isinstance(rows, list | tuple) or len(rows) != len(queries):
        raise DataError(f"{path}: gnd must be a list with one entry for each of the {len(queries)} queries.")
    boxes, grades = [], {grade: [] for grade in GRADES}  # type: ignore[var-annotated]
    for number, (query, row) in enumerate(zip(queries, rows, strict=True)):
        where = f"{path}, gnd[{number}] ({query})"
        if not isinstance(row, Mapping) or not {"bbx", *GRADES} <= row.keys():
            raise DataError(f"{where}: expected a dict with bbx, easy, hard and junk.")
        box = _numbers(row["bbx"], f"{where}: bbx")
        if box.shape != (4,) or not np.isfinite(box).all() or box[0] >= box[2] or box[1] >= box[3]:
            raise DataError(f"{where}: bbx is {box.tolist()}; expected left, top, right, bottom in pixels.")
        left, top, right, bottom = map(float, box)
        boxes.append((left, top, right, bottom))
        for grade in GRADES:
            grades[grade].append(_positions(row[grade], len(gallery), f"{where}: {grade}"))
    return GroundTruth(queries, gallery, boxes, **grades)


class Revisited(BenchmarkImages):
    """Splits ``query`` and ``gallery``, in the order of the ground truth; ids are image names. There are no classes.

    Attributes:
        truth: The ground truth.
    """

    def __init__(self, root: Path, split: str, truth: GroundTruth, setup: str, crop: bool) -> None:
        super().__init__(truth.queries if split == "query" else truth.gallery)
        self.root, self.split, self.truth, self.setup, self.crop = root, split, truth, setup, crop

    @classmethod
    def build(cls, config: RevisitedConfig, split: str | None = None) -> Self:
        """The images of ``split`` (default ``gallery``).

        Raises ``DataError`` for a missing or damaged ground truth and missing images, and ``UnknownNameError`` for
        another split.
        """
        split = split or "gallery"
        check_split("core:revisited", split, SPLITS)
        root = config.root.expanduser()
        found = cls(
            root, split, read_ground_truth(_ground_truth_file(root, config.benchmark)), config.setup, config.crop
        )
        need_file(found.path(0), REVISITED_LAYOUT)
        return found

    def path(self, index: int) -> Path:
        return self.root / "jpg" / f"{self._ids[index]}.jpg"

    def image(self, index: int) -> Image.Image:
        """Queries are cut to their box, of which parts outside the image are left out."""
        whole = open_image(self.path(index))
        if self.split == "gallery" or not self.crop:
            return whole
        left, top, right, bottom = self.truth.boxes[index]
        box = (
            max(0, round(left)),
            max(0, round(top)),
            min(whole.width, round(right)),
            min(whole.height, round(bottom)),
        )
        if box[0] >= box[2] or box[1] >= box[3]:
            raise DataError(
                f"{self.path(index)} has {whole.width} x {whole.height} pixels; the query's box {left:.0f}, {top:.0f}, "
                f"{right:.0f}, {bottom:.0f} lies outside. Is it the original image?"
            )
        return whole.crop(box)

    def relevance(self, gallery: Dataset) -> Relevance:
        """That of the set-up in the settings. Raises ``InputError`` where ``gallery`` is not that of the queries."""
        from bowerbird.retrieval.metrics import revisited_relevance

        if self.split != "query" or list(gallery.item_ids) != list(self.truth.gallery):
            raise InputError("revisited Oxford and Paris: queries are the split 'query', the gallery is 'gallery'.")
        return revisited_relevance(self.truth.easy, self.truth.hard, self.truth.junk)[self.setup]


def _ground_truth_file(root: Path, benchmark: str) -> Path:
    names = BENCHMARKS if benchmark == "auto" else (benchmark,)
    files = [root / f"gnd_{name}{suffix}" for name in names for suffix in (".pkl", ".json")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise DataError(f"{root} has none of {', '.join(file.name for file in files)}. {REVISITED_LAYOUT}")
    if len({file.stem for file in found}) > 1:
        raise DataError(f"{root} has {' and '.join(f.name for f in found)}: say which one with benchmark.")
    return found[0]


def _names(path: Path, key: str, values: Any) -> list[str]:
    plain = isinstance(values, list | tuple) and all(isinstance(v, str) and v and v != ".." for v in values)
    if not plain or not values or any("/" in v or "\\" in v or "\0" in v for v in values):
        raise DataError(f"{path}: {key} must be a list of image names, without folders and without .jpg.")
    if len(set(values)) != len(values):
        raise DataError(f"{path}: {key} has a name twice.")
    return list(values)


def _numbers(values: Any, where: str) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{where} is no list of numbers: {error}.") from error
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.number)):
        raise DataError(f"{where} is {str(values)[:80]!r}; expected a list of numbers.")
    return array


def _positions(values: Any, count: int, where: str) -> NDArray[np.int64]:
    array = _numbers(values, where)
    positions = array.astype(np.int64)
    if (positions != array).any() or (positions < 0).any() or (positions >= count).any():
        raise DataError(f"{where} holds {array.tolist()[:8]}; expected positions in imlist, 0 to {count - 1}.")
    return positions
