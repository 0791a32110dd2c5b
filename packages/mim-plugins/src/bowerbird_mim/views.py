"""Random views of a picture for self-supervision, drawn from the item's own generator.

Everything works on Pillow pictures in the processes that read the data; crop and resize are one operation. The
parameters of a view are drawn from a numpy generator, so that a batch does not depend on the number of processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from bowerbird.data.images import Preprocessing, to_rgb
from bowerbird.errors import InputError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def random_crop_box(
    size: tuple[int, int],
    generator: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random crop as torchvision's ``RandomResizedCrop`` draws it: (left, top, right, bottom) in whole pixels.

    Area uniform in ``scale`` (shares of the picture), ratio width / height log-uniform in ``ratio``; after ten tries
    that do not fit, the largest centred crop whose ratio is within bounds.

    Args:
        size: (width, height) of the picture.
    """
    width, height = size
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True, kw_only=True)
class ColorAugmentation:
    """Colour changes of DINO and BYOL, in their order: jitter, grey, blur, solarise.

    Attributes:
        jitter: Largest change of brightness, contrast, saturation (factors 1 - x to 1 + x), hue (share of the circle).
        jitter_prob, grey_prob, blur_prob, solarize_prob: How often each is applied.
        blur_radius: Range of the radius of the Gaussian blur in pixels.
    """

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: float = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_prob: float = 0.0

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        if generator.random() < self.jitter_prob:
            image = self._jittered(image, generator)
        if generator.random() < self.grey_prob:
            image = ImageOps.grayscale(image).convert("RGB")
        if generator.random() < self.blur_prob:
            image = image.filter(ImageFilter.GaussianBlur(float(generator.uniform(*self.blur_radius))))
        if generator.random() < self.solarize_prob:
            image = ImageOps.solarize(image)
        return image

    def _jittered(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """Brightness, contrast, saturation and hue in a random order, as torchvision's ``ColorJitter``."""
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for which in generator.permutation(4):
            strength = self.jitter[which]
            if strength == 0:
                continue
            if which < 3:
                factor = float(generator.uniform(max(0.0, 1 - strength), 1 + strength))
                image = kinds[which](image).enhance(factor)
            else:
                image = _shift_hue(image, float(generator.uniform(-strength, strength)))
        return image


def _shift_hue(image: Image.Image, share: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = round(share * 255) % 256
    return Image.merge("HSV", (hue.point(lambda h: (h + shift) % 256), saturation, value)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class View:
    """One random view: crop, resize, flip, colours, numbers.

    Attributes:
        preprocessing: Size of the result, resampling, mean and standard deviation.
        scale: Range of the crop's share of the area.
        flip_prob: How often the view is mirrored.
        color: Colour changes, or ``None``.
    """

    preprocessing: Preprocessing
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    color: ColorAugmentation | None = None

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise InputError(f"crop scale {list(self.scale)}: expected two shares of the area, 0 < low <= high <= 1")
        if not 0 <= self.flip_prob <= 1:
            raise InputError(f"flip_prob = {self.flip_prob}: expected a share from 0 to 1")

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> NDArray[np.float32]:
        """float32 ``(3, height, width)``."""
        box = random_crop_box(image.size, generator, scale=self.scale, ratio=self.ratio)
        return self.of_box(image, box, generator)

    def of_box(self, image: Image.Image, box: Box, generator: np.random.Generator) -> NDArray[np.float32]:
        """The view of the part ``box`` of the picture."""
        picture = crop_resized(image, box, self.preprocessing)
        if generator.random() < self.flip_prob:
            picture = ImageOps.mirror(picture)
        if self.color is not None:
            picture = self.color(picture, generator)
        return self.preprocessing(picture)


def crop_resized(image: Image.Image, box: Box, preprocessing: Preprocessing) -> Image.Image:
    """The part ``box`` of ``image`` in the size of ``preprocessing``, RGB."""
    return preprocessing.resized_box(to_rgb(image, background=preprocessing.background), box)


def resized(preprocessing: Preprocessing, size: int | tuple[int, int]) -> Preprocessing:
    """``preprocessing`` for views of another size."""
    values: dict[str, Any] = preprocessing.to_dict()
    return Preprocessing.from_dict(values | {"size": size, "resize": "squash", "crop_pct": 1.0})
