"""Large and small crops of a picture, as DINO takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird_mim.views import ColorAugmentation, View, resized
from bowerbird_mim.vit import IMAGENET_MEAN, IMAGENET_STD, ImageSize

# What DINO does to the colours of the first global crop, of the second, and of local crops.
DINO_COLORS = (
    ColorAugmentation(blur_prob=1.0),
    ColorAugmentation(blur_prob=0.1, solarize_prob=0.2),
    ColorAugmentation(blur_prob=0.5),
)


class MultiCrop:
    """Two large crops and several small ones of a picture: entries ``global_views`` and ``local_views``.

    Args:
        global_size, local_size: Side in pixels, or (height, width), of the two kinds of crops.
        n_local: Number of small crops; with 0 there is no entry ``local_views``.
        preprocessing: Where mean, standard deviation and resampling come from; by default ImageNet's, bicubic.
        global_scale, local_scale: Ranges of a crop's share of the picture's area.
        flip_prob: How often a crop is mirrored.
        colors: Colour changes of the first global crop, of the second and of local crops; ``None`` changes nothing.

    Raises:
        InputError: A negative number of crops, or scales and ``flip_prob`` that are no shares.
    """

    def __init__(
        self,
        global_size: ImageSize = 224,
        local_size: ImageSize = 96,
        n_local: int = 8,
        *,
        preprocessing: Preprocessing | None = None,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        flip_prob: float = 0.5,
        colors: Sequence[ColorAugmentation | None] = DINO_COLORS,
    ) -> None:
        if n_local < 0 or len(colors) != 3:
            raise InputError(
                f"n_local = {n_local} and {len(colors)} colour changes: expected 0 or more small crops, and colours of "
                "the first global, the second global and the local crops"
            )
        base = preprocessing or Preprocessing(size=global_size, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        first, second, local = colors
        large, small = resized(base, global_size), resized(base, local_size)
        self.global_views = [
            View(preprocessing=large, scale=global_scale, flip_prob=flip_prob, color=color) for color in (first, second)
        ]
        self.local_view = View(preprocessing=small, scale=local_scale, flip_prob=flip_prob, color=local)
        self.n_local = n_local

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        return self.crops(item["image"], generator)

    def crops(self, image: Image.Image, generator: np.random.Generator) -> dict[str, NDArray[np.float32]]:
        """``global_views (2, 3, H, W)`` and ``local_views (n_local, 3, h, w)``, float32."""
        views = {"global_views": np.stack([view(image, generator) for view in self.global_views])}
        if self.n_local:
            views["local_views"] = np.stack([self.local_view(image, generator) for _ in range(self.n_local)])
        return views
