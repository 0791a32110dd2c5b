"""Contracts of retrievers, one class per role. numpy only, like the parts that they test.

Q queries, N stored vectors, D width, k results. Distances are ``1 - cosine``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bowerbird.gallery.space import Space
from bowerbird.gallery.transform import VectorTransform
from bowerbird.registry import get_registry
from bowerbird.retrieval.index import Hits
from bowerbird.testing.contract import Contract, must_raise
from bowerbird.upgrade.strategies import TrainingPairs, transform_direction


def unit_vectors(rows: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Random float32 ``(rows, dim)`` with rows of length 1."""
    vectors = np.random.default_rng(seed).standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class IndexContract(Contract):
    """Role ``index``. ``recall``: the least share of true neighbours that it must find; 1 for an exact index."""

    kind = "retriever"
    role = "index"
    recall: ClassVar[float] = 1.0
    num_items: ClassVar[int] = 300
    dim: ClassVar[int] = 16

    def build(self) -> Any:
        return self.target.build(self.make_config())

    def filled(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """``(index, ids, vectors)``; the ids are not the positions."""
        vectors = unit_vectors(self.num_items, self.dim)
        ids = np.random.default_rng(1).permutation(10 * self.num_items)[: self.num_items].astype(np.int64)
        index = self.build()
        half = self.num_items // 2
        index.add(ids[:half], vectors[:half])
        index.add(ids[half:], vectors[half:])
        return index, ids, vectors

    def check_against_brute_force(self, index: Any, ids: np.ndarray, vectors: np.ndarray, k: int = 5) -> None:
        queries = unit_vectors(20, self.dim, seed=2)
        hits = index.search(queries, k)
        distances = 1 - queries @ vectors.T
        true = ids[np.argsort(distances, axis=1, kind="stable")[:, :k]]
        found = np.mean([len(set(a) & set(b)) / k for a, b in zip(hits.ids, true, strict=True)])
        assert found >= self.recall - 1e-12, (
            f"recall {found:.3f} of the {k} nearest, at least {self.recall} is promised"
        )
        position = {int(item): i for i, item in enumerate(ids)}
        for query, (row, row_distances) in enumerate(zip(hits.ids, hits.distances, strict=True)):
            assert (np.diff(row_distances) >= 0).all(), f"query {query}: distances do not ascend"
            exact = np.array([distances[query, position[int(item)]] for item in row])
            assert np.allclose(row_distances, exact, atol=1e-5), f"query {query}: distances are not 1 - cosine"

    def test_it_finds_the_nearest_items_by_their_ids(self) -> None:
        """Fix: distances are ``1 - cosine``, ascending; ids are those that were given to ``add``."""
        index, ids, vectors = self.filled()
        assert len(index) == len(ids)
        self.check_against_brute_force(index, ids, vectors)

    def test_removed_items_are_never_found_again(self) -> None:
        """Fix: ``remove`` must take effect at the next search."""
        index, ids, vectors = self.filled()
        gone = ids[::3]
        index.remove(gone)
        kept = ~np.isin(ids, gone)
        assert len(index) == kept.sum()
        self.check_against_brute_force(index, ids[kept], vectors[kept])

    def test_results_are_padded_where_there_are_fewer_items_than_asked_for(self) -> None:
        """Fix: id -1 and distance infinity."""
        index = self.build()
        index.add(np.array([7, 3]), unit_vectors(2, self.dim))
        hits = index.search(unit_vectors(1, self.dim, seed=2), 4)
        assert hits.ids.shape == (1, 4) and sorted(hits.ids[0][:2]) == [3, 7]
        assert (hits.ids[0][2:] == -1).all() and np.isinf(hits.distances[0][2:]).all()

    def test_a_saved_index_answers_bit_equally(self) -> None:
        """Fix: save ids, vectors and whatever search reads."""
        index, _, _ = self.filled()
        queries = unit_vectors(10, self.dim, seed=3)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "index")
            index.save(path)
            loaded = type(index).load(path)
            before, after = index.search(queries, 5), loaded.search(queries, 5)
            assert len(loaded) == len(index)
            assert np.array_equal(before.ids, after.ids) and np.array_equal(before.distances, after.distances)
            del loaded  # a memory-mapped file must be free before the folder goes

    def test_bad_input_is_refused(self) -> None:
        """Fix: name the row or the id, and what was expected."""
        index, ids, vectors = self.filled()
        nan = vectors[:1].copy()
        nan[0, 0] = np.nan
        fresh = np.array([10 * self.num_items + 1])
        must_raise(lambda: index.add(ids[:1], vectors[:1]), "an id that is already stored")
        must_raise(lambda: index.add(fresh, vectors[:1, :-1]), "a vector of another width")
        must_raise(lambda: index.add(fresh, nan), "a vector with NaN")
        must_raise(lambda: index.add(fresh, np.zeros_like(nan)), "a vector of length zero")
        must_raise(lambda: index.search(vectors[:1, :-1], 3), "a query of another width")
        must_raise(lambda: index.search(vectors[:1], 0), "k = 0")


class MergerContract(Contract):
    """Role ``merger``: ``merge(old: Hits, new: Hits, k) -> Hits`` of two disjoint parts."""

    kind = "retriever"
    role = "merger"

    def merge(self, old: Hits, new: Hits, k: int) -> Hits:
        return self.target(old, new, k)

    def parts(self, queries: int = 6, *, seed: int = 0) -> tuple[Hits, Hits]:
        rng = np.random.default_rng(seed)
        ids = np.stack([rng.permutation(100)[:12] for _ in range(queries)]).astype(np.int64)
        distances = rng.random((queries, 12))
        return (
            Hits(ids[:, :7], np.sort(distances[:, :7], axis=1)),
            Hits(ids[:, 7:], np.sort(distances[:, 7:], axis=1)),
        )

    def test_every_result_comes_from_one_of_the_parts_and_none_comes_twice(self) -> None:
        """Fix: deduplicate by id; pad with -1."""
        old, new = self.parts()
        merged = self.merge(old, new, 10)
        assert merged.ids.shape == (6, 10)
        for row in range(6):
            real = merged.ids[row][merged.ids[row] >= 0]
            assert len(set(real)) == len(real), f"query {row}: an item is returned twice"
            assert set(real) <= {*old.ids[row], *new.ids[row]}, f"query {row}: an item of neither part"

    def test_an_empty_part_leaves_the_order_of_the_other_as_it_is(self) -> None:
        """Fix: an upgrade starts exactly at the old results and ends exactly at the new ones."""
        old, _ = self.parts()
        nothing = Hits(np.full((6, 5), -1, np.int64), np.full((6, 5), np.inf))
        assert np.array_equal(self.merge(old, nothing, 5).ids, old.ids[:, :5])
        assert np.array_equal(self.merge(nothing, old, 5).ids, old.ids[:, :5])

    def test_a_short_union_is_padded(self) -> None:
        """Fix: id -1 and distance infinity."""
        old, new = self.parts()
        merged = self.merge(old, new, 20)
        assert (merged.ids[:, :12] >= 0).all() and (merged.ids[:, 12:] == -1).all()

    def test_one_query_gives_what_it_gives_in_a_batch(self) -> None:
        """Fix: queries are independent of each other."""
        old, new = self.parts()
        batch = self.merge(old, new, 8)
        for row in range(6):
            one = self.merge(old[row : row + 1], new[row : row + 1], 8)
            assert np.array_equal(one.ids[0], batch.ids[row])


class OrderContract(Contract):
    """Role ``order``: ``order(ids (N,), old_vectors (N, D), *, seed, centers=None, **settings) -> (N,)``."""

    kind = "retriever"
    role = "order"

    def order(self, count: int, *, seed: int = 0, centers: np.ndarray | None = None) -> np.ndarray:
        config = self.make_config()
        settings = {} if config is None else config.model_dump()
        vectors = unit_vectors(count, 6) if count else np.empty((0, 6), np.float32)
        return self.target(np.arange(count, dtype=np.int64), vectors, seed=seed, centers=centers, **settings)

    def test_it_is_a_permutation_of_all_positions(self) -> None:
        """Fix: every item is backfilled exactly once, also in a gallery of one item or none."""
        for count in (0, 1, 2, 57):
            order = np.asarray(self.order(count))
            assert order.shape == (count,) and np.issubdtype(order.dtype, np.integer), f"{order!r}"
            assert np.array_equal(np.sort(order), np.arange(count)), f"{count} items: {order}"

    def test_the_same_seed_gives_the_same_order(self) -> None:
        """Fix: a resumed upgrade must continue in the same order."""
        assert np.array_equal(self.order(57, seed=4), self.order(57, seed=4))

    def test_given_class_centres_are_accepted(self) -> None:
        """Fix: take the keyword ``centers`` (C, D), even where the order does not use it."""
        order = self.order(57, centers=unit_vectors(3, 6, seed=9))
        assert np.array_equal(np.sort(order), np.arange(57))


class RerankerContract(Contract):
    """Role ``reranker``: ``rerank(scores (Q, N), **settings) -> (Q, N)``, higher is nearer."""

    kind = "retriever"
    role = "reranker"

    def rerank(self, scores: np.ndarray) -> np.ndarray:
        config = self.make_config()
        return np.asarray(self.target(scores, **({} if config is None else config.model_dump())))

    def scores(self, queries: int = 7, items: int = 5) -> np.ndarray:
        """float32 cosines."""
        return unit_vectors(queries, 4) @ unit_vectors(items, 4, seed=1).T

    def test_there_is_a_score_for_every_query_and_item(self) -> None:
        """Fix: return finite scores of the shape of the scores, also of one query and of one item."""
        for queries, items in ((7, 5), (1, 5), (7, 1), (3, 9)):
            found = self.rerank(self.scores(queries, items))
            assert found.shape == (queries, items), f"{queries} queries, {items} items: shape {found.shape}"
            assert np.isfinite(found).all()

    def test_the_scores_that_it_gets_stay_as_they_are(self) -> None:
        """Fix: copy before writing; results without re-ranking are reported from the same array."""
        scores = self.scores()
        before = scores.copy()
        self.rerank(scores)
        assert np.array_equal(scores, before)

    def test_the_order_of_queries_and_items_does_not_matter(self) -> None:
        """Fix: look at scores, not at positions."""
        scores, rng = self.scores(), np.random.default_rng(2)
        rows, columns = rng.permutation(7), rng.permutation(5)
        moved = self.rerank(np.ascontiguousarray(scores[rows][:, columns]))
        assert np.allclose(moved, self.rerank(scores)[rows][:, columns], rtol=1e-4, atol=1e-6)


class UpgradeContract(Contract):
    """Role ``upgrade``: a strategy, see the plugin-author guide."""

    kind = "retriever"
    role = "upgrade"
    old = Space(fingerprint="a" * 64, encoder="old", dim=6)
    new = Space(fingerprint="b" * 64, encoder="new", dim=8)

    def queries(self) -> dict[str, np.ndarray]:
        """What serving has at hand: the new vectors, and the old ones where the strategy asks for the old encoder."""
        vectors = {self.new.fingerprint: unit_vectors(3, self.new.dim)}
        if self.target().needs_old_encoder:
            vectors[self.old.fingerprint] = unit_vectors(3, self.old.dim, seed=1)
        return vectors

    def test_it_says_what_it_needs_and_names_a_merger_that_exists(self) -> None:
        """Fix: ``needs_old_encoder`` is a bool, ``merger`` the name of a record with role merger."""
        strategy = self.target()
        assert isinstance(strategy.needs_old_encoder, bool)
        merger = get_registry().get("retriever", strategy.merger, "merger")
        assert callable(get_registry().load(merger))

    def test_the_old_part_is_searched_with_vectors_of_the_old_width(self) -> None:
        """Fix: ``old_part_queries`` returns finite float ``(Q, old.dim)``."""
        vectors = np.asarray(self.target().old_part_queries(self.queries(), self.old, self.new, *self.transform()))
        assert vectors.shape == (3, self.old.dim), f"shape {vectors.shape}, the old space has {self.old.dim} dimensions"
        assert np.isfinite(vectors).all()

    def test_missing_queries_are_refused(self) -> None:
        """Fix: raise ``SpaceError`` naming the space whose query vectors are needed."""
        made = self.transform()
        must_raise(
            lambda: self.target().old_part_queries({}, self.old, self.new, *made), "a search without query vectors"
        )

    def test_what_it_fits_has_the_direction_that_it_says(self) -> None:
        """Fix: ``fit`` returns a ``VectorTransform`` from new to old for ``query``, from old to new for ``gallery``."""
        direction = transform_direction(self.target())
        if direction is None:
            return
        made = self.target().fit(self.pairs(), seed=0)
        ends = (self.new, self.old) if direction == "query" else (self.old, self.new)
        assert (made.source, made.target) == tuple(space.fingerprint for space in ends)
        assert made(unit_vectors(3, ends[0].dim)).shape == (3, ends[1].dim)

    def pairs(self) -> TrainingPairs:
        """A small paired sample of two related spaces, with labels."""
        new = unit_vectors(200, self.new.dim, seed=4)
        old = new @ unit_vectors(self.new.dim, self.old.dim, seed=5)
        return TrainingPairs(old, new, [i % 4 for i in range(200)], self.old, self.new)

    def transform(self) -> tuple[VectorTransform, ...]:
        """The fourth argument of ``old_part_queries``, for a strategy that has one."""
        if transform_direction(self.target()) != "query":
            return ()
        return (VectorTransform.linear(self.new.fingerprint, self.old.fingerprint, unit_vectors(6, 8, seed=6)),)
