"""``Server``: what the routes of one service share, and the order in which it starts and stops."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Self

from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.open import open_gallery
from bowerbird.serve.access import Access
from bowerbird.serve.contents import Contents
from bowerbird.serve.control import Control
from bowerbird.serve.decoding import Decoders
from bowerbird.serve.encoders import Encoders
from bowerbird.serve.engine import Engine
from bowerbird.serve.mapping import Maps
from bowerbird.serve.metrics import Metrics
from bowerbird.serve.settings import ServeSettings
from bowerbird.serve.spaces import Spaces
from bowerbird.serve.thumbnails import Thumbnails

LOCK_SECONDS = 3.0  # that a change waits for another process that writes; then 503


class Server:
    """One gallery, open for as long as the service runs. An async context manager: start, then stop.

    Attributes:
        gallery: Open for writing unless the service is read-only. Thread-safe; its calls block, so that routes run them
            in threads.
        access: Who may do what, how often; and the log of what administrators did.
        metrics: Prometheus counters.
        decoders: Processes in which pictures of strangers are decoded.
        encoders: Loaded encoders by the fingerprint of their space, each with its queue of requests.
        engine: Searches.
        contents: What comes into the gallery and leaves it; uploaded pictures.
        thumbnails: Of items, kept in a bounded memory.
        control: The upgrade: plan, start, the background worker, and what they tell.
        stopping: Set when the service is told to stop. Streams, which have no end of their own, end then.
        maps, spaces: What people look at, made in processes of low priority.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.stopping = asyncio.Event()
        self.access = Access(settings)  # first: a service that may not start here opens nothing
        self.gallery: Gallery = open_gallery(settings.gallery, readonly=settings.read_only, lock_timeout=LOCK_SECONDS)
        self.access.storage = self.gallery.storage  # where its log is kept
        self.metrics = Metrics(self.gallery)
        self.decoders = Decoders(settings)
        self.encoders = Encoders(settings, self.gallery, self.metrics)
        self.engine = Engine(settings, self.gallery, self.encoders, self.decoders, self.metrics)
        self.contents = Contents(settings, self.gallery, self.encoders, self.decoders)
        self.thumbnails = Thumbnails(settings, self.decoders)
        self.control = Control(settings, self.gallery, self.encoders, self.metrics)
        self.maps = Maps(settings, self.gallery)
        self.spaces = Spaces(settings, self.gallery)
        self._running = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(self.gallery.close)
            for part in (self.access, self.decoders, self.encoders, self.engine, self.contents, self.control):
                await stack.enter_async_context(part)
            self._running = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._running.aclose()
