"""Two views of a video: which frames, and how their pictures are changed. Runs in the processes that read the data.

T frames of a view, n = min(V, T) of a video of V frames, S patches of C channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from bowerbird import dist
from bowerbird.data.dataset import Dataset
from bowerbird.data.images import Preprocessing
from bowerbird.data.moments import split_moment
from bowerbird.data.videos import read_frames, video_info
from bowerbird.errors import DataError, InputError
from bowerbird.files import atomic_folder, new_rows, write_json
from bowerbird_videotext.mv_former_config import ViewsConfig
from bowerbird_videotext.mv_former_encoder import MVFormerEncoder
from bowerbird_videotext.transforms import random_box


def two_view_steps(
    length: int, frames: int, generator: np.random.Generator, config: ViewsConfig | None = None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Which frames of a video of ``length`` frames the two views show: positions and which are real, both ``(2, T)``.

    A view is n different frames, in order, of a region of ``ceil(u * length)`` frames (or ``ceil(u * n)``), u uniform
    from 1 to ``region``. The first one's region starts anywhere, the second one's within
    ``floor((1 - consistent_offset) * n)`` frames of the first one's first frame; both so that as little as possible
    lies past the video's end. What does is not real, and shows the last frame; so do the places n to T.

    Raises:
        InputError: ``length`` or ``frames`` below 1.
    """
    if length < 1 or frames < 1:
        raise InputError(f"views of {frames} frames of a video of {length}: expected 1 or more of both")
    config = config or ViewsConfig()
    n = min(length, frames)
    whole = length if config.region_of == "video" else n
    steps = np.full((2, frames), length, np.int64)
    reach = math.floor((1 - config.consistent_offset) * n)
    for view in range(2):
        region = math.ceil(generator.uniform(1, config.region) * whole)
        last = max(0, length - region)  # the last start that leaves nothing outside
        low, high = 0, last
        if view:
            first = int(steps[0, 0])
            low, high = (min(last, max(0, first - reach)), min(last, first + reach))
        start = int(generator.integers(low, high + 1))
        steps[view, :n] = start + np.sort(generator.permutation(region)[:n])
    return np.minimum(steps, length - 1), steps < length


class TwoViews:
    """``views`` float32 ``(2, T, 3, H, W)``, ``times`` int64 and ``valid`` bool ``(2, T)``, ``lengths`` int64 ``(2,)``.

    Args:
        preprocessing: The encoder's.
        frames: T.
        config: How views are drawn.
    """

    def __init__(self, preprocessing: Preprocessing, frames: int, config: ViewsConfig) -> None:
        self.preprocessing, self.frames, self.config = preprocessing, frames, config

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Raises ``DataError`` for a video that cannot be read, ``InputError`` for items without one."""
        source = _video_of(item)
        try:
            length = video_info(source).frames
            times, valid = two_view_steps(length, self.frames, generator, self.config)
            wanted, places = np.unique(times, return_inverse=True)
            shown = torch.cat([self._read(source, part) for part in wanted_parts(wanted)])
        except DataError as error:
            raise _located(item, error) from error
        clips = shown[torch.from_numpy(places.reshape(times.shape))]
        if self.config.augment:
            clips = torch.stack([augmented(clip, self.preprocessing, self.config, generator) for clip in clips])
        return {"views": clips, **_entries(item, times, valid, length)}

    def _read(self, source: Any, places: NDArray[np.int64]) -> Tensor:
        """``(k, 3, h, w)``: as the encoder takes them, or, to be changed, uint8 and at most twice as large."""
        frames = read_frames(source, places)
        if not self.config.augment:
            return torch.from_numpy(prepared(frames, self.preprocessing))
        clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
        shorter = 2 * max(self.preprocessing.height, self.preprocessing.width)
        return TF.resize(clip, [shorter], antialias=True) if min(clip.shape[2:]) > shorter else clip


def wanted_parts(places: NDArray[np.int64], size: int = 32) -> list[NDArray[np.int64]]:
    """``places`` in parts: of so many frames at once the whole pictures are in memory."""
    return [places[first : first + size] for first in range(0, len(places), size)]


def prepared(frames: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """``(k, 3, H, W)``: frames ``(k, h, w, 3)`` as the encoder takes them."""
    clip = np.empty((len(frames), 3, preprocessing.height, preprocessing.width), np.float32)
    for pixels, row in zip(frames, clip, strict=True):
        preprocessing.into(Image.fromarray(pixels), row)
    return clip


def augmented(
    clip: Tensor, preprocessing: Preprocessing, config: ViewsConfig, generator: np.random.Generator
) -> Tensor:
    """``(k, 3, H, W)``, normalised, of uint8 ``(k, 3, h, w)``: crop, mirroring, colours, grey, blur as in SimCLR.

    Every number is drawn once and holds for all frames.
    """
    height, width = preprocessing.height, preprocessing.width
    left, top, right, bottom = random_box((clip.shape[3], clip.shape[2]), config.crop, (3 / 4, 4 / 3), generator)
    clip = TF.resized_crop(
        clip, top, left, bottom - top, right - left, [height, width], TF.InterpolationMode.BILINEAR, antialias=True
    )
    if generator.random() < config.flip:
        clip = TF.horizontal_flip(clip)
    if generator.random() < config.jitter_prob:
        clip = _jittered(clip, config.jitter, generator)
    if generator.random() < config.grey:
        clip = TF.rgb_to_grayscale(clip, num_output_channels=3)
    if generator.random() < config.blur:
        kernel = max(3, min(height, width) // 10 | 1)  # a tenth of the side, and odd
        clip = TF.gaussian_blur(clip, [kernel, kernel], [float(generator.uniform(0.1, 2.0))])
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (clip.float() / 255 - mean) / std


def _jittered(clip: Tensor, strengths: tuple[float, float, float, float], generator: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation and hue in a random order."""
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for which in generator.permutation(4).tolist():
        strength = strengths[which]
        if strength:
            low, high = (-strength, strength) if which == 3 else (max(0.0, 1 - strength), 1 + strength)
            clip = changes[which](clip, float(generator.uniform(low, high)))
    return clip


# ------------------------------------------------------------------------------------------------ features kept


class FrameCache:
    """The backbone's features of every frame of a data set, in files that are mapped into memory.

    Apart from the training loop's ``train.cache_trunk``: that keeps one row per item, whereas two views choose other
    frames of a video in every epoch, so the features of all its frames are kept.

    ``patches.npy`` has a row of S * C numbers per frame, ``global.npy`` one of C', where the encoder needs these.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            known = json.loads((folder / "frames.json").read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"cache of frames {str(folder)!r} cannot be read ({error}); remove it") from error
        self.channels: int = known["channels"]
        self.spans: Mapping[str, tuple[int, int]] = {key: tuple(span) for key, span in known["spans"].items()}

    def __getstate__(self) -> dict[str, Any]:  # every process maps the files itself
        return {key: value for key, value in self.__dict__.items() if key not in ("_patches", "_global")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)

    def length(self, item_id: str) -> int:
        """Frames of a video. Raises ``InputError`` for one that is not in the cache."""
        if item_id not in self.spans:
            raise InputError(f"cache of frames {str(self.folder)!r} has no video {item_id!r}")
        return self.spans[item_id][1]

    def rows(self, item_id: str, steps: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """``patches`` ``(..., S, C)`` and, where they are kept, ``global_features`` ``(..., C')`` of frames."""
        start, _ = self.spans[item_id]
        patches = self._patches[start + steps]
        found = {"patches": patches.reshape(*steps.shape, -1, self.channels)}
        if self._global is not None:
            found["global_features"] = self._global[start + steps]
        return found

    @cached_property
    def _patches(self) -> Any:
        return np.load(self.folder / "patches.npy", mmap_mode="r")

    @cached_property
    def _global(self) -> Any:
        file = self.folder / "global.npy"
        return np.load(file, mmap_mode="r") if file.exists() else None


class CachedViews:
    """As ``TwoViews``, but ``patches`` float32 ``(2, T, S, C)`` (and ``global_features``) in the place of ``views``."""

    def __init__(self, cache: FrameCache, frames: int, config: ViewsConfig) -> None:
        self.cache, self.frames, self.config = cache, frames, config

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        length = self.cache.length(item["item_id"])
        times, valid = two_view_steps(length, self.frames, generator, self.config)
        return {**self.cache.rows(item["item_id"], times), **_entries(item, times, valid, length)}


def cache_frames(encoder: MVFormerEncoder, dataset: Dataset, root: Path) -> FrameCache:
    """Run the backbone over every frame of ``dataset`` once; what an earlier run of equal settings made is used again.

    A folder below ``root`` is named by the backbone's weights, how frames are prepared, and the videos with the times
    and sizes of their files. Only the main process computes.

    Raises:
        DataError: A video cannot be read, by file and row, or the features cannot be written.
    """
    items = [dataset[i] for i in range(len(dataset))]
    folder = root / _key(encoder, items)
    if dist.is_main() and not (folder / "frames.json").is_file():
        try:
            with atomic_folder(folder) as temporary:
                _fill(encoder, items, temporary)
        except OSError as error:
            raise DataError(
                f"features of frames cannot be written to {str(folder)!r} ({error}); set cache_root to a folder with "
                "room, or cache = false"
            ) from error
    dist.barrier()
    return FrameCache(folder)


@torch.inference_mode()
def _fill(encoder: MVFormerEncoder, items: list[dict[str, Any]], folder: Path) -> None:
    spans: dict[str, tuple[int, int]] = {}
    total = 0
    for item in items:
        try:
            length = video_info(_video_of(item)).frames
        except DataError as error:
            raise _located(item, error) from error
        spans[item["item_id"]] = (total, length)
        total += length
    backbone = encoder.backbone
    patches = new_rows(folder / "patches.npy", (total, backbone.patches * backbone.channels))
    vectors = new_rows(folder / "global.npy", (total, backbone.global_channels)) if encoder.needs_global else None
    device = next(encoder.parameters()).device
    for item in items:
        start, length = spans[item["item_id"]]
        for first in range(0, length, backbone.chunk):
            places = np.arange(first, min(first + backbone.chunk, length))
            try:
                frames = prepared(read_frames(_video_of(item), places), encoder.preprocessing)
            except DataError as error:
                raise _located(item, error) from error
            found, more = backbone(torch.from_numpy(frames).to(device), with_global=vectors is not None)
            patches[start + places] = found.flatten(1).float().cpu().numpy()
            if vectors is not None and more is not None:
                vectors[start + places] = more.float().cpu().numpy()
    patches.flush()
    if vectors is not None:
        vectors.flush()
    write_json(folder / "frames.json", {"channels": backbone.channels, "spans": spans})


def _key(encoder: MVFormerEncoder, items: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    plain = [encoder.backbone.blocks, encoder.needs_global, encoder.preprocessing.to_dict()]
    digest.update(json.dumps(plain).encode())
    for name, tensor in sorted(encoder.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for item in items:
        source = _video_of(item)
        file = Path(split_moment(source)[0]) if isinstance(source, str) else None
        state = file.stat() if file is not None and file.is_file() else None
        digest.update(f"\n{item['item_id']} {source} {(state.st_mtime_ns, state.st_size) if state else ''}".encode())
    return digest.hexdigest()[:20]


def _entries(item: dict[str, Any], times: NDArray[np.int64], valid: NDArray[np.bool_], length: int) -> dict[str, Any]:
    plain: dict[str, Any] = {key: item[key] for key in ("item_id", "index", "label") if key in item}
    return {"times": times, "valid": valid, "lengths": np.full(2, length, np.int64), **plain}


def _video_of(item: Mapping[str, Any]) -> Any:
    if "video" not in item:
        raise InputError(f"items have no video; they have {', '.join(sorted(item))}: choose a data set of videos")
    return item["video"]


def _located(item: Mapping[str, Any], error: DataError) -> DataError:
    return DataError(f"{item['where']}: {error}") if "where" in item else error
