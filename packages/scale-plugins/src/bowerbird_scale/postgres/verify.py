"""Checking a gallery in PostgreSQL: the invariants that hold at every epoch, and the vectors themselves.

Whether the server's own pages are whole is its own business (data checksums, on by default since PostgreSQL 18).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bowerbird.gallery.verify import SHOWN, Problem, Report
from bowerbird_scale.postgres.connection import Connection
from bowerbird_scale.postgres.schema import NEVER

if TYPE_CHECKING:
    from bowerbird_scale.postgres.storage import PostgresStorage


def verify(storage: PostgresStorage) -> Report:
    """Look at every row of one moment. Changes nothing and never raises for damage."""
    problems: list[Problem] = []
    damaged: set[str] = set()

    def found(kind: str, what: str, nums: list[int]) -> None:
        if nums:
            ids = [storage_ids[0] for storage_ids in _ids(db, nums)]
            damaged.update(ids)
            shown = ", ".join(map(repr, ids[:SHOWN])) + (", ..." if len(nums) > SHOWN else "")
            problems.append(Problem(kind, f"{len(nums)} items {what}: {shown or nums[:SHOWN]}"))

    with storage.db.reading() as db:
        snapshot = storage._load(db)
        stack = [snapshot.numbers[name] for name in snapshot.stack]
        live = db.value("SELECT count(*) FROM item WHERE deleted_epoch = 0")
        if live != snapshot.live:
            problems.append(Problem("count", f"the catalogue counts {snapshot.live} items and has {live}"))
        searched = (
            "SELECT item.num FROM item LEFT JOIN pending USING (num) LEFT JOIN member m ON m.num = item.num AND "
            f"m.space = ANY(%s) AND m.moved = {NEVER} AND m.gone = {NEVER} WHERE deleted_epoch = 0 "
            "GROUP BY item.num, pending.num HAVING {} ORDER BY item.num"
        )
        missing = db.execute(searched.format("count(m.num) = 0 AND pending.num IS NULL"), (stack,)).fetchall()
        found("missing", "have no vector", [row[0] for row in missing])
        doubled = db.execute(searched.format("count(m.num) > 1"), (stack,)).fetchall()
        found("doubled", "are searched in two spaces", [row[0] for row in doubled])
        ghosts = db.execute(
            f"SELECT m.num FROM member m JOIN item USING (num) WHERE m.gone = {NEVER} AND deleted_epoch > 0 ORDER BY 1"
        ).fetchall()
        found("unknown-item", "are searched although they were deleted", [row[0] for row in ghosts])
        rows = 0
        for part in snapshot.parts:
            counted = db.value(f"SELECT count(*) FROM member m WHERE {part.condition}")
            if counted != part.count:
                message = f"the catalogue counts {part.count} items in space {part.space} and has {counted}"
                problems.append(Problem("count", message))
        for fingerprint, number in snapshot.numbers.items():
            dim, space = snapshot.spaces[fingerprint].dim, snapshot.spaces[fingerprint]
            count, lost, bad = storage.db.vectors.problems(db, number, dim, snapshot.dtype)
            rows += count
            found("missing", f"have lost their vector in space {space}", lost)
            found("vector", f"have no vector of length 1 in space {space}", bad)
    return Report(
        epoch=snapshot.epoch,
        items=live,
        rows=rows,
        batches=0,
        problems=problems,
        notes=[],
        damaged_ids=sorted(damaged),
    )


def _ids(db: Connection, nums: list[int]) -> list[tuple[str]]:
    return db.execute("SELECT id FROM item WHERE num = ANY(%s) ORDER BY num", (nums,)).fetchall()
