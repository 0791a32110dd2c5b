"""Worlds in which an upgrade takes seconds: features of real pictures, split into training, queries and gallery.

digits          scikit-learn's 8 x 8 digits, shifted by up to one pixel and with noise, as they are too easy otherwise
fashion-mnist   28 x 28 pixels; training items from the training files, queries and gallery from the test files
emoji           features of a frozen EfficientNet-Lite; queries and gallery are concepts that no model is trained on

T training items, Q queries, N gallery items, F features, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird.registry import get_registry
from bowerbird.retrieval.metrics import Relevance

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class World:
    """One draw of a data set.

    Attributes:
        name: Of the data set.
        train, train_labels: ``(T, F)`` and ``(T,)``; labels are positions in ``classes``.
        old_only: bool ``(T,)``: the training items that an old model may have where a data set has its own old part.
        queries, query_labels, gallery, gallery_labels: ``(Q, F)``, ``(Q,)``, ``(N, F)``, ``(N,)``.
        classes: Names of the training classes. Those of queries and gallery may be others.
    """

    name: str
    train: Array
    train_labels: Labels
    old_only: NDArray[np.bool_]
    queries: Array
    query_labels: Labels
    gallery: Array
    gallery_labels: Labels
    classes: tuple[str, ...]

    @property
    def inputs(self) -> int:
        return int(self.train.shape[1])

    def relevance(self) -> Relevance:
        return Relevance.from_labels(self.query_labels, self.gallery_labels)


def make_world(
    dataset: str,
    seed: int,
    *,
    train: int | None = None,
    queries: int = 300,
    gallery: int = 500,
    noise: float = 0.15,
    trunk: str = "lite0",
    cache: Path | None = None,
) -> World:
    """Draw a world.

    Args:
        dataset: ``digits``, ``fashion-mnist`` or ``emoji``, or the full name of the data set.
        seed: Of the split and of the disturbances.
        train: Number of training items at most; by default all (2,000 of Fashion-MNIST).
        queries, gallery: Numbers of items. For emoji ``queries`` is the number of unseen concepts (448 at most), each
            of which is in the gallery in the four other styles.
        noise: digits only: standard deviation of what is added to pixels in 0..1.
        trunk: emoji only: ``lite0``, ``lite1`` or ``lite2``.
        cache: emoji only: folder where features are kept; by default ``~/.cache/bowerbird``, or $BOWERBIRD_CACHE.

    Raises:
        UnknownNameError: There is no such world.
        InputError: Sizes that the data set does not have.
        DataError: The data set is not there.
    """
    short = dataset.partition(":")[2] or dataset
    short = {"styles": "emoji"}.get(short, short)
    if short not in WORLDS:
        raise UnknownNameError(
            f"no benchmark world for data set {dataset!r}; there are core:digits, core:fashion-mnist and emoji:styles."
            f"{did_you_mean(short, WORLDS)}"
        )
    if min(queries, gallery) < 1 or (train is not None and train < 2):
        raise InputError(f"a world of {train} training items, {queries} queries and {gallery} gallery items is empty")
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {"train": train, "queries": queries, "gallery": gallery}
    if short == "digits":
        settings["noise"] = noise
    if short == "emoji":
        settings |= {"trunk": trunk, "cache": cache}
    return WORLDS[short](rng, **settings)


def _digits(rng: np.random.Generator, *, train: int | None, queries: int, gallery: int, noise: float) -> World:
    data = _dataset("core:digits", "all")
    labels = np.asarray(data.labels(), np.int64)
    images = data.images / np.float32(255)
    shifts = rng.integers(-1, 2, size=(len(images), 2))
    images = np.stack([np.roll(image, tuple(shift), axis=(0, 1)) for image, shift in zip(images, shifts, strict=True)])
    flat = (images + noise * rng.standard_normal(images.shape)).reshape(len(images), -1).astype(np.float32)
    order = rng.permutation(len(flat))
    rest = len(flat) - queries - gallery
    if rest < 2:
        raise InputError(f"core:digits has {len(flat)} items; {queries} queries and {gallery} gallery items leave none")
    q, g, t = np.split(order, [queries, queries + gallery])
    t = t[:train]
    free = np.ones(len(t), bool)
    return World("digits", flat[t], labels[t], free, flat[q], labels[q], flat[g], labels[g], tuple(data.classes))


def _fashion_mnist(rng: np.random.Generator, *, train: int | None, queries: int, gallery: int) -> World:
    learn, test = _dataset("core:fashion-mnist", "train"), _dataset("core:fashion-mnist", "test")

    def part(data: Any, rows: NDArray[np.int64]) -> tuple[Array, Labels]:
        pixels = (data.images[rows] / np.float32(255)).reshape(len(rows), -1)
        return pixels, np.asarray(data.labels(), np.int64)[rows]

    if queries + gallery > len(test) or (train or 0) > len(learn):
        raise InputError(f"core:fashion-mnist has {len(learn)} training and {len(test)} test items; fewer are needed")
    x, y = part(learn, rng.permutation(len(learn))[: train or 2000])
    order = rng.permutation(len(test))
    q, ql = part(test, order[:queries])
    g, gl = part(test, order[queries : queries + gallery])
    return World("fashion-mnist", x, y, np.ones(len(x), bool), q, ql, g, gl, tuple(learn.classes))


def _emoji(
    rng: np.random.Generator, *, train: int | None, queries: int, gallery: int, trunk: str, cache: Path | None
) -> World:
    ids, vectors = _emoji_features(trunk, cache)
    row = {item: i for i, item in enumerate(ids)}

    def part(split: str) -> tuple[Any, NDArray[np.int64], Labels]:
        data = _dataset("emoji:styles", split)
        return data, np.array([row[item] for item in data.item_ids]), np.asarray(data.labels(), np.int64)

    seen, rows, labels = part("new-train")
    old_ids = set(_dataset("emoji:styles", "old-train").item_ids)
    old_only = np.array([item in old_ids for item in seen.item_ids])
    if train is not None and train < len(rows):
        kept = np.sort(rng.permutation(len(rows))[:train])
        rows, labels, old_only = rows[kept], labels[kept], old_only[kept]
    _, query_rows, query_labels = part("unseen-query")
    _, gallery_rows, gallery_labels = part("unseen-gallery")
    concepts = np.unique(query_labels)
    if queries > len(concepts):
        raise InputError(f"emoji:styles has {len(concepts)} unseen concepts; {queries} queries were asked for")
    chosen = rng.permutation(concepts)[:queries]
    q, g = np.isin(query_labels, chosen), np.isin(gallery_labels, chosen)
    return World(
        "emoji", vectors[rows], labels, old_only, vectors[query_rows[q]], query_labels[q],
        vectors[gallery_rows[g]], gallery_labels[g], tuple(seen.classes),
    )  # fmt: skip


WORLDS: dict[str, Callable[..., World]] = {"digits": _digits, "fashion-mnist": _fashion_mnist, "emoji": _emoji}


def _dataset(name: str, split: str) -> Any:
    registry = get_registry()
    record = registry.get("dataset", name)
    config = registry.load_config(record)
    return registry.load(record).build(None if config is None else config(), split)


def _emoji_features(trunk: str, cache: Path | None) -> tuple[list[str], Array]:
    """Ids and ``(4480, 1280)`` features of all pictures, mean square 1; made once (about a minute) and kept."""
    folder = cache or Path(os.environ.get("BOWERBIRD_CACHE", "~/.cache/bowerbird")).expanduser()
    file = folder / f"emoji-styles-{trunk}-96.npz"
    data = _dataset("emoji:styles", "all")
    ids = list(data.item_ids)
    if file.is_file():
        with np.load(file, allow_pickle=False) as kept:
            if kept["ids"].tolist() == ids:
                return ids, kept["vectors"]
    from bowerbird.encoders import load_encoder

    encoder = load_encoder(f"core:efficientnet-lite?model={trunk}&image_size=96")
    unit = encoder.encode_dataset(data)
    vectors = (unit * np.sqrt(unit.shape[1])).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, ids=np.array(ids), vectors=vectors)
    part.replace(file)
    return ids, vectors
