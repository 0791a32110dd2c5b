"""Regions of videos that were extracted once, in safetensors files of some dozens of videos each.

A cache is a folder inside the folder that the user names; what decides the regions besides the videos (extractor with
its weights, number of frames and regions, size of a frame) is its name. So another extractor never meets old regions.
Every file is written whole: a process that was killed leaves those that were finished, and the next one goes on after
them. Each video's content is recorded: where a file was replaced, its regions are extracted again.

S frames of a video that are stored, R regions of a frame, F width of their features.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bowerbird.data.images import Preprocessing
from bowerbird.data.moments import split_moment
from bowerbird.data.uris import dataset_item, is_dataset_uri
from bowerbird.data.videos import decode_clips, frame_indices, video_info
from bowerbird.errors import DataError, InputError
from bowerbird.files import write_atomically, write_json
from bowerbird.protocols import Dataset
from bowerbird_videotext.regions import RegionExtractor, RegionFeatures, video_regions
from bowerbird_videotext.video_set import VideoTextSet, video_text_set

logger = logging.getLogger(__name__)
FORMAT = 1
PER_FILE = 64  # videos of one file
AT_ONCE = 8  # videos that go through the extractor together
ABOUT = "about.json"


class RegionCache:
    """The stored regions of videos by item id. Picklable; files are opened where they are read.

    Args:
        folder: Of the cache itself, see ``cache_regions``.
        places: File and row of every item.
    """

    def __init__(self, folder: Path, places: Mapping[str, tuple[str, int]]) -> None:
        self.folder, self._places = folder, dict(places)
        self._open: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._places

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def read(self, item_id: str) -> RegionFeatures:
        """The regions of one video: batch of 1, S frames. Raises ``DataError`` where it has none."""
        if item_id not in self._places:
            raise DataError(
                f"region cache {str(self.folder)!r} has no video {item_id!r}: it could not be read when the cache was "
                "made, or came later. Make the cache again, or set dataset.unreadable = 'skip'"
            )
        name, row = self._places[item_id]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, "pt")
        parts = {key: self._open[name].get_slice(key)[row : row + 1] for key in ("features", "boxes", "sizes", "valid")}
        parts["features"] = parts["features"].float()
        return RegionFeatures(**parts)


class _Stored:
    """What the files of a cache hold. Sets that share a cache may have items of one id with other contents.

    Raises ``DataError`` where a file is damaged; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self._known: dict[str, list[tuple[str, int, Mapping[str, Any]]]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as found:
                    videos = json.loads((found.metadata() or {})["videos"])
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise DataError(
                    f"region cache {str(file)!r} cannot be read ({error}); remove this file, and its videos are "
                    "extracted again"
                ) from error
            for row, video in enumerate(videos):
                self._known.setdefault(video["id"], []).append((file.name, row, video))

    def find(self, video: _Video) -> tuple[str, int] | None:
        """File and row of the regions of what the video's file now holds. Its content is read where its size or time is
        another one."""
        known = [entry for entry in self._known.get(video.item_id, []) if entry[2]["where"] == video.where]
        same = [entry for entry in known if video.state is not None and entry[2]["state"] == video.state]
        if known and not same:
            content = video.content()
            same = [entry for entry in known if entry[2]["content"] == content]
        return same[-1][:2] if same else None


@dataclass(frozen=True)
class _Video:
    """One video, and what its regions depend on. ``where``: moment and boxes; ``state``: of its file, if it has one."""

    index: int
    item_id: str
    source: str
    where: str
    state: list[int] | None

    def content(self) -> str:
        """sha256 of the file; of the address where there is none."""
        file = _file_of(self.source)
        if file is None:
            return hashlib.sha256(self.source.encode()).hexdigest()
        try:
            with file.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"Cannot open video {file}: {error}.") from error


def cache_regions(
    dataset: Dataset,
    extractor: RegionExtractor,
    folder: str | Path,
    *,
    preprocessing: Preprocessing,
    frames: int = 8,
    regions_per_frame: int = 30,
    identity: str = "",
    device: torch.device | str = "cpu",
    on_error: str = "raise",
    progress: Callable[[int], None] | None = None,
) -> RegionCache:
    """Extract the regions of every video of a data set that are not in the cache yet.

    Args:
        dataset: Of videos, as ``videotext:moving`` or ``videotext:table``.
        extractor: What finds regions. Where it is a module, its weights decide which cache is meant.
        folder: In which the cache is made, or found again.
        preprocessing: Of frames; scaled as a whole, pixels in 0..1.
        frames: S, drawn uniformly.
        regions_per_frame: R.
        identity: What else decides the regions: settings of the extractor.
        device: Where the extractor works.
        on_error: ``raise``, or ``skip``: log videos that cannot be read, and leave them out.
        progress: Called with a number of videos when they are done.

    Returns:
        The cache of all of them.

    Raises:
        DataError: A video cannot be read, or a file of the cache is damaged.
        InputError: Another kind of data set; a setting outside its range; boxes are wanted and the set has none.
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error = {on_error!r}: expected raise or skip")
    if frames < 1 or regions_per_frame < 1:
        raise InputError(f"frames = {frames}, regions_per_frame = {regions_per_frame}: expected 1 or more")
    if preprocessing.resize != "squash" or (*preprocessing.mean, *preprocessing.std) != (0.0,) * 3 + (1.0,) * 3:
        raise InputError("regions are extracted from whole frames with pixels in 0..1: resize squash, mean 0, std 1")
    videos, positions = video_text_set(dataset, "a region cache")
    about = {
        "format": FORMAT,
        "extractor": identity,
        "weights": _weights_digest(extractor),
        "frames": frames,
        "regions_per_frame": regions_per_frame,
        "preprocessing": preprocessing.to_dict(),
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    place = Path(folder).expanduser() / name
    place.mkdir(parents=True, exist_ok=True)
    with _one_writer(place):
        if not (place / ABOUT).exists():
            write_json(place / ABOUT, about)
        for left in place.glob(".*.safetensors.*"):  # of a process that was killed
            left.unlink()
        stored = _Stored(place)
        places: dict[str, tuple[str, int]] = {}
        number = max((int(file.stem) for file in place.glob("*.safetensors")), default=-1) + 1
        work = _Extraction(videos, extractor, preprocessing, frames, regions_per_frame, torch.device(device), on_error)
        for start in range(0, len(positions), PER_FILE):
            some = [_video(videos, index, extractor) for index in positions[start : start + PER_FILE]]
            found = {video.item_id: stored.find(video) for video in some}
            places |= {item_id: at for item_id, at in found.items() if at is not None}
            todo = [video for video in some if found[video.item_id] is None]
            if progress is not None:
                progress(len(some) - len(todo))
            made, kept = work.regions(todo, progress)
            if kept:
                file = place / f"{number:06d}.safetensors"
                _write(file, made, kept)
                places |= {video.item_id: (file.name, row) for row, video in enumerate(kept)}
                number += 1
        return RegionCache(place, places)


@dataclass(frozen=True)
class _Extraction:
    videos: VideoTextSet
    extractor: RegionExtractor
    preprocessing: Preprocessing
    frames: int
    regions_per_frame: int
    device: torch.device
    on_error: str

    @torch.inference_mode()
    def regions(
        self, some: Sequence[_Video], progress: Callable[[int], None] | None
    ) -> tuple[list[RegionFeatures], list[_Video]]:
        """Regions of those that can be read, and these."""
        made: list[RegionFeatures] = []
        kept: list[_Video] = []
        if not some:
            return made, kept

        def unreadable(position: int, error: Any) -> None:
            where = self.videos.where(some[position].index)
            if self.on_error == "raise":
                raise DataError(f"{where}: {error}") from error
            logger.warning("left out of the region cache: %s: %s", where, error)
            if progress is not None:
                progress(1)

        clips = decode_clips(
            [video.source for video in some],
            self.preprocessing,
            self.frames,
            batch_size=AT_ONCE,
            on_error=unreadable,
        )
        for rows, clip in clips:
            chosen = [some[row] for row in rows.tolist()]
            boxes = None
            if self.extractor.takes_boxes:
                boxes = [torch.from_numpy(self._boxes(video)).to(self.device) for video in chosen]
            pixels = torch.from_numpy(np.ascontiguousarray(clip)).to(self.device)
            made.append(video_regions(self.extractor, pixels, self.regions_per_frame, boxes))
            kept += chosen
            if progress is not None:
                progress(len(chosen))
        return made, kept

    def _boxes(self, video: _Video) -> NDArray[np.float32]:
        """``(S, r, 4)`` of the frames that are stored, in pixels of the prepared frames."""
        known = self.videos.boxes(video.index)
        assert known is not None  # _video has looked
        info = video_info(video.source)
        if len(known) != info.frames:
            raise DataError(
                f"{self.videos.where(video.index)}: boxes of {len(known)} frames, and the video has {info.frames}"
            )
        chosen = known[frame_indices(info.frames, self.frames)].astype(np.float32)
        x, y = self.preprocessing.width / info.width, self.preprocessing.height / info.height
        return chosen * np.array([x, y, x, y], np.float32)


def _video(videos: VideoTextSet, index: int, extractor: RegionExtractor) -> _Video:
    source = videos.video(index)
    where = str(split_moment(source)[1] or "")
    if extractor.takes_boxes:
        boxes = videos.boxes(index)
        if boxes is None:
            raise InputError(
                f"{videos.where(index)}: no boxes are known, and extractor.boxes = 'given' needs them; take 'grid' "
                "or a detector"
            )
        where += hashlib.sha256(np.ascontiguousarray(boxes, np.float32).tobytes()).hexdigest()
    file = _file_of(source)
    state = None
    if file is not None and file.is_file():
        found = file.stat()
        state = [found.st_size, found.st_mtime_ns]
    return _Video(index, str(videos.item_ids[index]), source, where, state)


def _file_of(source: str) -> Path | None:
    text = split_moment(source)[0]
    if not is_dataset_uri(text):
        return Path(text)
    inner = dataset_item(text).get("video")
    return _file_of(inner) if isinstance(inner, str) else None


def _write(file: Path, made: Sequence[RegionFeatures], videos: Sequence[_Video]) -> None:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(regions, name) for regions in made]).cpu().contiguous()

    # Half precision: a detector's features need no more, and they are most of a cache.
    tensors = {"features": joined("features").half(), **{name: joined(name) for name in ("boxes", "sizes", "valid")}}
    if not bool(torch.isfinite(tensors["features"]).all()):
        raise InputError("the extractor gives features that are not finite, or too large for half precision")
    about = [
        {"id": video.item_id, "where": video.where, "state": video.state, "content": video.content()}
        for video in videos
    ]
    write_atomically(file, save(tensors, {"videos": json.dumps(about)}))


def _weights_digest(extractor: RegionExtractor) -> str:
    digest = hashlib.sha256(f"{type(extractor).__name__} {extractor.feature_dim}".encode())
    if isinstance(extractor, nn.Module):
        for name, tensor in sorted(extractor.state_dict().items()):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Others wait: processes of one training ask for the same regions. The lock goes with its process."""
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
