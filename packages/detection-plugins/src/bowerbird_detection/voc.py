"""``detection:voc``: your own copy of Pascal VOC, or any set in its layout (the VOC development kit, 2012).

``Annotations/NAME.xml``, ``JPEGImages/NAME.jpg``, ``ImageSets/Main/SPLIT.txt`` and, for masks,
``SegmentationObject/NAME.png``. Everything is checked when the set is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.images import SUFFIXES
from bowerbird.errors import DataError, InputError, UnknownNameError, did_you_mean
from bowerbird.protocols import Objects
from bowerbird_detection.annotations import Problems, checked_box, checked_picture, found_sizes, other_size
from bowerbird_detection.data_configs import VocConfig
from bowerbird_detection.detection_set import DetectionSet

_NO_OBJECT = (0, 255)  # values of SegmentationObject: background, and pixels that do not count


@dataclass(slots=True)
class _Object:
    position: int  # among the objects of the picture, as SegmentationObject counts them
    label: int
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(slots=True)
class _Picture:
    name: str
    file: Path
    size: tuple[int, int]
    objects: list[_Object]


class VocSet(DetectionSet):
    """Pictures in the order of the split's file; their ids are their names in it.

    Classes are those of all annotations, by name, whatever the split. The pixels of VOC count from 1 and both ends of a
    box belong to it: 1 is taken from the left and upper side. ``problems`` is everything that was dropped or repaired.
    """

    def __init__(
        self, pictures: Sequence[_Picture], classes: Sequence[str], config: VocConfig, problems: Problems
    ) -> None:
        self.pictures, self.classes, self.config = list(pictures), tuple(classes), config
        self.has_masks = config.masks
        self.problems = tuple(problems.found)
        self._ids = [picture.name for picture in self.pictures]

    @classmethod
    def build(cls, config: VocConfig, split: str | None) -> Self:
        """Raises ``DataError`` for folders that cannot be used, ``UnknownNameError`` for splits and classes."""
        path = _image_set(config, split)
        names = _picture_names(path)
        folder = config.root / "Annotations"
        parsed = _parsed(sorted(folder.glob("*.xml")))
        if not parsed:
            raise DataError(f"detection:voc: {str(folder)!r} holds no .xml file")
        found = sorted({name for one in parsed.values() if not isinstance(one, str) for name in _names(one)})
        if not found:
            raise DataError(f"detection:voc: no object in the .xml files of {str(folder)!r} has a name")
        for name in config.classes or ():
            if name not in found:
                raise UnknownNameError(
                    f"detection:voc: no object of {str(folder)!r} is a {name!r}.{did_you_mean(name, found)}"
                )
        problems = Problems(path, config.bad)
        reader = _Reader(config, tuple(config.classes or found), problems)
        pictures = reader.pictures(dict.fromkeys(names), parsed)
        empty = sum(not picture.objects for picture in pictures)
        if empty:
            problems.note(
                f"{empty} pictures have no objects and are {'kept' if config.empty == 'keep' else 'left out'}"
            )
        if config.empty == "drop":
            pictures = [picture for picture in pictures if picture.objects]
        objects = sum(len(picture.objects) for picture in pictures)
        problems.conclude(
            f"{len(pictures)} pictures with {objects} objects of {len(reader.classes)} classes are left.", config.report
        )
        if not pictures:
            raise problems.nothing_left(len(names))
        return cls(pictures, reader.classes, config, problems)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def image(self, index: int) -> Image.Image:
        """Raises ``DataError`` where the file cannot be read or has another size than its annotations are for."""
        return checked_picture(self.pictures[index].file, self.pictures[index].size)

    def size(self, index: int) -> tuple[int, int]:
        return self.pictures[index].size

    def object_labels(self, index: int) -> list[int]:
        return [one.label for one in self.pictures[index].objects]

    def objects(self, index: int) -> Objects:
        """Raises ``DataError`` where the masks cannot be read."""
        picture = self.pictures[index]
        found = picture.objects
        masks = None
        if self.has_masks:
            numbers = _object_numbers(_mask_file(self.config, picture.name))
            if numbers.shape != picture.size:
                raise DataError(
                    f"{str(_mask_file(self.config, picture.name))!r}: {other_size(numbers.shape, picture.size)}"
                )
            masks = torch.from_numpy(np.stack([numbers == one.position + 1 for one in found])) if found else None
            masks = torch.zeros((0, *picture.size), dtype=torch.bool) if masks is None else masks
        return Objects(
            boxes=torch.tensor([one.box for one in found], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([one.label for one in found], dtype=torch.int64),
            masks=masks,
            crowd=torch.tensor([one.difficult and self.config.difficult == "crowd" for one in found], dtype=torch.bool),
        )


class _Reader:
    """From parsed files to pictures; what cannot be used goes to ``problems``."""

    def __init__(self, config: VocConfig, classes: Sequence[str], problems: Problems) -> None:
        self.config, self.classes, self.problems = config, classes, problems
        self.labels = {name: label for label, name in enumerate(classes)}

    def pictures(self, names: Mapping[str, None], parsed: Mapping[str, ElementTree.Element | str]) -> list[_Picture]:
        annotated: list[tuple[str, ElementTree.Element, Path]] = []
        for name in names:
            root = parsed.get(name)
            if root is None or isinstance(root, str):
                what = "picture without annotations" if root is None else "annotations that are no XML"
                self.problems.add(f"picture {name}", what, root or f"Annotations/{name}.xml does not exist")
            else:
                annotated.append((name, root, _picture_file(self.config.root / "JPEGImages", name)))
        said = [_size(root) for _, root, _ in annotated]
        sizes = found_sizes([file for _, _, file in annotated], said, self.config.check)
        pictures = []
        for (name, root, file), wanted, size in zip(annotated, said, sizes, strict=True):
            if isinstance(size, str):
                self.problems.add(f"picture {name}", "picture that cannot be opened", size)
            elif wanted is not None and size != wanted:
                self.problems.add(f"picture {name}", "picture of another size", other_size(size, wanted))
            else:
                objects = self._objects(name, root, size)
                if objects is not None:
                    pictures.append(_Picture(name, file, size, objects))
        return pictures

    def _objects(self, name: str, root: ElementTree.Element, size: tuple[int, int]) -> list[_Object] | None:
        numbers: set[int] = set()
        if self.config.masks:
            try:
                file = _mask_file(self.config, name)
                found = _object_numbers(file)
                if found.shape != size:
                    raise DataError(f"{str(file)!r}: {other_size(found.shape, size)}")
                numbers = set(np.unique(found).tolist()) - set(_NO_OBJECT)
            except DataError as error:
                self.problems.add(f"picture {name}", "picture without usable masks", str(error))
                return None
        objects = []
        for position, entry in enumerate(root.findall("object")):
            what = f"object {position + 1} of picture {name}"
            label = self.labels.get(entry.findtext("name", "").strip())
            difficult = entry.findtext("difficult", "0").strip() == "1"
            if label is None:
                if not entry.findtext("name", "").strip():
                    self.problems.add(what, "object without a name")
                continue  # of a class that was not chosen
            if difficult and self.config.difficult == "drop":
                continue
            box = checked_box(_corners(entry), size, what, self.problems)
            if box is not None and self.config.masks and position + 1 not in numbers:
                self.problems.add(what, "object without a mask", f"no pixel has the value {position + 1}")
            elif box is not None:
                objects.append(_Object(position, label, box, difficult))
        return objects


def _image_set(config: VocConfig, split: str | None) -> Path:
    folder = (config.root / config.image_set).parent
    there = sorted(file.stem for file in folder.glob("*.txt"))
    hint = f"there are the splits {', '.join(there[:12])}" if there else f"{str(folder)!r} holds no splits"
    if split is None and "{split}" in config.image_set:
        raise InputError(f"detection:voc: name a split; {hint}")
    path = config.root / config.image_set.replace("{split}", split or "")
    if path.is_file():
        return path
    what = f"detection:voc: {str(path)!r} does not exist; {hint}."
    raise UnknownNameError(f"{what}{did_you_mean(str(split), there)}") if there else DataError(what)


def _picture_names(path: Path) -> list[str]:
    """The first word of every line; VOC's files of single classes have a number behind it."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors of Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise DataError(f"detection:voc: {str(path)!r} is no text in UTF-8: {error}") from error
    return [line.split()[0] for line in lines if line.strip()]


def _parsed(files: Sequence[Path]) -> dict[str, ElementTree.Element | str]:
    """Name -> the root of its annotations, or why there is none."""

    def one(file: Path) -> ElementTree.Element | str:
        try:
            return ElementTree.parse(file).getroot()
        except (OSError, ElementTree.ParseError, ValueError) as error:
            return f"{str(file)!r}: {error}"

    with ThreadPoolExecutor(8, thread_name_prefix="bowerbird-annotations") as pool:
        return dict(zip((file.stem for file in files), pool.map(one, files), strict=True))


def _names(root: ElementTree.Element) -> set[str]:
    return {entry.findtext("name", "").strip() for entry in root.findall("object")} - {""}


def _picture_file(folder: Path, name: str) -> Path:
    """The file of a picture: ``.jpg``, or another suffix where that is not there."""
    for suffix in (".jpg", *SUFFIXES):
        if (folder / f"{name}{suffix}").is_file():
            return folder / f"{name}{suffix}"
    return folder / f"{name}.jpg"


def _mask_file(config: VocConfig, name: str) -> Path:
    return config.root / "SegmentationObject" / f"{name}.png"


def _object_numbers(file: Path) -> NDArray[np.uint8]:
    """``(h, w)``: number of the object at every pixel, from 1, as the palette picture says."""
    try:
        with Image.open(file, formats=("PNG",)) as picture:
            if picture.mode not in ("L", "P"):
                raise DataError(f"{str(file)!r} has mode {picture.mode!r}; expected a palette or grey picture")
            return np.array(picture, np.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{str(file)!r} cannot be read: {error}") from error


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Height and width that the annotations name; ``None`` where they do not (some tools write 0)."""
    try:
        size = int(root.findtext("size/height", "0")), int(root.findtext("size/width", "0"))
    except ValueError:
        return None
    return size if min(size) > 0 else None


def _corners(entry: ElementTree.Element) -> Any:
    """x1 y1 x2 y2 with pixels counted from 0, or what is there instead."""
    found = [entry.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(value) for value in found if value is not None)
    except ValueError:
        return found
    return [left - 1, top - 1, right, bottom]
