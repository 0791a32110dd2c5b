"""The low-level operations of an upgrade: tasks, leases, commits, finish and rollback.

An upgrade moves items from the old space to the new one in tasks. A worker leases a task, encodes its items and commits
their vectors with the task's fencing token; a worker that was too slow, or was declared dead, is refused at the commit.
Workers share a gallery with each other, with readers and with ingest, and each appends to a segment of its own.

Upgrades stack: while v1 -> v2 is under way, v2 -> v3 may be begun on top of it. Only the topmost one gives out tasks;
it moves every item, wherever it is, to the newest space. Rolling it back uncovers the one below, as it was; finishing
it ends them all.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import CorruptionError, InputError, UnknownNameError, UpgradeError
from bowerbird.gallery import ingest, tasks
from bowerbird.gallery.catalog import numbers
from bowerbird.gallery.segments import Batch, SegmentInfo, SegmentWriter
from bowerbird.gallery.snapshot import Snapshot, UpgradeState
from bowerbird.gallery.space import Item, Space
from bowerbird.gallery.storage import (
    Storage,
    active_upgrade,
    active_upgrades,
    check_same_space,
    insert_space,
    next_epoch,
)
from bowerbird.gallery.tasks import MAX_FAILURES, Lease, Progress, Task
from bowerbird.gallery.vectors import unit_vectors


class Store:
    """The operations of an upgrade over the ``Storage`` of one gallery. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.catalog = storage.catalog
        self.path = storage.path
        self.plan_folder = storage.path / "plan"

    def snapshot(self) -> Snapshot:
        """The newest committed state."""
        return self.storage.snapshot()

    def items(self, nums: Iterable[int]) -> dict[int, Item]:
        """Items by number, deleted ones included."""
        return self.storage.items(nums)

    def add_items(self, ids: Sequence[str], vectors: Any, **columns: Any) -> NDArray[np.int64]:
        """See ``Gallery.add``. Returns the new item numbers."""
        return ingest.add_items(self, ids, vectors, **columns)

    def delete_items(self, ids: Sequence[str]) -> int:
        """See ``Gallery.delete``."""
        return ingest.delete_items(self.storage, ids)

    def compact(self) -> int:
        """See ``Gallery.compact``."""
        return ingest.compact(self.storage)

    def fill(self, nums: NDArray[np.int64], vectors: Any) -> None:
        """Give pending items their vectors of the serving space.

        Raises:
            UnknownNameError: If one of them is not pending (any more): it would have two vectors.
        """
        with self.catalog.exclusive("fill pending items"):
            snapshot = self.snapshot()
            done = np.setdiff1d(nums, [item.num for item in self.storage.pending()])
            if len(done):
                names = [item.id for item in self.items(done[:5]).values()]
                raise UnknownNameError(f"{len(done)} items are not pending any more: {', '.join(map(repr, names))}")
            self.storage.append_rows(snapshot.spaces[snapshot.serving], nums, vectors)

    def upgrade_state(self) -> UpgradeState | None:
        """The upgrade that is running or paused: the topmost one."""
        with self.catalog.reading() as db:
            return active_upgrade(db)

    def history(self) -> list[dict[str, Any]]:
        """Every upgrade of this gallery, oldest first: old, new, state, strategy, started_at, ended_at."""
        names = ("id", "old", "new", "state", "strategy", "merger", "order_name", "started_at", "ended_at")
        with self.catalog.reading() as db:
            rows = db.execute(f"SELECT {', '.join(names)} FROM upgrade ORDER BY id").fetchall()
        return [dict(zip(names, row, strict=True)) for row in rows]

    def begin_upgrade(
        self,
        to: Space,
        *,
        strategy: str,
        order_name: str,
        order: NDArray[np.int64] | None = None,
        merger: str = "core:distance",
        task_items: int = 1000,
        settings: Mapping[str, Any] | None = None,
        on_top: bool = False,
    ) -> UpgradeState:
        """Start to move every item to the space ``to``.

        The vectors of each part are first written once more in backfill order, so that what is not yet moved is one
        contiguous stretch at every moment: that is what keeps a half-migrated gallery as fast as a whole one. Search
        results do not change.

        Args:
            order: Item numbers in backfill order (a permutation of the numbers of ``snapshot().parts``); items that
                came since are appended, items that were deleted since are left out. ``None``: the oldest space first,
                in each by number.
            task_items: Items per task.
            settings: Plain JSON data kept with the upgrade (and given back in ``UpgradeState.settings``).
            on_top: Where an upgrade is under way, cover it instead of refusing: its tasks that are out are lost.

        Raises:
            UpgradeError: If an upgrade is under way (without ``on_top``), or ``to`` is a space of the gallery's parts.
            CorruptionError: If vectors that are needed are damaged.
            InputError: If ``order`` has an item twice or one that never existed.
        """
        if task_items < 1:
            raise InputError(f"task_items is {task_items}; it must be at least 1")
        with self.catalog.exclusive("begin an upgrade"), self.storage.appending():
            snapshot = self.snapshot()
            below = snapshot.upgrade
            if below is not None and not on_top:
                raise UpgradeError(
                    f"an upgrade to {snapshot.spaces[below.new]} is {below.state}; finish it or roll it back before "
                    "another one, or begin this one on top of it (on_top=True, --on-top)"
                )
            if to.fingerprint in snapshot.stack:
                what = "already serves" if below is None else "already has a part in"
                raise UpgradeError(f"the gallery {what} space {to}; there is nothing to upgrade")
            if below is not None:
                self._halt(below)
            try:
                self._begin(
                    to, strategy, order_name, order, merger, task_items, dict(settings or {}), self.snapshot(), below
                )
            except BaseException:
                if below is not None:
                    self.set_state(below.state)
                raise
        self.storage.collect_garbage()
        state = self.upgrade_state()
        assert state is not None
        return state

    def _begin(
        self,
        to: Space,
        strategy: str,
        order_name: str,
        order: NDArray[np.int64] | None,
        merger: str,
        task_items: int,
        settings: Mapping[str, Any],
        snapshot: Snapshot,
        below: UpgradeState | None,
    ) -> None:
        self.storage.refuse_unreadable(snapshot)
        parts = snapshot.parts
        if below is not None and snapshot.problems:
            raise CorruptionError(
                f"vectors to which a rollback would return are damaged ({snapshot.problems[0]}). `bowerbird gallery "
                f"verify {self.path}` names them; replace or delete those items first."
            )
        by_default = np.concatenate([np.sort(part.nums) for part in parts])
        queue = complete_order(order, by_default, snapshot.num_limit)
        with self.catalog.reading() as db:
            pending = numbers(db, "SELECT num FROM pending ORDER BY num")
        plan = np.concatenate([queue, pending])
        plan_file = f"{secrets.token_hex(6)}.i64"
        tasks.write_durably(self.plan_folder / plan_file, plan)
        packed: list[tuple[SegmentWriter, list[Batch]]] = []
        try:
            for part in parts:
                stored = snapshot.rows_of(part.space.fingerprint)
                covered = stored.nums[~part.contains(stored.nums)]  # moved on; a rollback returns to them
                waiting = queue[part.contains(queue)]
                packed.append(self.storage.write_packed(stored, np.concatenate([waiting, covered])))
            with self.catalog.writing() as db:
                known = db.execute(
                    "SELECT fingerprint, encoder, dim, metric FROM space WHERE fingerprint = ?", (to.fingerprint,)
                ).fetchone()
                if known is None:
                    insert_space(db, to, parent=parts[-1].space.fingerprint)
                else:
                    check_same_space(Space(*known), to)
                epoch = next_epoch(db)
                if epoch != snapshot.epoch + 1:
                    raise UpgradeError("the gallery was changed while the upgrade was begun; begin it again")
                # Rows that are not in the repacked segments are dead or belong to an upgrade rolled back.
                _forget_segments(db, (*snapshot.stack, to.fingerprint))
                for writer, batches in packed:
                    self.storage.record_batches(db, writer, batches, epoch)
                if below is not None:
                    db.execute("UPDATE upgrade SET state = 'covered' WHERE id = ?", (below.id,))
                upgrade = db.execute(
                    "INSERT INTO upgrade(old, new, state, strategy, merger, order_name, plan_file, plan_rows, "
                    "settings, started_at) VALUES (?, ?, 'running', ?, ?, ?, ?, ?, ?, ?)",
                    (
                        parts[-1].space.fingerprint, to.fingerprint, strategy, merger, order_name, plan_file, len(plan),
                        json.dumps(settings), time.time(),
                    ),
                ).lastrowid  # fmt: skip
                assert upgrade is not None
                tasks.insert_tasks(db, upgrade, plan, 0, task_items)
        except BaseException:
            for writer, _ in packed:
                self.storage.take_back(writer, whole=True)
            with self.catalog.reading() as db:  # an interrupt can come right after the commit
                begun = db.execute("SELECT 1 FROM upgrade WHERE plan_file = ?", (plan_file,)).fetchone()
            if begun is None:
                (self.plan_folder / plan_file).unlink(missing_ok=True)
            raise
        for writer, _ in packed:
            writer.committed()
            writer.close()

    def _halt(self, upgrade: UpgradeState) -> None:
        """Pause an upgrade and take its tasks back: nothing is committed to it from now on."""
        with self.catalog.writing() as db:
            db.execute("UPDATE upgrade SET state = 'paused' WHERE id = ?", (upgrade.id,))
            db.execute(
                "UPDATE task SET state = 'free', owner = NULL, lease_until = NULL "
                "WHERE upgrade = ? AND state = 'leased'",
                (upgrade.id,),
            )
            next_epoch(db)

    def lease_task(
        self, owner: str, lease_s: float = 300.0, *, most: int | None = None, now: float | None = None
    ) -> Task | None:
        """The next free (or expired) task, leased to ``owner`` for ``lease_s`` seconds.

        Args:
            most: Lease so many items at most; the rest of a larger task becomes a task of its own, which is next.

        Returns ``None`` where the upgrade is paused, over, or every task is done or leased: ``progress`` tells which.
        """
        now = time.time() if now is None else now
        with self.catalog.writing() as db:
            upgrade = active_upgrade(db)
            if upgrade is None or upgrade.state != "running":
                return None
            while True:
                row = db.execute(
                    "SELECT id, lo, hi, crc, token FROM task WHERE upgrade = ? AND "
                    "(state = 'free' OR (state = 'leased' AND lease_until < ?)) ORDER BY lo LIMIT 1",
                    (upgrade.id, now),
                ).fetchone()
                if row is None:
                    return None
                task, lo, hi, crc, token = row
                nums = tasks.read_plan(self.plan_folder, db, upgrade.id, lo, hi, crc)
                if most is not None and len(nums) > most:
                    tasks.cut(db, task, nums, most)
                    nums = nums[:most]
                items = tasks.live_items(db, nums, self.storage.place)
                if not items:
                    db.execute("UPDATE task SET state = 'done', owner = NULL WHERE id = ?", (task,))
                    continue
                db.execute(
                    "UPDATE task SET state = 'leased', owner = ?, token = ?, lease_until = ? WHERE id = ?",
                    (owner, token + 1, now + lease_s, task),
                )
                return Task(task, upgrade.id, token + 1, owner, now + lease_s, items)

    def renew(self, task: Task, lease_s: float = 300.0, *, now: float | None = None) -> None:
        """Extend a lease while encoding. Raises ``LeaseLostError`` if the task is no longer this worker's."""
        now = time.time() if now is None else now
        with self.catalog.writing() as db:
            tasks.check_lease(db, task)
            db.execute("UPDATE task SET lease_until = ? WHERE id = ?", (now + lease_s, task.id))

    def release_task(self, task: Task) -> None:
        """Give a task back untouched (a worker that stops)."""
        with self.catalog.writing() as db:
            tasks.check_lease(db, task)
            db.execute("UPDATE task SET state = 'free', owner = NULL, lease_until = NULL WHERE id = ?", (task.id,))

    def leases(self) -> list[Lease]:
        """The tasks of the upgrade under way that workers have in hand; none outside upgrades."""
        with self.catalog.reading() as db:
            rows = db.execute(
                "SELECT task.id, owner, token, lease_until FROM task JOIN upgrade ON upgrade.id = task.upgrade "
                "WHERE task.state = 'leased' AND upgrade.state IN ('running', 'paused') ORDER BY task.id"
            ).fetchall()
        return [Lease(*row) for row in rows]

    def free_lease(self, lease: Lease) -> bool:
        """Take a task from a worker that is known to be dead. ``False`` if it is no longer its task, or was renewed.

        Where the worker lives after all, its commit is refused by the fencing token.
        """
        with self.catalog.writing() as db:
            freed = db.execute(
                "UPDATE task SET state = 'free', owner = NULL, lease_until = NULL, token = token + 1 "
                "WHERE id = ? AND state = 'leased' AND owner = ? AND token = ? AND lease_until = ?",
                (lease.task, lease.owner, lease.token, lease.lease_until),
            )
            return freed.rowcount == 1

    def commit_task(
        self,
        task: Task,
        nums: Sequence[int] | NDArray[np.int64],
        vectors: Any,
        *,
        failures: Mapping[int, str] | None = None,
    ) -> None:
        """Make the new vectors of a task visible, in one atomic step.

        Args:
            nums: Numbers of the items that were encoded.
            vectors: ``(len(nums), dim)`` of the new space.
            failures: Number -> error of the items that could not be encoded. Such an item is queued again; after
                ``MAX_FAILURES`` it stays on its old vector and is listed by ``progress``.

        Raises:
            LeaseLostError: If another worker has the task by now, or the upgrade ended. Nothing is changed.
            InputError: If items of the task are missing, or others are given, or vectors cannot be used.
        """
        failed = {int(num): str(error)[:2000] for num, error in (failures or {}).items()}
        nums = np.asarray(nums, np.int64)
        given = [*nums.tolist(), *failed]
        if sorted(given) != sorted(task.nums.tolist()):
            raise InputError(
                f"task {task.id} has {len(task.items)} items; a commit must have a vector or an error for each, "
                "once, and got "
                f"{len(nums)} vectors and {len(failed)} errors"
            )
        with self.storage.appending():
            with self.catalog.reading() as db:
                tasks.check_lease(db, task)
                space = _space(db, db.execute("SELECT new FROM upgrade WHERE id = ?", (task.upgrade,)).fetchone()[0])
            rows = unit_vectors(vectors, space.dim, count=len(nums))
            writer = self.storage.writer_for(space)
            try:
                batches = []
                if len(nums):
                    writer.append(rows, nums)
                    batches = writer.sync()
                with self.catalog.writing() as db:
                    tasks.check_lease(db, task)
                    self.storage.record_batches(db, writer, batches, next_epoch(db)) if batches else None
                    db.execute(
                        "UPDATE task SET state = 'done', owner = NULL, lease_until = NULL, error = NULL WHERE id = ?",
                        (task.id,),
                    )
                    done = json.dumps(nums.tolist())
                    for table in ("pending", "failure"):
                        db.execute(f"DELETE FROM {table} WHERE num IN (SELECT value FROM json_each(?))", (done,))
                    tasks.requeue_failures(self.plan_folder, db, task, failed)
            except BaseException:
                self.storage.take_back(writer)
                raise
            writer.committed()

    def fail_task(self, task: Task, error: str) -> None:
        """The whole task failed (not one item of it): back into the queue, or set aside after ``MAX_FAILURES``."""
        with self.catalog.writing() as db:
            tasks.check_lease(db, task)
            db.execute(
                "UPDATE task SET attempts = attempts + 1, error = ?, owner = NULL, lease_until = NULL, "
                "state = CASE WHEN attempts + 1 >= ? THEN 'failed' ELSE 'free' END WHERE id = ?",
                (error[:2000], MAX_FAILURES, task.id),
            )

    def retry_failed(self) -> int:
        """Queue every failed task and item again, with its failures forgotten. Returns how many items."""
        with self.catalog.writing() as db:
            upgrade = tasks.require_upgrade(db)
            failed = db.execute(
                "UPDATE task SET state = 'free', attempts = 0 WHERE upgrade = ? AND state = 'failed' RETURNING hi - lo",
                (upgrade.id,),
            ).fetchall()
            nums = [
                row[0]
                for row in db.execute(
                    "SELECT num FROM failure WHERE upgrade = ? AND attempts >= ?", (upgrade.id, MAX_FAILURES)
                )
            ]
            db.execute("DELETE FROM failure WHERE upgrade = ? AND attempts >= ?", (upgrade.id, MAX_FAILURES))
            if nums:
                self.enqueue(db, np.array(nums, np.int64))
            return len(nums) + sum(row[0] for row in failed)

    def set_state(self, state: str) -> None:
        """``running`` or ``paused``. A paused upgrade serves; it gives out no tasks, and takes those that are out."""
        if state not in ("running", "paused"):
            raise InputError(f"an upgrade's state can be set to 'running' or 'paused', not {state!r}")
        with self.catalog.writing() as db:
            upgrade = tasks.require_upgrade(db)
            db.execute("UPDATE upgrade SET state = ? WHERE id = ?", (state, upgrade.id))
            next_epoch(db)

    def pause(self) -> None:
        self.set_state("paused")

    def resume(self) -> None:
        self.set_state("running")

    def progress(self) -> Progress:
        """How far the upgrade is.

        Raises:
            UpgradeError: If none is under way.
        """
        with self.catalog.reading() as db:
            upgrade = tasks.require_upgrade(db)
            by_state = dict(
                db.execute(
                    "SELECT state, count(*) FROM task WHERE upgrade = ? GROUP BY state", (upgrade.id,)
                ).fetchall()
            )
            queued = db.execute(
                "SELECT coalesce(sum(hi - lo), 0) FROM task WHERE upgrade = ? AND state IN ('free', 'leased')",
                (upgrade.id,),
            ).fetchone()[0]
            failures = db.execute(
                "SELECT id, attempts, error FROM failure JOIN item USING (num) WHERE upgrade = ? AND deleted_epoch = "
                "0 ORDER BY num",
                (upgrade.id,),
            ).fetchall()
        # After the tasks: a commit between the two looks must not seem complete before its items have moved.
        by_space = {part.space.fingerprint: part.count for part in self.snapshot().parts}
        return Progress(by_space, by_state, queued, failures)

    def finish_upgrade(self, *, verified: bool, leave_pending: bool = False) -> None:
        """Serve the newest space only, and drop the vectors of every older one. There is no way back.

        Upgrades that this one is on top of end with it.

        Args:
            verified: That the caller has verified the new vectors (``gallery.verify().ok``).
            leave_pending: Items without a new vector become *pending* (see ``rollback``) instead of an error.

        Raises:
            UpgradeError: If it was not verified, or items still have no new vector; names some of them.
        """
        if verified is not True:
            raise UpgradeError("finish drops the old vectors for good; verify the gallery first and pass verified=True")
        with self.catalog.exclusive("finish the upgrade"), self.storage.appending(), self.catalog.writing() as db:
            upgrade = tasks.require_upgrade(db)
            left = self._without_new_vector(db, upgrade)
            if left and not leave_pending:
                names = [row[0] for row in db.execute(_ITEM_IDS, (json.dumps(left[:5]),))]
                raise UpgradeError(
                    f"{len(left)} items have no vector of the new space yet ({', '.join(map(repr, names))}, ...). "
                    "Run the upgrade "
                    "to its end; items that failed can be deleted, or queued again with retry."
                )
            db.execute("DELETE FROM pending")
            db.executemany("INSERT INTO pending VALUES (?)", [(num,) for num in left])
            next_epoch(db)
            for lower in active_upgrades(db)[:-1]:
                _forget_segments(db, (lower.old,))
                _end(db, lower, "superseded")
            _forget_segments(db, (upgrade.old,))
            db.execute("UPDATE head SET serving = ?", (upgrade.new,))
            _end(db, upgrade, "finished")
        self._remove_plans()
        self.storage.collect_garbage()

    def rollback(
        self,
        *,
        encode_old: Callable[[list[Item]], Any] | None = None,
        leave_pending: bool = False,
        batch_items: int = 256,
    ) -> int:
        """Back to the exact old state: every old vector is still there and becomes the truth again.

        An upgrade that this one is on top of comes back as it was, paused.

        Items that came (or whose content changed) during the upgrade have only a new vector. They need an old one:

        Args:
            encode_old: Encodes a list of items in the *old* space, ``(N, old dim)``.
            leave_pending: Without ``encode_old``: keep such items as *pending*. They stay in the gallery, are not
                found by
                searches, and are listed by ``Gallery.pending`` until ``Gallery.fill`` gives them a vector.
            batch_items: Items per call of ``encode_old``.

        Returns:
            How many items were left pending.

        Raises:
            UpgradeError: If there are such items and neither argument is given; nothing is changed.
        """
        with self.catalog.exclusive("roll back the upgrade"), self.storage.appending():
            snapshot = self.snapshot()
            if snapshot.upgrade is None:
                raise UpgradeError("there is no upgrade to roll back")
            missing = self._without_old_vector(snapshot)
            if len(snapshot.upgrades) > 1:  # what the upgrade below has queued, its own workers encode
                with self.catalog.reading() as db:
                    queued = tasks.queued_items(self.plan_folder, db, snapshot.upgrades[-2], snapshot.num_limit)
            else:
                queued = np.zeros(snapshot.num_limit, bool)
            to_encode = missing[~queued[missing]]
            if len(to_encode) and encode_old is None and not leave_pending:
                raise UpgradeError(
                    f"{len(to_encode)} items were added or edited during the upgrade and have no vector of the old "
                    "space. Give the old encoder to encode them (encode_old, --old), or leave them unsearchable until "
                    "it is there (leave_pending=True, --leave-pending)."
                )
            if encode_old is not None:
                old = snapshot.spaces[snapshot.upgrade.old]
                for start in range(0, len(to_encode), batch_items):
                    chunk = to_encode[start : start + batch_items]
                    found = self.items(chunk)
                    self.storage.append_rows(old, chunk, encode_old([found[num] for num in chunk.tolist()]))
                missing = missing[queued[missing]]
            with self.catalog.writing() as db:
                upgrade = tasks.require_upgrade(db)
                next_epoch(db)
                _forget_segments(db, (upgrade.new,))
                db.execute("DELETE FROM pending")
                # A worker may have committed after the snapshot, but only for items that had an old vector or were
                # pending.
                db.executemany("INSERT INTO pending VALUES (?)", [(num,) for num in missing.tolist()])
                _end(db, upgrade, "rolled-back")
                if len(snapshot.upgrades) > 1:
                    self._uncover(db, snapshot.upgrades[-2])
        self._remove_plans()
        self.storage.collect_garbage()
        return len(missing)

    def _uncover(self, db: sqlite3.Connection, upgrade: UpgradeState) -> None:
        """Inside the transaction that ended the upgrade on top: this one is paused, and queues what came meanwhile."""
        db.execute("UPDATE upgrade SET state = 'paused' WHERE id = ?", (upgrade.id,))
        left = np.array(self._without_new_vector(db, upgrade), np.int64)
        known = tasks.queued_items(self.plan_folder, db, upgrade, int(left.max()) + 1 if len(left) else 0)
        given_up = db.execute("SELECT num FROM failure WHERE upgrade = ?", (upgrade.id,)).fetchall()
        known[[num for (num,) in given_up if num < len(known)]] = True
        fresh = left[~known[left]]
        if len(fresh):
            self.enqueue(db, fresh)

    def enqueue(self, db: sqlite3.Connection, nums: NDArray[np.int64]) -> None:
        """Inside a transaction: put items at the end of the queue of the upgrade under way."""
        tasks.enqueue(self.plan_folder, db, nums)

    def _without_new_vector(self, db: sqlite3.Connection, upgrade: UpgradeState) -> list[int]:
        """Live items without an intact row of the new space, as of the transaction ``db``."""
        has = np.zeros(db.execute("SELECT next_num FROM head").fetchone()[0], bool)
        for row in db.execute(
            "SELECT sid, space, dtype, dim, rows FROM segment WHERE space = ?", (upgrade.new,)
        ).fetchall():
            segment = self.storage.map_segment(SegmentInfo(*row))
            has[segment.nums] = True
        live = numbers(db, _LIVE)
        return live[~has[live]].tolist()

    def _without_old_vector(self, snapshot: Snapshot) -> NDArray[np.int64]:
        has = np.zeros(snapshot.num_limit, bool)
        for part in snapshot.parts_below:
            has[part.nums] = True
        with self.catalog.reading() as db:
            live = numbers(db, _LIVE)
        return live[~has[live]]

    def _remove_plans(self) -> None:
        with self.catalog.writing() as db:
            active = {
                row[0]
                for row in db.execute("SELECT plan_file FROM upgrade WHERE state IN ('running', 'paused', 'covered')")
            }
            for file in self.plan_folder.glob("*.i64"):
                if file.name not in active:
                    file.unlink(missing_ok=True)


_LIVE = "SELECT num FROM item WHERE deleted_epoch = 0 ORDER BY num"
_ITEM_IDS = "SELECT id FROM item WHERE num IN (SELECT value FROM json_each(?)) ORDER BY num"


def _end(db: sqlite3.Connection, upgrade: UpgradeState, state: str) -> None:
    db.execute("UPDATE upgrade SET state = ?, ended_at = ? WHERE id = ?", (state, time.time(), upgrade.id))
    db.execute("DELETE FROM task WHERE upgrade = ?", (upgrade.id,))
    db.execute("DELETE FROM failure WHERE upgrade = ?", (upgrade.id,))


def _space(db: sqlite3.Connection, fingerprint: str) -> Space:
    return Space(
        *db.execute(
            "SELECT fingerprint, encoder, dim, metric FROM space WHERE fingerprint = ?", (fingerprint,)
        ).fetchone()
    )


def _forget_segments(db: sqlite3.Connection, fingerprints: Iterable[str]) -> None:
    for fingerprint in fingerprints:
        db.execute("DELETE FROM batch WHERE sid IN (SELECT sid FROM segment WHERE space = ?)", (fingerprint,))
        db.execute("DELETE FROM segment WHERE space = ?", (fingerprint,))


def complete_order(order: Any, nums: NDArray[np.int64], num_limit: int) -> NDArray[np.int64]:
    """``order`` without the items that are gone, and with those that it lacks appended; ``nums`` for no order."""
    if order is None:
        return nums
    order = np.asarray(order, np.int64).ravel()
    if len(order) and (order.min() < 0 or order.max() >= num_limit):
        raise InputError(f"the backfill order names item numbers outside 0 to {num_limit - 1}, which no item has")
    seen = np.zeros(num_limit, bool)
    seen[order] = True
    if np.count_nonzero(seen) != len(order):
        raise InputError("the backfill order has an item twice; it must be a permutation of the gallery's item numbers")
    live = np.zeros(num_limit, bool)
    live[nums] = True
    return np.concatenate([order[live[order]], nums[~seen[nums]]])
