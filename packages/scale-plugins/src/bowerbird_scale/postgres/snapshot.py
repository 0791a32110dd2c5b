"""What a reader sees: one epoch of a gallery in PostgreSQL, however much is written meanwhile.

Nothing is held open on the server: every row says from which epoch to which it counts, and each search reads the rows
of its epoch in one repeatable-read transaction.

N items, Q queries, D width, k results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import SnapshotGoneError
from bowerbird.gallery.part import MARGIN, rank_exactly
from bowerbird.gallery.snapshot import SpaceStack, UpgradeState
from bowerbird.gallery.space import Relation, Space
from bowerbird.retrieval.index import Hits
from bowerbird_scale.postgres.connection import Connection, Database
from bowerbird_scale.postgres.vectors import Filter

QUERIES = 256  # that are compared with a block at once


@dataclass(frozen=True)
class Index:
    """The approximate index of a space: its kind, and the server settings of searches through it."""

    kind: str
    effort: Mapping[str, str]


@dataclass(frozen=True)
class PostgresPart:
    """The live items that are searched in one space.

    Attributes:
        number: Of the space in the catalogue.
        condition: Which rows of ``member m`` belong to it, as SQL without parameters.
        index: The approximate index of this space, if it has one.
        known_count: Items, where the catalogue counts them.
    """

    db: Database
    space: Space
    number: int
    condition: str
    epoch: int
    num_limit: int
    dtype: str
    index: Index | None = None
    known_count: int | None = None

    @cached_property
    def count(self) -> int:
        if self.known_count is not None:
            return self.known_count
        with self._reading() as db:
            return db.value(f"SELECT count(*) FROM member m WHERE {self.condition}")

    def matching(self, allowed: Filter) -> int:
        """How many of its items a filter lets through."""
        query = f"SELECT count(*) FROM member m JOIN item USING (num) WHERE {self.condition} AND {allowed.clause}"
        with self._reading() as db:
            return db.value(query, allowed.parameters)

    @cached_property
    def nums(self) -> NDArray[np.int64]:
        """``(count,)`` numbers, ascending."""
        with self._reading() as db:
            row = db.execute(f"SELECT array_agg(num ORDER BY num) FROM member m WHERE {self.condition}").fetchone()
        return np.array(row[0] or [], np.int64)

    def contains(self, nums: NDArray[np.int64]) -> NDArray[np.bool_]:
        wanted = np.asarray(nums, np.int64)
        with self._reading() as db:
            rows = db.execute(
                f"SELECT num FROM member m WHERE num = ANY(%s) AND {self.condition}", (np.unique(wanted).tolist(),)
            ).fetchall()
        return np.isin(wanted, np.array([row[0] for row in rows], np.int64))

    def vectors_of(self, nums: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 ``(N, D)`` of items that are in this part."""
        wanted = np.asarray(nums, np.int64)
        found, vectors = self._read(np.unique(wanted).tolist())
        rows = np.minimum(np.searchsorted(found, wanted), max(len(found) - 1, 0))
        assert len(wanted) == 0 or (len(found) and (found[rows] == wanted).all()), "items that are not in this part"
        return vectors[rows] if len(wanted) else np.empty((0, self.space.dim), np.float32)

    def vectors(self) -> NDArray[np.float32]:
        """``(count, D)`` in the order of ``nums``; all of it in memory."""
        return self._read()[1]

    def background(self, queries: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """``(Q, B)`` distances of the queries to at most ``count`` items, evenly spaced over the part."""
        if count not in self._samples:
            chosen = np.linspace(0, self.count - 1, min(count, self.count), dtype=np.int64)
            self._samples[count] = self.vectors_of(self.nums[chosen])
        return 1 - queries @ self._samples[count].T

    @cached_property
    def _samples(self) -> dict[int, NDArray[np.float32]]:
        return {}

    def search(self, queries: NDArray[np.float32], k: int, allowed: Filter | None = None) -> Hits:
        """The ``k`` nearest, exact unless the space has an approximate index; equal distances by lower number.

        The server finds candidates in float32, and more of them where that is not sure; their distances are computed
        again here, in float64, as in every store.
        """
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        if not self.count:
            return Hits(ids, distances)
        exact = self.index is None or allowed is not None
        # Bound of the error of a float32 product of unit vectors: what is further behind than this cannot be nearer.
        slack = 2 * (self.space.dim / 8 + 16) * 2.0**-24
        streams_from = self.db.vectors.streams_from
        if exact and streams_from is not None and len(queries) >= streams_from:
            return self._search_together(queries, k, allowed, slack)
        with self._reading() as db:
            for row, query in enumerate(queries):
                wide = k + MARGIN
                while True:
                    nums, rough, vectors = self.db.vectors.nearest(db, self, query, wide, allowed)
                    full = len(nums) == wide
                    if not full or not exact or rough[-1] > rough[k - 1] + slack:
                        break
                    wide *= 4  # many items at one distance: the right one may be further behind
                nearest = rank_exactly(query[None], nums[None], vectors[None], k)
                ids[row, : len(nearest[0][0])], distances[row, : len(nearest[1][0])] = nearest[0][0], nearest[1][0]
        return Hits(ids, distances)

    def _search_together(self, queries: NDArray[np.float32], k: int, allowed: Filter | None, slack: float) -> Hits:
        """As ``search``, exact: the vectors come here once for all queries, in blocks."""
        ids = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        with self._reading() as db:
            for nums, rows in self.db.vectors.blocks(db, self, allowed=allowed):
                for start in range(0, len(queries), QUERIES):
                    rough = 1 - queries[start : start + QUERIES] @ rows.T
                    limit = distances[start : start + QUERIES, -1] + slack
                    if len(nums) > k:
                        limit = np.minimum(limit, np.partition(rough, k - 1, axis=1)[:, k - 1] + slack)
                    for row, near in enumerate(rough <= limit[:, None], start):
                        chosen = np.flatnonzero(near)
                        better = rank_exactly(queries[row : row + 1], nums[None, chosen], rows[None, chosen], k)
                        both = np.concatenate([ids[row], better[0][0]]), np.concatenate([distances[row], better[1][0]])
                        order = np.lexsort((np.where(both[0] < 0, self.num_limit, both[0]), both[1]))[:k]
                        ids[row], distances[row] = both[0][order], both[1][order]
        return Hits(ids, distances)

    def _read(self, nums: list[int] | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        with self._reading() as db:
            return self.db.vectors.read(db, self, nums)

    def _reading(self) -> Any:
        return reading_at(self.db, self.epoch)


class PostgresSnapshot(SpaceStack):
    """One epoch; see ``bowerbird.gallery.protocol.Snapshot``.

    Args:
        numbers: Fingerprint -> number of the space in the catalogue.
        counts: Fingerprint -> items that are searched in the space, as the catalogue counts them.
        indexes: Fingerprint -> its approximate index.
    """

    def __init__(
        self,
        db: Database,
        *,
        epoch: int,
        live: int,
        num_limit: int,
        serving: str,
        dtype: str,
        spaces: Mapping[str, Space],
        upgrades: Sequence[UpgradeState],
        relations: Sequence[Relation],
        numbers: Mapping[str, int],
        counts: Mapping[str, int],
        indexes: Mapping[str, Index],
    ) -> None:
        self.db = db
        self.epoch, self.live, self.num_limit, self.serving, self.dtype = epoch, live, num_limit, serving, dtype
        self.spaces, self.upgrades, self.relations = spaces, tuple(upgrades), tuple(relations)
        self.numbers, self.indexes = numbers, indexes
        self.problems: list[str] = []
        here = f"m.since <= {epoch} AND m.gone > {epoch}"
        self._kept = {name: f"m.space = {number} AND {here}" for name, number in numbers.items()}
        self.parts = tuple(
            self._part(name, f"{self._kept[name]} AND m.moved > {epoch}", counts[name]) for name in self.stack
        )

    @property
    def new(self) -> PostgresPart:
        return self.parts[-1]

    @property
    def olds(self) -> tuple[PostgresPart, ...]:
        return self.parts[:-1]

    @property
    def old(self) -> PostgresPart:
        return self.parts[-2] if self.upgrades else self._part(self.serving, "false", 0)

    @cached_property
    def served_parts(self) -> tuple[PostgresPart, ...]:
        """``parts``, or, for an upgrade with the setting ``switches_at_end``, older vectors while there are any."""
        switches = self.upgrade is not None and self.upgrade.settings.get("switches_at_end")
        if not switches or not any(part.count for part in self.olds):
            return self.parts
        *below, top = self.stack
        older = ", ".join(str(self.numbers[name]) for name in below)
        elsewhere = (
            f"SELECT FROM member o WHERE o.num = m.num AND o.space IN ({older}) AND o.since <= {self.epoch} "
            f"AND o.gone > {self.epoch}"
        )
        return *self.parts_below, self._part(top, f"{self._kept[top]} AND NOT EXISTS ({elsewhere})")

    @cached_property
    def parts_below(self) -> tuple[PostgresPart, ...]:
        """The parts as they would be without the topmost upgrade: what a lift maps, and a rollback returns to."""
        if not self.upgrades:
            return self.parts
        *below, top = self.stack
        there = f"(m.moved > {self.epoch} OR m.moved_to = {self.numbers[top]})"
        return tuple(self._part(name, f"{self._kept[name]} AND {there}") for name in below)

    def part_of(self, fingerprint: str) -> PostgresPart | None:
        return next((part for part in self.parts if part.space.fingerprint == fingerprint), None)

    def rows_of(self, fingerprint: str) -> PostgresPart:
        """Every live item with a vector in a space, also those that are searched in a newer one."""
        return self._part(fingerprint, self._kept[fingerprint])

    def searcher(self, part: PostgresPart) -> PostgresPart:
        return part  # it knows its index

    def _part(self, fingerprint: str, condition: str, count: int | None = None) -> PostgresPart:
        return PostgresPart(
            self.db,
            self.spaces[fingerprint],
            self.numbers[fingerprint],
            condition,
            self.epoch,
            self.num_limit,
            self.dtype,
            self.indexes.get(fingerprint),
            count,
        )


@contextmanager
def reading_at(db: Database, epoch: int) -> Iterator[Connection]:
    """A transaction that can still see ``epoch``.

    Raises:
        SnapshotGoneError: If what it showed was dropped.
    """
    with db.reading() as connection:
        floor = connection.value("SELECT floor FROM head")
        if epoch < floor:
            raise SnapshotGoneError(
                f"epoch {epoch} of gallery {db.address.name} cannot be read any more: old vectors were dropped at "
                f"epoch {floor}. Take a new snapshot"
            )
        yield connection
