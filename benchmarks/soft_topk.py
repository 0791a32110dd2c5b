"""Soft top-k over 25 million weights beside the authors' formula in plain torch: python benchmarks/soft_topk.py

One pass is what a training step needs: the hard threshold, the soft mask with the default stopping rule, and the
gradient of the values for a given gradient of the mask. Both sides work on the same values and must give the same
numbers. They alternate in one process on one thread; the ratio is that of the shortest processor times. Memory is the
largest resident memory during a pass above that before it, each side in a process of its own; values and the incoming
gradient are there before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bowerbird_sparsity.soft_topk import hard_threshold, soft_topk
from common import write_result

TIME_LIMIT = MEMORY_LIMIT = 1.0
DENSITY, BETA, MAX_ITERS, TOL = 0.1, 20.0, 100, 0.01
Side = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(values: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and gradient by bowerbird_sparsity."""
    budget = DENSITY * values.numel()
    leaf = values.detach().requires_grad_()
    threshold = hard_threshold(values, budget)
    mask = soft_topk(leaf, budget, beta=BETA, max_iters=MAX_ITERS, tol=TOL, threshold=threshold)
    (gradient,) = torch.autograd.grad(mask, leaf, upstream)
    return mask.detach(), gradient


@torch.no_grad()
def plain(values: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the paper's equations: sort, Sinkhorn on both dual variables, implicit gradient. Costs are 1."""
    budget = DENSITY * values.numel()
    ordered, _ = values.sort(descending=True)
    spent = torch.ones_like(ordered).cumsum(0, dtype=torch.float64)
    threshold = ordered[torch.searchsorted(spent, torch.tensor(budget, dtype=torch.float64))]
    del ordered, spent, _
    z = BETA * (values - threshold)
    mu = torch.zeros(())
    nu = -F.softplus(z + mu)
    mask = (z + mu + nu).exp()
    objective = (mask * values).sum()
    for _step in range(MAX_ITERS):
        mu = torch.tensor(budget).log() - torch.logsumexp(z + nu, 0)
        nu = -F.softplus(z + mu)
        mask = (z + mu + nu).exp()
        now = (mask * values).sum()
        if abs(now - objective) <= TOL * abs(objective):
            break
        objective = now
    slope = mask * (1 - mask)
    price = (upstream * slope).sum() / (budget - (mask * mask).sum())
    return mask, BETA * slope * (upstream - price)


SIDES: dict[str, Side] = {"ours": ours, "plain": plain}


def inputs(count: int) -> tuple[Tensor, Tensor]:
    """Absolute weights as of a trained network, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator).mul_(0.05).abs_(), torch.randn(count, generator=generator)


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (the largest so far) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def peak(side: str, count: int) -> int:
    """Bytes that a pass holds at most, above what was held before it; to be called in a fresh process."""
    SIDES[side](*inputs(1000))  # libraries load
    given = inputs(count)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest so far
    before = resident("VmRSS")
    SIDES[side](*given)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=25_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", choices=list(SIDES), help="print the memory of one side, and nothing else")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak_of:
        print(json.dumps(peak(options.peak_of, options.count)))
        return
    given = inputs(options.count)
    first = {name: side(*given) for name, side in SIDES.items()}
    for a, b in zip(first["ours"], first["plain"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    del first
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(options.rounds):
        for name in list(SIDES)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            SIDES[name](*given)
            times[name].append(time.process_time() - start)
    best = {name: min(values) for name, values in times.items()}
    memory = {}
    for name in SIDES:
        command = [sys.executable, __file__, "--peak-of", name, "--count", str(options.count)]
        memory[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    write_result(
        "soft_topk",
        {
            "count": options.count,
            "limit_ratio": TIME_LIMIT,
            "limit_memory_ratio": MEMORY_LIMIT,
            "ours_s": round(best["ours"], 3),
            "plain_s": round(best["plain"], 3),
            "ratio": round(best["ours"] / best["plain"], 3),
            "ours_mb": round(memory["ours"] / 2**20, 1),
            "plain_mb": round(memory["plain"] / 2**20, 1),
            "memory_ratio": round(memory["ours"] / memory["plain"], 3),
        },
        out=options.output,
    )


if __name__ == "__main__":
    main()
