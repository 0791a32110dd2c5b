"""From a file to an array: what opens, how it looks, and what is refused with which words."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bowerbird.data.images import Preprocessing, decode_batches, image_size, open_image
from bowerbird.errors import DataError, InputError

RNG = np.random.default_rng(0)


def picture(width: int, height: int, channels: int = 3) -> Image.Image:
    """Smooth and different everywhere, like a photo."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17 + k) + np.cos(y / (11 + k)) for k in range(channels)]
    return Image.fromarray(np.uint8(127 + 60 * np.stack(waves, -1)))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(image)[y, x])


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes whose header claims ``width`` x ``height`` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_common_formats_open_as_rgb(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(picture(31, 17), kind))
    for source in (path, str(path), path.read_bytes()):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (31, 17))


def test_transparent_pixels_show_the_background() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    png = encoded(half, "PNG")
    assert [pixel(open_image(png), x) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    assert pixel(open_image(png, background=(0, 0, 255)), 1) == (0, 0, 255)


def test_a_half_transparent_pixel_is_half_background() -> None:
    assert pixel(open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))) == (127, 127, 127)


def test_a_palette_with_a_transparent_colour_shows_the_background() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = open_image(encoded(palette, "PNG", transparency=1))
    assert [pixel(image, x) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_grey_with_alpha_and_black_and_white_open() -> None:
    assert pixel(open_image(encoded(Image.new("LA", (1, 1), (90, 255)), "PNG"))) == (90, 90, 90)
    assert pixel(open_image(encoded(Image.new("1", (1, 1), 1), "PNG"))) == (255, 255, 255)


def test_cmyk_jpeg_opens_with_its_colours() -> None:
    red, green, blue = pixel(open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)))
    assert red > 200
    assert green < 60
    assert blue < 60


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    for kind in ("PNG", "TIFF"):
        image = open_image(encoded(grey, kind))
        assert [pixel(image, x)[0] for x in range(4)] == [0, 1, 128, 255]


def test_pixels_of_32_bits_are_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match="no defined white"):
        open_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (5, 0)), (3, (5, 3)), (4, (0, 3)), (5, (0, 0)), (6, (3, 0)), (7, (3, 5)), (8, (0, 5))],
)
def test_exif_orientation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    stored = Image.new("RGB", (6, 4))
    stored.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(encoded(stored, "PNG", exif=exif))
    assert image.size == ((6, 4) if orientation < 5 else (4, 6))
    assert pixel(image, *corner) == (255, 0, 0)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(open_image(gif)) == (255, 0, 0)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (12_000, 8_000), (100_000, 100_000), (2**31 - 1, 1)])
def test_an_image_of_bomb_size_is_refused_before_decoding(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "holiday.png"
    path.write_bytes(bomb(width, height))
    with pytest.raises(DataError) as caught:
        open_image(path)
    message = str(caught.value)
    assert "holiday.png" in message
    assert f"{width * height:,}" in message.replace(str(width * height), f"{width * height:,}")
    assert "64,000,000" in message


def test_the_pixel_limit_can_be_set() -> None:
    png = encoded(picture(20, 10), "PNG")
    assert open_image(png, max_pixels=200).size == (20, 10)
    with pytest.raises(DataError, match=r"20 x 10 = 200 pixels; the limit is max_pixels=199"):
        open_image(png, max_pixels=199)


def test_a_file_over_the_byte_limit_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(encoded(picture(20, 10), "PNG"))
    with pytest.raises(DataError, match=r"large\.png has [\d,]+ bytes; the limit is max_bytes=50"):
        open_image(path, max_bytes=50)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_truncated_image_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{kind.lower()}"
    whole = encoded(picture(200, 150), kind)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\."):
        open_image(path)


def test_a_text_file_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("Dear diary, today I met a bowerbird.")
    with pytest.raises(DataError, match=r"notes\.jpg \(36 bytes\): not an image in a known format \(JPEG, PNG"):
        open_image(path)


def test_formats_that_start_other_programs_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "page.eps"
    path.write_bytes(encoded(picture(8, 8), "EPS"))
    with pytest.raises(DataError, match="not an image in a known format"):
        open_image(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.png", "does not exist"),
        (lambda folder: folder, "is a folder"),
        (lambda folder: b"", "is empty"),
        (lambda folder: 7, "found int"),
    ],
)
def test_what_is_no_file_is_refused(make: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        open_image(make(tmp_path))  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.data())
def test_damaged_bytes_open_or_raise_data_error_and_nothing_else(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(encoded(picture(24, 16), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = open_image(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]), max_pixels=10_000)
    except DataError:
        return
    assert image.mode == "RGB"


# ------------------------------------------------------------------------------------------------- preprocessing


def test_preprocessing_is_scale_then_mean_then_std() -> None:
    preprocessing = Preprocessing(size=2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    out = preprocessing(Image.new("RGB", (2, 2), (0, 51, 255)))
    assert out.dtype == np.float32
    expected = np.array([(0 - 0.1) / 0.5, (0.2 - 0.2) / 0.25, (1 - 0.3) / 0.125])
    np.testing.assert_allclose(out, np.broadcast_to(expected[:, None, None], (3, 2, 2)), atol=1e-5)


def test_pictures_may_be_taller_than_wide() -> None:
    preprocessing = Preprocessing(size=(6, 2))
    assert preprocessing(Image.new("RGB", (5, 5))).shape == (3, 6, 2)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    batches = list(decode_batches([Image.new("RGB", (4, 9))] * 3, preprocessing, batch_size=2))
    assert [images.shape for _, images in batches] == [(2, 3, 6, 2), (1, 3, 6, 2)]
    with pytest.raises(InputError, match="needs a square size"):
        Preprocessing(size=(6, 2), resize="crop")
    with pytest.raises(InputError, match="or two of them"):
        Preprocessing(size=(6, 2, 3))  # type: ignore[arg-type]


def test_channels_come_first_and_rows_before_columns() -> None:
    image = Image.new("RGB", (3, 3))
    image.putpixel((2, 0), (255, 0, 0))
    out = Preprocessing(size=3, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert np.argwhere(out > 0.5).tolist() == [[0, 0, 2]]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 333), (128, 128), (40, 57)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_crop_is_resizing_the_shorter_side_then_taking_the_centre(
    width: int, height: int, crop_pct: float, interpolation: str
) -> None:
    size = 64
    preprocessing = Preprocessing(size=size, resize="crop", crop_pct=crop_pct, interpolation=interpolation)  # type: ignore[arg-type]
    short = int(size / crop_pct)
    grown = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    left, top = round((grown[0] - size) / 2), round((grown[1] - size) / 2)
    image = picture(width, height)
    expected = np.asarray(image.resize(grown, method).crop((left, top, left + size, top + size)), np.int64)
    assert np.abs(expected - np.asarray(preprocessing.resized(image))).max() <= 2


def test_squash_uses_the_whole_image() -> None:
    image = picture(90, 30)
    expected = image.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(Preprocessing(size=32).resized(image)), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 500_000), (500_000, 1)])
def test_a_thread_of_an_image_does_not_grow_on_the_way(shape: tuple[int, int]) -> None:
    out = Preprocessing(size=64, resize="crop")(Image.new("RGB", shape))
    assert out.shape == (3, 64, 64)


def test_transparent_and_grey_pil_images_are_taken_too() -> None:
    preprocessing = Preprocessing(size=4, mean=(0, 0, 0), std=(1, 1, 1), background=(255, 0, 0))
    assert preprocessing(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))[:, 0, 0].tolist() == [1, 0, 0]
    assert preprocessing(Image.new("L", (4, 4), 255)).min() == 1


def test_preprocessing_survives_json() -> None:
    preprocessing = Preprocessing(
        size=32, mean=(0.4, 0.5, 0.6), std=(1, 2, 3), resize="crop", crop_pct=0.9, background=(1, 2, 3)
    )
    again = Preprocessing.from_dict(preprocessing.to_dict())
    assert again == preprocessing
    assert hash(again) == hash(preprocessing)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 0}, "size must be a whole number"),
        ({"size": 2.5}, "size must be a whole number"),
        ({"size": 8, "std": (0, 1, 1)}, "std finite and above 0"),
        ({"size": 8, "mean": (float("nan"), 0, 0)}, "finite"),
        ({"size": 8, "mean": 0.5}, "three numbers"),
        ({"size": 8, "interpolation": "nearest"}, "bicubic"),
        ({"size": 8, "resize": "pad"}, "'squash' or 'crop'"),
        ({"size": 8, "crop_pct": 0}, "crop_pct"),
        ({"size": 8, "background": (0, 0, 256)}, "0..255"),
        ({"size": 8, "crop_pc": 1}, "Did you mean 'crop_pct'"),
        ({}, "needs 'size'"),
    ],
)
def test_wrong_preprocessing_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Preprocessing.from_dict(values)


# ------------------------------------------------------------------------------------------------- decoding ahead

SMALL = Preprocessing(size=8)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 40), batch_size=st.integers(1, 17), workers=st.integers(0, 3), prefetch=st.integers(1, 3))
def test_batches_are_complete_and_in_order(count: int, batch_size: int, workers: int, prefetch: int) -> None:
    sources = [Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)) for i in range(count)]
    batches = list(decode_batches(sources, SMALL, batch_size=batch_size, workers=workers, prefetch=prefetch))
    assert [i for indices, _ in batches for i in indices.tolist()] == list(range(count))
    assert all(len(indices) == len(images) == batch_size for indices, images in batches[:-1])
    for indices, images in batches:
        assert images.dtype == np.float32
        for i, image in zip(indices, images, strict=True):
            assert np.array_equal(image, SMALL(sources[i]))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_unreadable_image_in_order_is_raised(workers: int, tmp_path: Path) -> None:
    sources: list[object] = [picture(9, 9)] * 30
    for i in (21, 12, 25):
        sources[i] = tmp_path / f"missing-{i}.png"
    batches = decode_batches(sources, SMALL, batch_size=10, workers=workers)  # type: ignore[arg-type]
    assert next(batches)[0].tolist() == list(range(10))
    with pytest.raises(DataError, match=r"missing-12\.png"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_can_be_skipped_and_are_reported(workers: int) -> None:
    sources: list[bytes] = [encoded(picture(9, 9), "PNG")] * 12
    for i in (0, 4, 5, 6, 7):
        sources[i] = b"no image"
    told: list[int] = []
    batches = list(
        decode_batches(
            sources, SMALL, batch_size=4, workers=workers, on_error=lambda position, error: told.append(position)
        )
    )
    assert told == [0, 4, 5, 6, 7]
    assert [indices.tolist() for indices, _ in batches] == [[1, 2, 3], [8, 9, 10, 11]]
    quiet = list(decode_batches(sources, SMALL, batch_size=4, workers=workers, on_error="skip"))
    assert [indices.tolist() for indices, _ in quiet] == [[1, 2, 3], [8, 9, 10, 11]]


def test_bytes_that_are_no_image_are_called_by_their_number() -> None:
    with pytest.raises(DataError, match="image number 3 "):
        list(decode_batches([encoded(picture(4, 4), "PNG")] * 3 + [b"no image"], SMALL, batch_size=2, workers=1))


class Counting:
    """Counts how many images have been asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked, self.lock = count, 0, threading.Lock()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        with self.lock:
            self.asked += 1
        return Image.new("RGB", (8, 8))


def test_no_more_than_the_prefetched_batches_are_decoded_ahead_and_threads_end_with_the_loop() -> None:
    before = threading.active_count()
    sources = Counting(1000)
    batches = decode_batches(sources, SMALL, batch_size=10, workers=2, prefetch=2)  # type: ignore[arg-type]
    next(batches)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert sources.asked <= (2 + 2) * 10
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "values", [{"batch_size": 0}, {"batch_size": 1, "workers": -1}, {"batch_size": 1, "prefetch": 0},
               {"batch_size": 1, "on_error": "ignore"}]
)  # fmt: skip
def test_wrong_arguments_are_refused_at_once(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        decode_batches([], SMALL, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_opened_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, exif=exif)
    width, height = open_image(file).size
    assert image_size(file) == (height, width)
    file.write_bytes(file.read_bytes()[:-200])  # damage behind the header is not looked for
    assert image_size(file) == (height, width)


def test_the_size_of_what_is_no_image_or_too_large_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(DataError, match="max_pixels=34"):
        image_size(tmp_path / "a.png", max_pixels=34)
    with pytest.raises(DataError, match="not an image in a known format"):
        image_size(tmp_path / "b.png")
    with pytest.raises(DataError, match="does not exist"):
        image_size(tmp_path / "c.png")
