"""Searches: by a picture, a text, an item or a vector, each on one snapshot, together where they wait together.

A search by a picture or a text encodes it by the encoders that the gallery needs now. Where an upgrade has moved on
meanwhile, and another space is needed than was encoded, that is encoded too and the search is asked again: the caller
sees neither the start nor the end of an upgrade.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np

from bowerbird.errors import BowerbirdError, DataError, InputError, SnapshotGoneError, SpaceError
from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.space import Item, Space
from bowerbird.serve.answering import ATTEMPTS, SERVING, MissingVectorsError, Query, Vectors, answer
from bowerbird.serve.batching import Batcher
from bowerbird.serve.compare import Comparison, compare, compared_spaces
from bowerbird.serve.decoding import Decoders
from bowerbird.serve.encoders import Encoders
from bowerbird.serve.metrics import Metrics
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import (
    MOST_RESULTS,
    CompareResponse,
    ItemSearch,
    Search,
    SearchResponse,
    TextSearch,
    VectorSearch,
)
from bowerbird.serve.settings import ServeSettings

log = logging.getLogger("bowerbird.serve")

Encode = Callable[[Sequence[Space]], Awaitable[Vectors]]

AT_ONCE = 64  # vectors per search call
FOLLOW_SECONDS = 0.5
MOST_FILTERS = 32
MOST_VALUES = 1000


class Engine:
    """An async context manager. Its methods raise ``ProblemError`` and ``BowerbirdError``."""

    def __init__(
        self, settings: ServeSettings, gallery: Gallery, encoders: Encoders, decoders: Decoders, metrics: Metrics
    ) -> None:
        self.settings, self.gallery = settings, gallery
        self.encoders, self.decoders, self.metrics = encoders, decoders, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bowerbird-search")
        self._searches: Batcher[Query, SearchResponse] = Batcher(
            partial(answer, gallery, encoders, metrics), self._thread, most=AT_ONCE, seen=self._seen
        )
        self._following: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._searches.start()
        self._following = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        await self._searches.stop()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    # ----------------------------------------------------------------------------------------------------- searches

    async def picture(self, data: bytes, search: Search) -> SearchResponse:
        """Search by the bytes of an uploaded picture."""
        return await self._encoded("image", self._picture_of(data), search)

    async def text(self, search: TextSearch) -> SearchResponse:
        """Search by a sentence, where the encoders take sentences."""
        return await self._encoded("text", self._text_of(search.text), search)

    async def item(self, search: ItemSearch) -> SearchResponse:
        """Items like one of the gallery, by its stored vectors; in a space where it has none yet its picture is
        encoded."""
        item = await self._item(search.id)
        return await self._encoded("item", lambda needs: self._vectors_of_item(item, needs), search, without=item.num)

    async def vector(self, search: VectorSearch) -> SearchResponse:
        """Search by a vector of the space that serves (during an upgrade: the old one), or by one per space."""
        if (search.vector is None) == (search.vectors is None):
            raise ProblemError(422, "a search by vector needs exactly one of `vector` and `vectors`")
        _check(search)
        given = {SERVING: search.vector} if search.vectors is None else dict(search.vectors)
        return await self._searches(Query("vector", given, search, time.perf_counter()))

    async def compare_picture(self, data: bytes, search: Search) -> CompareResponse:
        """The old system, the new one so far and what is served, for an uploaded picture."""
        return await self._compared(self._picture_of(data), search)

    async def compare_text(self, search: TextSearch) -> CompareResponse:
        return await self._compared(self._text_of(search.text), search)

    async def compare_item(self, search: ItemSearch) -> CompareResponse:
        item = await self._item(search.id)
        return await self._compared(lambda needs: self._vectors_of_item(item, needs, all_of_them=True), search, item)

    # ---------------------------------------------------------------------------------------- from queries to vectors

    def _needs(self) -> list[Space]:
        """The spaces in which a query is needed now. Blocks."""
        snapshot = self.gallery.snapshot()
        return [snapshot.spaces[name] for name in self.encoders.state(snapshot).needs]

    async def _encoded(self, kind: str, encode: Encode, search: Search, *, without: int = -1) -> SearchResponse:
        """``encode`` gives the vectors of the query in the spaces that it is asked for, as far as it can."""
        _check(search)
        began = time.perf_counter()
        vectors: Vectors = {}
        for attempt in range(ATTEMPTS):
            needs = await asyncio.to_thread(self._needs)
            missing = [space for space in needs if space.fingerprint not in vectors]
            if attempt and not missing:
                break
            vectors |= await encode(missing)
            try:
                return await self._searches(Query(kind, vectors, search, began, without))
            except MissingVectorsError:
                continue  # an upgrade was begun, or has ended, since the needs were asked for
        return await self._searches(Query(kind, vectors, search, began, without))

    def _picture_of(self, source: bytes | str) -> Encode:
        async def encode(spaces: Sequence[Space]) -> Vectors:
            names = [space.fingerprint for space in spaces]
            await self._load(spaces)
            prepared = await self.decoders.prepare(
                source,
                [self.encoders.preprocessing(name) for name in names],
                frames=[self.encoders.frames(name) for name in names],
            )
            encoded = [self.encoders.encode(name, array) for name, array in zip(names, prepared, strict=True)]
            return dict(zip(names, await asyncio.gather(*encoded), strict=True))

        return encode

    def _text_of(self, text: str) -> Encode:
        async def encode(spaces: Sequence[Space]) -> Vectors:
            await self._load(spaces)
            return {space.fingerprint: await self.encoders.encode_text(space.fingerprint, text) for space in spaces}

        return encode

    async def _load(self, spaces: Sequence[Space]) -> None:
        try:
            for space in spaces:
                await self.encoders.get(space)
        except SpaceError as error:
            raise ProblemError(409, str(error)) from error

    async def _item(self, name: str) -> Item:
        (item,) = await asyncio.to_thread(self.gallery.get_many, [name])
        if item is None:
            raise ProblemError(404, f"the gallery has no item {name[:200]!r}")
        return item

    async def _vectors_of_item(self, item: Item, needs: Sequence[Space], *, all_of_them: bool = False) -> Vectors:
        names = [space.fingerprint for space in needs]
        vectors, enough = await asyncio.to_thread(self._stored_vectors, item.num, names)
        missing = [space for space in needs if space.fingerprint not in vectors]
        if enough and not all_of_them:
            missing = []
        if missing and item.uri is not None:
            try:
                vectors |= await self._picture_of(item.uri)(missing)
            except (ProblemError, DataError, InputError) as error:  # relations may lead there from what it has
                log.info("item %r lacks a vector that is needed, and its picture gives none: %s", item.id, error)
        if not vectors:
            raise ProblemError(409, f"item {item.id[:200]!r} has no vector, and no picture that could be encoded now")
        return vectors

    def _stored_vectors(self, num: int, needs: Sequence[str]) -> tuple[Vectors, bool]:
        """Of an item: in the needed spaces; where it has none there, in those of the gallery's other spaces.

        And whether they are enough: all that are needed, or (a lifted space is not encoded in) one in every space that
        is searched.
        """
        snapshot = self.gallery.snapshot()
        found: Vectors = {}
        for name in (*needs, *snapshot.stack):
            if name in found or (name not in needs and found.keys() >= set(needs)):
                continue
            for part in (snapshot.part_of(name), None):
                rows = part if part is not None else snapshot.rows_of(name)
                if num < snapshot.num_limit and rows.contains(np.array([num]))[0]:
                    found[name] = rows.vectors_of(np.array([num]))[0]
                    break
        searched = {part.space.fingerprint for part in snapshot.served_parts if part.count}
        return found, found.keys() >= set(needs) or found.keys() >= searched

    # --------------------------------------------------------------------------------------------- the search thread

    def _seen(self, size: int) -> None:
        self.metrics.batch("search", size)
        self.metrics.queue("search", len(self._searches))
        self.metrics.queue("decode", self.decoders.waiting)

    # ------------------------------------------------------------------------------------------------------ compare

    async def _compared(self, encode: Encode, search: Search, item: Item | None = None) -> CompareResponse:
        _check(search)
        for attempt in range(ATTEMPTS):
            snapshot = await asyncio.to_thread(self.gallery.snapshot)
            await asyncio.to_thread(self.encoders.state, snapshot)  # raises where it cannot be searched at all
            needs = await asyncio.to_thread(compared_spaces, self.encoders.service, snapshot)
            vectors = await encode(needs)
            start = time.perf_counter()
            asked = Comparison(vectors, search, item, self.settings.label_key)
            loop = asyncio.get_running_loop()
            try:
                made = await loop.run_in_executor(
                    self._thread, compare, self.gallery, self.encoders.service, snapshot, asked
                )
            except SnapshotGoneError:
                if attempt == ATTEMPTS - 1:
                    raise
                continue
            except SpaceError as error:
                raise MissingVectorsError([space.fingerprint for space in needs]) from error
            self.metrics.searched("compare", time.perf_counter() - start)
            return made
        raise AssertionError("the last attempt raises")

    # ------------------------------------------------------------------------------------------- upgrades of others

    async def _follow(self) -> None:
        """Load the new encoder of an upgrade that another process has begun, before a search has to wait for it; and
        forget the old one some time after the end."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                needed, alive = await asyncio.to_thread(self._soon_needed)
                await self.encoders.keep(alive)
                for space in needed:
                    await self.encoders.get(space)
            except (BowerbirdError, ProblemError):  # the log has it; searches by vectors go on
                continue
            except Exception:
                log.exception("the service could not look for encoders that are needed")

    def _soon_needed(self) -> tuple[list[Space], set[str]]:
        """The spaces whose encoders searches need now or will, and with them those that comparisons may need."""
        snapshot = self.gallery.snapshot()
        soon = list(self.encoders.state(snapshot).needs)
        if snapshot.upgrade is not None and not snapshot.write_space.lifted:
            soon.append(snapshot.write_space.fingerprint)
        return [snapshot.spaces[name] for name in dict.fromkeys(soon)], {*soon, *snapshot.stack}


def _check(search: Search) -> None:
    """What the schema cannot say. Raises ``ProblemError`` 422."""
    if search.offset + search.k > MOST_RESULTS:
        raise ProblemError(422, f"offset + k is {search.offset + search.k}; at most {MOST_RESULTS} results are reached")
    if not search.where:
        return
    values = sum(len(wanted) if isinstance(wanted, list) else 1 for wanted in search.where.values())
    if len(search.where) > MOST_FILTERS or values > MOST_VALUES:
        raise ProblemError(422, f"where: at most {MOST_FILTERS} keys and {MOST_VALUES} values")
