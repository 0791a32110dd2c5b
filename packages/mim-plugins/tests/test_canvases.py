"""Canvases: what is on them is where they say it is."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from bowerbird.errors import DataError, UnknownNameError
from bowerbird.testing import DatasetContract
from bowerbird_mim.data.canvases import Canvases, CanvasesConfig

DIGITS = {"source": "core:digits", "count": 30, "canvas_size": 48, "items": (2, 3), "item_size": (10, 20)}


class TestCanvases(DatasetContract):
    name = "mim:canvases"
    config = {**DIGITS, "items": [2, 3], "item_size": [10, 20]}
    splits = ("all", "train", "test")
    disjoint = [("train", "test")]


class TestItemsOfCanvases(DatasetContract):
    name = "mim:canvases"
    config = {**DIGITS, "items": [2, 3], "item_size": [10, 20], "part": "items"}
    splits = ("train",)


def canvases(split: str = "train", **changes: object) -> Canvases:
    return Canvases.build(CanvasesConfig(**{**DIGITS, **changes}), split)


def test_numbers_and_sizes_are_within_the_settings() -> None:
    counts = set()
    data = canvases()
    for item in (data[i] for i in range(len(data))):
        boxes, masks = item["boxes"], item["masks"]
        counts.add(len(boxes))
        assert item["image"].size == (48, 48)
        assert boxes.dtype == np.float32 and masks.dtype == bool
        assert masks.shape == (len(boxes), 48, 48) and len(item["box_labels"]) == len(boxes)
        assert item["box_labels"][0] == item["label"]
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 48).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:] - boxes[:, :2]).max() <= 20
        assert masks.sum(axis=0).max() <= 1  # a pixel shows one item
    assert counts == {2, 3}


def test_what_is_not_masked_is_texture_and_what_is_masked_is_the_item() -> None:
    # The same places with a source whose pictures are pasted whole: only boxes differ from the texture.
    whole = canvases(background="none", items=(1, 1))
    other = canvases(background="none", items=(1, 1))
    for i in range(5):
        one, two = np.asarray(whole[i]["image"]), np.asarray(other[i]["image"])
        assert (one == two).all()
        left, top, right, bottom = whole[i]["boxes"][0].astype(int)
        inside = np.zeros((48, 48), bool)
        inside[top:bottom, left:right] = True
        assert (whole[i]["masks"][0] == inside).all()
        assert (one[inside].max(axis=1) == one[inside].min(axis=1)).all()  # digits are grey
        assert (one[~inside].max(axis=1) > one[~inside].min(axis=1)).mean() > 0.9  # textures are not


def test_boxes_touch_their_masks_where_nothing_covers_them() -> None:
    data = canvases(items=(1, 1))
    for i in range(10):
        item = data[i]
        rows, columns = np.nonzero(item["masks"][0])
        assert item["boxes"][0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_a_canvas_depends_on_its_item_and_the_seed_only_but_for_its_companions() -> None:
    few, many = canvases(items=(1, 1), count=3), canvases(items=(1, 1), count=20)
    assert few[2]["image"].tobytes() == many[2]["image"].tobytes()
    assert few[2]["image"].tobytes() != canvases(items=(1, 1), seed=1)[2]["image"].tobytes()
    assert few[1]["image"].tobytes() != few[2]["image"].tobytes()


def test_cut_out_items_are_the_boxes_of_the_canvases_in_order() -> None:
    whole, parts = canvases(count=6), canvases(count=6, part="items")
    position = 0
    for i in range(len(whole)):
        canvas = whole[i]
        for k, box in enumerate(canvas["boxes"]):
            part = parts[position]
            assert part["item_id"] == f"{canvas['item_id']}/box-{k}"
            assert part["label"] == canvas["box_labels"][k] == parts.labels()[position]
            assert (part["boxes"][0, 2:] - part["boxes"][0, :2]).tolist() == (box[2:] - box[:2]).tolist()
            x, y = (int(low) for low in box[:2] - part["boxes"][0, :2])
            side = part["image"].width
            assert part["image"].tobytes() == canvas["image"].crop((x, y, x + side, y + side)).tobytes()
            assert part["masks"].shape == (1, side, side)
            position += 1
    assert position == len(parts)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="6 items of 40 pixels do not fit on a canvas of 96 pixels"):
        CanvasesConfig(item_size=(20, 40))
    with pytest.raises(ValidationError, match=r"items = \[3, 2\]"):
        CanvasesConfig(items=(3, 2))
    with pytest.raises(DataError, match=r"count = 2000.*has 1438 items"):
        canvases(count=2000)
    with pytest.raises(UnknownNameError, match="core:digits"):
        canvases(source="core:digit")
