"""Time of a training step over the share of hidden patches: MAE's encoder takes in visible patches only.

python benchmarks/mim_mask_ratio.py --output benchmarks/results/mim_mask_ratio.json

ViT-Tiny on 224 pixels in patches of 16 with a decoder of 192 x 4 blocks; forward, loss, backward on one batch, one
thread. Shortest processor times; ``encoder_ms`` is forward and backward of the encoder alone. EMAE with K parts is
measured beside MAE of the same ratio 1 - 1 / K.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bowerbird_mim.emae import EfficientMaskedAutoencoder
from bowerbird_mim.mae import MaskedAutoencoder, random_mask
from bowerbird_mim.vit import ViTEncoder, tiny
from common import shortest, write_result

RATIOS = (0.25, 0.5, 0.75, 0.9)
PARTS = (2, 4, 7)  # divisors of 196


def shortest_ms(module: nn.Module, loss: Callable[[], Tensor], rounds: int) -> float:
    def step() -> None:
        module.zero_grad(set_to_none=True)
        loss().backward()

    return round(1000 * shortest({"step": step}, rounds)["step"], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = ViTEncoder(**tiny())
    mae = MaskedAutoencoder(encoder, decoder_dim=192, decoder_depth=4, decoder_heads=3)
    images = torch.randn(options.batch, 3, 224, 224)
    noise = torch.rand(options.batch, 196)

    whole = shortest_ms(encoder, lambda: encoder.tokens(images).square().mean(), options.rounds)
    rows = [{"mask_ratio": 0.0, "encoder_ms": whole}]
    for ratio in RATIOS:
        ids = random_mask(noise, ratio).ids_keep
        row = {
            "mask_ratio": ratio,
            "encoder_ms": shortest_ms(
                encoder, lambda ids=ids: encoder.tokens(images, ids_keep=ids).square().mean(), options.rounds
            ),
            "step_ms": shortest_ms(mae, lambda ratio=ratio: mae(images, ratio, noise).loss, options.rounds),
        }
        rows.append(row)
        print(row, flush=True)
    parts = []
    for count in PARTS:
        model = EfficientMaskedAutoencoder(mae, count)
        ratio = 1 - 1 / count
        row = {
            "num_parts": count,
            "emae_step_ms": shortest_ms(
                mae, lambda model=model: model(images, noise, with_pred=False).loss, options.rounds
            ),
            "mae_step_ms": shortest_ms(mae, lambda ratio=ratio: mae(images, ratio + 1e-9, noise).loss, options.rounds),
        }
        parts.append({**row, "ratio": round(row["emae_step_ms"] / (count * row["mae_step_ms"]), 4)})
        print(parts[-1], flush=True)
    falling = [row["encoder_ms"] for row in rows]
    write_result(
        "mim_mask_ratio",
        {"batch": options.batch, "falls": falling == sorted(falling, reverse=True), "mae": rows, "emae": parts},
        out=options.output,
    )


if __name__ == "__main__":
    main()
