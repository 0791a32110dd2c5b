"""``DetectionSet``: the contract of data sets whose pictures are annotated with objects.

C classes, R objects of one picture of h x w pixels, K keypoints.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import mask as rle_masks
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.data.views import unwrapped
from bowerbird.errors import InputError
from bowerbird.protocols import Objects

RARE, COMMON, FREQUENT = 0, 1, 2
GROUPS = ("rare", "common", "frequent")
RARE_UP_TO, COMMON_UP_TO = 10, 100  # pictures with a class, as LVIS groups its classes (arXiv:1908.03195, section 4)


class DetectionSet(Dataset):
    """Pictures with objects. A subclass gives ``image``, ``objects`` and ``size``; the rest follows from them.

    An item has ``image`` (RGB), ``item_id``, ``boxes`` float32 ``(R, 4)``, ``box_labels`` (R class indices), ``crowd``
    bool ``(R,)``, ``masks`` bool ``(R, h, w)`` where ``has_masks``, and where there are ``keypoint_names``
    ``keypoints`` float32 ``(R, K, 3)`` and ``keypoint_mirror``. Every item of a set has the same entries, also without
    objects.

    Attributes:
        classes: Names of the C classes.
        keypoint_names: Of the K keypoints; empty where the objects have none.
        has_masks: Whether the objects have masks.
    """

    keypoint_names: Sequence[str] = ()
    has_masks: bool = False

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Picture ``index``, RGB. Raises ``DataError`` where it cannot be read."""

    @abstractmethod
    def objects(self, index: int) -> Objects:
        """What is annotated in picture ``index``, on the CPU; the picture is not decoded."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Height and width of picture ``index`` in pixels; the picture is not decoded."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        objects = self.objects(index)
        item: dict[str, Any] = {
            "image": self.image(index),
            "item_id": self.item_ids[index],
            "boxes": objects.boxes.numpy(),
            "box_labels": objects.labels.tolist(),
            "crowd": np.zeros(len(objects.boxes), bool) if objects.crowd is None else objects.crowd.numpy(),
        }
        if objects.masks is not None:
            item["masks"] = objects.masks.numpy()
        if objects.keypoints is not None:
            item["keypoints"] = objects.keypoints.numpy()
            item["keypoint_mirror"] = mirrored_keypoints(self.keypoint_names)
        return item

    def labels(self) -> Sequence[int]:
        """Raises ``InputError``: a picture shows several classes."""
        raise InputError(
            f"{type(self).__name__}: pictures with objects have no single label; take a method that reads boxes, or "
            "cut the objects out"
        )

    def metadata(self) -> Sequence[Mapping[str, Any]] | None:
        """``classes`` of every picture: the names of those it shows, in order."""
        return [
            {"classes": [self.classes[label] for label in sorted(set(self.object_labels(i)))]} for i in range(len(self))
        ]

    def object_labels(self, index: int) -> list[int]:
        """Class indices of the objects of picture ``index``. Overridden where ``objects`` costs more."""
        return self.objects(index).labels.tolist()

    def image_counts(self, indices: Iterable[int] | None = None) -> NDArray[np.int64]:
        """``(C,)``: in how many of the pictures ``indices`` (by default all) each class is annotated."""
        counts = np.zeros(len(self.classes), np.int64)
        for index in range(len(self)) if indices is None else indices:
            counts[list(set(self.object_labels(index)))] += 1
        return counts

    def frequency_groups(self, rare_up_to: int = RARE_UP_TO, common_up_to: int = COMMON_UP_TO) -> NDArray[np.int64]:
        """``(C,)``: 0 rare, 1 common, 2 frequent, by the number of pictures that show a class.

        Args:
            rare_up_to: Most pictures of a rare class; LVIS has 10.
            common_up_to: Most pictures of a common class; LVIS has 100.

        Raises:
            InputError: Limits out of order.
        """
        return frequency_groups(self.image_counts(), rare_up_to, common_up_to)

    def image_entry(self, index: int) -> dict[str, Any]:
        """Picture ``index`` as COCO's ``images`` describe it; its ``id`` is its position and one, from 1."""
        height, width = self.size(index)
        return {"id": index + 1, "file_name": self.item_ids[index], "height": height, "width": width}

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """The objects of picture ``index`` as COCO's ``annotations`` describe them, without ``id``.

        Boxes are x, y, width, height; masks compressed RLE; ``category_id`` is the class index and one, from 1.
        """
        return coco_annotations(self.objects(index), index + 1)

    def categories(self) -> list[dict[str, Any]]:
        """The classes as COCO's ``categories`` describe them."""
        points = {"keypoints": list(self.keypoint_names), "skeleton": []} if self.keypoint_names else {}
        return [{"id": i + 1, "name": name, **points} for i, name in enumerate(self.classes)]

    def coco(self, indices: Iterable[int] | None = None) -> dict[str, Any]:
        """The annotations of the pictures ``indices`` (by default all) in COCO's form; plain data for JSON."""
        chosen = list(range(len(self)) if indices is None else indices)
        found = [entry for index in chosen for entry in self.annotations(index)]
        return {
            "images": [self.image_entry(index) for index in chosen],
            "annotations": [{"id": i + 1, **entry} for i, entry in enumerate(found)],
            "categories": self.categories(),
        }


def detection_set(dataset: Dataset, asked_by: str) -> tuple[DetectionSet, list[int]]:
    """The set with objects that ``dataset`` is or is a subset of, and the positions that belong to it.

    Raises:
        InputError: Its pictures have no objects; ``asked_by`` names who needs them.
    """
    whole, positions = unwrapped(dataset)
    if isinstance(whole, DetectionSet):
        return whole, positions
    raise InputError(
        f"{asked_by} needs a data set whose pictures have annotated objects, such as detection:coco or "
        f"detection:canvases; {type(whole).__name__} has none"
    )


def frequency_groups(counts: NDArray[np.int64], rare_up_to: int, common_up_to: int) -> NDArray[np.int64]:
    """``(C,)``: 0 rare, 1 common, 2 frequent, given the number of pictures ``(C,)`` of every class."""
    if not 0 <= rare_up_to <= common_up_to:
        raise InputError(
            f"frequency groups: rare_up_to = {rare_up_to}, common_up_to = {common_up_to}; expected 0 <= rare_up_to <= "
            "common_up_to"
        )
    return np.digitize(counts, [rare_up_to + 1, common_up_to + 1]).astype(np.int64)


def mirrored_keypoints(names: Sequence[str]) -> tuple[int, ...]:
    """For every keypoint the one whose place it takes when a picture is mirrored left to right.

    Names say it: ``left_eye`` takes the place of ``right_eye``; a name without a partner keeps its own place.
    """
    positions = {name: i for i, name in enumerate(names)}

    def partner(name: str) -> str:
        if "left" in name:
            return name.replace("left", "right")
        return name.replace("right", "left")

    return tuple(positions.get(partner(name), i) for i, name in enumerate(names))


def plain_rle(encoded: Mapping[str, Any]) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask as plain data for JSON."""
    counts = encoded["counts"]
    return {
        "size": [int(side) for side in encoded["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def coco_annotations(objects: Objects, image_id: int) -> list[dict[str, Any]]:
    """Annotated or found objects in COCO's form, plain data; found ones have a ``score``. Class 0 is category 1."""
    corners = objects.boxes.double()
    boxes = np.concatenate([corners[:, :2].numpy(), (corners[:, 2:] - corners[:, :2]).numpy()], axis=1)
    entries = []
    for i, (box, label) in enumerate(zip(boxes.tolist(), objects.labels.tolist(), strict=True)):
        entry: dict[str, Any] = {
            "image_id": image_id, "category_id": label + 1, "bbox": box, "area": box[2] * box[3],
            "iscrowd": 0 if objects.crowd is None else int(objects.crowd[i]),
        }  # fmt: skip
        if objects.masks is not None:
            mask = np.asfortranarray(objects.masks[i].numpy(), dtype=np.uint8)
            entry["segmentation"] = plain_rle(rle_masks.encode(mask))
            entry["area"] = float(objects.masks[i].sum())
        if objects.keypoints is not None:
            points = objects.keypoints[i].double()
            entry["keypoints"] = points.flatten().tolist()
            entry["num_keypoints"] = int((points[:, 2] > 0).sum())
        if objects.scores is not None:
            entry["score"] = float(objects.scores[i])
            del entry["iscrowd"]
        entries.append(entry)
    return entries
