"""Files and catalogue of a gallery: the commit protocol, snapshots, and the segments that this process appends to.

Every write follows one protocol: append past the committed tail, ``fdatasync``, then one SQLite commit that inserts the
batches with their checksums, advances the tails and increments the epoch. A kill before the commit leaves bytes that
nobody reads; after it nothing is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import CorruptionError, GalleryError, InputError, SpaceError
from bowerbird.files import write_atomically
from bowerbird.gallery import ann, ingest
from bowerbird.gallery.catalog import DISK_FULL, Catalog, create_catalog, numbers, says_full
from bowerbird.gallery.part import Part
from bowerbird.gallery.segments import (
    Batch,
    MappedSegment,
    SegmentInfo,
    SegmentWriter,
    remove_unused,
    sync_folder,
)
from bowerbird.gallery.snapshot import Damage, Snapshot, UpgradeState
from bowerbird.gallery.space import DTYPES, Item, Relation, Space
from bowerbird.gallery.vectors import filter_clause, unit_vectors

if TYPE_CHECKING:
    from bowerbird.gallery.verify import Report

COPY_ROWS = 65_536
TRANSFORM_SECONDS = 3600.0  # for which the file of a transform stays that no relation names


class Storage:
    """An open gallery folder. Thread-safe; not usable across ``fork``."""

    features = frozenset({"index", "many-workers", "rollback", "sequences", "where"})

    def __init__(self, path: str | Path, *, readonly: bool = False, lock_timeout: float = 10.0) -> None:
        self.path = Path(path)
        self.place = f"{self.path.resolve()}{os.sep}"  # begins the paths of all files in it
        self.catalog = Catalog(self.path, readonly=readonly, lock_timeout=lock_timeout)
        self.segment_folder = self.path / "seg"
        self._snapshot: Snapshot | None = None
        self._seen_version = -1
        self._tombstones: tuple[int, NDArray[np.int64]] = (0, np.empty(0, np.int64))
        self._mapped: dict[str, MappedSegment] = {}
        self._damage = Damage()
        self._indexes = ann.IndexCache(self.path)
        self._tender = ann.Tender(self)
        self._snapshot_lock = threading.Lock()
        self._writers: dict[str, SegmentWriter] = {}
        self._append_lock = threading.RLock()

    @classmethod
    def create(cls, path: str | Path, space: Space, *, dtype: str = "float32") -> None:
        """A new, empty gallery folder; it appears as a whole or not at all.

        Raises:
            GalleryError: If ``path`` exists and is not an empty folder, or its file system cannot be used.
            InputError: If ``dtype`` is not one of ``DTYPES``.
        """
        path = Path(path)
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
        refuse_occupied(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            (temporary / "seg").mkdir()
            (temporary / "plan").mkdir()
            db = create_catalog(temporary)
            try:
                db.execute("INSERT INTO head VALUES (1, 0, 0, 0, ?, ?)", (space.fingerprint, dtype))
                insert_space(db, space, parent=None)
            finally:
                db.close()
            sync_folder(temporary)
            temporary.rename(path)
            sync_folder(path.parent)
        except BaseException as exc:
            for file in sorted(temporary.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            temporary.rmdir()
            full = isinstance(exc, OSError) and exc.errno in DISK_FULL
            if full or (isinstance(exc, sqlite3.OperationalError) and says_full(exc)):
                raise GalleryError(
                    f"cannot create a gallery at {path}: the disk is full ({exc}). Free some space."
                ) from exc
            if isinstance(exc, OSError):
                refuse_occupied(path)  # another process was quicker
            raise

    def close(self) -> None:
        with self._append_lock:
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()
        self._snapshot = None
        self._mapped.clear()
        self._indexes.keep(())
        self.catalog.close()

    @property
    def readonly(self) -> bool:
        return self.catalog.readonly

    @property
    def dtype(self) -> str:
        """Of the stored vectors."""
        with self.catalog.reading() as db:
            return db.execute("SELECT dtype FROM head").fetchone()[0]

    # ------------------------------------------------------------------------------------------------- reading

    def snapshot(self) -> Snapshot:
        """The newest committed state. Cheap while nothing changed (``PRAGMA data_version``)."""
        with self._snapshot_lock:
            version = self.catalog.data_version()
            if self._snapshot is None or version != self._seen_version:
                self._snapshot = self._load()
                self._seen_version = version
            return self._snapshot

    def _load(self) -> Snapshot:
        while True:
            version = self.catalog.data_version()
            with self.catalog.reading() as db:
                epoch, live, num_limit, serving = db.execute(
                    "SELECT epoch, live, next_num, serving FROM head"
                ).fetchone()
                spaces = {
                    row[0]: Space(*row) for row in db.execute("SELECT fingerprint, encoder, dim, metric FROM space")
                }
                upgrades = active_upgrades(db)
                relations = read_relations(db)
                indexes = ann.read_entries(db)
                infos = [
                    SegmentInfo(*row)
                    for row in db.execute("SELECT sid, space, dtype, dim, rows FROM segment ORDER BY rowid")
                ]
                since, known = self._tombstones
                fresh = numbers(db, "SELECT num FROM tombstone WHERE epoch > ?", since)
            segments = [self.map_segment(info) for info in infos]
            if any(segment.problem for segment in segments) and self.catalog.data_version() != version:
                continue  # the files were replaced by a repack after the catalogue was read
            break
        if len(fresh):
            known = np.concatenate([known, fresh])
        self._tombstones = (epoch, known)
        self._mapped = {segment.info.sid: segment for segment in segments}
        self._indexes.keep(indexes.values())
        return Snapshot(
            epoch=epoch,
            live=live,
            num_limit=num_limit,
            serving=serving,
            spaces=spaces,
            upgrades=upgrades,
            relations=relations,
            segments=segments,
            tombstones=known,
            batches_of=self.batches,
            known_damage=self._damage,
            indexes=indexes,
            load_index=self._indexes.get,
        )

    def map_segment(self, info: SegmentInfo) -> MappedSegment:
        mapped = self._mapped.get(info.sid)
        if mapped is not None and mapped.info.rows == info.rows and mapped.problem is None:
            return mapped
        return MappedSegment(self.segment_folder, info)

    def batches(self, info: SegmentInfo) -> list[Batch]:
        """The committed batches of a segment within its rows, in order."""
        with self.catalog.reading() as db:
            rows = db.execute(
                "SELECT start, n, crc_vectors, crc_ids FROM batch WHERE sid = ? AND start < ? ORDER BY start",
                (info.sid, info.rows),
            ).fetchall()
        return [Batch(*row) for row in rows]

    def items(self, nums: Iterable[int]) -> dict[int, Item]:
        """Items by number, deleted ones included."""
        wanted = json.dumps([int(num) for num in nums])
        with self.catalog.reading() as db:
            rows = db.execute(
                "SELECT id, num, uri, content_hash, metadata FROM item WHERE num IN (SELECT value FROM json_each(?))",
                (wanted,),
            ).fetchall()
        return {row[1]: item_of_row(row, self.place) for row in rows}

    def find(self, ids: Sequence[str]) -> list[Item | None]:
        """Live items in the order of ``ids``."""
        with self.catalog.reading() as db:
            rows = db.execute(
                "SELECT id, num, uri, content_hash, metadata FROM item "
                "WHERE deleted_epoch = 0 AND id IN (SELECT value FROM json_each(?))",
                (json.dumps(list(ids)),),
            ).fetchall()
        found = {row[0]: item_of_row(row, self.place) for row in rows}
        return [found.get(name) for name in ids]

    def names(self, nums: Iterable[int]) -> dict[int, str]:
        """Ids by number, deleted items included."""
        statement = "SELECT num, id FROM item WHERE num IN (SELECT value FROM json_each(?))"
        return dict(self.catalog.ask(statement, json.dumps(list(nums))))

    def close_id(self, name: str) -> str:
        """`` Did you mean 'x'?`` among the neighbours of ``name`` in the order of ids, or an empty string."""
        with self.catalog.reading() as db:
            return ingest.close_id(db, name)

    def scan(self, epoch: int, after: int, limit: int) -> list[Item]:
        """The next ``limit`` items that are live at ``epoch``, by number, from number ``after`` + 1 on."""
        with self.catalog.reading() as db:
            rows = db.execute(
                "SELECT id, num, uri, content_hash, metadata FROM item WHERE num > ? AND added_epoch <= ? "
                "AND (deleted_epoch = 0 OR deleted_epoch > ?) ORDER BY num LIMIT ?",
                (after, epoch, epoch, limit),
            ).fetchall()
        return [item_of_row(row, self.place) for row in rows]

    def pending(self) -> list[Item]:
        """Items without a vector in the serving space, by number."""
        with self.catalog.reading() as db:
            nums = [row[0] for row in db.execute("SELECT num FROM pending ORDER BY num")]
        found = self.items(nums)
        return [found[num] for num in nums if num in found]

    def allowed(self, snapshot: Snapshot, where: Mapping[str, Any]) -> NDArray[np.bool_]:
        """What ``Part.search`` takes to look only at items whose metadata match: bool by item number."""
        clause, parameters = filter_clause(where)
        with self.catalog.reading() as db:
            nums = numbers(
                db,
                f"SELECT num FROM item WHERE added_epoch <= ? AND (deleted_epoch = 0 OR deleted_epoch > ?) AND "
                f"{clause}",
                snapshot.epoch,
                snapshot.epoch,
                *parameters,
            )
        allowed = np.zeros(snapshot.num_limit, bool)
        allowed[nums] = True
        return allowed

    def build_index(
        self, kind: str | None, config: Mapping[str, Any], progress: Callable[[str], None] | None
    ) -> list[ann.IndexEntry]:
        return ann.build(self, kind, config, progress)

    def tend_index(self, share: float, progress: Callable[[str], None] | None) -> list[ann.IndexEntry]:
        return self._tender(share, progress)

    def index_status(self) -> dict[str, Any]:
        return ann.status(self)

    def verify(self) -> Report:
        from bowerbird.gallery.verify import verify

        return verify(self)

    def size(self) -> dict[str, int]:
        """Segments, their rows, those of them that are dead, and the bytes of all files."""
        snapshot = self.snapshot()
        folders = (self.path, *(self.path / name for name in ("seg", "plan", ann.FOLDER)))
        rows = sum(segment.rows for segment in snapshot.segments)
        return {
            "segments": len(snapshot.segments),
            "rows": rows,
            "dead_rows": rows - sum(part.count for part in snapshot.parts),
            "bytes": sum(
                entry.stat().st_size
                for folder in folders
                if folder.is_dir()
                for entry in os.scandir(folder)
                if entry.is_file()
            ),
        }

    # Small files that belong to a gallery: what is watched, transforms. Names are relative, `folder/name`.

    def read_file(self, name: str) -> bytes | None:
        """``None`` where there is none."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write_file(self, name: str, content: bytes) -> None:
        """As a whole or not at all; replaces an earlier one."""
        if self.catalog.readonly:
            raise GalleryError(f"gallery {self.path} was opened readonly; open it with readonly=False to change it")
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, content)

    def append_line(self, name: str, line: str) -> None:
        """One whole line, whatever other processes append; what a killed process left of a line is cut off first."""
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        data = line.encode() + b"\n"
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                whole = os.pread(descriptor, size, 0).rpartition(b"\n")
                write_atomically(file, whole[0] + whole[1] + data)
                return
            os.write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def files(self, folder: str) -> list[str]:
        """Names below a folder, ``folder/name``, sorted."""
        return sorted(f"{folder}/{file.name}" for file in (self.path / folder).glob("*") if file.is_file())

    def relations(self) -> list[Relation]:
        with self.catalog.reading() as db:
            return read_relations(db)

    # ------------------------------------------------------------------------------------------------- writing

    def take_back(self, writer: SegmentWriter, *, whole: bool = False) -> None:
        """After a failure: give back what was appended and not committed; ``whole``: a segment that is new.

        An interrupt can come right after the commit. So the catalogue says what counts, and where it cannot be asked
        nothing is touched: bytes beyond the committed rows are never read.
        """
        with contextlib.suppress(Exception):
            rows = _committed_rows(self.catalog, writer.info.sid)
            if whole and rows is None:
                abandon(writer)
            elif not whole and (rows or 0) == writer.info.rows:
                writer.discard()

    def writer_for(self, space: Space) -> SegmentWriter:
        """The segment of ``space`` that this process appends to: its own, one whose owner is gone, or a new one.

        Call it, append and commit inside ``with storage.appending()``.
        """
        with self.catalog.reading() as db:
            dtype = db.execute("SELECT dtype FROM head").fetchone()[0]
            infos = [
                SegmentInfo(*row)
                for row in db.execute(
                    "SELECT sid, space, dtype, dim, rows FROM segment WHERE space = ?", (space.fingerprint,)
                )
            ]
        by_sid = {info.sid: info for info in infos}
        held = self._writers.get(space.fingerprint)
        if held is not None:
            current = by_sid.get(held.info.sid)
            if current is not None and current.rows == held.info.rows == held.tail:
                return held
            self._writers.pop(space.fingerprint).close()
        for info in infos:
            try:
                writer = SegmentWriter(self.segment_folder, info)
            except (BlockingIOError, FileNotFoundError):
                continue
            if (
                _committed_rows(self.catalog, info.sid) == info.rows
                and not MappedSegment(self.segment_folder, info).problem
            ):
                self._writers[space.fingerprint] = writer
                return writer
            writer.close()  # its owner committed once more before it let go, or its files are damaged
        writer = SegmentWriter.new(self.segment_folder, space.fingerprint, dtype, space.dim)
        self._writers[space.fingerprint] = writer
        return writer

    def appending(self) -> threading.RLock:
        """Held from the first append to the commit: a process has one tail per space."""
        return self._append_lock

    def record_batches(
        self, db: sqlite3.Connection, writer: SegmentWriter, batches: Sequence[Batch], epoch: int
    ) -> None:
        """Inside the transaction that makes them visible: insert the batches and advance the segment's rows."""
        info = writer.info
        db.execute(
            "INSERT INTO segment(sid, space, dtype, dim, rows, owner) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT(sid) DO UPDATE SET rows = excluded.rows",
            (info.sid, info.space, info.dtype, info.dim, writer.tail, str(os.getpid())),
        )
        db.executemany(
            "INSERT INTO batch(sid, start, n, crc_vectors, crc_ids, epoch) VALUES (?, ?, ?, ?, ?, ?)",
            [(info.sid, batch.start, batch.n, batch.crc_vectors, batch.crc_ids, epoch) for batch in batches],
        )

    def check_space(self, space: Space) -> None:
        """Whatever a ``Space`` can be is kept."""

    def register_space(self, space: Space, *, parent: str | None = None) -> None:
        """Remember a space. Idempotent.

        Raises:
            SpaceError: If the fingerprint is known with another width.
        """
        known = self.snapshot().spaces.get(space.fingerprint)
        if known is not None:
            check_same_space(known, space)
            return
        with self.catalog.writing() as db:
            insert_space(db, space, parent=parent)

    def relate(self, relation: Relation) -> None:
        """Register a relation; replaces the evidence of an earlier registration."""
        spaces = self.snapshot().spaces
        for fingerprint in (relation.new, relation.old):
            if fingerprint not in spaces:
                raise SpaceError(f"this gallery knows no space {fingerprint[:12]!r}; known: {_names(spaces)}")
        if relation.new == relation.old:
            raise SpaceError("a space is related to itself anyway; a relation needs two different spaces")
        with self.catalog.writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO relation VALUES (?, ?, ?, ?)",
                (relation.kind, relation.new, relation.old, json.dumps(dict(relation.evidence))),
            )

    def unrelate(self, relation: Relation) -> None:
        """Forget a relation, whatever its evidence. Nothing happens where it is not registered."""
        with self.catalog.writing() as db:
            key = (relation.kind, relation.new, relation.old)
            db.execute("DELETE FROM relation WHERE kind = ? AND new = ? AND old = ?", key)

    def canary_passed(self, fingerprint: str) -> str | None:
        """What ``remember_canary`` was last given for a space."""
        with self.catalog.reading() as db:
            row = db.execute("SELECT canary FROM space WHERE fingerprint = ?", (fingerprint,)).fetchone()
        return None if row is None else row[0]

    def remember_canary(self, fingerprint: str, passed: str) -> None:
        """Note with which encoder and where the canary of a space was last checked."""
        with self.catalog.writing() as db:
            db.execute("UPDATE space SET canary = ? WHERE fingerprint = ?", (passed, fingerprint))

    def collect_garbage(self) -> list[str]:
        """Remove files that the catalogue does not know: segments, indexes, and transforms that were replaced.

        Returns their names.
        """
        with self._append_lock, self.catalog.writing() as db:  # nobody can commit a new segment meanwhile
            known = {row[0] for row in db.execute("SELECT sid FROM segment")}
            for fingerprint, writer in list(self._writers.items()):
                if writer.info.sid not in known:
                    self._writers.pop(fingerprint).close()
            return [
                *remove_unused(self.segment_folder, known),
                *ann.collect_garbage(db, self.path),
                *self._remove_replaced_transforms(db),
            ]

    def _remove_replaced_transforms(self, db: sqlite3.Connection) -> list[str]:
        known = {relation.evidence.get("transform") for relation in read_relations(db)}
        removed = []
        for file in sorted((self.path / "transforms").glob("*.safetensors")):
            # A young one may be about to be registered: its file is written first.
            if file.stem not in known and time.time() - file.stat().st_mtime > TRANSFORM_SECONDS:
                file.unlink(missing_ok=True)
                removed.append(file.name)
        return removed

    def refuse_unreadable(self, snapshot: Snapshot) -> None:
        """Raise ``CorruptionError`` if a live item has no readable vector: copying the others would lose it for
        good."""
        with self.catalog.reading() as db:
            pending = db.execute("SELECT count(*) FROM pending").fetchone()[0]
        lost = snapshot.live - pending - sum(part.count for part in snapshot.parts)
        if lost:
            why = snapshot.problems[0] if snapshot.problems else "the catalogue and the segments disagree"
            raise CorruptionError(
                f"{lost} items have no readable vector ({why}). `bowerbird gallery verify {self.path}` names them; "
                "replace "
                "or delete them first."
            )

    def write_packed(self, part: Part, nums: NDArray[np.int64]) -> tuple[SegmentWriter, list[Batch]]:
        """Write the vectors of items of ``part`` into a new segment, in the order of ``nums`` and durable; the caller
        commits it."""
        with self.catalog.reading() as db:
            dtype = db.execute("SELECT dtype FROM head").fetchone()[0]
        writer = SegmentWriter.new(self.segment_folder, part.space.fingerprint, dtype, part.space.dim)
        try:
            for start in range(0, len(nums), COPY_ROWS):
                block = nums[start : start + COPY_ROWS]
                writer.append(part.vectors_of(block), block)
            return writer, writer.sync()
        except BaseException:
            abandon(writer)
            raise

    def append_rows(self, space: Space, nums: NDArray[np.int64], vectors: Any) -> None:
        """Commit vectors of existing items in ``space`` (rollback, pending items). The items are no longer pending."""
        rows = unit_vectors(vectors, space.dim, count=len(nums))
        with self._append_lock:
            writer = self.writer_for(space)
            try:
                writer.append(rows, nums)
                batches = writer.sync()
                with self.catalog.writing() as db:
                    self.record_batches(db, writer, batches, next_epoch(db))
                    done = json.dumps(nums.tolist())
                    db.execute("DELETE FROM pending WHERE num IN (SELECT value FROM json_each(?))", (done,))
            except BaseException:
                self.take_back(writer)
                raise
            writer.committed()


def refuse_occupied(path: Path) -> None:
    """Raise ``GalleryError`` if a gallery cannot be created at ``path`` because something is there."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise GalleryError(
            f"cannot create a gallery at {path}: something is there already. Choose another path, or remove it."
        )


def active_upgrades(db: sqlite3.Connection) -> list[UpgradeState]:
    """The upgrades under way, each on top of the one before it."""
    rows = db.execute(
        "SELECT id, old, new, state, strategy, merger, order_name, plan_rows, settings, started_at FROM upgrade "
        "WHERE state IN ('running', 'paused', 'covered') ORDER BY id"
    ).fetchall()
    return [
        UpgradeState(number, old, new, state, strategy, merger, order, plan_rows, json.loads(settings), started_at)
        for number, old, new, state, strategy, merger, order, plan_rows, settings, started_at in rows
    ]


def active_upgrade(db: sqlite3.Connection) -> UpgradeState | None:
    """The topmost upgrade under way."""
    upgrades = active_upgrades(db)
    return upgrades[-1] if upgrades else None


def read_relations(db: sqlite3.Connection) -> list[Relation]:
    rows = db.execute("SELECT kind, new, old, evidence FROM relation ORDER BY kind, new, old").fetchall()
    return [Relation(kind, new, old, json.loads(evidence)) for kind, new, old, evidence in rows]


def item_of_row(row: tuple[str, int, str | None, str | None, str | None], place: str) -> Item:
    item_id, num, uri, content_hash, metadata = row
    uri = ingest.found_uri(uri, place)
    return Item(item_id, num, uri, content_hash, json.loads(metadata) if metadata else {})


def insert_space(db: sqlite3.Connection, space: Space, *, parent: str | None) -> None:
    db.execute(
        "INSERT INTO space(fingerprint, encoder, dim, metric, parent) VALUES (?, ?, ?, ?, ?)",
        (space.fingerprint, space.encoder, space.dim, space.metric, parent),
    )


def check_same_space(known: Space, space: Space) -> None:
    if known.dim != space.dim:
        raise SpaceError(
            f"space {space.fingerprint[:12]} has width {known.dim} in this gallery, and {space.dim} was given for it"
        )


def _names(spaces: Mapping[str, Space]) -> str:
    return ", ".join(str(space) for space in spaces.values())


def next_epoch(db: sqlite3.Connection) -> int:
    return db.execute("UPDATE head SET epoch = epoch + 1 RETURNING epoch").fetchone()[0]


def _committed_rows(catalog: Catalog, sid: str) -> int | None:
    with catalog.reading() as db:
        row = db.execute("SELECT rows FROM segment WHERE sid = ?", (sid,)).fetchone()
    return None if row is None else row[0]


def abandon(writer: SegmentWriter) -> None:
    """Drop a segment that was never committed."""
    writer.info.vector_file(writer.folder).unlink(missing_ok=True)
    writer.info.id_file(writer.folder).unlink(missing_ok=True)
    writer.close()
