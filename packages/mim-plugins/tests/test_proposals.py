"""Boxes: which are kept, where they come from, and crops that share them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bowerbird.errors import DataError, InputError, MissingExtraError
from bowerbird_mim.boxes import (
    boxes_inside,
    check_boxes,
    filter_proposals,
    iou,
    random_boxes,
    sample_overlapping_scenes,
    scene_overlap,
)
from bowerbird_mim.proposals import (
    GridProposals,
    ItemProposals,
    RandomProposals,
    SelectiveSearch,
    main,
    read_boxes,
    write_boxes,
)


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


# ------------------------------------------------------------------------------------------------ boxes


def test_overlap_and_what_lies_inside(golden) -> None:
    values = golden("univip/scene_overlap")
    x, y, w, h = values["boxes_xywh"].T
    boxes = torch.stack([x, y, x + w, y + h], dim=1)
    for row, overlap, inside in zip(
        values["crops_top_left_h_w_top_left_h_w"].tolist(),
        values["overlap_x1y1x2y2"].tolist(),
        values["boxes_inside_overlap"].numpy(),
        strict=True,
    ):
        crops = [(left, top, left + w, top + h) for top, left, h, w in (row[:4], row[4:])]
        found = scene_overlap(*crops, min_side=values["min_overlap"])
        assert found == (None if overlap[0] < 0 else tuple(overlap))
        if found:
            assert (boxes_inside(boxes, found) == inside).all()
    kept = filter_proposals(boxes, values["min_size"], values["max_ratio"], max_iou=1.0)
    assert torch.equal(kept, boxes[values["box_filter_keep"]])


def test_boxes_that_repeat_an_earlier_one_are_left_out() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 5], [20, 0, 30, 10], [5, 0, 15, 10]])
    assert filter_proposals(boxes, 2, 3, 0.5).tolist() == boxes[[0, 3, 4]].tolist()  # IoU 0.9, 0.5, 0, 1/3
    assert filter_proposals(boxes, 2, 3, 0.51).tolist() == boxes[[0, 2, 3, 4]].tolist()
    assert filter_proposals(boxes, 6, 3, 1.0).tolist() == boxes[[0, 1, 3, 4]].tolist()
    assert filter_proposals(boxes[:0], 6).shape == (0, 4)
    assert iou([0, 0, 4, 4], [[2, 0, 6, 4], [4, 0, 8, 4], [0, 0, 4, 4]]).tolist() == [1 / 3, 0, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), max_iou=st.floats(0.05, 1), max_aspect=st.floats(1, 4), min_side=st.integers(0, 30))
def test_kept_boxes_meet_every_limit_and_left_out_ones_break_one(
    seed: int, max_iou: float, max_aspect: float, min_side: int
) -> None:
    corners = np.random.default_rng(seed).integers(0, 50, (20, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    kept = filter_proposals(boxes, min_side, max_aspect, max_iou).tolist()
    chosen: list[list[int]] = []
    for box in boxes.tolist():
        w, h = box[2] - box[0], box[3] - box[1]
        fine = min(w, h) >= max(min_side, 1e-9) and max(w, h) <= max_aspect * min(w, h)
        if fine and all(iou(box, [other])[0] < max_iou for other in chosen):
            chosen.append(box)
    assert kept == chosen


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 80),
    height=st.integers(1, 80),
    min_side=st.integers(1, 40),
    max_aspect=st.floats(1, 5),
)
def test_random_boxes_lie_in_their_region_and_keep_to_the_limits(
    seed: int, width: int, height: int, min_side: int, max_aspect: float
) -> None:
    region = (7, 3, 7 + width, 3 + height)
    boxes = random_boxes(region, 5, np.random.default_rng(seed), min_side, max_aspect)
    assert boxes.shape == (5, 4) and boxes_inside(boxes, region).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides >= min(min_side, width, height)).all()
    assert (sides.max(axis=1) <= max_aspect * sides.min(axis=1)).all()


def test_random_boxes_overlap_little_where_there_is_room() -> None:
    known = np.array([[0.0, 0, 100, 100]])
    boxes = random_boxes((0, 0, 400, 400), 6, np.random.default_rng(0), 64, 3.0, 0.3, known)
    everything = np.concatenate([known, boxes])
    for i in range(len(everything)):
        assert (iou(everything[i], np.delete(everything, i, axis=0)) < 0.3).all()


# ------------------------------------------------------------------------------------------------ scenes


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    num_boxes=st.integers(0, 12),
    num_instances=st.integers(0, 6),
    tries=st.integers(1, 20),
)
def test_both_crops_hold_all_boxes_of_a_pair(
    seed: int, width: int, height: int, num_boxes: int, num_instances: int, tries: int
) -> None:
    rng = np.random.default_rng(seed)
    boxes = random_boxes((0, 0, width, height), num_boxes, rng, min_side=10, max_iou=0.9)
    pair = sample_overlapping_scenes((width, height), boxes, num_instances, tries, rng, min_side=16)
    assert pair.boxes.shape == (num_instances, 4) and pair.boxes.dtype == torch.float32
    for crop in (pair.crop1, pair.crop2):
        assert boxes_inside([crop], (0, 0, width, height)).all()
        assert boxes_inside(pair.boxes, crop).all()
    assert ((pair.boxes[:, 2:] - pair.boxes[:, :2]) >= min(10, width, height)).all()


def test_boxes_of_the_picture_are_preferred_and_keep_their_order() -> None:
    boxes = torch.tensor([[x, y, x + 20.0, y + 20] for y in range(0, 100, 20) for x in range(0, 100, 20)])
    orders, used = [], set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        pair = sample_overlapping_scenes((100, 100), boxes, 3, 20, rng, scale=(0.5, 1.0))
        positions = [int((boxes == box).all(dim=1).nonzero()) for box in pair.boxes]
        orders.append(positions == sorted(positions))
        used |= set(positions)
    assert all(orders) and len(used) > 10  # not the first ones only


def test_a_pair_without_proposals_gets_random_boxes_behind_the_known_ones() -> None:
    known = torch.tensor([[40.0, 40, 60, 60]])
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pair = sample_overlapping_scenes((100, 100), known, 3, 20, rng, scale=(0.4, 1.0), min_side=10)
        inside = boxes_inside(known, pair.crop1).all() and boxes_inside(known, pair.crop2).all()
        assert (pair.boxes[0].tolist() == known[0].tolist()) == inside
        found += inside
        for i in range(3):
            others = np.delete(pair.boxes.numpy(), i, axis=0)
            assert (iou(pair.boxes[i], others) < 0.5).all()
    assert found == 20  # of 20 tries one holds the box in the middle


def test_where_no_crops_overlap_enough_both_are_the_whole_picture() -> None:
    pair = sample_overlapping_scenes((200, 200), [], 2, 5, np.random.default_rng(0), scale=(0.01, 0.02), min_side=64)
    assert pair.crop1 == pair.crop2 == (0, 0, 200, 200)
    assert ((pair.boxes[:, 2:] - pair.boxes[:, :2]) >= 64).all()


def test_the_same_generator_gives_the_same_pair_and_without_instances_crops_are_free() -> None:
    boxes = torch.tensor([[10.0, 10, 40, 40]])
    one, two = (sample_overlapping_scenes((90, 70), boxes, 2, 20, np.random.default_rng(3)) for _ in range(2))
    assert one.crop1 == two.crop1 and one.crop2 == two.crop2 and torch.equal(one.boxes, two.boxes)
    free = [
        sample_overlapping_scenes((90, 70), [], 0, 1, np.random.default_rng(s), scale=(0.08, 0.2)) for s in range(20)
    ]
    assert any(scene_overlap(pair.crop1, pair.crop2) is None for pair in free)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (0.5, 0.1)}, r"scale = \(0\.5, 0\.1\)"),
        ({"scale": (0.5, 2.0)}, r"scale = \(0\.5, 2\.0\)"),
        ({"ratio": (0.0, 1.0)}, r"ratio = \(0\.0, 1\.0\)"),
        ({"max_iou": float("nan")}, "max_iou = nan"),
        ({"rng": 3}, r"rng = 3: expected a numpy\.random\.Generator"),
        ({"tries": 0}, "tries = 0"),
    ],
)
def test_pairs_that_cannot_be_drawn_are_refused(wrong, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_overlapping_scenes((90, 70), [], 1, **wrong)


def test_boxes_outside_the_picture_are_refused() -> None:
    with pytest.raises(
        InputError, match=r"box 1 = \[5.0, 5.0, 61.0, 20.0\] is not inside the picture of 60 x 40 pixels"
    ):
        sample_overlapping_scenes((60, 40), [[0, 0, 60, 40], [5, 5, 61, 20]])
    for wrong in ([-1, 0, 5, 5], [5, 5, 5, 9], [0, 0, 5, 41], [0, float("nan"), 5, 5]):
        with pytest.raises(InputError, match="expected 0 <= left < right <= 60 and 0 <= top < bottom <= 40"):
            check_boxes([wrong], (60, 40))
    with pytest.raises(InputError, match=r"boxes have shape \(2, 3\); expected \(M, 4\)"):
        check_boxes([[1, 2, 3], [4, 5, 6]], (60, 40))
    with pytest.raises(InputError, match="tries = 0"):
        sample_overlapping_scenes((60, 40), [], 2, 0)
    with pytest.raises(InputError, match=r"max_aspect = 0\.5"):
        filter_proposals([[0, 0, 5, 5]], 1, 0.5)


# ------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("source", [GridProposals(), GridProposals((1, 4)), RandomProposals(count=9, min_side=7)])
def test_a_source_finds_boxes_inside_and_the_same_ones_again(source) -> None:
    for size in ((60, 40), (33, 57)):
        boxes = source.boxes(picture(*size))
        assert boxes.dtype == torch.float32 and len(check_boxes(boxes, size)) == len(boxes) > 0
        assert torch.equal(boxes, source.boxes(picture(*size)))


def test_a_grid_has_all_windows_half_a_window_apart() -> None:
    boxes = GridProposals((2,)).boxes(picture(60, 40))
    assert boxes.tolist() == [[x, y, x + 30, y + 20] for y in (0, 10, 20) for x in (0, 15, 30)]
    assert len(filter_proposals(GridProposals().boxes(picture(60, 40)), 5)) == 9 + 25  # none repeats another


def test_other_pictures_have_other_random_boxes() -> None:
    source = RandomProposals(min_side=5)
    assert not torch.equal(source.boxes(picture(seed=0)), source.boxes(picture(seed=1)))


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="needs the extra [proposals]")
def test_selective_search_finds_a_square() -> None:
    pixels = np.full((120, 160, 3), 230, np.uint8)
    pixels[30:80, 50:110] = (200, 30, 30)
    image = Image.fromarray(pixels)
    boxes = filter_proposals(SelectiveSearch().boxes(image), 20)
    assert iou([50, 30, 110, 80], boxes).max() > 0.85
    small = check_boxes(SelectiveSearch(max_side=80).boxes(image), image.size)
    assert iou([50, 30, 110, 80], small).max() > 0.75


def test_selective_search_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'bowerbird-mim\[proposals\]'"):
        ItemProposals("selective-search")


def test_boxes_of_items_are_checked_and_filtered() -> None:
    find = ItemProposals("boxes", min_side=5)
    item = {"image": picture(), "item_id": "a", "boxes": np.float32([[0, 0, 4, 20], [10, 10, 20, 20]])}
    assert find(item).tolist() == [[10, 10, 20, 20]]
    with pytest.raises(DataError, match=r"item 'a', proposals = 'boxes': box 0 = .* is not inside"):
        find({**item, "boxes": np.float32([[0, 0, 61, 20]])})
    with pytest.raises(InputError, match="the items of this data set have no boxes"):
        find({"image": picture(), "item_id": "a"})


def test_stored_boxes_are_read_by_item(tmp_path: Path) -> None:
    file = tmp_path / "boxes.npz"
    write_boxes(file, {"a": [[0, 0, 30, 20], [10, 10, 20, 20]], "none": [], "b/c": torch.tensor([[1.0, 2, 31, 32]])})
    assert {name: boxes.tolist() for name, boxes in read_boxes(file).items()} == {
        "a": [[0, 0, 30, 20], [10, 10, 20, 20]], "none": [], "b/c": [[1, 2, 31, 32]],
    }  # fmt: skip
    find = ItemProposals(str(file), min_side=15)
    assert find({"image": picture(), "item_id": "a"}).tolist() == [[0, 0, 30, 20]]
    assert find({"image": picture(), "item_id": "none"}).shape == (0, 4)
    with pytest.raises(DataError, match="has no boxes of item 'd'"):
        find({"image": picture(), "item_id": "d"})
    with pytest.raises(DataError, match="is not inside the picture of 20 x 20"):
        find({"image": picture(20, 20), "item_id": "a"})


def test_a_file_that_holds_no_boxes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.npz"):
        read_boxes(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("boxes")
    with pytest.raises(DataError, match="Expected the arrays ids"):
        read_boxes(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", ids=np.array(["a"]), offsets=np.array([0, 3]), boxes=np.zeros((2, 4)))
    with pytest.raises(DataError, match="do not fit"):
        read_boxes(tmp_path / "other.npz")


def test_boxes_of_a_data_set_can_be_stored_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "boxes.npz"
    arguments = ["mim:canvases?source=core:digits&count=4&canvas_size=48&items=[2,2]&item_size=[10,20]", str(file)]
    result = CliRunner().invoke(
        main, [*arguments, "--split", "test", "--source", "random", "--min-side", "8", "--workers", "1"]
    )
    assert result.exit_code == 0, result.output
    stored = read_boxes(file)
    assert len(stored) == 4 and all(len(check_boxes(boxes, (48, 48))) > 3 for boxes in stored.values())
    refused = CliRunner().invoke(main, ["core:digits", str(tmp_path / "boxes.txt"), "--source", "grid"])
    assert refused.exit_code == 1 and "ends with .npz" in refused.output
    assert not (tmp_path / "boxes.txt").exists()
