"""Regions of pictures: how they are named, what they cut out, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from bowerbird.data.dataset import Dataset
from bowerbird.data.images import open_image
from bowerbird.data.regions import region_around, region_uri, split_region
from bowerbird.data.uris import item_uris, open_dataset
from bowerbird.errors import DataError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.images import add_images
from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry
from bowerbird.upgrade import Upgrade

WIDTH, HEIGHT = 40, 30


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Every pixel tells where it is: red its column, green its row."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    path = tmp_path / "street.png"
    Image.fromarray(np.stack((x, y, 0 * x), axis=-1).astype(np.uint8)).save(path)
    return path


def corners(image: Image.Image) -> tuple[int, ...]:
    """First column and row, last column and row that were cut out."""
    pixels = np.asarray(image)
    return (*map(int, pixels[0, 0, :2]), *map(int, pixels[-1, -1, :2]))


@pytest.mark.parametrize("unit", ["", "pixel:", "pixel%3A"])
def test_a_region_in_pixels_is_cut_out(picture: Path, unit: str) -> None:
    image = open_image(f"{picture}#xywh={unit}10,5,20,8")
    assert image.size == (20, 8)
    assert corners(image) == (10, 5, 29, 12)
    assert corners(open_image(Path(f"{picture}#xywh={unit}10,5,20,8"))) == (10, 5, 29, 12)


def test_a_region_in_percent_is_of_both_sides(picture: Path) -> None:
    assert corners(open_image(f"{picture}#xywh=percent:25,50,50,50")) == (10, 15, 29, 29)
    # 7 % of 40 is 2.8 and 17 % is 6.8; of 30 it is 2.1 and 5.1: every pixel that is touched
    assert corners(open_image(f"{picture}#xywh=percent:7,7,10,10")) == (2, 2, 6, 5)


def test_what_reaches_over_the_right_and_lower_edge_is_cut_off(picture: Path) -> None:
    assert corners(open_image(f"{picture}#xywh=35,25,100,100")) == (35, 25, 39, 29)
    assert corners(open_image(f"{picture}#xywh=percent:90,90,50,50")) == (36, 27, 39, 29)


def test_regions_are_of_the_upright_picture(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(20 * 10 * 3, dtype=np.uint8).reshape(10, 20, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    whole = np.asarray(open_image(tmp_path / "turned.png"))
    assert whole.shape == (20, 10, 3)
    assert np.array_equal(np.asarray(open_image(f"{tmp_path}/turned.png#xywh=1,12,9,8")), whole[12:20, 1:10])


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        ("40,0,5,5", r"street\.png.*lies outside the picture, which has 40 x 30"),
        ("0,30,5,5", "lies outside"),
        ("percent:100,0,5,5", "lies outside"),
        ("4,4,0,5", "no area"),
        ("percent:4,4,5,0", "no area"),
        ("4,4,5", "is no region; expected #xywh=x,y,w,h"),
        ("-4,4,5,5", "is no region"),
        ("1.5,4,5,5", "whole pixels"),
        ("inches:4,4,5,5", "is no region"),
        ("", "is no region"),
    ],
)
def test_what_is_no_region_of_the_picture_is_refused(picture: Path, fragment: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_image(f"{picture}#xywh={fragment}")


def test_a_file_whose_name_holds_a_fragment_is_that_file(tmp_path: Path) -> None:
    sizes = {"a#1.png": (7, 6), "b#xywh=0,0,2,2": (9, 8), "c#xywh=": (5, 4)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name, format="PNG")
        assert open_image(tmp_path / name).size == size
        assert open_image(f"{tmp_path / name}#xywh=1,1,3,2").size == (3, 2)


def test_a_missing_picture_is_named_with_its_region(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png#xywh=1,1,2,2.*does not exist"):
        open_image(tmp_path / "gone.png#xywh=1,1,2,2")


@given(
    st.tuples(*[st.floats(-20, 60)] * 4).map(
        lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
    )
)
def test_the_region_around_a_box_is_every_pixel_that_it_touches(box: tuple[float, float, float, float]) -> None:
    region = region_around(box, width=WIDTH, height=HEIGHT)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]  # pixel (x, y) spans x to x + 1
    touched = (x + 1 > box[0]) & (x < box[2]) & (y + 1 > box[1]) & (y < box[3])
    if region is None:
        assert not touched.any()
        return
    left, top, right, bottom = region.box(WIDTH, HEIGHT)
    assert left >= 0 and top >= 0 and right <= WIDTH and bottom <= HEIGHT
    covered = np.zeros_like(touched)
    covered[top:bottom, left:right] = True
    if box[2] - box[0] > 0 and box[3] - box[1] > 0:
        assert np.array_equal(covered, touched)
    assert split_region(region_uri("some picture.jpg", region)) == ("some picture.jpg", region)


# ------------------------------------------------------------------------------------------------ of data sets

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_datasets() -> list[DatasetRecord]:
    here = {"target": f"{__name__}:Rows", "config": f"{__name__}:RowsConfig"}
    return [DatasetRecord(name="rows:rows", **here, summary="Rows.", provides=("image",))]


class Ground(BaseModel):
    grey: int = 0
    name: str = ""


class RowsConfig(BaseModel):
    marks: tuple[int, ...] = ()
    ground: Ground = Ground()
    text: str = ""


class Rows(Dataset):
    """``blue`` is the sum of the marks and the grey of the ground."""

    def __init__(self, config: RowsConfig) -> None:
        self.blue = sum(config.marks) + config.ground.grey + len(config.text + config.ground.name)

    @classmethod
    def build(cls, config: RowsConfig, split: str | None) -> Rows:
        return cls(config)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, object]:
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[:, :, 0], pixels[:, :, 1] = np.arange(WIDTH), np.arange(HEIGHT)[:, None]
        pixels[:, :, 2] = self.blue
        return {"image": Image.fromarray(pixels), "item_id": self.item_ids[index]}

    @property
    def item_ids(self) -> list[str]:
        return ["plain", "odd#xywh=0,0,1,1"]


@pytest.fixture
def addresses() -> Iterator[list[str]]:
    get_registry().register_module("rows", sys.modules[__name__])
    dataset, address = open_dataset("rows:rows")
    yield item_uris(address, dataset.item_ids)
    get_registry().unregister("rows")


def test_an_item_of_a_data_set_has_regions_too(addresses: list[str]) -> None:
    plain, odd = addresses
    assert corners(open_image(f"{plain}#xywh=3,4,5,6")) == (3, 4, 7, 9)
    assert open_image(odd).size == (WIDTH, HEIGHT)  # the fragment belongs to its id
    assert corners(open_image(f"{odd}#xywh=percent:50,50,50,50")) == (20, 15, 39, 29)
    with pytest.raises(DataError, match="outside the picture"):
        open_image(f"{plain}#xywh=40,0,1,1")


@pytest.mark.usefixtures("addresses")
@pytest.mark.parametrize(
    "settings", ['marks=[3,4]&ground={grey = 20, name = "a & b"}&text=x', "marks=[]", 'text="12"', 'text="[3]"']
)
def test_an_address_keeps_every_setting_of_its_data_set(settings: str) -> None:
    dataset, address = open_dataset(f"rows:rows?{settings.replace('a & b', 'a %26 b')}")
    again, same = open_dataset(address.removeprefix("dataset:"))
    assert same == address
    blue = np.asarray(open_image(f"{address}#plain#xywh=1,1,1,1"))[0, 0, 2]
    assert blue == again.blue == dataset.blue


# ------------------------------------------------------------------------------------------------ in galleries


class FirstPixel:
    """Encodes a picture as its first pixel; stands in for a network."""

    def __init__(self, name: str, scale: tuple[float, ...]) -> None:
        self.name, self.scale, self.fingerprint, self.dim = name, np.array(scale), name * 8, len(scale)

    def space(self) -> Space:
        return Space(self.fingerprint, self.name, self.dim)

    def encode_batches(self, items: Any, **_: object) -> Iterator[tuple[Any, Any]]:
        for position in range(len(items)):
            colour = np.asarray(open_image(items[position]), np.float32)[0, 0]
            row = (np.resize(colour, self.dim) + 1) * self.scale
            yield np.array([position]), (row / np.linalg.norm(row)).astype(np.float32)[None]

    def encode(self, items: Any, **_: object) -> Any:
        return np.concatenate([rows for _, rows in self.encode_batches(items)])


OLD, NEW = FirstPixel("oldpixel", (1, 1, 1)), FirstPixel("newpixel", (3, 1, 2, 1))


def test_every_region_of_a_picture_is_an_item_with_its_own_content(
    picture: Path, addresses: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [f"{base}#xywh={x},2,4,4" for base in ("street.png", addresses[0]) for x in (0, 10)]
    monkeypatch.chdir(tmp_path)
    with Gallery.create(tmp_path / "gallery", OLD.space()) as gallery:
        add_images(gallery, OLD, [*sources, "street.png"], ids=[*sources, "street.png"])
        items = [gallery.get(name) for name in [*sources, "street.png"]]
        assert len({item.content_hash for item in items}) == 5
        assert [item.uri for item in items[:2]] == [f"{picture.resolve()}#xywh={x},2,4,4" for x in (0, 10)]
        assert [item.uri for item in items[2:4]] == sources[2:]
        again = add_images(gallery, OLD, sources, ids=sources, existing="update")
        assert (again.unchanged, again.replaced) == (4, 0)
        Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(picture)
        assert add_images(gallery, OLD, sources, ids=sources, existing="update").replaced == 2


def test_an_upgrade_encodes_regions_again_by_their_addresses(
    picture: Path, addresses: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [f"{base}#xywh={x},{y},4,4" for base in (str(picture), addresses[1]) for x in (0, 10, 20) for y in (0, 9)]
    with Gallery.create(tmp_path / "gallery", OLD.space()) as gallery:
        add_images(gallery, OLD, sources, ids=sources)
    monkeypatch.chdir(tmp_path.parent)
    with Gallery.open(tmp_path / "gallery") as gallery:
        upgrade = Upgrade(gallery, NEW)
        upgrade.run(strategy="core:full")
        upgrade.finish()
        assert gallery.snapshot().serving == NEW.fingerprint
        np.testing.assert_allclose(gallery.vectors_of(sources), NEW.encode(sources), atol=1e-6)
