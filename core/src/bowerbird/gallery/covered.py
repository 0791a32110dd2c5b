"""Searching a part of a snapshot through an approximate index that keeps up with it.

The index in memory follows the gallery: before a search it takes in some of the items that it lacks, and inverted lists
give up the items that have left the part. So it stays good while a gallery grows or is being upgraded, without being
built again, and what one search pays for that is bounded. Linking an item into a graph costs as much as a search, so
that a graph takes its items in by a thread of its own. What it holds for a given snapshot is looked at anew whenever
it changed: items of the part that it lacks are searched exactly, items that it holds and the part does not are dropped.

N items, Q queries, k results.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bowerbird.gallery.part import MARGIN, Part
from bowerbird.retrieval.faiss_index import FaissIndex
from bowerbird.retrieval.index import Hits, in_order

FRESH_ROWS = 1024  # searching so many exactly costs little; beyond, the index takes them in
TAKEN_AT_ONCE = {"ivf": 8192, "hnsw": 64, "flat": 65_536}  # some ten milliseconds in which nobody searches
LINKING = "bowerbird-link"  # name of the thread that takes items into a graph
MAX_DEAD = 0.04  # share of items that have left the part, beyond which inverted lists give them up
MAX_DEAD_GRAPH = 0.8  # nothing can be taken out of a graph: it is left with more dead items than this


class LiveIndex:
    """An index in memory, shared by the snapshots of one process. Thread-safe.

    Attributes:
        version: Changes whenever items are taken in or given up.
    """

    def __init__(self, index: FaissIndex) -> None:
        index.hold_effort()  # measuring it takes seconds; it is measured when files are written
        self.index = index
        self.version = 0
        self._newest = -1  # epoch of the newest snapshot that was searched
        self._has = np.zeros(0, bool)
        self._note(index.ids, True)
        self._tending = threading.Lock()
        self._linking: threading.Thread | None = None  # of a graph
        self._changing = threading.Condition()
        self._readers = 0
        self._writing = False

    def __len__(self) -> int:
        return len(self.index)

    def covers(self, nums: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these items the index holds."""
        if not len(nums):
            return np.zeros(0, bool)
        if int(nums.max()) < len(self._has):
            return self._has[nums]
        inside = nums < len(self._has)
        found = np.zeros(len(nums), bool)
        found[inside] = self._has[nums[inside]]
        return found

    def _note(self, nums: NDArray[np.int64], held: bool) -> None:
        top = int(nums.max(initial=-1)) + 1
        if top > len(self._has):
            wider = np.zeros(top + top // 8, bool)
            wider[: len(self._has)] = self._has
            self._has = wider
        self._has[nums] = held

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While inside, the index does not change. Many threads may be inside."""
        with self._changing:
            while self._writing:
                self._changing.wait()
            self._readers += 1
        try:
            yield
        finally:
            with self._changing:
                self._readers -= 1
                if not self._readers:
                    self._changing.notify_all()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._changing:
            while self._writing:
                self._changing.wait()
            self._writing = True  # from here on nobody enters
            while self._readers:
                self._changing.wait()
        try:
            yield
            self.version += 1
        finally:
            with self._changing:
                self._writing = False
                self._changing.notify_all()

    def set_effort(self, effort: int | None) -> None:
        """Search with this effort from now on."""
        if effort is not None and len(self):
            with self._alone():
                self.index.hold_effort(effort)

    def follow(self, part: Part, fresh: Part, alive: int, epoch: int) -> None:
        """One bounded step towards holding exactly ``part``; nothing for a snapshot that is not the newest, or while
        another thread makes a step."""
        if epoch < self._newest or not self._tending.acquire(blocking=False):
            return
        try:
            self._newest = epoch
            if fresh.count > FRESH_ROWS:
                if self.index.kind == "hnsw":
                    self._link_apart(part, fresh.nums)
                else:
                    self._take_in(part, fresh.nums[: TAKEN_AT_ONCE[self.index.kind]])
            if self.index.kind == "ivf" and len(self) - alive > MAX_DEAD * len(self):
                nums = self.index.ids
                nums = nums[nums < part.num_limit]
                nums = nums[~part.contains(nums)]
                with self._alone():
                    self.index.remove(nums)
                    self._note(nums, False)
        finally:
            self._tending.release()

    def _take_in(self, part: Part, nums: NDArray[np.int64]) -> None:
        nums = nums[~self.covers(nums)]
        vectors = part.vectors_of(nums)
        with self._alone():
            self.index.add(nums, vectors, distinct=True)
            self._note(nums, True)

    def _link_apart(self, part: Part, nums: NDArray[np.int64]) -> None:
        """Let a thread take in ``nums``, unless one is still at work; it ends with the index."""
        if self._linking is None or not self._linking.is_alive():
            arguments = (weakref.ref(self), part, nums)
            self._linking = threading.Thread(target=_link, args=arguments, name=LINKING, daemon=True)
            self._linking.start()


def _link(index: weakref.ref[LiveIndex], part: Part, nums: NDArray[np.int64]) -> None:
    step = TAKEN_AT_ONCE["hnsw"]
    for start in range(0, len(nums), step):
        live = index()
        if live is None:  # the gallery was closed
            return
        begun = time.monotonic()
        live._take_in(part, nums[start : start + step])
        del live
        time.sleep(time.monotonic() - begun)  # half of the time is left to searches


@dataclass(frozen=True)
class _Coverage:
    """What an index of one version means to one part: the items that it lacks, and how many of its items live."""

    version: int
    fresh: Part
    alive: int


class CoveredPart:
    """A part of a snapshot and an index over some of its items. Searches as ``Part`` does, approximately."""

    def __init__(self, part: Part, live: LiveIndex, epoch: int) -> None:
        self.part, self.live, self.epoch = part, live, epoch
        with live.reading():
            self._coverage = self._covered()

    @property
    def usable(self) -> bool:
        """Whether enough of the index' items are in the part; inverted lists come to hold just the part by
        themselves."""
        return self.live.index.kind == "ivf" or self._coverage.alive >= (1 - MAX_DEAD_GRAPH) * len(self.live) > 0

    def _covered(self) -> _Coverage:
        version = self.live.version
        segments, alive = [], 0
        for segment, live in self.part.segments:
            held = self.live.covers(segment.nums)
            fresh = ~held if live is None else live & ~held
            alive += int(np.count_nonzero(held)) if live is None else int(np.count_nonzero(live & held))
            segments.append((segment, fresh))
        return _Coverage(version, Part(self.part.space, tuple(segments), self.part.num_limit), alive)

    def _now(self) -> _Coverage:
        if self._coverage.version != self.live.version:
            self._coverage = self._covered()
        return self._coverage

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
        """See ``Part.search``. The index may miss an item; the distances of those it finds are exact.

        A filter (``allowed``) and a query for which the index has too few live items are searched exactly.
        """
        if allowed is not None:
            return self.part.search(queries, k, allowed)
        coverage = self._coverage
        if coverage.fresh.count > FRESH_ROWS or len(self.live) - coverage.alive > MAX_DEAD * len(self.live):
            self.live.follow(self.part, coverage.fresh, coverage.alive, self.epoch)
        with self.live.reading():
            coverage = self._now()
            if not coverage.alive:
                return self.part.search(queries, k)
            # Items that are gone still stand in the index: fetch so many more that k and a margin remain.
            width = math.ceil((k + MARGIN) * len(self.live) / coverage.alive)
            found = self.live.index.candidates(np.ascontiguousarray(queries), width)
        # An item that came after this snapshot, and -1, read the last entry, which is no row.
        rows = self.part.row_of[np.minimum(found, self.part.num_limit)]
        ids, distances = self.part.exact(queries, rows, k)
        few = np.flatnonzero(ids[:, min(k, coverage.alive) - 1] < 0)
        if len(few):
            exact = self.part.search(queries[few], k)
            ids[few], distances[few] = exact.ids, exact.distances
        if not coverage.fresh.count:
            return Hits(ids, distances)
        fresh = coverage.fresh.search(queries, k)
        fresh.distances[few], fresh.ids[few] = np.inf, -1  # the exact search has found these already
        ids, distances = np.hstack([ids, fresh.ids]), np.hstack([distances, fresh.distances])
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return Hits(*in_order(order, ids, distances))
