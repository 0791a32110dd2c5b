"""From a video file to the frames that an encoder reads: what is in it, which frames, and those frames alone.

A frame is named by its position in the order of display. The positions come from the time stamps of the packets, which
are read without decoding; so a count is right where the container has none, and frames of any rate are found again.
From the keyframe before each wanted frame on, frames are decoded one after the other, and only wanted ones are kept:
memory does not grow with the length of a video.

Imports numpy and Pillow; PyAV (``pip install 'bowerbird-core[video]'``) where a video is opened. No torch.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.images import SUFFIXES, ImageSource, OnError, Preprocessing, open_image, prepare_ahead
from bowerbird.data.moments import Moment, split_moment
from bowerbird.data.regions import split_region
from bowerbird.data.uris import dataset_item, is_dataset_uri
from bowerbird.errors import DataError, InputError, MissingExtraError

VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".ogv",
    ".wmv",
    ".flv",
    ".3gp",
)
VideoSource = ImageSource  # a path or address with or without a moment, or a picture

# What is opened. Left out on purpose: play lists, which open other files, and texts, which FFmpeg draws as terminals.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,asf,flv,h264,hevc,m4v,ivf,gif"
MAX_CLIP_PIXELS = 2**24  # eight frames of 1920 x 1080; 50 MB
_SEEK_PAYS = 4  # frames that can be left out before a keyframe for which a seek is worth its cost
_INDICES_KEPT = 32  # of the files read last; one of an hour takes about 3 MB


@dataclass(frozen=True)
class VideoInfo:
    """A video, or the moment of it that was asked for: number of frames, length, mean frames per second, upright size.

    A picture is a video of one frame and of no length.
    """

    frames: int
    seconds: float
    rate: float
    height: int
    width: int


def video_info(source: VideoSource) -> VideoInfo:
    """What a video holds. Its packets are counted; of its frames only the first is decoded, which has the orientation.

    Raises ``DataError``, which names the file, where it is missing, is no video or has no frame, and where its moment
    starts past its end.
    """
    picture = _picture(source)
    if picture is not None:
        image = open_image(picture)
        return VideoInfo(1, 0.0, 0.0, image.height, image.width)
    path, moment = _located(source)
    index = _index(path)
    first, last = index.span(moment, str(source))
    seconds = index.seconds
    if moment is not None:
        seconds = min(seconds, seconds if moment.end is None else moment.end) - moment.start
    return VideoInfo(last - first, seconds, index.rate, *_size(path))


def frame_indices(
    length: int,
    count: int,
    *,
    mode: Literal["uniform", "random"] = "uniform",
    generator: np.random.Generator | None = None,
    offset: int | None = None,
) -> NDArray[np.int64]:
    """Which frames stand for a video: one of each of ``k = min(count, length)`` segments of nearly equal length.

    Segment i covers the frames ``floor(i V / k) .. floor((i + 1) V / k) - 1`` (Bain et al., "Frozen in Time", ICCV
    2021, section 3.2).

    Args:
        length: Frames V of the video.
        count: Frames T that are wanted; all V where there are fewer.
        mode: ``uniform``: the middle of each segment, rounded down; ``random``: any of its frames.
        generator: What ``random`` draws from; a new one, seeded by the system, where there is none.
        offset: Instead of a mode: this many frames after the start of each segment, but not past its end.

    Returns:
        int64 ``(k,)``, rising.

    Raises:
        InputError: ``length`` or ``count`` is below 1, ``offset`` below 0, or the mode is unknown.
    """
    if length < 1 or count < 1:
        raise InputError(f"frames can be drawn from a video of 1 or more, and 1 or more of them; {length=}, {count=}")
    if mode not in ("uniform", "random"):
        raise InputError(f"mode = {mode!r}: expected 'uniform' or 'random'")
    if offset is not None and offset < 0:
        raise InputError(f"offset = {offset}: expected 0 or more frames")
    k = min(count, length)
    edges = np.arange(k + 1, dtype=np.int64) * length // k
    first, last = edges[:-1], edges[1:] - 1
    if offset is not None:
        return np.minimum(first + offset, last)
    if mode == "uniform":
        return (first + last) // 2
    return (generator or np.random.default_rng()).integers(first, last, endpoint=True)


def read_frames(source: VideoSource, indices: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """The frames at ``indices`` of a video, each decoded once, upright.

    Args:
        source: A path or the address of a data set's item, with or without a moment; or a picture.
        indices: k positions, not falling, in the order of display; counted from the start of the moment, if any.

    Returns:
        uint8 RGB ``(k, H, W, 3)``.

    Raises:
        DataError: The file is missing, is no video, is truncated or damaged, or has no such frame.
    """
    wanted = np.asarray(indices, np.int64)
    if wanted.ndim != 1 or not len(wanted) or (np.diff(wanted) < 0).any():
        raise InputError(f"indices must be a list of one or more frames in rising order, found {indices!r}")
    picture = _picture(source)
    if picture is not None:
        if wanted[0] < 0 or wanted[-1] > 0:
            raise DataError(f"{source}: a picture is a video of one frame; it has no frame {wanted[-1] or wanted[0]}")
        pixels = np.asarray(open_image(picture))
        return np.repeat(pixels[None], len(wanted), axis=0)
    path, moment = _located(source)
    return _read(path, moment, str(source), wanted, None)


def read_clip(
    source: VideoSource,
    frames: int,
    *,
    mode: Literal["uniform", "random"] = "uniform",
    generator: np.random.Generator | None = None,
    offset: int | None = None,
) -> list[Image.Image]:
    """``k = min(frames, its length)`` frames of a video, drawn by ``frame_indices``, as RGB pictures.

    Frames of which k would have more than ``MAX_CLIP_PIXELS`` are shrunk to that many while they are decoded.

    Raises ``DataError`` as ``read_frames`` does.
    """
    picture = _picture(source)
    if picture is not None:
        return [open_image(picture)]
    path, moment = _located(source)
    index = _index(path)
    first, last = index.span(moment, str(source))
    wanted = frame_indices(last - first, frames, mode=mode, generator=generator, offset=offset)
    return [Image.fromarray(pixels) for pixels in _read(path, moment, str(source), wanted, MAX_CLIP_PIXELS)]


def prepare_clip(images: Sequence[Image.Image], preprocessing: Preprocessing, frames: int) -> NDArray[np.float32]:
    """The ``video`` key of one clip: float32 ``(frames, 3, H, W)``, zeros after its last picture.

    Raises ``InputError`` for no picture, or more than ``frames``.
    """
    if not 1 <= len(images) <= frames:
        raise InputError(f"a clip of {len(images)} pictures for {frames} frames; expected 1 to {frames}")
    clip = np.zeros((frames, 3, preprocessing.height, preprocessing.width), np.float32)
    for image, row in zip(images, clip, strict=False):
        preprocessing.into(image, row)
    return clip


def decode_clips(
    sources: Sequence[VideoSource],
    preprocessing: Preprocessing,
    frames: int,
    *,
    batch_size: int,
    workers: int | None = None,
    prefetch: int = 2,
    on_error: OnError = "raise",
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Batches of clips, their frames drawn uniformly, decoded in order by threads that work ahead of the consumer.

    Arguments and result are those of ``bowerbird.data.images.decode_batches``, but batches are
    ``(B, frames, 3, height, width)``.
    """

    def prepare(source: VideoSource, clip: NDArray[np.float32], name: str) -> None:
        del name  # errors of videos name their file
        images = read_clip(source, frames)
        for image, row in zip(images, clip, strict=False):
            preprocessing.into(image, row)
        clip[len(images) :] = 0

    shape = (frames, 3, preprocessing.height, preprocessing.width)
    return prepare_ahead(
        sources, shape, prepare, batch_size=batch_size, workers=workers, prefetch=prefetch, on_error=on_error, chunk=1
    )


def videos_in(folder: str | Path) -> tuple[list[str], list[Path]]:
    """Ids (paths relative to ``folder``, with ``/``) and paths of the videos and pictures below it, sorted by id.

    Raises:
        DataError: There is no such folder, or neither a video nor a picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder")
    suffixes = {*VIDEO_SUFFIXES, *SUFFIXES}
    found = {
        p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file()
    }
    if not found:
        raise DataError(f"{str(folder)!r} holds no video; looked for {', '.join(VIDEO_SUFFIXES)}, and for pictures")
    ids = sorted(found)
    return ids, [found[name] for name in ids]


def write_video(path: str | Path, frames: NDArray[np.uint8], rate: float = 8) -> None:
    """Write frames as a video, whole or not at all. The same frames give the same bytes (of one version of FFmpeg).

    H.264 by one thread; lossy, but hardly visibly so. Colours are stored at half the resolution, as players expect, of
    frames with even sides.

    Args:
        path: The file; its ending says which container: ``.mp4``, ``.mkv`` or ``.mov``.
        frames: uint8 RGB ``(V, H, W, 3)``.
        rate: Frames per second.

    Raises:
        InputError: The frames have another shape or type, there are none, or the rate is not above 0.
        DataError: The file cannot be written.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise InputError(f"frames must be uint8 (V, H, W, 3), found {frames.dtype} {frames.shape}")
    if not rate > 0:
        raise InputError(f"rate = {rate}: expected frames per second, above 0")
    av = _av()
    path = Path(path)
    height, width = frames.shape[1:3]
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(descriptor)
    try:
        with av.open(name, "w", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            stream.options = {"crf": "12", "preset": "medium"}
            stream.codec_context.thread_count = 1
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
            container.mux(stream.encode())
        with Path(name).open("rb+") as file:
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(f"Cannot write video {path}: {error}.") from error
    finally:
        Path(name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- where frames are


@dataclass(frozen=True)
class _Index:
    """The frames of a file, from its packets.

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


def _index(path: Path) -> _Index:
    return _indexed(path, *_state(path))


def _size(path: Path) -> tuple[int, int]:
    return _sized(path, *_state(path))


def _state(path: Path) -> tuple[int, int]:
    """What changes where a file is replaced: what was read of it is kept with this."""
    try:
        status = path.stat()
    except OSError:
        raise DataError(f"Cannot open video {path}: the file does not exist.") from None
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=_INDICES_KEPT)
def _indexed(path: Path, modified: int, size: int) -> _Index:
    del modified, size
    av = _av()
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
        return _Index(none, np.arange(count) / rate, start, start, count / rate, rate)
    order = np.argsort(known)
    stamps = known[order]
    keys = np.flatnonzero(np.array(keyframes)[order])
    key_decoding = np.array([pts[i] if dts[i] is None else dts[i] for i in order[keys]], np.int64)
    times = (stamps - stamps[0]) * unit
    seconds = float(times[-1]) + (durations[order[-1]] * unit or 1 / rate)
    return _Index(stamps, times, keys, key_decoding, seconds, count / seconds)


def _promised(container: Any, stream: Any) -> int:
    """How many frames the header says there are; 0 where it does not say."""
    if "mp4" in container.format.name.split(","):  # less what an edit list leaves out
        return len(stream.index_entries)
    return int(stream.frames)


@lru_cache(maxsize=4 * _INDICES_KEPT)
def _sized(path: Path, modified: int, size: int) -> tuple[int, int]:
    """Height and width of the first frame, upright. Its orientation comes with the decoded frame alone."""
    del modified, size
    frame = next(_decoded(path, _index(path), np.zeros(1, np.int64)))
    turn = _orientation(frame)
    return (frame.width, frame.height) if turn is not None and turn[0] else (frame.height, frame.width)


# -------------------------------------------------------------------------------------------------------- decoding


def _read(
    path: Path, moment: Moment | None, name: str, wanted: NDArray[np.int64], max_pixels: int | None
) -> NDArray[np.uint8]:
    index = _index(path)
    first, last = index.span(moment, name)
    if wanted[0] < 0 or wanted[-1] >= last - first:
        raise DataError(
            f"{name}: there is no frame {wanted[0] if wanted[0] < 0 else wanted[-1]}; the "
            f"{'video' if moment is None else 'moment'} has {last - first} frames, counted from 0"
        )
    places, copies = np.unique(wanted + first, return_counts=True)
    clip: NDArray[np.uint8] | None = None
    row = 0
    for frame, count in zip(_decoded(path, index, places), copies, strict=True):
        pixels = _upright(frame, None if max_pixels is None else max_pixels // len(wanted))
        if clip is None:
            clip = np.empty((len(wanted), *pixels.shape), np.uint8)
        if pixels.shape != clip.shape[1:]:  # a stream may change its size; a clip may not
            pixels = np.asarray(Image.fromarray(pixels).resize((clip.shape[2], clip.shape[1])))
        clip[row : row + count] = pixels
        row += count
    assert clip is not None
    return clip


def _decoded(path: Path, index: _Index, places: NDArray[np.int64]) -> Iterator[Any]:
    """The frame at each of ``places``, positions that rise. No packet is decoded twice.

    Raises ``DataError``, which names the file and the frame, where one is damaged or missing.
    """
    av = _av()
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
                    at = at + 1 if not len(stamps) else int(np.searchsorted(stamps, frame.pts))
                    if not todo or at < todo[0]:
                        continue
                    if at > todo[0] or frame.is_corrupt:
                        raise DataError(f"Cannot decode frame {todo[0]} of video {path}: it is damaged.")
                    todo.popleft()
                    yield frame
        except av.error.FFmpegError as error:
            raise DataError(f"Cannot decode frame {todo[0]} of video {path}: {_reason(error)}.") from error


def _from_keyframe(container: Any, stream: Any, index: _Index, key: int) -> Iterator[Any]:
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


def _upright(frame: Any, max_pixels: int | None) -> NDArray[np.uint8]:
    """RGB pixels ``(H, W, 3)`` of a decoded frame, turned as its display matrix says."""
    width, height = frame.width, frame.height
    if max_pixels is not None and width * height > max_pixels:
        shrink = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * shrink)), max(1, int(height * shrink))
    pixels: NDArray[np.uint8] = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
    turn = _orientation(frame)
    if turn is None:
        return pixels
    swap, flip_x, flip_y = turn
    if swap:
        pixels = pixels.transpose(1, 0, 2)
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


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
    av = _av()
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


def _located(source: Any) -> tuple[Path, Moment | None]:
    """File and moment of a path or an address."""
    if not isinstance(source, str | Path):
        raise DataError(f"A video must be a path, an address or a picture, found {type(source).__name__}.")
    text, moment = split_moment(source)
    if not is_dataset_uri(text):
        return Path(text), moment
    item = dataset_item(text)
    if "video" not in item:
        raise DataError(f"{text!r}: the item has no video; it has {', '.join(sorted(item))}")
    path, outer = _located(item["video"])
    return path, outer if moment is None else moment.inside(outer)


def _picture(source: Any) -> Any:
    """What ``open_image`` opens, where a source is a picture; ``None`` where it is a video."""
    if isinstance(source, str | Path):
        text, moment = split_moment(source)
        if is_dataset_uri(text):
            item = dataset_item(text)
            return _picture(item["video"]) if "video" in item else item.get("image")
        is_picture = Path(split_region(text)[0]).suffix.lower() in SUFFIXES
        if is_picture and moment is not None and moment.start > 0:
            raise DataError(f"{source}: a picture is a video of one frame; it has no moment {moment}")
        return text if is_picture else None
    return source


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("videos are read by PyAV: pip install 'bowerbird-core[video]'") from error
    return av
