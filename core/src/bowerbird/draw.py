"""Objects drawn on their picture, with Pillow."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from bowerbird.protocols import Objects

READABLE_SIDE = 640  # smaller pictures are enlarged, or labels would cover them
MASK_OPACITY = 0.45

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def class_colour(label: int) -> Colour:
    """A strong colour per class; those of neighbouring classes are far apart on the colour circle."""
    hue = label * (math.sqrt(5) - 1) / 2 % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9 if label % 2 == 0 else 0.65, 0.95 if label % 3 else 0.8)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_objects(image: Image.Image, objects: Objects, classes: Sequence[str]) -> Image.Image:
    """A copy of an RGB picture with boxes, class names and scores, and masks and keypoints where there are.

    Pictures whose longer side is below ``READABLE_SIDE`` are enlarged by a whole factor. The surest object is drawn
    last, over the others.
    """
    factor = max(1, READABLE_SIDE // max(image.size))
    canvas = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    order = list(range(len(objects.boxes)))[::-1]
    colours = [class_colour(label) for label in objects.labels.tolist()]
    if objects.masks is not None:
        canvas = _with_masks(canvas, [(objects.masks[i].numpy(), colours[i]) for i in order], factor)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(max(canvas.size) / 320))
    font = ImageFont.load_default(max(13, round(max(canvas.size) / 45)))
    boxes = [[side * factor for side in box] for box in objects.boxes.tolist()]
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # Pillow draws the last pixel too
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=line + 2)  # seen on any ground
        pen.rectangle((x1, y1, x2, y2), outline=colours[i], width=line)
        if objects.keypoints is not None:
            for x, y, visible in objects.keypoints[i].tolist():
                if visible > 0:
                    middle, reach = (x * factor, y * factor), 1.5 * line
                    pen.circle(middle, reach, fill=colours[i], outline=(255, 255, 255))
    taken: list[Box] = []
    for i in order[::-1]:  # names last: no box crosses them; the surest first: it has its place above the box
        name = classes[int(objects.labels[i])]
        text = name if objects.scores is None else f"{name} {float(objects.scores[i]):.2f}"
        taken.append(_label(pen, text, boxes[i], colours[i], font, canvas.size, taken))
    return canvas


def _with_masks(canvas: Image.Image, masks: Sequence[tuple[np.ndarray, Colour]], factor: int) -> Image.Image:
    pixels = np.asarray(canvas, np.float32).copy()
    for mask, colour in masks:
        large = mask.repeat(factor, axis=0).repeat(factor, axis=1)
        pixels[large] += MASK_OPACITY * (np.asarray(colour, np.float32) - pixels[large])
        inner = large.copy()
        inner[1:] &= large[:-1]
        inner[:-1] &= large[1:]
        inner[:, 1:] &= large[:, :-1]
        inner[:, :-1] &= large[:, 1:]
        pixels[large & ~inner] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _label(
    pen: ImageDraw.ImageDraw, text: str, box: Sequence[float], colour: Colour, font: Font, size: tuple[int, int],
    taken: Sequence[Box],
) -> Box:  # fmt: skip
    """Above the box, or within it or below it where there is no room or another label; never outside the picture.

    Returns where it is: left, top, right, bottom.
    """
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(0.0, box[0]), max(0.0, size[0] - width))
    lines = [box[1] - height, box[1], box[3] - height, box[3], box[1] - 2 * height]
    places = [(x, y, x + width - 1, y + height - 1) for y in lines if 0 <= y <= size[1] - height]
    places = places or [(x, 0.0, x + width - 1, height - 1.0)]
    place = next((one for one in places if not any(_overlap(one, other) for other in taken)), places[0])
    pen.rectangle(place, fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((x + 3 - left, place[1] + 3 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)
    return place


def _overlap(one: Box, other: Box) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]
