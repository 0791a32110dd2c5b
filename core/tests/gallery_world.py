"""What the gallery tests share: two spaces, and an encoder whose vectors are a hash of the item."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bowerbird.gallery import Item, Space

OLD = Space("old" * 8, "tests:old", 12)
NEW = Space("new" * 8, "tests:new", 20)


def vector(name: str, space: Space, content: str = "") -> np.ndarray:
    """The vector of an item in a space: depends on nothing else, on no machine and in no order."""
    digest = hashlib.sha256(f"{space.fingerprint} {name} {content}".encode()).digest()
    row = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(space.dim).astype(np.float32)
    return row / np.linalg.norm(row)


def vectors(names: Sequence[str], space: Space) -> np.ndarray:
    return np.array([vector(name, space) for name in names], np.float32).reshape(len(names), space.dim)


def encode(items: Sequence[Item], space: Space) -> np.ndarray:
    return np.array([vector(item.id, space, item.content_hash or "") for item in items], np.float32)


def queries(count: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """The same queries in both spaces (unrelated vectors, as of two unrelated encoders)."""
    rng = np.random.default_rng(seed)
    return {space.fingerprint: rng.standard_normal((count, space.dim)).astype(np.float32) for space in (OLD, NEW)}
