"""Approximate indexes of a gallery: files under ``idx/`` that make searches faster and are never a truth.

An index covers the item numbers of one space. A number stands for one content and keeps its vector, so that an index
stays right while rows are added, deleted, moved by an upgrade, or compacted: what it covers is looked at through the
snapshot, what it does not cover is searched exactly, and every reported distance is computed again from the vectors.
A file that is missing, damaged or of another gallery changes the speed of a search, and nothing else.

N items, Q queries, k results.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import sqlite3
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import (
    CorruptionError,
    GalleryError,
    GalleryLockedError,
    InputError,
    MissingExtraError,
    did_you_mean,
)
from bowerbird.gallery.catalog import DISK_FULL, disk_full
from bowerbird.gallery.covered import LiveIndex
from bowerbird.gallery.segments import sync_folder
from bowerbird.retrieval.faiss_index import FaissIndex
from bowerbird.retrieval.index_files import saved_effort

if TYPE_CHECKING:
    from bowerbird.gallery.part import Part
    from bowerbird.gallery.snapshot import Snapshot
    from bowerbird.gallery.storage import Storage

KINDS = ("exact", "ivf", "hnsw")
FOLDER = "idx"
LEAST = 4096  # fewer items are searched exactly as fast; ``tend`` leaves them alone
DRIFT = 0.25  # an index file whose number of items is off by this share is brought up to date
RETRAIN = 4  # an index that has grown so many times since it was trained is trained anew
BLOCK = 65_536  # vectors in memory at once while an index is filled

# Made by the first ``set_index``: a gallery without them is an exact one, and any version can read it.
TABLES = (
    "CREATE TABLE IF NOT EXISTS setting(name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS index_file(space TEXT PRIMARY KEY, file TEXT NOT NULL, kind TEXT NOT NULL, "
    "items INTEGER NOT NULL, recall REAL, epoch INTEGER NOT NULL, bytes INTEGER NOT NULL, crc32 INTEGER NOT NULL)",
)


class IndexUnusableWarning(UserWarning):
    """A gallery's approximate index cannot be used; searches are exact, and slower."""


@dataclass(frozen=True)
class IndexEntry:
    """An index file as the catalogue knows it.

    Attributes:
        space: Fingerprint of the space whose vectors it holds.
        file: Name under ``idx/``.
        items: How many it covers.
        recall: Recall@10 measured on a sample when it was built, 0..1; ``None`` where the effort was given, not chosen.
        epoch: Of the snapshot that it was built from.
        bytes, crc32: Of the whole file.
    """

    space: str
    file: str
    kind: str
    items: int
    recall: float | None
    epoch: int
    bytes: int
    crc32: int

    @property
    def training(self) -> str:
        """The same for all files of one training; an index that was built anew has another."""
        return self.file.removesuffix(".faiss").rpartition("-")[2]


# ------------------------------------------------------------------------------------------------------ in memory


class IndexCache:
    """The indexes that a process has in memory; each is read once, when it is first searched. Thread-safe.

    Files of one training are one index at different times. Who holds it in memory already keeps that, which follows the
    gallery by itself, and takes from a later file only the effort that was measured for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._live: dict[str, LiveIndex] = {}  # by training
        self._seen: dict[str, bool] = {}  # by file: whether it could be used

    def get(self, entry: IndexEntry) -> LiveIndex | None:
        """The index of an entry; ``None``, and one warning for other causes than a missing file, if unusable."""
        with self._lock:
            held = self._live.get(entry.training)
            if entry.file not in self._seen:
                if held is None:
                    held, why = self._read(entry)
                    if why:
                        warnings.warn(f"{why}; searches of {self.path} are exact", IndexUnusableWarning, stacklevel=2)
                else:
                    with contextlib.suppress(OSError, CorruptionError, InputError):  # the index in memory is good
                        held.set_effort(saved_effort(self.path / FOLDER / entry.file))
                self._seen[entry.file] = held is not None
                if held is not None:
                    self._live[entry.training] = held
            return held if self._seen[entry.file] else None

    def _read(self, entry: IndexEntry) -> tuple[LiveIndex | None, str | None]:
        file = self.path / FOLDER / entry.file
        why = problem_of(file, entry)
        if why is not None:
            return None, why if file.exists() else None
        try:
            return LiveIndex(FaissIndex.load(file)), None
        except MissingExtraError as exc:
            return None, f"the approximate index needs FAISS: {exc}"
        except Exception as exc:  # written by another version of FAISS: a cache must not stop a search
            return None, f"the index file {file} cannot be read ({type(exc).__name__}: {exc})"

    def keep(self, entries: Iterable[IndexEntry]) -> None:
        """Forget the indexes that no entry names any more."""
        files, trainings = set(), set()
        for entry in entries:
            files.add(entry.file)
            trainings.add(entry.training)
        with self._lock:
            self._live = {name: live for name, live in self._live.items() if name in trainings}
            self._seen = {name: usable for name, usable in self._seen.items() if name in files}


def problem_of(file: Path, entry: IndexEntry) -> str | None:
    """What is wrong with the bytes of an index file; ``None`` if they are those that were written."""
    try:
        found = _size_and_crc(file)
    except OSError as exc:
        return f"the index file {file} cannot be read ({exc.strerror}); build it again with `bowerbird gallery index`"
    if found != (entry.bytes, entry.crc32):
        return f"the index file {file} is damaged; build it again with `bowerbird gallery index`"
    return None


def _size_and_crc(file: Path) -> tuple[int, int]:
    size = crc = 0
    with file.open("rb") as stream:
        while data := stream.read(1 << 22):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return size, crc


# ------------------------------------------------------------------------------------------------------ catalogue


def read_entries(db: sqlite3.Connection) -> dict[str, IndexEntry]:
    """Fingerprint -> index, inside a transaction."""
    if not _has_tables(db):
        return {}
    columns = ", ".join(field.name for field in fields(IndexEntry))
    return {row[0]: IndexEntry(*row) for row in db.execute(f"SELECT {columns} FROM index_file ORDER BY space")}


def read_setting(db: sqlite3.Connection) -> tuple[str, dict[str, Any]]:
    """``(kind, settings)`` that the gallery was given last; ``("exact", {})`` by default."""
    row = db.execute("SELECT value FROM setting WHERE name = 'index'").fetchone() if _has_tables(db) else None
    if row is None:
        return "exact", {}
    value = json.loads(row[0])
    return value["kind"], value["config"]


def _has_tables(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'index_file'").fetchone() is not None


def status(storage: Storage) -> dict[str, Any]:
    """Plain data: kind, settings, and per index file what it covers and where it is."""
    with storage.catalog.reading() as db:
        kind, config = read_setting(db)
        entries = read_entries(db)
    files = [{**asdict(entry), "path": str(storage.path / FOLDER / entry.file)} for entry in entries.values()]
    return {"kind": kind, "config": config, "files": files}


# ---------------------------------------------------------------------------------------------------------- build


def build(
    storage: Storage,
    kind: str | None,
    config: Mapping[str, Any],
    progress: Callable[[str], None] | None = None,
) -> list[IndexEntry]:
    """See ``Gallery.set_index``; ``kind`` ``None``: what the gallery was given last."""
    if storage.catalog.readonly:
        raise GalleryError(f"gallery {storage.path} was opened readonly; open it with readonly=False to index it")
    if kind is None:
        with storage.catalog.reading() as db:
            kind, config = read_setting(db)
    settings = _checked(kind, config)
    entries: list[IndexEntry] = []
    with _building(storage.path / FOLDER):
        if settings is not None:
            snapshot = storage.snapshot()
            parts = [part for part in snapshot.parts if part.count]
            entries = [_build_part(storage.path, part, snapshot, settings, progress) for part in parts]
        with storage.catalog.writing() as db:
            for statement in TABLES:
                db.execute(statement)
            stored = settings.model_dump(exclude={"kind"}, exclude_unset=True) if settings is not None else {}
            value = json.dumps({"kind": kind, "config": stored})
            db.execute("INSERT OR REPLACE INTO setting VALUES ('index', ?)", (value,))
            db.execute("DELETE FROM index_file")
            entries = _enter(db, entries)
    storage.collect_garbage()
    return entries


def _enter(db: sqlite3.Connection, entries: list[IndexEntry]) -> list[IndexEntry]:
    """Inside a transaction: the entries count from now on, but for spaces that an upgrade has dropped meanwhile."""
    served = {row[0] for row in db.execute("SELECT DISTINCT space FROM segment")}
    entries = [entry for entry in entries if entry.space in served]
    statement = "INSERT OR REPLACE INTO index_file VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    db.executemany(statement, [astuple(entry) for entry in entries])
    return entries


class Tender:
    """Brings the index files of a gallery up to date, in a bounded share of a worker's time.

    A file matters to who opens the gallery: an index in memory follows by itself. But it has to be trained by someone
    before it can be followed, which takes seconds, so that this is not left to a search.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._not_before = -math.inf

    def __call__(self, share: float = 0.03, progress: Callable[[str], None] | None = None) -> list[IndexEntry]:
        """See ``Gallery.tend_index``."""
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; it must be above 0 and at most 1")
        start = time.monotonic()
        if self.storage.catalog.readonly or (share < 1 and start < self._not_before):
            return []
        with self.storage.catalog.reading() as db:
            kind, config = read_setting(db)
            entries = read_entries(db)
        if kind == "exact":
            return []
        snapshot = self.storage.snapshot()
        stale = [part for part in snapshot.parts if _stale(part, entries.get(part.space.fingerprint))]
        if not stale:
            return []
        try:
            settings = _checked(kind, config)
        except MissingExtraError:
            return []  # searches say so; the work that this is done beside goes on
        written = []
        with contextlib.suppress(GalleryLockedError), _building(self.storage.path / FOLDER):  # another process does it
            for part in stale:
                entry = entries.get(part.space.fingerprint)
                to = self.storage.path
                updated = None if entry is None else _update_part(to, part, snapshot, entry, progress)
                written.append(updated or _build_part(to, part, snapshot, settings, progress))
            with self.storage.catalog.writing() as db:
                # Who chose another kind meanwhile has the last word: what was written is an orphan then.
                written = _enter(db, written) if read_setting(db) == (kind, config) else []
        if written:
            self.storage.collect_garbage()
        end = time.monotonic()
        self._not_before = end + (end - start) * (1 / share - 1)
        return written


def _stale(part: Part, entry: IndexEntry | None) -> bool:
    if part.count < LEAST:
        return False
    return entry is None or abs(part.count - entry.items) > DRIFT * entry.items


def _checked(kind: str, config: Mapping[str, Any]) -> Any:
    """``FaissConfig``, or ``None`` for exact. Raises before anything is built."""
    from bowerbird.recipe import build_config  # these two bring pydantic, which a search does without
    from bowerbird.registry import get_registry

    if kind not in KINDS:
        raise InputError(f"no index of kind {kind!r}; accepted: {', '.join(KINDS)}.{did_you_mean(str(kind), KINDS)}")
    if kind == "exact":
        if config:
            raise InputError(f"an exact gallery has no index settings; found {', '.join(map(repr, config))}")
        return None
    record = get_registry().get("retriever", "core:faiss", role="index")
    get_registry().load(record)  # refuses where FAISS is not installed
    return build_config(record, {**config, "kind": kind}, where="index of the gallery")


def _build_part(
    path: Path, part: Part, snapshot: Snapshot, settings: Any, progress: Callable[[str], None] | None
) -> IndexEntry:
    """Build the index of a part and write its file.

    The part that an upgrade fills has the lists of a whole gallery as soon as there are items for them.
    """
    _say(progress, f"building {settings.kind}", part)
    nums = part.nums
    moving = snapshot.upgrade is not None
    if moving and settings.nlist is not None:
        settings = settings.model_copy(update={"nlist": min(settings.nlist, max(1, len(nums) // 39))})
    index = FaissIndex.build(settings)
    expected = snapshot.live if moving else len(nums)
    size = index.sample_size(len(nums), expected)
    chosen = np.random.default_rng(settings.seed).choice(len(nums), size, replace=False)
    index.train(part.vectors_of(nums[np.sort(chosen)]), len(nums), expected=expected)
    _fill(index, part, nums)
    return _write(path, part, snapshot, index, secrets.token_hex(4), progress)


def _update_part(
    path: Path, part: Part, snapshot: Snapshot, entry: IndexEntry, progress: Callable[[str], None] | None
) -> IndexEntry | None:
    """Write the index of an entry once more, with the items of now; ``None`` where it has to be built anew."""
    file = path / FOLDER / entry.file
    if problem_of(file, entry) is not None or snapshot.epoch <= entry.epoch:
        return None
    try:
        index = FaissIndex.load(file)
    except (CorruptionError, InputError, OSError, RuntimeError):  # RuntimeError: FAISS cannot read it
        return None
    gone = index.ids[~part.contains(index.ids)]
    grown = index.kind == "ivf" and part.count > RETRAIN * index.trained_for
    if grown or (index.kind == "hnsw" and len(gone) > DRIFT * len(index)):
        return None
    _say(progress, f"updating {entry.kind}", part)
    if index.kind == "ivf":
        index.remove(gone)
    held = np.zeros(part.num_limit, bool)
    held[index.ids] = True
    nums = part.nums
    _fill(index, part, nums[~held[nums]])
    return _write(path, part, snapshot, index, entry.training, progress)


def _fill(index: FaissIndex, part: Part, nums: NDArray[np.int64]) -> None:
    for start in range(0, len(nums), BLOCK):
        block = nums[start : start + BLOCK]
        index.add(block, part.vectors_of(block), distinct=True)


def _say(progress: Callable[[str], None] | None, text: str, part: Part) -> None:
    if progress is not None:
        progress(f"{text} ({part.count} items of {part.space.fingerprint[:12]})")


def _write(
    path: Path, part: Part, snapshot: Snapshot, index: FaissIndex, training: str, progress: Callable[[str], None] | None
) -> IndexEntry:
    _say(progress, "measuring recall", part)
    # A part gives its share of a merged list: to find more of its neighbours than that would be paid for nothing.
    index.measure(max(1, math.ceil(10 * part.count / max(part.count, snapshot.live))))
    _say(progress, "writing", part)
    # Never the name of an earlier file: who reads that one must not find another in its place.
    digest = sha256(part.space.fingerprint.encode()).hexdigest()[:16]
    file = path / FOLDER / f"{digest}-{snapshot.epoch}-{training}.faiss"
    try:
        index.save(file)
    except OSError as exc:
        if exc.errno in DISK_FULL:
            raise disk_full(file, exc) from exc
        raise
    size, crc = _size_and_crc(file)
    return IndexEntry(
        part.space.fingerprint, file.name, index.kind, len(index), index.measured_recall, snapshot.epoch, size, crc
    )


@contextlib.contextmanager
def _building(folder: Path, *, create: bool = True) -> Iterator[None]:
    """One process builds at a time; what others left unfinished may be removed whenever nobody does."""
    if create:
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    descriptor = os.open(folder / "build.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"an index of gallery {folder.parent} is being built already; wait until that is done"
            raise GalleryLockedError(message) from None
        yield
    finally:
        os.close(descriptor)


def collect_garbage(db: sqlite3.Connection, path: Path) -> list[str]:
    """Inside a transaction: forget the indexes of spaces without vectors and remove every file that no entry names."""
    if _has_tables(db):
        db.execute("DELETE FROM index_file WHERE space NOT IN (SELECT space FROM segment)")
    removed = []
    with contextlib.suppress(FileNotFoundError, GalleryLockedError), _building(path / FOLDER, create=False):
        for file in orphans(db, path):
            file.unlink(missing_ok=True)
            removed.append(file.name)
    return removed


def orphans(db: sqlite3.Connection, path: Path) -> list[Path]:
    """Files under ``idx/`` that no entry names: left by a killed process, or being built now."""
    known = {entry.file for entry in read_entries(db).values()}
    folder = path / FOLDER
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in files if file.name not in known and file.suffix in (".faiss", ".tmp")]
