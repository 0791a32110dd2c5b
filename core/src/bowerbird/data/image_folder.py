"""``core:image-folder``: a folder of one's own images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from bowerbird.data.configs import ImageFolderConfig
from bowerbird.data.dataset import Dataset
from bowerbird.data.images import SUFFIXES, open_image
from bowerbird.errors import DataError, UnknownNameError, did_you_mean

SPLIT_FOLDERS = ("train", "val", "test")


class ImageFolder(Dataset):
    """One item per image file, sorted by id; the id is the path below ``root`` with slashes: ``cat/001.jpg``.

    The class is the first folder below ``root``, or below the split folder. One label means the same class in every
    split: ``classes`` begins with the classes of ``train``, and those that only other splits have follow. With layout
    ``flat`` there are no classes and items have no ``label``.

    Files are opened when an item is read; one that cannot be read raises ``DataError`` with its name then. Hidden files
    and files of other suffixes than those of images are ignored.
    """

    def __init__(self, root: Path, ids: Sequence[str], labels: Sequence[int], classes: Sequence[str], max_pixels: int):
        self.root = root
        self.classes = tuple(classes)
        self._ids = list(ids)
        self._labels = list(labels)
        self._max_pixels = max_pixels

    @classmethod
    def build(cls, config: ImageFolderConfig, split: str | None = None) -> Self:
        """The images of ``split``; all of them without one.

        With layout ``splits`` the splits are those of the folders ``train``, ``val`` and ``test`` that have images;
        otherwise ``train`` and ``test``, by a hash of the id: an image stays on its side when others come or go.

        Raises ``DataError`` where the folder does not exist or has no images, and ``UnknownNameError`` for a split that
        does not exist.
        """
        root = config.root.expanduser()
        if not root.is_dir():
            raise DataError(f"core:image-folder: root={root} {'is a file' if root.exists() else 'does not exist'}.")
        ids = sorted(_image_ids(root))
        if not ids:
            raise DataError(
                f"core:image-folder: no images below {root}. Looked for files ending in {' '.join(SUFFIXES)}."
            )
        layout = config.layout if config.layout != "auto" else _layout(root)
        depth = {"splits": 2, "classes": 1, "flat": 0}[layout]
        for item in ids:
            if item.count("/") < depth:
                place = "SPLIT/CLASS/FILE" if layout == "splits" else "CLASS/FILE"
                raise DataError(
                    f"core:image-folder: {item} lies in no class folder of {root}; with layout {layout!r} an image "
                    f"is at {place}. Use layout='flat' for images without classes."
                )

        if layout == "splits":
            known = {name: [i for i in ids if i.startswith(f"{name}/")] for name in SPLIT_FOLDERS}
            known = {name: members for name, members in known.items() if members}
        else:
            in_test = {i for i in ids if _fraction(i) < config.test_fraction}
            known = {"train": [i for i in ids if i not in in_test], "test": [i for i in ids if i in in_test]}
        if split is not None and split not in known:
            raise UnknownNameError(
                f"core:image-folder: {root} has no split {split!r}; it has {', '.join(known)}."
                f"{did_you_mean(split, known)}"
            )
        chosen = ids if split is None else known[split]
        if not chosen:
            raise DataError(
                f"core:image-folder: the split {split!r} of {root} is empty ({len(ids)} images in all, "
                f"test_fraction={config.test_fraction})."
            )
        if layout == "flat":
            return cls(root, chosen, [], (), config.max_pixels)

        def class_of(item: str) -> str:
            return item.split("/")[depth - 1]

        trained = sorted({class_of(i) for i in known.get("train", ids)})
        others = sorted({class_of(i) for i in ids} - set(trained))
        if layout == "classes":  # the same images as in train, but for chance
            trained, others = sorted([*trained, *others]), []
        classes = trained if split == "train" else [*trained, *others]
        position = {name: i for i, name in enumerate(classes)}
        return cls(root, chosen, [position[class_of(i)] for i in chosen], classes, config.max_pixels)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"image": open_image(self.path(index), max_pixels=self._max_pixels), "item_id": self._ids[index]}
        if self.classes:
            item["label"] = self._labels[index]
        return item

    def path(self, index: int) -> Path:
        """The file of an item."""
        return self.root / self._ids[index]

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        """Empty with layout ``flat``."""
        return self._labels


def _image_ids(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):  # does not follow links to folders, so it cannot run in circles
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _layout(root: Path) -> str:
    folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    return "splits" if folders and folders <= set(SPLIT_FOLDERS) else "classes"


def _fraction(item: str) -> float:
    return int.from_bytes(hashlib.sha256(item.encode("utf-8", "surrogateescape")).digest()[:7], "big") / 2**56
