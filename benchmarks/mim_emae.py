"""A step of EMAE with four parts beside four steps of MAE: the same number of visible sets, one pass over the data.

python benchmarks/mim_emae.py --output benchmarks/results/mim_emae.json

A step makes its batch (crop, resize, flip, numbers), goes forward, backward, and moves AdamW. Both start from equal
weights on 224 pixels in patches of 16; ViT-Tiny with a decoder of 192 x 4 blocks, ViT-Small with 384 x 4 blocks, and
ViT-Tiny with the paper's decoder of 512 x 8 blocks. They alternate in one process on one thread; the ratio is that of
the shortest processor times. ``compute_ratio`` leaves out making batches.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.protocols import Objective
from bowerbird.testing import SimpleBuildContext
from bowerbird.train.data import collate
from bowerbird_mim.emae import EMAEConfig, EMAEObjective
from bowerbird_mim.mae import MAEConfig, MAEObjective
from bowerbird_mim.vit import ViTEncoder, small, tiny
from common import write_result

LIMIT, PARTS = 0.9, 4
SIZES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "tiny": (tiny(), {"decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 3}),
    "small": (small(), {"decoder_dim": 384, "decoder_depth": 4, "decoder_heads": 6}),
    "tiny, decoder of the paper": (tiny(), {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}),
}


class Trainer:
    """One objective with its optimiser; ``step`` returns processor seconds of making the batch and of the rest."""

    def __init__(self, objective: Objective, batch: int) -> None:
        self.objective, self.batch, self.steps = objective.train(), batch, 0
        self.transform = objective.item_transform()
        self.optimizer = torch.optim.AdamW(objective.parameter_groups(), lr=1e-4)
        pixels = np.random.default_rng(0).integers(0, 256, (batch, 256, 256, 3), np.uint8)
        self.pictures = [Image.fromarray(values) for values in pixels]

    def make_batch(self) -> Batch:
        assert self.transform is not None
        items = [
            self.transform({"image": picture}, np.random.default_rng([self.steps, i]))
            for i, picture in enumerate(self.pictures)
        ]
        return collate(items)

    def step(self) -> tuple[float, float]:
        start = time.process_time()
        batch = self.make_batch()
        made = time.process_time()
        self.objective.before_step(self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.objective(batch).total.backward()
        self.optimizer.step()
        self.objective.after_step(self.steps)
        self.steps += 1
        return made - start, time.process_time() - made


def measure(size: str, batch: int, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    architecture, decoder = SIZES[size]
    preprocessing = Preprocessing(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    encoder = ViTEncoder(**architecture, preprocessing=preprocessing)
    context = SimpleBuildContext(total_steps=100)
    sides = (
        Trainer(MAEObjective.build(MAEConfig(**decoder), copy.deepcopy(encoder), context), batch),
        Trainer(EMAEObjective.build(EMAEConfig(**decoder, num_parts=PARTS), encoder, context), batch),
    )
    times: tuple[list[tuple[float, float]], ...] = ([], [])
    for turn in range(rounds + 1):
        for side in (0, 1) if turn % 2 else (1, 0):
            times[side].append(sides[side].step())
    # The first step of each allocates the moments of the optimiser.
    making, computing = (
        [min(times[side][turn][part] for turn in range(1, rounds + 1)) for side in (0, 1)] for part in (0, 1)
    )
    return {
        "batch": batch,
        "mae_ms": round(1000 * (making[0] + computing[0]), 1),
        "emae_ms": round(1000 * (making[1] + computing[1]), 1),
        "ratio": round((making[1] + computing[1]) / (PARTS * (making[0] + computing[0])), 4),
        "compute_ratio": round(computing[1] / (PARTS * computing[0]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for size in options.sizes:
        found[size] = measure(size, options.batch, options.rounds)
        print(size, found[size], flush=True)
    within = all(values["ratio"] <= LIMIT for values in found.values())
    write_result("mim_emae", {"limit_ratio": LIMIT, "within_limit": within, "sizes": found}, out=options.output)


if __name__ == "__main__":
    main()
