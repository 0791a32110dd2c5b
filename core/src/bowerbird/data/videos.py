"""From a video file to the frames that an encoder reads: what is in it, which frames, and those frames alone.

A frame is named by its position in the order of display. Memory does not grow with the length of a video: wanted frames
are found by a seek and kept, the others are not (``bowerbird.data.video_files``).

Imports numpy and Pillow; PyAV (``pip install 'bowerbird-core[video]'``) where a video is opened. No torch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.images import SUFFIXES, ImageSource, OnError, Preprocessing, open_image, prepare_ahead
from bowerbird.data.moments import Moment, clips_of, moment_uri, split_moment
from bowerbird.data.regions import split_region
from bowerbird.data.uris import dataset_item, is_dataset_uri
from bowerbird.data.video_files import VIDEO_SUFFIXES, FrameIndex, frame_index, frame_pixels, frame_size, pyav
from bowerbird.errors import DataError, InputError

VideoSource = ImageSource  # a path or address with or without a moment, or a picture

MAX_CLIP_PIXELS = 2**23  # eight frames of 1366 x 768; 34 MB as pictures of Pillow


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
    index = frame_index(path)
    first, last = index.span(moment, str(source))
    return VideoInfo(last - first, _length(index, moment), index.rate, *frame_size(path))


def _length(index: FrameIndex, moment: Moment | None) -> float:
    """Seconds of a moment of a video, of which what lies past the end is cut off."""
    if moment is None:
        return index.seconds
    return min(index.seconds, index.seconds if moment.end is None else moment.end) - moment.start


def video_times(source: VideoSource) -> tuple[float, float] | None:
    """Start and end of a video, or of the moment of it, in seconds from the first frame of its file; ``None`` of a
    picture. An item of a data set that is itself a moment of a file starts where that starts.

    Raises ``DataError`` as ``video_info``; no frame is decoded.
    """
    if _picture(source) is not None:
        return None
    start, length = _span_of(source)
    return round(start, 3), round(start + length, 3)


def _span_of(source: VideoSource) -> tuple[float, float]:
    """Start and length in seconds of a video or a moment of one, from its packets."""
    path, moment = _located(source)
    index = frame_index(path)
    index.span(moment, str(source))  # refuses a moment past the end
    return 0.0 if moment is None else moment.start, _length(index, moment)


def cut_into_clips(
    ids: Sequence[str], sources: Sequence[VideoSource], seconds: float
) -> tuple[list[str], list[VideoSource], list[int]]:
    """Every video as clips of about ``seconds``, each named by its moment: ids, sources and whence they come.

    Pictures, moments and what cannot be read stay as they are: that is for the reader of clips to report.

    Returns:
        ``(ids, sources, positions)``: for each clip ``ID#t=start,end``, ``SOURCE#t=start,end`` and the position of its
        video.
    """
    clips: list[tuple[str, VideoSource, int]] = []
    for position, (name, source) in enumerate(zip(ids, sources, strict=True)):
        try:
            whole = _picture(source) is None and split_moment(str(source))[1] is None
            length = _span_of(source)[1] if whole else 0.0
        except DataError:
            length = 0.0
        moments = list(clips_of(length, seconds)) if length else []
        if len(moments) > 1:
            clips += [(moment_uri(name, moment), moment_uri(str(source), moment), position) for moment in moments]
        else:
            clips.append((name, source, position))
    return [clip[0] for clip in clips], [clip[1] for clip in clips], [clip[2] for clip in clips]


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
            raise DataError(f"{source!s}: a picture is a video of one frame; it has no frame {wanted[-1] or wanted[0]}")
        pixels = np.asarray(open_image(picture))
        return np.repeat(pixels[None], len(wanted), axis=0)
    path, moment = _located(source)
    return _read(path, moment, str(source), wanted)


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
    index = frame_index(path)
    first, last = index.span(moment, str(source))
    wanted = frame_indices(last - first, frames, mode=mode, generator=generator, offset=offset)
    # One by one: a film of 2160 lines has no room for its clip twice.
    return [Image.fromarray(one) for one in frame_pixels(path, index, wanted + first, MAX_CLIP_PIXELS // len(wanted))]


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
    av = pyav()
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


def _read(path: Path, moment: Moment | None, name: str, wanted: NDArray[np.int64]) -> NDArray[np.uint8]:
    index = frame_index(path)
    first, last = index.span(moment, name)
    if wanted[0] < 0 or wanted[-1] >= last - first:
        raise DataError(
            f"{name}: there is no frame {wanted[0] if wanted[0] < 0 else wanted[-1]}; the "
            f"{'video' if moment is None else 'moment'} has {last - first} frames, counted from 0"
        )
    places, copies = np.unique(wanted + first, return_counts=True)
    clip: NDArray[np.uint8] | None = None
    row = 0
    for pixels, count in zip(frame_pixels(path, index, places, None), copies, strict=True):
        if clip is None:
            clip = np.empty((len(wanted), *pixels.shape), np.uint8)
        clip[row : row + count] = pixels
        row += count
    assert clip is not None
    return clip


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
