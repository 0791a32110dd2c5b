"""Several segmentation sets as one data set, and ``domain:segmentation-folders``: your own, from folders of pictures.

An item is a picture of one set: ``image``, ``label_map`` (uint8, height x width, class indices of its own set, 255 for
a pixel that does not count), ``domain`` (which set) and ``item_id``. ``classes`` are called SET/CLASS, in the order of
sets and of their indices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from bowerbird.data.dataset import Dataset
from bowerbird.data.images import images_in, open_image
from bowerbird.errors import DataError, UnknownNameError, did_you_mean

IGNORE = 255


class SegmentationSets(Dataset):
    """The pictures of several sets, one set after the other.

    Args:
        label_spaces: Set -> names of its classes, in the order of their indices.
        counts: Number of pictures of every set.
        ids: Of all pictures.
    """

    def __init__(
        self, label_spaces: Mapping[str, Sequence[str]], counts: Mapping[str, int], ids: Sequence[str]
    ) -> None:
        self.domains = tuple(label_spaces)
        self.label_spaces = {name: tuple(classes) for name, classes in label_spaces.items()}
        self.classes = tuple(f"{name}/{one}" for name, classes in label_spaces.items() for one in classes)
        self._starts = np.cumsum([0, *(counts[name] for name in self.domains)])
        self._ids = list(ids)

    @abstractmethod
    def read(self, domain: int, position: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Picture (RGB) and label map number ``position`` of a set."""

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        domain = int(np.searchsorted(self._starts, index, side="right")) - 1
        image, label_map = self.read(domain, index - int(self._starts[domain]))
        return {"image": image, "label_map": label_map, "domain": domain, "item_id": self._ids[index]}

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def domain_indices(self) -> Sequence[int]:
        return np.repeat(np.arange(len(self.domains)), np.diff(self._starts)).tolist()

    def metadata(self) -> Sequence[Mapping[str, Any]]:
        return [{"set": self.domains[domain]} for domain in self.domain_indices()]


class FoldersConfig(BaseModel):
    """Settings of ``domain:segmentation-folders``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path = Field(description="Folder with one folder per segmentation set.")
    sets: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None, description="Which of them, in this order; by default all."
    )


class SegmentationFolders(SegmentationSets):
    """``root/SET/SPLIT/images/NAME.jpg`` with ``root/SET/SPLIT/labels/NAME.png`` and ``root/SET/classes.txt``.

    ``classes.txt`` names the classes, one a line, in the order of their indices. A label map is a picture of one
    channel (grey or palette) whose values are class indices, or 255. Pictures may lie in folders below ``images``.
    """

    def __init__(
        self, label_spaces: Mapping[str, Sequence[str]], files: Mapping[str, Sequence[tuple[Path, Path]]], split: str
    ) -> None:
        ids = [f"{name}/{split}/{image.name}" for name, pairs in files.items() for image, _ in pairs]
        super().__init__(label_spaces, {name: len(pairs) for name, pairs in files.items()}, ids)
        self.files = [files[name] for name in self.domains]

    @classmethod
    def build(cls, config: FoldersConfig, split: str | None) -> Self:
        """Raises ``DataError`` for folders that lack something, ``UnknownNameError`` for sets or splits they lack."""
        split = split or "train"
        if not config.root.is_dir():
            raise DataError(f"{str(config.root)!r} is no folder; expected one with a folder per segmentation set")
        there = sorted(path.name for path in config.root.iterdir() if (path / "classes.txt").is_file())
        if not there:
            raise DataError(
                f"{str(config.root)!r} holds no segmentation set: expected SET/classes.txt, SET/{split}/images and "
                f"SET/{split}/labels"
            )
        label_spaces: dict[str, Sequence[str]] = {}
        files: dict[str, Sequence[tuple[Path, Path]]] = {}
        for name in config.sets or there:
            if name not in there:
                raise UnknownNameError(
                    f"{str(config.root)!r} has no segmentation set {name!r} (a folder with classes.txt); it has "
                    f"{', '.join(there)}.{did_you_mean(name, there)}"
                )
            folder = config.root / name
            label_spaces[name] = _class_names(folder / "classes.txt")
            files[name] = _pairs(folder, split)
        return cls(label_spaces, files, split)

    def read(self, domain: int, position: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        image_file, label_file = self.files[domain][position]
        image = open_image(image_file)
        label_map = _label_map(label_file)
        if label_map.shape != (image.height, image.width):
            raise DataError(
                f"label map {str(label_file)!r} has {label_map.shape[1]} x {label_map.shape[0]} pixels, its picture "
                f"{image.width} x {image.height}"
            )
        count = len(self.label_spaces[self.domains[domain]])
        wrong = label_map[(label_map >= count) & (label_map != IGNORE)]
        if wrong.size:
            raise DataError(
                f"label map {str(label_file)!r} has the value {int(wrong[0])}; classes.txt of {self.domains[domain]!r} "
                f"names {count} classes: expected 0 to {count - 1}, or {IGNORE} for pixels that do not count"
            )
        return image, label_map


def _class_names(file: Path) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {error}") from error
    if len(names) < 2 or len(set(names)) < len(names) or len(names) > IGNORE:
        raise DataError(f"{str(file)!r} names {len(names)} classes; expected 2 to {IGNORE} different names, one a line")
    return names


def _pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    if not (folder / split).is_dir():
        splits = sorted(path.name for path in folder.iterdir() if (path / "images").is_dir())
        raise UnknownNameError(
            f"segmentation set {str(folder)!r} has no split {split!r}; it has {', '.join(splits) or 'none'}."
            f"{did_you_mean(split, splits)}"
        )
    names, images = images_in(folder / split / "images")
    labels = [(folder / split / "labels" / name).with_suffix(".png") for name in names]
    missing = [path for path in labels if not path.is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(images)} pictures have no label map; the first: {str(missing[0])!r}")
    return list(zip(images, labels, strict=True))


def _label_map(file: Path) -> NDArray[np.uint8]:
    """Values of a picture of one channel, without a palette's colours."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            if picture.mode not in ("L", "P", "1"):
                raise DataError(
                    f"label map {str(file)!r} has mode {picture.mode!r}; expected one channel of 8 bits whose values "
                    "are class indices (colours must be translated first)"
                )
            return np.array(picture.convert("L") if picture.mode == "1" else picture, dtype=np.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"label map {str(file)!r} cannot be read: {error}") from error
