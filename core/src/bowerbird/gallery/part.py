"""One part of a snapshot: the live items that are searched in one space, and the exact search over them.

N rows, Q queries, k results, D width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import MissingExtraError
from bowerbird.gallery.segments import MappedSegment
from bowerbird.gallery.space import Space
from bowerbird.retrieval.faiss_index import load_faiss
from bowerbird.retrieval.index import Hits, exact_search, in_order

GAP_ROWS = 4096  # a run of dead rows this long is stepped over, a shorter one is masked
GATHER_SHARE = 0.25  # where fewer rows than this are searched, they are copied together instead of masked
GATHER_BYTES = 32 << 20
ONE_QUERY_ROWS = 16  # a lone query over at least this many rows per result has a shorter way
MARGIN = 8  # candidates beyond k that are looked at exactly


@dataclass(frozen=True)
class Part:
    """The live items that are searched in one space.

    Attributes:
        segments: Each segment with its live rows, bool ``(rows,)``, or ``None`` where all of them are live.
    """

    space: Space
    segments: tuple[tuple[MappedSegment, NDArray[np.bool_] | None], ...]
    num_limit: int  # every item number is below

    @cached_property
    def nums(self) -> NDArray[np.int64]:
        """Numbers of the live items, in order of their rows."""
        parts = [segment.nums if live is None else segment.nums[live] for segment, live in self.segments]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @cached_property
    def count(self) -> int:
        return sum(segment.rows if live is None else int(np.count_nonzero(live)) for segment, live in self.segments)

    @cached_property
    def row_of(self) -> NDArray[np.int64]:
        """Row over all segments of every item number; -1 where the item is not in this part, and behind the last."""
        total = sum(segment.rows for segment, _ in self.segments)
        rows: NDArray = np.full(self.num_limit + 1, -1, np.int32 if total < 2**31 else np.int64)
        offset = 0
        for segment, live in self.segments:
            alive = np.arange(segment.rows) if live is None else np.flatnonzero(live)
            rows[segment.nums[alive]] = alive + offset
            offset += segment.rows
        return rows

    def contains(self, nums: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.row_of[nums] >= 0

    def matching(self, allowed: NDArray[np.bool_]) -> int:
        """How many of its items a filter lets through."""
        return int(allowed[self.nums].sum())

    def vectors_of(self, nums: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 ``(N, D)`` of items that are in this part."""
        rows = self.row_of[nums]
        assert (rows >= 0).all(), "items that are not in this part"
        return self._gather(rows)

    def background(self, queries: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """``(Q, B)`` distances of the queries to at most ``count`` items, evenly spaced over the part."""
        return 1 - queries @ self._sample(count).T

    def _sample(self, count: int) -> NDArray[np.float32]:
        if count not in self._samples:
            nums = self.nums
            chosen = nums[np.linspace(0, len(nums) - 1, min(count, len(nums)), dtype=np.int64)]
            self._samples[count] = self.vectors_of(chosen)
        return self._samples[count]

    @cached_property
    def _samples(self) -> dict[int, NDArray[np.float32]]:
        return {}  # of this snapshot; gathered once

    def vectors(self) -> NDArray:
        """``(count, D)`` in the order of ``nums``: a memory map where that is possible, a copy otherwise."""
        if len(self.segments) == 1 and self.segments[0][1] is None:
            return self.segments[0][0].vectors
        parts = [segment.vectors if live is None else segment.vectors[live] for segment, live in self.segments]
        return np.concatenate(parts) if parts else np.empty((0, self.space.dim), np.float32)

    @cached_property
    def _runs(self) -> tuple[tuple[MappedSegment, int, int, int, NDArray[np.bool_] | None], ...]:
        """``(segment, its offset, start, stop, mask)`` without the long stretches of dead rows."""
        runs = []
        offset = 0
        for segment, live in self.segments:
            if live is None:
                spans = [(0, segment.rows)] if segment.rows else []
            else:
                spans = _spans(live)
            for start, stop in spans:
                mask = None if live is None or live[start:stop].all() else live[start:stop]
                runs.append((segment, offset, start, stop, mask))
            offset += segment.rows
        return tuple(runs)

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
        """The ``k`` nearest of this part, exact; equal distances by lower item number.

        The distances are computed a second time in float64, from the vectors alone. That makes them, and so the
        ranking, independent of where a row lies, which a fast matrix product is not: before and after rows were moved
        the
        result is the same to the last bit.

        Args:
            queries: float32 ``(Q, D)`` unit rows.
            allowed: bool, by item number; ``None`` = all.

        Returns:
            Hits ``(Q, k)``, float32 distances, padded with -1 and ``inf``.
        """
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        todo = np.arange(len(queries))
        wide = k + MARGIN
        # Bound of the error of a float32 product of unit vectors: what is further behind than this cannot be nearer.
        slack = 2 * (self.space.dim / 8 + 16) * 2.0**-24
        while len(todo):
            rows, rough = self._candidates(queries[todo], wide, allowed)
            ids[todo], distances[todo] = self.exact(queries[todo], rows, k)
            if wide > self.count:
                break
            # Many items at one distance (copies of an image) can push the right one out of the candidates: look
            # further.
            unsure = np.isfinite(rough[:, -1]) & (rough[:, -1] <= rough[:, k - 1] + slack)
            todo = todo[unsure]
            wide *= 4
        return Hits(ids, distances)

    def _candidates(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.int64], NDArray]:
        """Rows over all segments and rough distances ``(Q, k)`` of the nearest, ascending, padded with -1 and
        ``inf``."""
        found: list[Hits] = []
        for segment, offset, start, stop, mask in self._runs:
            if allowed is not None:
                chosen = allowed[segment.nums[start:stop]]
                mask = chosen if mask is None else mask & chosen
            found.extend(_search_run(segment, offset, start, stop, mask, queries, k))
        if len(found) == 1:
            return found[0].ids, found[0].distances
        rows = np.concatenate([np.full((len(queries), k), -1), *[hits.ids for hits in found]], axis=1)
        rough = np.concatenate([np.full((len(queries), k), np.inf), *[hits.distances for hits in found]], axis=1)
        best = np.argsort(rough, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(rows, best, axis=1), np.take_along_axis(rough, best, axis=1)

    def exact(self, queries: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> tuple[NDArray, NDArray]:
        """Numbers and float64-computed distances ``(Q, k)`` of the nearest among candidate ``rows`` (Q, at least k).

        Rows count over all segments, -1 is no row. Nearest first, equal distances by lower number.
        """
        ids = np.empty((len(queries), k), np.int64)
        distances = np.empty((len(queries), k), np.float32)
        step = max(1, GATHER_BYTES // (8 * self.space.dim * rows.shape[1]))
        for start in range(0, len(queries), step):
            block = rows[start : start + step]
            vectors = self._gather(np.maximum(block, 0).ravel()).reshape(*block.shape, -1)
            number = np.where(block < 0, -1, self._nums_at(block))
            some = slice(start, start + step)
            ids[some], distances[some] = rank_exactly(queries[some], number, vectors, k)
        return ids, distances

    def _gather(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if len(self.segments) == 1:
            return self.segments[0][0].vectors[rows].astype(np.float32, copy=False)
        out = np.empty((len(rows), self.space.dim), np.float32)
        for segment, local, chosen in self._split(rows):
            out[chosen] = segment.vectors[local]
        return out

    def _nums_at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if len(self.segments) == 1:
            return self.segments[0][0].nums[rows]  # -1 reads some row; the caller drops it
        out = np.full(rows.shape, -1, np.int64)
        for segment, local, chosen in self._split(rows):
            out[chosen] = segment.nums[local]
        return out

    def _split(self, rows: NDArray[np.int64]) -> list[tuple[MappedSegment, NDArray[np.int64], NDArray[np.bool_]]]:
        pieces = []
        offset = 0
        for segment, _ in self.segments:
            chosen = (rows >= offset) & (rows < offset + segment.rows)
            if chosen.any():
                pieces.append((segment, rows[chosen] - offset, chosen))
            offset += segment.rows
        return pieces


def rank_exactly(
    queries: NDArray[np.float32], nums: NDArray[np.int64], vectors: NDArray, k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The ``k`` nearest of the candidates of each query, by distances computed in float64 from the vectors alone.

    Every store ranks with it, so that the same gallery gives the same lists wherever it is kept.

    Args:
        queries: ``(Q, D)`` unit rows.
        nums: ``(Q, W)`` item numbers of the candidates, W at least ``k``; -1 is none.
        vectors: ``(Q, W, D)``.

    Returns:
        Numbers int64 and distances float32 ``(Q, k)``, nearest first, equal distances by lower number; -1 and ``inf``
        beyond the end.
    """
    products = vectors.astype(np.float64)
    products *= queries[:, None, :]
    distance = np.maximum(1.0 - products.sum(axis=-1), 0.0).astype(np.float32)  # rounding gives -1e-8 for a copy
    distance[nums < 0] = np.inf
    order = np.lexsort((np.where(nums < 0, np.iinfo(np.int64).max, nums), distance), axis=1)[:, :k]
    nums, distance = in_order(order, nums, distance)
    return nums, distance


def _spans(live: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Stretches ``[start, stop)`` that hold every live row and no ``GAP_ROWS`` dead rows in a line."""
    rows = np.flatnonzero(live)
    if not len(rows):
        return []
    cut = np.flatnonzero(np.diff(rows) > GAP_ROWS)
    starts = np.concatenate([rows[:1], rows[cut + 1]])
    stops = np.concatenate([rows[cut], rows[-1:]]) + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _search_run(
    segment: MappedSegment,
    offset: int,
    start: int,
    stop: int,
    mask: NDArray[np.bool_] | None,
    queries: NDArray[np.float32],
    k: int,
) -> list[Hits]:
    """Hits of one run; ids are rows over all segments."""
    if mask is not None:
        alive = int(np.count_nonzero(mask))
        if alive == 0:
            return []
        if alive < GATHER_SHARE * len(mask):
            rows = np.flatnonzero(mask) + start
            step = max(1, GATHER_BYTES // (4 * segment.info.dim))
            return [
                exact_search(segment.vectors[rows[i : i + step]], queries, k, ids=rows[i : i + step] + offset)
                for i in range(0, len(rows), step)
            ]
    vectors = segment.vectors[start:stop]
    if len(queries) == 1 and mask is None and vectors.dtype == np.float32 and len(vectors) >= ONE_QUERY_ROWS * k:
        hits = _search_one(vectors, queries[0], k)
    else:
        hits = exact_search(vectors, queries, k, valid=mask)
    return [Hits(np.where(hits.ids < 0, -1, hits.ids + (offset + start)), hits.distances)]


def _search_one(vectors: NDArray[np.float32], query: NDArray[np.float32], k: int) -> Hits:
    """``exact_search`` of one query, without the bookkeeping per block, which is what a lone query would wait for.

    FAISS' scan, where it is installed, reads the mapped rows a little faster than a matrix product does. Which of them
    found the candidates does not show in the result: distances are computed again from the vectors.
    """
    with contextlib.suppress(MissingExtraError):
        faiss = load_faiss()
        score, row = faiss.knn(query[None], vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
        return Hits(row, 1.0 - score.astype(np.float64))
    scores = vectors @ query
    # The k-th largest of the maxima of disjoint stretches is at most the k-th largest score.
    stretch = len(scores) // (ONE_QUERY_ROWS * k) + 1
    whole = len(scores) // stretch
    maxima = scores[: whole * stretch].reshape(whole, stretch).max(axis=1)
    floor = np.partition(maxima, whole - k)[whole - k]
    rows = np.flatnonzero(scores >= floor)
    best = rows[np.argsort(-scores[rows], kind="stable")[:k]]
    return Hits(best[None], 1.0 - scores[best[None]].astype(np.float64))
