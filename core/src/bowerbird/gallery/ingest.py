"""Adding, replacing and deleting items. A call is atomic: all of it is there after it returned, or nothing of it.

The cost of a large ``add`` is the disk and the text ids. Three things therefore run beside each other: the vectors are
checked, summed and written by the caller's thread, flushed to the disk by a second, and the item rows go into SQLite
in a
third. Memory is bounded by a chunk, whatever the size of the call, apart from the caller's own arrays.
"""

from __future__ import annotations

import difflib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError, SpaceError, UnknownNameError
from bowerbird.gallery.segments import CHUNK_BYTES
from bowerbird.gallery.space import Space
from bowerbird.gallery.vectors import checked_ids, checked_items, unit_vectors

if TYPE_CHECKING:
    from bowerbird.gallery.segments import SegmentWriter
    from bowerbird.gallery.storage import Storage
    from bowerbird.gallery.store import Store

THREAD_FROM_ROWS = 8192  # below, threads cost more than they give
INSIDE = "gallery-folder:"  # begins the stored uri of a file in the gallery's folder

# One statement for many rows, given as JSON: three times cheaper than binding every row from Python, and SQLite works
# through it without the interpreter, beside the thread that writes vectors.
_INSERT_IDS = "INSERT INTO item(num, id, added_epoch) SELECT key + ?, value, ? FROM json_each(?) WHERE true"
_INSERT_ROWS = """
INSERT INTO item(num, id, uri, content_hash, metadata, added_epoch)
SELECT key + ?1, json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), ?2 FROM json_each(?3) WHERE true
"""
INSERT_ROWS = 50_000  # per statement: bounds the memory of the JSON text
_BY_ID = "SELECT id, num FROM item WHERE deleted_epoch = 0 AND id IN (SELECT value FROM json_each(?))"


def add_items(
    store: Store,
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
    if not names:
        return np.empty(0, np.int64)
    storage = store.storage
    if columns[0] is not None:
        columns = (stored_uris(columns[0], storage.place), *columns[1:])
    with storage.catalog.exclusive("add items"), storage.appending():
        target = storage.snapshot().space_to_write(space)
        if vectors.shape[1] != target.dim:
            raise SpaceError(f"vectors have width {vectors.shape[1]}; space {target} has width {target.dim}")
        unit_vectors(vectors[:1], target.dim)  # the common mistakes are found before anything is written
        writer = storage.writer_for(target)
        try:
            nums = _commit(store, writer, names, vectors, columns, target, replace)
        except BaseException:
            storage.take_back(writer)
            raise
        writer.committed()
        return nums


def stored_uris(uris: Sequence[str | None], place: str) -> list[str | None]:
    """Files in the gallery's own folder are stored by their place there, so that it can be moved with its pictures.

    Args:
        place: ``Storage.place``.
    """
    return [INSIDE + uri[len(place) :] if uri is not None and uri.startswith(place) else uri for uri in uris]


def found_uri(uri: str | None, place: str) -> str | None:
    """Where the content is now, of what ``stored_uris`` gave."""
    if uri is None or not uri.startswith(INSIDE):
        return uri
    return place + uri.removeprefix(INSIDE)


def _commit(
    store: Store,
    writer: SegmentWriter,
    names: list[str],
    vectors: NDArray,
    columns: tuple[Sequence[str | None] | None, ...],
    target: Space,
    replace: bool,
) -> NDArray[np.int64]:
    storage = store.storage
    with storage.catalog.writing() as db:
        epoch, first = db.execute("SELECT epoch + 1, next_num FROM head").fetchone()
        replaced = _bury(db, names, epoch) if replace else 0
        nums = np.arange(first, first + len(names), dtype=np.int64)
        try:
            if len(names) < THREAD_FROM_ROWS:
                _insert(db, names, columns, first, epoch)
                _append(writer, vectors, nums, target, None, None)
            else:
                with ThreadPoolExecutor(2, thread_name_prefix="gallery-add") as pool:
                    inserted = pool.submit(_insert, db, names, columns, first, epoch)
                    try:
                        _append(writer, vectors, nums, target, pool, inserted)
                    except BaseException:
                        db.interrupt()  # the rows are rolled back anyway; do not wait for the rest of them
                        raise
                    inserted.result()
        except sqlite3.IntegrityError as exc:
            raise _exists_already(db, storage, names) from exc
        storage.record_batches(db, writer, writer.sync(), epoch)
        db.execute(
            "UPDATE head SET epoch = ?, live = live + ?, next_num = ?",
            (epoch, len(names) - replaced, first + len(names)),
        )
        upgrade = db.execute("SELECT new FROM upgrade WHERE state IN ('running', 'paused')").fetchone()
        if upgrade is not None and target.fingerprint != upgrade[0]:
            store.enqueue(db, nums)
        return nums


def _insert(
    db: sqlite3.Connection, names: list[str], columns: tuple[Sequence[str | None] | None, ...], first: int, epoch: int
) -> None:
    """The item rows, numbered from ``first``."""
    plain = all(column is None for column in columns)
    for start in range(0, len(names), INSERT_ROWS):
        part = slice(start, start + INSERT_ROWS)
        if plain:
            db.execute(_INSERT_IDS, (first + start, epoch, json.dumps(names[part])))
        else:
            given = (repeat(None) if column is None else column[part] for column in columns)
            rows = list(zip(names[part], *given, strict=False))
            db.execute(_INSERT_ROWS, (first + start, epoch, json.dumps(rows)))


def _append(
    writer: SegmentWriter,
    vectors: NDArray,
    nums: NDArray[np.int64],
    target: Space,
    pool: ThreadPoolExecutor | None,
    inserted: Future | None,
) -> None:
    step = max(1, CHUNK_BYTES // writer.info.row_bytes)
    flushed: Future | None = None
    for start in range(0, len(nums), step):
        rows = unit_vectors(vectors[start : start + step], target.dim, first_row=start, stored_as=writer.info.dtype)
        writer.append(rows, nums[start : start + step])
        if inserted is not None and inserted.done():
            inserted.result()  # a duplicate id ends the call now, not after the last chunk
        if pool is not None and (flushed is None or flushed.done()):
            if flushed is not None:
                flushed.result()
            flushed = pool.submit(writer.flush)
    if flushed is not None:
        flushed.result()


def _bury(db: sqlite3.Connection, names: list[str], epoch: int) -> int:
    """Mark the live items of these ids as deleted; returns how many there were."""
    nums = [(row[1],) for row in db.execute(_BY_ID, (json.dumps(names),)).fetchall()]
    _bury_nums(db, nums, epoch)
    return len(nums)


def _bury_nums(db: sqlite3.Connection, nums: list[tuple[int]], epoch: int) -> None:
    db.executemany(f"UPDATE item SET deleted_epoch = {int(epoch)} WHERE num = ?", nums)
    db.executemany(f"INSERT INTO tombstone VALUES (?, {int(epoch)})", nums)
    db.executemany("DELETE FROM pending WHERE num = ?", nums)
    db.executemany("DELETE FROM failure WHERE num = ?", nums)


def _exists_already(db: sqlite3.Connection, storage: Storage, names: list[str]) -> InputError:
    with storage.catalog.reading() as committed:
        found = [row[0] for row in committed.execute(_BY_ID, (json.dumps(names),)).fetchall()]
    shown = ", ".join(map(repr, sorted(found)[:5]))
    return InputError(
        f"{len(found)} ids are in the gallery already ({shown}{', ...' if len(found) > 5 else ''}); nothing was added. "
        "Leave them out, or pass replace=True to replace their content."
    )


def delete_items(storage: Storage, ids: Sequence[str]) -> int:
    """See ``Gallery.delete``."""
    names = checked_ids(ids)
    if not names:
        return 0
    with storage.catalog.exclusive("delete items"), storage.catalog.writing() as db:
        found = dict(db.execute(_BY_ID, (json.dumps(names),)).fetchall())
        missing = [name for name in names if name not in found]
        if missing:
            raise UnknownNameError(
                f"{len(missing)} of {len(names)} ids are not in the gallery ({', '.join(map(repr, missing[:5]))}); "
                "nothing was "
                f"deleted.{close_id(db, missing[0])}"
            )
        epoch = db.execute("SELECT epoch + 1 FROM head").fetchone()[0]
        _bury_nums(db, [(num,) for num in found.values()], epoch)
        db.execute("UPDATE head SET epoch = ?, live = live - ?", (epoch, len(found)))
    return len(names)


def close_id(db: sqlite3.Connection, name: str) -> str:
    """A suggestion among the neighbours of ``name`` in the order of ids: reading every id of a large gallery would
    take long."""
    sql = "SELECT id FROM item WHERE deleted_epoch = 0 AND id {} ? ORDER BY id {} LIMIT 50"
    near = [row[0] for row in db.execute(sql.format("<", "DESC"), (name,))]
    near += [row[0] for row in db.execute(sql.format(">", "ASC"), (name,))]
    close = difflib.get_close_matches(name, near, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def compact(storage: Storage) -> int:
    """Write the live vectors into one new segment and drop the dead rows. Returns how many rows were dropped."""
    with storage.catalog.exclusive("compact"), storage.appending():
        snapshot = storage.snapshot()
        if snapshot.upgrade is not None:
            raise InputError("a gallery cannot be compacted during an upgrade; begin and finish compact it anyway")
        part = snapshot.new
        storage.refuse_unreadable(snapshot)
        rows = sum(segment.rows for segment in snapshot.segments)
        writer, batches = storage.write_packed(part, np.sort(part.nums))
        with storage.catalog.writing() as db:
            epoch = db.execute("UPDATE head SET epoch = epoch + 1 RETURNING epoch").fetchone()[0]
            db.execute("DELETE FROM batch")
            db.execute("DELETE FROM segment")
            storage.record_batches(db, writer, batches, epoch)
            db.execute("DELETE FROM tombstone")
            db.execute("DELETE FROM item WHERE deleted_epoch > 0")
        writer.committed()
        writer.close()
    storage.collect_garbage()
    return rows - part.count
