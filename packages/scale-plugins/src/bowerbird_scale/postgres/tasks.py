"""The queue of an upgrade: tasks in backfill order, leased with ``FOR UPDATE SKIP LOCKED`` by the server's clock."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import UpgradeError
from bowerbird.gallery.snapshot import UpgradeState
from bowerbird.gallery.space import Item
from bowerbird.gallery.tasks import Lease, LeaseLostError, Task
from bowerbird_scale.postgres.connection import Connection
from bowerbird_scale.postgres.storage import ITEM, active_upgrades, item_of_row

QUEUED_ITEMS = 1000  # per task, of items that come during an upgrade


def insert_tasks(db: Connection, upgrade: int, nums: NDArray[np.int64], task_items: int) -> None:
    with db.cursor().copy("COPY task(upgrade, nums) FROM STDIN") as copy:
        for start in range(0, len(nums), task_items):
            copy.write_row((upgrade, nums[start : start + task_items].tolist()))


def enqueue(db: Connection, upgrade: int, nums: NDArray[np.int64]) -> None:
    """Inside a transaction: put items at the end of the queue."""
    db.execute("UPDATE upgrade SET plan_rows = plan_rows + %s WHERE id = %s", (len(nums), upgrade))
    insert_tasks(db, upgrade, nums, QUEUED_ITEMS)


def require_upgrade(db: Connection) -> UpgradeState:
    upgrades = active_upgrades(db)
    if not upgrades:
        raise UpgradeError("no upgrade is under way in this gallery; begin one first")
    return upgrades[-1]


def lease(db: Connection, owner: str, lease_s: float, most: int | None = None) -> Task | None:
    """The next free or expired task; tasks that another worker is taking at this moment are passed over.

    ``most``: of a larger task only so many items, as a task of their own. What is left of it keeps its place.
    """
    while True:
        row = db.execute(
            "SELECT task.id, task.upgrade, nums, token FROM task JOIN upgrade ON upgrade.id = task.upgrade "
            "WHERE upgrade.state = 'running' AND "
            "(task.state = 'free' OR (task.state = 'leased' AND lease_until < clock_timestamp())) "
            "ORDER BY task.id LIMIT 1 FOR UPDATE OF task SKIP LOCKED"
        ).fetchone()
        if row is None:
            return None
        task, upgrade, nums, token = row
        if most is not None and len(nums) > most:
            db.execute(
                "UPDATE task SET nums = %s, state = 'free', owner = NULL, lease_until = NULL, token = token + 1 "
                "WHERE id = %s",
                (nums[most:], task),
            )
            nums, token = nums[:most], 0
            task = db.value("INSERT INTO task(upgrade, nums) VALUES (%s, %s) RETURNING id", (upgrade, nums))
        items = _live_items(db, nums)
        if not items:
            db.execute("UPDATE task SET state = 'done', owner = NULL WHERE id = %s", (task,))
            continue
        until = db.value(
            "UPDATE task SET state = 'leased', owner = %s, token = %s, "
            "lease_until = clock_timestamp() + make_interval(secs => %s) WHERE id = %s "
            "RETURNING extract(epoch FROM lease_until)::float8",
            (owner, token + 1, lease_s, task),
        )
        return Task(task, upgrade, token + 1, owner, until, items)


def check_lease(db: Connection, task: Task) -> None:
    """Lock the task and see that it is still this worker's.

    Raises:
        LeaseLostError: If it is another's, or free, or its upgrade ended or is covered by another.
    """
    row = db.execute(
        "SELECT task.state, owner, token, upgrade.state FROM task JOIN upgrade ON upgrade.id = task.upgrade "
        "WHERE task.id = %s AND upgrade.state IN ('running', 'paused') FOR UPDATE OF task",
        (task.id,),
    ).fetchone()
    if row is None or row[:3] != ("leased", task.owner, task.token):
        why = "the upgrade is over" if row is None else f"it is {row[0]} (owner {row[1]}, token {row[2]})"
        raise LeaseLostError(f"worker {task.owner} lost task {task.id} (token {task.token}): {why}")


def leases(db: Connection) -> list[Lease]:
    rows = db.execute(
        "SELECT task.id, owner, token, extract(epoch FROM lease_until)::float8 FROM task "
        "JOIN upgrade ON upgrade.id = task.upgrade "
        "WHERE task.state = 'leased' AND upgrade.state IN ('running', 'paused') ORDER BY task.id"
    ).fetchall()
    return [Lease(*row) for row in rows]


def free_lease(db: Connection, lease: Lease) -> bool:
    freed = db.execute(
        "UPDATE task SET state = 'free', owner = NULL, lease_until = NULL, token = token + 1 "
        "WHERE id = %s AND state = 'leased' AND owner = %s AND token = %s "
        "AND extract(epoch FROM lease_until)::float8 = %s",
        (lease.task, lease.owner, lease.token, lease.lease_until),
    )
    return freed.rowcount == 1


def queued(db: Connection, upgrade: int) -> NDArray[np.int64]:
    """Numbers in tasks that are not done, in any order."""
    rows = db.execute("SELECT nums FROM task WHERE upgrade = %s AND state <> 'done'", (upgrade,)).fetchall()
    return np.concatenate([np.empty(0, np.int64), *(np.array(row[0], np.int64) for row in rows)])


def _live_items(db: Connection, nums: list[int]) -> tuple[Item, ...]:
    rows = db.execute(f"SELECT {ITEM} FROM item WHERE num = ANY(%s) AND deleted_epoch = 0", (nums,)).fetchall()
    found = {row[1]: item_of_row(row) for row in rows}
    return tuple(found[num] for num in nums if num in found)
