"""SAIM's step: content stream and query stream over all patches, blurred and normalised targets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_mim.saim import StochasticAutoregressiveModel, TwoStreamBlock
from bowerbird_mim.vit import ViTEncoder
from mim_plain.vit import BATCH, SIZES, Mlp, plain_vit, step_of

SIGMA, KERNEL = 1.0, 9


class QueryBlock(nn.Module):
    """Queries from one stream, keys and values from another; one first norm for both."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, query: Tensor, content: Tensor, mask: Tensor) -> Tensor:
        batch, length, dim = query.shape
        q = self.q(self.norm1(query)).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(self.norm1(content)).view(batch, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, length, dim)
        query = query + self.proj(read)
        return query + self.mlp(self.norm2(query))


def plain_block(block: TwoStreamBlock, dim: int, heads: int) -> QueryBlock:
    """With the weights of ``block``."""
    plain = QueryBlock(dim, heads)
    state = dict(block.state_dict())
    for kind in ("weight", "bias"):
        qkv = state.pop(f"attn.qkv.{kind}")
        state[f"q.{kind}"], state[f"kv.{kind}"] = qkv[:dim], qkv[dim:]
        state[f"proj.{kind}"] = state.pop(f"attn.proj.{kind}")
    plain.load_state_dict(state)
    return plain


def additive(allowed: Tensor) -> Tensor:
    """``(B, L, L)`` between patches to ``(B, 1, L + 1, L + 1)`` with the class token first."""
    batch, length, _ = allowed.shape
    mask = torch.full((batch, 1, length + 1, length + 1), -torch.inf)
    mask[:, :, :, 0] = 0
    mask[:, 0, 1:, 1:].masked_fill_(allowed, 0)
    return mask


def target_of(images: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = images.shape
    offsets = torch.arange(KERNEL) - KERNEL // 2
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).repeat(channels, 1, 1, 1)
    blurred = F.conv2d(images, kernel, padding=KERNEL // 2, groups=channels)
    cut = blurred.view(batch, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 3, 5, 1)
    patches = cut.reshape(batch, -1, patch * patch * channels)
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def plain_saim(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    encoder = ViTEncoder(**SIZES[size])
    model = StochasticAutoregressiveModel(encoder, encoder.depth)
    dim, heads, patch = encoder.embed_dim, encoder.num_heads, encoder.patch_size
    vit = plain_vit(encoder, size)
    head = Mlp(dim, 4 * dim)
    head.fc2 = nn.Linear(4 * dim, 3 * patch**2)
    head.load_state_dict(model.prediction_head.state_dict())
    blocks = nn.ModuleList(plain_block(block, dim, heads) for block in model.query_blocks)
    images = torch.randn(BATCH[size], 3, *encoder.image_size)
    noise = torch.rand(BATCH[size], encoder.grid[0] * encoder.grid[1])

    def loss() -> Tensor:
        content_mask = additive(noise[:, None, :] <= noise[:, :, None])
        query_mask = additive(noise[:, None, :] < noise[:, :, None])
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        content, query = torch.cat([first, vit.embed(images)], 1), vit.pos_embed.expand(len(images), -1, -1)
        for block, reader in zip(vit.blocks, blocks, strict=True):
            content = block(content, content_mask)
            query = reader(query, content, query_mask)
        with torch.no_grad():
            target = target_of(images, patch)
        return (head(vit.norm(query[:, 1:])) - target).square().mean()

    return step_of(model, lambda: model(images, noise).loss), step_of(nn.ModuleList([vit, blocks, head]), loss)
