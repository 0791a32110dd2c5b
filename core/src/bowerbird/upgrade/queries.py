"""The labelled queries with which an upgrade is planned and watched.

Q queries, D width of a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError
from bowerbird.gallery.vectors import unit_vectors
from bowerbird.upgrade.watch import WatchSet

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Space
    from bowerbird.upgrade.encoding import ItemEncoder


@dataclass(frozen=True)
class QuerySet:
    """Queries, as images, as items of the gallery, or as vectors that somebody else made.

    Attributes:
        labels: Q labels; ``None`` where there are none.
        images: Q paths, bytes or ``PIL.Image``.
        ids: Q ids of gallery items that serve as queries; their old vectors are the stored ones, and an item is not
            counted as its own answer.
        old: ``(Q, D)`` ready vectors of the old space.
        new: ``(Q, D)`` ready vectors of the new space.
    """

    labels: Sequence[Any] | None
    images: Sequence[Any] | None = None
    ids: Sequence[str] | None = None
    old: Any = None
    new: Any = None

    def __post_init__(self) -> None:
        sizes = {
            name: len(value)
            for name in ("labels", "images", "ids", "old", "new")
            if (value := getattr(self, name)) is not None
        }
        if len(set(sizes.values())) > 1:
            raise InputError(f"a query set needs one entry per query everywhere; got {sizes}")
        if not sizes or next(iter(sizes.values())) == 0:
            raise InputError("a query set needs at least one query, got none")
        if self.images is None and self.ids is None and (self.old is None or self.new is None):
            raise InputError("a query set needs images, ids of gallery items, or vectors of both spaces")

    @classmethod
    def from_gallery(cls, gallery: Gallery, label_key: str | None, *, count: int = 300, seed: int = 0) -> QuerySet:
        """Items of the gallery as queries, drawn with ``seed``; with a label where ``label_key`` is given.

        Raises:
            InputError: If no item has the metadata key.
        """
        chosen = [item for item in gallery.items() if label_key is None or item.metadata.get(label_key) is not None]
        if not chosen:
            raise InputError(no_label(gallery, label_key))
        rows = np.sort(np.random.default_rng(seed).permutation(len(chosen))[:count])
        ids = [chosen[row].id for row in rows]
        labels = None if label_key is None else [str(chosen[row].metadata[label_key]) for row in rows]
        return cls(labels, ids=ids)

    def encode(
        self, gallery: Gallery, old: Space, new: ItemEncoder | None, old_encoder: ItemEncoder | None = None
    ) -> QuerySet:
        """The same queries with the vectors of both spaces; those whose image cannot be read are left out.

        Raises:
            InputError: If an encoder is needed that was not given.
        """
        old_rows = self.old
        if old_rows is None and self.ids is not None:
            old_rows = gallery.vectors_of(list(self.ids), old.fingerprint)
        if old_rows is None:
            if old_encoder is None:
                raise InputError(
                    f"queries that are no items of the gallery must be encoded by the old encoder too, {old}; give it, "
                    "or use items of the gallery as queries (label_key)"
                )
            old_rows = old_encoder.images(list(self.images or []))
        if self.new is not None:
            return QuerySet(self.labels, self.images, self.ids, np.asarray(old_rows), np.asarray(self.new))
        if new is None:
            raise InputError("the queries have no vectors of the new space, and no new encoder was given")
        if self.images is not None:
            return QuerySet(self.labels, self.images, self.ids, np.asarray(old_rows), new.images(list(self.images)))
        items = [item for item in gallery.get_many(list(self.ids or [])) if item is not None]
        result = new.items(items)
        if not len(result.positions):
            reason = next(iter(result.failures.values()), "none is left in the gallery")
            raise InputError(f"none of the {len(items)} query items can be encoded: {reason}")
        rows = result.positions.tolist()
        return QuerySet(
            None if self.labels is None else [self.labels[row] for row in rows],
            None,
            [items[row].id for row in rows],
            np.asarray(old_rows)[rows],
            result.vectors,
        )


def watch_set(
    gallery: Gallery,
    queries: QuerySet,
    new: ItemEncoder,
    *,
    old_encoder: ItemEncoder | None = None,
    label_key: str | None = None,
) -> WatchSet:
    """The vectors of ``queries`` in both spaces, to be frozen when the upgrade begins (``begin(watch_set=...)``)."""
    space = gallery.snapshot().write_space
    encoded = queries.encode(gallery, space, new, old_encoder)
    old = unit_vectors(encoded.old, space.dim)
    return WatchSet(old, encoded.new, encoded.labels, label_key, encoded.ids)


def no_label(gallery: Gallery, label_key: str | None) -> str:
    keys = sorted({key for item, _ in zip(gallery.items(), range(1000), strict=False) for key in item.metadata})
    return f"no item of {gallery.path} has the metadata key {label_key!r}; keys found: {', '.join(keys) or 'none'}"
