"""Items in and out of a gallery in PostgreSQL. A call is one transaction."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError, SpaceError, UnknownNameError
from bowerbird.gallery.vectors import checked_ids, checked_items, unit_vectors
from bowerbird_scale.postgres.connection import Connection
from bowerbird_scale.postgres.schema import NEVER
from bowerbird_scale.postgres.storage import next_epoch
from bowerbird_scale.postgres.tasks import enqueue

if TYPE_CHECKING:
    from bowerbird_scale.postgres.storage import PostgresStorage


ANALYZE_FROM = 1000


def add_items(
    storage: PostgresStorage,
    ids: Sequence[str],
    vectors: Any,
    *,
    uris: Sequence[str | None] | None = None,
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    content_hashes: Sequence[str | None] | None = None,
    space: str | None = None,
    replace: bool = False,
) -> NDArray[np.int64]:
    """See ``Gallery.add``. Returns the new item numbers."""
    names, vectors, columns = checked_items(ids, vectors, uris, content_hashes, metadata)
    columns = (columns[0], columns[1], columns[2] and [_as_kept(row, text) for row, text in enumerate(columns[2])])
    if not names:
        return np.empty(0, np.int64)
    target = storage.snapshot().space_to_write(space)
    if vectors.shape[1] != target.dim:
        raise SpaceError(f"vectors have width {vectors.shape[1]}; space {target} has width {target.dim}")
    rows = unit_vectors(vectors, target.dim, stored_as=storage.dtype)
    with storage.db.writing("add items") as db:
        snapshot = storage._load(db)
        snapshot.space_to_write(target.fingerprint)  # an upgrade may have ended since
        there = [row[0] for row in db.execute(_THERE, (names,)).fetchall()]
        if there and not replace:
            shown = ", ".join(map(repr, sorted(there)[:5]))
            raise InputError(
                f"{len(there)} ids are in the gallery already ({shown}{', ...' if len(there) > 5 else ''}); nothing "
                "was added. Leave them out, or pass replace=True to replace their content."
            )
        epoch = next_epoch(db)
        _bury(db, there, epoch)
        nums = np.arange(snapshot.num_limit, snapshot.num_limit + len(names), dtype=np.int64)
        number = snapshot.numbers[target.fingerprint]
        with db.cursor().copy("COPY item(num, id, uri, content_hash, metadata, added_epoch) FROM STDIN") as copy:
            given = [column if column is not None else [None] * len(names) for column in columns]
            for values in zip(nums.tolist(), names, *given, strict=True):
                copy.write_row((*values, epoch))
        storage.db.vectors.write(db, number, nums, rows, snapshot.dtype)
        db.execute(
            "INSERT INTO member(num, space, since) SELECT num, %s, %s FROM generate_series(%s::bigint, %s) num",
            (number, epoch, int(nums[0]), int(nums[-1])),
        )
        db.execute("UPDATE head SET live = live + %s, next_num = next_num + %s", (len(names) - len(there), len(names)))
        db.execute("UPDATE space SET items = items + %s WHERE no = %s", (len(names), number))
        if snapshot.upgrade is not None and target.fingerprint != snapshot.upgrade.new:
            enqueue(db, snapshot.upgrade.id, nums)
    if len(names) >= ANALYZE_FROM and (snapshot.num_limit + len(names)).bit_length() > snapshot.num_limit.bit_length():
        # Until the server has looked at a table that grew it plans as if it were small, and searches slowly.
        with storage.db.outside() as db:
            storage.db.vectors.analyze(db, number)
    return nums


# In JSON: texts, which stay as they are, and whole numbers that Python writes with an exponent.
_TEXT_OR_LARGE = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9.]+e\+[0-9]+')
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def _as_kept(row: int, text: str | None) -> str | None:
    """Metadata as JSON in which ``jsonb`` changes nothing: it would write 1e+20 out, and then it were no float."""
    if text is None:
        return None
    if _NUL.search(text):
        raise InputError(f"metadata: row {row} has a NUL character, which PostgreSQL cannot keep")
    if "e+" in text:
        text = _TEXT_OR_LARGE.sub(lambda m: m[0] if m[0][0] == '"' else f"{int(float(m[0]))}.0", text)
    return text


_THERE = "SELECT id FROM item WHERE deleted_epoch = 0 AND id = ANY(%s)"


def delete_items(storage: PostgresStorage, ids: Sequence[str]) -> int:
    """See ``Gallery.delete``."""
    names = checked_ids(ids)
    if not names:
        return 0
    with storage.db.writing("delete items") as db:
        there = {row[0] for row in db.execute(_THERE, (names,)).fetchall()}
        missing = [name for name in names if name not in there]
        if missing:
            raise UnknownNameError(
                f"{len(missing)} of {len(names)} ids are not in the gallery ({', '.join(map(repr, missing[:5]))}); "
                f"nothing was deleted.{storage.close_id(missing[0])}"
            )
        _bury(db, names, next_epoch(db))
        db.execute("UPDATE head SET live = live - %s", (len(names),))
    return len(names)


def _bury(db: Connection, names: Sequence[str], epoch: int) -> None:
    """Mark the live items of these ids as deleted, from ``epoch`` on."""
    if not names:
        return
    rows = db.execute(
        "UPDATE item SET deleted_epoch = %s WHERE deleted_epoch = 0 AND id = ANY(%s) RETURNING num",
        (epoch, list(names)),
    ).fetchall()
    nums = [row[0] for row in rows]
    db.execute(
        f"WITH gone AS (SELECT space, count(*) AS items FROM member WHERE num = ANY(%s) AND moved = {NEVER} "
        "GROUP BY space) UPDATE space SET items = space.items - gone.items FROM gone WHERE space.no = gone.space",
        (nums,),
    )
    db.execute("UPDATE member SET gone = %s WHERE num = ANY(%s)", (epoch, nums))
    for table in ("pending", "failure"):
        db.execute(f"DELETE FROM {table} WHERE num = ANY(%s)", (nums,))


def fill(storage: PostgresStorage, nums: NDArray[np.int64], vectors: Any) -> None:
    """Give pending items their vectors of the serving space.

    Raises:
        UnknownNameError: If one of them is not pending (any more): another process was there first.
    """
    with storage.db.writing("fill pending items") as db:
        done = db.execute(
            "SELECT coalesce(id, '?') FROM unnest(%s::bigint[]) AS given(num) LEFT JOIN item USING (num) "
            "WHERE num NOT IN (SELECT num FROM pending)",
            (nums.tolist(),),
        ).fetchall()
        if done:
            names = ", ".join(repr(row[0]) for row in done[:5])
            raise UnknownNameError(f"{len(done)} items are not pending any more: {names}")
        snapshot = storage._load(db)
        append_rows(db, snapshot, snapshot.serving, nums, vectors)


def append_rows(db: Connection, snapshot: Any, fingerprint: str, nums: NDArray[np.int64], vectors: Any) -> None:
    """Inside a transaction: vectors of existing items in a space (rollback, pending items), from a new epoch on.

    Items that have one there by now, from another process that does the same, keep it.
    """
    rows = unit_vectors(vectors, snapshot.spaces[fingerprint].dim, count=len(nums))
    number, epoch = snapshot.numbers[fingerprint], next_epoch(db)
    there = db.execute("SELECT num FROM member WHERE space = %s AND num = ANY(%s)", (number, nums.tolist())).fetchall()
    fresh = ~np.isin(nums, np.array(there, np.int64).ravel())
    nums, rows = nums[fresh], rows[fresh]
    snapshot.db.vectors.write(db, number, nums, rows, snapshot.dtype)
    # Where the item has a newer vector already, this one waits beneath it.
    newer = [snapshot.numbers[name] for name in snapshot.stack[snapshot.stack.index(fingerprint) + 1 :]]
    db.execute(
        "INSERT INTO member(num, space, since, gone, moved, moved_to) "
        f"SELECT item.num, %s, %s, CASE deleted_epoch WHEN 0 THEN {NEVER} ELSE deleted_epoch END, "
        f"coalesce(m.since, {NEVER}), m.space "
        "FROM item LEFT JOIN LATERAL (SELECT space, since FROM member m "
        f"WHERE m.num = item.num AND m.space = ANY(%s) AND m.moved = {NEVER}) m ON true WHERE item.num = ANY(%s)",
        (number, epoch, newer, nums.tolist()),
    )
    db.execute(
        f"UPDATE space SET items = items + (SELECT count(*) FROM member WHERE space = %s AND moved = {NEVER} "
        f"AND gone = {NEVER} AND num = ANY(%s)) WHERE no = %s",
        (number, nums.tolist(), number),
    )
    db.execute("DELETE FROM pending WHERE num = ANY(%s)", (nums.tolist(),))


def compact(storage: PostgresStorage) -> int:
    """Drop the rows of deleted items. Returns how many vectors were dropped."""
    with storage.db.writing("compact") as db:
        snapshot = storage._load(db)
        if snapshot.upgrade is not None:
            raise InputError("a gallery cannot be compacted during an upgrade; begin and finish compact it anyway")
        deleted = "SELECT num FROM item WHERE deleted_epoch > 0"
        dropped = 0
        for number in snapshot.numbers.values():
            rows = db.execute(f"SELECT num FROM member WHERE space = %s AND num IN ({deleted})", (number,)).fetchall()
            storage.db.vectors.delete(db, number, [row[0] for row in rows])
            dropped += len(rows)
        db.execute(f"DELETE FROM member WHERE num IN ({deleted})")
        db.execute("DELETE FROM item WHERE deleted_epoch > 0")
        next_epoch(db, dropped=True)
    with storage.db.outside() as db:
        for number in snapshot.numbers.values():
            storage.db.vectors.tidy(db, number)
        db.execute("VACUUM (ANALYZE) item, member")
    return dropped
