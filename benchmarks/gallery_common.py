"""What the gallery benchmarks share: arguments, data, and measurement in pairs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Space


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--dim", type=int, default=256, help="width of the vectors")
    result.add_argument("--output", type=Path, help="write the JSON here as well")
    result.add_argument(
        "--folder", type=Path, help="where the galleries are made (a local disk); default: a temporary folder"
    )
    return result


def space(name: str, dim: int) -> Space:
    return Space(fingerprint=(name * 64)[:64], encoder=f"benchmark {name}", dim=dim)


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def clustered(count: int, dim: int, seed: int | list[int], centres: int, *, fading: float = 1.0) -> np.ndarray:
    """Unit rows around random centres, with noise as long as a centre whose directions fade like
    ``1 / j ** fading``.

    Embeddings of images have neighbourhoods of few dimensions; noise that is equal in all directions has none that an
    approximate index could find, and is harder than any real gallery.
    """
    rng = np.random.default_rng(7)
    middle = rng.standard_normal((centres, dim), np.float32)
    lengths = np.arange(1, dim + 1, dtype=np.float32) ** -fading
    lengths *= np.sqrt(dim / np.sum(lengths**2))
    directions = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32) * lengths[:, None]
    rng = np.random.default_rng(seed)
    rows = middle[rng.integers(centres, size=count)] + rng.standard_normal((count, dim), np.float32) @ directions
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def paired(left: Callable[[], Any], right: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Process CPU milliseconds of two calls, taken in turns so that a busy machine hits both alike.

    ``ratio`` is the median of the ratios of neighbouring calls; ``ratio_low`` and ``ratio_high`` its quartiles.
    ``ratio_of_fastest`` compares the fastest of each, ``ratio_wall`` wall times as ``ratio`` does.
    """
    left(), right()
    pairs, walls = [], []
    for repeat in range(repeats):
        order = (left, right) if repeat % 2 == 0 else (right, left)
        taken = {}
        for call in order:
            start = time.perf_counter(), time.process_time()
            call()
            taken[call] = 1e3 * (time.process_time() - start[1]), 1e3 * (time.perf_counter() - start[0])
        pairs.append((taken[left][0], taken[right][0]))
        walls.append((taken[left][1], taken[right][1]))
    ratios = [a / b for a, b in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ms": statistics.median(a for a, _ in pairs),
        "reference_ms": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": quartiles[0],
        "ratio_high": quartiles[2],
        "ratio_of_fastest": min(a for a, _ in pairs) / min(b for _, b in pairs),
        "wall_ms": statistics.median(a for a, _ in walls),
        "reference_wall_ms": statistics.median(b for _, b in walls),
        "ratio_wall": statistics.median(a / b for a, b in walls),
    }


def resident_mb(*, anonymous: bool = False) -> float:
    """Resident memory of this process now, in MB; ``anonymous`` leaves mapped files out."""
    key = "RssAnon" if anonymous else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")
