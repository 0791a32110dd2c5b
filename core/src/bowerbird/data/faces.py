"""Faces: ``core:ms1m``, training images in RecordIO as InsightFace ships MS1M, and ``core:face-pairs``, its ``.bin``
verification sets such as ``lfw.bin``. Read from local copies.

Y. Guo et al.: MS-Celeb-1M, ECCV 2016, arXiv:1607.08221. J. Deng et al.: ArcFace, CVPR 2019, arXiv:1801.07698.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.benchmark_configs import FACE_PAIRS_LAYOUT, MS1M_LAYOUT, FacePairsConfig, Ms1mConfig
from bowerbird.data.files import BenchmarkImages, check_split, need_file, whole_number
from bowerbird.data.images import open_image
from bowerbird.data.plain_pickle import load_plain_pickle
from bowerbird.data.recordio import RecordFile
from bowerbird.errors import DataError


class Ms1m(BenchmarkImages):
    """Images in order of their keys; ids are the keys, eight digits. Classes are the numbers of the identities."""

    def __init__(self, records: RecordFile, keys: Sequence[int], labels: Sequence[int], num_classes: int) -> None:
        super().__init__([f"{key:08d}" for key in keys], labels, [str(number) for number in range(num_classes)])
        self.records = records
        self.keys = list(keys)

    @classmethod
    def build(cls, config: Ms1mConfig, split: str | None = None) -> Self:
        """All images; the only split is ``train``.

        Raises ``DataError``, naming file and record, for missing or damaged files and for labels outside the number of
        classes in ``property``.
        """
        check_split("core:ms1m", split or "train", ("train",))
        root = config.root.expanduser()
        records = RecordFile(root / "train.rec", root / "train.idx", MS1M_LAYOUT)
        num_classes = _num_classes(need_file(root / "property", MS1M_LAYOUT))
        keys, labels = _identities(records)
        outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(outside):
            raise DataError(
                f"{records.path}, record {keys[outside[0]]}: label {labels[outside[0]]}; {root / 'property'} announces "
                f"{num_classes} classes."
            )
        return cls(records, keys.tolist(), labels.tolist(), num_classes)

    def image(self, index: int) -> Image.Image:
        key = self.keys[index]
        return open_image(self.records.image(key), name=f"{self.records.path}, record {key}")


def _num_classes(path: Path) -> int:
    words = path.read_text("ascii", errors="replace").strip().split(",")
    if len(words) != 3:
        raise DataError(f"{path}, line 1: {','.join(words)[:80]!r}; expected classes,height,width.")
    return whole_number(words[0], path, 1, "the number of classes")


def _identities(records: RecordFile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys and labels of the images.

    Where record 0 has several labels it says, with the first two, which records are identities: those hold no image but
    the range of keys of one person. Images come before them. Then one header per person is read, not one per
    image.
    """
    keys = records.keys
    first = records.header(int(keys[0]))
    if not first.multiple or keys[0] != 0 or len(first.labels) < 2:
        return keys, np.array([_label(records, key) for key in keys.tolist()], np.int64)
    start, end = int(first.labels[0]), int(first.labels[1])
    images = keys[(keys >= 1) & (keys < start)]
    if not len(images):
        raise DataError(f"{records.path}: record 0 says that identities begin at {start}; there is no image before it.")
    labels = np.full(len(images), -1, np.int64)
    for person in keys[(keys >= start) & (keys < end)].tolist():
        span = records.header(person).labels
        if len(span) >= 2:
            low, high = np.searchsorted(images, [int(span[0]), int(span[1])])
            if low < high:
                labels[low:high] = _label(records, int(images[low]))
    for position in np.flatnonzero(labels < 0).tolist():  # of no identity record
        labels[position] = _label(records, int(images[position]))
    return images, labels


def _label(records: RecordFile, key: int) -> int:
    label = records.header(key).labels[0]
    if label != int(label):
        raise DataError(f"{records.path}, record {key}: label {label}; expected the number of an identity.")
    return int(label)


class FacePairs(BenchmarkImages):
    """Pair after pair: images 2p and 2p + 1 are pair p, with ids ``000000/a`` and ``000000/b``. There are no classes.

    Attributes:
        same: bool ``(P,)``, is pair p one person?
    """

    def __init__(self, path: Path, images: Sequence[bytes], same: NDArray[np.bool_]) -> None:
        super().__init__([f"{i // 2:06d}/{'ab'[i % 2]}" for i in range(len(images))])
        self.file = path
        self.images = images
        self.same = same

    @classmethod
    def build(cls, config: FacePairsConfig, split: str | None = None) -> Self:
        """All pairs; the only split is ``test``.

        Raises ``DataError``, naming the file, where it is missing, asks for code to be run, or holds something else.
        """
        check_split("core:face-pairs", split or "test", ("test",))
        path = need_file(config.file.expanduser(), FACE_PAIRS_LAYOUT)
        data = load_plain_pickle(path)
        if not isinstance(data, list | tuple) or len(data) != 2:
            raise DataError(f"{path} holds a {type(data).__name__}. {FACE_PAIRS_LAYOUT}")
        images, same = data
        if not isinstance(images, list | tuple) or not isinstance(same, list | tuple | np.ndarray) or not len(same):
            raise DataError(f"{path} holds {type(images).__name__} and {type(same).__name__}. {FACE_PAIRS_LAYOUT}")
        if len(images) != 2 * len(same):
            raise DataError(f"{path}: {len(images)} images and {len(same)} pairs. {FACE_PAIRS_LAYOUT}")
        wrong = [i for i, one in enumerate(same) if not isinstance(one, bool | np.bool_ | int | np.integer)]
        if wrong:
            raise DataError(f"{path}: pair {wrong[0]} says {same[wrong[0]]!r}. {FACE_PAIRS_LAYOUT}")
        return cls(path, [_encoded(image, i, path) for i, image in enumerate(images)], np.array(same, bool))

    def image(self, index: int) -> Image.Image:
        return open_image(self.images[index], name=f"{self.file}, image {index}")


def _encoded(image: Any, number: int, path: Path) -> bytes:
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str):  # of a pickle that Python 2 wrote
        return image.encode("latin1")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return image.tobytes()
    raise DataError(f"{path}: image {number} is a {type(image).__name__}. {FACE_PAIRS_LAYOUT}")
