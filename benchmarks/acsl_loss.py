"""ACSL over 1,203 classes and 1,024 boxes beside plain sigmoid cross-entropy: python benchmarks/acsl_loss.py

A pass is loss and gradient of the logits. The plain side is torch's binary cross-entropy with targets written into
zeros, the quickest plain form. A quarter of the boxes are foreground; classes are in frequency groups as large as those
of LVIS v1 (337 rare, 461 common, 405 frequent), or all frequent, where most entries count. The sides take turns on one
thread; the ratio is that of the shortest processor times. Memory is the most that torch's allocator holds above what it
held before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bowerbird_detection.acsl import adaptive_class_suppression_loss
from common import peak_bytes, shortest, write_result

TIME_LIMIT, MEMORY_LIMIT = 1.5, 2.0
BOXES, FOREGROUND, LVIS = 1024, 256, (337, 461, 405)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    classes = sum(LVIS)
    logits = torch.randn(BOXES, classes + 1, generator=generator) * 2 - 3
    labels = torch.zeros(BOXES, dtype=torch.long)
    labels[torch.randperm(BOXES, generator=generator)[:FOREGROUND]] = torch.randint(
        1, classes + 1, (FOREGROUND,), generator=generator
    )
    groups = torch.cat([torch.full((count,), group) for group, count in enumerate(LVIS)])
    groups = torch.cat([torch.tensor([-1]), groups[torch.randperm(classes, generator=generator)]])

    def plain(z: Tensor) -> Tensor:
        targets = torch.zeros_like(z).scatter_(1, labels[:, None], 1.0)
        return F.binary_cross_entropy_with_logits(z, targets, reduction="sum") / len(z)

    def pass_of(loss: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        leaf = logits.clone().requires_grad_()
        return lambda: torch.autograd.grad(loss(leaf), leaf)

    sides = {
        "plain": pass_of(plain),
        "groups of LVIS": pass_of(lambda z: adaptive_class_suppression_loss(z, labels, class_frequency=groups)),
        "all frequent": pass_of(lambda z: adaptive_class_suppression_loss(z, labels)),
    }
    seconds = shortest(sides, options.rounds)
    held = {name: peak_bytes(side) for name, side in sides.items()}
    result = {
        "classes": classes,
        "boxes": BOXES,
        "limit_ratio": TIME_LIMIT,
        "limit_memory_ratio": MEMORY_LIMIT,
        "cases": {
            name: {
                "ratio": round(seconds[name] / seconds["plain"], 3),
                "ms": round(1e3 * seconds[name], 2),
                "plain_ms": round(1e3 * seconds["plain"], 2),
                "memory_ratio": round(held[name] / held["plain"], 3),
                "mb": round(held[name] / 2**20, 1),
                "plain_mb": round(held["plain"] / 2**20, 1),
            }
            for name in sides
            if name != "plain"
        },
    }
    write_result("acsl_loss", result, out=options.output)


if __name__ == "__main__":
    main()
