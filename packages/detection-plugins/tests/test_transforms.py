"""Augmentation moves pictures, boxes, masks and keypoints alike, and depends on nothing but its generator."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from bowerbird.errors import InputError
from bowerbird_detection.canvases import Canvases
from bowerbird_detection.data_configs import AugmentationConfig, CanvasesConfig
from bowerbird_detection.transforms import DetectionTransform

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def blocks(height: int = 60, width: int = 80) -> dict[str, Any]:
    """Three rectangles of one colour each on black, with a keypoint in the middle of their left and right edge."""
    boxes = np.array([[5, 5, 30, 25], [40, 10, 70, 30], [10, 35, 60, 55]], np.float32)
    pixels, masks, points = np.zeros((height, width, 3), np.uint8), np.zeros((3, height, width), bool), []
    for mask, (left, top, right, bottom), colour in zip(masks, boxes.astype(int), COLOURS, strict=True):
        pixels[top:bottom, left:right] = colour
        mask[top:bottom, left:right] = True
        middle = (top + bottom) / 2
        points.append([[left, middle, 2], [right, middle, 2]])
    return {
        "image": Image.fromarray(pixels), "boxes": boxes, "box_labels": [0, 1, 2], "crowd": np.zeros(3, bool),
        "masks": masks, "keypoints": np.array(points, np.float32), "keypoint_mirror": (1, 0), "index": 7,
    }  # fmt: skip


def transform(**settings: Any) -> DetectionTransform:
    return DetectionTransform(AugmentationConfig(**settings))


EVERYTHING: list[dict[str, Any]] = [
    {"flip": 1.0},
    {"flip": 0.5, "iou_crop": 1.0},
    {"short_side": (40, 90), "max_side": 100},
    {"scale_jitter": (0.4, 2.0), "target_size": 64},
    {"iou_crop": 0.8, "short_side": (50, 60, 70), "flip": 0.5},
]


@pytest.mark.parametrize("settings_of", EVERYTHING, ids=str)
def test_boxes_masks_and_points_stay_on_their_objects(settings_of: dict[str, Any]) -> None:
    change = transform(**settings_of)
    for seed in range(15):
        made = change(blocks(), np.random.default_rng(seed))
        height, width = made["image_size"].tolist()
        assert made["image"].shape == (3, height, width) and made["image"].dtype == torch.float32
        assert made["image"].min() >= 0 and made["image"].max() <= 1
        assert made["masks"].shape == (len(made["boxes"]), height, width) and made["masks"].dtype == torch.bool
        assert len(made["box_labels"]) == len(made["crowd"]) == len(made["keypoints"]) == len(made["boxes"]) > 0
        for k, label in enumerate(made["box_labels"]):
            colour = torch.tensor(COLOURS[label]) / 255
            mask, (left, top, right, bottom) = made["masks"][k], made["boxes"][k].tolist()
            rows, columns = torch.nonzero(mask, as_tuple=True)
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.allclose([left, top, right, bottom], around, atol=1.01)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            inner = mask[1:-1, 1:-1] & mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
            shown = made["image"][:, 1:-1, 1:-1][:, inner]
            assert shown.shape[1] < 8 or (shown.mean(dim=1) - colour).abs().max() < 0.1
            on_left, on_right = made["keypoints"][k]
            assert on_left[2] == 0 or abs(on_left[0] - left) < 0.01
            assert on_right[2] == 0 or abs(on_right[0] - right) < 0.01


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    item = blocks()
    made = transform(flip=0.0)(item, np.random.default_rng(0))
    assert (made["image"].numpy() * 255 == np.asarray(item["image"]).transpose(2, 0, 1)).all()
    assert (made["boxes"].numpy() == item["boxes"]).all() and (made["masks"].numpy() == item["masks"]).all()
    assert (made["keypoints"].numpy() == item["keypoints"]).all()
    assert made["image_size"].tolist() == [60, 80] and made["index"] == 7


def test_two_flips_give_the_picture_back() -> None:
    flip = transform(flip=1.0)
    once = flip(blocks(), np.random.default_rng(0))
    pixels = np.rint(once["image"].numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    again = {**blocks(), "image": Image.fromarray(pixels)}
    again |= {key: once[key].numpy() for key in ("boxes", "masks", "keypoints", "crowd")}
    twice = flip(again, np.random.default_rng(0))
    assert (twice["boxes"].numpy() == blocks()["boxes"]).all()
    assert (twice["keypoints"].numpy() == blocks()["keypoints"]).all()
    assert (once["boxes"].numpy() != blocks()["boxes"]).any()


def test_results_depend_on_the_generator_alone_and_leave_torchs_alone() -> None:
    change = transform(iou_crop=1.0, scale_jitter=(0.5, 2.0), target_size=64, photometric=1.0)
    torch.manual_seed(1)
    first = [change(blocks(), np.random.default_rng(seed)) for seed in range(6)]
    torch.manual_seed(2)
    before = torch.get_rng_state()
    copied = pickle.loads(pickle.dumps(change))
    second = {seed: copied(blocks(), np.random.default_rng(seed)) for seed in reversed(range(6))}
    assert torch.equal(before, torch.get_rng_state())
    for seed, made in enumerate(first):
        assert torch.equal(made["image"], second[seed]["image"])
        assert torch.equal(made["boxes"], second[seed]["boxes"])
    assert len({tuple(made["image"].shape) for made in first}) > 1


def test_jittered_pictures_fit_in_the_target_and_short_sides_are_those_asked_for() -> None:
    jitter, short = transform(scale_jitter=(0.2, 2.0), target_size=48), transform(short_side=(33, 77), max_side=90)
    sides = set()
    for seed in range(12):
        assert max(jitter(blocks(), np.random.default_rng(seed))["image_size"]) <= 48
        height, width = short(blocks(), np.random.default_rng(seed))["image_size"].tolist()
        assert max(height, width) <= 90
        sides.add(min(height, width))
    assert sides == {33, round(60 * 90 / 80)}  # the second is held back by max_side


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32), st.booleans())
def test_pictures_of_any_size_with_and_without_objects_pass(height: int, width: int, seed: int, some: bool) -> None:
    count = int(some)
    item = {
        "image": Image.new("RGB", (width, height)), "boxes": np.array([[0, 0, width, height]] * count, np.float32),
        "box_labels": [3] * count, "crowd": np.ones(count, bool), "masks": np.ones((count, height, width), bool),
        "keypoints": np.zeros((count, 5, 3), np.float32),
    }  # fmt: skip
    change = transform(iou_crop=1.0, scale_jitter=(0.1, 2.0), target_size=16, flip=0.5, photometric=0.5)
    made = change(item, np.random.default_rng(seed))
    assert made["boxes"].shape == (len(made["box_labels"]), 4) and made["boxes"].dtype == torch.float32
    assert made["keypoints"].shape[1:] == (5, 3) and made["crowd"].dtype == torch.bool
    assert made["masks"].shape[1:] == tuple(made["image_size"].tolist())
    assert some or not made["box_labels"]


def test_objects_that_become_too_small_are_left_out() -> None:
    made = transform(scale_jitter=(0.1, 0.1), target_size=80, min_side=3.0, flip=0.0)(
        blocks(), np.random.default_rng(0)
    )
    assert made["box_labels"] == []  # 20 to 50 pixels become 2 to 5, the lower side 2
    kept = transform(scale_jitter=(0.2, 0.2), target_size=80, min_side=3.0, flip=0.0)(
        blocks(), np.random.default_rng(0)
    )
    assert kept["box_labels"] == [0, 1, 2]


def test_points_of_canvases_keep_their_names_when_mirrored() -> None:
    data = Canvases.build(CanvasesConfig(count=5, items=2, item_size=20), "train")
    for i in range(5):
        made = transform(flip=1.0)(data[i], np.random.default_rng(i))
        for mask, points in zip(made["masks"], made["keypoints"], strict=True):
            if (points[:, 2] == 2).all():
                columns = torch.nonzero(mask.any(dim=0)).flatten()
                assert points[2, 0] == columns[0] + 0.5 and points[3, 0] == columns[-1] + 0.5


def test_items_without_boxes_and_settings_that_contradict_are_refused() -> None:
    with pytest.raises(InputError, match="items have no boxes, box_labels"):
        transform()({"image": Image.new("RGB", (4, 4))}, np.random.default_rng(0))
    for wrong in (
        {"scale_jitter": (1.0, 2.0)},
        {"short_side": 9, "scale_jitter": (1.0, 2.0), "target_size": 9},
        {"max_side": 4},
        {"short_side": 9, "max_side": 8},
        {"scale_jitter": (2.0, 1.0), "target_size": 9},
    ):
        with pytest.raises(ValidationError):
            AugmentationConfig(**wrong)
