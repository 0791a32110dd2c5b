"""Reads and checks annotation files in COCO's form (arXiv:1405.0312), as LVIS has it too (arXiv:1908.03195).

An entry that cannot be used is reported and left out; only a file without COCO's form is an error as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import DataError, InputError, UnknownNameError, did_you_mean
from bowerbird_detection.annotations import (
    Problems,
    Segmentation,
    box_around,
    checked_box,
    checked_segmentation,
    found_sizes,
    is_number,
    other_size,
)
from bowerbird_detection.data_configs import CocoConfig

VERIFIED = ("neg_category_ids", "not_exhaustive_category_ids")  # what LVIS says of a picture


@dataclass(slots=True)
class Annotation:
    """One object. ``box`` is x1 y1 x2 y2 inside the picture, ``keypoints`` ``(K, 3)``; ``area`` is the file's."""

    label: int
    box: tuple[float, float, float, float]
    crowd: bool
    area: float | None
    segmentation: Segmentation | None
    keypoints: NDArray[np.float32] | None


@dataclass(slots=True)
class Picture:
    """One picture: its id in the file, file name, (height, width), the category ids that LVIS has verified, objects."""

    id: int | str
    name: str
    size: tuple[int, int]
    verified: Mapping[str, list[int]] = field(default_factory=dict)
    annotations: list[Annotation] = field(default_factory=list)


@dataclass(frozen=True)
class CocoFile:
    """What can be used of an annotation file. ``categories`` are the file's entries, in the order of the classes."""

    folder: Path
    pictures: Sequence[Picture]
    categories: Sequence[Mapping[str, Any]]
    keypoint_names: Sequence[str]
    has_masks: bool
    problems: Problems


def read_coco(config: CocoConfig, split: str | None) -> CocoFile:
    """Raises ``DataError`` for files that cannot be used, ``UnknownNameError`` for splits and classes they lack."""
    path = _path(config, split)
    folder = config.root / config.images.replace("{split}", split or "")
    content = _content(path)
    problems = Problems(path, config.bad)
    categories = _categories(content["categories"], config.classes, path, problems)
    entries: list[Any] = content["annotations"]
    pictures, dropped = _pictures(content["images"], folder, config, problems)
    reader = _Reader(
        pictures=pictures,
        dropped=dropped,
        labels={one["id"]: label for label, one in enumerate(categories)},
        other_categories={one["id"] for one in content["categories"]} - {one["id"] for one in categories},
        masks=config.masks and any(isinstance(one, dict) and one.get("segmentation") for one in entries),
        keypoints=_keypoint_names(categories, path) if config.keypoints else (),
        problems=problems,
    )
    for position, entry in enumerate(entries):
        reader.read(position, entry)
    if reader.lost:
        problems.note(f"{reader.lost} annotations were left out with their pictures")
    kept = list(pictures.values())
    empty = [picture for picture in kept if not picture.annotations]
    if empty:
        problems.note(
            f"{len(empty)} pictures have no objects and are {'kept' if config.empty == 'keep' else 'left out'}"
        )
    if config.empty == "drop":
        kept = [picture for picture in kept if picture.annotations]
    objects = sum(len(picture.annotations) for picture in kept)
    problems.conclude(
        f"{len(kept)} pictures with {objects} objects of {len(categories)} classes are left.", config.report
    )
    if not kept:
        raise problems.nothing_left(len(content["images"]))
    return CocoFile(folder, kept, categories, reader.keypoints, reader.masks, problems)


def _path(config: CocoConfig, split: str | None) -> Path:
    pattern = config.annotations
    there = []
    if "{split}" in pattern:
        named = re.compile(re.escape(pattern).replace(re.escape("{split}"), "(.+)", 1))
        files = (file.relative_to(config.root).as_posix() for file in config.root.glob(pattern.replace("{split}", "*")))
        there = sorted(match[1] for match in map(named.fullmatch, files) if match)
    hint = f"there are the splits {', '.join(there)}" if there else f"root = {str(config.root)!r} holds no such file"
    if split is None and "{split}" in pattern + config.images:
        raise InputError(f"detection:coco: name a split, for annotations = {pattern!r}; {hint}")
    path = config.root / pattern.replace("{split}", split or "")
    if path.is_file():
        return path
    what = f"detection:coco: {str(path)!r} does not exist; {hint}."
    if there:
        raise UnknownNameError(f"{what}{did_you_mean(str(split), there)}")
    raise DataError(f"{what} The setting annotations says where it is, below root")


def _content(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{str(path)!r} holds a {type(content).__name__}; COCO's form is an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{str(path)!r} has no list {key!r}; COCO's form has images, annotations and categories, this file has "
                f"{', '.join(map(str, list(content)[:8])) or 'nothing'}"
            )
    return content


def _categories(
    entries: Sequence[Any], chosen: Sequence[str] | None, path: Path, problems: Problems
) -> list[Mapping[str, Any]]:
    for one in entries:
        if not isinstance(one, dict) or not isinstance(one.get("id"), int) or not isinstance(one.get("name"), str):
            raise DataError(f"{str(path)!r}: a category needs 'id' (a whole number) and 'name', found {str(one)[:80]}")
    if not entries:
        raise DataError(f"{str(path)!r} has no categories")
    categories = sorted(entries, key=lambda one: one["id"])
    for key in ("id", "name"):
        values = [one[key] for one in categories]
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise DataError(f"{str(path)!r}: two categories have the {key} {twice!r}")
    first, last = categories[0]["id"], categories[-1]["id"]
    holes = last - first + 1 - len(categories)
    if holes:
        problems.note(f"category ids {first} to {last} have {holes} holes; classes are numbered from 0 in their order")
    if chosen is None:
        return categories
    by_name = {one["name"]: one for one in categories}
    for name in chosen:
        if name not in by_name:
            raise UnknownNameError(f"{str(path)!r} has no category {name!r}.{did_you_mean(name, by_name)}")
    return [by_name[name] for name in chosen]


def _keypoint_names(categories: Sequence[Mapping[str, Any]], path: Path) -> tuple[str, ...]:
    for one in categories:
        if not isinstance(one.get("keypoints", []), list | None):
            raise DataError(
                f"{str(path)!r}: the keypoints of category {one['name']!r} are {str(one['keypoints'])[:40]!r}; "
                "expected a list of names, or set keypoints = false"
            )
    lists = {tuple(map(str, one["keypoints"])) for one in categories if one.get("keypoints")}
    if len(lists) > 1:
        raise DataError(
            f"{str(path)!r}: categories have {len(lists)} different lists of keypoints; choose some with classes = "
            "[...], or set keypoints = false"
        )
    return next(iter(lists), ())


def _pictures(
    entries: Sequence[Any], folder: Path, config: CocoConfig, problems: Problems
) -> tuple[dict[Any, Picture], set[Any]]:
    """Id -> picture for those that can be used, and the ids of the others."""
    candidates: dict[Any, tuple[str, Mapping[str, Any]]] = {}
    names: set[str] = set()
    twice: set[Any] = set()
    for position, entry in enumerate(entries):
        name = _file_name(entry) if isinstance(entry, dict) else None
        if name is None or not isinstance(entry.get("id"), int | str):
            problems.add(f"picture at position {position}", "picture without id or file name", str(entry)[:80])
        elif entry["id"] in candidates or name in names:
            problems.add(f"picture {entry['id']} ({name})", "picture listed twice")
            twice.add(entry["id"])
        else:
            candidates[entry["id"]] = name, entry
            names.add(name)
    said = [_size(entry) for _, entry in candidates.values()]
    found = found_sizes([folder / name for name, _ in candidates.values()], said, config.check)
    pictures: dict[Any, Picture] = {}
    for (key, (name, entry)), wanted, size in zip(candidates.items(), said, found, strict=True):
        if isinstance(size, str):
            problems.add(f"picture {key} ({name})", "picture that cannot be opened", size)
        elif wanted is not None and size != wanted:
            problems.add(f"picture {key} ({name})", "picture of another size", other_size(size, wanted))
        else:
            verified = {
                one: [category for category in entry[one] if isinstance(category, int)]
                for one in VERIFIED
                if isinstance(entry.get(one), list)
            }
            pictures[key] = Picture(key, name, size, verified)
    return pictures, (twice | candidates.keys()) - pictures.keys()


def _file_name(entry: Mapping[str, Any]) -> str | None:
    """``file_name``, or what LVIS has: an address whose last two parts are COCO's folder and file."""
    name = entry.get("file_name")
    if name is None and isinstance(entry.get("coco_url"), str):
        name = "/".join(entry["coco_url"].split("/")[-2:])
    return name if isinstance(name, str) and name else None


def _size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    height: Any = entry.get("height")
    width: Any = entry.get("width")
    if is_number(height) and is_number(width) and height >= 1 and width >= 1:
        return int(height), int(width)
    return None


@dataclass
class _Reader:
    """Adds to ``pictures`` what can be used of the entries. ``labels``: category id -> class index."""

    pictures: Mapping[Any, Picture]
    dropped: set[Any]
    labels: Mapping[int, int]
    other_categories: set[int]
    masks: bool
    keypoints: Sequence[str]
    problems: Problems
    lost: int = 0

    def read(self, position: int, entry: Any) -> None:
        if not isinstance(entry, dict):
            self.problems.add(f"annotation at position {position}", "annotation is no object", str(entry)[:80])
            return
        name = f"annotation {entry.get('id', f'at position {position}')}"
        picture_id, category = _hashable(entry.get("image_id")), _hashable(entry.get("category_id"))
        if picture_id in self.dropped:
            self.lost += 1  # reported already, with its picture
        elif picture_id not in self.pictures:
            self.problems.add(name, "annotation of an unknown picture", f"image_id {picture_id!r}")
        elif category in self.labels:
            picture = self.pictures[picture_id]
            found = self._annotation(entry, self.labels[category], picture.size, name)
            if found is not None:
                picture.annotations.append(found)
        elif category not in self.other_categories:
            self.problems.add(name, "unknown category", f"category_id {category!r}")

    def _annotation(self, entry: Mapping[str, Any], label: int, size: tuple[int, int], name: str) -> Annotation | None:
        segmentation: Segmentation | None = None
        if self.masks or "bbox" not in entry:
            if not entry.get("segmentation"):
                self.problems.add(
                    name, "annotation without a mask" if self.masks else "annotation without a box",
                    "set masks = false to do without masks" if self.masks else "",
                )  # fmt: skip
                return None
            segmentation = checked_segmentation(entry["segmentation"], size, name, self.problems)
            if segmentation is None:
                return None
        corners: Any = entry.get("bbox")
        if isinstance(corners, list) and len(corners) == 4 and all(map(is_number, corners)):
            corners = [corners[0], corners[1], corners[0] + corners[2], corners[1] + corners[3]]
        elif "bbox" not in entry and segmentation is not None:
            corners = box_around(segmentation, size)
        box = checked_box(corners, size, name, self.problems)
        if box is None:
            return None
        points = None
        if self.keypoints and entry.get("keypoints"):
            points = _checked_keypoints(entry["keypoints"], len(self.keypoints), size, name, self.problems)
            if points is None:
                return None
        area: Any = entry.get("area")
        return Annotation(
            label=label,
            box=box,
            crowd=bool(entry.get("iscrowd", 0)),
            area=float(area) if is_number(area) and area > 0 else None,
            segmentation=segmentation if self.masks else None,
            keypoints=points,
        )


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str) else str(value)


def _checked_keypoints(
    values: Any, count: int, size: tuple[int, int], name: str, problems: Problems
) -> NDArray[np.float32] | None:
    """``(K, 3)``; ``None`` where it cannot be used. A labelled point outside the picture becomes unlabelled."""
    try:
        points = np.asarray(values, np.float64).reshape(count, 3)
    except (TypeError, ValueError, OverflowError):
        found = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        problems.add(name, "keypoints are not x, y, visibility of each", f"expected {3 * count} numbers, found {found}")
        return None
    if not np.isfinite(points).all() or not np.isin(points[:, 2], (0, 1, 2)).all():
        problems.add(name, "keypoints are not finite with visibility 0, 1 or 2")
        return None
    labelled = points[:, 2] > 0
    outside = (points[:, :2] < 0).any(axis=1) | (points[:, 0] > size[1]) | (points[:, 1] > size[0])
    if (outside & labelled).any():
        problems.add(
            name, "keypoint outside its picture", f"{points[outside & labelled, :2].tolist()}", done="repaired"
        )
    points[outside | ~labelled] = 0
    return points.astype(np.float32)
