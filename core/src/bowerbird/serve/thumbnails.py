"""Thumbnails: made once, kept in a bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bowerbird.errors import BowerbirdError
from bowerbird.serve.problems import ProblemError

if TYPE_CHECKING:
    from bowerbird.gallery.space import Item
    from bowerbird.serve.decoding import Decoders
    from bowerbird.serve.settings import ServeSettings

CACHE_BYTES = 64 * 2**20  # some thousand thumbnails


@dataclass(frozen=True)
class Thumbnail:
    """A picture of an item in at most ``size`` x ``size`` pixels, as WebP."""

    etag: str
    data: bytes


def etag_of(item: Item, size: int) -> str:
    """Changes with the content of the item: an edited item has another number."""
    about = f"{item.num} {item.uri} {item.content_hash} {size}"
    return f'"{hashlib.blake2b(about.encode(), digest_size=12).hexdigest()}"'


class Thumbnails:
    """The least recently asked for are forgotten first. Used from the event loop only."""

    def __init__(self, settings: ServeSettings, decoders: Decoders, *, most_bytes: int = CACHE_BYTES) -> None:
        self.decoders, self.most_bytes = decoders, most_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        # A wall of thumbnails waits here, so that a search by a picture need not wait behind all of it.
        self._room = asyncio.Semaphore(settings.decoders)

    async def get(self, item: Item, size: int) -> Thumbnail:
        """Raises ``ProblemError``: 404 where the item has no picture, or none that can be read any more."""
        etag = etag_of(item, size)
        data = self._kept.get(etag)
        if data is not None:
            self._kept.move_to_end(etag)
            return Thumbnail(etag, data)
        if item.uri is None:
            raise ProblemError(404, f"item {item.id!r} has no picture; it was added as a vector")
        async with self._room:
            data = self._kept.get(etag)  # somebody who waited before may have asked for the same
            if data is None:
                try:
                    data = await self.decoders.thumbnail(item.uri, size)
                except BowerbirdError as error:
                    raise ProblemError(404, f"the picture of item {item.id!r} cannot be read any more") from error
                self._keep(etag, data)
        return Thumbnail(etag, data)

    def _keep(self, etag: str, data: bytes) -> None:
        if etag not in self._kept:
            self._kept[etag] = data
            self._bytes += len(data)
        while self._bytes > self.most_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])
