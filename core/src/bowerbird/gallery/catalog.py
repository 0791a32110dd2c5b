"""The catalogue: a SQLite file that is the only truth about the *state* of a gallery.

WAL and ``synchronous=FULL``: a commit that returned survives the loss of power, readers never wait for a writer. A
gallery has one read connection and one write connection per process; both may be used from several threads, one at a
time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import CorruptionError, GalleryError, GalleryLockedError, StoreUnavailableError, without_passwords

APPLICATION_ID = 0x424F5742  # "BOWB": tells a gallery from any other SQLite file
FORMAT = 1
CATALOG = "catalog.db"
BUSY_SECONDS = 120.0  # SQLite's own write lock is held for the length of one commit, in a large add for seconds
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# SQLite's WAL needs shared memory and working locks between the processes that use a file; these do not give them.
NETWORK_FILE_SYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs",
    "lustre",
    "beegfs", "gpfs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "davfs", "fuse.juicefs", "orangefs",
}  # fmt: skip

# num: internal number of one content of an item; deleted_epoch 0 = live, so that UNIQUE holds among live items while
# the
#   same id may come back later.
# segment: files that count; others in seg/ are orphans. batch: rows [start, start + n) of a segment, their checksums,
# the epoch that made them visible.
# tombstone: numbers that no reader of that epoch or later may see. pending: live items without a vector of the serving
# space.
# upgrade.state: running | paused | covered (another one is on top of it) | finished | superseded (one on top of it
# finished) | rolled-back. task.state: free | leased | done | failed; [lo, hi) of the
# plan.
SCHEMA = """
CREATE TABLE head(one INTEGER PRIMARY KEY CHECK(one = 1), epoch INTEGER NOT NULL, live INTEGER NOT NULL,
    next_num INTEGER NOT NULL, serving TEXT NOT NULL, dtype TEXT NOT NULL);
CREATE TABLE space(fingerprint TEXT PRIMARY KEY, encoder TEXT NOT NULL, dim INTEGER NOT NULL, metric TEXT NOT NULL,
    parent TEXT, canary TEXT);
CREATE TABLE relation(kind TEXT NOT NULL, new TEXT NOT NULL, old TEXT NOT NULL, evidence TEXT NOT NULL,
    PRIMARY KEY(kind, new, old));
CREATE TABLE item(num INTEGER PRIMARY KEY, id TEXT NOT NULL, uri TEXT, content_hash TEXT, metadata TEXT,
    added_epoch INTEGER NOT NULL, deleted_epoch INTEGER NOT NULL DEFAULT 0);
CREATE UNIQUE INDEX item_id ON item(id, deleted_epoch);
CREATE TABLE segment(sid TEXT PRIMARY KEY, space TEXT NOT NULL, dtype TEXT NOT NULL, dim INTEGER NOT NULL,
    rows INTEGER NOT NULL, owner TEXT NOT NULL);
CREATE TABLE batch(bid INTEGER PRIMARY KEY, sid TEXT NOT NULL, start INTEGER NOT NULL, n INTEGER NOT NULL,
    crc_vectors INTEGER NOT NULL, crc_ids INTEGER NOT NULL, epoch INTEGER NOT NULL);
CREATE INDEX batch_sid ON batch(sid, start);
CREATE TABLE tombstone(num INTEGER PRIMARY KEY, epoch INTEGER NOT NULL);
CREATE TABLE pending(num INTEGER PRIMARY KEY);
CREATE TABLE upgrade(id INTEGER PRIMARY KEY, old TEXT NOT NULL, new TEXT NOT NULL, state TEXT NOT NULL,
    strategy TEXT NOT NULL, merger TEXT NOT NULL, order_name TEXT NOT NULL, plan_file TEXT NOT NULL,
    plan_rows INTEGER NOT NULL, settings TEXT NOT NULL, started_at REAL NOT NULL, ended_at REAL);
CREATE TABLE task(id INTEGER PRIMARY KEY, upgrade INTEGER NOT NULL, lo INTEGER NOT NULL, hi INTEGER NOT NULL,
    crc INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'free', owner TEXT, token INTEGER NOT NULL DEFAULT 0,
    lease_until REAL, attempts INTEGER NOT NULL DEFAULT 0, error TEXT);
CREATE INDEX task_state ON task(upgrade, state, lo);
CREATE TABLE failure(upgrade INTEGER NOT NULL, num INTEGER NOT NULL, attempts INTEGER NOT NULL, error TEXT NOT NULL,
    PRIMARY KEY(upgrade, num));
"""


class Catalog:
    """Connections, transactions and the writers' lock of one gallery folder."""

    def __init__(self, path: Path, *, readonly: bool = False, lock_timeout: float = 10.0) -> None:
        refuse_network_file_system(path)
        self.path = path
        self.readonly = readonly
        self.lock_timeout = lock_timeout
        self.pid = os.getpid()
        self.read = self._connect(query_only=True)
        self._read_lock = threading.RLock()
        # Threads of one process take these in this order: exclusive, then the storage's append lock, then write.
        self._exclusive_lock = threading.RLock()
        self._write_lock = threading.RLock()
        self._writer: sqlite3.Connection | None = None
        self._lock_depth = 0
        try:
            self._check_format()
        except BaseException:
            self.close()
            raise

    def _connect(self, *, query_only: bool) -> sqlite3.Connection:
        file = self.path / CATALOG
        if not file.is_file():
            raise _not_a_gallery(self.path)
        connection = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        if query_only:
            connection.execute("PRAGMA query_only = 1")
        else:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA cache_size = -65536")
            connection.execute("PRAGMA journal_size_limit = 67108864")
        return connection

    def _check_format(self) -> None:
        try:
            application = self.read.execute("PRAGMA application_id").fetchone()[0]
            version = self.read.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.OperationalError as exc:
            raise GalleryError(
                f"gallery {self.path} cannot be opened: {exc}. SQLite writes a little beside the catalogue even for a "
                "reader: there must be room on the disk, and the folder must be writable"
            ) from exc
        except sqlite3.DatabaseError as exc:
            raise CorruptionError(f"{self.path / CATALOG} cannot be read as a catalogue: {exc}") from exc
        if application != APPLICATION_ID:
            raise _not_a_gallery(self.path)
        if version > FORMAT:
            raise GalleryError(
                f"gallery {self.path} has format {version}; this bowerbird reads formats up to {FORMAT}. Upgrade "
                "bowerbird-core."
            )

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The read connection inside one transaction: everything seen belongs to one epoch."""
        with self._read_lock, _sqlite_errors(self.path):
            self._same_process()
            try:  # from before BEGIN: Ctrl-C that comes while SQLite works is raised when the call returns
                self.read.execute("BEGIN")
                yield self.read
            finally:
                if self.read.in_transaction:
                    self.read.execute("COMMIT")

    def ask(self, statement: str, *parameters: object) -> list[tuple]:
        """The rows of one statement, which is a transaction of its own: cheaper than ``reading`` for what a search
        needs."""
        with self._read_lock, _sqlite_errors(self.path):
            self._same_process()
            return self.read.execute(statement, parameters).fetchall()

    def data_version(self) -> int:
        """Changes whenever any other connection committed; costs microseconds."""
        with self._read_lock, _sqlite_errors(self.path):
            self._same_process()
            return self.read.execute("PRAGMA data_version").fetchone()[0]

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """``BEGIN IMMEDIATE`` ... ``COMMIT``: the one atomic point of every write. Rolled back if the block raises."""
        with self._write_lock, _sqlite_errors(self.path):
            self._same_process()
            if self.readonly:
                raise GalleryError(f"gallery {self.path} was opened readonly; open it with readonly=False to change it")
            if self._writer is None:
                self._writer = self._connect(query_only=False)
            try:  # from before BEGIN: Ctrl-C that comes while it waits for its turn is raised when it has got it
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # SQLite itself rolls back after some errors (a full disk)
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def exclusive(self, purpose: str) -> Iterator[None]:
        """Only one writer of ingest, begin, finish and rollback at a time; workers of an upgrade do not need it.

        The lock belongs to the kernel (``flock``), so that the death of its owner frees it.

        Raises:
            GalleryLockedError: If another writer holds it for longer than ``lock_timeout`` seconds; names the owner.
        """
        with self._exclusive_lock:
            if self._lock_depth:
                yield
                return
            if self.readonly:
                raise GalleryError(f"gallery {self.path} was opened readonly; {purpose} needs readonly=False")
            descriptor = os.open(self.path / "writer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._wait_for_lock(descriptor, purpose)
                self._lock_depth = 1
                yield
            finally:
                self._lock_depth = 0
                os.close(descriptor)  # frees the lock

    def _wait_for_lock(self, descriptor: int, purpose: str) -> None:
        deadline = time.monotonic() + self.lock_timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise GalleryLockedError(
                        f"cannot {purpose}: gallery {self.path} is being written by {_owner(descriptor)}. Waited "
                        f"{self.lock_timeout:g} s; try again when it is done, or wait longer (--lock-timeout)."
                    ) from None
                time.sleep(0.02)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "command": _command(), "purpose": purpose}
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(note).encode(), 0)
        except OSError as exc:  # a full disk must not keep a writer from deleting something
            if exc.errno not in DISK_FULL:
                raise

    def _same_process(self) -> None:
        if os.getpid() != self.pid:
            raise GalleryError(
                "a gallery that was opened before fork() cannot be used in the child; open it there again"
            )

    def close(self) -> None:
        self.read.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def numbers(db: sqlite3.Connection, statement: str, *parameters: object) -> NDArray[np.int64]:
    """The one column of a statement as int64, row by row: a list of ten million rows would take a gigabyte."""
    return np.fromiter((row[0] for row in db.execute(statement, parameters)), np.int64)


def create_catalog(folder: Path) -> sqlite3.Connection:
    """A new, empty catalogue in ``folder``; the caller fills it and closes it."""
    refuse_network_file_system(folder)
    connection = sqlite3.connect(folder / CATALOG, isolation_level=None)
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":
        connection.close()
        raise GalleryError(
            f"the file system of {folder} does not support SQLite's WAL (journal mode {mode!r}); use a local disk"
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {FORMAT}")
    connection.executescript(SCHEMA)
    return connection


def file_system_type(path: Path, mounts: str | None = None) -> str | None:
    """Type of the file system that holds ``path`` (``ext4``, ``nfs4``, ...); ``None`` where the system does not
    tell."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(errors="replace")
        except OSError:
            return None
    resolved = str(path.resolve())
    best, found = -1, None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ").rstrip("/")
        if (resolved == point or resolved.startswith(point + "/")) and len(point) >= best:
            best, found = len(point), fields[2]  # a later mount hides an earlier one at the same place
    return found


def refuse_network_file_system(path: Path) -> None:
    kind = file_system_type(path)
    if kind in NETWORK_FILE_SYSTEMS:
        raise GalleryError(
            f"{path} lies on a network file system ({kind}), where SQLite's locks and shared memory are not reliable; "
            "put the gallery on a local disk"
        )


def disk_full(path: Path, exc: Exception) -> StoreUnavailableError:
    return StoreUnavailableError(
        f"the disk of {path} is full or a limit was reached ({exc}); the operation was undone and the gallery is as "
        "it was "
        "before it. Free some space and run it again."
    )


def says_full(exc: sqlite3.OperationalError) -> bool:
    """SQLite reports a full disk as such, or, where it fills its shared memory, as a failed operation."""
    return "full" in str(exc) or "disk I/O error" in str(exc)


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as exc:
        text = str(exc)
        if says_full(exc):
            raise disk_full(path, exc) from exc
        if "locked" in text:
            raise GalleryLockedError(f"the catalogue of {path} stayed locked for {BUSY_SECONDS:g} s: {text}") from exc
        if "readonly" in text or "unable to open" in text:
            raise StoreUnavailableError(f"the catalogue of {path} cannot be written: {text}") from exc
        raise
    except sqlite3.DatabaseError as exc:
        if isinstance(exc, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        raise CorruptionError(f"the catalogue of {path} is damaged: {exc}") from exc


def _owner(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {note['pid']} on {note['host']} ({note['command']}; {note['purpose']})"
    except (ValueError, KeyError, TypeError):
        return "a process that has not left its name"


def _command() -> str:
    return without_passwords(shlex.join(sys.argv))[:200] or "python"


def _not_a_gallery(path: Path) -> GalleryError:
    what = "there is no such folder" if not path.exists() else f"it has no {CATALOG} of a gallery"
    return GalleryError(f"{path} is not a gallery: {what}. Create one with `bowerbird gallery create {path}`.")
