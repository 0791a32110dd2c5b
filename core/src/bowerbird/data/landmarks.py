"""``core:gldv2``: Google Landmarks v2, 5 million photos of 200,000 landmarks, and its retrieval ground truth.

T. Weyand et al.: Google Landmarks Dataset v2, CVPR 2020, arXiv:2004.01804. Read from a local copy; a part of the images
will do, as long as the tables name no others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from bowerbird.data.benchmark_configs import LANDMARKS_LAYOUT, LandmarksConfig
from bowerbird.data.dataset import Dataset
from bowerbird.data.files import BenchmarkImages, check_split, csv_rows, need_file
from bowerbird.data.images import open_image
from bowerbird.errors import DataError, InputError

if TYPE_CHECKING:
    from bowerbird.retrieval.metrics import Relevance

USAGES = {"test": ("Public", "Private"), "public": ("Public",), "private": ("Private",)}
SPLITS = ("train", "train-clean", "index", *USAGES)
IMAGE_ID = re.compile(r"[0-9a-f]{16}")


class Landmarks(BenchmarkImages):
    """Items in order of the tables; ids are those of the images, 16 hexadecimal digits.

    Splits: ``train`` (train.csv), ``train-clean`` (train_clean.csv), ``index`` (the gallery), and the queries
    ``public``, ``private`` and ``test`` (both), without those that the solution ignores. Classes are landmark ids;
    queries have none.
    """

    def __init__(
        self, root: Path, ids: Sequence[str], landmarks: Sequence[str] = (), answers: Sequence[Sequence[str]] = ()
    ) -> None:
        self.root = root  # with the folder of the split
        self.answers = answers
        classes = sorted(set(landmarks), key=lambda name: (len(name), name))  # numbers, in order
        place = {name: position for position, name in enumerate(classes)}
        super().__init__(ids, [place[name] for name in landmarks], classes)

    @classmethod
    def build(cls, config: LandmarksConfig, split: str | None = None) -> Self:
        """The items of ``split`` (default ``train-clean``).

        Raises ``DataError``, naming the file and the line, for missing files, missing columns, ids of another form or
        twice, and ``UnknownNameError`` for another split.
        """
        split = split or "train-clean"
        check_split("core:gldv2", split, SPLITS)
        root = config.root.expanduser()
        landmarks: list[str] = []
        answers: list[list[str]] = []
        if split == "train":
            table = root / "train.csv"
            pairs = [(n, row["id"], row["landmark_id"]) for n, row in _rows(table, "id", "landmark_id")]
        elif split == "train-clean":
            table = root / "train_clean.csv"
            rows = _rows(table, "landmark_id", "images")
            pairs = [(n, image, row["landmark_id"]) for n, row in rows for image in row["images"].split()]
        elif split == "index" and (root / "index_image_to_landmark.csv").is_file():
            table = root / "index_image_to_landmark.csv"
            pairs = [(n, row["id"], row["landmark_id"]) for n, row in _rows(table, "id", "landmark_id")]
        elif split == "index":
            table = root / "index.csv"
            pairs = [(n, row["id"], "") for n, row in _rows(table, "id")]
        else:
            table = _solution(root, config.solution)
            pairs = []
            for n, row in _rows(table, "id", "images", "Usage"):
                if row["Usage"] not in ("Public", "Private", "Ignored"):
                    raise DataError(
                        f"{table}, line {n}: Usage is {row['Usage']!r}; expected Public, Private or Ignored."
                    )
                if row["Usage"] in USAGES[split]:
                    pairs.append((n, row["id"], ""))
                    answers.append([_checked(image, table, n) for image in row["images"].split()])
        seen: set[str] = set()
        for n, image, _ in pairs:
            if _checked(image, table, n) in seen:
                raise DataError(f"{table}, line {n}: the image {image} is in an earlier line.")
            seen.add(image)
        ids = [image for _, image, _ in pairs]
        if not ids:
            raise DataError(f"{table} names no image of the split {split!r}. {LANDMARKS_LAYOUT}")
        landmarks = [landmark for _, _, landmark in pairs if landmark]
        folder = root / ("test" if split in USAGES else split.removesuffix("-clean"))
        found = cls(folder, ids, landmarks, answers)
        need_file(found.path(0), LANDMARKS_LAYOUT)  # the whole folder elsewhere is noticed here, not after an hour
        return found

    def path(self, index: int) -> Path:
        name = self._ids[index]
        return self.root / name[0] / name[1] / name[2] / f"{name}.jpg"

    def image(self, index: int) -> Image.Image:
        return open_image(self.path(index))

    def relevance(self, gallery: Dataset) -> Relevance | None:
        """The images that the solution lists for each query; ``None`` for splits that are no queries."""
        from bowerbird.retrieval.metrics import Relevance

        if not self.answers:
            return None
        if not isinstance(gallery, Landmarks) or gallery.answers:
            raise InputError("queries of Google Landmarks v2 need its split 'index' as gallery.")
        place = {name: position for position, name in enumerate(gallery.item_ids)}
        for query, images in zip(self._ids, self.answers, strict=True):
            missing = [image for image in images if image not in place]
            if missing:
                raise DataError(
                    f"query {query}: the solution lists {missing[0]} ({len(missing)} of {len(images)} such), which is "
                    "not in the index. Are index and solution of one version?"
                )
        return Relevance([np.array([place[i] for i in images], np.int64) for images in self.answers])


def _rows(path: Path, *columns: str) -> Any:
    return csv_rows(path, columns, LANDMARKS_LAYOUT)


def _checked(image: str, table: Path, line: int) -> str:
    if not IMAGE_ID.fullmatch(image):
        raise DataError(f"{table}, line {line}: {image!r} is no image id; expected 16 digits of 0-9 and a-f.")
    return image


def _solution(root: Path, name: str | None) -> Path:
    if name is not None:
        return root / name
    found = sorted(root.glob("retrieval_solution_v2*.csv"))
    return found[-1] if found else root / "retrieval_solution_v2.1.csv"
