"""One way to call an encoder, whatever it is: a loaded one, or a function.

Shapes: N items, Q queries, D width of the encoder's space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import BowerbirdError, DataError, InputError, SpaceError, UpgradeError

if TYPE_CHECKING:
    from bowerbird.gallery.space import Space


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
        encoder: A ``LoadedEncoder`` (anything with ``encode(images)``, ``fingerprint`` and ``dim``): items are opened by
            their ``uri``. Or a function of a list of items that returns ``(N, D)``; then ``space`` is required, because a
            function has no identity of its own.
        space: Of the vectors.
        batch_size: Images per call of a loaded encoder.
    """

    def __init__(self, encoder: Any, *, space: Space | None = None, batch_size: int = 64) -> None:
        self.is_loaded = hasattr(encoder, "encode") and hasattr(encoder, "fingerprint")
        if not self.is_loaded and not callable(encoder):
            raise InputError(
                f"an encoder must be loaded (bowerbird.load_encoder) or a function of a list of items, got {type(encoder).__name__}"
            )
        if space is None and not self.is_loaded:
            raise InputError("a function that encodes has no identity: pass space=Space(fingerprint, encoder, dim) with it")
        own = encoder.space() if self.is_loaded else space
        if space is not None and own.fingerprint != space.fingerprint:
            raise SpaceError(
                f"the encoder {own.encoder!r} makes vectors of space {own.fingerprint[:12]}, "
                f"but space {space.fingerprint[:12]} ({space.encoder}) was asked for; give the encoder of that space"
            )
        self.encoder = encoder
        self.space: Space = space or own
        self.batch_size = batch_size

    def load(self, item: Any) -> Any:
        """What the encoder takes for one item: its decoded image, or the item itself for a function.

        Raises:
            DataError: If the image cannot be read; names the file.
        """
        if not self.is_loaded:
            return item
        if not item.uri:
            raise DataError(f"item {item.id!r} has no uri: its image cannot be fetched")
        from bowerbird.data.images import open_image

        return open_image(item.uri)

    def load_all(self, items: Sequence[Any]) -> tuple[list[Any], dict[int, str]]:
        """``(inputs, failures)``; ``inputs[i]`` is ``None`` where item ``i`` failed."""
        inputs: list[Any] = []
        failures: dict[int, str] = {}
        for position, item in enumerate(items):
            try:
                inputs.append(self.load(item))
            except (BowerbirdError, OSError) as exc:
                inputs.append(None)
                failures[position] = str(exc)
        return inputs, failures

    def encode_loaded(self, inputs: Sequence[Any], failures: Mapping[int, str] | None = None) -> Encoded:
        """Encode what ``load_all`` returned. A batch that an input spoils is encoded again one by one."""
        failed = dict(failures or {})
        positions = [i for i in range(len(inputs)) if i not in failed]
        chosen = [inputs[i] for i in positions]
        if not chosen:
            return Encoded(np.empty(0, np.int64), np.empty((0, self.space.dim), np.float32), failed)
        try:
            vectors = self._call(chosen)
        except (DataError, OSError) as exc:
            if len(chosen) == 1:
                failed[positions[0]] = str(exc)
                return self.encode_loaded(inputs, failed)
            parts = []
            for position in positions:
                only = self.encode_loaded([inputs[position]])
                failed.update({position: reason for reason in only.failures.values()})
                parts.append(only.vectors)
            kept = [position for position in positions if position not in failed]
            return Encoded(np.array(kept, np.int64), np.concatenate(parts), failed)
        good = np.isfinite(vectors).all(axis=1) & (np.linalg.norm(vectors, axis=1) > 0)
        for row in np.flatnonzero(~good):
            failed[positions[row]] = "the encoder returned NaN, infinity or a zero vector"
        return Encoded(np.array(positions, np.int64)[good], unit(vectors[good]), failed)

    def encode_items(self, items: Sequence[Any]) -> Encoded:
        return self.encode_loaded(*self.load_all(items))

    def encode_queries(self, images: Sequence[Any]) -> np.ndarray:
        """``(Q, D)`` unit vectors of query images (paths, bytes or ``PIL.Image``); a function gets the list as it is."""
        return unit(self._call(list(images)))

    def _call(self, inputs: list[Any]) -> np.ndarray:
        if self.is_loaded:
            raw = self.encoder.encode(inputs, batch_size=self.batch_size)
        else:
            raw = self.encoder(inputs)
        vectors = np.asarray(raw, np.float32)
        if vectors.shape != (len(inputs), self.space.dim):
            raise SpaceError(
                f"the encoder of space {self.space.encoder!r} returned shape {vectors.shape} for {len(inputs)} items; "
                f"its space has width {self.space.dim}, so that {(len(inputs), self.space.dim)} was expected"
            )
        return vectors


def check_canary(encoder: ItemEncoder, space: Space, items: Callable[[Sequence[str]], Sequence[Any]]) -> float | None:
    """Encode the canary items of ``space`` again and compare.

    Args:
        items: Returns the gallery's items for ids; those that no longer exist are left out.

    Returns:
        The smallest cosine between a stored canary vector and its new encoding, or ``None`` where the space has no canary
        or no item of it can be read any more.

    Raises:
        UpgradeError: If the encoder claims to be ``space`` and is not.
    """
    raise UpgradeError("not yet")


def unit(vectors: Any) -> np.ndarray:
    """float32 rows of length 1; rows that already are (within 1e-6) stay bit-identical."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(np.abs(norms - 1) <= 1e-6, vectors, vectors / np.where(norms > 0, norms, 1)).astype(np.float32)
