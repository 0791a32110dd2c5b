"""What a reader sees: one epoch of a gallery, immutable, however much is written meanwhile.

In which space an item is searched is decided here, once, from committed rows: in the newest space of the upgrades
under way in which it has a row. Upgrades stack (v1 -> v2 under way, v3 on top), so that there may be more than two
parts. They are disjoint by construction, whatever an index or a plan says.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import SpaceError
from bowerbird.gallery.covered import CoveredPart, LiveIndex
from bowerbird.gallery.part import Part
from bowerbird.gallery.segments import Batch, MappedSegment
from bowerbird.gallery.space import Relation, Space

if TYPE_CHECKING:
    from bowerbird.gallery.ann import IndexEntry
    from bowerbird.gallery.segments import SegmentInfo


class CorruptionWarning(UserWarning):
    """Some rows of a gallery are damaged and left out; ``bowerbird gallery verify`` names them."""


@dataclass(frozen=True)
class UpgradeState:
    """An upgrade that is under way.

    Attributes:
        state: ``running``, ``paused``, or ``covered`` by another one on top of it, which alone gives out tasks.
        old, new: Fingerprints of the two spaces.
        settings: Whatever ``begin_upgrade`` was given to remember.
        plan_rows: Items queued so far, edits included.
    """

    id: int
    old: str
    new: str
    state: str
    strategy: str
    merger: str
    order: str
    plan_rows: int
    settings: dict[str, Any]
    started_at: float


class SpaceStack:
    """What the snapshots of every store say of the spaces that are alive.

    Attributes:
        serving: Fingerprint of the space that serves outside upgrades.
        spaces: Every known space by its fingerprint.
        upgrades: Those under way, each on top of the one before.
    """

    serving: str
    spaces: Mapping[str, Space]
    upgrades: tuple[UpgradeState, ...]

    @property
    def upgrade(self) -> UpgradeState | None:
        """The upgrade that workers move items for: the one on top of all others. ``None`` outside upgrades."""
        return self.upgrades[-1] if self.upgrades else None

    @property
    def stack(self) -> tuple[str, ...]:
        """Fingerprints of the spaces of ``parts``, the oldest first; the serving space alone outside upgrades."""
        return (self.serving, *(upgrade.new for upgrade in self.upgrades))

    @property
    def write_space(self) -> Space:
        """Where new items go: the newest space of the upgrades under way, the serving space otherwise."""
        return self.spaces[self.stack[-1]]

    def space_to_write(self, fingerprint: str | None) -> Space:
        """Where new items with vectors of this space go; ``None``: ``write_space``. Raises ``SpaceError``."""
        if fingerprint is None:
            return self.write_space
        if fingerprint not in self.stack:
            known = ", ".join(str(self.spaces[name]) for name in self.stack)
            raise SpaceError(
                f"items cannot be added in space {fingerprint[:12]!r}; this gallery takes vectors of {known}"
            )
        return self.spaces[fingerprint]


class Snapshot(SpaceStack):
    """One epoch. Cheap to make: rows are looked at when the parts are first asked for.

    Attributes:
        epoch: Number of the last commit that it contains.
        live: Items in it, those without a vector included.
        serving: Fingerprint of the space that serves outside upgrades (during some: the oldest space).
        upgrades: The upgrades under way, the first begun first; each is on top of the one before it.
        relations: The registered relations between spaces.
        indexes: Fingerprint -> the approximate index of that space.
        problems: Damaged rows found so far.
    """

    def __init__(
        self,
        *,
        epoch: int,
        live: int,
        num_limit: int,
        serving: str,
        spaces: dict[str, Space],
        upgrades: Sequence[UpgradeState],
        relations: Sequence[Relation],
        segments: Sequence[MappedSegment],
        tombstones: NDArray[np.int64],
        batches_of: Callable[[SegmentInfo], Sequence[Batch]],
        known_damage: Damage,
        indexes: Mapping[str, IndexEntry],
        load_index: Callable[[IndexEntry], LiveIndex | None],
    ) -> None:
        self.epoch, self.live, self.num_limit, self.serving = epoch, live, num_limit, serving
        self.spaces, self.upgrades = spaces, tuple(upgrades)
        self.relations = tuple(relations)
        self.segments = tuple(segments)
        self.tombstones = tombstones
        self._batches_of = batches_of
        self._damage = known_damage
        self.indexes = indexes
        self._load_index = load_index
        self._searchers: dict[int, tuple[Part, Part | CoveredPart]] = {}
        self._lock = threading.RLock()
        self._readable: dict[str, NDArray[np.bool_] | None] | None = None
        self.problems: list[str] = [segment.problem for segment in segments if segment.problem]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The live items by the space in which they are searched, the oldest space first; one part outside upgrades."""
        with self._lock:  # computed once, so that a part is one object whichever thread asks
            return self._parts

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        divided = self._divide(self.stack[::-1])
        return tuple(divided[fingerprint] for fingerprint in self.stack)

    @property
    def new(self) -> Part:
        """Items that are searched in the space that is written; outside upgrades every item."""
        return self.parts[-1]

    @property
    def olds(self) -> tuple[Part, ...]:
        """The parts of all older spaces, the oldest first; none outside upgrades."""
        return self.parts[:-1]

    @property
    def old(self) -> Part:
        """Items of the space that the topmost upgrade comes from; empty outside upgrades."""
        return self.parts[-2] if self.upgrades else Part(self.write_space, (), self.num_limit)

    @cached_property
    def served_parts(self) -> tuple[Part, ...]:
        """The parts that searches look at: ``parts``, but for an upgrade that switches only at its end.

        Such a one (setting ``switches_at_end``) shows the vector of an older space where an item has one, until no
        item is left that has no new vector.
        """
        switches = self.upgrade is not None and self.upgrade.settings.get("switches_at_end")
        if not switches or not any(part.count for part in self.olds):
            return self.parts
        divided = self._divide((*self.stack[-2::-1], self.stack[-1]))
        return tuple(divided[fingerprint] for fingerprint in self.stack)

    @cached_property
    def parts_below(self) -> tuple[Part, ...]:
        """The parts as they would be without the topmost upgrade: what a lift maps, and a rollback returns to."""
        if not self.upgrades:
            return self.parts
        divided = self._divide(self.stack[-2::-1])
        return tuple(divided[fingerprint] for fingerprint in self.stack[:-1])

    def part_of(self, fingerprint: str) -> Part | None:
        """The items that are searched in a space."""
        return next((part for part in self.parts if part.space.fingerprint == fingerprint), None)

    def rows_of(self, fingerprint: str) -> Part:
        """Every live item with a readable vector in a space, also those that are searched in a newer one."""
        return self._divide((fingerprint,))[fingerprint]

    def searcher(self, part: Part) -> Part | CoveredPart:
        """What searches ``part``: its approximate index where the gallery has a usable one, else the part, exactly."""
        entry = self.indexes.get(part.space.fingerprint)
        if entry is None:
            return part
        with self._lock:
            if id(part) not in self._searchers:
                live = self._load_index(entry)
                fits = live is not None and live.index.dim == part.space.dim
                covered = CoveredPart(part, live, self.epoch) if live is not None and fits else None
                self._searchers[id(part)] = part, covered if covered is not None and covered.usable else part
            return self._searchers[id(part)][1]

    def _divide(self, claims: Sequence[str]) -> dict[str, Part]:
        """The live items by space: each in the first space of ``claims`` in which it has a readable row."""
        readable = self._readable_rows()
        taken = np.zeros(self.num_limit, bool)
        taken[self.tombstones] = True
        untouched = not len(self.tombstones)
        divided = {}
        for fingerprint in claims:
            segments = [segment for segment in self.segments if segment.info.space == fingerprint]
            chosen = []
            for segment in segments:
                intact = readable[segment.info.sid]
                live = None if untouched else ~taken[segment.nums]
                if intact is not None:
                    live = intact if live is None else live & intact
                chosen.append((segment, live))
            divided[fingerprint] = Part(self.spaces[fingerprint], tuple(chosen), self.num_limit)
            if fingerprint != claims[-1]:
                untouched = False
                for segment in segments:
                    intact = readable[segment.info.sid]
                    taken[segment.nums if intact is None else segment.nums[intact]] = True
        return divided

    def _readable_rows(self) -> dict[str, NDArray[np.bool_] | None]:
        with self._lock:
            if self._readable is None:
                self._readable = {segment.info.sid: self._intact(segment) for segment in self.segments}
                if self.problems:
                    warnings.warn(
                        f"damaged rows are left out of this gallery: {'; '.join(self.problems[:3])}. Run `bowerbird "
                        "gallery verify`.",
                        CorruptionWarning,
                        stacklevel=2,
                    )
            return self._readable

    def _intact(self, segment: MappedSegment) -> NDArray[np.bool_] | None:
        """Rows whose checksums hold, ``None`` = all. Every batch is checked once per process, when it is first used."""
        damaged, problems = self._damage.of(segment, self._batches_of)
        self.problems.extend(problem for problem in problems if problem not in self.problems)
        inside = [(lo, hi) for lo, hi in damaged if lo < segment.rows]
        if not inside:
            return None
        readable = np.ones(segment.rows, bool)
        for lo, hi in inside:
            readable[lo:hi] = False
        segment.nums = np.where(readable, segment.nums, 0)  # damaged numbers could point anywhere
        return readable


class Damage:
    """Which rows of which segment are damaged, remembered so that a checksum is computed once per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._checked: dict[str, int] = {}
        self._rows: dict[str, list[tuple[int, int]]] = {}
        self._problems: dict[str, list[str]] = {}

    def of(
        self, segment: MappedSegment, batches_of: Callable[[SegmentInfo], Sequence[Batch]]
    ) -> tuple[list[tuple[int, int]], list[str]]:
        """``(damaged rows as ranges, what is wrong)`` of a segment, rows not yet checked included."""
        sid = segment.info.sid
        with self._lock:
            checked = self._checked.get(sid, 0)
            if checked < segment.info.rows:
                fresh = [batch for batch in batches_of(segment.info) if batch.start >= checked]
                for batch, problem in segment.damaged(fresh):
                    self._rows.setdefault(sid, []).append((batch.start, batch.start + batch.n))
                    self._problems.setdefault(sid, []).append(problem)
                self._checked[sid] = segment.info.rows
            return list(self._rows.get(sid, [])), list(self._problems.get(sid, []))
