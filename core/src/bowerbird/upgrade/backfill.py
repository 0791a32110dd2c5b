"""The plan of a backfill: every item of a gallery in the order in which it will be moved.

N items, D width of the old vectors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError, PluginError
from bowerbird.registry import get_registry
from bowerbird.upgrade.orders import class_means

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item

ITEMS_AT_ONCE = 50_000  # whose ids or metadata are in hand at once


def backfill_plan(
    gallery: Gallery,
    order: str,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    centers: Any = None,
    label_key: str | None = None,
) -> np.ndarray:
    """int64 ``(N,)`` item numbers of the gallery in backfill order.

    Raises:
        PluginError: If the order does not return a permutation.
    """
    parts = [part for part in gallery.snapshot().parts if part.count]
    if centers is not None and len(parts) > 1:
        raise InputError("an upgrade on top of another has old vectors of several spaces; give label_key, not centers")
    registry = get_registry()
    target = registry.load(registry.get("retriever", order, role="order"))
    plan = [np.empty(0, np.int64)]
    for part in parts:  # the oldest space first: those items gain most
        nums = np.sort(part.nums)  # the plan must not depend on where rows happen to lie
        around, more, rows = centers, {}, None
        if getattr(target, "needs_vectors", True):
            # Not a copy of a whole gallery, where its rows lie in this order and precision anyway.
            as_stored = gallery.storage.dtype == "float32" and np.array_equal(nums, part.nums)
            rows = part.vectors() if as_stored else part.vectors_of(nums)
            labels = None if label_key is None else _labels(gallery, nums, label_key)
            if labels is not None and getattr(target, "needs_labels", False):
                more["labels"] = labels
            if labels is not None and centers is None:
                around = class_means(rows, labels)
        if getattr(target, "needs_names", False):
            more["names"] = [item.id for item in _items(gallery, nums)]
        plan.append(nums[order_positions(order, nums, rows, settings=settings, seed=seed, centers=around, **more)])
    return np.concatenate(plan)


def order_positions(
    order: str,
    ids: np.ndarray,
    old_vectors: np.ndarray | None,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    centers: Any = None,
    **more: Any,
) -> np.ndarray:
    """Positions 0..N-1 in the order of the record ``order``, checked to be a permutation.

    ``old_vectors`` may be ``None`` for an order that says it needs none. ``more``: what else it says it needs,
    ``labels`` or ``names`` (see ``bowerbird.upgrade.orders``).
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed is {seed!r}; it must be a whole number of at least 0")
    registry = get_registry()
    record = registry.get("retriever", order, role="order")
    if registry.load_config(record) is None and settings:
        raise InputError(f"order {record.name!r} has no settings; got {', '.join(settings)}")
    options: dict[str, Any] = {}
    if settings:
        from bowerbird.recipe import build_config

        config = build_config(record, dict(settings), where=f"settings of order {record.name}")
        options = config.model_dump() if config is not None else {}
    positions = np.asarray(registry.load(record)(ids, old_vectors, seed=seed, centers=centers, **more, **options))
    if positions.shape != (len(ids),) or not np.array_equal(np.sort(positions), np.arange(len(ids))):
        raise PluginError(
            f"order {record.name!r} ({record.target}) returned no permutation of 0..{len(ids) - 1}: {positions.shape}"
        )
    return positions.astype(np.int64)


def _items(gallery: Gallery, nums: np.ndarray) -> Iterator[Item]:
    for start in range(0, len(nums), ITEMS_AT_ONCE):
        found = gallery.store.items(nums[start : start + ITEMS_AT_ONCE])
        yield from (found[num] for num in nums[start : start + ITEMS_AT_ONCE].tolist())


def _labels(gallery: Gallery, nums: np.ndarray, label_key: str) -> list[Any]:
    found = (item.metadata.get(label_key) for item in _items(gallery, nums))
    # One object per class, not one per item.
    labels = [sys.intern(label) if isinstance(label, str) else label for label in found]
    if all(label is None for label in labels):
        raise InputError(
            f"no item of {gallery.path} has the metadata key {label_key!r}, from which classes were to be read"
        )
    return labels
