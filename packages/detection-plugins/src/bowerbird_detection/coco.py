"""``detection:coco``: your own copy of COCO or LVIS, or any set that is annotated in COCO's form.

The annotation file is checked as a whole when the set is opened (``bowerbird_detection.coco_file``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from faster_coco_eval import mask as rle_masks
from numpy.typing import NDArray
from PIL import Image

from bowerbird.protocols import Objects
from bowerbird_detection.annotations import checked_picture, decoded, run_lengths
from bowerbird_detection.coco_file import CocoFile, read_coco
from bowerbird_detection.data_configs import CocoConfig
from bowerbird_detection.detection_set import COMMON_UP_TO, RARE_UP_TO, DetectionSet, plain_rle

_FREQUENCIES = ("r", "c", "f")  # LVIS: rare, common, frequent


class CocoSet(DetectionSet):
    """Pictures in the order of the file. The id of an item is its file name below the folder of pictures.

    Class indices follow the order of the category ids, which may have holes. ``image_ids`` and ``category_ids`` are
    those of the file. ``problems`` is everything of the file that was dropped or repaired.
    """

    def __init__(self, file: CocoFile) -> None:
        self.folder, self.pictures = file.folder, list(file.pictures)
        self.classes = tuple(one["name"] for one in file.categories)
        self.category_ids = [one["id"] for one in file.categories]
        self.image_ids = [picture.id for picture in self.pictures]
        self.frequencies = [one.get("frequency") for one in file.categories]
        self.keypoint_names, self.has_masks = tuple(file.keypoint_names), file.has_masks
        self.problems = tuple(file.problems.found)
        self._ids = [picture.name for picture in self.pictures]

    @classmethod
    def build(cls, config: CocoConfig, split: str | None) -> Self:
        """Raises ``DataError`` for files that cannot be used, ``UnknownNameError`` for splits and classes they lack."""
        return cls(read_coco(config, split))

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def image(self, index: int) -> Image.Image:
        """Raises ``DataError`` where the file cannot be read or has another size than its annotations are for."""
        return checked_picture(self.folder / self.pictures[index].name, self.pictures[index].size)

    def size(self, index: int) -> tuple[int, int]:
        return self.pictures[index].size

    def object_labels(self, index: int) -> list[int]:
        return [one.label for one in self.pictures[index].annotations]

    def objects(self, index: int) -> Objects:
        picture = self.pictures[index]
        found = picture.annotations
        masks = np.zeros((len(found), *picture.size), bool)
        points = np.zeros((len(found), len(self.keypoint_names), 3), np.float32)
        for row, one in enumerate(found):
            if one.segmentation is not None:
                masks[row] = decoded(one.segmentation, picture.size)
            if one.keypoints is not None:
                points[row] = one.keypoints
        return Objects(
            boxes=torch.tensor([one.box for one in found], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([one.label for one in found], dtype=torch.int64),
            masks=torch.from_numpy(masks) if self.has_masks else None,
            keypoints=torch.from_numpy(points) if self.keypoint_names else None,
            crowd=torch.tensor([one.crowd for one in found], dtype=torch.bool),
        )

    def frequency_groups(self, rare_up_to: int = RARE_UP_TO, common_up_to: int = COMMON_UP_TO) -> NDArray[np.int64]:
        """As the file says (``frequency`` of its categories, as LVIS has it), whatever the limits; else by counting."""
        if all(one in _FREQUENCIES for one in self.frequencies):
            return np.array([_FREQUENCIES.index(str(one)) for one in self.frequencies], np.int64)
        return super().frequency_groups(rare_up_to, common_up_to)

    def image_entry(self, index: int) -> dict[str, Any]:
        positions = {category: i + 1 for i, category in enumerate(self.category_ids)}
        verified = {
            key: [positions[one] for one in ids if one in positions]
            for key, ids in self.pictures[index].verified.items()
        }
        return super().image_entry(index) | verified

    def annotations(self, index: int) -> list[dict[str, Any]]:
        picture, entries = self.pictures[index], []
        for one in picture.annotations:
            left, top, right, bottom = one.box
            width, height = right - left, bottom - top
            entry: dict[str, Any] = {
                "image_id": index + 1, "category_id": one.label + 1, "iscrowd": int(one.crowd),
                "bbox": [left, top, width, height], "area": one.area or width * height,
            }  # fmt: skip
            if one.segmentation is not None:
                rle = run_lengths(one.segmentation, picture.size)
                entry["segmentation"] = plain_rle(rle)
                entry["area"] = one.area or float(rle_masks.area(rle))
            if self.keypoint_names:
                points = np.zeros((len(self.keypoint_names), 3)) if one.keypoints is None else one.keypoints
                entry["keypoints"] = points.astype(float).flatten().tolist()
                entry["num_keypoints"] = int((points[:, 2] > 0).sum())
            entries.append(entry)
        return entries

    def categories(self) -> list[dict[str, Any]]:
        known = [{} if one is None else {"frequency": one} for one in self.frequencies]
        return [entry | more for entry, more in zip(super().categories(), known, strict=True)]
