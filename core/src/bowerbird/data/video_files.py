"""Inside a video file: where its frames are, and the decoding of some of them. ``bowerbird.data.videos`` is for users.

The positions of frames come from the time stamps of the packets, which are read without decoding; so a count is right
where the container has none, and frames of any rate are found again. From the keyframe before each wanted frame on,
frames are decoded one after the other by one thread, and only wanted ones are given out.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.data.moments import Moment
from bowerbird.errors import DataError, MissingExtraError

# What is opened. Left out on purpose: play lists, which open other files, and texts, which FFmpeg draws as terminals.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,asf,flv,h264,hevc,m4v,ivf,gif"
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".wmv", ".flv", ".3gp",
)  # fmt: skip
_SEEK_PAYS = 4  # frames that can be left out before a keyframe for which a seek is worth its cost
_INDICES_KEPT = 32  # of the files read last; one of an hour takes about 3 MB
_SMALL, _SMALL_KEPT = 2**18, 4096  # bytes of a short clip, whose index takes some KB; a set of them is read every epoch


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of a file are, from its packets.

    Attributes:
        stamps: int64 ``(V,)``, time stamps in the order of display, in the stream's units; empty where packets have
            none, or not one each: then frames are counted while decoding.
        times: ``(V,)`` seconds from the first frame.
        keys: Positions of the frames from which decoding can start, and ``key_decoding`` when these are decoded, in the
            stream's units.
        seconds, rate: As in ``VideoInfo``.
    """

    stamps: NDArray[np.int64]
    times: NDArray[np.float64]
    keys: NDArray[np.int64]
    key_decoding: NDArray[np.int64]
    seconds: float
    rate: float

    def span(self, moment: Moment | None, name: str) -> tuple[int, int]:
        """First frame of a moment, and the one after its last. A moment between two frames has the one that is shown.

        Raises ``DataError`` where it starts past the end.
        """
        if moment is None:
            return 0, len(self.times)
        if moment.start >= self.seconds:
            raise DataError(
                f"{name}: the moment starts at {moment.start:g} s, but the video has a length of {self.seconds:.3f} s"
            )
        half = 0.0005  # addresses are in milliseconds
        first = int(np.searchsorted(self.times, moment.start - half))
        last = len(self.times) if moment.end is None else int(np.searchsorted(self.times, moment.end - half))
        return (first, last) if first < last else (max(0, first - 1), max(0, first - 1) + 1)


def frame_index(path: Path) -> FrameIndex:
    """Where the frames of a file are; read once as long as the file does not change.

    Raises ``DataError``, which names the file, where it is missing, is no video, has no frame or is truncated.
    """
    modified, size = _state(path)
    return (_small_indexed if size < _SMALL else _indexed)(path, modified, size)


def frame_size(path: Path) -> tuple[int, int]:
    """Height and width of the first frame, upright. Its orientation comes with the decoded frame alone."""
    return _sized(path, *_state(path))


def _state(path: Path) -> tuple[int, int]:
    """What changes where a file is replaced: what was read of it is kept with this."""
    try:
        status = path.stat()
    except OSError:
        raise DataError(f"Cannot open video {path}: the file does not exist.") from None
    return status.st_mtime_ns, status.st_size


def _read_index(path: Path, modified: int, size: int) -> FrameIndex:
    del modified, size
    av = pyav()
    pts: list[int | None] = []
    dts: list[int | None] = []
    durations: list[int] = []
    keyframes: list[bool] = []
    with _opened(path) as (container, stream):
        found, end, failure = 0, 0.0, ""
        try:
            for packet in container.demux():  # of all streams: the sound may be longer than the pictures
                if packet.dts is not None or packet.pts is not None:
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    end = max(end, float((stamp + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != stream.index or not packet.size:
                    continue
                found += 1
                if packet.is_corrupt:
                    failure = "the last of them is cut off"
                if not packet.is_discard:  # what an edit list leaves out
                    pts.append(packet.pts)
                    dts.append(packet.dts)
                    durations.append(packet.duration or 0)
                    keyframes.append(packet.is_keyframe)
        except av.error.FFmpegError as error:
            failure = _reason(error)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        unit = float(stream.time_base or Fraction(1, 90_000))
        promised = _promised(container, stream)
        if not promised and container.duration:  # no count of frames: the length says whether the end is missing
            promised_end = (max(container.start_time or 0, 0) + container.duration) / av.time_base
            if end < promised_end - max(0.5, 2 / rate, 0.02 * promised_end):
                failure = failure or f"{end:.2f} of {promised_end:.2f} s"
        if found and (failure or found < promised):
            raise DataError(
                f"Cannot read video {path}: it is truncated or damaged: {found} frames can be found"
                f"{f' of {promised}' if found < promised else ''}{f' ({failure})' if failure else ''}."
            )
        if not pts:
            raise DataError(f"Cannot read video {path}: it has no frame{f' ({failure})' if failure else ''}.")
    count = len(pts)
    known = np.array([stamp for stamp in pts if stamp is not None], np.int64)
    if len(np.unique(known)) < count:  # raw streams: frames of one rate, counted while they are decoded
        none, start = np.empty(0, np.int64), np.zeros(1, np.int64)
        return FrameIndex(none, np.arange(count) / rate, start, start, count / rate, rate)
    order = np.argsort(known)
    stamps = known[order]
    keys = np.flatnonzero(np.array(keyframes)[order])
    if len(keys) and keys[0]:  # a cut from a longer stream: what comes before the first keyframe cannot be decoded
        order, stamps, keys = order[keys[0] :], stamps[keys[0] :], keys - keys[0]
    keys = keys if len(keys) else np.zeros(1, np.int64)
    key_decoding = np.array([pts[i] if dts[i] is None else dts[i] for i in order[keys]], np.int64)
    times = (stamps - stamps[0]) * unit
    seconds = float(times[-1]) + (durations[order[-1]] * unit or 1 / rate)
    return FrameIndex(stamps, times, keys, key_decoding, seconds, len(stamps) / seconds)


_indexed = lru_cache(maxsize=_INDICES_KEPT)(_read_index)
_small_indexed = lru_cache(maxsize=_SMALL_KEPT)(_read_index)


def _promised(container: Any, stream: Any) -> int:
    """How many frames the header says there are, less what an edit list leaves out; 0 where it is not to be relied on:
    AVI also counts places without a frame."""
    return len(stream.index_entries) if "mp4" in container.format.name.split(",") else 0


@lru_cache(maxsize=4 * _INDICES_KEPT)
def _sized(path: Path, modified: int, size: int) -> tuple[int, int]:
    del modified, size
    frame = next(decoded_frames(path, frame_index(path), np.zeros(1, np.int64)))
    turn = _orientation(frame)
    return (frame.width, frame.height) if turn is not None and turn[0] else (frame.height, frame.width)


# -------------------------------------------------------------------------------------------------------- decoding


def decoded_frames(path: Path, index: FrameIndex, places: NDArray[np.int64]) -> Iterator[Any]:
    """The frame at each of ``places``, positions that rise. No packet is decoded twice.

    Raises ``DataError``, which names the file and the frame, where one is damaged or missing.
    """
    av = pyav()
    todo = deque(places.tolist())
    stamps = index.stamps
    wanted = set(stamps[places].tolist()) if len(stamps) else set()
    with _opened(path) as (container, stream):
        context = stream.codec_context
        context.thread_count = 1  # readers have threads of their own, and every thread of FFmpeg holds frames
        packets = container.demux(stream)
        at = sought = -1  # positions of the last frame that came out, and of the last keyframe that was looked for
        try:
            while todo:
                key = int(index.keys[max(0, np.searchsorted(index.keys, todo[0], side="right") - 1)])
                if key - at > _SEEK_PAYS and key != sought:
                    packets, sought = _from_keyframe(container, stream, index, key), key
                packet = next(packets, None)
                if packet is None:
                    raise DataError(f"Cannot decode frame {todo[0]} of video {path}: the decoder leaves it out.")
                if wanted:  # frames that neither are wanted nor referred to are not worth their time
                    context.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
                for frame in packet.decode():
                    counted = not len(stamps) or frame.pts is None
                    at = at + 1 if counted else int(np.searchsorted(stamps, frame.pts, side="right")) - 1
                    if not todo or at < todo[0]:
                        continue
                    if at > todo[0] or frame.is_corrupt:
                        raise DataError(f"Cannot decode frame {todo[0]} of video {path}: it is damaged.")
                    todo.popleft()
                    yield frame
        except av.error.FFmpegError as error:
            raise DataError(f"Cannot decode frame {todo[0]} of video {path}: {_reason(error)}.") from error


def _from_keyframe(container: Any, stream: Any, index: FrameIndex, key: int) -> Iterator[Any]:
    """Packets from the keyframe at position ``key`` on, or from one before it where the container finds no better."""
    number = int(np.searchsorted(index.keys, key))
    for earlier in range(number, max(-1, number - 3), -1):
        # Some containers look a moment up by the time of display, others by that of decoding.
        for stamp in (index.stamps[index.keys[earlier]], index.key_decoding[earlier]):
            container.seek(int(stamp), stream=stream)
            packets = container.demux(stream)
            first = next((packet for packet in packets if packet.is_keyframe or not packet.size), None)
            if first is not None and first.pts is not None and first.pts <= index.stamps[key]:
                return itertools.chain([first], packets)
    container.seek(0)
    return iter(container.demux(stream))


def frame_pixels(
    path: Path, index: FrameIndex, places: NDArray[np.int64], max_pixels: int | None
) -> Iterator[NDArray[np.uint8]]:
    """RGB pixels ``(H, W, 3)`` of the frame at each of ``places``, turned as the video's display matrix says.

    All have the size of the first, which is shrunk to ``max_pixels`` where it has more. Raises as ``decoded_frames``.
    """
    reformatter = pyav().video.reformatter.VideoReformatter()  # one for all: it keeps its tables
    turn: tuple[bool, bool, bool] | None = None
    width = height = 0
    for frame in decoded_frames(path, index, places):
        if not width:
            turn, width, height = _orientation(frame), frame.width, frame.height
            if max_pixels is not None and width * height > max_pixels:
                shrink = math.sqrt(max_pixels / (width * height))
                width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
        small = reformatter.reformat(frame, width, height, "rgb24", interpolation="AREA", threads=1)
        pixels: NDArray[np.uint8] = small.to_ndarray()
        if turn is not None:
            swap, flip_x, flip_y = turn
            pixels = pixels.transpose(1, 0, 2) if swap else pixels
            pixels = pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        yield pixels


def _orientation(frame: Any) -> tuple[bool, bool, bool] | None:
    """Whether x and y are to be exchanged, and then columns and rows to be put in the other order."""
    data = next((bytes(entry) for entry in frame.side_data if entry.type.name == "DISPLAYMATRIX"), b"")
    if len(data) < 36:
        return None
    a, b, _, c, d = np.frombuffer(data, np.int32, 5).tolist()  # a point (x, y) is shown at (a x + c y, b x + d y)
    swap = abs(b) > abs(a)
    return swap, (c if swap else a) < 0, (b if swap else d) < 0


# -------------------------------------------------------------------------------------------------------- opening


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its pictures' stream."""
    av = pyav()
    if not path.is_file():
        raise DataError(f"Cannot open video {path}: the file {'is a folder' if path.is_dir() else 'does not exist'}.")
    if not path.stat().st_size:
        raise DataError(f"Cannot read video {path}: the file is empty (0 bytes).")
    try:
        container = av.open(
            str(path.absolute()),
            metadata_errors="replace",
            container_options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
        )
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(
            f"Cannot read video {path} ({path.stat().st_size:,} bytes): it is no video in a known format, or its "
            f"header is missing or damaged ({_reason(error)})."
        ) from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise DataError(f"Cannot read video {path}: it holds no stream of pictures that can be decoded.")
        yield container, stream


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def pyav() -> Any:
    """The library that opens videos. Raises ``MissingExtraError``, which says what to install."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("videos are read by PyAV: pip install 'bowerbird-core[video]'") from error
    return av
