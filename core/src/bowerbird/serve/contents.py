"""Uploads and deletions: pictures kept as files, and commits that several requests share.

A picture is written to its file, and the file flushed to the disk, before the commit that names it; so an item that was
answered for is there with its picture, whenever the service is killed. What a killed service leaves are files that no
item names; they are removed when the next one starts.

Files are named by their content and by the id of their item, ``ab/abcd...-<of the id>.jpg``: nothing of a client gets
into a path, and no two items share a file, so that one is removed with its item and nothing is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np

from bowerbird.errors import (
    BowerbirdError,
    DataError,
    GalleryLockedError,
    InputError,
    SpaceError,
    StoreUnavailableError,
    UnknownNameError,
)
from bowerbird.files import write_atomically
from bowerbird.gallery.open import folder_of, safe_url
from bowerbird.gallery.segments import sync_folder
from bowerbird.gallery.vectors import checked_ids, metadata_json
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import Added, Deleted, NewItem, NewVectors

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item, Space
    from bowerbird.serve.decoding import Decoders
    from bowerbird.serve.encoders import Encoders
    from bowerbird.serve.settings import ServeSettings

log = logging.getLogger("bowerbird.serve")
T = TypeVar("T")

OWNER = "owner.json"  # in the folder: whose uploads these are; locked by the service that writes them
COMMIT_ITEMS = 1000  # of waiting requests that become one commit
ATTEMPTS = 3  # to encode a batch again because an upgrade ended or began meanwhile
PICTURES_FAULT = (413, 415, 422)  # statuses of problems that another picture would not have
_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}\.[a-z0-9]{1,4}")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.\w+")  # as `write_atomically` names what it has not renamed yet

# What a file begins with. Only for its name, which people see; pictures are opened by their content everywhere.
_BEGINNINGS = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"\0\0\0\x0cjP", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"\0\0\1\0", "ico"),
)


class Picture(Protocol):
    """An uploaded file, such as Starlette's ``UploadFile``."""

    async def read(self, size: int = -1) -> bytes: ...
    async def seek(self, offset: int) -> None: ...


def _future() -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # its client may have gone away
    return future


@dataclass(frozen=True)
class _Row:
    """An item that is about to be committed."""

    id: str
    vector: np.ndarray
    metadata: Mapping[str, Any]
    content_hash: str
    file: Path | None = None


@dataclass(eq=False)
class _Batch:
    rows: list[_Row]
    space: str | None
    done: asyncio.Future[Added] = field(default_factory=_future)


@dataclass(eq=False)
class _Deletion:
    ids: list[str]
    done: asyncio.Future[Deleted] = field(default_factory=_future)


class Contents:
    """What clients put into the gallery and take out of it. An async context manager.

    One thread commits: requests that wait for it together become one commit. Other processes may write as well.
    """

    def __init__(self, settings: ServeSettings, gallery: Gallery, encoders: Encoders, decoders: Decoders) -> None:
        self.gallery, self.encoders, self.decoders = gallery, encoders, decoders
        self.folder = None if settings.read_only else contents_folder(settings)
        self._owner = safe_url(settings.gallery) if settings.contents is not None else None
        self._owned: IO[str] | None = None
        self._held: Counter[str] = Counter()  # names of files that a request is about to commit
        self._files = threading.Lock()  # over looking at `_held` and removing a file
        self._room = asyncio.Semaphore(2 * settings.decoders + 2)  # pictures in memory
        self._swept: asyncio.Task[None] | None = None
        self._waiting: deque[_Batch | _Deletion] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._committer: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bowerbird-commit")

    async def __aenter__(self) -> Self:
        if self.folder is not None:
            self._owned = await asyncio.to_thread(_own, self.folder, self._owner)
            self._swept = asyncio.create_task(asyncio.to_thread(self._try_to_sweep))
        self._committer = asyncio.create_task(self._commit_what_waits())
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Whatever waits is committed first."""
        self._stopping = True
        self._wake.set()
        if self._committer is not None:
            await self._committer
        if self._swept is not None:
            await asyncio.wait([self._swept])
        self._thread.shutdown()
        if self._owned is not None:
            self._owned.close()  # and with it the lock

    # ------------------------------------------------------------------------------------------------- requests

    async def add(self, items: Sequence[NewItem], files: Sequence[Picture], *, on_error: str = "raise") -> Added:
        """Keep pictures and add them as items, all in one commit; ids that are there with another picture or other
        metadata are replaced.

        Args:
            items: N of them, with distinct ids.
            files: Their N pictures, in the same order.
            on_error: ``skip`` leaves out pictures that cannot be used, and says which; ``raise`` refuses the batch.

        Raises:
            InputError: If numbers differ, an id is given twice, or metadata cannot be kept.
            DataError: If a picture cannot be used; names the id.
            ProblemError: If this service has no place for pictures, or its gallery takes none.
            SpaceError: If there is no encoder for what the gallery holds.
            StoreUnavailableError: If the disk is full. Nothing was added.
        """
        if self.folder is None or self._swept is None:
            raise ProblemError(
                409,
                "this service has no place for pictures: its gallery is not a folder. Start it with --contents FOLDER, "
                "or add vectors by /v1/items/vectors",
            )
        if len(items) != len(files):
            raise InputError(f"{len(items)} items need {len(items)} files, in the same order; {len(files)} were sent")
        _check(items)
        await asyncio.shield(self._swept)  # so that nothing is written that the sweep would take for a leftover
        for attempt in range(ATTEMPTS):
            space = await asyncio.to_thread(self._space_of_pictures)
            try:
                return await self._add(items, files, space, on_error)
            except SpaceError:
                now = await asyncio.to_thread(self._space_of_pictures)
                if now.fingerprint == space.fingerprint or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    async def _add(self, items: Sequence[NewItem], files: Sequence[Picture], space: Space, on_error: str) -> Added:
        encoder = await self.encoders.get(space)
        preprocessing = encoder.module.preprocessing
        if preprocessing is None or encoder.frames is not None:
            raise ProblemError(
                409,
                "this gallery holds no pictures; add videos with `bowerbird gallery add`, vectors by /v1/items/vectors",
            )
        known = await asyncio.to_thread(self._known, [item.id for item in items])

        held: list[tuple[str, Path]] = []

        async def one(item: NewItem, file: Picture, there: Item | None) -> _Row | None:
            async with self._room:
                await file.seek(0)
                data = await file.read()
                digest = await asyncio.to_thread(_sha256, data)
                if _same(there, digest, item.metadata):
                    return None
                prepared = (await self.decoders.prepare(data, [preprocessing]))[0]
                path = self._place(item.id, digest, data)
                held.append((item.id, path))
                with self._files:
                    self._held[path.name] += 1
                await _to_the_end(asyncio.to_thread(_write, path, data))
            vector = await self.encoders.encode(space.fingerprint, prepared)
            return _Row(item.id, vector, item.metadata, digest, path)

        try:
            jobs = [one(*three) for three in zip(items, files, known, strict=True)]
            rows, failed = await _all(jobs, [item.id for item in items], skip=on_error == "skip")
            there = [item.id for item, row in zip(items, rows, strict=True) if row is None and item.id not in failed]
            batch = _Batch([row for row in rows if row is not None], space.fingerprint)
            added = await self._commit(batch)
        finally:
            await asyncio.shield(asyncio.to_thread(self._release, held))
        return added.model_copy(update={"unchanged": [*added.unchanged, *there], "failed": failed})

    async def add_vectors(self, request: NewVectors) -> Added:
        """Add vectors as items without a picture, in one commit.

        Raises:
            InputError: If an id is given twice, or metadata cannot be kept.
            SpaceError: If a width is wrong, or an upgrade is under way and no space is named.
            DataError: If a vector is not finite or has length zero.
        """
        _check(request.items)
        snapshot = await asyncio.to_thread(self.gallery.snapshot)
        space = snapshot.spaces.get(request.space) if request.space is not None else snapshot.write_space
        if space is None:
            raise SpaceError(f"this gallery knows no space {request.space!r}; /v1/spaces has the fingerprints")
        rows = []
        for item in request.items:
            if len(item.vector) != space.dim:
                raise SpaceError(f"the vector of {item.id!r} has width {len(item.vector)}; {space.dim} is the space's")
            with np.errstate(over="ignore"):
                vector = np.asarray(item.vector, np.float64).astype(np.float32)
            if not np.isfinite(vector).all() or not vector.any():
                raise DataError(f"the vector of {item.id!r} has NaN or infinity, or is zero; it has no direction")
            digest = _sha256(space.fingerprint.encode() + vector.tobytes())
            rows.append(_Row(item.id, vector, item.metadata, digest))
        return await self._commit(_Batch(rows, request.space))

    async def delete(self, ids: Sequence[str]) -> Deleted:
        """Delete items and their uploaded pictures, in one commit. Ids that are not there are no error."""
        deletion = _Deletion(checked_ids(list(dict.fromkeys(ids))))
        self._waiting.append(deletion)
        self._wake.set()
        return await deletion.done

    async def _commit(self, batch: _Batch) -> Added:
        self._waiting.append(batch)
        self._wake.set()
        try:
            return await asyncio.shield(batch.done)
        except asyncio.CancelledError:  # the client went away
            if batch in self._waiting:
                self._waiting.remove(batch)
            else:
                await asyncio.wait(
                    [batch.done]
                )  # a commit that has begun goes on, and its files are held until it ends
            raise

    # ------------------------------------------------------------------------------------------------- commits

    async def _commit_what_waits(self) -> None:
        while self._waiting or not self._stopping:
            if self._waiting:
                await self._make(self._next())
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next(self) -> list[Any]:
        """The next deletion, or as many batches as can be one commit."""
        changes = [self._waiting.popleft()]
        first = changes[0]
        ids = {row.id for row in first.rows} if isinstance(first, _Batch) else set()
        while isinstance(first, _Batch) and self._waiting and isinstance(more := self._waiting[0], _Batch):
            names = {row.id for row in more.rows}
            if more.space != first.space or names & ids or len(ids) + len(names) > COMMIT_ITEMS:
                break
            ids |= names
            changes.append(self._waiting.popleft())
        return changes

    async def _make(self, changes: Sequence[Any]) -> None:
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._write, changes)
        except (GalleryLockedError, StoreUnavailableError) as error:
            refused = [*changes, *self._waiting]  # whoever waits would wait as long, one after the other
            self._waiting.clear()
            for change in refused:
                if not change.done.done():
                    change.done.set_exception(error)
        except Exception as error:
            if len(changes) > 1:  # one of them is the reason: each alone, so that the others are not refused with it
                for change in changes:
                    await self._make([change])
            elif not changes[0].done.done():
                changes[0].done.set_exception(error)
        else:
            for change, result in zip(changes, results, strict=True):
                if not change.done.done():
                    change.done.set_result(result)

    def _write(self, changes: Sequence[Any]) -> list[Any]:
        return [self._delete(changes[0].ids)] if isinstance(changes[0], _Deletion) else self._write_rows(changes)

    def _write_rows(self, batches: Sequence[_Batch]) -> list[Added]:
        rows = [row for batch in batches for row in batch.rows]
        known = dict(zip([row.id for row in rows], self._known([row.id for row in rows]), strict=True))
        same = {row.id for row in rows if _same(known[row.id], row.content_hash, row.metadata)}
        fresh = [row for row in rows if row.id not in same]
        if fresh:
            self.gallery.add(
                [row.id for row in fresh],
                np.stack([row.vector for row in fresh]),
                uris=[None if row.file is None else str(row.file) for row in fresh],
                metadata=[row.metadata for row in fresh],
                content_hashes=[row.content_hash for row in fresh],
                space=batches[0].space,
                replace=True,
            )
        epoch = self.gallery.snapshot().epoch
        kept = {row.file for row in fresh}
        self._remove([file for row in fresh if (file := self._file_of(known[row.id])) is not None and file not in kept])
        results = []
        for batch in batches:
            names = [row.id for row in batch.rows]
            results.append(
                Added(
                    added=[name for name in names if known[name] is None],
                    replaced=[name for name in names if known[name] is not None and name not in same],
                    unchanged=[name for name in names if name in same],
                    failed={},
                    epoch=epoch,
                )
            )
        return results

    def _delete(self, ids: list[str]) -> Deleted:
        while True:
            found = [item for item in self.gallery.get_many(ids) if item is not None]
            try:
                if found:
                    self.gallery.delete([item.id for item in found])
                break
            except UnknownNameError:  # another process has deleted one of them meanwhile
                continue
        self._remove([file for item in found if (file := self._file_of(item)) is not None])
        names = {item.id for item in found}
        return Deleted(
            deleted=[name for name in ids if name in names],
            absent=[name for name in ids if name not in names],
            epoch=self.gallery.snapshot().epoch,
        )

    def _known(self, ids: Sequence[str]) -> list[Item | None]:
        """Items by id. One whose uploaded picture is lost counts as absent in its content: sending it again helps."""

        def is_lost(item: Item | None) -> bool:
            return item is not None and self._file_of(item) is not None and not Path(str(item.uri)).is_file()

        found = self.gallery.get_many(ids)
        return [replace(item, content_hash=None) if item is not None and is_lost(item) else item for item in found]

    def _space_of_pictures(self) -> Space:
        """The space whose encoder makes the vectors of new items now."""
        snapshot = self.gallery.snapshot()
        space = snapshot.write_space
        if not space.lifted:
            return space
        # A lifted space takes vectors of the space that it was made from, and maps them.
        for relation in snapshot.relations:
            if (relation.kind, relation.old) == ("transform", space.fingerprint):
                source = snapshot.spaces[relation.new]
                if not source.lifted:
                    return source
        raise SpaceError(f"no encoder makes vectors of the lifted space {space}; upgrade the gallery to an encoder")

    # ------------------------------------------------------------------------------------------------- files

    def _place(self, item_id: str, digest: str, data: bytes) -> Path:
        assert self.folder is not None
        name = f"{digest}-{_sha256(item_id.encode())[:16]}.{suffix_of(data)}"
        return self.folder / name[:2] / name

    def _file_of(self, item: Item | None) -> Path | None:
        """The uploaded picture of an item, ``None`` where its picture is somebody else's file, or there is none.

        By the name alone: the folder may have been moved, or be reached by another path.
        """
        if item is None or item.uri is None or self.folder is None:
            return None
        name = item.uri.rpartition("/")[2]
        return self.folder / name[:2] / name if _NAME.fullmatch(name) else None

    def _remove(self, files: Sequence[Path]) -> None:
        """Remove files that no item names any more, but for those that a request is about to name again."""
        for file in files:
            with self._files:
                if not self._held[file.name]:
                    with contextlib.suppress(OSError):  # the next start tries again
                        file.unlink(missing_ok=True)

    def _release(self, held: Sequence[tuple[str, Path]]) -> None:
        """What a request wrote and no item names is removed."""
        with self._files:
            self._held.subtract(path.name for _, path in held)
            self._held = +self._held
        with contextlib.suppress(BowerbirdError):  # then they stay until the next start
            items = self.gallery.get_many([name for name, _ in held])
            self._remove([path for (_, path), item in zip(held, items, strict=True) if self._file_of(item) != path])

    def _try_to_sweep(self) -> None:
        try:
            self._sweep()
        except (BowerbirdError, OSError) as error:
            log.warning("uploaded pictures that no item names were not removed: %s", error)

    def _sweep(self) -> None:
        """Remove files that no item names: of a service that was killed, of items that other processes deleted."""
        assert self.folder is not None
        if not any(self.folder.glob("[0-9a-f][0-9a-f]")):
            return  # without a look at every item
        names = (file.name for item in self.gallery.items() if (file := self._file_of(item)) is not None)
        # 8 bytes per name: two names with the same mark keep one file too many, never one too few.
        kept = set(np.fromiter((_mark(name) for name in names), np.uint64).tolist())
        removed = 0
        for folder in sorted(self.folder.glob("[0-9a-f][0-9a-f]")):
            for entry in os.scandir(folder):
                forgotten = _NAME.fullmatch(entry.name) and _mark(entry.name) not in kept
                if forgotten or _UNFINISHED.fullmatch(entry.name):  # nothing else in this folder is ours to remove
                    Path(entry.path).unlink(missing_ok=True)
                    removed += 1
        if removed:
            log.info("removed %d uploaded pictures that no item names", removed)


def contents_folder(settings: ServeSettings) -> Path | None:
    """Where uploaded pictures are kept; ``None`` for a gallery without a folder where no other was named."""
    if settings.contents is not None:
        return settings.contents.expanduser().resolve()
    gallery = folder_of(settings.gallery)
    return None if gallery is None else gallery.resolve() / "contents"


def suffix_of(data: bytes) -> str:
    """The suffix of a picture's file by what it begins with."""
    for beginning, suffix in _BEGINNINGS:
        if data.startswith(beginning):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "avif" if data[4:8] == b"ftyp" else "img"


def _own(folder: Path, owner: str | None) -> IO[str]:
    """Lock the folder for this service, for as long as the returned file is open; the kernel frees it with the process.

    Args:
        owner: The gallery, where the folder is not in the gallery itself.

    Raises:
        InputError: If the folder has the pictures of another gallery.
        GalleryLockedError: If another service writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / OWNER).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        content = file.read()
        known = json.loads(content) if content else {}
        if owner is not None and known.get("gallery", owner) != owner:
            raise InputError(
                f"{folder} has the uploaded pictures of the gallery {known['gallery']}, not of {owner}: choose another "
                f"folder. If the gallery was moved, remove {folder / OWNER}"
            )
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), **({"gallery": owner} if owner else {})}))
        file.flush()
    except BlockingIOError:
        file.close()
        raise GalleryLockedError(
            f"another service takes uploads into {folder} already. Stop it first, or start this one with --read-only"
        ) from None
    except BaseException:
        file.close()
        raise
    return file


def _write(path: Path, data: bytes) -> None:
    """The file, durable when this returns."""
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(exist_ok=True)
            sync_folder(path.parent.parent)
        write_atomically(path, data)
        sync_folder(path.parent)
    except OSError as error:
        log.error("an uploaded picture cannot be kept: %s", error)
        raise StoreUnavailableError(
            f"the picture cannot be kept ({error.strerror}); nothing was added. Free some space on the disk of the "
            "uploaded pictures, and send it again"
        ) from error


def _check(items: Sequence[NewItem]) -> None:
    """What can be wrong with ids and metadata, before a picture is looked at."""
    checked_ids([item.id for item in items])
    metadata_json([item.metadata for item in items], len(items))


def _same(item: Item | None, digest: str, metadata: Mapping[str, Any]) -> bool:
    return item is not None and item.content_hash == digest and _text(item.metadata) == _text(metadata)


def _text(metadata: Mapping[str, Any]) -> str:
    """As it is stored: ``1`` is not ``true``."""
    return json.dumps(dict(metadata), sort_keys=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _mark(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


async def _to_the_end(work: Awaitable[T]) -> T:
    """What ``work`` gives. Where the caller is cancelled meanwhile (its client went away), after ``work`` has ended."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # seen; nobody waits for it
        raise


async def _all(jobs: Sequence[Any], ids: Sequence[str], *, skip: bool) -> tuple[list[_Row | None], dict[str, str]]:
    """The rows of all jobs, and with ``skip`` the ids of those whose picture cannot be used, with the reason.

    Without ``skip`` the first such picture ends the others. Whatever happens, no job is left behind.
    """
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.wait(tasks, return_when=asyncio.ALL_COMPLETED if skip else asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    rows: list[_Row | None] = []
    failed: dict[str, str] = {}
    for name, task in zip(ids, tasks, strict=True):
        if task.cancelled():
            continue  # another one has an error
        error = task.exception()
        if error is None:
            rows.append(task.result())
        elif skip and _is_pictures_fault(error):
            rows.append(None)
            failed[name] = _reason(error)
        elif _is_pictures_fault(error):
            status = error.status if isinstance(error, ProblemError) else 422
            raise ProblemError(status, f"the picture of {name!r}: {_reason(error)}. Nothing was added") from error
        else:
            raise error
    return rows, failed


def _is_pictures_fault(error: BaseException) -> bool:
    return isinstance(error, DataError) or (isinstance(error, ProblemError) and error.status in PICTURES_FAULT)


def _reason(error: BaseException) -> str:
    return (error.detail if isinstance(error, ProblemError) else str(error)).rstrip(".")
