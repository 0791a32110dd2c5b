"""Encoders with zeros, as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bowerbird.encoders import load_encoder, save_encoder


def zero_blocks(model: nn.Module, block: tuple[int, int], share: float, seed: int = 0) -> nn.Module:
    """Zero this share of the blocks of every linear layer that they divide; biases are random."""
    generator = torch.Generator().manual_seed(seed)
    p, q = block
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.out_features % p == 0 and layer.in_features % q == 0:
            rows, columns = layer.weight.shape
            kept = torch.rand(rows // p, columns // q, generator=generator) >= share
            with torch.no_grad():
                layer.weight.mul_(kept.repeat_interleave(p, 0).repeat_interleave(q, 1))
                if layer.bias is not None:
                    layer.bias.normal_(generator=generator)
    return model


def sparse_encoder(
    path: Path,
    use: str = "core:perceptron",
    config: dict[str, object] | None = None,
    *,
    block: tuple[int, int] = (8, 8),
    share: float = 0.9,
) -> Path:
    """A folder with a dense encoder whose weights hold zeros; by default a perceptron on pictures of 8 pixels."""
    config = config or {"image_size": 8, "width": 128, "embed_dim": 16}
    settings = "&".join(f"{key}={value}" for key, value in config.items())
    encoder = load_encoder(f"{use}?{settings}", device="cpu").module
    zero_blocks(encoder, block, share)
    save_encoder(encoder, path, use=use, config=config, classes=("a", "b"), classifier=torch.ones(2, encoder.embed_dim))
    return path
