"""Uploads and deletions: from what a client sends to what is committed.

A picture is written to its file, and the file flushed to the disk, before the commit that names it; so an item that was
answered for is there with its picture, whenever the service is killed. What a killed service leaves are files that no
item names; they are removed when the next one starts.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np

from bowerbird.errors import DataError, InputError, SpaceError
from bowerbird.gallery.vectors import checked_ids, metadata_json
from bowerbird.serve.commits import Commits, Row, same, seen
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import Added, Deleted, NewItem, NewVectors
from bowerbird.serve.uploads import Uploads, uploads_of

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item, Space
    from bowerbird.serve.decoding import Decoders
    from bowerbird.serve.encoders import Encoders
    from bowerbird.serve.settings import ServeSettings

T = TypeVar("T")

ATTEMPTS = 3  # to encode a batch again because an upgrade ended or began meanwhile
PICTURES_FAULT = (413, 415, 422)  # statuses of problems that another picture would not have


class Picture(Protocol):
    """An uploaded file, such as Starlette's ``UploadFile``."""

    async def read(self, size: int = -1) -> bytes: ...
    async def seek(self, offset: int) -> None: ...


class Contents:
    """What clients put into the gallery and take out of it. An async context manager."""

    def __init__(self, settings: ServeSettings, gallery: Gallery, encoders: Encoders, decoders: Decoders) -> None:
        self.gallery, self.encoders, self.decoders = gallery, encoders, decoders
        self.uploads = uploads_of(settings, gallery)
        self.commits = Commits(gallery, self.uploads)
        self._room = asyncio.Semaphore(2 * settings.decoders + 2)  # pictures in memory
        self._swept: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self.uploads is not None:
            await asyncio.to_thread(self.uploads.open)
            self._swept = asyncio.create_task(asyncio.to_thread(self.uploads.sweep))
        await self.commits.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.commits.__aexit__(*exc)
        if self.uploads is not None and self._swept is not None:
            await asyncio.wait([self._swept])
            self.uploads.close()

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
        if self.uploads is None or self._swept is None:
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
                return await self._add(self.uploads, items, files, space, on_error)
            except SpaceError:  # an upgrade has ended or begun meanwhile, or there is no encoder, which is seen at once
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    async def _add(
        self, uploads: Uploads, items: Sequence[NewItem], files: Sequence[Picture], space: Space, on_error: str
    ) -> Added:
        encoder = await self.encoders.get(space)
        preprocessing = encoder.module.preprocessing
        if preprocessing is None or encoder.frames is not None:
            raise ProblemError(
                409,
                "this gallery holds no pictures; add videos with `bowerbird gallery add`, vectors by /v1/items/vectors",
            )
        known = await asyncio.to_thread(self.commits.known, [item.id for item in items])

        held: list[tuple[str, Path]] = []

        async def one(item: NewItem, file: Picture, there: Item | None) -> Row | None:
            async with self._room:
                await file.seek(0)
                data = await file.read()
                digest = await asyncio.to_thread(_sha256, data)
                if same(there, digest, item.metadata):
                    return None
                prepared = (await self.decoders.prepare(data, [preprocessing]))[0]
                path = uploads.place(item.id, digest, data)
                held.append((item.id, path))
                await _to_the_end(asyncio.to_thread(uploads.write, path, data))
            vector = await self.encoders.encode(space.fingerprint, prepared)
            return Row(item.id, vector, item.metadata, digest, path)

        try:
            jobs = [one(*three) for three in zip(items, files, known, strict=True)]
            rows, failed = await _all(jobs, [item.id for item in items], skip=on_error == "skip")
        except BaseException:
            await asyncio.shield(asyncio.to_thread(uploads.release, held))
            raise
        there = [item.id for item, row in zip(items, rows, strict=True) if row is None and item.id not in failed]
        added = await self.commits.add([row for row in rows if row is not None], space.fingerprint, held)
        return added.model_copy(update={"unchanged": [*added.unchanged, *there], "failed": failed})

    async def add_vectors(self, request: NewVectors) -> Added:
        """Add vectors as items without a picture, in one commit.

        Raises:
            InputError: If an id is given twice, or metadata cannot be kept.
            SpaceError: If a width is wrong, or an upgrade is under way and no space is named.
            DataError: If a vector is not finite or has length zero.
        """
        _check(request.items)
        rows = await asyncio.to_thread(self._rows_of_vectors, request)
        return await self.commits.add(rows, request.space)

    def _rows_of_vectors(self, request: NewVectors) -> list[Row]:
        snapshot = self.gallery.snapshot()
        if request.space is None and snapshot.upgrade is not None:
            raise SpaceError("an upgrade is under way: say of which `space` the vectors are; /v1/spaces has them")
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
            rows.append(Row(item.id, vector, item.metadata, digest))
        return rows

    async def delete(self, ids: Sequence[str]) -> Deleted:
        """Delete items and their uploaded pictures, in one commit. Ids that are not there are no error.

        Raises ``InputError`` for what cannot be an id.
        """
        return await self.commits.delete(checked_ids(list(dict.fromkeys(ids))))

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


def _check(items: Sequence[NewItem]) -> None:
    """What can be wrong with ids and metadata, before a picture is looked at."""
    checked_ids([item.id for item in items])
    metadata_json([item.metadata for item in items], len(items))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _to_the_end(work: Awaitable[T]) -> T:
    """What ``work`` gives. Where the caller is cancelled meanwhile (its client went away), after ``work`` has ended."""
    future = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        seen(future)
        raise


async def _all(jobs: Sequence[Any], ids: Sequence[str], *, skip: bool) -> tuple[list[Row | None], dict[str, str]]:
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
    rows: list[Row | None] = []
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
