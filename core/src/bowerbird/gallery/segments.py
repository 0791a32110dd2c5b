"""Segment files: append-only vectors of one space beside the numbers of their items.

``seg/<sid>.f32`` (or ``.f16``) has the vectors, ``seg/<sid>.ids`` their int64 item numbers, in the same order of rows.
How many rows count is decided by the catalogue alone: bytes past the committed tail are never read, so a torn write is
invisible.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bowerbird.gallery.catalog import DISK_FULL, disk_full

CHUNK_BYTES = 32 << 20  # what a writer holds in memory beyond its caller's array
SUFFIX = {"float32": ".f32", "float16": ".f16"}
IDS = np.dtype("<i8")


@dataclass(frozen=True)
class Batch:
    """Rows ``[start, start + n)`` of a segment, written together, with the CRC32 of their bytes."""

    start: int
    n: int
    crc_vectors: int
    crc_ids: int


@dataclass(frozen=True)
class SegmentInfo:
    """A segment as the catalogue knows it at one epoch."""

    sid: str
    space: str
    dtype: str
    dim: int
    rows: int

    @property
    def row_bytes(self) -> int:
        return self.dim * np.dtype(self.dtype).itemsize

    def vector_file(self, folder: Path) -> Path:
        return folder / (self.sid + SUFFIX[self.dtype])

    def id_file(self, folder: Path) -> Path:
        return folder / (self.sid + ".ids")


class SegmentWriter:
    """The one process that appends to a segment. Holds ``flock`` on its id file until ``close``.

    A worker that died frees its segment; whoever asks next goes on where the committed rows end.
    """

    def __init__(self, folder: Path, info: SegmentInfo) -> None:
        """Raises ``BlockingIOError`` if another process appends to it, ``FileNotFoundError`` if it was removed
        meanwhile."""
        self.folder, self.info = folder, info
        self.tail = info.rows
        self._written: list[Batch] = []
        self._ids_fd = os.open(info.id_file(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._vectors_fd = -1
        try:
            fcntl.flock(self._ids_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._ids_fd).st_nlink == 0:  # the collector of orphans was faster
                raise FileNotFoundError(errno.ENOENT, "segment was removed", str(info.id_file(folder)))
            self._vectors_fd = os.open(info.vector_file(folder), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except BaseException:
            self.close()
            raise

    @classmethod
    def new(cls, folder: Path, space: str, dtype: str, dim: int) -> SegmentWriter:
        while True:
            try:
                return cls(folder, SegmentInfo(secrets.token_hex(6), space, dtype, dim, 0))
            except (FileNotFoundError, BlockingIOError):  # lost a race with the collector of orphans
                continue

    def append(self, vectors: NDArray, nums: NDArray[np.int64]) -> Batch:
        """Write rows past the tail; they count only after ``sync`` and a commit of the batch in the catalogue."""
        vectors = np.ascontiguousarray(vectors, self.info.dtype)
        nums = np.ascontiguousarray(nums, IDS)
        vector_bytes, id_bytes = _bytes_of(vectors), _bytes_of(nums)
        try:
            _write_all(self._vectors_fd, vector_bytes, self.tail * self.info.row_bytes)
            _write_all(self._ids_fd, id_bytes, self.tail * IDS.itemsize)
        except OSError as exc:
            raise self._failed(exc) from exc
        batch = Batch(self.tail, len(nums), zlib.crc32(vector_bytes), zlib.crc32(id_bytes))
        self.tail += len(nums)
        self._written.append(batch)
        return batch

    def flush(self) -> None:
        """``fdatasync`` of the vectors written so far; may run in a thread while the next rows are appended."""
        try:
            os.fdatasync(self._vectors_fd)
        except OSError as exc:
            raise self._failed(exc) from exc

    def sync(self) -> list[Batch]:
        """Make every appended row durable; returns the batches to commit."""
        self.flush()
        try:
            os.fdatasync(self._ids_fd)
            if self.info.rows == 0:  # new files: their names must be durable too
                sync_folder(self.folder)
        except OSError as exc:
            raise self._failed(exc) from exc
        return list(self._written)

    def committed(self) -> None:
        """The catalogue has the batches: the tail is the truth now."""
        self.info = SegmentInfo(self.info.sid, self.info.space, self.info.dtype, self.info.dim, self.tail)
        self._written = []

    def discard(self) -> None:
        """Forget what was appended since the last commit, and give the space back."""
        self.tail = self.info.rows
        self._written = []
        os.ftruncate(self._vectors_fd, self.tail * self.info.row_bytes)
        os.ftruncate(self._ids_fd, self.tail * IDS.itemsize)

    def _failed(self, exc: OSError) -> Exception:
        return disk_full(self.info.vector_file(self.folder), exc) if exc.errno in DISK_FULL else exc

    def close(self) -> None:
        for descriptor in (self._vectors_fd, self._ids_fd):  # the lock, which is on the ids, is freed last
            if descriptor >= 0:
                os.close(descriptor)
        self._vectors_fd = self._ids_fd = -1


class MappedSegment:
    """Rows ``[0, rows)`` of a segment, memory-mapped. The mapping outlives the removal of the file.

    Attributes:
        vectors: ``(rows, dim)``, read only.
        nums: int64 ``(rows,)``, item numbers, read only.
        problem: What is wrong with the files, or ``None``. Rows that are missing on disk are not mapped.
    """

    def __init__(self, folder: Path, info: SegmentInfo) -> None:
        self.info = info
        self.problem: str | None = None
        vector_file, id_file = info.vector_file(folder), info.id_file(folder)
        rows = info.rows
        for file, width in ((vector_file, info.row_bytes), (id_file, IDS.itemsize)):
            size = file.stat().st_size if file.exists() else -1
            if size < info.rows * width:
                found = "the file is missing" if size < 0 else f"it has {size} bytes instead of {info.rows * width}"
                kept = max(size, 0) // width
                self.problem = f"segment {file} is truncated: {found}; rows {kept} to {info.rows - 1} are lost"
                rows = min(rows, kept)
        self.vectors = _map(vector_file, rows * info.row_bytes, info.dtype).reshape(rows, info.dim)
        self.nums: NDArray[np.int64] = _map(id_file, rows * IDS.itemsize, IDS)
        self.rows = rows

    def damaged(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, str]]:
        """The batches whose bytes differ from their checksum (or are missing), each with what is wrong."""
        for batch in batches:
            stop = batch.start + batch.n
            if stop > self.rows:
                yield batch, self.problem or f"segment {self.info.sid} ends before row {stop}"
                continue
            for array, crc, suffix in (
                (self.vectors[batch.start : stop], batch.crc_vectors, SUFFIX[self.info.dtype]),
                (self.nums[batch.start : stop], batch.crc_ids, ".ids"),
            ):
                if zlib.crc32(_bytes_of(array)) != crc:
                    where = f"rows {batch.start} to {stop - 1} of segment {self.info.sid}{suffix}"
                    yield batch, f"{where} differ from their checksum"
                    break


def crc_of(nums: NDArray[np.int64]) -> int:
    return zlib.crc32(_bytes_of(np.ascontiguousarray(nums, IDS)))


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unused(folder: Path, known: set[str]) -> list[str]:
    """Remove segment files that the catalogue does not know and that no process holds; returns their names.

    A mapping in another process keeps its bytes until it is closed, so that a reader of an older snapshot is not
    disturbed.
    """
    removed = []
    for file in sorted(folder.iterdir()):
        if file.stem in known or file.suffix not in (".ids", *SUFFIX.values()):
            continue
        lock_file = file.with_suffix(".ids")
        try:
            descriptor = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            descriptor = -1  # vectors without ids: an interrupted removal
        try:
            if descriptor >= 0:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for suffix in (*SUFFIX.values(), ".ids"):
                if file.with_suffix(suffix).exists():
                    file.with_suffix(suffix).unlink()
                    removed.append(file.with_suffix(suffix).name)
        except BlockingIOError:
            continue
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return removed


def _map(file: Path, size: int, dtype: str | np.dtype) -> NDArray:
    if size == 0:
        return np.empty(0, dtype)
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), dtype)
    finally:
        os.close(descriptor)


def _bytes_of(array: NDArray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return array.data.cast("B") if array.size else memoryview(b"")


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written
