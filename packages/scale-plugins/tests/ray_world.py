"""An encoder for workers of a Ray: a hash of the item's id, and a process that dies once where a test wants it."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Space
from bowerbird.upgrade import ItemEncoder

OLD = Space("old" * 8, "tests:old", 8)
NEW = Space("new" * 8, "tests:new", 12)


def vectors(names: Sequence[str], space: Space) -> np.ndarray:
    seeds = [hashlib.sha256(f"{space.fingerprint} {name}".encode()).digest()[:8] for name in names]
    rows = [np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(space.dim) for seed in seeds]
    out = np.array(rows, np.float32)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def load(settings: dict[str, Any], gallery: Any, space: Space, index: int) -> ItemEncoder:
    def encode(items: Sequence[Any]) -> np.ndarray:
        time.sleep(settings.get("delay", 0.0) * len(items))
        died = settings.get("die_once")
        if died and any(item.id == settings["die_on"] for item in items) and not Path(died).exists():
            Path(died).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return vectors([item.id for item in items], space)

    return ItemEncoder(encode, space=space, batch_size=10)
