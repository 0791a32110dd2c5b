"""The merger ``core:zscore``: two models' distances on one scale, and what must not change by that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.merge import merge_by_distance, merge_by_zscore
from bowerbird.retrieval.index import Hits

seeds = st.integers(0, 2**32 - 1)


def parts(seed: int, queries: int = 4, width: int = 9, background: int = 50) -> tuple[Hits, Hits, tuple]:
    """Sorted hits of two disjoint parts, and background distances of each."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(100)[: 2 * width] for _ in range(queries)])
    near = np.sort(rng.random((2, queries, width)), axis=2)
    return Hits(ids[:, :width], near[0]), Hits(ids[:, width:], near[1]), tuple(rng.random((2, queries, background)))


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0.05, 5), st.floats(-0.9, 0.9))
def test_stretching_and_moving_one_models_distances_changes_no_order(seed: int, stretch: float, shift: float) -> None:
    old, new, (behind_old, behind_new) = parts(seed)
    plain = merge_by_zscore(old, new, 10, background=(behind_old, behind_new))
    other = Hits(new.ids, new.distances * stretch + shift)
    moved = merge_by_zscore(old, other, 10, background=(behind_old, behind_new * stretch + shift))
    assert (plain.ids == moved.ids).mean() > 0.99  # equal but for ties within a rounding


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_the_order_is_that_of_the_standardised_distances_and_the_distances_stay(seed: int) -> None:
    old, new, background = parts(seed)
    merged = merge_by_zscore(old, new, 18, background=background)
    for q in range(4):
        rows = []
        for hits, behind in zip((old, new), background, strict=True):
            mean, std = behind[q].mean(), behind[q].std()
            rows += [((d - mean) / std, i, d) for i, d in zip(hits.ids[q], hits.distances[q], strict=True)]
        rows.sort()
        assert merged.ids[q].tolist() == [i for _, i, _ in rows]
        np.testing.assert_allclose(merged.distances[q], [d for _, _, d in rows])


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_a_side_is_never_reordered(seed: int) -> None:
    old, new, background = parts(seed)
    merged = merge_by_zscore(old, new, 18, background=background)
    for q in range(4):
        for hits in (old, new):
            mine = [i for i in merged.ids[q].tolist() if i in set(hits.ids[q].tolist())]
            assert mine == hits.ids[q].tolist()


def test_without_a_background_or_with_a_small_one_plain_distances_are_merged() -> None:
    old, new, (behind_old, behind_new) = parts(0)
    expected = merge_by_distance(old, new, 7)
    for background in (None, (behind_old, behind_new[:, :31]), (behind_old[:, :1], behind_new)):
        found = merge_by_zscore(old, new, 7, background=background)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.distances, expected.distances)


def test_a_background_of_one_distance_is_one_also_where_it_was_rounded() -> None:
    """Copies of one item: float32 products differ in the last bit, and float64 means of equal numbers do."""
    distances = np.array([[0.1, 0.2, 0.3]])
    for equal in (np.full((1, 1000), 0.9), 0.9 + 6e-8 * (np.arange(1000)[None] % 2)):
        np.testing.assert_allclose(merge_by_zscore.rescale(distances, equal), distances - 0.9, atol=1e-6)


def test_padding_stays_at_the_end() -> None:
    old = Hits(np.array([[3, -1]]), np.array([[0.2, np.inf]]))
    new = Hits(np.array([[-1, -1]]), np.array([[np.inf, np.inf]]))
    background = (np.linspace(0, 1, 40)[None], np.linspace(0, 1, 40)[None])
    merged = merge_by_zscore(old, new, 3, background=background)
    assert merged.ids.tolist() == [[3, -1, -1]]
    assert merged.distances.tolist() == [[0.2, np.inf, np.inf]]


@pytest.fixture
def halfway(tmp_path: Path):
    """Gallery of 400 items, half of them moved to a model whose distances are all twice as large, and its queries.

    Both models see the same: the new vectors differ from the old ones in scale of distance only.
    """
    rng = np.random.default_rng(3)
    content, queries = rng.normal(size=(400, 16)), rng.normal(size=(60, 16))

    def encode(rows: np.ndarray, common: float) -> np.ndarray:
        # A common direction of all vectors shrinks every distance.
        return np.concatenate([rows, np.full((len(rows), 1), common)], axis=1)

    old, new = (Space(fingerprint=letter * 64, encoder=letter, dim=17) for letter in "ab")
    with Gallery.create(tmp_path / "g", old) as gallery:
        gallery.add([f"i{n}" for n in range(400)], encode(content, 12.0))
        gallery.store.begin_upgrade(
            new,
            strategy="test",
            order_name="core:random",
            order=rng.permutation(400),
            task_items=200,
            merger="core:zscore",
        )
        task = gallery.store.lease_task("me")
        assert task is not None
        positions = [int(item.id[1:]) for item in task.items]
        gallery.store.commit_task(task, task.nums, encode(content[positions], 0.5))
        yield gallery, {old.fingerprint: encode(queries, 12.0), new.fingerprint: encode(queries, 0.5)}


def test_a_gallery_serves_both_sides_alike_where_plain_distances_let_one_crowd_the_other_out(halfway) -> None:
    gallery, queries = halfway
    plain = gallery.search(queries, 20, merger=merge_by_distance)
    assert plain.sides.mean() < 0.05, "the old side has the smaller distances"
    scaled = gallery.search(queries, 20)  # by the merger that the upgrade was begun with
    assert 0.25 < scaled.sides.mean() < 0.75


def test_a_gallery_with_one_part_only_is_searched_as_ever(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = (Space(fingerprint=letter * 64, encoder=letter, dim=8) for letter in "ab")
    vectors, queries = rng.normal(size=(100, 8)), rng.normal(size=(3, 8))
    with Gallery.create(tmp_path / "g", old) as gallery:
        gallery.add([f"i{n}" for n in range(100)], vectors)
        before = gallery.search(queries, 10)
        gallery.store.begin_upgrade(
            new, strategy="test", order_name="core:random", order=np.arange(100), merger="core:zscore"
        )
        after = gallery.search({old.fingerprint: queries, new.fingerprint: queries}, 10)
    assert after.ids == before.ids
    np.testing.assert_array_equal(after.distances, before.distances)
