"""Composite people: identities, siblings, cameras."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from bowerbird.errors import DataError, InputError
from bowerbird.testing import DatasetContract
from bowerbird.testing.datasets import SyntheticDataset
from bowerbird_mim.data.people import CompositePeople, PeopleConfig, dressed

SMALL = {"source": "core:digits", "train_identities": 8, "test_identities": 6, "cameras": 3}


class TestContract(DatasetContract):
    name = "mim:composite-people"
    config = SMALL
    disjoint = (("train", "query"), ("train", "gallery"), ("query", "gallery"))


def people(split: str, **settings: object) -> CompositePeople:
    return CompositePeople.build(PeopleConfig(**SMALL | settings), split)


def test_every_camera_sees_every_identity_and_the_first_shots_are_the_queries() -> None:
    query, gallery, train = people("query"), people("gallery", shots=3), people("train", shots=3)
    assert len(query) == 6 * 3 and len(gallery) == 6 * 3 * 2 and len(train) == 8 * 3 * 3
    assert set(query.shots) == {0} and set(gallery.shots) == {1, 2} and set(train.shots) == {0, 1, 2}
    for dataset in (query, gallery, train):
        pairs = set(zip(dataset.identities.tolist(), dataset.cameras.tolist(), strict=True))
        assert len(pairs) == len(dataset.classes) * 3
    assert gallery[0]["image"].size == (24, 48)


def test_siblings_differ_in_one_zone_in_turns_and_keep_its_class() -> None:
    labels = np.arange(200) % 5
    worn = dressed(np.random.default_rng(0), 40, 3, 3, labels)
    for first in range(0, 40, 4):
        for sibling in (1, 2, 3):
            differs = worn[first + sibling] != worn[first]
            assert differs.tolist() == [zone == sibling - 1 for zone in range(3)]
            assert (labels[worn[first + sibling]] == labels[worn[first]]).all()


def test_the_zones_of_a_picture_are_the_items_that_the_identity_wears() -> None:
    train = people("train", size=(26, 8))
    assert train.zone_labels.shape == (len(train), 3)
    assert train.zone_labels[-1].tolist() == [train.source[int(i)]["label"] for i in train.worn[7]]
    canvas = np.asarray(train.dressed_canvas(7))
    for item, top, bottom in zip(train.worn[7], (0, 9, 17), (9, 17, 26), strict=True):
        worn = train.source[int(item)]["image"].convert("L").resize((8, bottom - top), Image.Resampling.BILINEAR)
        assert np.array_equal(canvas[top:bottom], np.asarray(worn))


def test_pictures_of_one_identity_are_nearer_within_a_camera_than_between_cameras() -> None:
    train = people("train")
    grey = np.stack([np.asarray(train[i]["image"].convert("L"), float) for i in range(len(train))])
    levels = grey.mean(axis=(1, 2))  # brightness and contrast of a camera are fixed
    within = [np.ptp(levels[(train.identities == i) & (train.cameras == c)]) for i in range(8) for c in range(3)]
    between = [np.ptp(levels[train.identities == i]) for i in range(8)]
    assert max(within) < min(between)


def test_the_same_identity_from_the_querys_camera_is_ignored() -> None:
    query, gallery = people("query"), people("gallery")
    relevance = query.relevance(gallery)
    for i in range(len(query)):
        ignored = relevance.ignore[i]
        right = np.setdiff1d(relevance.positives[i], ignored)
        assert set(gallery.identities[right]) == {query.identities[i]} == set(gallery.identities[ignored])
        assert set(gallery.cameras[ignored]) == {query.cameras[i]}
        assert set(gallery.cameras[right]) == {0, 1, 2} - {query.cameras[i]}
    with pytest.raises(InputError, match="found SyntheticDataset"):
        query.relevance(SyntheticDataset())


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValidationError, match="3 zones need as many rows"):
        PeopleConfig(size=(2, 24))
    with pytest.raises(DataError, match="2 items; 3 zones"):
        dressed(np.random.default_rng(0), 4, 3, 1, np.zeros(2, np.int64))
