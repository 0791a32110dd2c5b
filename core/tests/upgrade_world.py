"""A small world for the tests of upgrades: items of a few classes, an old encoder that sees them badly, a new one that
sees them well, both without a neural network. An item's number is its only content; its image is a PNG of one colour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Gallery, Space
from bowerbird.hookspecs import hookimpl
from bowerbird.records import RetrieverRecord
from bowerbird.upgrade import ItemEncoder

CLASSES = 12
LATENT = 24


def label_of(number: int) -> str:
    return f"class-{number % CLASSES}"


def number_of(item_id: str) -> int:
    return int(item_id.rpartition("-")[2])


def item_id(number: int) -> str:
    return f"item-{number:05d}"


class FakeEncoder:
    """Deterministic: a fixed projection of the item's class plus noise that depends on encoder and item only."""

    def __init__(self, name: str, dim: int, noise: float, *, flavour: str | None = None) -> None:
        self.name = name
        self.dim = dim
        self.noise = noise
        self.flavour = flavour or name  # an encoder that lies has the fingerprint of another
        self.fingerprint = hashlib.sha256(f"fake {name} {dim}".encode()).hexdigest()
        self.calls = 0
        rng = np.random.default_rng(7)
        self._centers = rng.normal(size=(CLASSES, LATENT))
        seed = int.from_bytes(hashlib.sha256(self.flavour.encode()).digest()[:4], "little")
        self._seed = seed
        self._project = np.random.default_rng(seed).normal(size=(LATENT, dim))

    def space(self) -> Space:
        return Space(self.fingerprint, f"fake:{self.name}", self.dim)

    def vectors(self, numbers: Sequence[int]) -> np.ndarray:
        """float32 ``(N, dim)`` unit rows."""
        latent = np.stack(
            [
                self._centers[n % CLASSES] + self.noise * np.random.default_rng([self._seed, n]).normal(size=LATENT)
                for n in numbers
            ]
        )
        # Row by row: a matrix product may round differently for another number of rows.
        out = np.stack([row @ self._project for row in latent]).astype(np.float32)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def __call__(self, items: Sequence[Any]) -> np.ndarray:
        self.calls += 1
        return self.vectors([number_of(item.id) for item in items])

    def encode(
        self, images: Sequence[Any], *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        from bowerbird.data.images import open_image

        self.calls += 1
        colours = [open_image(image).getpixel((0, 0)) for image in images]
        if progress is not None:
            progress(len(images))
        return self.vectors([red * 256 + green for red, green, _ in colours])


def old_encoder() -> FakeEncoder:
    return FakeEncoder("old", 16, 2.0)


def new_encoder() -> FakeEncoder:
    return FakeEncoder("new", 24, 1.0)


def write_image(folder: Path, number: int) -> str:
    from PIL import Image

    path = folder / f"{item_id(number)}.png"
    Image.new("RGB", (2, 2), (number // 256, number % 256, 0)).save(path)
    return str(path)


class OldQueriesOnOldPart:
    """The strategy that a plugin would bring: the old part is searched with the old encoder's queries."""

    needs_old_encoder = True
    merger = "core:distance"

    def check(self, gallery: Any, old: Space, new: Space) -> None:
        return None

    def old_part_queries(self, queries: Any, old: Space, new: Space) -> np.ndarray:
        return queries[old.fingerprint]


BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_retrievers() -> list[RetrieverRecord]:
    return [
        RetrieverRecord(
            name="world:two-queries", role="upgrade", target="upgrade_world:OldQueriesOnOldPart", summary="Old and new."
        )
    ]


def make_gallery(path: Path, count: int = 300, *, images: Path | None = None) -> Gallery:
    """A gallery of ``count`` items under the old encoder, with their class in the metadata."""
    encoder = old_encoder()
    gallery = Gallery.create(path, encoder.space())
    gallery.add(
        [item_id(n) for n in range(count)],
        encoder.vectors(range(count)),
        uris=None if images is None else [write_image(images, n) for n in range(count)],
        metadata=[{"label": label_of(n), "even": n % 2 == 0} for n in range(count)],
    )
    return gallery


def by_item(encoder: FakeEncoder, **settings: Any) -> ItemEncoder:
    """The encoder as a function of items: no images are read."""
    return ItemEncoder(encoder.__call__, space=encoder.space(), **settings)


def query_vectors(first: int = 10_000, count: int = 40) -> dict[str, np.ndarray]:
    numbers = range(first, first + count)
    return {e.fingerprint: e.vectors(numbers) for e in (old_encoder(), new_encoder())}


def stored(gallery: Gallery) -> dict[str, dict[int, bytes]]:
    """Every vector that searches use, by space and item number."""
    return {
        part.space.fingerprint: {int(n): part.vectors_of(np.array([n])).tobytes() for n in part.nums}
        for part in gallery.snapshot().parts
        if part.count
    }
