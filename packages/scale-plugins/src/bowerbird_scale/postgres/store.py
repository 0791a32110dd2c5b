"""What changes a gallery in PostgreSQL: items, and the operations of an upgrade.

The vectors of a task and the note that it is done are one transaction: nothing is half done, whatever dies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError, UpgradeError
from bowerbird.gallery.snapshot import UpgradeState
from bowerbird.gallery.space import Item, Space
from bowerbird.gallery.storage import check_same_space
from bowerbird.gallery.store import complete_order
from bowerbird.gallery.tasks import MAX_FAILURES, Lease, Progress, Task
from bowerbird.gallery.vectors import unit_vectors
from bowerbird_scale.postgres import items as _items
from bowerbird_scale.postgres import tasks
from bowerbird_scale.postgres.connection import COMMIT_LOCK_SECONDS, Connection
from bowerbird_scale.postgres.schema import NEVER
from bowerbird_scale.postgres.snapshot import PostgresSnapshot
from bowerbird_scale.postgres.storage import PostgresStorage, active_upgrades, insert_space, next_epoch

# Live items that have no vector in any of these spaces.
_WITHOUT = (
    "SELECT num FROM item WHERE deleted_epoch = 0 AND NOT EXISTS "
    "(SELECT FROM member m WHERE m.num = item.num AND m.space = ANY(%s)) ORDER BY num"
)


class PostgresStore:
    """The operations that ``bowerbird.gallery.protocol.StoreLike`` names, over the storage of one gallery."""

    def __init__(self, storage: PostgresStorage) -> None:
        self.storage = storage
        self.db = storage.db

    def snapshot(self) -> PostgresSnapshot:
        return self.storage.snapshot()

    def items(self, nums: Iterable[int]) -> dict[int, Item]:
        return self.storage.items(nums)

    def add_items(self, ids: Sequence[str], vectors: Any, **columns: Any) -> NDArray[np.int64]:
        return _items.add_items(self.storage, ids, vectors, **columns)

    def delete_items(self, ids: Sequence[str]) -> int:
        return _items.delete_items(self.storage, ids)

    def compact(self) -> int:
        return _items.compact(self.storage)

    def fill(self, nums: NDArray[np.int64], vectors: Any) -> None:
        _items.fill(self.storage, nums, vectors)

    # ------------------------------------------------------------------------------------------------- upgrades

    def upgrade_state(self) -> UpgradeState | None:
        with self.db.reading() as db:
            upgrades = active_upgrades(db)
        return upgrades[-1] if upgrades else None

    def history(self) -> list[dict[str, Any]]:
        names = ("id", "old", "new", "state", "strategy", "merger", "order_name", "started_at", "ended_at")
        with self.db.reading() as db:
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
        """See ``bowerbird.gallery.store.Store.begin_upgrade``. No vector is written or moved."""
        if task_items < 1:
            raise InputError(f"task_items is {task_items}; it must be at least 1")
        self.db.vectors.check(to)
        with self.db.writing("begin an upgrade") as db:
            snapshot = self.storage._load(db)
            below = snapshot.upgrade
            if below is not None and not on_top:
                raise UpgradeError(
                    f"an upgrade to {snapshot.spaces[below.new]} is {below.state}; finish it or roll it back before "
                    "another one, or begin this one on top of it (on_top=True, --on-top)"
                )
            if to.fingerprint in snapshot.stack:
                what = "already serves" if below is None else "already has a part in"
                raise UpgradeError(f"the gallery {what} space {to}; there is nothing to upgrade")
            searched = [
                db.value(f"SELECT array_agg(num ORDER BY num) FROM member m WHERE {part.condition}")
                for part in snapshot.parts
            ]
            by_default = np.array([num for nums in searched for num in nums or ()], np.int64)
            plan = complete_order(order, by_default, snapshot.num_limit)
            pending = db.execute("SELECT num FROM pending ORDER BY num").fetchall()
            plan = np.concatenate([plan, np.array(pending, np.int64).ravel()])
            old = snapshot.parts[-1].space.fingerprint
            if to.fingerprint in snapshot.spaces:
                check_same_space(snapshot.spaces[to.fingerprint], to)
            else:
                insert_space(db, self.db.vectors, to, parent=old)
            if below is not None:
                db.execute("UPDATE upgrade SET state = 'covered' WHERE id = %s", (below.id,))
                db.execute(
                    "UPDATE task SET state = 'free', owner = NULL, lease_until = NULL "
                    "WHERE upgrade = %s AND state = 'leased'",
                    (below.id,),
                )
            upgrade = db.value(
                "INSERT INTO upgrade(old, new, state, strategy, merger, order_name, plan_rows, settings, started_at) "
                "VALUES (%s, %s, 'running', %s, %s, %s, %s, %s, extract(epoch FROM clock_timestamp())) RETURNING id",
                (old, to.fingerprint, strategy, merger, order_name, len(plan), json.dumps(dict(settings or {}))),
            )
            tasks.insert_tasks(db, upgrade, plan, task_items)
            next_epoch(db)
        state = self.upgrade_state()
        assert state is not None
        return state

    def set_state(self, state: str) -> None:
        """``running`` or ``paused``. A paused upgrade serves; it gives out no tasks, and takes those that are out."""
        if state not in ("running", "paused"):
            raise InputError(f"an upgrade's state can be set to 'running' or 'paused', not {state!r}")
        with self.db.writing("pause or resume the upgrade", wait=COMMIT_LOCK_SECONDS) as db:
            db.execute("UPDATE upgrade SET state = %s WHERE id = %s", (state, tasks.require_upgrade(db).id))
            next_epoch(db)

    def pause(self) -> None:
        self.set_state("paused")

    def resume(self) -> None:
        self.set_state("running")

    def lease_task(self, owner: str, lease_s: float = 300.0, *, most: int | None = None) -> Task | None:
        """The next free (or, by the server's clock, expired) task. Workers do not wait for each other."""
        with self.db.writing("lease a task", head=False) as db:
            return tasks.lease(db, owner, lease_s, most)

    def renew(self, task: Task, lease_s: float = 300.0) -> None:
        with self.db.writing("renew a lease", head=False) as db:
            tasks.check_lease(db, task)
            db.execute(
                "UPDATE task SET lease_until = clock_timestamp() + make_interval(secs => %s) WHERE id = %s",
                (lease_s, task.id),
            )

    def release_task(self, task: Task) -> None:
        with self.db.writing("give a task back", head=False) as db:
            tasks.check_lease(db, task)
            db.execute("UPDATE task SET state = 'free', owner = NULL, lease_until = NULL WHERE id = %s", (task.id,))

    def leases(self) -> list[Lease]:
        with self.db.reading() as db:
            return tasks.leases(db)

    def free_lease(self, lease: Lease) -> bool:
        with self.db.writing("free a lease", head=False) as db:
            return tasks.free_lease(db, lease)

    def fail_task(self, task: Task, error: str) -> None:
        with self.db.writing("note a failure", head=False) as db:
            tasks.check_lease(db, task)
            db.execute(
                "UPDATE task SET attempts = attempts + 1, error = %s, owner = NULL, lease_until = NULL, "
                "state = CASE WHEN attempts + 1 >= %s THEN 'failed' ELSE 'free' END WHERE id = %s",
                (error[:2000].replace("\0", " "), MAX_FAILURES, task.id),
            )

    def commit_task(
        self,
        task: Task,
        nums: Sequence[int] | NDArray[np.int64],
        vectors: Any,
        *,
        failures: Mapping[int, str] | None = None,
    ) -> None:
        """See ``bowerbird.gallery.store.Store.commit_task``."""
        failed = {int(num): str(error)[:2000].replace("\0", " ") for num, error in (failures or {}).items()}
        nums = np.asarray(nums, np.int64)
        if sorted([*nums.tolist(), *failed]) != sorted(task.nums.tolist()):
            raise InputError(
                f"task {task.id} has {len(task.items)} items; a commit must have a vector or an error for each, once, "
                f"and got {len(nums)} vectors and {len(failed)} errors"
            )
        with self.db.writing("commit a task", wait=COMMIT_LOCK_SECONDS) as db:
            tasks.check_lease(db, task)
            number, dim, dtype = db.row(
                "SELECT no, dim, dtype FROM upgrade JOIN space ON space.fingerprint = upgrade.new, head "
                "WHERE upgrade.id = %s",
                (task.upgrade,),
            )
            rows = unit_vectors(vectors, dim, count=len(nums))
            if len(nums):
                self._move(db, number, nums, rows, dtype)
            db.execute(
                "UPDATE task SET state = 'done', owner = NULL, lease_until = NULL, error = NULL WHERE id = %s",
                (task.id,),
            )
            for table in ("pending", "failure"):
                db.execute(f"DELETE FROM {table} WHERE num = ANY(%s)", (nums.tolist(),))
            self._requeue_failures(db, task, failed)

    def _move(self, db: Connection, number: int, nums: NDArray, rows: NDArray[np.float32], dtype: str) -> None:
        """The items are searched in the space ``number`` from a new epoch on. Those deleted meanwhile stay deleted."""
        given, epoch = nums.tolist(), next_epoch(db)
        self.db.vectors.write(db, number, nums, rows, dtype)
        db.execute(
            "WITH left_space AS (UPDATE member SET moved = %s, moved_to = %s WHERE num = ANY(%s) "
            f"AND moved = {NEVER} RETURNING space, gone), "
            f"counted AS (SELECT space, count(*) AS items FROM left_space WHERE gone = {NEVER} "
            "GROUP BY space) UPDATE space SET items = space.items - counted.items FROM counted "
            "WHERE no = counted.space",
            (epoch, number, given),
        )
        db.execute(
            "INSERT INTO member(num, space, since, gone) SELECT num, %s, %s, "
            f"CASE deleted_epoch WHEN 0 THEN {NEVER} ELSE deleted_epoch END FROM item WHERE num = ANY(%s)",
            (number, epoch, given),
        )
        db.execute(
            f"UPDATE space SET items = items + (SELECT count(*) FROM member WHERE space = %s AND gone = {NEVER} "
            "AND num = ANY(%s)) WHERE no = %s",
            (number, given, number),
        )

    def _requeue_failures(self, db: Connection, task: Task, failed: Mapping[int, str]) -> None:
        again = []
        for num, error in failed.items():
            attempts = db.value(
                "INSERT INTO failure VALUES (%s, %s, 1, %s) ON CONFLICT (upgrade, num) DO UPDATE SET "
                "attempts = failure.attempts + 1, error = excluded.error RETURNING attempts",
                (task.upgrade, num, error),
            )
            if attempts < MAX_FAILURES:
                again.append(num)
        if again:
            tasks.enqueue(db, task.upgrade, np.array(again, np.int64))

    def retry_failed(self) -> int:
        with self.db.writing("queue failed items again", wait=COMMIT_LOCK_SECONDS) as db:
            upgrade = tasks.require_upgrade(db)
            freed = db.execute(
                "UPDATE task SET state = 'free', attempts = 0 WHERE upgrade = %s AND state = 'failed' "
                "RETURNING cardinality(nums)",
                (upgrade.id,),
            ).fetchall()
            given_up = db.execute(
                "DELETE FROM failure WHERE upgrade = %s AND attempts >= %s RETURNING num", (upgrade.id, MAX_FAILURES)
            ).fetchall()
            if given_up:
                tasks.enqueue(db, upgrade.id, np.array(given_up, np.int64).ravel())
            return len(given_up) + sum(row[0] for row in freed)

    def progress(self) -> Progress:
        with self.db.reading() as db:
            upgrade = tasks.require_upgrade(db)
            rows = db.execute(
                "SELECT state, count(*), sum(cardinality(nums))::bigint FROM task WHERE upgrade = %s GROUP BY state",
                (upgrade.id,),
            ).fetchall()
            failures = db.execute(
                "SELECT id, attempts, error FROM failure JOIN item USING (num) "
                "WHERE upgrade = %s AND deleted_epoch = 0 ORDER BY num",
                (upgrade.id,),
            ).fetchall()
            snapshot = self.storage._load(db)
        return Progress(
            by_space={part.space.fingerprint: part.count for part in snapshot.parts},
            tasks={state: count for state, count, _ in rows},
            queued=sum(items for state, _, items in rows if state in ("free", "leased")),
            failures=failures,
        )

    # ------------------------------------------------------------------------------------------------- the end

    def finish_upgrade(self, *, verified: bool, leave_pending: bool = False) -> None:
        """See ``bowerbird.gallery.store.Store.finish_upgrade``."""
        if verified is not True:
            raise UpgradeError("finish drops the old vectors for good; verify the gallery first and pass verified=True")
        with self.db.writing("finish the upgrade", wait=COMMIT_LOCK_SECONDS) as db:
            snapshot = self.storage._load(db)
            upgrade = tasks.require_upgrade(db)
            left = db.execute(_WITHOUT, ([snapshot.numbers[upgrade.new]],)).fetchall()
            if left and not leave_pending:
                names = db.execute(
                    "SELECT id FROM item WHERE num = ANY(%s) ORDER BY num", ([row[0] for row in left[:5]],)
                ).fetchall()
                raise UpgradeError(
                    f"{len(left)} items have no vector of the new space yet "
                    f"({', '.join(repr(row[0]) for row in names)}, ...). Run the upgrade to its end; items that failed "
                    "can be deleted, or queued again with retry."
                )
            _set_pending(db, [row[0] for row in left])
            for lower in snapshot.upgrades[:-1]:
                _end(db, lower, "superseded")
            _end(db, upgrade, "finished")
            for fingerprint in snapshot.stack[:-1]:
                _forget_vectors(db, snapshot, fingerprint)
            db.execute("UPDATE head SET serving = %s", (upgrade.new,))
            next_epoch(db, dropped=True)
        self._sweep()

    def rollback(
        self,
        *,
        encode_old: Callable[[list[Item]], Any] | None = None,
        leave_pending: bool = False,
        batch_items: int = 256,
    ) -> int:
        """See ``bowerbird.gallery.store.Store.rollback``: the old vectors were never touched and count again."""
        upgrade = self.upgrade_state()
        if upgrade is None:
            raise UpgradeError("there is no upgrade to roll back")
        while True:
            missing = self._to_encode(upgrade)
            if len(missing) and encode_old is None and not leave_pending:
                raise UpgradeError(
                    f"{len(missing)} items were added or edited during the upgrade and have no vector of the old "
                    "space. Give the old encoder to encode them (encode_old, --old), or leave them unsearchable until "
                    "it is there (leave_pending=True, --leave-pending)."
                )
            if encode_old is not None:  # outside the transaction that ends the upgrade: encoding takes long
                self._give_old_vectors(upgrade, missing, encode_old, batch_items)
            left = self._end_rollback(upgrade, leave_pending=leave_pending)
            if left is not None:
                self._sweep()
                return left
            # Items came in between; once more.

    def _under_way(self, db: Connection, upgrade: UpgradeState) -> PostgresSnapshot:
        """The state of this moment, if ``upgrade`` is still the topmost one: a rollback is many transactions."""
        snapshot = self.storage._load(db)
        if snapshot.upgrade is None or snapshot.upgrade.id != upgrade.id:
            raise UpgradeError("the upgrade was ended, or another begun on top of it, by another process meanwhile")
        return snapshot

    def _to_encode(self, upgrade: UpgradeState) -> NDArray[np.int64]:
        """Live items without a vector in an older space, but for those that the upgrade below has in its queue."""
        with self.db.reading() as db:
            return _missing_below(db, self._under_way(db, upgrade))[0]

    def _give_old_vectors(
        self,
        upgrade: UpgradeState,
        missing: NDArray[np.int64],
        encode_old: Callable[[list[Item]], Any],
        batch_items: int,
    ) -> None:
        for start in range(0, len(missing), batch_items):
            chunk = missing[start : start + batch_items]
            found = self.items(chunk)
            vectors = encode_old([found[num] for num in chunk.tolist()])
            with self.db.writing("roll back the upgrade", wait=COMMIT_LOCK_SECONDS) as db:
                _items.append_rows(db, self._under_way(db, upgrade), upgrade.old, chunk, vectors)

    def _end_rollback(self, upgrade: UpgradeState, *, leave_pending: bool) -> int | None:
        """How many items are left pending; ``None`` where items came that must be encoded first."""
        with self.db.writing("roll back the upgrade", wait=COMMIT_LOCK_SECONDS) as db:
            snapshot = self._under_way(db, upgrade)
            to_encode, missing = _missing_below(db, snapshot)
            if len(to_encode) and not leave_pending:
                return None
            _end(db, upgrade, "rolled-back")
            number = snapshot.numbers[upgrade.new]
            _forget_vectors(db, snapshot, upgrade.new)
            db.execute(f"UPDATE member SET moved = {NEVER}, moved_to = NULL WHERE moved_to = %s", (number,))
            db.execute(
                f"UPDATE space SET items = (SELECT count(*) FROM member WHERE space = no AND gone = {NEVER} "
                f"AND moved = {NEVER})"
            )
            _set_pending(db, missing.tolist())
            if len(snapshot.upgrades) > 1:
                _uncover(db, snapshot, snapshot.upgrades[-2])
            next_epoch(db, dropped=True)
        return len(missing)

    def _sweep(self) -> None:
        """Give back the room of vectors that no committed state knows."""
        with self.db.writing("drop old vectors", wait=COMMIT_LOCK_SECONDS) as db:
            self.db.vectors.sweep(db)


def _missing_below(db: Connection, snapshot: PostgresSnapshot) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``(items that only the old encoder can help, live items without a vector in an older space)``."""
    older = [snapshot.numbers[name] for name in snapshot.stack[:-1]]
    missing = np.array(db.execute(_WITHOUT, (older,)).fetchall(), np.int64).ravel()
    waiting = tasks.queued(db, snapshot.upgrades[-2].id) if len(snapshot.upgrades) > 1 else np.empty(0, np.int64)
    return missing[~np.isin(missing, waiting)], missing


def _uncover(db: Connection, snapshot: PostgresSnapshot, upgrade: UpgradeState) -> None:
    """The upgrade on top has ended: this one is paused, and queues what came meanwhile."""
    db.execute("UPDATE upgrade SET state = 'paused' WHERE id = %s", (upgrade.id,))
    left = np.array(db.execute(_WITHOUT, ([snapshot.numbers[upgrade.new]],)).fetchall(), np.int64).ravel()
    given_up = db.execute("SELECT num FROM failure WHERE upgrade = %s", (upgrade.id,)).fetchall()
    known = np.concatenate([tasks.queued(db, upgrade.id), np.array(given_up, np.int64).ravel()])
    fresh = left[~np.isin(left, known)]
    if len(fresh):
        tasks.enqueue(db, upgrade.id, fresh)


def _set_pending(db: Connection, nums: Sequence[int]) -> None:
    db.execute("DELETE FROM pending")
    db.execute("INSERT INTO pending SELECT unnest(%s::bigint[])", (list(nums),))


def _end(db: Connection, upgrade: UpgradeState, state: str) -> None:
    db.execute(
        "UPDATE upgrade SET state = %s, ended_at = extract(epoch FROM clock_timestamp()) WHERE id = %s",
        (state, upgrade.id),
    )
    db.execute("DELETE FROM task WHERE upgrade = %s", (upgrade.id,))
    db.execute("DELETE FROM failure WHERE upgrade = %s", (upgrade.id,))


def _forget_vectors(db: Connection, snapshot: PostgresSnapshot, fingerprint: str) -> None:
    """Drop every vector of a space, and its index; the space itself stays known, under another number.

    A reader that began before must not find an empty place under the name that it knows.
    """
    number = snapshot.numbers[fingerprint]
    db.execute("DELETE FROM member WHERE space = %s", (number,))
    db.execute("DELETE FROM setting WHERE name = %s", (f"index:{fingerprint}",))
    fresh = db.value("UPDATE space SET no = DEFAULT, items = 0 WHERE no = %s RETURNING no", (number,))
    snapshot.db.vectors.forget(db, number)
    snapshot.db.vectors.create(db, fresh, snapshot.spaces[fingerprint].dim, snapshot.dtype)
