"""Transforms that a gallery keeps, and how their direction is checked."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import CorruptionError, GalleryError, InputError, SnapshotGoneError, SpaceError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.transform import VectorTransform, check_direction

A = Space("a" * 16, "tests:a", 8)
B = Space("b" * 16, "tests:b", 8)
C = Space("c" * 16, "tests:c", 12)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def rotation(seed, width=8):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def pairs(seed, noise=0.1, count=60):
    """``(source, target, W)`` with target = W source + noise."""
    rng = np.random.default_rng(seed)
    weight = rotation(seed)
    source = unit(rng.normal(size=(count, 8)))
    return source, unit(source @ weight.T + noise * rng.normal(size=(count, 8)) / 8**0.5), weight


@pytest.fixture
def gallery(tmp_path):
    with Gallery.create(tmp_path / "g", A) as opened:
        opened.register_space(B)
        yield opened


def test_a_registered_transform_is_there_for_every_process_and_in_one_direction(gallery):
    _, _, weight = pairs(0)
    made = VectorTransform.linear(B.fingerprint, A.fingerprint, weight, method="test", evidence={"r1": 0.5})
    gallery.register_transform(made, accept_unmeasured=True)
    with Gallery.open(gallery.path, readonly=True) as other:
        found = other.transform(B.fingerprint, A.fingerprint)
        assert found is not None and found.fingerprint == made.fingerprint
        assert other.transform(A.fingerprint, B.fingerprint) is None
        assert [t.fingerprint for t in other.transforms()] == [made.fingerprint]
        relation = other.relations()[0]
        assert (relation.kind, relation.new, relation.old) == ("transform", B.fingerprint, A.fingerprint)
        assert relation.evidence["r1"] == 0.5
        with pytest.raises(GalleryError, match="readonly"):
            other.register_transform(made, accept_unmeasured=True)


def test_registering_again_replaces_the_transform(gallery):
    for seed in (1, 2):
        made = VectorTransform.linear(B.fingerprint, A.fingerprint, rotation(seed))
        gallery.register_transform(made, accept_unmeasured=True)
        assert gallery.transform(B.fingerprint, A.fingerprint).fingerprint == made.fingerprint
    assert len(gallery.transforms()) == 1


def test_a_replaced_transform_is_removed_once_it_is_old_and_its_last_reader_looks_again(gallery):
    first, second = (VectorTransform.linear(B.fingerprint, A.fingerprint, rotation(seed)) for seed in (1, 2))
    gallery.add([f"i{n}" for n in range(4)], np.eye(8, dtype=np.float32)[:4])
    gallery.register_transform(first, accept_unmeasured=True)
    with Gallery.open(gallery.path) as reader:
        earlier = reader.snapshot()
        gallery.register_transform(second, accept_unmeasured=True)
        file = gallery.path / "transforms" / f"{first.fingerprint}.safetensors"
        gallery.compact()
        assert file.exists(), "somebody may be about to register it"
        os.utime(file, (0, 0))
        os.utime(file.with_stem(second.fingerprint), (0, 0))
        gallery.compact()
        assert [file.stem for file in file.parent.iterdir()] == [second.fingerprint]
        query = np.eye(8, dtype=np.float32)[:1]
        with pytest.raises(SnapshotGoneError, match="was replaced"):
            reader.search({B.fingerprint: query}, 2, snapshot=earlier)
        expected = gallery.search({A.fingerprint: second(query)}, 2).ids
        assert reader.search({B.fingerprint: query}, 2).ids == expected


def test_a_transform_of_an_unknown_space_or_of_another_width_is_refused(gallery):
    with pytest.raises(SpaceError, match="does not know"):
        gallery.register_transform(VectorTransform.linear(C.fingerprint, A.fingerprint, np.ones((8, 12))))
    gallery.register_space(C)
    with pytest.raises(SpaceError, match="other direction"):
        gallery.register_transform(VectorTransform.linear(A.fingerprint, C.fingerprint, np.ones((8, 12))))
    assert gallery.transforms() == [] and gallery.relations() == []


def test_a_transform_file_that_was_swapped_or_lost_is_found_out(gallery):
    made = VectorTransform.linear(B.fingerprint, A.fingerprint, rotation(3))
    gallery.register_transform(made, accept_unmeasured=True)
    file = gallery.path / "transforms" / f"{made.fingerprint}.safetensors"
    VectorTransform.linear(B.fingerprint, A.fingerprint, rotation(4)).save(file)
    with Gallery.open(gallery.path) as other, pytest.raises(CorruptionError, match="not the transform"):
        other.transform(B.fingerprint, A.fingerprint)
    file.unlink()
    with Gallery.open(gallery.path) as other, pytest.raises(CorruptionError, match="has lost its file"):
        other.transform(B.fingerprint, A.fingerprint)


@given(seed=st.integers(0, 10_000), noise=st.floats(0, 0.5))
@settings(max_examples=25, deadline=None)
def test_the_right_direction_passes_and_the_reverse_is_refused_with_both_cosines(seed, noise):
    source, target, weight = pairs(seed, noise)
    right = VectorTransform.linear("a", "b", weight)
    found = check_direction(right, source, target)
    assert found.forward > found.strangers + 0.3
    assert found.reverse is not None and found.reverse < found.forward
    turned = VectorTransform.linear("a", "b", weight.T)
    with pytest.raises(SpaceError, match=r"reverse direction: mean cosine -?\d\.\d+ .* and \d\.\d+ the other way"):
        check_direction(turned, source, target)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_map_that_knows_nothing_of_the_pairs_is_refused(seed):
    source, _, _ = pairs(seed)
    stranger = VectorTransform.linear("a", "b", np.random.default_rng(seed + 1).normal(size=(8, 8)))
    with pytest.raises(SpaceError, match="cosine"):
        check_direction(stranger, source, -stranger(source))


def test_a_collapsed_map_is_refused_although_its_cosines_are_high():
    rng = np.random.default_rng(0)
    source = unit(rng.normal(size=(64, 8)) + 4)
    target = unit(rng.normal(size=(64, 8)) + 4)
    collapsed = VectorTransform.linear("a", "b", np.zeros((8, 8)), np.ones(8))
    with pytest.raises(SpaceError, match=r"does not fit: mean cosine 0\.9"):
        check_direction(collapsed, source, target)


def test_too_few_pairs_and_pairs_of_other_widths_are_refused(gallery):
    source, target, weight = pairs(5)
    made = VectorTransform.linear("a", "b", weight)
    with pytest.raises(InputError, match="at least 16"):
        check_direction(made, source[:15], target[:15])
    with pytest.raises(InputError, match="do not pair"):
        check_direction(made, source, target[:-1])
    wide = VectorTransform.linear("a", "c", np.ones((12, 8)))
    with pytest.raises(SpaceError, match="other direction"):
        check_direction(wide, np.ones((20, 12)), np.ones((20, 8)))
    turned = VectorTransform.linear(B.fingerprint, A.fingerprint, weight.T)
    with pytest.raises(SpaceError, match="reverse"):
        gallery.register_transform(turned, pairs=(source, target))
    assert gallery.transforms() == []
