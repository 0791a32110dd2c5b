"""Checking a gallery: every checksum, and the invariants that hold at every epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bowerbird.gallery import ann
from bowerbird.gallery.catalog import numbers
from bowerbird.gallery.segments import IDS, SUFFIX, MappedSegment, crc_of

if TYPE_CHECKING:
    from bowerbird.gallery.snapshot import Snapshot
    from bowerbird.gallery.storage import Storage

SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """``kind``: catalogue, truncated, checksum, batches, unknown-item, doubled, missing, count or plan; ``message``
    names it."""

    kind: str
    message: str


@dataclass(frozen=True)
class Report:
    """What ``verify`` found.

    Attributes:
        problems: Damage and broken invariants; none of them in a healthy gallery.
        notes: What is harmless: files that a killed process left behind, an index that must be built again.
        items, rows, batches: How much was checked.
        damaged_ids: Items whose vector is damaged or missing. Everything else can be read and searched.
    """

    epoch: int
    items: int
    rows: int
    batches: int
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged_ids: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        checked = f"{self.items} items, {self.rows} rows in {self.batches} batches checked at epoch {self.epoch}"
        if self.ok:
            return f"ok: {checked}"
        listed = "; ".join(problem.message for problem in self.problems[:SHOWN])
        return f"{len(self.problems)} problems ({checked}): {listed}"


def verify(storage: Storage) -> Report:
    """Check all files of the newest epoch against the catalogue. Changes nothing and never raises for damage."""
    while True:
        snapshot = storage.snapshot()
        report = _verify(storage, snapshot)
        if report.ok or storage.snapshot().epoch == snapshot.epoch:
            return report  # else somebody wrote between two looks, which can seem like damage: look again


def _verify(storage: Storage, snapshot: Snapshot) -> Report:
    with storage.catalog.reading() as db:
        quick = [row[0] for row in db.execute("PRAGMA quick_check(5)")]
        live = numbers(
            db,
            "SELECT num FROM item WHERE added_epoch <= ? AND (deleted_epoch = 0 OR deleted_epoch > ?)",
            snapshot.epoch,
            snapshot.epoch,
        )
        pending = numbers(db, "SELECT num FROM pending")
        tasks = db.execute(
            "SELECT plan_file, lo, hi, crc FROM task JOIN upgrade ON upgrade.id = task.upgrade "
            "WHERE upgrade.state IN ('running', 'paused', 'covered') ORDER BY upgrade, lo"
        ).fetchall()
    problems = [Problem("catalogue", f"the catalogue is damaged: {line}") for line in quick if line != "ok"]

    is_live = np.zeros(snapshot.num_limit, bool)
    is_live[live] = True
    has_vector: dict[str, np.ndarray] = {}
    rows = batches = 0
    for mapped in snapshot.segments:
        count = has_vector.setdefault(mapped.info.space, np.zeros(snapshot.num_limit, np.int32))
        found, checked = _check_segment(storage, MappedSegment(storage.segment_folder, mapped.info), is_live, count)
        problems += found
        batches += checked
        rows += mapped.info.rows
    for fingerprint, count in has_vector.items():
        doubled = np.flatnonzero(is_live & (count > 1))
        if len(doubled):
            where = f"space {snapshot.spaces[fingerprint]}"
            problems.append(
                Problem("doubled", f"{len(doubled)} items have two vectors in {where}: {_ids(storage, doubled)}")
            )
    missing = _without_vector(snapshot, is_live, pending, has_vector)
    if len(missing):
        message = f"{len(missing)} items have no readable vector: {_ids(storage, missing)}"
        problems.append(Problem("missing", message))
    if len(live) != snapshot.live:
        problems.append(Problem("count", f"the catalogue counts {snapshot.live} items and has {len(live)}"))
    for name, lo, hi, crc in tasks:
        file = storage.path / "plan" / name
        nums = np.fromfile(file, IDS, count=hi - lo, offset=lo * IDS.itemsize) if file.exists() else np.empty(0, IDS)
        if len(nums) != hi - lo or crc_of(nums) != crc:
            problems.append(Problem("plan", f"rows {lo} to {hi - 1} of the plan {file} differ from their checksum"))
    names = storage.items(missing)
    return Report(
        epoch=snapshot.epoch,
        items=len(live),
        rows=rows,
        batches=batches,
        problems=problems,
        notes=_orphans(storage) + _index_notes(storage),
        damaged_ids=[names[num].id for num in missing.tolist()],
    )


def _check_segment(
    storage: Storage, segment: MappedSegment, is_live: np.ndarray, count: np.ndarray
) -> tuple[list[Problem], int]:
    """Problems of one segment and the number of its batches; ``count[num]`` grows by the intact rows of each item."""
    problems = [Problem("truncated", segment.problem)] if segment.problem else []
    batches = storage.batches(segment.info)
    expected = 0
    for batch in batches:
        if batch.start != expected:
            message = f"segment {segment.info.sid} has no batch for rows {expected} to {batch.start - 1}"
            problems.append(Problem("batches", message))
        expected = batch.start + batch.n
    if expected != segment.info.rows:
        message = f"segment {segment.info.sid} has {segment.info.rows} rows, its batches end at row {expected}"
        problems.append(Problem("batches", message))
    intact = np.ones(segment.rows, bool)
    for batch, message in segment.damaged(batches):
        intact[batch.start : batch.start + batch.n] = False
        if batch.start + batch.n <= segment.rows:  # the others are named by the truncation
            problems.append(Problem("checksum", message))
    nums = segment.nums[intact]
    foreign = (nums < 0) | (nums >= len(count))
    if foreign.any():
        message = f"segment {segment.info.sid} names {int(foreign.sum())} items that never existed"
        problems.append(Problem("unknown-item", message))
    np.add.at(count, nums[~foreign], 1)
    return problems, len(batches)


def _without_vector(
    snapshot: Snapshot, is_live: np.ndarray, pending: np.ndarray, has_vector: dict[str, np.ndarray]
) -> np.ndarray:
    """Live items that are in no part (pending ones are known to be)."""
    readable = np.zeros(snapshot.num_limit, bool)
    for fingerprint in set(snapshot.stack) & set(has_vector):
        readable |= has_vector[fingerprint] > 0
    readable[pending[pending < snapshot.num_limit]] = True
    return np.flatnonzero(is_live & ~readable)


def _orphans(storage: Storage) -> list[str]:
    with storage.catalog.reading() as db:
        known = {row[0] for row in db.execute("SELECT sid FROM segment")}
    suffixes = (".ids", *SUFFIX.values())
    return [
        f"{file} belongs to no segment; it is removed by the next upgrade or `compact`"
        for file in sorted(storage.segment_folder.iterdir())
        if file.suffix in suffixes and file.stem not in known
    ]


def _index_notes(storage: Storage) -> list[str]:
    """An index is a cache: damage of one is no damage of the gallery."""
    with storage.catalog.reading() as db:
        entries = ann.read_entries(db).values()
        left = ann.orphans(db, storage.path)
    found = [ann.problem_of(storage.path / ann.FOLDER / entry.file, entry) for entry in entries]
    notes = [f"{problem} (searches are exact until then)" for problem in found if problem is not None]
    return notes + [f"{file} belongs to no index; it is removed by the next upgrade or `compact`" for file in left]


def _ids(storage: Storage, nums: np.ndarray) -> str:
    found = storage.items(nums[:SHOWN])
    return ", ".join(repr(item.id) for item in found.values()) + (", ..." if len(nums) > SHOWN else "")
