"""What sampling saves MIMDet's encoder: python benchmarks/mimdet_sampling.py

A training step of the encoder (stem, positions, sampling, blocks, last norm; forward and backward) with a share of the
tokens against one with all of them, and the same of the whole backbone, whose decoder always sees all tokens. ViT-Small
with a decoder of 256 x 4, on one thread; the shares take turns. The ratio is that of the shortest processor times,
which others on the machine disturb least.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bowerbird_detection.mimdet import MIMDetBackbone, MIMDetDecoder, MIMDetEncoder, sample_tokens
from common import shortest, write_result

RATIOS = (0.25, 0.5, 0.75, 1.0)
LIMIT = 0.65  # of the encoder at half of the tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=384, help="side of the pictures, a multiple of 32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = MIMDetEncoder(image_size=options.size, embed_dim=384, depth=12, num_heads=6)
    decoder = MIMDetDecoder(384, image_size=options.size, embed_dim=256, depth=4, num_heads=8)
    backbone = MIMDetBackbone(encoder, decoder).train()
    images = torch.randn(options.batch, 3, options.size, options.size)

    def encoder_step(ratio: float) -> None:
        tokens = encoder.tokens(encoder.patch_embed(images).c4)
        if ratio < 1:
            tokens = sample_tokens(tokens, ratio).tokens
        _backward([encoder.encode(tokens)])

    def backbone_step(ratio: float) -> None:
        backbone.train_ratio = ratio
        _backward(list(backbone(images).values()))

    cases: dict[str, Callable[[], Any]] = {f"encoder {ratio}": partial(encoder_step, ratio) for ratio in RATIOS}
    cases |= {f"backbone {ratio}": partial(backbone_step, ratio) for ratio in RATIOS}
    seconds = shortest(cases, options.rounds)
    rows = [
        {
            "sample_ratio": ratio,
            **{
                key: value
                for part in ("encoder", "backbone")
                for key, value in {
                    f"{part}_ms": round(1e3 * seconds[f"{part} {ratio}"], 1),
                    f"{part}_ratio": round(seconds[f"{part} {ratio}"] / seconds[f"{part} 1.0"], 4),
                }.items()
            },
        }
        for ratio in RATIOS
    ]
    result = {
        "size": options.size,
        "batch": options.batch,
        "tokens": encoder.grid[0] ** 2,
        "limit": LIMIT,
        "rows": rows,
    }
    write_result("mimdet_sampling", result, out=options.output)


def _backward(maps: list[Tensor]) -> None:
    torch.stack([found.square().mean() for found in maps]).sum().backward()


if __name__ == "__main__":
    main()
