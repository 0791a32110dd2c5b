"""A training step of every method of mim-plugins beside the same step in plain torch: time and peak memory.

python benchmarks/mim_steps.py --output benchmarks/results/mim_steps.json
python benchmarks/mim_steps.py mae emae              only these

A step is forward, loss and backward on one batch (and the moving average, where the method has one), with equal weights
on both sides; a pair whose losses differ is refused. Sizes: a ViT of 64 x 3 blocks x 4 heads on 32 pixels, batch 64;
ViT-Tiny on 224 pixels, batch 8. The two sides alternate in one process on one thread; the ratio is that of the shortest
processor times, which others on the machine disturb least. Peak memory is what torch's allocator holds above what it
held before the step, by its own record of allocations: the same on every run.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import peak_bytes, write_result

HERE = Path(__file__).parent
TIME_LIMIT, MEMORY_LIMIT = 1.05, 1.10
SECONDS = {"small": 12.0, "tiny": 40.0}  # of measuring per pair
LEAST_ROUNDS, MOST_ROUNDS = 8, 60
Step = Callable[[], Tensor]


def known() -> list[str]:
    files = sorted(path.stem for path in (HERE / "mim_plain").glob("*.py") if not path.stem.startswith("_"))
    return [stem.replace("_", "-") for stem in files if stem != "vit"]


def best_times(steps: tuple[Step, Step], seconds: float) -> list[float]:
    """The shortest processor time of each side, in seconds; the sides alternate, and take turns in being first."""
    times: list[list[float]] = [[], []]
    end = time.monotonic() + seconds
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() > end:
            break
        for side in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            steps[side]()
            times[side].append(time.process_time() - start)
    return [min(values) for values in times]


def compare(slug: str, size: str, make: Callable[[str], tuple[Step, Step]]) -> dict[str, Any]:
    torch.manual_seed(0)
    steps = make(size)
    first = [float(step()) for step in steps]
    if abs(first[0] - first[1]) > 1e-4 * abs(first[1]):
        raise SystemExit(f"{slug}, {size}: ours gives the loss {first[0]}, plain torch {first[1]}: not the same step")
    steps[0](), steps[1]()
    memory = [peak_bytes(step) for step in steps]
    best = best_times(steps, SECONDS[size])
    return {
        "loss": first[0],
        "ours_ms": round(1000 * best[0], 2),
        "plain_ms": round(1000 * best[1], 2),
        "ratio": round(best[0] / best[1], 4),
        "ours_mb": round(memory[0] / 2**20, 2),
        "plain_mb": round(memory[1] / 2**20, 2),
        "memory_ratio": round(memory[0] / memory[1], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slugs", nargs="*", choices=[*known(), []], help="default: all")
    parser.add_argument("--size", choices=sorted(SECONDS), help="default: every size of a method")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods: dict[str, dict[str, Any]] = {}
    for slug in options.slugs or known():
        name = slug.replace("-", "_")
        module = importlib.import_module(f"mim_plain.{name}")
        for size in getattr(module, "SIZES", ("small", "tiny")):
            if options.size in (None, size):
                methods[f"{slug}, {size}"] = compare(slug, size, getattr(module, f"plain_{name}"))
                print(f"{slug}, {size}", methods[f"{slug}, {size}"], flush=True)
    within = all(m["ratio"] <= TIME_LIMIT and m["memory_ratio"] <= MEMORY_LIMIT for m in methods.values())
    write_result(
        "mim_steps",
        {
            "limit_ratio": TIME_LIMIT,
            "limit_memory_ratio": MEMORY_LIMIT,
            "within_limits": within,
            "methods": methods,
        },
        out=options.output,
    )


if __name__ == "__main__":
    main()
