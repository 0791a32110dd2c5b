"""The canary: encode stored items again and compare. It catches a swapped model of the same name and size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item
    from bowerbird.upgrade.encoding import ItemEncoder


def check_canary(gallery: Gallery, encoder: ItemEncoder) -> float | None:
    """Whether ``encoder`` reproduces what the gallery has stored in its space.

    Returns:
        The median cosine over up to 64 items; ``None`` where the gallery has no readable item in that space.

    Raises:
        SpaceError: If it does not.
    """

    def encode(items: Sequence[Item]) -> np.ndarray:
        rows = np.full((len(items), encoder.space.dim), np.nan, np.float32)
        result = encoder.items(items)
        rows[result.positions] = result.vectors
        return rows

    if gallery.snapshot().part_of(encoder.space.fingerprint) is None:
        return None
    return gallery.check_canary(encode, fingerprint=encoder.space.fingerprint)
