"""Maps between two spaces fitted on cached vectors: adapters, the forward and the reverse transform. Seconds.

OMP_WAIT_POLICY=PASSIVE python benchmarks/transforms.py --output benchmarks/results/transforms.json

Processor seconds are beside the seconds on the clock: they tell what a busy machine added.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird_compat.adapters import fit_adapter
from bowerbird_compat.bict import fit_forward_transform
from bowerbird_compat.online_backfilling import fit_reverse_transform
from common import write_result

LIMIT_S = 120  # per map, for a million pairs of 256 dimensions on two cores
CLASSES = 1000


def related(pairs: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old and new unit vectors of the same items and their classes: two noisy non-linear views of one content."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, 64), np.float32)
    to_old, to_new = (rng.standard_normal((64, dim), np.float32) / 8 for _ in range(2))
    old, new = np.empty((pairs, dim), np.float32), np.empty((pairs, dim), np.float32)
    labels = rng.integers(CLASSES, size=pairs)
    for start in range(0, pairs, 50_000):
        rows = slice(start, start + 50_000)
        content = centres[labels[rows]] + 0.7 * rng.standard_normal((len(labels[rows]), 64), np.float32)
        for out, by, noise in ((old, to_old, 0.8), (new, to_new, 0.3)):
            view = np.tanh(content @ by)
            view += noise * rng.standard_normal(view.shape, np.float32)
            out[rows] = view / np.linalg.norm(view, axis=1, keepdims=True)
    return old, new, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    old, new, labels = related(args.pairs, args.dim)
    ends = {"source_space": "new", "target_space": "old"}
    maps: dict[str, Callable[[], Any]] = {
        **{
            f"adapter {kind}": lambda kind=kind: fit_adapter(new, old, kind=kind, labels=labels, **ends)
            for kind in ("procrustes", "ridge", "low-rank", "mlp", "auto")
        },
        "reverse transform, labels": lambda: fit_reverse_transform(new, old, labels),
        "reverse transform, no labels": lambda: fit_reverse_transform(new, old),
        "forward transform, labels": lambda: fit_forward_transform(old, new, labels),
        "forward transform, no labels": lambda: fit_forward_transform(old, new),
    }
    seconds, cpu_seconds, verdicts = {}, {}, {}
    for name, fit in maps.items():
        start, cpu = time.perf_counter(), time.process_time()
        made = fit()
        seconds[name], cpu_seconds[name] = round(time.perf_counter() - start, 2), round(time.process_time() - cpu, 2)
        if hasattr(made, "evidence"):
            verdicts[name] = made.evidence["sentence"]
        print(name, seconds[name], cpu_seconds[name], flush=True)
    result = {
        "pairs": args.pairs, "dim": args.dim, "limit_s": LIMIT_S, "seconds": seconds, "cpu_seconds": cpu_seconds,
        "within_limit": all(value < LIMIT_S for value in seconds.values()), "verdicts": verdicts,
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }  # fmt: skip
    write_result("transforms", result, out=args.output)


if __name__ == "__main__":
    main()
