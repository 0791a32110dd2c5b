"""The queue of an upgrade: its plan file, the tasks that are pieces of it, and who has leased which.

The plan is a file of item numbers in backfill order, ``plan/<name>.i64``; a task is a stretch ``[lo, hi)`` of it with a
checksum. The catalogue alone says which stretches count. Functions with ``db`` work inside the caller's transaction.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import UpgradeError
from bowerbird.gallery.catalog import DISK_FULL, disk_full
from bowerbird.gallery.segments import IDS, crc_of, sync_folder
from bowerbird.gallery.snapshot import UpgradeState
from bowerbird.gallery.space import Item
from bowerbird.gallery.storage import active_upgrade, item_of_row

MAX_FAILURES = 3  # then an item stays on its old vector and is listed


class LeaseLostError(UpgradeError):
    """The task was given to another worker, or the upgrade ended: what this worker encoded is dropped."""


@dataclass(frozen=True)
class Task:
    """A leased piece of an upgrade.

    Attributes:
        token: Fencing token; a later lease of the same task has a higher one.
        items: Live items to encode into the new space, in backfill order.
    """

    id: int
    upgrade: int
    token: int
    owner: str
    lease_until: float
    items: tuple[Item, ...]

    @property
    def nums(self) -> NDArray[np.int64]:
        return np.array([item.num for item in self.items], np.int64)


@dataclass(frozen=True)
class Lease:
    """A task in the hands of a worker; ``lease_until`` (seconds since 1970) moves whenever its owner renews it."""

    task: int
    owner: str
    token: int
    lease_until: float


@dataclass(frozen=True)
class Progress:
    """Counts of an upgrade.

    Attributes:
        by_space: Fingerprint -> live items that are searched in it.
        tasks: Task state (``free``, ``leased``, ``done``, ``failed``) -> tasks.
        queued: Items in tasks that are not done (an upper bound: deleted ones count until their task is leased).
        failures: ``(item id, attempts, error)`` of items that could not be encoded.
    """

    by_space: Mapping[str, int]
    tasks: Mapping[str, int]
    queued: int
    failures: Sequence[tuple[str, int, str]]

    @property
    def complete(self) -> bool:
        return self.queued == 0


def require_upgrade(db: sqlite3.Connection) -> UpgradeState:
    upgrade = active_upgrade(db)
    if upgrade is None:
        raise UpgradeError("no upgrade is under way in this gallery; begin one first")
    return upgrade


def check_lease(db: sqlite3.Connection, task: Task) -> None:
    row = db.execute(
        "SELECT task.state, owner, token FROM task JOIN upgrade ON upgrade.id = task.upgrade "
        "WHERE task.id = ? AND upgrade.state IN ('running', 'paused')",
        (task.id,),
    ).fetchone()
    if row != ("leased", task.owner, task.token):
        why = "the upgrade is over" if row is None else f"it is {row[0]} (owner {row[1]}, token {row[2]})"
        raise LeaseLostError(f"worker {task.owner} lost task {task.id} (token {task.token}): {why}")


def insert_tasks(db: sqlite3.Connection, upgrade: int, nums: NDArray[np.int64], offset: int, task_items: int) -> None:
    db.executemany(
        "INSERT INTO task(upgrade, lo, hi, crc) VALUES (?, ?, ?, ?)",
        [
            (upgrade, offset + lo, offset + min(lo + task_items, len(nums)), crc_of(nums[lo : lo + task_items]))
            for lo in range(0, len(nums), task_items)
        ],
    )


def live_items(db: sqlite3.Connection, nums: NDArray[np.int64], place: str) -> tuple[Item, ...]:
    rows = db.execute(
        "SELECT id, num, uri, content_hash, metadata FROM item "
        "WHERE num IN (SELECT value FROM json_each(?)) AND deleted_epoch = 0",
        (json.dumps(nums.tolist()),),
    )
    found = {row[1]: item_of_row(row, place) for row in rows}
    return tuple(found[num] for num in nums.tolist() if num in found)


def enqueue(folder: Path, db: sqlite3.Connection, nums: NDArray[np.int64]) -> None:
    """Inside a transaction: put items at the end of the queue of the upgrade under way."""
    upgrade = require_upgrade(db)
    name = db.execute("SELECT plan_file FROM upgrade WHERE id = ?", (upgrade.id,)).fetchone()[0]
    append_durably(folder / name, nums, upgrade.plan_rows)
    db.execute("UPDATE upgrade SET plan_rows = plan_rows + ? WHERE id = ?", (len(nums), upgrade.id))
    insert_tasks(db, upgrade.id, nums, upgrade.plan_rows, 1000)


def requeue_failures(folder: Path, db: sqlite3.Connection, task: Task, failed: Mapping[int, str]) -> None:
    again = []
    for num, error in failed.items():
        attempts = db.execute(
            "INSERT INTO failure VALUES (?, ?, 1, ?) ON CONFLICT DO UPDATE SET attempts = attempts + 1, error = "
            "excluded.error "
            "RETURNING attempts",
            (task.upgrade, num, error),
        ).fetchone()[0]
        if attempts < MAX_FAILURES:
            again.append(num)
    if again:
        enqueue(folder, db, np.array(again, np.int64))


def queued_items(folder: Path, db: sqlite3.Connection, upgrade: UpgradeState, num_limit: int) -> NDArray[np.bool_]:
    """By item number: whether it is in a task that is not done."""
    queued = np.zeros(num_limit, bool)
    tasks = db.execute("SELECT lo, hi, crc FROM task WHERE upgrade = ? AND state != 'done'", (upgrade.id,)).fetchall()
    for lo, hi, crc in tasks:
        with contextlib.suppress(UpgradeError):  # a damaged plan must not stand in the way of a rollback
            nums = read_plan(folder, db, upgrade.id, lo, hi, crc)
            queued[nums[nums < num_limit]] = True
    return queued


def read_plan(folder: Path, db: sqlite3.Connection, upgrade: int, lo: int, hi: int, crc: int) -> NDArray[np.int64]:
    name = db.execute("SELECT plan_file FROM upgrade WHERE id = ?", (upgrade,)).fetchone()[0]
    file = folder / name
    nums = np.fromfile(file, IDS, count=hi - lo, offset=lo * IDS.itemsize) if file.exists() else np.empty(0, IDS)
    if len(nums) != hi - lo or crc_of(nums) != crc:
        raise UpgradeError(
            f"rows {lo} to {hi - 1} of the plan {file} are damaged; roll the upgrade back and begin it again"
        )
    return nums


def cut(db: sqlite3.Connection, task: int, nums: NDArray[np.int64], most: int) -> None:
    """Make of a task with these numbers two: the first ``most`` stay its own, the others are one that is free."""
    db.execute(
        "INSERT INTO task(upgrade, lo, hi, crc) SELECT upgrade, lo + ?, hi, ? FROM task WHERE id = ?",
        (most, crc_of(nums[most:]), task),
    )
    db.execute("UPDATE task SET hi = lo + ?, crc = ? WHERE id = ?", (most, crc_of(nums[:most]), task))


def write_durably(file: Path, nums: NDArray[np.int64]) -> None:
    append_durably(file, nums, 0)
    sync_folder(file.parent)


def append_durably(file: Path, nums: NDArray[np.int64], offset: int) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            data = np.ascontiguousarray(nums, IDS).tobytes()
            if data and os.pwrite(descriptor, data, offset * IDS.itemsize) != len(data):
                raise OSError(28, "no space left for the plan")
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as exc:
        if exc.errno in DISK_FULL:
            raise disk_full(file, exc) from exc
        raise
