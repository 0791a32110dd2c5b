"""Data sets with domains: folders, looks, and any other set with domains left out of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.errors import BowerbirdError, DataError, InputError, RecipeError, UnknownNameError
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird.testing import DatasetContract
from bowerbird_domain.configs import LOOKS

PACS = ("photo", "sketch", "cartoon")


def dataset(name: str, split: str | None = None, **settings: Any) -> Dataset:
    record = get_registry().get("dataset", name)
    return get_registry().load(record).build(build_config(record, settings, where="test"), split)


def write(root: Path, item: str, level: int = 0) -> None:
    file = root / item
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, 255 - level, 0)).save(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pacs")
    for d, domain in enumerate(PACS):
        for c, name in enumerate(("dog", "house")):
            for i in range(10):
                write(root, f"{domain}/{name}/{i}.png", 20 * d + 5 * c + i)
    return root


def names(items: Dataset) -> set[str]:
    return {items.domains[i] for i in items.domain_indices()}


# ------------------------------------------------------------------------------------------------ folders


class TestFoldersContract(DatasetContract):
    name = "domain:folders"
    disjoint: ClassVar[Any] = [("train", "validation"), ("train", "test"), ("validation", "test")]

    @pytest.fixture(autouse=True)
    def _root(self, folder: Path) -> None:
        type(self).config = {"root": str(folder), "unseen": ["sketch"]}


def test_folders_are_domains_and_classes(folder: Path) -> None:
    items = dataset("domain:folders", root=str(folder))
    assert tuple(items.domains) == tuple(sorted(PACS)) and tuple(items.classes) == ("dog", "house")
    assert len(items) == 60
    item = items[items.item_ids.index("photo/house/3.png")]
    assert (items.domains[item["domain"]], items.classes[item["label"]]) == ("photo", "house")
    assert items.metadata()[0] == {"domain": "cartoon", "label": "dog"}


@pytest.mark.parametrize("unseen", [*([name] for name in PACS), ["photo", "sketch"]])
def test_what_is_unseen_is_the_test_split_and_nothing_else(folder: Path, unseen: list[str]) -> None:
    parts = {
        split: dataset("domain:folders", split, root=str(folder), unseen=unseen)
        for split in ("train", "validation", "test")
    }
    assert names(parts["test"]) == set(unseen) and len(parts["test"]) == 20 * len(unseen)
    assert names(parts["train"]) == set(PACS) - set(unseen)
    seen = sorted([*parts["train"].item_ids, *parts["validation"].item_ids])
    whole = dataset("domain:folders", root=str(folder))
    assert seen == sorted(item for item in whole.item_ids if item.split("/")[0] not in unseen)
    assert all(len(part.classes) == 2 for part in parts.values())


def test_an_item_stays_on_its_side_when_others_come(folder: Path, tmp_path: Path) -> None:
    settings = {"unseen": ["sketch"], "validation_fraction": 0.3}
    for item in dataset("domain:folders", root=str(folder)).item_ids:
        write(tmp_path, item)
    before = dataset("domain:folders", "validation", root=str(tmp_path), **settings).item_ids
    for i in range(10, 20):
        write(tmp_path, f"photo/dog/{i}.png")
    assert set(before) <= set(dataset("domain:folders", "validation", root=str(tmp_path), **settings).item_ids)


def test_a_domain_with_one_image_is_refused_by_name(tmp_path: Path) -> None:
    for item in ("photo/dog/1.png", "photo/dog/2.png", "sketch/dog/1.png"):
        write(tmp_path, item)
    with pytest.raises(DataError, match=r"'sketch' in .* has one image; a domain needs at least 2"):
        dataset("domain:folders", root=str(tmp_path))


def test_domains_with_different_classes_are_refused_or_cut_to_the_common_ones(tmp_path: Path) -> None:
    for item in ("a/dog/1.png", "a/dog/2.png", "a/cat/1.png", "b/dog/1.png", "b/dog/2.png", "b/elk/3.png"):
        write(tmp_path, item)
    with pytest.raises(DataError, match=r"'a' lacks elk; 'b' lacks cat.*classes = \"common\""):
        dataset("domain:folders", root=str(tmp_path))
    items = dataset("domain:folders", root=str(tmp_path), classes="common")
    assert tuple(items.classes) == ("dog",) and len(items) == 4 and set(items.labels()) == {0}
    with pytest.raises(RecipeError, match="classes"):
        dataset("domain:folders", root=str(tmp_path), classes="shared")


@pytest.mark.parametrize(
    "files, settings, message",
    [
        ([], {}, "no images"),
        (["a/1.png", "b/dog/1.png"], {}, r"a/1.png lies in no class folder.*DOMAIN/CLASS/FILE"),
        (["a/dog/1.png", "a/dog/2.png"], {}, r"one domain, a; at least two.*core:image-folder"),
        (["a/x/1.png", "a/x/2.png", "b/y/1.png", "b/y/2.png"], {"classes": "common"}, "no class is in every domain"),
    ],
)
def test_folders_that_are_no_domains_are_refused(
    tmp_path: Path, files: list[str], settings: dict[str, Any], message: str
) -> None:
    for file in files:
        write(tmp_path, file)
    with pytest.raises(DataError, match=message):
        dataset("domain:folders", root=str(tmp_path), **settings)


@pytest.mark.parametrize(
    "split, unseen, message",
    [
        ("test", [], "the split 'test' holds the domains in unseen, which is empty"),
        ("train", list(PACS), "leaves no domain"),
        ("train", ["skitch"], r"no domain 'skitch'.*Did you mean 'sketch'"),
        ("trian", ["sketch"], r"no split 'trian'.*Did you mean 'train'"),
    ],
)
def test_what_cannot_be_left_out_is_refused(folder: Path, split: str, unseen: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataset("domain:folders", split, root=str(folder), unseen=unseen)


# ------------------------------------------------------------------------------------------------ looks


class TestLooksContract(DatasetContract):
    name = "domain:looks"
    disjoint: ClassVar[Any] = [("train", "validation"), ("train", "test"), ("validation", "test")]


def test_every_item_is_there_in_every_look_of_its_split() -> None:
    train, test = dataset("domain:looks", "train"), dataset("domain:looks", "test")
    source = dataset("core:digits", "train")
    assert names(train) == {"plain", "tint", "blur"} and names(test) == set(LOOKS) - names(train)
    assert len(train) == 3 * len(source) and list(train.labels()) == 3 * list(source.labels())
    assert names(dataset("domain:looks")) == set(LOOKS)
    assert not {i.split("/")[1] for i in train.item_ids} & {i.split("/")[1] for i in test.item_ids}


def test_a_look_changes_the_picture_and_nothing_else() -> None:
    whole = dataset("domain:looks", "all", size=16)
    count = len(whole) // len(LOOKS)
    pictures = {look: np.asarray(whole[i * count + 7]["image"]) for i, look in enumerate(LOOKS)}
    source = dataset("core:digits")[7]["image"].resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(pictures["plain"], np.asarray(source))
    assert len({picture.tobytes() for picture in pictures.values()}) == len(LOOKS)
    spread = {look: picture.astype(float).std() for look, picture in pictures.items()}
    assert spread["low-contrast"] < 0.5 * spread["plain"]
    assert pictures["bright-background"].mean() > pictures["plain"].mean() + 30
    edges = {look: np.abs(np.diff(picture.astype(float), axis=0)).mean() for look, picture in pictures.items()}
    assert edges["blur"] < edges["plain"] < edges["noise"]


def test_the_seed_sets_colours_and_noise() -> None:
    first, other = (dataset("domain:looks", "test", seed=seed)[-1 + 3 * 359]["image"] for seed in (0, 1))
    assert first.tobytes() != other.tobytes()


def test_looks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(RecipeError, match="unseen"):
        dataset("domain:looks", unseen=["foggy"])
    with pytest.raises(RecipeError, match="each look once"):
        dataset("domain:looks", looks=["plain", "plain"])
    with pytest.raises(UnknownNameError, match=r"no domain 'noise'; there are plain, tint"):
        dataset("domain:looks", "test", looks=["plain", "tint"], unseen=["noise"])
    with pytest.raises(BowerbirdError, match="core:digit"):
        dataset("domain:looks", source="core:digit")


# ------------------------------------------------------------------------------------------------ any data set


class TestLeftOutContract(DatasetContract):
    name = "domain:left-out"
    config: ClassVar[Any] = {"source": "domain:looks?size=8", "source_split": "validation", "unseen": ["blur"]}
    disjoint: ClassVar[Any] = [("train", "validation"), ("train", "test"), ("validation", "test")]


def test_any_set_with_domains_can_be_divided_and_relabelled() -> None:
    settings = {"source": "domain:looks?size=8", "source_split": "validation", "unseen": ["blur"]}
    test = dataset("domain:left-out", "test", **settings)
    assert names(test) == {"blur"} and names(dataset("domain:left-out", "train", **settings)) == {"plain", "tint"}
    by_look = dataset("domain:left-out", "train", label="domain", **settings)
    assert tuple(by_look.classes) == ("blur", "plain", "tint")
    assert {by_look.classes[label] for label in by_look.labels()} == {"plain", "tint"}
    assert by_look[0]["label"] == by_look.labels()[0]


def test_a_set_without_domains_or_without_the_key_is_refused() -> None:
    with pytest.raises(InputError, match="core:digits have no domain"):
        dataset("domain:left-out", source="core:digits")
    with pytest.raises(UnknownNameError, match=r"'lable'.*metadata have domain, label.*Did you mean 'label'"):
        dataset("domain:left-out", source="domain:looks?size=8", label="lable")
