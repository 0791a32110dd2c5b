"""Every merger: both ends exact, no part reordered, any number of parts; and what ``core:proportional`` does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.merge import merge_by_distance, merge_in_proportion, merge_many
from bowerbird.registry import get_registry
from bowerbird.retrieval.index import Hits

seeds = st.integers(0, 2**32 - 1)
MERGERS = [record.name for record in get_registry().records(kind="retriever", role="merger")]


def load(name: str):
    return get_registry().load(get_registry().get("retriever", name, role="merger"))


def world(seed: int, sizes: tuple[int, ...], queries: int = 3):
    """Sorted hits of disjoint parts, background distances and counts of each."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(200)[: sum(sizes)] for _ in range(queries)])
    parts, background = [], []
    for start, size in zip(np.cumsum((0, *sizes[:-1])), sizes, strict=True):
        scale, shift = rng.uniform(0.2, 2), rng.uniform(0, 0.5)
        parts.append(Hits(ids[:, start : start + size], np.sort(rng.random((queries, size)) * scale + shift, axis=1)))
        background.append(rng.random((queries, 60)) * scale + shift)
    return parts, background, list(sizes)


@pytest.mark.parametrize("name", MERGERS)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, old=st.integers(0, 9), new=st.integers(0, 9), far=st.integers(0, 9))
def test_no_part_is_reordered_and_nothing_is_lost_or_doubled(name, seed, old, new, far) -> None:
    parts, background, counts = world(seed, (far, old, new))
    merged = merge_many(load(name), parts, 30, background=background, counts=counts)
    for query in range(3):
        found = merged.ids[query][merged.ids[query] >= 0].tolist()
        assert sorted(found) == sorted(i for part in parts for i in part.ids[query].tolist())
        for part in parts:
            mine = set(part.ids[query].tolist())
            assert [i for i in found if i in mine] == part.ids[query].tolist()


@pytest.mark.parametrize("name", MERGERS)
@settings(max_examples=10, deadline=None)
@given(seed=seeds, size=st.integers(1, 12), k=st.integers(1, 15))
def test_one_part_alone_stays_as_it_is_whichever_it_is(name, seed, size, k) -> None:
    (part,), (sample,), (count,) = world(seed, (size,))
    nothing = Hits(np.full((3, k), -1, np.int64), np.full((3, k), np.inf))
    for position in (0, 1):
        parts, background, counts = [part, nothing], [sample, sample], [count, 0]
        order = slice(None, None, -1 if position else 1)
        merged = merge_many(load(name), parts[order], k, background=background, counts=counts[order])
        expected = merge_by_distance(part, nothing, k)
        np.testing.assert_array_equal(merged.ids, expected.ids)
        np.testing.assert_array_equal(merged.distances, expected.distances)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, old=st.integers(1, 30), new=st.integers(1, 30))
def test_in_proportion_every_first_m_hold_as_many_of_a_part_as_its_share(seed, old, new) -> None:
    parts, _, counts = world(seed, (old, new))
    merged = merge_many(merge_in_proportion, parts, old + new, counts=counts)
    for query in range(3):
        is_new = np.isin(merged.ids[query], parts[1].ids[query])
        for m in range(1, old + new + 1):
            assert abs(is_new[:m].sum() - m * new / (old + new)) <= 1


def test_in_proportion_the_scale_of_a_models_distances_does_not_matter() -> None:
    parts, _, counts = world(5, (20, 10))
    crowding = Hits(parts[1].ids, parts[1].distances * 1e-6)
    plain = merge_many(merge_in_proportion, parts, 12, counts=counts)
    crowded = merge_many(merge_in_proportion, [parts[0], crowding], 12, counts=counts)
    np.testing.assert_array_equal(plain.ids, crowded.ids)
    assert set(merge_by_distance(parts[0], crowding, 10).ids[0]) == set(parts[1].ids[0])


def test_in_proportion_without_counts_distances_decide_and_counts_must_fit() -> None:
    parts, _, _ = world(1, (5, 4))
    np.testing.assert_array_equal(merge_in_proportion(*parts, 9).ids, merge_by_distance(*parts, 9).ids)
    with pytest.raises(InputError, match="2 parts need as many counts"):
        merge_in_proportion(*parts, 9, counts=(5, 4, 3))


def test_a_merger_of_two_that_must_be_told_something_refuses_three_parts() -> None:
    def picky(old, new, k, *, counts):
        return merge_by_distance(old, new, k)

    picky.needs_counts = True
    parts, _, counts = world(2, (4, 4, 4))
    assert merge_many(picky, parts[:2], 3, counts=counts[:2]).ids.shape == (3, 3)
    with pytest.raises(InputError, match="3 parts"):
        merge_many(picky, parts, 3, counts=counts)


def test_a_gallery_tells_the_merger_how_many_items_each_part_has_filters_included(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old, new = (Space(fingerprint=letter * 64, encoder=letter, dim=8) for letter in "ab")
    vectors, query = rng.normal(size=(100, 8)), rng.normal(size=(2, 8))
    with Gallery.create(tmp_path / "g", old) as gallery:
        gallery.add([f"i{n}" for n in range(100)], vectors, metadata=[{"few": n % 10 == 0} for n in range(100)])
        gallery.store.begin_upgrade(
            new, strategy="test", order_name="core:random", order=np.arange(100), task_items=20,
            merger="core:proportional",
        )  # fmt: skip
        task = gallery.store.lease_task("me")
        assert task is not None
        gallery.store.commit_task(task, task.nums, rng.normal(size=(20, 8)))
        queries = {old.fingerprint: query, new.fingerprint: query}
        assert (gallery.search(queries, 10).sides == 1).sum(axis=1).tolist() == [2, 2]
        assert (gallery.search(queries, 5, where={"few": True}).sides == 1).sum(axis=1).tolist() == [1, 1]
