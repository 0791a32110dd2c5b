"""The sheets: whole, not blank, small enough for a wheel, decoded late and once."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from bowerbird.errors import DataError
from bowerbird_emoji import sheets
from bowerbird_emoji.config import STYLES
from bowerbird_emoji.styles import EmojiStyles

DATA = Path(str(files("bowerbird_emoji"))) / "data"


@pytest.mark.parametrize("style", STYLES)
def test_every_concept_has_a_picture_in_every_style(style: str) -> None:
    pixels = sheets.tiles(style)
    assert (pixels.shape, pixels.dtype) == ((896, 64, 64, 3), np.uint8)
    drawn = (pixels < 250).any(-1).sum((1, 2))
    assert drawn.min() >= 25  # the smallest is a small square


@pytest.mark.parametrize("style", STYLES)
def test_what_was_transparent_is_white(style: str) -> None:
    borders = sheets.tiles(style)[:, [0, 0, -1, -1], [0, -1, 0, -1]]  # the four corners
    assert (borders == 255).all(-1).mean() > 0.97


@pytest.mark.parametrize("style", STYLES)
def test_no_two_concepts_have_one_picture_but_for_the_pairs_that_are_documented(style: str) -> None:
    pixels = sheets.tiles(style)
    names: dict[bytes, list[str]] = {}
    for concept in sheets.concepts():
        names.setdefault(pixels[concept.tile].tobytes(), []).append(concept.name)
    twins = [group for group in names.values() if len(group) > 1]
    documented = {
        "fluent-emoji": [],
        "fluent-emoji-flat": [["black-medium-square", "white-square-button"]],
    }
    assert twins == documented.get(style, [["up-button", "upwards-button"]])


def test_left_and_right_are_mirrored_where_the_source_says_so() -> None:
    at = {c.name: c.tile for c in sheets.concepts()}
    pixels = sheets.tiles("fluent-emoji-flat")
    left, right = (pixels[at[f"backhand-index-pointing-{side}"]] for side in ("left", "right"))
    assert np.array_equal(left, right[:, ::-1])
    assert not np.array_equal(left, right)


def test_a_red_apple_is_red() -> None:
    (apple,) = [c.tile for c in sheets.concepts() if c.name == "red-apple"]
    for style in STYLES:
        red, green, blue = sheets.tiles(style)[apple][24:48, 20:44].reshape(-1, 3).mean(0)
        assert red > 1.5 * green
        assert red > 1.5 * blue


def test_pixels_are_read_only_and_decoded_once() -> None:
    pixels = sheets.tiles("noto")
    assert pixels is sheets.tiles("noto")
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0, 0, 0] = 0


def test_a_damaged_sheet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in DATA.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = bytearray((tmp_path / "noto.webp").read_bytes())
    broken[len(broken) // 2] ^= 1
    (tmp_path / "noto.webp").write_bytes(broken)
    monkeypatch.setattr(sheets, "_DATA", tmp_path)
    with pytest.raises(DataError, match=r"noto\.webp.*damaged"):
        sheets.tiles.__wrapped__("noto")


def test_the_data_fit_a_small_wheel() -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 3_000_000  # WebP does not shrink further in a zip


def test_the_notice_names_every_source_with_its_version() -> None:
    notice = (Path(__file__).parents[1] / "NOTICE").read_text()
    for record in sheets.sources()["styles"].values():
        assert f"{record['package']} {record['version']}" in notice


def test_listing_ids_and_labels_decodes_no_picture() -> None:
    sheets.tiles.cache_clear()
    dataset = EmojiStyles.build()
    assert len(dataset.item_ids) == len(dataset.labels()) == 4480
    dataset.metadata()
    assert sheets.tiles.cache_info().misses == 0
    dataset[0], dataset[1]
    assert sheets.tiles.cache_info().misses == 1  # one style, once


def test_the_plugin_and_its_settings_import_nothing_heavy() -> None:
    program = """
import sys
import bowerbird_emoji.plugin
assert not {"numpy", "torch", "PIL", "pydantic"} & set(sys.modules)
import bowerbird_emoji.config
assert not {"numpy", "torch", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
