"""What Spartan adds to a training step of ResNet-18: python benchmarks/spartan_step.py

A step is forward, cross-entropy, backward, SGD and, on Spartan's side, new masks: 90 % of the weights are dropped, the
sharpness is that of the middle of a training, and every mask is soft. Two copies of one network take turns on one
thread; the ratio is that of the shortest processor times, which others on the machine disturb least. What is added does
not depend on the batch: with more pictures per step the ratio falls.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from bowerbird_sparsity.spartan import Sparsifier, SparsityConfig
from common import shortest, write_result

LIMIT = 1.25
TOTAL_STEPS, AT_STEP = 1000, 500
PATTERNS = {"single weights": (1, 1), "blocks of 8 x 8": (8, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10)
    images = torch.randn(options.batch, 3, options.size, options.size)
    labels = torch.arange(options.batch) % 10

    def make(block: tuple[int, int] | None) -> Callable[[], None]:
        model = copy.deepcopy(network)
        sparsifier = None if block is None else sparsified(model, block)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if sparsifier is not None and sparsifier.step().solver_iterations == 0:
                raise SystemExit("no masks were solved: this is not a step of Spartan's")

        return step

    steps = {"dense": make(None), **{name: make(block) for name, block in PATTERNS.items()}}
    best = {name: 1000 * seconds for name, seconds in shortest(steps, options.rounds).items()}
    write_result(
        "spartan_step",
        {
            "limit_ratio": LIMIT,
            "network": f"ResNet-18, {options.batch} pictures of {options.size} pixels",
            "patterns": {
                name: {
                    "ratio": round(best[name] / best["dense"], 3),
                    "ms": round(best[name], 1),
                    "reference_ms": round(best["dense"], 1),
                }
                for name in PATTERNS
            },
        },
        out=options.output,
    )


def sparsified(model: nn.Module, block: tuple[int, int]) -> Sparsifier:
    """In the middle of a training: all convolutions and linear layers that the blocks divide."""
    layers = None if block == (1, 1) else ("layer*",)
    config = SparsityConfig(target_density=0.1, block_size=block, layers=layers)
    sparsifier = Sparsifier(model, config, TOTAL_STEPS)
    sparsifier.load_state_dict({**sparsifier.state_dict(), "step": torch.tensor(AT_STEP)})
    return sparsifier


if __name__ == "__main__":
    main()
