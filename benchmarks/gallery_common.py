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


def paired(left: Callable[[], Any], right: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Process CPU milliseconds of two calls, taken in turns so that a busy machine hits both alike.

    ``ratio`` is the median of the ratios of neighbouring calls; ``ratio_low`` and ``ratio_high`` its quartiles.
    """
    left(), right()
    pairs = []
    for repeat in range(repeats):
        order = (left, right) if repeat % 2 == 0 else (right, left)
        taken = {}
        for call in order:
            start = time.process_time()
            call()
            taken[call] = time.process_time() - start
        pairs.append((taken[left] * 1e3, taken[right] * 1e3))
    ratios = [a / b for a, b in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ms": statistics.median(a for a, _ in pairs),
        "reference_ms": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": quartiles[0],
        "ratio_high": quartiles[2],
    }


def resident_mb(*, anonymous: bool = False) -> float:
    """Resident memory of this process now, in MB; ``anonymous`` leaves mapped files out."""
    key = "RssAnon" if anonymous else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")
