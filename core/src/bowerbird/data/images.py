"""From an image file to the array that an encoder reads: safe opening, preprocessing, decoding ahead with threads.

Imports numpy and Pillow, no torch: a process that only ingests or searches stays light.
"""

from __future__ import annotations

import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bowerbird.data.regions import split_region
from bowerbird.data.uris import is_dataset_uri, open_dataset_item
from bowerbird.data.video_files import VIDEO_SUFFIXES
from bowerbird.errors import DataError, InputError, did_you_mean

ImageSource = str | Path | bytes | Image.Image

MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20
WHITE = (255, 255, 255)

# What `open_image` reads. Everything else that Pillow knows is left out on purpose: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO", "ICO", "TGA")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_EXIF_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height


# ------------------------------------------------------------------------------------------------- preprocessing


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the ``image`` key: resize, centre crop, scale to 0..1, subtract ``mean``, divide by ``std``.

    Attributes:
        size: Side of the square result in pixels, or ``(height, width)``.
        mean, std: Per channel (red, green, blue), on the 0..1 scale.
        interpolation: ``bicubic`` or ``bilinear``, both antialiased when shrinking.
        resize: ``squash`` scales both sides to ``size``, whatever the aspect ratio; ``crop`` scales the shorter side to
            ``floor(size / crop_pct)`` and takes the centre, as torchvision and timm do; for square results only.
        crop_pct: In (0, 1]; only read by ``crop``.
        background: Colour (0..255) under transparent pixels.

    Raises ``InputError`` for values outside these ranges.
    """

    size: int | tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize: Literal["squash", "crop"] = "squash"
    crop_pct: float = 1.0
    background: tuple[int, int, int] = WHITE

    def __post_init__(self) -> None:
        # Lists come out of JSON and TOML; as tuples the dataclass stays hashable.
        for name in ("mean", "std", "background"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
                raise InputError(f"Preprocessing.{name} must be three numbers (red, green, blue), found {value!r}.")
            convert = int if name == "background" else float
            object.__setattr__(self, name, tuple(convert(v) for v in value))
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))
        sides = self.size if isinstance(self.size, tuple) and len(self.size) == 2 else (self.size,)
        if any(isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= 8192 for side in sides):
            raise InputError(
                "Preprocessing.size must be a whole number from 1 to 8192 pixels, or two of them (height, width), "
                f"found {self.size!r}."
            )
        if not all(math.isfinite(v) for v in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise InputError(
                f"Preprocessing.mean must be finite and .std finite and above 0, found {self.mean} and {self.std}."
            )
        if self.interpolation not in _RESAMPLING:
            raise InputError(
                f"Preprocessing.interpolation must be one of {sorted(_RESAMPLING)}, {self.interpolation=}."
            )
        if self.resize not in ("squash", "crop"):
            raise InputError(f"Preprocessing.resize must be 'squash' or 'crop', found {self.resize!r}.")
        if self.resize == "crop" and self.height != self.width:
            raise InputError(f"Preprocessing.resize = 'crop' needs a square size, found {self.size}; use 'squash'.")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"Preprocessing.crop_pct must be above 0 and at most 1, found {self.crop_pct!r}.")
        if not all(0 <= v <= 255 for v in self.background):
            raise InputError(f"Preprocessing.background must be three values of 0..255, found {self.background}.")

    @property
    def height(self) -> int:
        return self.size[0] if isinstance(self.size, tuple) else self.size

    @property
    def width(self) -> int:
        return self.size[1] if isinstance(self.size, tuple) else self.size

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; ``from_dict`` reads it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``. Raises ``InputError`` for keys that do not exist and values out of range."""
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(
                    f"Preprocessing has no setting {key!r}; it has {sorted(known)}.{did_you_mean(key, known)}"
                )
        if "size" not in values:
            raise InputError("Preprocessing needs 'size', the side of the square result in pixels.")
        return cls(**values)

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """float32 ``(3, height, width)``."""
        out = np.empty((3, self.height, self.width), np.float32)
        self.into(image, out)
        return out

    def into(self, image: Image.Image, out: NDArray[np.float32]) -> None:
        """Writes the result into ``out``, float32 ``(3, height, width)``, for example one row of a batch."""
        if image.mode != "RGB":
            image = to_rgb(image, background=self.background)
        pixels = np.asarray(self.resized(image))
        scale, shift = _scale_and_shift(self.mean, self.std)
        np.multiply(pixels.transpose(2, 0, 1), scale, out=out)
        out += shift

    def resized(self, image: Image.Image) -> Image.Image:
        """The RGB image of ``height`` x ``width`` pixels, before the numbers are normalised."""
        width, height = image.size
        box: tuple[float, float, float, float] = (0, 0, width, height)
        if self.resize == "crop":
            # Resize and crop in one: only the pixels inside the crop are computed, so that an image of 1 x 1,000,000
            # does not become one of 224 x 224,000,000 on the way. The result is that of resizing, then cropping, but
            # for the rounding of intermediate pixels, because Pillow may do rows and columns in another order.
            side = self.width
            short = math.floor(side / self.crop_pct)
            grown = (
                (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
            )  # torchvision's rounding
            left, top = round((grown[0] - side) / 2), round((grown[1] - side) / 2)
            x, y = width / grown[0], height / grown[1]
            box = (left * x, top * y, min((left + side) * x, width), min((top + side) * y, height))
        if image.size == (self.width, self.height) and box == (0, 0, width, height):
            return image
        return self.resized_box(image, box)

    def resized_box(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """The part ``box`` (left, top, right, bottom in pixels) of an RGB image in ``height`` x ``width`` pixels."""
        return image.resize((self.width, self.height), _RESAMPLING[self.interpolation], box=box)


@lru_cache(maxsize=64)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[NDArray[np.float32], ...]:
    """``(x / 255 - mean) / std`` as ``x * scale + shift``, each (3, 1, 1)."""
    m, s = np.asarray(mean), np.asarray(std)
    return (1 / (255 * s)).astype(np.float32)[:, None, None], (-m / s).astype(np.float32)[:, None, None]


# ------------------------------------------------------------------------------------------------- opening


def images_in(folder: str | Path) -> tuple[list[str], list[Path]]:
    """Ids (paths relative to ``folder``, with ``/``) and paths of the images below ``folder``, sorted by id.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder")
    found = {
        p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()
    }
    if not found:
        raise DataError(f"{str(folder)!r} holds no image; looked for {', '.join(SUFFIXES)}")
    ids = sorted(found)
    return ids, [found[name] for name in ids]


def open_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    background: tuple[int, int, int] = WHITE,
    name: str | None = None,
) -> Image.Image:
    """The image as 8-bit RGB, upright, decoded.

    EXIF orientation is applied, transparent pixels are laid over ``background``, grey, palette, CMYK and 16-bit
    images are converted, of an animation the first frame is taken.

    Args:
        source: A path, the bytes of a file, an open Pillow image, or the address of a data set's item
            (``bowerbird.data.uris``). A path or an address may name a part of the picture: ``#xywh=x,y,w,h``
            (``bowerbird.data.regions``); limits hold for the whole.
        max_pixels: Limit of width x height, checked in the header before any pixel is decoded. Pillow's own limit,
            twice ``PIL.Image.MAX_IMAGE_PIXELS``, holds as well.
        max_bytes: Limit of the file's size.
        name: What to call the image in errors; by default its path.

    Raises ``DataError``, which names the file, what was found and the limits, where the file is missing, is no image,
    is damaged or is larger than a limit, and where a region lies outside the picture or has no area.
    """
    name = name or (str(source) if isinstance(source, str | Path) else f"<{type(source).__name__}>")
    if isinstance(source, str | Path):
        whole, region = split_region(source)
        if region is not None:
            image = open_image(whole, max_pixels=max_pixels, max_bytes=max_bytes, background=background, name=name)
            try:
                return image.crop(region.box(*image.size))
            except DataError as error:
                raise DataError(f"Cannot read image {name}: {error}.") from error
    if isinstance(source, str) and is_dataset_uri(source):
        source = open_dataset_item(source)
    if isinstance(source, Image.Image):
        _check_pixels(source, name, max_pixels)
        return _decode(source, name, background)
    with _opened(source, name, max_pixels, max_bytes) as opened:
        return _decode(opened, name, background)


def image_size(file: str | Path, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> tuple[int, int]:
    """Height and width that ``open_image`` would give for a file, from its header: no pixel is decoded.

    Raises ``DataError`` as ``open_image`` does, but for damage behind the header.
    """
    with _opened(file, str(file), max_pixels, max_bytes) as opened:
        width, height = opened.size
        return (width, height) if _orientation(opened) in _SIDEWAYS else (height, width)


def _opened(source: Any, name: str, max_pixels: int, max_bytes: int) -> Image.Image:
    """The image of a path or of bytes with its header read, within the limits."""
    if isinstance(source, bytes | bytearray | memoryview):
        file: Path | io.BytesIO = io.BytesIO(source)
        found = memoryview(source).nbytes
    elif isinstance(source, str | Path):
        file = Path(source)
        if not file.is_file():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise DataError(f"Cannot open image {name}: the file {what}.")
        found = file.stat().st_size
    else:
        raise DataError(f"An image must be a path, bytes or a PIL image, found {type(source).__name__}.")
    if found > max_bytes:
        raise DataError(f"Image {name} has {found:,} bytes; the limit is max_bytes={max_bytes:,}.")
    if not found:
        raise DataError(f"Cannot read image {name}: the file is empty (0 bytes).")
    try:
        opened = Image.open(file, formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"Image {name} is too large: {error} The limit is max_pixels={max_pixels:,}.") from error
    except UnidentifiedImageError as error:
        if isinstance(file, Path) and file.suffix.lower() in VIDEO_SUFFIXES:
            raise DataError(
                f"Cannot read image {name}: it is a video, and pictures are asked for. Videos are for encoders that "
                "take them, such as videotext:dual-encoder."
            ) from error
        raise DataError(
            f"Cannot read image {name} ({found:,} bytes): not an image in a known format ({', '.join(_formats())})."
        ) from error
    except Exception as error:  # Pillow's parsers raise a zoo of types on damaged headers
        raise DataError(f"Cannot read image {name} ({found:,} bytes): {_reason(error)}.") from error
    try:
        _check_pixels(opened, name, max_pixels)
    except DataError:
        opened.close()
        raise
    return opened


def to_rgb(image: Image.Image, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """``image`` in mode RGB, transparent pixels laid over ``background``.

    Raises ``ValueError`` for modes that have no defined white.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow clips 16-bit grey at 255 when it converts; the upper byte is what is meant.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} (32 bits) have no defined white; save it with 8 or 16 bits")
    return image.convert("RGB")


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DataError(f"Image {name} is empty: {width} x {height} pixels.")
    if width * height > max_pixels:
        raise DataError(
            f"Image {name} is too large: {width} x {height} = {width * height:,} pixels; "
            f"the limit is max_pixels={max_pixels:,}."
        )


def _decode(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    try:
        image.load()
        turn = _orientation(image)
        image = to_rgb(image, background=background)
        return image.transpose(_TURN[turn]) if turn in _TURN else image
    except Exception as error:
        width, height = image.size
        raise DataError(
            f"Cannot read image {name} ({width} x {height} {image.mode}): {_reason(error)}. "
            "The file is truncated or damaged, or of a kind that cannot be converted to RGB."
        ) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the pixels unreadable
        return 1


@cache
def _formats() -> tuple[str, ...]:
    Image.init()  # AVIF and JPEG2000 depend on how Pillow was built
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: Exception) -> str:
    text = str(error).rstrip(".") or "no reason given"
    return f"{type(error).__name__}: {text}"


# ------------------------------------------------------------------------------------------------- decoding ahead

OnError = Literal["raise", "skip"] | Callable[[int, DataError], None]

_CHUNK = 8  # images per thread task: a task costs about 30 us, a small image about 100 us


def decode_batches(
    sources: Sequence[ImageSource],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int | None = None,
    prefetch: int = 2,
    on_error: OnError = "raise",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Batches in the order of ``sources``, decoded by threads while the caller works on the batch before.

    Args:
        sources: Anything with a length and positions; ``sources[i]`` is read in a worker thread, so that it may be lazy
            (see ``bowerbird.data.images_of``).
        batch_size: Images per batch; the last may be smaller.
        workers: Threads. ``None``: one per CPU but one, at most 8 (the caller works too). 0: decode in its thread.
        prefetch: Batches that are decoded ahead. Memory is at most ``prefetch + 1`` batches, and the one in use.
        on_error: ``raise`` the ``DataError`` of the first unreadable image, in order; ``skip`` it; or a function that
            is told ``(position, error)`` of each one skipped.

    Yields:
        ``(indices int64 (B,), images float32 (B, 3, size, size))``. Skipped positions are missing from ``indices``; a
        batch of which nothing is left is not yielded.
    """

    def prepare(source: ImageSource, row: NDArray[np.float32], name: str) -> None:
        image = open_image(
            source, max_pixels=max_pixels, max_bytes=max_bytes, background=preprocessing.background, name=name
        )
        preprocessing.into(image, row)

    shape = (3, preprocessing.height, preprocessing.width)
    return prepare_ahead(
        sources, shape, prepare, batch_size=batch_size, workers=workers, prefetch=prefetch, on_error=on_error
    )


def prepare_ahead(
    sources: Sequence[Any],
    shape: tuple[int, ...],
    prepare: Callable[[Any, NDArray[np.float32], str], None],
    *,
    batch_size: int,
    workers: int | None = None,
    prefetch: int = 2,
    on_error: OnError = "raise",
    chunk: int = _CHUNK,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The machinery of ``decode_batches``, whose arguments and results these are, for rows of any shape.

    Args:
        shape: Of one row, float32.
        prepare: ``(source, row, name)``: fills the row, in any thread; may raise ``DataError``.
        chunk: How many rows are one task of a thread.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}.")
    if prefetch < 1:
        raise InputError(f"prefetch must be at least 1, found {prefetch}.")
    if not callable(on_error) and on_error not in ("raise", "skip"):
        raise InputError(f"on_error must be 'raise', 'skip' or a function, found {on_error!r}.")
    if workers is None:
        workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    if workers < 0:
        raise InputError(f"workers must be 0 or more, found {workers}.")

    def fill(first: int, rows: NDArray[np.float32]) -> dict[int, DataError]:
        bad: dict[int, DataError] = {}
        for offset, row in enumerate(rows):
            position = first + offset
            try:
                source = sources[position]
                name = str(source) if isinstance(source, str | Path) else f"number {position}"
                prepare(source, row, name)
            except DataError as error:
                bad[position] = error
        return bad

    def finished(first: int, images: NDArray[np.float32], bad: dict[int, DataError]) -> tuple[Any, Any]:
        indices = np.arange(first, first + len(images))
        if not bad:
            return indices, images
        if on_error == "raise":
            raise bad[min(bad)]
        if callable(on_error):
            for position in sorted(bad):
                on_error(position, bad[position])
        keep = ~np.isin(indices, list(bad))
        return indices[keep], images[keep]

    def batches() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for first in range(0, len(sources), batch_size):
            count = min(batch_size, len(sources) - first)
            yield first, np.empty((count, *shape), np.float32)

    def inline() -> Iterator[tuple[Any, Any]]:
        for first, images in batches():
            pair = finished(first, images, fill(first, images))
            if len(pair[0]):
                yield pair

    def threaded() -> Iterator[tuple[Any, Any]]:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="bowerbird-decode")
        pending: deque[tuple[int, NDArray[np.float32], list[Future[dict[int, DataError]]]]] = deque()
        todo = batches()

        def submit() -> None:
            for first, images in todo:
                starts = range(0, len(images), chunk)
                chunks = [pool.submit(fill, first + s, images[s : s + chunk]) for s in starts]
                pending.append((first, images, chunks))
                return

        try:
            for _ in range(prefetch):
                submit()
            while pending:
                submit()
                first, images, chunks = pending.popleft()
                bad = {position: error for chunk in chunks for position, error in chunk.result().items()}
                pair = finished(first, images, bad)
                if len(pair[0]):
                    yield pair
        finally:  # also where the caller stops early or an image raises
            pool.shutdown(wait=True, cancel_futures=True)

    return threaded() if workers else inline()
