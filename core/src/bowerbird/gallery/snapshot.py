"""What a reader sees: one epoch of a gallery, immutable, however much is written meanwhile.

Which items are old and which are new is decided here, once, from committed rows: an item that has a committed row of
the new space is new, every other live item is old. The two parts are disjoint by construction, whatever an index or a
plan says.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.gallery.covered import CoveredPart, LiveIndex
from bowerbird.gallery.part import Part
from bowerbird.gallery.segments import Batch, MappedSegment
from bowerbird.gallery.space import Relation, Space

if TYPE_CHECKING:
    from bowerbird.gallery.ann import IndexEntry
    from bowerbird.gallery.segments import SegmentInfo
    from bowerbird.retrieval.index import FaissIndex


class CorruptionWarning(UserWarning):
    """Some rows of a gallery are damaged and left out; ``bowerbird gallery verify`` names them."""


@dataclass(frozen=True)
class UpgradeState:
    """The upgrade that is under way.

    Attributes:
        state: ``running`` or ``paused``.
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


class Snapshot:
    """One epoch. Cheap to make: rows are looked at when the parts are first asked for.

    Attributes:
        epoch: Number of the last commit that it contains.
        live: Items in it, those without a vector included.
        serving: Fingerprint of the space that serves outside upgrades (during one: the old space).
        upgrade: The upgrade under way, or ``None``.
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
        upgrade: UpgradeState | None,
        relations: Sequence[Relation],
        segments: Sequence[MappedSegment],
        tombstones: NDArray[np.int64],
        batches_of: Callable[[SegmentInfo], Sequence[Batch]],
        known_damage: Damage,
        indexes: Mapping[str, IndexEntry],
        load_index: Callable[[IndexEntry], LiveIndex | None],
    ) -> None:
        self.epoch, self.live, self.num_limit, self.serving = epoch, live, num_limit, serving
        self.spaces, self.upgrade = spaces, upgrade
        self.relations = tuple(relations)
        self.segments = tuple(segments)
        self.tombstones = tombstones
        self._batches_of = batches_of
        self._damage = known_damage
        self.indexes = indexes
        self._load_index = load_index
        self._covered: dict[str, CoveredPart | None] = {}
        self._lock = threading.Lock()
        self._parts: tuple[Part, Part] | None = None
        self.problems: list[str] = [segment.problem for segment in segments if segment.problem]

    @property
    def write_space(self) -> Space:
        """Where new items go: the new space during an upgrade, the serving space otherwise."""
        return self.spaces[self.upgrade.new if self.upgrade else self.serving]

    @property
    def old(self) -> Part:
        """Items that are searched in the old space; empty outside upgrades."""
        return self.parts[0]

    @property
    def new(self) -> Part:
        """Items that are searched in the new space; outside upgrades every item."""
        return self.parts[1]

    @property
    def parts(self) -> tuple[Part, Part]:
        with self._lock:
            if self._parts is None:
                self._parts = self._divide()
            return self._parts

    def part_of(self, fingerprint: str) -> Part | None:
        for part in reversed(self.parts):  # outside upgrades the old part is empty and names the same space
            if part.space.fingerprint == fingerprint:
                return part
        return None

    def searcher(self, part: Part) -> Part | CoveredPart:
        """What searches ``part``: its approximate index where the gallery has a usable one, else the part, exactly."""
        fingerprint = part.space.fingerprint
        entry = self.indexes.get(fingerprint)
        if entry is None:
            return part
        with self._lock:
            if fingerprint not in self._covered:
                live = self._load_index(entry)
                fits = live is not None and live.index.dim == part.space.dim
                covered = CoveredPart(part, live, self.epoch) if live is not None and fits else None
                self._covered[fingerprint] = covered if covered is not None and covered.usable else None
            return self._covered[fingerprint] or part

    def _divide(self) -> tuple[Part, Part]:
        space_new = self.write_space
        space_old = self.spaces[self.upgrade.old] if self.upgrade else space_new
        readable = {segment.info.sid: self._readable(segment) for segment in self.segments}
        if self.problems:
            warnings.warn(
                f"damaged rows are left out of this gallery: {'; '.join(self.problems[:3])}. Run `bowerbird gallery "
                "verify`.",
                CorruptionWarning,
                stacklevel=2,
            )
        gone = np.zeros(self.num_limit, bool)
        gone[self.tombstones] = True
        nothing_gone = not len(self.tombstones)
        new, old = [], []
        migrated = gone.copy()
        for segment in self.segments:
            if segment.info.space == space_new.fingerprint:
                intact = readable[segment.info.sid]
                live = None if nothing_gone else ~gone[segment.nums]
                if intact is not None:
                    live = intact if live is None else live & intact
                new.append((segment, live))
                if self.upgrade:
                    migrated[segment.nums if intact is None else segment.nums[intact]] = True
        if self.upgrade:
            for segment in self.segments:
                if segment.info.space == space_old.fingerprint:
                    intact = readable[segment.info.sid]
                    live = ~migrated[segment.nums]
                    old.append((segment, live if intact is None else live & intact))
        return Part(space_old, tuple(old), self.num_limit), Part(space_new, tuple(new), self.num_limit)

    def _readable(self, segment: MappedSegment) -> NDArray[np.bool_] | None:
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
