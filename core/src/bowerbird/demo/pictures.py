"""The pictures of the demo as files, as a user's folder would be, and galleries of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.data.dataset import Dataset
from bowerbird.encoders import LoadedEncoder
from bowerbird.gallery import Gallery
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry


@dataclass(frozen=True)
class Query:
    """What is searched for: id, the concept that is right, and where its picture lies."""

    id: str
    concept: str
    path: Path


def write_pictures(folder: Path, limit: int | None) -> tuple[list[Query], list[dict[str, Any]]]:
    """Emoji of concepts that no encoder of the demo has seen, as PNG files.

    Args:
        limit: Only so many of the concepts.

    Returns:
        Queries, and gallery items with id, path, concept and metadata.
    """
    registry = get_registry()
    record = registry.get("dataset", "emoji:styles")
    config = build_config(record, {}, "demo")

    def pictures(split: str) -> Iterator[tuple[str, Path, dict[str, str]]]:
        dataset: Dataset = registry.load(record).build(config, split)
        known = dataset.metadata()
        assert known is not None
        for position, item_id in enumerate(dataset.item_ids):
            if limit is not None and dataset.labels()[position] >= limit:
                continue
            path = folder / split / f"{item_id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset[position]["image"].save(path)
            yield item_id, path, dict(known[position])

    queries = [Query(item_id, _concept(item_id), path) for item_id, path, _ in pictures("unseen-query")]
    items = [
        {"id": item_id, "path": path, "concept": _concept(item_id), "metadata": values}
        for item_id, path, values in pictures("unseen-gallery")
    ]
    return queries, items


def _concept(item_id: str) -> str:
    return item_id.split("/", 1)[1]


def new_gallery(
    path: Path, encoder: LoadedEncoder, items: Sequence[Mapping[str, Any]], vectors: NDArray[np.float32]
) -> Gallery:
    """A gallery of all items with their ``vectors (N, D)``."""
    gallery = Gallery.create(path, encoder.space())
    gallery.add(
        [item["id"] for item in items],
        vectors,
        uris=[str(item["path"].resolve()) for item in items],
        metadata=[item["metadata"] for item in items],
    )
    return gallery
