"""The arms of tokenizer.toml: tokenizers trained on padded pictures, measured on test pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretraining_arms import Values, dataset
from torch import Tensor

from bowerbird_mim.tokenizer import DVAEConfig, TokenizerConfig, TokenizerTraining, VQVAEConfig, train_tokenizer
from bowerbird_mim.tokenizer_quality import tokenizer_quality


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<metric>`` with the metrics of ``tokenizer_quality``, and the plan's limits as ``limit.<metric>``."""
    generator = np.random.default_rng(seed)
    train, test = (
        padded(split, plan["data"][size], generator) for split, size in (("train", "items"), ("test", "test"))
    )
    values: Values = {f"limit.{name}": value for name, value in plan["limit"].items()}
    for arm in plan["arms"]:
        kind = VQVAEConfig if arm.get("kind") == "vqvae" else DVAEConfig
        config = TokenizerTraining(
            encoder=kind(**plan["encoder"]),
            objective=TokenizerConfig(**arm.get("objective", {})),
            **plan["training"],
        )
        tokenizer = train_tokenizer(train, config, torch.Generator().manual_seed(seed))
        for name, value in tokenizer_quality(tokenizer, test.split(250)).items():
            values[f"{arm['name']}.{name}"] = value
    return values


def padded(split: str, count: int, generator: np.random.Generator) -> Tensor:
    """``count`` random pictures of Fashion-MNIST, ``(count, 1, 32, 32)``."""
    items: Any = dataset("core:fashion-mnist", split)
    chosen = items.images[generator.permutation(len(items))[:count]]
    pixels = F.pad(torch.from_numpy(chosen).float() / 255, (2, 2, 2, 2))
    return ((pixels - 0.28) / 0.35)[:, None]
