"""Changes to the items of a gallery, by one thread: requests that wait together become one commit."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.errors import GalleryLockedError, StoreUnavailableError, UnknownNameError
from bowerbird.serve.schemas import Added, Deleted

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item
    from bowerbird.serve.uploads import Held, Uploads

COMMIT_ITEMS = 1000  # of waiting requests that become one commit


@dataclass(frozen=True)
class Row:
    """An item that is about to be committed, with the file of its uploaded picture, if it has one."""

    id: str
    vector: np.ndarray
    metadata: Mapping[str, Any]
    content_hash: str
    file: Path | None = None


def same(item: Item | None, content_hash: str, metadata: Mapping[str, Any]) -> bool:
    """Whether an item is there already as it is sent."""
    return item is not None and item.content_hash == content_hash and _text(item.metadata) == _text(metadata)


def _text(metadata: Mapping[str, Any]) -> str:
    """As it is stored: ``1`` is not ``true``."""
    return json.dumps(dict(metadata), sort_keys=True)


def seen(done: asyncio.Future[Any]) -> None:
    """An error is no news where nobody waits for it any more: the client went away."""
    if not done.cancelled():
        done.exception()


def _future() -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(seen)
    return future


@dataclass(eq=False)
class _Batch:
    rows: Sequence[Row]
    space: str | None
    done: asyncio.Future[Added] = field(default_factory=_future)


@dataclass(eq=False)
class _Deletion:
    ids: Sequence[str]
    done: asyncio.Future[Deleted] = field(default_factory=_future)


class Commits:
    """An async context manager; what waits when it is left is committed first. Other processes may write as well."""

    def __init__(self, gallery: Gallery, uploads: Uploads | None) -> None:
        self.gallery, self.uploads = gallery, uploads
        self._waiting: deque[_Batch | _Deletion] = deque()
        self._wake = asyncio.Event()
        self._stopping = False
        self._worker: asyncio.Task[None] | None = None
        self._deciding: set[asyncio.Task[Added]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bowerbird-commit")

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stopping = True
        self._wake.set()
        if self._worker is not None:
            await self._worker
        await asyncio.gather(*self._deciding, return_exceptions=True)
        self._thread.shutdown()

    async def add(self, rows: Sequence[Row], space: str | None, held: Held = ()) -> Added:
        """Add rows, or replace what is there, in one commit with whoever waits.

        Args:
            space: Fingerprint of their vectors' space.
            held: Files that are released when it is decided, also where the client goes away meanwhile.

        Raises what ``Gallery.add`` does.
        """
        batch = _Batch(rows, space)

        async def decided() -> Added:
            self._put(batch)
            try:
                return await batch.done
            finally:
                if held and self.uploads is not None:
                    await asyncio.to_thread(self.uploads.release, held)

        task = asyncio.create_task(decided())
        self._deciding.add(task)
        task.add_done_callback(self._deciding.discard)
        task.add_done_callback(seen)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if batch in self._waiting:  # a commit that has begun goes on
                self._waiting.remove(batch)
                batch.done.cancel()
            raise

    async def delete(self, ids: Sequence[str]) -> Deleted:
        """Delete items with their uploaded pictures; ids that are not there are no error."""
        deletion = _Deletion(ids)
        self._put(deletion)
        return await deletion.done

    def known(self, ids: Sequence[str]) -> list[Item | None]:
        """Items by id. One whose uploaded picture is lost has no content: sending it again helps."""
        found = self.gallery.get_many(ids)
        uploads = self.uploads
        if uploads is None:
            return found
        return [item and (replace(item, content_hash=None) if uploads.is_lost(item) else item) for item in found]

    # ------------------------------------------------------------------------------------------------- the queue

    def _put(self, change: _Batch | _Deletion) -> None:
        self._waiting.append(change)
        self._wake.set()

    async def _work(self) -> None:
        while self._waiting or not self._stopping:
            if not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            elif self._waiting[0].done.done():
                self._waiting.popleft()  # its client went away
            else:
                await self._make(self._next())

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

    # ------------------------------------------------------------------------------------------------- in the thread

    def _write(self, changes: Sequence[Any]) -> list[Any]:
        return [self._delete(changes[0].ids)] if isinstance(changes[0], _Deletion) else self._add(changes)

    def _add(self, batches: Sequence[_Batch]) -> list[Added]:
        rows = [row for batch in batches for row in batch.rows]
        known = dict(zip([row.id for row in rows], self.known([row.id for row in rows]), strict=True))
        unchanged = {row.id for row in rows if same(known[row.id], row.content_hash, row.metadata)}
        fresh = [row for row in rows if row.id not in unchanged]
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
        self._remove_pictures([known[row.id] for row in fresh], kept={row.file for row in fresh})
        results = []
        for batch in batches:
            names = [row.id for row in batch.rows]
            results.append(
                Added(
                    added=[name for name in names if known[name] is None],
                    replaced=[name for name in names if known[name] is not None and name not in unchanged],
                    unchanged=[name for name in names if name in unchanged],
                    failed={},
                    epoch=epoch,
                )
            )
        return results

    def _delete(self, ids: Sequence[str]) -> Deleted:
        while True:
            found = [item for item in self.gallery.get_many(ids) if item is not None]
            try:
                if found:
                    self.gallery.delete([item.id for item in found])
                break
            except UnknownNameError:  # another process has deleted one of them meanwhile
                continue
        self._remove_pictures(found, kept=set())
        names = {item.id for item in found}
        return Deleted(
            deleted=[name for name in ids if name in names],
            absent=[name for name in ids if name not in names],
            epoch=self.gallery.snapshot().epoch,
        )

    def _remove_pictures(self, items: Sequence[Item | None], *, kept: set[Path | None]) -> None:
        """The uploaded pictures of items as they were."""
        if self.uploads is not None:
            files = [file for item in items if (file := self.uploads.file_of(item)) is not None]
            self.uploads.remove([file for file in files if file not in kept])
