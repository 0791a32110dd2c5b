"""A vision transformer in plain torch, with timm's parameter names: the base of the plain steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Settings of mim:vit, and the batch.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 4},
    "tiny": {"image_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
}
BATCH = {"small": 64, "tiny": 8}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PlainViT(nn.Module):
    """``load_state_dict(encoder.state_dict())`` takes the weights of a ``mim:vit``."""

    def __init__(self, image_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """Patches with their positions, ``(B, L, D)``."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def encode(self, patches: Tensor) -> Tensor:
        """The class token is put in front; all blocks and the norm: ``(B, V, D)`` to ``(B, 1 + V, D)``."""
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        x = torch.cat([first, patches], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(self.embed(images))


def plain_vit(encoder: nn.Module, size: str) -> PlainViT:
    """With the weights of ``encoder`` (a ``mim:vit`` of that size), and trainable where those are."""
    vit = PlainViT(**SIZES[size])
    vit.load_state_dict(encoder.state_dict())
    theirs = dict(encoder.named_parameters())
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(theirs[name].requires_grad)
    return vit


def step_of(modules: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Zero gradients, forward, backward: what both sides of a pair do."""

    def step() -> Tensor:
        modules.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        return value.detach()

    return step
