"""What the tests of sequences share: four spaces, encoders whose vectors are hashes of the item, maps between them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gallery_world import vector

from bowerbird.gallery import Gallery, Item, Space
from bowerbird.gallery.routing import match_width
from bowerbird.gallery.transform import VectorTransform

V1 = Space("v1" * 16, "tests:v1", 12)
V2 = Space("v2" * 16, "tests:v2", 20)
V3 = Space("v3" * 16, "tests:v3", 16)
V4 = Space("v4" * 16, "tests:v4", 12)
VERSIONS = (V1, V2, V3, V4)


def encode(items: Sequence[Item], space: Space) -> np.ndarray:
    return np.array([vector(item.id, space, item.content_hash or "") for item in items], np.float32)


def queries(spaces: Sequence[Space] = VERSIONS, count: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {space.fingerprint: rng.standard_normal((count, space.dim)).astype(np.float32) for space in VERSIONS}
    return {space.fingerprint: made[space.fingerprint] for space in spaces}


def a_map(source: Space, target: Space, seed: int = 0) -> VectorTransform:
    weight = np.random.default_rng(seed).normal(size=(target.dim, source.dim))
    return VectorTransform.linear(source.fingerprint, target.fingerprint, weight, method="tests:map")


def begin(gallery: Gallery, to: Space, **more) -> None:
    settings = {"strategy": "world:two-queries", "order_name": "core:random", "task_items": 4, "on_top": True, **more}
    gallery.store.begin_upgrade(to, **settings)


def work(gallery: Gallery, tasks: int, *, worker: str = "worker") -> list[str]:
    """Do so many tasks of the topmost upgrade; ids of the items that moved."""
    moved = []
    for _ in range(tasks):
        task = gallery.store.lease_task(worker)
        if task is None:
            break
        space = gallery.snapshot().write_space
        gallery.store.commit_task(task, task.nums, encode(task.items, space))
        moved += [item.id for item in task.items]
    return moved


def stored(gallery: Gallery) -> dict[str, dict[int, bytes]]:
    """Every vector that searches use, by space and item number."""
    return {
        part.space.fingerprint: {int(n): part.vectors_of(np.array([n])).tobytes() for n in part.nums}
        for part in gallery.snapshot().parts
    }


def brute_force(gallery: Gallery, by_space: dict[str, np.ndarray], k: int) -> list[list[str]]:
    """Ids of the nearest over all parts, each searched with the query of its space; newer parts first on a tie."""
    snapshot = gallery.snapshot()
    names = {item.num: item.id for item in gallery.items()}
    out = []
    for row in range(len(next(iter(by_space.values())))):
        keyed = []
        for age, part in enumerate(reversed(snapshot.parts)):
            if not part.count:
                continue
            query = by_space[part.space.fingerprint][row].astype(np.float64)
            query = (query / np.linalg.norm(query)).astype(np.float32).astype(np.float64)
            for num in part.nums.tolist():
                one = part.vectors_of(np.array([num]))[0].astype(np.float64)
                keyed.append((np.float32(max(0.0, 1 - (one * query).sum())), age, num))
        out.append([names[num] for *_, num in sorted(keyed)[:k]])
    return out


__all__ = ["V1", "V2", "V3", "V4", "VERSIONS", "a_map", "begin", "brute_force", "encode", "match_width", "queries",
           "stored", "vector", "work"]  # fmt: skip
