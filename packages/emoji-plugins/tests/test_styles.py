"""What ``emoji:styles`` promises: the concepts, the splits, the ids."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from pydantic import ValidationError

from bowerbird.errors import InputError, UnknownNameError
from bowerbird_emoji.config import STYLES, EmojiStylesConfig
from bowerbird_emoji.plugin import bowerbird_datasets
from bowerbird_emoji.sheets import concepts
from bowerbird_emoji.styles import EmojiStyles

(RECORD,) = bowerbird_datasets()


def build(split: str | None = None, **settings: object) -> EmojiStyles:
    return EmojiStyles.build(EmojiStylesConfig(**settings), split)


def names(dataset: EmojiStyles) -> set[str]:
    return {item.split("/")[1] for item in dataset.item_ids}


def digest(ids: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def test_there_are_896_concepts_in_eight_categories() -> None:
    assert len({c.name for c in concepts()}) == 896
    assert Counter(c.category for c in concepts()) == {
        "travel": 179, "objects": 176, "symbols": 174, "smileys": 97,
        "animals": 88, "people": 70, "food": 63, "activities": 49,
    }  # fmt: skip


def test_ids_never_change() -> None:
    ids = build("all").item_ids
    assert len(set(ids)) == 896 * 5
    assert (
        hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
        == "dd553473083669ec50beab77c6c3d766bb991598b1767d7d99d1e1d0317ae340"
    )


@pytest.mark.parametrize(
    ("split", "items", "classes", "expected"),
    [
        ("all", 4480, 896, "dd553473083669ec"),
        ("seen", 2240, 448, "e0dfbf3f7a758d8b"),
        ("unseen", 2240, 448, "c97690580fb71039"),
        ("old-train", 300, 100, "269b76c525e41d33"),
        ("new-train", 2240, 448, "e0dfbf3f7a758d8b"),
        ("tune-train", 1680, 336, "a574bd5e89639e5b"),
        ("validation", 560, 112, "c42745b50457bf5a"),
        ("validation-query", 112, 112, "7cdb075386a2ad1d"),
        ("validation-gallery", 448, 112, "c5ca9fb4f3f1d40e"),
        ("unseen-query", 448, 448, "0d77901f87680c4a"),
        ("unseen-gallery", 1792, 448, "d14d6004bc4ece50"),
    ],
)
def test_a_split_has_the_same_items_for_ever(split: str, items: int, classes: int, expected: str) -> None:
    dataset = build(split)
    assert (len(dataset), len(dataset.classes)) == (items, classes)
    assert digest(dataset.item_ids) == expected


def test_the_record_names_exactly_the_splits_that_exist() -> None:
    for split in RECORD.splits:
        build(split)
    with pytest.raises(UnknownNameError, match="Did you mean 'unseen-query'"):
        build("unseen-queries")


def test_no_concept_is_both_seen_and_unseen_and_each_is_one_of_them() -> None:
    seen, unseen = names(build("seen")), names(build("unseen"))
    assert not seen & unseen
    assert seen | unseen == {c.name for c in concepts()}


def test_training_splits_hold_seen_concepts_only_and_validation_is_apart_from_what_tunes() -> None:
    seen = names(build("seen"))
    assert names(build("new-train")) == seen
    tune, validation = names(build("tune-train")), names(build("validation"))
    assert names(build("old-train")) <= tune
    assert not tune & validation
    assert tune | validation == seen


def test_seen_and_unseen_have_each_category_in_equal_parts() -> None:
    seen = Counter(c.category for c in concepts() if c.part == "seen")
    unseen = Counter(c.category for c in concepts() if c.part == "unseen")
    assert all(abs(seen[category] - unseen[category]) <= 2 for category in seen | unseen)


def test_two_names_of_one_picture_are_in_no_number_that_is_reported() -> None:
    twins = {"up-button", "upwards-button", "black-medium-square", "white-square-button"}
    for split in ("unseen", "validation", "old-train"):
        assert not names(build(split)) & twins


@pytest.mark.parametrize("part", ["unseen", "validation"])
def test_a_query_split_and_its_gallery_split_share_labels_but_no_item(part: str) -> None:
    queries, gallery = build(f"{part}-query"), build(f"{part}-gallery")
    assert queries.classes == gallery.classes
    assert not set(queries.item_ids) & set(gallery.item_ids)
    assert set(queries.item_ids) | set(gallery.item_ids) == set(build(part).item_ids)
    assert Counter(gallery.labels()) == dict.fromkeys(range(len(gallery.classes)), 4)


def test_the_query_style_can_be_chosen() -> None:
    assert {i.split("/")[0] for i in build("unseen-query", query_style="noto").item_ids} == {"noto"}
    gallery = build("unseen-gallery", query_style="noto", styles=("noto", "twemoji", "noto-v1"))
    assert list(dict.fromkeys(i.split("/")[0] for i in gallery.item_ids)) == ["twemoji", "noto-v1"]


def test_a_gallery_without_a_style_is_refused() -> None:
    with pytest.raises(InputError, match="leaves out query_style='noto'"):
        build("unseen-gallery", query_style="noto", styles=("noto",))


@pytest.mark.parametrize(
    "settings", [{"styles": ("apple",)}, {"styles": ()}, {"styles": ("noto", "noto")}, {"size": 4}, {"colour": 1}]
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EmojiStylesConfig(**settings)


def test_an_item_says_the_same_as_the_lists() -> None:
    dataset = build("unseen", styles=("twemoji", "noto"))
    labels, ids = dataset.labels(), dataset.item_ids
    assert len(labels) == len(ids) == len(dataset)
    for index in (0, 1, 447, 448, 895, -1):
        item = dataset[index]
        style, name = item["item_id"].split("/")
        assert item["item_id"] == ids[index]
        assert item["label"] == labels[index]
        assert dataset.classes[item["label"]] == name
        assert dataset.domains[item["domain"]] == style
        assert set(item) == set(RECORD.provides)
        assert dataset.metadata()[index]["style"] == style


def test_an_id_shows_the_same_picture_in_every_split() -> None:
    everything = build("all")
    for split in ("old-train", "unseen-gallery"):
        dataset = build(split)
        for index in (0, len(dataset) // 2, len(dataset) - 1):
            twin = everything[list(everything.item_ids).index(dataset.item_ids[index])]
            assert np.array_equal(np.asarray(dataset[index]["image"]), np.asarray(twin["image"]))


@pytest.mark.parametrize("size", [24, 64, 96])
def test_images_are_rgb_of_the_size_asked(size: int) -> None:
    image = build("unseen-query", size=size)[3]["image"]
    assert (image.mode, image.size) == ("RGB", (size, size))


def test_a_position_that_does_not_exist_raises_index_error() -> None:
    dataset = build("unseen-query")
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_domains_are_the_same_five_in_every_split() -> None:
    assert tuple(build("old-train").domains) == tuple(build("unseen-query").domains) == STYLES
