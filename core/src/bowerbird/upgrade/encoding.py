"""One way to call an encoder, whatever it is: a loaded one, or a function.

Shapes: N items, Q queries, D width of the encoder's space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import BowerbirdError, DataError, InputError, SpaceError
from bowerbird.retrieval.index import unit_rows

if TYPE_CHECKING:
    from bowerbird.gallery.space import Item, Space
    from bowerbird.gallery.transform import VectorTransform


@dataclass(frozen=True)
class Encoded:
    """What became of a list of items: the vectors of those that worked, and why the others did not.

    Attributes:
        positions: int64 ``(M,)``, positions in the list, ascending.
        vectors: float32 ``(M, D)``, unit rows.
        failures: Position -> reason.
    """

    positions: np.ndarray
    vectors: np.ndarray
    failures: Mapping[int, str]


class ItemEncoder:
    """Encodes gallery items, and keeps one bad item from taking the others of its batch with it.

    Args:
        encoder: A ``LoadedEncoder``, or anything with ``encode(images, batch_size=, progress=)``, ``fingerprint``
            and ``space()``: items are opened by their ``uri``. Or a function of a list of items that returns
            ``(N, D)``; then ``space`` is required, because a function has no identity of its own.
        space: Of the vectors.
        batch_size: Items per call.

    Raises:
        SpaceError: If the encoder is not the one of ``space``.
        InputError: If it is no encoder, or a function without a space.
    """

    def __init__(self, encoder: Any, *, space: Space | None = None, batch_size: int = 64) -> None:
        self.reads_images = hasattr(encoder, "encode") and hasattr(encoder, "fingerprint")
        if not self.reads_images and not callable(encoder):
            raise InputError(
                "an encoder must be loaded (bowerbird.load_encoder) or be a function of a list of items; "
                f"got {type(encoder).__name__}"
            )
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        if self.reads_images:
            own: Space = encoder.space()
        elif space is not None:
            own = space
        else:
            raise InputError("a function that encodes has no identity; pass space=Space(fingerprint, encoder, dim) too")
        if space is not None and own.fingerprint != space.fingerprint:
            raise SpaceError(
                f"this is a foreign encoder: it makes vectors of space {own}, and that of space {space} is needed"
            )
        self.encoder = encoder
        self.space = own
        self.batch_size = batch_size

    def items(self, items: Sequence[Item], progress: Callable[[int], None] | None = None) -> Encoded:
        """Encode gallery items; ``progress`` is called with the number of items of every batch that is done.

        Items whose image cannot be read, or whose vector is not finite or is zero, are reported in ``failures``.
        An error of the encoder itself (a foreign width, no memory) is raised.
        """
        good = list(range(len(items)))
        failures: dict[int, str] = {}
        if self.reads_images:
            for position in [p for p in good if not items[p].uri]:
                failures[position] = f"item {items[position].id!r} has no uri, so that its image cannot be fetched"
            good = [p for p in good if p not in failures]
        try:
            vectors = self._encode([items[p] for p in good], progress)
        except (DataError, OSError):
            # Somewhere in the batch is a bad one. Only now is every item tried alone: the usual case costs nothing.
            rows: list[np.ndarray] = []
            for position in list(good):
                try:
                    rows.append(self._encode([items[position]], progress))
                except (BowerbirdError, OSError) as exc:
                    if isinstance(exc, SpaceError):
                        raise
                    failures[position] = str(exc)
            good = [p for p in good if p not in failures]
            vectors = np.concatenate(rows) if rows else np.empty((0, self.space.dim), np.float32)
        usable = np.isfinite(vectors).all(axis=1) & (np.abs(vectors).max(axis=1, initial=0) > 0)
        for row in np.flatnonzero(~usable):
            failures[good[row]] = "the encoder returned NaN, infinity or a zero vector"
        return Encoded(np.array(good, np.int64)[usable], unit_rows(vectors[usable]), failures)

    def images(self, images: Sequence[Any]) -> np.ndarray:
        """``(Q, D)`` unit vectors of query images (paths, bytes, ``PIL.Image``); a function gets the list as it is."""
        if self.reads_images:
            return unit_rows(self._checked(self.encoder.encode(list(images), batch_size=self.batch_size), len(images)))
        return unit_rows(self._checked(self.encoder(list(images)), len(images)))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """``(Q, D)`` unit vectors of sentences. Raises ``InputError`` where the encoder takes no texts."""
        if not hasattr(self.encoder, "encode_texts"):
            raise InputError(f"the encoder of space {self.space} takes no texts; search with images, or with vectors")
        vectors = self.encoder.encode_texts(texts, batch_size=self.batch_size)
        return unit_rows(self._checked(vectors, len(texts)))

    def transform_to(self, space: Space) -> VectorTransform | None:
        """The map into an older space that was trained together with the encoder; ``None`` where there is none."""
        find = getattr(self.encoder, "transform_to", None)
        return None if find is None else find(space.fingerprint)

    def _encode(self, items: Sequence[Item], progress: Callable[[int], None] | None) -> np.ndarray:
        if not items:
            return np.empty((0, self.space.dim), np.float32)
        if self.reads_images:
            sources = [item.uri for item in items]
            vectors = self.encoder.encode(sources, batch_size=self.batch_size, progress=progress)
            return self._checked(vectors, len(items))
        parts = []
        for start in range(0, len(items), self.batch_size):
            part = list(items[start : start + self.batch_size])
            parts.append(self._checked(self.encoder(part), len(part)))
            if progress is not None:
                progress(len(part))
        return np.concatenate(parts)

    def _checked(self, raw: Any, count: int) -> np.ndarray:
        vectors = np.asarray(raw, np.float32)
        if vectors.shape != (count, self.space.dim):
            raise SpaceError(
                f"the encoder of space {self.space} returned an array of shape {vectors.shape} for {count} items; "
                f"expected {(count, self.space.dim)}"
            )
        return vectors
