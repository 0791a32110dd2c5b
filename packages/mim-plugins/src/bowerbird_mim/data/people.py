"""``mim:composite-people``: "people" stacked from items of another data set, seen by several cameras.

A picture shows zones one above the other, each an item of the source (with Fashion-MNIST: something for the head, the
body and the feet); an identity is the items that it wears. Siblings differ in one zone only, so that fine parts decide.
A camera is a fixed change of brightness, contrast and place. Made to study methods for upright, aligned objects where
no pictures of people are at hand; nobody is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bowerbird.data.dataset import Dataset
from bowerbird.data.uris import open_dataset
from bowerbird.errors import DataError, InputError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from bowerbird.retrieval.metrics import Relevance

SPLITS = ("train", "query", "gallery")
_JITTER = 1  # pixels by which two shots of one camera differ in place, at most
_NOISE = 6.0  # standard deviation of a pixel's noise, grey values of 0..255


class PeopleConfig(BaseModel):
    """Settings of ``mim:composite-people``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(
        default="core:fashion-mnist",
        description="Data set of the items, NAME or NAME?key=value, with splits train and test and with labels; test "
        "dresses query and gallery.",
    )
    size: Annotated[tuple[int, int], Field(strict=False)] = Field(
        default=(48, 24), description="[height, width] of a picture in pixels."
    )
    zones: int = Field(default=3, ge=1, description="Items stacked in a picture.")
    train_identities: int = Field(default=2000, ge=2, description="Identities of the split train.")
    test_identities: int = Field(default=200, ge=2, description="Identities of the splits query and gallery.")
    siblings: int = Field(
        default=3, ge=0, description="How many identities are made of another one by changing one zone, in turns."
    )
    cameras: int = Field(default=4, ge=2, le=64, description="Number of cameras.")
    shots: int = Field(
        default=2, ge=2, description="Pictures of an identity by a camera; the first one is a query, the others not."
    )
    seed: int = Field(default=0, ge=0, description="Of identities, cameras and noise.")

    @model_validator(mode="after")
    def _zones_fit(self) -> Self:
        if min(self.size) < 1 or self.size[0] < self.zones:
            raise ValueError(f"size = {list(self.size)}: {self.zones} zones need as many rows of pixels, and a width")
        return self


class CompositePeople(Dataset):
    """Ids are ``train/00012-c1-s0``: identity, camera and shot. ``label`` is the identity, ``domain`` the camera.

    Attributes:
        identities, cameras, shots: int64 ``(N,)`` of every picture.
        zone_labels: int64 ``(N, zones)``: class of the item in every zone, from the top.
    """

    def __init__(self, config: PeopleConfig, split: str, source: Dataset) -> None:
        self.config, self.source = config, source
        part = "train" if split == "train" else "test"
        count = config.train_identities if part == "train" else config.test_identities
        self._seed = [config.seed, int(part == "test")]
        rng = np.random.default_rng(self._seed)
        self.worn = dressed(rng, count, config.zones, config.siblings, np.asarray(source.labels()))
        self.classes = [f"{part}-{identity:05d}" for identity in range(count)]
        self.domains = [f"camera-{camera}" for camera in range(config.cameras)]
        taken = {"train": range(config.shots), "query": range(1), "gallery": range(1, config.shots)}[split]
        grid = np.stack(np.meshgrid(np.arange(count), np.arange(config.cameras), taken, indexing="ij"), -1)
        self.identities, self.cameras, self.shots = grid.reshape(-1, 3).T.astype(np.int64)
        self.zone_labels = np.asarray(source.labels())[self.worn][self.identities]
        self._ids = [
            f"{part}/{identity:05d}-c{camera}-s{shot}"
            for identity, camera, shot in zip(self.identities, self.cameras, self.shots, strict=True)
        ]
        self._looks = [_Camera.of(config.seed, camera) for camera in range(config.cameras)]

    @classmethod
    def build(cls, config: PeopleConfig | None = None, split: str | None = None) -> Self:
        """The pictures of ``split``: ``train`` (default), ``query`` or ``gallery``; the latter two show one crowd.

        Raises ``UnknownNameError`` for another split, and ``DataError`` where the source cannot be read or is too
        small.
        """
        config, split = config or PeopleConfig(), split or "train"
        if split not in SPLITS:
            raise UnknownNameError(
                f"mim:composite-people has no split {split!r}; it has {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        source, _ = open_dataset(config.source, "train" if split == "train" else "test")
        if not source.classes:
            raise DataError(f"mim:composite-people: the items of {config.source!r} have no classes")
        return cls(config, split, source)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        identity, camera = int(self.identities[index]), int(self.cameras[index])
        rng = np.random.default_rng([*self._seed, identity, camera, int(self.shots[index])])
        return {
            "image": self._looks[camera].shot(self.dressed_canvas(identity), rng),
            "label": identity,
            "domain": camera,
            "item_id": self._ids[index],
        }

    def dressed_canvas(self, identity: int) -> Image.Image:
        """The identity as no camera sees it: grey, the zones in their places."""
        height, width = self.config.size
        bounds = np.linspace(0, height, self.config.zones + 1).round().astype(int)
        canvas = Image.new("L", (width, height))
        for item, top, bottom in zip(self.worn[identity], bounds, bounds[1:], strict=False):
            picture = self.source[int(item)]["image"].convert("L")
            canvas.paste(picture.resize((width, bottom - top), Image.Resampling.BILINEAR), (0, int(top)))
        return canvas

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        return self.identities.tolist()

    def domain_indices(self) -> Sequence[int]:
        return self.cameras.tolist()

    def metadata(self) -> Sequence[Mapping[str, Any]]:
        """``label`` (the identity) and ``camera``."""
        return [
            {"label": self.classes[identity], "camera": int(camera)}
            for identity, camera in zip(self.identities, self.cameras, strict=True)
        ]

    def relevance(self, gallery: Dataset) -> Relevance:
        """Same identity; the same identity seen by the same camera is ignored."""
        from bowerbird.retrieval.metrics import Relevance

        if not isinstance(gallery, CompositePeople):
            raise InputError(f"queries of mim:composite-people need its gallery, found {type(gallery).__name__}.")
        names = [np.asarray(dataset.classes)[dataset.identities] for dataset in (self, gallery)]
        return Relevance.from_labels(
            *names,
            query_ids=self._ids,
            gallery_ids=gallery.item_ids,
            query_cams=self.cameras,
            gallery_cams=gallery.cameras,
        )


def dressed(
    rng: np.random.Generator, count: int, zones: int, siblings: int, labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 ``(count, zones)``: positions of the items that every identity wears.

    Groups of ``1 + siblings``: the first is random; sibling i has another item of the same class in zone i mod zones,
    where the class has one.
    """
    if len(labels) < zones:
        raise DataError(f"the source has {len(labels)} items; {zones} zones need as many")
    worn = np.empty((count, zones), np.int64)
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    for identity in range(count):
        place = identity % (1 + siblings)
        if place == 0:
            worn[identity] = rng.choice(len(labels), zones, replace=False)
            continue
        worn[identity] = worn[identity - place]
        zone = (place - 1) % zones
        alike = members[labels[worn[identity, zone]]]
        others = alike[alike != worn[identity, zone]]
        worn[identity, zone] = rng.choice(others if len(others) else np.arange(len(labels)))
    return worn


class _Camera:
    """What a camera does to every picture: contrast, brightness (grey values) and place (pixels)."""

    def __init__(self, contrast: float, brightness: float, shift: tuple[int, int]) -> None:
        self.contrast, self.brightness, self.shift = contrast, brightness, shift

    @classmethod
    def of(cls, seed: int, camera: int) -> Self:
        rng = np.random.default_rng([seed, 7, camera])
        shift = (int(rng.integers(-2, 3)), int(rng.integers(-2, 3)))
        return cls(float(rng.uniform(0.6, 1.0)), float(rng.uniform(0, 40)), shift)

    def shot(self, canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
        """One picture, RGB: two of them differ by a pixel of place and by noise."""
        down, right = rng.integers(-_JITTER, _JITTER + 1, 2) + self.shift
        moved = Image.new("L", canvas.size)
        moved.paste(canvas, (int(right), int(down)))
        grey = np.asarray(moved, np.float32) * self.contrast + self.brightness
        grey += rng.normal(0, _NOISE, grey.shape).astype(np.float32)
        return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
