"""Distance rank merge: batched, exact, deduplicated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError, IntegrityError
from bowerbird.gallery.merge import merge_by_distance
from bowerbird.retrieval.index import Hits


def hits(ids: list, distances: list) -> Hits:
    return Hits(np.array(ids, np.int64), np.array(distances, np.float64))


def reference(old: Hits, new: Hits, k: int) -> list[tuple[int, float]]:
    """One query, by sorting pairs."""
    taken = {int(i) for i in new.ids if i >= 0}
    rows = [(float(d), 0, int(i)) for i, d in zip(new.ids, new.distances, strict=True) if i >= 0]
    rows += [
        (float(d), 1, int(i)) for i, d in zip(old.ids, old.distances, strict=True) if i >= 0 and int(i) not in taken
    ]
    return [(i, d) for d, _, i in sorted(rows)[:k]]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_batch_of_merges_equals_sorting_each_union(data: st.DataObject) -> None:
    queries, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    sides = []
    for _ in range(2):
        width = data.draw(st.integers(0, 6))
        ids = np.array([data.draw(st.permutations(range(12)))[:width] for _ in range(queries)], np.int64)
        distances = np.array(
            [[data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in range(width)] for _ in range(queries)]
        )
        ids, distances = ids.reshape(queries, width), distances.reshape(queries, width)
        padded = data.draw(st.integers(0, width))
        ids[:, width - padded :], distances[:, width - padded :] = -1, np.inf
        sides.append(Hits(ids, distances))
    merged = merge_by_distance(*sides, k)
    assert merged.ids.shape == (queries, k)
    for query in range(queries):
        expected = reference(sides[0][query], sides[1][query], k)
        expected += [(-1, np.inf)] * (k - len(expected))
        assert list(zip(merged.ids[query].tolist(), merged.distances[query].tolist(), strict=True)) == expected


def test_hits_may_be_given_as_lists_also_empty_ones() -> None:
    merged = merge_by_distance(Hits([1, 2], [0.1, 0.4]), Hits([], []), np.array(3))
    assert merged.ids.dtype == np.int64
    assert merged.ids.tolist() == [1, 2, -1] and merged.distances.tolist() == [0.1, 0.4, np.inf]


def test_a_single_query_gives_flat_hits() -> None:
    merged = merge_by_distance(hits([1, 2], [0.1, 0.4]), hits([3], [0.2]), 2)
    assert merged.ids.tolist() == [1, 3] and merged.distances.tolist() == [0.1, 0.2]


@pytest.mark.parametrize(
    ("tie", "expected"), [("new_first", [7, 9, 2, 5]), ("old_first", [2, 5, 7, 9]), ("lower_id", [2, 5, 7, 9])]
)
def test_equal_distances_follow_the_tie_rule_then_the_lower_id(tie: str, expected: list[int]) -> None:
    merged = merge_by_distance(hits([5, 2], [0.5, 0.5]), hits([9, 7], [0.5, 0.5]), 4, tie)
    assert merged.ids.tolist() == expected


def test_an_item_in_both_lists_keeps_its_new_copy_or_raises() -> None:
    old, new = hits([1, 2], [0.0, 0.3]), hits([1, 3], [0.9, 0.4])
    assert merge_by_distance(old, new, 3).ids.tolist() == [2, 3, 1]
    with pytest.raises(IntegrityError, match=r"\[1\]"):
        merge_by_distance(old, new, 3, duplicates="raise")


def test_merging_the_top_k_of_each_side_is_the_top_k_of_the_full_merge() -> None:
    rng = np.random.default_rng(0)
    old = hits(np.arange(40), np.sort(rng.random(40)))
    new = hits(np.arange(40, 70), np.sort(rng.random(30)))
    full = merge_by_distance(old, new, 70)
    for k in (1, 5, 30):
        top = merge_by_distance(old[:k], new[:k], k)
        assert top.ids.tolist() == full.ids[:k].tolist()


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_k_must_be_a_whole_number_of_at_least_one(k: object) -> None:
    with pytest.raises(InputError, match="k is"):
        merge_by_distance(hits([1], [0.1]), hits([2], [0.2]), k)  # type: ignore[arg-type]


def test_unfitting_arguments_are_refused() -> None:
    one, two = hits([1], [0.1]), hits([[1], [2]], [[0.1], [0.2]])
    with pytest.raises(InputError, match="different queries"):
        merge_by_distance(one, two, 1)
    with pytest.raises(InputError, match="NaN"):
        merge_by_distance(one, hits([1], [np.nan]), 1)
    with pytest.raises(InputError, match="accepted: new_first"):
        merge_by_distance(one, one, 1, "newest")
