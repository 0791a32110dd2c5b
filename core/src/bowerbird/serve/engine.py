"""Searches: by a picture, a text, an item or a vector, each on one snapshot, together where they wait together.

A search by a picture or a text encodes it by the encoders that the gallery needs now. Where an upgrade has moved on
meanwhile, and another space is needed than was encoded, that is encoded too and the search is asked again: the caller
sees neither the start nor the end of an upgrade.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import BowerbirdError, DataError, InputError, SnapshotGoneError, SpaceError
from bowerbird.gallery.gallery import Gallery, SearchResult
from bowerbird.gallery.space import Item, Space
from bowerbird.serve.batching import Batcher
from bowerbird.serve.compare import Comparison, compare, compared_spaces
from bowerbird.serve.decoding import Decoders
from bowerbird.serve.encoders import Encoders
from bowerbird.serve.metrics import Metrics
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import (
    MOST_RESULTS,
    CompareResponse,
    Hit,
    ItemSearch,
    Search,
    SearchResponse,
    TextSearch,
    VectorSearch,
)
from bowerbird.serve.settings import ServeSettings

if TYPE_CHECKING:
    from bowerbird.gallery.protocol import Snapshot

log = logging.getLogger("bowerbird.serve")

Vectors = dict[str, Any]  # fingerprint -> (D,)
Encode = Callable[[Sequence[Space]], Awaitable[Vectors]]

SERVING = ""  # in the place of a fingerprint: of the space that serves when the search is made
AT_ONCE = 64  # vectors per search call
ATTEMPTS = 4  # an upgrade that begins and one that ends between encoding and searching are two
FOLLOW_SECONDS = 0.5
MOST_FILTERS = 32
MOST_VALUES = 1000


@dataclass(frozen=True)
class _Query:
    """``without``: number of an item that is left out of its own results, -1 for none."""

    kind: str
    vectors: Vectors
    search: Search
    began: float
    without: int = -1

    @property
    def top(self) -> int:
        return self.search.offset + self.search.k + (self.without >= 0)


class Engine:
    """An async context manager. Its methods raise ``ProblemError`` and ``BowerbirdError``."""

    def __init__(
        self, settings: ServeSettings, gallery: Gallery, encoders: Encoders, decoders: Decoders, metrics: Metrics
    ) -> None:
        self.settings, self.gallery = settings, gallery
        self.encoders, self.decoders, self.metrics = encoders, decoders, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bowerbird-search")
        self._searches: Batcher[_Query, SearchResponse] = Batcher(
            self._answer, self._thread, most=AT_ONCE, seen=self._seen
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
        return await self._searches(_Query("vector", given, search, time.perf_counter()))

    async def compare_picture(self, data: bytes, search: Search) -> CompareResponse:
        """The old system, the new one so far and what is served, for an uploaded picture."""
        return await self._compared(self._picture_of(data), search)

    async def compare_text(self, search: TextSearch) -> CompareResponse:
        return await self._compared(self._text_of(search.text), search)

    async def compare_item(self, search: ItemSearch) -> CompareResponse:
        item = await self._item(search.id)
        return await self._compared(lambda needs: self._vectors_of_item(item, needs, all_of_them=True), search, item)

    def describe(self, nums: Iterable[int]) -> dict[int, Item]:
        """Items by number, those included that were deleted since a search found them. Blocks."""
        return self.gallery.storage.items(nums)

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
                return await self._searches(_Query(kind, vectors, search, began, without))
            except _MissingVectorsError:
                continue  # an upgrade was begun, or has ended, since the needs were asked for
        return await self._searches(_Query(kind, vectors, search, began, without))

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

    def _answer(self, queries: Sequence[_Query]) -> list[SearchResponse | Exception]:
        for _ in range(ATTEMPTS - 1):
            with contextlib.suppress(SnapshotGoneError):  # an upgrade was begun, finished or rolled back just now
                return self._answer_at(self.gallery.snapshot(), queries)
        return self._answer_at(self.gallery.snapshot(), queries)

    def _answer_at(self, snapshot: Snapshot, queries: Sequence[_Query]) -> list[SearchResponse | Exception]:
        service = self.encoders.service
        answers: dict[int, SearchResponse | Exception] = {}
        together: dict[Any, list[tuple[int, Vectors]]] = defaultdict(list)
        for position, query in enumerate(queries):
            try:
                rows = _checked(query.vectors, snapshot)
            except (BowerbirdError, ProblemError) as error:  # of this one; the others are answered
                answers[position] = error
                continue
            where = query.search.where
            key = (query.kind, query.top, json.dumps(where, sort_keys=True) if where else None, tuple(rows))
            together[key].append((position, rows))
        state = self.encoders.state(snapshot)
        for (kind, top, _, names), members in together.items():
            where = queries[members[0][0]].search.where
            start = time.perf_counter()
            try:
                vectors = {name: np.stack([rows[name] for _, rows in members]) for name in names}
                found = service.search(vectors=vectors, k=top, where=where, snapshot=snapshot)
                nums = set(found.nums[found.nums >= 0].tolist())
                items = self.describe(nums)
            except SnapshotGoneError:
                raise
            except Exception as error:  # of this group; the others are answered
                if isinstance(error, SpaceError):
                    enough = set(names).issuperset(state.needs)
                    error = ProblemError(409, str(error)) if enough else _MissingVectorsError(state.needs)
                for position, _ in members:
                    answers[position] = error
                continue
            if len(items) < len(nums):
                raise SnapshotGoneError(f"{self.gallery.path} was compacted: what was found was deleted since")
            self.metrics.searched(kind, time.perf_counter() - start, len(members))
            for row, (position, _) in enumerate(members):
                answers[position] = _response(queries[position], found, row, items, state.share)
        return [answers[position] for position in range(len(queries))]

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
                raise _MissingVectorsError([space.fingerprint for space in needs]) from error
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


class _MissingVectorsError(ProblemError):
    """A search needs vectors of spaces that were not given, and no relation leads to them."""

    def __init__(self, needs: Sequence[str]) -> None:
        names = ", ".join(needs)
        super().__init__(
            409,
            f"searching now needs query vectors of {names}; none that lead there were given. Give them, by the "
            "fingerprint of their space, or search by a picture",
            needs=list(needs),
        )


def _check(search: Search) -> None:
    """What the schema cannot say. Raises ``ProblemError`` 422."""
    if search.offset + search.k > MOST_RESULTS:
        raise ProblemError(422, f"offset + k is {search.offset + search.k}; at most {MOST_RESULTS} results are reached")
    if not search.where:
        return
    values = sum(len(wanted) if isinstance(wanted, list) else 1 for wanted in search.where.values())
    if len(search.where) > MOST_FILTERS or values > MOST_VALUES:
        raise ProblemError(422, f"where: at most {MOST_FILTERS} keys and {MOST_VALUES} values")


def _checked(vectors: Mapping[str, Any], snapshot: Snapshot) -> Vectors:
    """float32 ``(D,)`` rows of the spaces that the gallery knows; a client may send more, before and after an upgrade.

    Raises:
        SpaceError: A wrong width.
        DataError: NaN, infinity or a zero vector.
    """
    rows: Vectors = {}
    for name, values in vectors.items():
        space = snapshot.spaces.get(name or snapshot.serving)
        if space is None:
            continue
        row: NDArray[Any] = np.asarray(values, np.float64)
        if row.shape != (space.dim,):
            raise SpaceError(
                f"the vector has width {row.size}; those of space {space.fingerprint[:12]} have width {space.dim}"
            )
        largest = np.abs(row).max()
        if not np.isfinite(largest):
            raise DataError("the vector holds NaN or infinity; encode the query again")
        if largest == 0:
            raise DataError("the vector is zero, which has no direction; encode the query again")
        if not 1e-15 < largest < 1e15:  # its square would leave the range of float32
            row = row / largest
        rows[space.fingerprint] = row.astype(np.float32)
    if not rows:
        raise _MissingVectorsError([snapshot.stack[-1]])
    return rows


def _response(query: _Query, found: SearchResult, row: int, items: Mapping[int, Item], share: float) -> SearchResponse:
    search = query.search
    columns = (found.nums[row], found.distances[row], found.sides[row], found.parts[row])
    listed = [
        hit for hit in zip(*(column.tolist() for column in columns), strict=True) if hit[0] not in (-1, query.without)
    ]
    last = search.offset + search.k
    return SearchResponse(
        hits=[
            Hit(
                rank=rank,
                id=items[num].id,
                distance=distance,
                score=1.0 - distance,
                side="new" if side == 1 else "old",
                space=found.spaces[part],
                metadata=items[num].metadata,
                has_picture=items[num].uri is not None,
            )
            for rank, (num, distance, side, part) in enumerate(listed[search.offset : last], search.offset + 1)
        ],
        more=len(listed) >= last and last < MOST_RESULTS,
        epoch=found.epoch,
        share=share,
        milliseconds=1e3 * (time.perf_counter() - query.began),
    )
