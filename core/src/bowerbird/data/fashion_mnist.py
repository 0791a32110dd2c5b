"""``core:fashion-mnist``: 70,000 photos of clothes, 28 x 28, grey, ten classes.

H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms,
arXiv:1708.07747. MIT licence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.configs import FashionMnistConfig
from bowerbird.data.dataset import Dataset
from bowerbird.data.idx import read_idx
from bowerbird.errors import DataError, UnknownNameError, did_you_mean

DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip

# split -> (part of the files, first class, end of classes). Classes 0-4 are seen, 5-9 unseen.
SPLITS = {
    "train": ("train", 0, 10),
    "test": ("test", 0, 10),
    "seen-train": ("train", 0, 5),
    "seen-test": ("test", 0, 5),
    "unseen-test": ("test", 5, 10),
}
_FILE = {"train": "train", "test": "t10k"}

_WAYS = (
    "Three ways to get it: `apt-get install dataset-fashion-mnist` (Debian, Ubuntu); root=FOLDER with the files "
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, .gz or not; "
    "or download=true where there is a network (torchvision)."
)


class FashionMnist(Dataset):
    """Items in the order of the files; ids are ``train/00000`` ... and ``test/00000`` ..., whatever the split.

    Labels are positions in ``classes``: in the splits ``seen-*`` and ``unseen-*`` those of five classes.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], ids: Sequence[str], classes: Sequence[str]
    ):
        self.images = images
        self._labels = labels
        self._ids = list(ids)
        self.classes = tuple(classes)

    @classmethod
    def build(cls, config: FashionMnistConfig | None = None, split: str | None = None) -> Self:
        """Reads the two files of ``split`` (default ``train``).

        Raises ``DataError`` where files are missing or damaged, and ``UnknownNameError`` for another split.
        """
        config = config or FashionMnistConfig()
        split = split or "train"
        if split not in SPLITS:
            raise UnknownNameError(
                f"core:fashion-mnist has no split {split!r}; it has {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        part, first, end = SPLITS[split]
        folder = _folder(config)
        images = read_idx(_find(folder, f"{_FILE[part]}-images-idx3-ubyte"), ndim=3)
        labels = read_idx(_find(folder, f"{_FILE[part]}-labels-idx1-ubyte"), ndim=1).astype(np.int64)
        if len(images) != len(labels):
            raise DataError(
                f"{folder}: {len(images)} {part} images and {len(labels)} labels; the files do not belong together."
            )
        if len(labels) and labels.max() >= len(CLASSES):
            raise DataError(f"{folder}: {part} labels go up to {labels.max()}; Fashion-MNIST has classes 0 to 9.")
        keep = np.flatnonzero((labels >= first) & (labels < end))
        return cls(images[keep], labels[keep] - first, [f"{part}/{i:05d}" for i in keep], CLASSES[first:end])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return {"image": image, "label": int(self._labels[index]), "item_id": self._ids[index]}

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        return self._labels.tolist()


def _folder(config: FashionMnistConfig) -> Path:
    folder = config.root or (_cache() if config.download else DEBIAN_ROOT)
    if config.download and not _has_files(folder):
        return _download(folder)
    if not _has_files(folder):
        what = "lacks IDX files" if folder.is_dir() else "does not exist"
        raise DataError(f"Fashion-MNIST: the folder {folder} {what}. {_WAYS}")
    return folder


def _find(folder: Path, stem: str) -> Path:
    for name in (stem, f"{stem}.gz"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"Fashion-MNIST: {folder} has neither {stem} nor {stem}.gz. {_WAYS}")


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*-ubyte*"))


def _cache() -> Path:
    return Path("~/.cache/bowerbird/fashion-mnist").expanduser()


def _download(root: Path) -> Path:
    raw = root / "FashionMNIST" / "raw"  # where torchvision puts it
    if not _has_files(raw):
        try:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(root), download=True)
        except (
            Exception
        ) as error:  # no torchvision, no network, a changed file: all mean that it cannot be had this way
            raise DataError(
                f"Fashion-MNIST: torchvision could not download it into {root} ({error}). {_WAYS}"
            ) from error
    return raw
