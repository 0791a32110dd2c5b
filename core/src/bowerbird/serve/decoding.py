"""Pictures of strangers are decoded in processes of their own: few, bounded in memory and time, killed where needed.

What comes out is exactly what ``open_image`` and ``Preprocessing`` give, so that a search by a stored picture finds
that picture at distance 0. A picture that crashes its decoder, or keeps it busy, costs its own request and no other.
"""

from __future__ import annotations

import asyncio
import io
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessPool
from PIL import Image

from bowerbird.data.images import FORMATS, Preprocessing, open_image
from bowerbird.data.moments import split_moment
from bowerbird.data.regions import split_region
from bowerbird.data.uris import dataset_item, is_dataset_uri
from bowerbird.data.video_files import VIDEO_SUFFIXES
from bowerbird.errors import BowerbirdError, DataError
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.settings import ServeSettings

log = logging.getLogger("bowerbird.serve")

MOST_WAITING = 512  # pictures; who comes then is told to try again
WAITING_BODIES = 4  # the same in bytes: so many of the largest requests
THUMBNAIL_SIZES = (64, 512)
WEBP_QUALITY = 80
# Address space of a decoder: Python, Pillow and FFmpeg, and 16-bit pixels on their way to 8 bits (the dearest of all).
BASE_MEMORY = 2 << 30
BYTES_PER_PIXEL = 32
START_SECONDS = 60.0  # for the first process, which imports Pillow
AHEAD = 2  # pictures per decoder that are on their way to it, so that it need not wait for the next


class TooManyPixelsError(DataError):
    """A picture has more pixels than are taken."""


class Decoders:
    """The pool. An async context manager: its processes run from enter to exit.

    Raises, in both methods:
        DataError: The source is no picture (or video, where it names a stored one), is damaged, took too long or too
            much memory. It names no file of the server; the log does.
        ProblemError: 413 for too many pixels; 503 where too many pictures wait already.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self._pool: ProcessPool | None = None
        self._slots = asyncio.Semaphore(settings.decoders * AHEAD)
        self._waiting = 0
        self._waiting_bytes = 0

    async def __aenter__(self) -> Self:
        self._pool = self._new_pool()
        await self._call(os.getpid)  # the first picture does not wait for a process to start
        return self

    async def __aexit__(self, *exc: object) -> None:
        pool, self._pool = self._pool, None
        await asyncio.to_thread(_end, pool)

    @property
    def waiting(self) -> int:
        """Pictures that are being decoded, or wait for it."""
        return self._waiting

    async def prepare(
        self,
        source: bytes | str,
        preprocessings: Sequence[Preprocessing],
        *,
        frames: Sequence[int | None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """The picture as each of the encoders wants it, float32 ``(3, height, width)``; decoded once.

        Args:
            source: The bytes of a file, or where a stored picture is (the ``uri`` of an item).
            frames: Per encoder, how many frames of a video it takes: of a stored video (or picture) it is given
                ``(frames, 3, height, width)``. ``None``: it takes pictures.
        """
        clips = frames if frames is not None and isinstance(source, str) else [None] * len(preprocessings)
        wanted = tuple(zip(preprocessings, clips, strict=True))
        return await self._run(_prepare, source, wanted, self.settings.max_pixels)

    async def thumbnail(self, source: bytes | str, size: int) -> bytes:
        """The picture in at most ``size`` x ``size`` pixels, as WebP. Of a video (or a moment of it) the first frame.

        Args:
            size: 64 to 512.
        """
        return await self._run(_thumbnail, source, size, self.settings.max_pixels)

    async def _run(self, function: Callable[..., Any], source: bytes | str, *more: Any) -> Any:
        size = len(source)
        most = WAITING_BODIES * self.settings.max_upload_bytes
        if self._waiting >= MOST_WAITING or (self._waiting and self._waiting_bytes + size > most):
            raise ProblemError(503, f"{self._waiting} pictures wait to be decoded", headers={"Retry-After": "1"})
        self._waiting += 1
        self._waiting_bytes += size
        try:
            async with self._slots:
                return await self._call(function, source, *more)
        except TooManyPixelsError as error:
            raise ProblemError(413, str(error)) from error
        except (TimeoutError, ProcessExpired, BrokenProcessPool, MemoryError) as error:
            why = (
                f"takes longer than {self.settings.decode_seconds:g} seconds"
                if isinstance(error, TimeoutError)
                else "takes too much memory, or damages the decoder"
            )
            log.warning("a decoder was stopped: %s (%s)", why, _name(source))
            raise DataError(f"the picture cannot be decoded: it {why}") from error
        except BowerbirdError as error:
            if isinstance(source, bytes):
                raise
            log.warning("%s cannot be read: %s", source, error)
            raise DataError("the stored picture of this item cannot be read") from error
        finally:
            self._waiting -= 1
            self._waiting_bytes -= size

    def _new_pool(self) -> ProcessPool:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([__name__])  # a decoder that was killed is replaced in milliseconds
        return ProcessPool(
            max_workers=self.settings.decoders,
            initializer=_confine,
            initargs=(BASE_MEMORY + BYTES_PER_PIXEL * self.settings.max_pixels,),
            context=context,
        )

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in a process of the pool. A pool that broke, or takes nothing any more, is replaced once."""
        for last in (False, True):
            pool = self._pool
            if pool is None:
                raise ProblemError(503, "the service is stopping", headers={"Retry-After": "5"})
            try:
                return await self._in(pool, function, args)
            except BrokenProcessPool:
                if last:
                    raise
                log.warning("the decoders were killed, or hang; new ones are started")
                if self._pool is pool:
                    self._pool = self._new_pool()
                    await asyncio.to_thread(_end, pool)
        raise AssertionError("the second time returns or raises")

    async def _in(self, pool: ProcessPool, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        seconds = max(self.settings.decode_seconds, START_SECONDS * (not args))
        try:
            future = pool.schedule(function, args=args, timeout=seconds)
        except RuntimeError as error:
            raise BrokenProcessPool(str(error)) from error
        # The pool counts from when a process has begun. One that never does must not hold its place for ever.
        patience = asyncio.timeout((AHEAD + 1) * seconds + START_SECONDS)
        try:
            async with patience:
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            if not patience.expired():
                raise  # of this picture
            raise BrokenProcessPool("no process took it") from error


def _end(pool: ProcessPool | None) -> None:
    if pool is not None:
        pool.stop()
        pool.join()


def _name(source: bytes | str) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else source


# ------------------------------------------------------------------------------- in the processes of the pool


def _confine(memory: int) -> None:
    """Limits of a decoder. The header's size is compared with ``max_pixels`` before pixels are, so that Pillow's own
    limit, which warns, has nothing to add."""
    Image.MAX_IMAGE_PIXELS = None
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)


def _prepare(
    source: bytes | str, wanted: Sequence[tuple[Preprocessing, int | None]], max_pixels: int
) -> list[NDArray[np.float32]]:
    opened: dict[tuple[int, int, int], Image.Image] = {}
    prepared = []
    for preprocessing, frames in wanted:
        background = preprocessing.background
        if frames is not None:
            from bowerbird.data.videos import prepare_clip, read_clip

            prepared.append(prepare_clip(read_clip(source, frames), preprocessing, frames))
            continue
        if background not in opened:
            opened[background] = _open(source, max_pixels, background)
        prepared.append(preprocessing(opened[background]))
    return prepared


def _thumbnail(source: bytes | str, size: int, max_pixels: int) -> bytes:
    image = _first_frame(source) if isinstance(source, str) and _is_video(source) else _open(source, max_pixels)
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=WEBP_QUALITY)
    return file.getvalue()


def _open(source: bytes | str, max_pixels: int, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    try:
        return open_image(source, max_pixels=max_pixels, background=background, name="of the request")
    except DataError as error:
        if isinstance(source, bytes) and _pixels(source) > max_pixels:
            raise TooManyPixelsError(str(error)) from None
        raise


def _pixels(data: bytes) -> int:
    """What the header says; 0 where there is none."""
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            return image.width * image.height
    except Exception:  # not an image: that was said already
        return 0


def _is_video(source: str) -> bool:
    whole, moment = split_moment(source)
    if moment is not None:
        return True
    if is_dataset_uri(whole):
        return "video" in dataset_item(whole)
    return Path(split_region(whole)[0]).suffix.lower() in VIDEO_SUFFIXES


def _first_frame(source: str) -> Image.Image:
    from bowerbird.data.videos import read_clip

    return read_clip(source, 1, offset=0)[0]
