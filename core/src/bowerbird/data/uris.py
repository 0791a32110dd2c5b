"""``dataset:`` addresses: an item of an installed data set, where a gallery otherwise keeps the path of a file.

    dataset:emoji:styles?split=unseen-gallery#noto/red-apple

A gallery that was filled from a data set can so fetch its images again, for a canary or an upgrade.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlencode

from bowerbird.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

    from bowerbird.data.dataset import Dataset

SCHEME = "dataset:"


def is_dataset_uri(source: object) -> bool:
    return isinstance(source, str) and source.startswith(SCHEME)


def dataset_uri(name: str, split: str | None, item_id: str) -> str:
    """The address of an item of the data set ``name`` with its default settings."""
    query = f"?{urlencode({'split': split})}" if split else ""
    return f"{SCHEME}{name}{query}#{quote(item_id)}"


def open_dataset_item(uri: str) -> Image.Image:
    """The image at an address.

    Raises:
        UnknownNameError: There is no such data set or split (its plugin is not installed).
        DataError: The data set has no such item.
    """
    address, _, item_id = uri.removeprefix(SCHEME).partition("#")
    name, _, query = address.partition("?")
    dataset, positions = _opened(name, parse_qs(query).get("split", [None])[0])
    position = positions.get(unquote(item_id))
    if position is None:
        raise DataError(f"{uri!r}: the data set {name!r} has no item {unquote(item_id)!r}")
    image: Image.Image = dataset[position]["image"]
    return image


@functools.lru_cache(maxsize=8)
def _opened(name: str, split: str | None) -> tuple[Dataset, Mapping[str, int]]:
    from bowerbird.recipe import build_config
    from bowerbird.registry import get_registry

    registry = get_registry()
    record = registry.get("dataset", name)
    dataset: Dataset = registry.load(record).build(build_config(record, {}, where=f"dataset {record.name!r}"), split)
    return dataset, {item_id: position for position, item_id in enumerate(dataset.item_ids)}
