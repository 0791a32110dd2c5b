"""``ClipTransform``: from an item of a set of videos to the entries of a training batch.

Runs in the processes that read the data. Everything random comes from the generator of the item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from bowerbird.data.images import Preprocessing
from bowerbird.data.videos import prepare_clip, read_clip
from bowerbird.errors import DataError, InputError
from bowerbird_videotext.data_configs import ClipAugmentation


class ClipTransform:
    """A clip of ``frames`` frames of a video, augmented as one, with one of the video's captions.

    The entries: ``video`` float32 ``(frames, 3, H, W)`` normalised by ``preprocessing``, zeros after the last frame of
    a shorter video; ``text`` (tokenized in the batch) and ``caption`` (kept), the same caption, drawn among several;
    ``source``, the video's path or address; and what else the item has. An item with ``image`` in the place of
    ``video`` is a video of one frame.

    Args:
        preprocessing: The encoder's.
        frames: T, at least 1.
        config: By default a random frame of each of T equal parts, without crop or mirroring.
        captions: Whether items must have one; with ``False`` they are not read.
    """

    def __init__(
        self,
        preprocessing: Preprocessing | None,
        frames: int | None,
        config: ClipAugmentation | None = None,
        *,
        captions: bool = True,
    ) -> None:
        if preprocessing is None or frames is None:
            raise InputError("clips are for an encoder of videos; this one says neither how it prepares nor how many")
        if frames < 1:
            raise InputError(f"a clip has 1 frame or more, found {frames}")
        self.preprocessing, self.frames = preprocessing, frames
        self.config = config or ClipAugmentation()
        self.captions = captions

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        """Raises ``DataError`` for a video that cannot be read, by file and row; ``InputError`` without captions."""
        entries = {key: value for key, value in item.items() if key not in ("video", "image", "text")}
        images = self._images(item, generator)
        entries["video"] = prepare_clip(self.augmented(images, generator), self.preprocessing, self.frames)
        if isinstance(item.get("video"), str):
            entries["source"] = item["video"]
        if self.captions:
            entries["text"] = entries["caption"] = self.caption(item, generator)
        return entries

    def _images(self, item: dict[str, Any], generator: np.random.Generator) -> list[Image.Image]:
        if "video" not in item:
            if "image" in item:
                return [item["image"]]
            raise InputError(f"items have no video; they have {', '.join(sorted(item))}: choose a data set of videos")
        try:
            return read_clip(item["video"], self.frames, mode=self.config.sampling, generator=generator)
        except DataError as error:
            if "where" not in item:
                raise
            raise DataError(f"{item['where']}: {error}") from error

    def caption(self, item: dict[str, Any], generator: np.random.Generator) -> str:
        """One of the captions of an item. Raises ``InputError`` where it has none."""
        found = item.get("text")
        captions = [found] if isinstance(found, str) else list(found or ())
        if not captions:
            raise InputError(
                f"{item.get('where', 'an item')}: no caption (text), and this method learns from captions; choose "
                "videos with captions"
            )
        caption = str(captions[int(generator.integers(len(captions)))])
        if not caption.strip():
            raise InputError(f"{item.get('where', 'an item')}: the caption {caption!r} is empty")
        return caption

    def augmented(self, images: Sequence[Image.Image], generator: np.random.Generator) -> Sequence[Image.Image]:
        """The frames of one clip after one crop and one mirroring, as far as the settings say so."""
        c = self.config
        if c.crop != (1.0, 1.0):
            box = random_box(images[0].size, c.crop, c.crop_ratio, generator)
            images = [image.crop(box) for image in images]
        if c.flip and generator.random() < c.flip:
            images = [ImageOps.mirror(image) for image in images]
        return images


def random_box(
    size: tuple[int, int],
    area: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part of a picture of ``size`` (width, height).

    Its share of the picture's area is uniform in ``area``, the ratio of its sides log-uniform in ``ratio``, as far as
    they fit.
    """
    width, height = size
    wanted = generator.uniform(*area) * width * height
    shape = float(np.exp(generator.uniform(*np.log(ratio))))
    w = int(np.clip(round(np.sqrt(wanted * shape)), 1, width))
    h = int(np.clip(round(np.sqrt(wanted / shape)), 1, height))
    left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
    return left, top, left + w, top + h
