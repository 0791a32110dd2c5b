"""Core's data sets: image folders, Fashion-MNIST from IDX files, digits, and views of them."""

from __future__ import annotations

import gzip
import math
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bowerbird.builtin import bowerbird_datasets
from bowerbird.data import images_of, subset
from bowerbird.data.configs import FashionMnistConfig, ImageFolderConfig
from bowerbird.data.fashion_mnist import CLASSES, FashionMnist
from bowerbird.data.idx import read_idx
from bowerbird.data.image_folder import ImageFolder
from bowerbird.data.images import Preprocessing, decode_batches
from bowerbird.errors import DataError, InputError, UnknownNameError

RECORDS = {record.name: record for record in bowerbird_datasets()}


# ------------------------------------------------------------------------------------------------- image folder


def fill(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (i, 0, 0)).save(path)
    return root


def folder(root: Path, split: str | None = None, **settings: object) -> ImageFolder:
    return ImageFolder.build(ImageFolderConfig(root=root, **settings), split)  # type: ignore[arg-type]


def test_the_class_is_the_first_folder_and_the_id_the_path(tmp_path: Path) -> None:
    dataset = folder(fill(tmp_path, "dog/b.png", "cat/deep/er/a.jpg", "cat/c.PNG"))
    assert list(dataset.item_ids) == ["cat/c.PNG", "cat/deep/er/a.jpg", "dog/b.png"]
    assert list(dataset.classes) == ["cat", "dog"]
    assert list(dataset.labels()) == [0, 0, 1]
    item = dataset[2]
    assert (item["image"].mode, item["image"].size) == ("RGB", (5, 4))
    assert (item["label"], item["item_id"]) == (1, "dog/b.png")
    assert set(item) == set(RECORDS["core:image-folder"].provides)
    assert dataset.path(2) == tmp_path / "dog" / "b.png"


def test_hidden_files_and_other_files_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "cat/.b.png", ".cache/c.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    assert list(folder(tmp_path).item_ids) == ["cat/a.png"]


def test_split_folders_are_recognised_and_labels_mean_the_same_in_all(tmp_path: Path) -> None:
    fill(tmp_path, "train/dog/1.png", "train/cat/2.png", "test/ant/3.png", "test/dog/4.png", "val/cat/5.png")
    train, test, val = (folder(tmp_path, split) for split in ("train", "test", "val"))
    assert list(train.item_ids) == ["train/cat/2.png", "train/dog/1.png"]
    assert list(train.classes) == ["cat", "dog"]  # no class that nothing trains
    assert list(test.classes) == list(val.classes) == ["cat", "dog", "ant"]
    assert [test.classes[label] for label in test.labels()] == ["ant", "dog"]
    assert len(folder(tmp_path)) == 5


def test_a_class_called_train_is_a_class_where_there_are_others(tmp_path: Path) -> None:
    dataset = folder(fill(tmp_path, "train/1.png", "bus/2.png"))
    assert list(dataset.classes) == ["bus", "train"]


def test_the_hash_split_is_a_partition_that_ignores_what_else_is_there(tmp_path: Path) -> None:
    names = [f"{kind}/{i:03d}.png" for kind in ("cat", "dog") for i in range(100)]
    fill(tmp_path, *names)
    train, test = (set(folder(tmp_path, split).item_ids) for split in ("train", "test"))
    assert train | test == set(names)
    assert not train & test
    assert 20 <= len(test) <= 60  # 0.2 of 200, give or take three and a half standard deviations
    for name in sorted(test)[:20] + sorted(train)[:20]:
        (tmp_path / name).unlink()
    assert set(folder(tmp_path, "test").item_ids) == set(sorted(test)[20:])
    assert list(folder(tmp_path, "train").classes) == list(folder(tmp_path, "test").classes) == ["cat", "dog"]


def test_a_larger_test_fraction_keeps_what_was_in_the_smaller(tmp_path: Path) -> None:
    fill(tmp_path, *[f"cat/{i}.png" for i in range(60)])
    small, large = (set(folder(tmp_path, "test", test_fraction=f).item_ids) for f in (0.2, 0.5))
    assert small < large
    assert len(folder(tmp_path, "test", test_fraction=1)) == 60


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    dataset = folder(fill(tmp_path, "a.png", "holiday/b.png"), layout="flat")
    assert list(dataset.item_ids) == ["a.png", "holiday/b.png"]
    assert not dataset.classes
    assert set(dataset[0]) == {"image", "item_id"}


def test_images_outside_of_class_folders_are_named_with_the_way_out(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png", "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies in no class folder.*layout='flat'"):
        folder(tmp_path)


def test_folders_without_images_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no images below .*Looked for files ending in \.jpg"):
        folder(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file"):
        folder(tmp_path / "cat" / "a.txt")


def test_an_unknown_split_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/1.png", "val/cat/2.png")
    with pytest.raises(UnknownNameError, match=r"no split 'vall'; it has train, val\. Did you mean 'val'\?"):
        folder(tmp_path, "vall")
    with pytest.raises(DataError, match=r"the split 'test' of .* is empty"):
        folder(tmp_path, "test", layout="classes", test_fraction=0)


def test_an_unreadable_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    fill(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "b.png").write_bytes(b"no image")
    dataset = folder(tmp_path)
    assert dataset[0]["item_id"] == "cat/a.png"
    with pytest.raises(DataError, match=r"cat/b\.png"):
        dataset[1]
    with pytest.raises(DataError, match="max_pixels=19"):
        folder(tmp_path, max_pixels=19)[0]


# ------------------------------------------------------------------------------------------------- IDX


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.mark.parametrize("shape", [(7,), (3, 2), (4, 3, 2), (0, 28, 28)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_files_are_read_with_and_without_gzip(shape: tuple[int, ...], pack: object, tmp_path: Path) -> None:
    array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    (tmp_path / "values").write_bytes(pack(idx(array)))  # type: ignore[operator]
    assert np.array_equal(read_idx(tmp_path / "values"), array)


ARRAY = np.zeros((3, 4, 5), np.uint8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with nothing"),
        (b"\x89PNG\r\n", "no IDX file: it begins with 89 50 4e 47"),
        (idx(ARRAY, kind=0x0D), "type 0x0d"),
        (idx(ARRAY[0]), "has 2 dimensions, expected 3"),
        (idx(ARRAY)[:9], "ends inside its header: 9 bytes, expected 16"),
        (idx(ARRAY)[:-7], "claims 3 x 4 x 5 = 60 values and holds 53"),
        (idx(ARRAY) + b"\0", "60 values and holds more"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12, "the limit is 2,147,483,648"),
        (gzip.compress(idx(ARRAY), mtime=0)[:-12], "truncated or damaged"),
        (gzip.compress(idx(ARRAY), mtime=0)[:20] + b"\0" * 30, "truncated or damaged"),
    ],
)
def test_damaged_idx_files_are_named_with_what_was_found(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------- Fashion-MNIST


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, count in (("train", 60), ("t10k", 30)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = labels
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def clothes(root: Path, split: str | None = None) -> FashionMnist:
    return FashionMnist.build(FashionMnistConfig(root=root), split)


def test_fashion_mnist_has_its_two_parts(fashion: Path) -> None:
    train, test = clothes(fashion, "train"), clothes(fashion, "test")
    assert (len(train), len(test)) == (60, 30)
    assert list(train.classes) == list(CLASSES)
    assert train.item_ids[7] == "train/00007"
    assert test.item_ids[29] == "test/00029"
    item = train[7]
    assert (item["image"].mode, item["image"].size, item["label"]) == ("RGB", (28, 28), 7)
    assert set(item) == set(RECORDS["core:fashion-mnist"].provides)


def test_open_set_splits_hold_half_of_the_classes_and_keep_ids(fashion: Path) -> None:
    seen, unseen = clothes(fashion, "seen-train"), clothes(fashion, "unseen-test")
    assert list(seen.classes) == list(CLASSES[:5])
    assert list(unseen.classes) == list(CLASSES[5:])
    whole = clothes(fashion, "test")
    for index in range(len(unseen)):
        item = unseen[index]
        twin = whole[list(whole.item_ids).index(item["item_id"])]
        assert unseen.classes[item["label"]] == whole.classes[twin["label"]]
        assert np.array_equal(np.asarray(item["image"]), np.asarray(twin["image"]))
    assert {seen.classes[label] for label in seen.labels()} == set(CLASSES[:5])


def test_every_split_of_the_record_exists(fashion: Path) -> None:
    for split in RECORDS["core:fashion-mnist"].splits:
        assert len(clothes(fashion, split)) > 0
    with pytest.raises(UnknownNameError, match=r"Did you mean 'unseen-test'\?"):
        clothes(fashion, "unseen-tests")


def test_where_it_is_missing_the_ways_to_get_it_are_named(tmp_path: Path, fashion: Path) -> None:
    for root in (tmp_path / "none", fashion.parent):
        with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist.*root=FOLDER.*download=true"):
            clothes(root)
    (fashion / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        clothes(fashion, "test")


def test_labels_of_another_file_are_refused(fashion: Path) -> None:
    (fashion / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(59, np.uint8)))
    with pytest.raises(DataError, match="60 train images and 59 labels"):
        clothes(fashion)
    (fashion / "train-labels-idx1-ubyte").write_bytes(idx(np.full(60, 46, np.uint8)))
    with pytest.raises(DataError, match="labels go up to 46"):
        clothes(fashion)


def test_a_failed_download_says_so_and_names_the_other_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    # Stand-ins, because importing torchvision takes longer than all other tests of this file.
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    datasets = types.ModuleType("torchvision.datasets")
    datasets.FashionMNIST = offline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    with pytest.raises(DataError, match=r"could not download it into .*no network.*apt-get install"):
        FashionMnist.build(FashionMnistConfig(root=tmp_path / "new", download=True), "test")


def test_download_is_not_tried_where_the_files_are(fashion: Path) -> None:
    assert len(FashionMnist.build(FashionMnistConfig(root=fashion, download=True), "test")) == 30


# ------------------------------------------------------------------------------------------------- digits


def test_digits_are_1797_in_two_parts() -> None:
    pytest.importorskip("sklearn")
    from bowerbird.data.digits import Digits

    everything, train, test = (Digits.build(None, split) for split in ("all", "train", "test"))
    assert (len(everything), len(train), len(test)) == (1797, 1438, 359)
    assert set(train.item_ids).isdisjoint(test.item_ids)
    assert set(train.item_ids) | set(test.item_ids) == set(everything.item_ids)
    assert set(test.labels()) == set(range(10))
    item = test[0]
    assert (item["image"].mode, item["image"].size, item["item_id"]) == ("RGB", (8, 8), "0004")
    assert np.asarray(everything[0]["image"]).max() > 200  # 16 levels became 256
    assert everything.item_ids[1796] == "1796"
    with pytest.raises(UnknownNameError, match="Did you mean 'train'"):
        Digits.build(None, "trian")


# ------------------------------------------------------------------------------------------------- views


def test_a_subset_shows_the_chosen_items_in_the_chosen_order(fashion: Path) -> None:
    whole = clothes(fashion, "test")
    part = subset(whole, [5, 2, 2])
    assert list(part.item_ids) == ["test/00005", "test/00002", "test/00002"]
    assert list(part.labels()) == [part[i]["label"] for i in range(3)] == [5, 2, 2]
    assert part.classes == whole.classes
    for wrong in ([30], [-1]):
        with pytest.raises(InputError, match="does not exist"):
            subset(whole, wrong)


def test_the_images_of_a_data_set_can_be_decoded_in_batches(fashion: Path) -> None:
    whole, preprocessing = clothes(fashion, "test"), Preprocessing(size=28)
    batches = list(decode_batches(images_of(whole), preprocessing, batch_size=16, workers=2))
    together = np.concatenate([images for _, images in batches])
    assert together.shape == (30, 3, 28, 28)
    assert np.array_equal(together[17], preprocessing(whole[17]["image"]))
    assert len(images_of(whole)[3:5]) == 2
