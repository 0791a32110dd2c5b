"""The tokenizer's step: a discrete VAE with Gumbel noise and the usage term; usage and perplexity are logged by ours.

No transformer here: ``tiny`` is the tokenizer of a ViT-Tiny on 224 pixels, 112 pixels in cells of 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_mim.tokenizer import DiscreteVAE, TokenizerConfig, TokenizerObjective
from mim_plain.vit import step_of

SIZES: dict[str, dict[str, Any]] = {
    "small": {"image_size": 32, "num_tokens": 64, "codebook_dim": 32, "hidden_dim": 32, "num_layers": 2},
    "tiny": {"image_size": 112, "num_tokens": 512, "codebook_dim": 64, "hidden_dim": 64, "num_layers": 3},
}
BATCH = {"small": 64, "tiny": 8}
TEMPERATURE, USAGE_WEIGHT = 0.7, 0.05


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def plain_tokenizer(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    model = DiscreteVAE(**SIZES[size])
    config = TokenizerConfig(temperature=TEMPERATURE, final_temperature=TEMPERATURE, usage_weight=USAGE_WEIGHT)
    ours = TokenizerObjective(model, config, total_steps=1).train()
    vocab, dim, width, stages = (SIZES[size][k] for k in ("num_tokens", "codebook_dim", "hidden_dim", "num_layers"))
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for i in range(stages):
        down += [nn.Conv2d(width if i else 3, width, 4, 2, 1), nn.ReLU(), Residual(width)]
        up += [nn.ConvTranspose2d(width if i else dim, width, 4, 2, 1), nn.ReLU(), Residual(width)]
    plain = nn.ModuleDict(
        {
            "encoder": nn.Sequential(*down, nn.Conv2d(width, vocab, 1)),
            "codes": nn.Embedding(vocab, dim),
            "decoder": nn.Sequential(*up, nn.Conv2d(width, 3, 1)),
        }
    )
    for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs)
    side = SIZES[size]["image_size"]
    images, seeds = torch.randn(BATCH[size], 3, side, side), torch.arange(BATCH[size])

    def loss() -> Tensor:
        logits = plain["encoder"](images)
        noise = torch.empty_like(logits)
        for i in range(len(images)):  # of the item, whoever else is in the batch
            noise[i].exponential_(generator=torch.Generator().manual_seed(int(seeds[i])))
        y = ((logits - noise.log()) / TEMPERATURE).softmax(dim=1)
        restored = plain["decoder"](torch.einsum("bvhw,vd->bdhw", y, plain["codes"].weight))
        usage = logits.softmax(dim=1).mean(dim=(0, 2, 3))
        return F.mse_loss(restored, images) + USAGE_WEIGHT * ((usage * usage.log()).sum() + math.log(vocab))

    return step_of(ours, lambda: ours({"image": images, "noise_seed": seeds}).total), step_of(plain, loss)
