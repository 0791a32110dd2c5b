"""What videos that programs make are made of, and where they are kept: pictures of another data set, cut out and
coloured, and files that are written once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.compose import foreground, item_classes, scaled_to
from bowerbird.data.uris import open_dataset
from bowerbird.data.videos import write_video
from bowerbird.errors import DataError, InputError, did_you_mean
from bowerbird.files import write_json
from bowerbird_videotext.data_configs import COLOURS, SpritesConfig
from bowerbird_videotext.video_set import VideoTextSet

_DARKEST = 60  # of 255: the darkest part of a coloured sprite, so that its colour is seen


class Sprites:
    """The pictures of one split, by class: of every class the last tenth is for test, the one before for val."""

    def __init__(self, config: SpritesConfig, split: str) -> None:
        where = f"videotext:moving: the pictures of {config.source!r}"
        try:
            self.items, _ = open_dataset(config.source, config.split)
        except DataError as error:
            raise DataError(f"{where}: {error} Or take other pictures: the preset digits needs no files.") from error
        self.paper = config.paper
        classes, labels = item_classes(self.items, config.class_key, where)
        unknown = [name for name in config.names if name not in classes]
        if unknown and config.names != SpritesConfig().names:
            raise InputError(f"{where} have no class {unknown[0]!r} (names).{did_you_mean(unknown[0], classes)}")
        self.nouns = [config.names.get(name, name.replace("-", " ").replace("_", " ")) for name in classes]
        if len(set(self.nouns)) < len(self.nouns) or len(self.nouns) < 2:
            raise DataError(f"{where}: expected two classes or more with different nouns, found {self.nouns}")
        self.positions = [_part(np.flatnonzero(labels == label), split) for label in range(len(classes))]
        lacking = [name for name, found in zip(classes, self.positions, strict=True) if not len(found)]
        if lacking:
            raise DataError(f"{where}: the class {lacking[0]!r} has fewer than three, which train, val and test share")

    def picture(self, label: int, colour: str, generator: np.random.Generator) -> Image.Image:
        """A random picture of a class as RGBA, cut out, in shades of ``colour``, or as it is where that is empty."""
        positions = self.positions[label]
        found: Image.Image = self.items[int(positions[generator.integers(len(positions))])]["image"]
        mask = Image.fromarray(foreground(found, self.paper))
        if colour:
            light = np.asarray(found.convert("L")).astype(np.float64)
            light = light if self.paper == "dark" else 255 - light
            shade = (_DARKEST + light * ((255 - _DARKEST) / 255)) / 255
            found = Image.fromarray(np.rint(shade[..., None] * COLOURS[colour]).astype(np.uint8))
        else:
            found = found.copy()
        found.putalpha(mask.convert("L"))
        return found.crop(mask.getbbox())


class MadeVideos(VideoTextSet):
    """Videos that a program writes when they are first asked for.

    Args:
        sprites: Where their pictures come from.
        folder: Of the split's files.
        split: Name of the split.
        count: How many videos it has.
    """

    def __init__(self, sprites: SpritesConfig, folder: Path, split: str, count: int) -> None:
        self.folder, self.split = folder, split
        self._ids = [f"{split}/{i:06d}" for i in range(count)]
        self._of_sprites = sprites

    @cached_property
    def sprites(self) -> Sprites:
        return Sprites(self._of_sprites, self.split)

    def __getstate__(self) -> dict[str, Any]:
        # Processes that read data need the pictures only where they write videos: they open them again then.
        return {key: value for key, value in self.__dict__.items() if key != "sprites"}

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids


def _part(positions: NDArray[np.int64], split: str) -> NDArray[np.int64]:
    held = max(1, len(positions) // 10)
    start, end = {"train": (0, -2 * held), "val": (-2 * held, -held), "test": (-held, None)}[split]
    return positions[start:end] if len(positions) >= 3 else positions[:0]


def performed(sprite: Image.Image, verb: str, frames: int, room: int) -> list[Image.Image]:
    """``sprite`` in every frame, as far as a verb changes its size or its angle."""
    if verb in ("grows", "shrinks"):
        longer = np.linspace(max(sprite.size) / 2, max(sprite.size), frames)
        return [scaled_to(sprite, round(side)) for side in (longer if verb == "grows" else longer[::-1])]
    if verb == "spins":
        turned = [sprite.rotate(-360 * f / frames, Image.Resampling.BILINEAR, expand=True) for f in range(frames)]
        cut = [picture.crop(picture.getchannel("A").getbbox()) for picture in turned]
        largest = max(max(picture.size) for picture in cut)
        return cut if largest <= room else [scaled_to(one, max(1, max(one.size) * room // largest)) for one in cut]
    return [sprite] * frames


def cache_folder(name: str, root: Path | None, source: str, settings: Mapping[str, Any]) -> Path:
    """The folder of the videos of these settings: other settings that change a pixel have another folder."""
    root = root or Path(os.environ.get("BOWERBIRD_CACHE", "~/.cache/bowerbird")) / name
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return root.expanduser() / f"{source.partition('?')[0].partition(':')[2]}-{digest[:12]}"


def write_once(
    path: Path, pixels: Callable[[], NDArray[np.uint8]], settings: Mapping[str, Any], rate: float, asked_by: str
) -> None:
    """Write the frames that ``pixels`` makes as a video, and ``settings`` beside its folder, where they are not yet.

    Raises ``DataError`` where they cannot be written.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.parent.parent / "settings.json"
        if not file.exists():
            write_json(file, settings)
        write_video(path, pixels(), rate=rate)
    except OSError as error:
        raise DataError(
            f"{asked_by}: {str(path)!r} cannot be written ({error}); set root to a folder with room, or the "
            "environment variable BOWERBIRD_CACHE"
        ) from error
