"""``detection:coco``: annotations come back exactly, and every kind of bad entry is named and survived."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bowerbird.data.uris import open_dataset
from bowerbird.errors import DataError, InputError, UnknownNameError
from bowerbird.testing import DatasetContract
from bowerbird.train.data import TrainItems, collate
from bowerbird_detection.annotations import AnnotationWarning
from bowerbird_detection.canvases import Canvases
from bowerbird_detection.coco import CocoSet
from bowerbird_detection.data_configs import AugmentationConfig, CanvasesConfig, CocoConfig, lvis
from bowerbird_detection.evaluators import average_precisions
from bowerbird_detection.transforms import DetectionTransform

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def source() -> Canvases:
    return Canvases.build(CanvasesConfig(count=8, canvas_size=(48, 64), items=(1, 3), item_size=16, empty=0.2), "train")


@pytest.fixture(scope="session")
def folder(source: Canvases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The canvases as a COCO folder."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    content = source.coco()
    for i, entry in enumerate(content["images"]):
        entry["file_name"] = entry["file_name"].removeprefix("train/") + ".png"
        (root / "train").mkdir(exist_ok=True)
        source[i]["image"].save(root / "train" / entry["file_name"])
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., CocoSet]:
    """The set after a change of its file."""

    def read(change: Change | None = None, *, own_pictures: bool = False, **settings: Any) -> CocoSet:
        root, file = tmp_path / "copy", Path("annotations", "instances_train.json")
        if own_pictures:
            shutil.copytree(folder / "train", root / "train")
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        content = json.loads((folder / file).read_text())
        if change is not None:
            change(content)
        (root / file).write_text(json.dumps(content))
        images = "train" if own_pictures else str(folder / "train")
        return CocoSet.build(CocoConfig(root=root, images=images, **settings), "train")

    return read


class TestContract(DatasetContract):
    name = "detection:coco"
    splits = ("train",)

    @pytest.fixture(autouse=True)
    def _settings(self, folder: Path) -> None:
        type(self).config = {"root": folder}


def test_what_was_written_is_read_back(source: Canvases, folder: Path) -> None:
    data = CocoSet.build(CocoConfig(root=folder), "train")
    assert data.problems == () and len(data) == len(source)
    assert data.classes == source.classes and data.keypoint_names == source.keypoint_names
    for i in range(len(data)):
        ours, theirs = data[i], source[i]
        assert ours["image"].tobytes() == theirs["image"].tobytes() and data.size(i) == source.size(i)
        for key in ("boxes", "masks", "keypoints", "crowd"):
            assert np.array_equal(ours[key], theirs[key])
        assert ours["box_labels"] == theirs["box_labels"] and ours["keypoint_mirror"] == theirs["keypoint_mirror"]
    written, again = source.coco(), data.coco()
    assert again["annotations"] == written["annotations"] and again["categories"] == written["categories"]
    assert (data.image_counts() == source.image_counts()).all()


def test_a_data_set_goes_to_other_processes(folder: Path) -> None:
    data = CocoSet.build(CocoConfig(root=folder), "train")
    assert (pickle.loads(pickle.dumps(data))[1]["masks"] == data[1]["masks"]).all()


def test_it_opens_by_name_with_its_preset_and_settings(folder: Path) -> None:
    data, address = open_dataset(f"detection:coco?root={folder}&masks=false", "train")
    assert "masks" not in data[0] and address.startswith("dataset:detection:coco?root=")


def test_classes_follow_category_ids_with_holes(changed: Callable[..., CocoSet]) -> None:
    def spread(content: dict[str, Any]) -> None:
        for one in content["categories"] + content["annotations"]:
            key = "id" if "name" in one else "category_id"
            one[key] = 3 * one[key] + 7
        content["categories"].reverse()

    data = changed(spread)
    assert data.classes == tuple("0123456789") and data.problems == ()
    assert data.category_ids == list(range(10, 38, 3))
    assert {one["category_id"] for one in data.coco()["annotations"]} <= set(range(1, 11))


def test_some_classes_in_another_order(changed: Callable[..., CocoSet], source: Canvases) -> None:
    chosen = ("7", "1", "0")
    data = changed(classes=chosen)
    expected = [sum(source.classes[label] in chosen for label in source.object_labels(i)) for i in range(len(source))]
    assert data.classes == chosen and [len(data.objects(i).boxes) for i in range(len(data))] == expected
    for i in range(len(data)):
        for label in data.object_labels(i):
            assert source.classes.index(chosen[label]) in source.object_labels(i)


def test_polygons_are_filled_and_parts_joined(changed: Callable[..., CocoSet]) -> None:
    def polygons(content: dict[str, Any]) -> None:
        content["annotations"] = content["annotations"][:1]
        content["annotations"][0] |= {
            "segmentation": [[2, 2, 10, 2, 10, 8, 2, 8], [20, 20, 26, 20, 26, 30, 20, 30]], "bbox": [2, 2, 24, 28],
        }  # fmt: skip

    data = changed(polygons)
    index = next(i for i in range(len(data)) if len(data.objects(i).boxes))
    mask = data.objects(index).masks[0].numpy()
    assert mask[2:8, 2:10].all() and mask[20:30, 20:26].all() and mask.sum() == 48 + 60


def test_crowds_with_plain_run_lengths(changed: Callable[..., CocoSet], source: Canvases) -> None:
    def crowd(content: dict[str, Any]) -> None:
        one = content["annotations"][0]
        height, width = one["segmentation"]["size"]
        one |= {"iscrowd": 1, "segmentation": {"size": [height, width], "counts": [5, 7, height * width - 12]}}

    objects = next(found for found in map(changed(crowd).objects, range(len(source))) if len(found.boxes))
    assert objects.crowd[0] and not objects.crowd[1:].any()
    flat = np.zeros(objects.masks[0].numel(), bool)
    flat[5:12] = True
    assert (objects.masks[0].numpy() == flat.reshape(objects.masks[0].shape[::-1]).T).all()  # column by column


def test_boxes_come_from_masks_where_there_are_none(changed: Callable[..., CocoSet], source: Canvases) -> None:
    data = changed(lambda content: [one.pop("bbox") for one in content["annotations"]])
    for i in range(len(data)):
        assert (data.objects(i).boxes == source.objects(i).boxes).all()


# --------------------------------------------------------------------------------------------------- bad entries


def first(content: dict[str, Any]) -> dict[str, Any]:
    return content["annotations"][0]


def box(*values: Any) -> Change:
    return lambda content: first(content).update(bbox=list(values))


def rle(**values: Any) -> Change:
    return lambda content: first(content)["segmentation"].update(values)


def polygon(*values: Any) -> Change:
    return lambda content: first(content).update(segmentation=[list(values)])


BAD = {
    "box without area": [box(3, 3, 0, 5), box(3, 3, 5, -1)],
    "box outside its picture": [box(500, 3, 5, 5), box(-20, 3, 5, 5)],
    "box is not four numbers": [box(1, 2, 3), box(1, 2, 3, None), box(1, 2, 3, float("nan")), box(1, 2, "3", 4)],
    "unknown category": [lambda content: first(content).update(category_id=4711)],
    "annotation of an unknown picture": [lambda content: first(content).update(image_id=4711)],
    "run lengths do not match the picture": [
        rle(size=[3, 3]), rle(counts="zz"), rle(counts=[1, 2, 3]), rle(counts=[-1, 4]), rle(counts=None),
    ],
    "empty mask": [lambda content: first(content)["segmentation"].update(
        counts=[int(np.prod(first(content)["segmentation"]["size"]))]
    )],
    "polygon cannot be used": [
        polygon(1, 1, 2, 2), polygon(1, 1, 5, 5, 5), polygon(1, 1, float("nan"), 2, 3, 3), polygon(1, 1, 2, 2, 3, 3),
        polygon(1, 1, 1e9, 1, 1e9, 1e9),
    ],
    "mask is neither polygons nor run lengths": [lambda content: first(content).update(segmentation="all")],
    "annotation without a mask": [lambda content: first(content).pop("segmentation")],
    "keypoints are not x, y, visibility of each": [lambda content: first(content).update(keypoints=[1, 2, 2])],
    "keypoints are not finite with visibility 0, 1 or 2": [
        lambda content: first(content).update(keypoints=[1, 1, 9] * 4),
    ],
    "annotation is no object": [lambda content: content["annotations"].__setitem__(0, "a cat")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change"),
    [pytest.param(kind, change, id=f"{kind} {i}") for kind, all_ in BAD.items() for i, change in enumerate(all_)],
)
def test_a_bad_annotation_is_named_and_dropped_alone(
    kind: str, change: Change, changed: Callable[..., CocoSet], source: Canvases
) -> None:
    with pytest.warns(AnnotationWarning, match="instances_train.json': 1 bad entries: 1 dropped, ") as caught:
        data = changed(change)
    name = "annotation at position 0" if kind == "annotation is no object" else "annotation 1"
    assert len(caught) == 1 and f"{kind} ({name})" in str(caught[0].message)
    (problem,) = data.problems
    assert (problem.kind, problem.entry, problem.done) == (kind, name, "dropped")
    assert problem.file.endswith("instances_train.json")
    total = sum(len(source.objects(i).boxes) for i in range(len(source)))
    assert sum(len(data[i]["boxes"]) for i in range(len(data))) == total - 1
    average_precisions(data.coco(), [], "mask")  # what is left can be evaluated
    with pytest.raises(DataError, match=f"{name}: {kind}.*set bad = 'drop'"):
        changed(change, bad="raise")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("box partly outside its picture", box(-5, 3, 15, 5)),
        ("polygon cannot be used", lambda content: first(content).update(segmentation=[[1, 1, 9, 1, 9, 9], [1, 1]])),
        ("keypoint outside its picture", lambda content: first(content).update(keypoints=[-9, 1, 2] + [4, 4, 2] * 3)),
    ],
)
def test_what_can_be_repaired_is_kept_and_named(
    kind: str, change: Change, changed: Callable[..., CocoSet], source: Canvases
) -> None:
    with pytest.warns(AnnotationWarning, match=f"1 repaired, {kind} \\(annotation 1\\)"):
        data = changed(change)
    assert sum(len(data[i]["boxes"]) for i in range(len(data))) == sum(
        len(source.objects(i).boxes) for i in range(len(source))
    )
    for i in range(len(data)):
        boxes = data[i]["boxes"]
        assert (boxes >= 0).all() and (boxes[:, 2] <= data.size(i)[1]).all() and (boxes[:, 3] <= data.size(i)[0]).all()


def test_rounding_at_the_border_is_no_problem(changed: Callable[..., CocoSet]) -> None:
    data = changed(box(-0.4, 3, 15, 5))
    assert (
        data.problems == ()
        and min(data.objects(i).boxes.min() for i in range(len(data)) if len(data.objects(i).boxes)) == 0
    )


def test_pictures_that_cannot_be_used_go_with_their_annotations(
    changed: Callable[..., CocoSet], source: Canvases, tmp_path: Path
) -> None:
    pictures = tmp_path / "copy" / "train"

    def damage(content: dict[str, Any]) -> None:
        (pictures / "000000.png").unlink()
        (pictures / "000001.png").write_bytes(b"no picture")
        Image.new("RGB", (9, 7)).save(pictures / "000002.png")
        content["images"].append(content["images"][3])
        content["images"].append({"id": 99})

    with pytest.warns(AnnotationWarning) as caught:
        data = changed(damage, own_pictures=True)
    kinds = [(one.kind, one.entry) for one in data.problems]
    assert sorted(kinds) == [
        ("picture listed twice", "picture 4 (000003.png)"),
        ("picture of another size", "picture 3 (000002.png)"),
        ("picture that cannot be opened", "picture 1 (000000.png)"),
        ("picture that cannot be opened", "picture 2 (000001.png)"),
        ("picture without id or file name", "picture at position 9"),
    ]
    assert "it has 9 x 7 pixels" in str([one.detail for one in data.problems])
    assert "5 pictures with" in str(caught[0].message) and len(data) == 5
    assert [data[i]["item_id"] for i in range(5)] == [f"{i:06d}.png" for i in range(3, 8)]


def test_headers_are_not_read_where_the_file_is_trusted(changed: Callable[..., CocoSet], tmp_path: Path) -> None:
    def damage(_: dict[str, Any]) -> None:
        Image.new("RGB", (9, 7)).save(tmp_path / "copy" / "train" / "000002.png")

    data = changed(damage, own_pictures=True, check="files")
    with pytest.raises(DataError, match="it has 9 x 7 pixels, its annotations are for"):
        data[2]
    assert data[3]["item_id"] == "000003.png"


def test_a_turned_picture_says_so(changed: Callable[..., CocoSet], tmp_path: Path) -> None:
    def turn(content: dict[str, Any]) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        entry = content["images"][0]
        Image.new("RGB", (entry["width"], entry["height"])).save(tmp_path / "copy" / "train" / "000000.png", exif=exif)

    with pytest.warns(AnnotationWarning):
        data = changed(turn, own_pictures=True)
    assert data.problems[0].detail.endswith("its EXIF orientation turns it")


def test_the_report_holds_every_problem_and_every_note(changed: Callable[..., CocoSet], tmp_path: Path) -> None:
    def several(content: dict[str, Any]) -> None:
        for one in content["annotations"][:5]:
            one["category_id"] = 99
        content["categories"].pop(0)
        content["categories"][-1]["id"] = 50

    report = tmp_path / "report.jsonl"
    with pytest.warns(
        AnnotationWarning, match=r"unknown category \(annotation 1, annotation 2, annotation 3, \.\.\.\)"
    ):
        data = changed(several, report=report)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["entry"] for line in lines if "entry" in line] == [one.entry for one in data.problems]
    notes = [line["note"] for line in lines if "note" in line]
    assert any("category ids 2 to 50 have 40 holes" in note for note in notes)
    assert any("pictures have no objects and are kept" in note for note in notes)


def test_pictures_without_objects_are_kept_unless_asked_otherwise(changed: Callable[..., CocoSet]) -> None:
    every, some = changed(), changed(empty="drop")
    empty = [i for i in range(len(every)) if not every.object_labels(i)]
    assert empty and len(some) == len(every) - len(empty)
    assert every[empty[0]].keys() == every[(empty[0] + 1) % len(every)].keys()
    assert every[empty[0]]["masks"].shape == (0, *every.size(empty[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "has no list 'images'"),
        (lambda content: content["categories"].append({"id": 1, "name": "x"}), "two categories have the id 1"),
        (lambda content: content["categories"].append({"id": 99, "name": "0"}), "two categories have the name '0'"),
        (lambda content: content["categories"].append({"id": 99}), "a category needs 'id'"),
        (lambda content: content["categories"].clear(), "has no categories"),
        (lambda content: content["categories"][0].update(keypoints=["a"]), "2 different lists of keypoints"),
    ],
)
def test_files_without_cocos_form_are_refused(change: Change, message: str, changed: Callable[..., CocoSet]) -> None:
    with pytest.raises(DataError, match=message):
        changed(change)


def test_files_that_are_no_json_splits_and_classes_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"there are the splits train\. Did you mean 'train'"):
        CocoSet.build(CocoConfig(root=folder), "trian")
    with pytest.raises(InputError, match="name a split"):
        CocoSet.build(CocoConfig(root=folder), None)
    with pytest.raises(UnknownNameError, match="has no category 'cat'"):
        CocoSet.build(CocoConfig(root=folder, classes=("cat",)), "train")
    with pytest.raises(DataError, match="holds no such file"):
        CocoSet.build(CocoConfig(root=tmp_path), "train")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        CocoSet.build(CocoConfig(root=tmp_path, annotations="a.json", images=""), None)


def test_nothing_left_is_an_error(changed: Callable[..., CocoSet]) -> None:
    with pytest.warns(AnnotationWarning), pytest.raises(DataError, match="none of its 8 pictures can be used"):
        changed(lambda content: [one.update(file_name=f"{one['id']}.jpg") for one in content["images"]])


def test_nothing_left_says_why(changed: Callable[..., CocoSet], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of its 8 pictures can be used \(8 pictures have no objects"):
        changed(lambda content: content.update(annotations=[]), empty="drop")
    (tmp_path / "copy" / "elsewhere").mkdir()
    with (
        pytest.warns(AnnotationWarning),
        pytest.raises(DataError, match=r"can be used \(picture 1 .*cannot be opened: .*does not exist"),
    ):
        CocoSet.build(CocoConfig(root=tmp_path / "copy", images="elsewhere"), "train")


def test_a_class_is_chosen_once() -> None:
    with pytest.raises(ValueError, match=r"classes = .* a name is there more than once"):
        CocoConfig(root=Path(), classes=("cat", "dog", "cat"))


@pytest.mark.parametrize("keypoints", [5, "nose"])
def test_keypoints_of_a_category_are_a_list_of_names(keypoints: Any, changed: Callable[..., CocoSet]) -> None:
    with pytest.raises(DataError, match=f"keypoints of category '0' are '{keypoints}'; expected a list"):
        changed(lambda content: content["categories"][0].update(keypoints=keypoints))


def test_a_report_in_a_folder_that_is_not_there_is_refused(changed: Callable[..., CocoSet], tmp_path: Path) -> None:
    for report in (tmp_path / "no" / "report.jsonl", tmp_path):
        with pytest.raises(InputError, match=f"report = '{report}'"):
            changed(report=report)


def test_lvis_files_name_pictures_by_address_and_groups_by_letter(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    for i, one in enumerate(content["images"]):
        one["coco_url"] = f"http://images.example.org/train2017/{one.pop('file_name')}"
        one |= {"neg_category_ids": [i % 10 + 1], "not_exhaustive_category_ids": [(i + 1) % 10 + 1]}
    for i, one in enumerate(content["categories"]):
        one["frequency"] = "rcf"[i % 3]
    shutil.copytree(folder / "train", tmp_path / "train2017")
    (tmp_path / "lvis_v1_train.json").write_text(json.dumps(content))
    data = CocoSet.build(CocoConfig(root=tmp_path, **lvis()), "train")
    assert data[0]["item_id"] == "train2017/000000.png"
    assert data.frequency_groups().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    truth = data.coco()
    assert truth["images"][2]["neg_category_ids"] == [3] and truth["categories"][1]["frequency"] == "c"
    found = [
        {key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for one in truth["annotations"]
    ]
    scores = average_precisions(copy.deepcopy(truth), found, lvis=True)
    assert scores.summary(data.frequency_groups())["AP"] == pytest.approx(1.0)


# ------------------------------------------------------------------------------------------------ whatever is there

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-99, 99) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["size", "counts", "id"]), inner),
    max_leaves=9,
)
NUMBERS = st.lists(st.floats(width=32) | st.integers(-5, 70), max_size=14)
KEYS = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(KEYS),
    JUNK | NUMBERS | st.lists(NUMBERS, max_size=3) | st.fixed_dictionaries({"size": JUNK, "counts": JUNK | NUMBERS}),
    st.sampled_from(["id", "file_name", "height", "width", "neg_category_ids"]),
    JUNK,
)
def test_no_value_ends_the_process_or_an_epoch(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, key: str, value: Any, picture_key: str, other: Any
) -> None:
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    content["annotations"][0][key] = value
    content["images"][5][picture_key] = other
    file = tmp_path_factory.getbasetemp() / "junk.json"
    file.write_text(json.dumps(content))
    config = CocoConfig(root=folder, annotations=str(file), images="train", check="files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnotationWarning)
        data = CocoSet.build(config, None)
    change = DetectionTransform(AugmentationConfig(iou_crop=0.5, scale_jitter=(0.5, 2.0), target_size=64))
    for i in range(len(data)):
        objects, (height, width) = data.objects(i), data.size(i)
        assert (objects.boxes >= 0).all() and (objects.boxes <= torch.tensor([width, height] * 2)).all()
        assert objects.masks.shape == (len(objects.boxes), height, width)
        if data.item_ids[i] != "000005.png":
            change(data[i], np.random.default_rng(i))
    average_precisions(data.coco(), [], "mask")


def test_an_epoch_over_a_file_with_every_kind_of_bad_entry_ends(changed: Callable[..., CocoSet]) -> None:
    def everything(content: dict[str, Any]) -> None:
        good = content["annotations"].copy()
        for kind in BAD.values():
            for change in kind:
                one = {"annotations": [copy.deepcopy(good[0])]}
                change(one)
                content["annotations"] += one["annotations"]

    with pytest.warns(AnnotationWarning, match=f"{sum(len(kind) for kind in BAD.values())} bad entries"):
        data = changed(everything)
    items = TrainItems(
        data, None, augment="none", seed=0, transform=DetectionTransform(AugmentationConfig(iou_crop=0.5))
    )
    batch = collate([items[0, i] for i in range(len(data))])
    assert batch["image"].shape[0] == len(batch["boxes"]) == len(data)
    assert {key: len(batch[key]) for key in ("masks", "keypoints", "crowd", "box_labels")} == dict.fromkeys(
        ("masks", "keypoints", "crowd", "box_labels"), len(data)
    )
