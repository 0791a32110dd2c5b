"""The encoders of a service: each is loaded once, and its requests are answered in batches by one thread.

One thread for all of them: two networks at once would only take the processor from each other, and from the searches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from bowerbird.data.images import Preprocessing
from bowerbird.errors import BowerbirdError, DataError, InputError, PluginError, SpaceError, UnknownNameError
from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.space import Space
from bowerbird.registry import get_registry
from bowerbird.serve.batching import Batcher
from bowerbird.serve.metrics import Metrics
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import Accepts
from bowerbird.serve.settings import ServeSettings
from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.serve import SearchService, ServingState

if TYPE_CHECKING:
    from bowerbird.encoders import LoadedEncoder
    from bowerbird.gallery.protocol import Snapshot

log = logging.getLogger("bowerbird.serve")

TRY_AGAIN = 30.0  # seconds after which an encoder that could not be loaded is tried once more
UNUSED_SECONDS = 60.0  # longer than any request that has begun with an encoder
TEXTS_AT_ONCE = 64


class Encoders:
    """An async context manager; entering it loads what the gallery's searches need now, where that can be loaded.

    Attributes:
        service: Searches the gallery with what is loaded. It is another object after another encoder was added.
    """

    def __init__(self, settings: ServeSettings, gallery: Gallery, metrics: Metrics) -> None:
        self.settings, self.gallery, self.metrics = settings, gallery, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bowerbird-encode")
        self._loaded: dict[str, _Served] = {}
        self._loading: dict[str, asyncio.Task[LoadedEncoder]] = {}
        self._failed: dict[str, tuple[float, SpaceError]] = {}
        self._last_needed: dict[str, float] = {}
        self.service = self._new_service()

    async def __aenter__(self) -> Self:
        try:
            needs = (await asyncio.to_thread(self.service.state)).needs
        except BowerbirdError as error:  # an upgrade can still be looked at, and rolled back
            log.warning("this gallery cannot be searched now: %s", error)
            return self
        for fingerprint in needs:
            with contextlib.suppress(SpaceError):  # said in the log; searches by vectors and by items go on
                await self.get(self.gallery.snapshot().spaces[fingerprint])
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._loading.values():
            task.cancel()
        for served in self._loaded.values():
            await served.stop()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------------ loading

    def known(self, fingerprint: str) -> bool:
        """Whether this encoder is loaded."""
        return fingerprint in self._loaded

    def loaded(self, fingerprint: str) -> LoadedEncoder:
        """An encoder that is ``known``."""
        return self._loaded[fingerprint].encoder

    async def get(self, space: Space) -> LoadedEncoder:
        """The encoder of a space, loaded in a thread by the first who asks; nobody else waits.

        Raises:
            SpaceError: It cannot be loaded, or is another one by now. The log says why; clients need not know folders.
        """
        fingerprint = space.fingerprint
        self._last_needed[fingerprint] = time.monotonic()
        if fingerprint in self._loaded:
            return self._loaded[fingerprint].encoder
        failed = self._failed.get(fingerprint)
        if failed is not None and time.monotonic() - failed[0] < TRY_AGAIN:
            raise SpaceError(str(failed[1]))
        if fingerprint not in self._loading:
            self._loading[fingerprint] = asyncio.create_task(self._load(space))
            self._loading[fingerprint].add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._loading[fingerprint])  # one who goes away does not end it for the others

    async def load(self, reference: str) -> LoadedEncoder:
        """The encoder of a reference from the settings, loaded in a thread; not added. Raises what ``load_encoder``
        does."""
        loaded: LoadedEncoder = await asyncio.to_thread(_load, reference, self.settings.device)
        return loaded

    def add(self, encoder: LoadedEncoder) -> None:
        """Answer requests by this encoder from now on. To be called in the event loop."""
        if encoder.fingerprint in self._loaded:
            return
        served = _Served(encoder, self._thread, self.settings.batch_size, self.metrics)
        served.pictures.start()
        served.texts.start()
        self._loaded[encoder.fingerprint] = served
        self._failed.pop(encoder.fingerprint, None)
        self.service = self._new_service()

    async def keep(self, needed: Collection[str]) -> None:
        """Forget encoders that were needed once, and neither are now nor were for ``UNUSED_SECONDS``: after an upgrade
        was finished or rolled back. To be called now and then."""
        now = time.monotonic()
        self._last_needed |= dict.fromkeys(needed, now)
        for fingerprint, last in list(self._last_needed.items()):
            if now - last < UNUSED_SECONDS:
                continue
            del self._last_needed[fingerprint]
            served = self._loaded.pop(fingerprint, None)
            if served is not None:
                self.service = self._new_service()
                await served.stop()

    async def _load(self, space: Space) -> LoadedEncoder:
        try:
            if space.lifted:
                raise SpaceError("its vectors were made from those of another space, and no encoder makes them")
            loaded: LoadedEncoder = await asyncio.to_thread(_load, space.encoder, self.settings.device)
            if loaded.fingerprint != space.fingerprint:
                raise SpaceError(
                    f"{space.encoder} has the fingerprint {loaded.fingerprint[:12]}: it is another encoder by now"
                )
            self.add(loaded)
            return loaded
        except Exception as error:
            level = logging.DEBUG if space.fingerprint in self._failed else logging.WARNING
            log.log(level, "the encoder of space %s cannot be loaded, tried again now and then: %s", space, error)
            told = SpaceError(
                f"the encoder of space {space.fingerprint[:12]} cannot be loaded by this service, whose log says why. "
                "Search by vectors, or by an item of the gallery"
            )
            self._failed[space.fingerprint] = (time.monotonic(), told)
            raise told from error
        finally:
            self._loading.pop(space.fingerprint, None)

    def _new_service(self) -> SearchService:
        def load(space: Space) -> ItemEncoder:
            raise SpaceError(f"the encoder of space {space.fingerprint[:12]} is not loaded")  # vectors are given always

        # Those that are loaded are preferred where several could make a query.
        return SearchService(self.gallery, [served.encoder for served in self._loaded.values()], loader=load)

    # ----------------------------------------------------------------------------------------------------- encoding

    def state(self, snapshot: Snapshot) -> ServingState:
        """What a search of ``snapshot`` does. Raises ``ProblemError`` 409 where its upgrade's strategy is not installed
        here."""
        try:
            return self.service.state(snapshot)
        except (UnknownNameError, PluginError) as error:
            raise ProblemError(409, f"this service cannot search during this upgrade: {error}") from error

    def accepts(self) -> Accepts:
        """By what the gallery can be searched now. Videos are no uploads: none is decoded for a stranger."""
        try:
            needs = self.service.state().needs
        except BowerbirdError:  # an upgrade by a strategy that is not installed here
            return Accepts(image=False, text=False, video=False)
        found = [self._loaded.get(fingerprint) for fingerprint in needs]
        image = all(served is not None and served.preprocessing is not None for served in found)
        text = all(served is not None and served.takes_texts for served in found)
        return Accepts(image=image, text=text, video=False)

    def preprocessing(self, fingerprint: str) -> Preprocessing:
        """How pictures are prepared for this encoder. Raises ``InputError`` where it takes none."""
        served = self._served(fingerprint)
        if served.preprocessing is None:
            raise InputError(f"the encoder of space {fingerprint[:12]} takes no pictures; search by text")
        return served.preprocessing

    def frames(self, fingerprint: str) -> int | None:
        """How many frames of a video this encoder takes; ``None`` where it takes pictures."""
        return self._served(fingerprint).frames

    async def encode(self, fingerprint: str, prepared: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 ``(D,)`` unit vector of what was prepared for this encoder: a picture ``(3, height, width)``, or a
        clip ``(frames, 3, height, width)`` where it takes videos.

        Raises ``DataError`` where the encoder gives no usable vector for it.
        """
        return await self._served(fingerprint).pictures(prepared)

    async def encode_text(self, fingerprint: str, text: str) -> NDArray[np.float32]:
        """float32 ``(D,)`` unit vector of a text. Raises ``InputError`` where the encoder takes none."""
        served = self._served(fingerprint)
        if not served.takes_texts:
            raise InputError("the encoder that searches this gallery now takes no texts; search by a picture")
        if not text.strip():
            raise InputError("the text is empty; say what to search for")
        return await served.texts(text)

    def _served(self, fingerprint: str) -> _Served:
        """Raises ``ProblemError`` 503 where a request waited so long that its encoder was forgotten meanwhile."""
        served = self._loaded.get(fingerprint)
        if served is None:
            raise ProblemError(503, "another encoder serves by now; try again", headers={"Retry-After": "1"})
        return served


class _Served:
    """A loaded encoder and its two queues."""

    def __init__(self, encoder: LoadedEncoder, thread: ThreadPoolExecutor, batch_size: int, metrics: Metrics) -> None:
        self.encoder = encoder
        self.preprocessing: Preprocessing | None = encoder.module.preprocessing
        self.takes_texts = getattr(encoder.module, "tokenize", None) is not None
        self.frames: int | None = encoder.frames
        # As many frames of videos as there would be pictures.
        most = batch_size if self.frames is None else max(1, batch_size // self.frames)

        def seen(size: int) -> None:
            metrics.batch("encode", size)
            metrics.queue("encode", len(self.pictures) + len(self.texts))

        self.pictures: Batcher[NDArray[np.float32], NDArray[np.float32]] = Batcher(
            self._encode, thread, most=most, waiting=1024, seen=seen
        )
        self.texts: Batcher[str, NDArray[np.float32]] = Batcher(
            self._encode_texts, thread, most=TEXTS_AT_ONCE, seen=seen
        )

    async def stop(self) -> None:
        await self.pictures.stop()
        await self.texts.stop()

    def _encode(self, prepared: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32] | Exception]:
        import torch

        if self.frames is None:
            return self._usable(self.encoder.forward({"image": torch.from_numpy(np.stack(prepared))}))
        clips = np.zeros((len(prepared), self.frames, *prepared[0].shape[-3:]), np.float32)
        for clip, found in zip(clips, prepared, strict=True):
            clip[: 1 if found.ndim == 3 else self.frames] = found  # a picture is a video of one frame
        return self._usable(self.encoder.forward({"video": torch.from_numpy(clips)}))

    def _encode_texts(self, texts: Sequence[str]) -> list[NDArray[np.float32] | Exception]:
        return self._usable(self.encoder.forward({"text": self.encoder.module.tokenize(list(texts))}))  # type: ignore

    def _usable(self, vectors: NDArray[np.float32]) -> list[NDArray[np.float32] | Exception]:
        good: Any = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
        return [
            vector if usable else DataError("the encoder gives no usable vector (NaN, infinite or zero) for this")
            for vector, usable in zip(vectors, good, strict=True)
        ]


def _load(reference: str, device: str) -> Any:
    if not Path(reference).is_dir():
        # Before torch is imported, which takes seconds: the space of a gallery of vectors may name no encoder at all.
        get_registry().get("encoder", reference.partition("?")[0])
    from bowerbird.encoders import load_encoder

    return load_encoder(reference, device=device)
