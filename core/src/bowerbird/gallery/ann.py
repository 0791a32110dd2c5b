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
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import GalleryError, GalleryLockedError, InputError, MissingExtraError, did_you_mean
from bowerbird.gallery.catalog import DISK_FULL, disk_full
from bowerbird.gallery.part import MARGIN, Part
from bowerbird.gallery.segments import sync_folder
from bowerbird.retrieval.index import FaissIndex, Hits

if TYPE_CHECKING:
    from bowerbird.gallery.storage import Storage

KINDS = ("exact", "ivf", "hnsw")
FOLDER = "idx"
MAX_DEAD = 0.3  # with more of its items gone an index finds too little, and an exact search is the better bargain

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


# ------------------------------------------------------------------------------------------------------- search


class CoveredPart:
    """A part of a snapshot and an index over some of its items. Searches as ``Part`` does, approximately.

    Attributes:
        usable: Whether at most ``MAX_DEAD`` of the index' items have left the part.
        fresh: The items of the part that the index lacks.
    """

    def __init__(self, part: Part, index: FaissIndex) -> None:
        self.part, self.index = part, index
        nums = index.ids[index.ids < part.num_limit]
        nums = nums[part.contains(nums)]
        self.alive = len(nums)
        self.usable = self.alive > 0 and self.alive >= (1 - MAX_DEAD) * len(index)
        covered = np.zeros(part.num_limit, bool)
        covered[nums] = True
        segments = []
        for segment, live in part.segments:
            fresh = ~covered[segment.nums]
            segments.append((segment, fresh if live is None else fresh & live))
        self.fresh = Part(part.space, tuple(segments), part.num_limit)

    def search(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Hits:
        """See ``Part.search``. The index may miss an item; the distances of those it finds are exact.

        A filter (``allowed``) and a query for which the index has too few live items are searched exactly.
        """
        if allowed is not None:
            return self.part.search(queries, k, allowed)
        # Items that are gone still stand in the index: fetch so many more that k and a margin remain.
        found = self.index.search(queries, math.ceil((k + MARGIN) * len(self.index) / self.alive)).ids
        known = (found >= 0) & (found < self.part.num_limit)
        rows = np.where(known, self.part.row_of[np.where(known, found, 0)], -1)
        ids, distances = self.part.exact(queries, rows, k)
        few = np.flatnonzero(np.count_nonzero(ids >= 0, axis=1) < min(k, self.alive))
        if len(few):
            exact = self.part.search(queries[few], k)
            ids[few], distances[few] = exact.ids, exact.distances
        if not self.fresh.count:
            return Hits(ids, distances)
        fresh = self.fresh.search(queries, k)
        fresh.distances[few], fresh.ids[few] = np.inf, -1  # the exact search has found these already
        ids, distances = np.hstack([ids, fresh.ids]), np.hstack([distances, fresh.distances])
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return Hits(np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1))


class IndexCache:
    """The index files that a process has read; each is read once, when it is first searched. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._loaded: dict[str, FaissIndex | None] = {}

    def get(self, entry: IndexEntry) -> FaissIndex | None:
        """The index of an entry; ``None``, and one warning for other causes than a missing file, if unusable."""
        with self._lock:
            if entry.file not in self._loaded:
                self._loaded[entry.file], why = self._read(entry)
                if why:
                    warnings.warn(f"{why}; searches of {self.path} are exact", IndexUnusableWarning, stacklevel=2)
            return self._loaded[entry.file]

    def _read(self, entry: IndexEntry) -> tuple[FaissIndex | None, str | None]:
        file = self.path / FOLDER / entry.file
        why = problem_of(file, entry)
        if why is not None:
            return None, why if file.exists() else None
        try:
            return FaissIndex.load(file), None
        except MissingExtraError as exc:
            return None, f"the approximate index needs FAISS: {exc}"
        except Exception as exc:  # written by another version of FAISS: a cache must not stop a search
            return None, f"the index file {file} cannot be read ({type(exc).__name__}: {exc})"

    def keep(self, files: set[str]) -> None:
        """Forget the indexes that no entry names any more."""
        with self._lock:
            self._loaded = {name: index for name, index in self._loaded.items() if name in files}


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
    (storage.path / FOLDER).mkdir(exist_ok=True)
    sync_folder(storage.path)
    with _building(storage.path / FOLDER):
        if settings is not None:
            snapshot = storage.snapshot()
            parts = [part for part in snapshot.parts if part.count]
            entries = [_build_part(storage.path, part, snapshot.epoch, settings, progress) for part in parts]
        with storage.catalog.writing() as db:
            for statement in TABLES:
                db.execute(statement)
            stored = settings.model_dump(exclude={"kind"}, exclude_unset=True) if settings is not None else {}
            value = json.dumps({"kind": kind, "config": stored})
            db.execute("INSERT OR REPLACE INTO setting VALUES ('index', ?)", (value,))
            db.execute("DELETE FROM index_file")
            # An upgrade may have ended meanwhile: what it dropped needs no index.
            served = {row[0] for row in db.execute("SELECT DISTINCT space FROM segment")}
            entries = [entry for entry in entries if entry.space in served]
            db.executemany("INSERT INTO index_file VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [astuple(e) for e in entries])
    storage.collect_garbage()
    return entries


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
    path: Path, part: Part, epoch: int, settings: Any, progress: Callable[[str], None] | None
) -> IndexEntry:
    def say(text: str) -> None:
        if progress is not None:
            progress(f"{text} ({part.count} items of {part.space.fingerprint[:12]})")

    index = FaissIndex.build(settings)
    say(f"building {settings.kind}")
    vectors = part.vectors()
    index.add(part.nums, vectors)
    say("measuring recall")
    index.search(np.asarray(vectors[:1], np.float32), 1)  # the first search chooses the effort
    say("writing")
    # Never the name of an earlier file: who reads that one must not find another in its place.
    digest = sha256(part.space.fingerprint.encode()).hexdigest()[:16]
    file = path / FOLDER / f"{digest}-{epoch}-{secrets.token_hex(4)}.faiss"
    try:
        index.save(file)
    except OSError as exc:
        if exc.errno in DISK_FULL:
            raise disk_full(file, exc) from exc
        raise
    size, crc = _size_and_crc(file)
    return IndexEntry(
        part.space.fingerprint, file.name, settings.kind, len(index), index.measured_recall, epoch, size, crc
    )


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[None]:
    """One process builds at a time; what others left unfinished may be removed whenever nobody does."""
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
    with contextlib.suppress(FileNotFoundError, GalleryLockedError), _building(path / FOLDER):
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
