"""``detection:voc``: boxes counted from one, difficult objects, masks by number; bad entries are named and survived."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bowerbird.errors import DataError, InputError, UnknownNameError
from bowerbird.testing import DatasetContract
from bowerbird_detection.annotations import AnnotationWarning
from bowerbird_detection.data_configs import VocConfig
from bowerbird_detection.voc import VocSet

# name -> (height, width) and objects: class, xmin ymin xmax ymax as VOC counts them, difficult
PICTURES: dict[str, tuple[tuple[int, int], list[tuple[str, list[Any], int]]]] = {
    "2007_000001": ((40, 50), [("dog", [1, 1, 10, 20], 0), ("cat", [21, 11, 50, 40], 1)]),
    "2007_000002": ((30, 30), []),
    "2007_000003": ((30, 60), [("cat", [5, 6, 8, 12], 0)]),
}


def write(root: Path) -> Path:
    for folder in ("Annotations", "JPEGImages", "SegmentationObject", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, (size, objects) in PICTURES.items():
        Image.new("RGB", size[::-1]).save(root / "JPEGImages" / f"{name}.jpg")
        numbers = np.zeros(size, np.uint8)
        for i, (_, (left, top, right, bottom), _) in enumerate(objects):
            numbers[top - 1 : bottom, left - 1 : right] = i + 1
        numbers[0, -1] = 255
        Image.fromarray(numbers).save(root / "SegmentationObject" / f"{name}.png")
        write_annotations(root, name, size, objects)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(PICTURES) + "\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("2007_000002\n")
    return root


def write_annotations(root: Path, name: str, size: tuple[int, int], objects: list[tuple[str, list[Any], int]]) -> None:
    entries = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{key}>{v}</{key}>" for key, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=False))
        + "</bndbox></object>"
        for label, corners, difficult in objects
    )
    (root / "Annotations" / f"{name}.xml").write_text(
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>{entries}</annotation>"
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "VOC2007")


def voc(root: Path, split: str | None = "train", **settings: Any) -> VocSet:
    return VocSet.build(VocConfig(root=root, **settings), split)


class TestContract(DatasetContract):
    name = "detection:voc"
    splits = ("train",)

    @pytest.fixture(autouse=True)
    def _settings(self, root: Path) -> None:
        type(self).config = {"root": root}


def test_boxes_count_from_zero_and_end_behind_the_last_pixel(root: Path) -> None:
    data = voc(root)
    assert data.classes == ("cat", "dog") and data.item_ids == list(PICTURES) and data.problems == ()
    item = data[0]
    assert item["boxes"].tolist() == [[0, 0, 10, 20], [20, 10, 50, 40]] and item["box_labels"] == [1, 0]
    assert item["crowd"].tolist() == [False, True]  # difficult
    assert data.size(0) == (40, 50) and item["image"].size == (50, 40) and "masks" not in item
    assert len(data[1]["boxes"]) == 0 and data[1].keys() == item.keys()
    assert data.image_counts().tolist() == [2, 1]
    assert voc(root, "val").classes == ("cat", "dog")  # of all annotations


def test_difficult_objects_are_kept_or_left_out_as_asked(root: Path) -> None:
    assert voc(root, difficult="keep")[0]["crowd"].tolist() == [False, False]
    assert voc(root, difficult="drop")[0]["boxes"].tolist() == [[0, 0, 10, 20]]


def test_masks_are_the_pixels_with_the_number_of_the_object(root: Path) -> None:
    data = voc(root, masks=True, difficult="drop")
    assert data.has_masks and data[0]["masks"].shape == (1, 40, 50)
    assert data[0]["masks"][0, :20, :10].all() and data[0]["masks"].sum() == 200
    assert data[1]["masks"].shape == (0, 30, 30)
    only = voc(root, masks=True, classes=("cat",), difficult="keep", empty="drop")
    assert only[0]["masks"][0, 10:, 20:].all() and len(only) == 2  # the second object of its picture


def test_the_coco_form_says_the_same(root: Path) -> None:
    truth = voc(root, masks=True).coco()
    assert [one["bbox"] for one in truth["annotations"]] == [[0, 0, 10, 20], [20, 10, 30, 30], [4, 5, 4, 7]]
    assert [one["iscrowd"] for one in truth["annotations"]] == [0, 1, 0]
    assert [one["area"] for one in truth["annotations"]] == [200, 900, 28]


def damage_picture(root: Path) -> None:
    (root / "JPEGImages" / "2007_000001.jpg").unlink()


def damage_xml(root: Path) -> None:
    (root / "Annotations" / "2007_000001.xml").write_text("<annotation>")


def another_size(root: Path) -> None:
    Image.new("RGB", (9, 9)).save(root / "JPEGImages" / "2007_000001.jpg")


def no_xml(root: Path) -> None:
    (root / "Annotations" / "2007_000001.xml").unlink()


def objects(*entries: tuple[str, list[Any], int]) -> Callable[[Path], None]:
    return lambda root: write_annotations(root, "2007_000001", (40, 50), [("dog", [1, 1, 10, 20], 0), *entries])


@pytest.mark.parametrize(
    ("damage", "entry", "kind", "left"),
    [
        (damage_picture, "picture 2007_000001", "picture that cannot be opened", 2),
        (damage_xml, "picture 2007_000001", "annotations that are no XML", 2),
        (no_xml, "picture 2007_000001", "picture without annotations", 2),
        (another_size, "picture 2007_000001", "picture of another size", 2),
        (objects(("cat", [9, 9, 5, 12], 0)), "object 2 of picture 2007_000001", "box without area", 3),
        (objects(("cat", [90, 9, 95, 12], 0)), "object 2 of picture 2007_000001", "box outside its picture", 3),
        (objects(("cat", [1, 2, "x", 4], 0)), "object 2 of picture 2007_000001", "box is not four numbers", 3),
        (objects(("cat", [1, 2], 0)), "object 2 of picture 2007_000001", "box is not four numbers", 3),
        (objects((" ", [1, 2, 3, 4], 0)), "object 2 of picture 2007_000001", "object without a name", 3),
    ],
)
def test_a_bad_entry_is_named_and_dropped_alone(
    damage: Callable[[Path], None], entry: str, kind: str, left: int, root: Path, tmp_path: Path
) -> None:
    damage(root)
    report = tmp_path / "report.jsonl"
    with pytest.warns(AnnotationWarning, match=f"1 dropped, {kind} \\({entry}\\)"):
        data = voc(root, report=report)
    assert [(one.entry, one.kind) for one in data.problems] == [(entry, kind)] and len(data) == left
    assert json.loads(report.read_text().splitlines()[0])["entry"] == entry
    assert [len(data[i]["boxes"]) for i in range(len(data))] == ([1, 0, 1] if left == 3 else [0, 1])
    with pytest.raises(DataError, match=f"{entry}: {kind}"):
        voc(root, bad="raise")


def test_objects_and_pictures_without_masks_are_named(root: Path) -> None:
    (root / "SegmentationObject" / "2007_000003.png").unlink()
    Image.fromarray(np.eye(40, 50, dtype=np.uint8)).save(root / "SegmentationObject" / "2007_000001.png")
    with pytest.warns(AnnotationWarning):
        data = voc(root, masks=True)
    assert [(one.entry, one.kind) for one in data.problems] == [
        ("object 2 of picture 2007_000001", "object without a mask"),
        ("picture 2007_000003", "picture without usable masks"),
    ]


def test_sizes_come_from_the_pictures_where_the_annotations_name_none(root: Path) -> None:
    write_annotations(root, "2007_000001", (0, 0), [("dog", [1, 1, 10, 20], 0)])
    assert voc(root, check="none").size(0) == (40, 50)


def test_the_file_of_a_split_may_begin_with_a_mark_and_is_text(root: Path) -> None:
    path = root / "ImageSets" / "Main" / "train.txt"
    path.write_bytes(b"\xef\xbb\xbf2007_000001\r\n2007_000003\r\n")
    assert voc(root).item_ids == ["2007_000001", "2007_000003"]
    path.write_bytes(b"2007_\xe9\n")
    with pytest.raises(DataError, match=r"train.txt' is no text in UTF-8"):
        voc(root)


def test_annotations_without_a_named_object_are_refused(root: Path) -> None:
    for name, (size, _) in PICTURES.items():
        write_annotations(root, name, size, [])
    with pytest.raises(DataError, match=r"no object in the \.xml files"):
        voc(root)


def test_one_class_is_a_name_alone(root: Path) -> None:
    assert voc(root, classes="cat").classes == ("cat",)
    with pytest.raises(UnknownNameError, match="Did you mean 'cat'"):
        voc(root, classes="cta")


def test_splits_and_classes_that_are_not_there(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"there are the splits train, val\. Did you mean 'train'"):
        voc(root, "trian")
    with pytest.raises(InputError, match="name a split; there are the splits train, val"):
        voc(root, None)
    with pytest.raises(UnknownNameError, match=r"is a 'cot'\. Did you mean 'cat'"):
        voc(root, classes=("cot",))
    with pytest.raises(DataError, match="holds no splits"):
        voc(tmp_path)
