"""``detection:canvases``: annotations are exact, classes are as frequent as asked for, and nothing depends on order."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bowerbird.data import subset
from bowerbird.data.images import open_image
from bowerbird.data.uris import item_uris, open_dataset
from bowerbird.errors import DataError, InputError, UnknownNameError
from bowerbird.testing import DatasetContract
from bowerbird_detection.canvases import Canvases, extreme_points, geometric_counts
from bowerbird_detection.data_configs import CanvasesConfig
from bowerbird_detection.detection_set import detection_set, frequency_groups, mirrored_keypoints


class TestContract(DatasetContract):
    name = "detection:canvases"
    config = {"count": 20}
    splits = ("train", "test")
    disjoint = [("train", "test")]


def canvases(split: str = "train", **changes: object) -> Canvases:
    return Canvases.build(CanvasesConfig(**{"count": 24, **changes}), split)


def test_boxes_touch_their_masks_and_a_pixel_shows_one_object() -> None:
    data = canvases(items=4, item_size=16)
    for i in range(len(data)):
        item = data[i]
        assert item["masks"].sum(axis=0).max() <= 1
        for box, mask in zip(item["boxes"], item["masks"], strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_masked_pixels_are_the_object_and_the_others_are_the_ground() -> None:
    data = canvases(item_size=20)
    for i in range(len(data)):
        item = data[i]
        pixels = np.asarray(item["image"])
        shown = item["masks"].any(axis=0)
        assert (pixels[shown].max(axis=1) == pixels[shown].min(axis=1)).all()  # digits are grey
        assert (pixels[~shown].max(axis=1) > pixels[~shown].min(axis=1)).mean() > 0.9  # grounds are coloured


def test_keypoints_are_the_ends_of_the_object_and_hidden_where_another_covers_them() -> None:
    alone = canvases(items=1)
    for i in range(len(alone)):
        item = alone[i]
        (left, top, right, bottom), points = item["boxes"][0], item["keypoints"][0]
        assert (points[:, 2] == 2).all()
        assert points[0, 1] == top + 0.5 and points[1, 1] == bottom - 0.5
        assert points[2, 0] == left + 0.5 and points[3, 0] == right - 0.5
        assert all(item["masks"][0][int(y), int(x)] for x, y, _ in points)
    crowded = canvases(items=9, item_size=20, canvas_size=60)
    visibility = []
    for i in range(len(crowded)):
        item = crowded[i]
        for mask, points in zip(item["masks"], item["keypoints"], strict=True):
            assert all(mask[int(y), int(x)] == (seen == 2) for x, y, seen in points)
            visibility += points[:, 2].tolist()
    assert {1.0, 2.0} == set(visibility)


def test_objects_and_sizes_are_known_without_the_picture() -> None:
    data = canvases(canvas_size=(40, 72), items=1)
    sizes = {data.size(i) for i in range(len(data))}
    assert len(sizes) > 10 and all(40 <= side <= 72 for size in sizes for side in size)
    for i in range(5):
        assert data[i]["image"].size == data.size(i)[::-1]
        assert (data.objects(i).boxes.numpy() == data[i]["boxes"]).all()
        assert data[i]["masks"].shape[1:] == data.size(i)


def test_a_canvas_is_the_same_in_any_order_and_in_another_process() -> None:
    first, second = canvases(), pickle.loads(pickle.dumps(canvases()))
    backwards = {i: second[i] for i in reversed(range(len(second)))}
    for i in range(len(first)):
        assert first[i]["image"].tobytes() == backwards[i]["image"].tobytes()
        assert first[i]["boxes"].tobytes() == backwards[i]["boxes"].tobytes()
    assert first[0]["image"].tobytes() != canvases(seed=1)[0]["image"].tobytes()
    assert first[0]["image"].tobytes() != canvases("test")[0]["image"].tobytes()


def test_the_numbers_of_objects_fall_geometrically_in_training_and_are_equal_in_the_test_split() -> None:
    data = canvases(count=400, tail=32.0, items=(1, 3))
    counts = np.bincount(np.concatenate(data.planned_labels).astype(int), minlength=10)
    assert counts.tolist() == sorted(counts, reverse=True)
    ratios = counts[:-1] / counts[1:]
    assert np.allclose(ratios[:5], 32 ** (1 / 9), rtol=0.05)
    test = canvases("test", count=400, tail=32.0, items=(1, 3))
    balanced = np.bincount(np.concatenate(test.planned_labels).astype(int), minlength=10)
    assert balanced.max() - balanced.min() <= 1
    groups = data.frequency_groups(rare_up_to=20, common_up_to=80)
    shown = data.image_counts()
    assert groups.tolist() == [0 if n <= 20 else 1 if n <= 80 else 2 for n in shown]
    assert set(groups.tolist()) == {0, 1, 2}


def test_shuffled_tails_are_rare_in_the_same_classes_of_every_split() -> None:
    def order(split: str) -> list[int]:
        data = canvases(split, count=300, tail=50.0, tail_order="shuffled", balanced_splits=())
        return np.argsort(-np.bincount(np.concatenate(data.planned_labels).astype(int)), kind="stable").tolist()[:4]

    assert order("train") == order("test") != [0, 1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 60), st.floats(1, 500))
def test_geometric_counts_sum_up_and_leave_no_class_out(total: int, classes: int, tail: float) -> None:
    counts = geometric_counts(total, classes, tail)
    assert counts.sum() == total and counts.shape == (classes,)
    assert (np.diff(counts) <= 0).all()
    assert counts.min() >= min(1, total // classes)


def test_empty_canvases_have_the_same_entries_as_others() -> None:
    data = canvases(empty=0.4, distractors=(1, 2))
    found = [data[i] for i in range(len(data))]
    empty = [item for item in found if not len(item["boxes"])]
    assert 3 <= len(empty) <= 17
    assert all(item.keys() == found[0].keys() for item in found)
    assert empty[0]["masks"].shape == (0, 64, 64) and empty[0]["keypoints"].shape == (0, 4, 3)
    grey = [np.asarray(item["image"]).std(axis=2) == 0 for item in empty]
    assert all(pixels.sum() > 20 for pixels in grey)  # the distractors are there


def test_coco_form_counts_from_one_and_holds_every_object() -> None:
    data = canvases(empty=0.2)
    truth = data.coco()
    assert [image["id"] for image in truth["images"]] == list(range(1, 25))
    assert [one["id"] for one in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    assert len(truth["annotations"]) == sum(len(data.objects(i).boxes) for i in range(24))
    assert {one["category_id"] for one in truth["annotations"]} <= set(range(1, 11))
    entry = truth["annotations"][0]
    objects = data.objects(entry["image_id"] - 1)
    x, y, w, h = entry["bbox"]
    assert [x, y, x + w, y + h] == objects.boxes[0].tolist()
    assert entry["area"] == objects.masks[0].sum()
    assert len(data.coco([3, 5])["images"]) == 2


def test_subsets_keep_their_objects() -> None:
    data = canvases()
    whole, positions = detection_set(subset(subset(data, [4, 9, 2]), [2, 0]), "the test")
    assert whole is data and positions == [2, 4]
    with pytest.raises(InputError, match="the test needs a data set whose pictures have annotated objects"):
        detection_set(data.sources[0].items, "the test")
    with pytest.raises(InputError, match="no single label"):
        data.labels()


def test_metadata_names_the_classes_of_a_picture() -> None:
    data = canvases()
    names = {data.classes[label] for label in data[0]["box_labels"]}
    assert data.metadata()[0] == {"classes": sorted(names)}


def test_groups_have_the_limits_of_lvis() -> None:
    counts = np.array([0, 1, 10, 11, 100, 101])
    assert frequency_groups(counts, 10, 100).tolist() == [0, 0, 0, 1, 1, 2]
    with pytest.raises(InputError, match="rare_up_to = 5, common_up_to = 4"):
        frequency_groups(counts, 5, 4)


def test_mirrored_keypoints_swap_left_and_right() -> None:
    assert mirrored_keypoints(["nose", "left_eye", "right_eye", "left_only"]) == (0, 2, 1, 3)


def test_extreme_points_take_the_middle_of_an_edge() -> None:
    mask = np.zeros((6, 8), bool)
    mask[1, 2:5] = mask[2, 1:7] = mask[3, 3] = True
    assert extreme_points(mask).tolist() == [[3.5, 1.5], [3.5, 3.5], [1.5, 2.5], [6.5, 2.5]]


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="do not fit on a canvas of 64 pixels"):
        CanvasesConfig(items=5, item_size=40)
    with pytest.raises(ValidationError, match="expected two whole numbers"):
        CanvasesConfig(items=(3, 1))
    with pytest.raises(UnknownNameError, match="has no split 'trian'"):
        canvases("trian")


def test_addresses_keep_settings_that_are_lists_and_tables() -> None:
    settings: dict[str, Any] = {
        "count": 3, "canvas_size": [40, 48], "item_size": 12, "items": 2,
        "sources": ["core:digits", {"source": "core:digits", "class_key": "label", "splits": {"train": "test"}}],
    }  # fmt: skip
    with pytest.raises(DataError, match="the same name and classes of the same names"):
        open_dataset("detection:canvases", "train", **settings)
    settings["sources"] = settings["sources"][1:]
    data, address = open_dataset("detection:canvases", "train", **settings)
    again = open_image(item_uris(address, data.item_ids)[1])
    assert again.tobytes() == data[1]["image"].tobytes()
    named, _ = open_dataset("detection:canvases?sources=core:digits&count=2", "train")
    assert named.classes == tuple("0123456789")
