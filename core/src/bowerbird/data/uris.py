"""``dataset:`` addresses: an item of an installed data set, where a gallery otherwise keeps the path of a file.

    dataset:emoji:styles?split=unseen-gallery#noto/red-apple
    dataset:core:market-1501?root=/data/market&split=gallery#bounding_box_test/0002_c1s1_000451_03.jpg

A gallery that was filled from a data set can so fetch its images again, for a canary or an upgrade. Between ``?`` and
``#`` are the settings of the data set, and its split.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from bowerbird.errors import DataError, InputError

if TYPE_CHECKING:
    from PIL import Image

    from bowerbird.data.dataset import Dataset

SCHEME = "dataset:"


def is_dataset_uri(source: object) -> bool:
    return isinstance(source, str) and source.startswith(SCHEME)


def parse_dataset(ref: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of ``NAME?key=value&key=value``; values are read as in ``--set``.

    Raises ``InputError`` for a part that is no setting.
    """
    from bowerbird.recipe import parse_value

    name, _, query = ref.partition("?")
    settings: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise InputError(f"data set {ref!r}: {part!r} is no setting; expected key=value")
        settings[unquote(key)] = parse_value(unquote(value))
    return name, settings


def open_dataset(ref: str, split: str | None = None, **more: Any) -> tuple[Dataset, str]:
    """The data set ``NAME`` or ``NAME?key=value`` (with ``more`` settings), and the beginning of its items' addresses.

    Raises:
        UnknownNameError: There is no such data set or split (its plugin is not installed).
        RecipeError: A setting is not accepted.
        DataError: Its files cannot be read.
    """
    from bowerbird.recipe import build_config
    from bowerbird.registry import get_registry

    name, settings = parse_dataset(ref)
    settings |= more
    registry = get_registry()
    record = registry.get("dataset", name)
    config = build_config(record, settings, where=f"data set {ref!r}")
    dataset: Dataset = registry.load(record).build(config, split)
    if config is not None:  # a path from the current folder means another one elsewhere
        plain = config.model_dump(mode="json")
        settings = {key: _absolute(getattr(config, key), plain[key]) for key in settings}
    if split is not None:
        settings["split"] = split
    query = "&".join(f"{quote(key)}={quote(_text(value), safe='/:')}" for key, value in settings.items())
    return dataset, f"{SCHEME}{record.name}{'?' if query else ''}{query}"


def item_uris(address: str, item_ids: Iterable[str]) -> list[str]:
    """The addresses of items of the data set that ``open_dataset`` opened."""
    return [f"{address}#{quote(item_id)}" for item_id in item_ids]


def open_dataset_item(uri: str) -> Image.Image:
    """The image at an address.

    Raises:
        UnknownNameError: There is no such data set or split (its plugin is not installed).
        DataError: The data set has no such item, its files are no longer there, or its items are no images.
    """
    item = dataset_item(uri)
    if "image" not in item:
        raise DataError(f"{uri!r}: the item is no image; it has {', '.join(sorted(item))}")
    image: Image.Image = item["image"]
    return image


def dataset_item(uri: str) -> dict[str, Any]:
    """The item at an address, as its data set gives it. Raises as ``open_dataset_item``."""
    address, _, item_id = uri.partition("#")
    dataset, positions = _opened(address)
    position = positions.get(unquote(item_id))
    if position is None:
        raise DataError(f"{uri!r}: the data set {address.removeprefix(SCHEME)!r} has no item {unquote(item_id)!r}")
    return dataset[position]


@functools.lru_cache(maxsize=8)
def _opened(address: str) -> tuple[Dataset, Mapping[str, int]]:
    name, _, query = address.removeprefix(SCHEME).partition("?")
    parts = [part for part in query.split("&") if part]
    split = next((unquote(part.partition("=")[2]) for part in parts if part.startswith("split=")), None)
    rest = "&".join(part for part in parts if not part.startswith("split="))
    dataset, _ = open_dataset(f"{name}?{rest}", split)
    return dataset, {item_id: position for position, item_id in enumerate(dataset.item_ids)}


def _absolute(value: Any, plain: Any) -> Any:
    return value.expanduser().resolve() if isinstance(value, Path) else plain


def _text(value: Any) -> str:
    """What ``parse_value`` reads as ``value``. Paths and ordinary texts stay bare."""
    from bowerbird.recipe import parse_value, toml_value

    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, str) and parse_value(value) == value else toml_value(value)
