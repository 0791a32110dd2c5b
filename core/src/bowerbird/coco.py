"""Found objects in COCO's results format. Reads tensors by their methods and imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bowerbird.protocols import Objects


def coco_results(objects: Objects, image_id: int | str, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The objects of one picture as entries of a results file, plain data, in their order.

    Args:
        objects: Found ones, with scores.
        image_id: Of the picture.
        category_ids: Of every class.

    Returns:
        Per object ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels), ``score``, where there are
        masks ``segmentation`` (compressed run lengths), and where there are keypoints ``keypoints`` (x, y, visibility).
    """
    assert objects.scores is not None
    entries = []
    for i, (box, label) in enumerate(zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True)):
        x1, y1, x2, y2 = box
        entry: dict[str, Any] = {
            "image_id": image_id, "category_id": category_ids[label], "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": float(objects.scores[i]),
        }  # fmt: skip
        if objects.masks is not None:
            entry["segmentation"] = run_lengths(objects.masks[i].numpy())
        if objects.keypoints is not None:
            entry["keypoints"] = objects.keypoints[i].flatten().tolist()
        entries.append(entry)
    return entries


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask ``(h, w)``: ``{"size": [h, w], "counts": text}``.

    Runs of zeros and ones alternate down the columns, the first of zeros. From the fourth on the difference to the run
    two before is kept. Every number is cut into groups of five bits, lowest first; a sixth bit says that more follow,
    and 48 makes it a character.
    """
    flat = np.concatenate(([False], np.asarray(mask, bool).flatten(order="F"), [False]))
    borders = np.flatnonzero(flat[1:] != flat[:-1])
    if len(borders) and borders[-1] == mask.size:  # the mask ends with ones
        borders = borders[:-1]
    runs = np.diff(np.concatenate(([0], borders, [mask.size])))
    numbers = runs.copy()
    numbers[3:] -= runs[1:-2]
    characters = []
    for number in numbers.tolist():
        while True:
            bits = number & 31
            number >>= 5
            ends = number == (-1 if bits & 16 else 0)
            characters.append(chr(48 + bits + (0 if ends else 32)))
            if ends:
                break
    return {"size": [int(side) for side in mask.shape], "counts": "".join(characters)}
