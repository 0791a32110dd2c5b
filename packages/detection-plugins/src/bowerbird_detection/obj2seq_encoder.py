"""Obj2Seq's image encoder, that of Deformable DETR (arXiv:2010.04159): a pyramid of maps that attend to each other.

B pictures of H x W pixels, L levels, S = sum of H_l W_l positions, d width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird_detection.backbones import Pyramid
from bowerbird_detection.deformable_attention import MultiScaleDeformableAttention
from bowerbird_detection.obj2seq_layers import FeedForward, ImageFeatures

TEMPERATURE = 10_000.0
GROUPS = 32  # of GroupNorm, where they divide the width


class ConvPyramid(Pyramid):
    """A few 3 x 3 convolutions of stride 2 with GroupNorm and ReLU: a backbone for small pictures.

    Args:
        widths: Channels of every stage; stage i has stride 2^(i+1).
        levels: How many of the last stages give maps.
        image_size: Side of a picture when it is embedded.
    """

    def __init__(self, widths: Sequence[int], levels: int, image_size: int = 64) -> None:
        super().__init__()
        if not 1 <= levels <= len(widths) or min(widths) < 1:
            raise InputError(f"stages of widths {list(widths)} and {levels} levels: expected as many levels, or fewer")
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), _group_norm(outputs), nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), _group_norm(outputs), nn.ReLU(),
            )
            for inputs, outputs in pairwise((3, *widths))
        )  # fmt: skip
        self.channels = tuple(widths[-levels:])
        self.strides = tuple(2 ** (stage + 1) for stage in range(len(widths)))[-levels:]
        self.embed_dim, self.source = widths[-1], {}
        self.preprocessing = Preprocessing(size=image_size, interpolation="bilinear")

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return OrderedDict((str(level), found) for level, found in enumerate(maps[-len(self.channels) :]))


class DeformableEncoder(nn.Module):
    """From pictures to features of L levels.

    Args:
        backbone: Module from ``(B, 3, H, W)`` to maps by name, finest first, with ``channels`` of each.
        embed_dim, num_heads, num_points, ffn_dim: d, and of the layers.
        num_layers: Of deformable self-attention; without any, positions are not encoded either.
        extra_levels: Coarser levels, each a 3 x 3 convolution of stride 2 on the one before.
    """

    def __init__(
        self,
        backbone: Pyramid,
        embed_dim: int = 256,
        *,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
        extra_levels: int = 1,
    ) -> None:
        super().__init__()
        if embed_dim % 4:
            raise InputError(f"embed_dim = {embed_dim}: expected a multiple of 4, for sines and cosines of two axes")
        self.backbone, self.embed_dim = backbone, embed_dim
        kernels = [(width, 1, 1) for width in backbone.channels]
        kernels += [(backbone.channels[-1] if i == 0 else embed_dim, 3, 2) for i in range(extra_levels)]
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, embed_dim, side, stride, padding=side // 2), _group_norm(embed_dim))
            for width, side, stride in kernels
        )
        for projection in self.input_proj:
            convolution: Any = projection[0]  # type: ignore[index]
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        self.num_levels = len(kernels)
        self.level_embed = nn.Parameter(torch.randn(self.num_levels, embed_dim)) if num_layers else None
        self.layers = nn.ModuleList(
            _EncoderLayer(embed_dim, self.num_levels, num_heads, num_points, ffn_dim) for _ in range(num_layers)
        )

    def forward(self, images: Tensor, padding_mask: Tensor | None = None) -> ImageFeatures:
        """Features of normalised pictures ``(B, 3, H, W)``; ``padding_mask`` bool ``(B, H, W)``, true for padding.

        Raises ``InputError`` for other shapes, and for a picture that is all padding.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"expected pictures (batch, 3, height, width), found {tuple(images.shape)}")
        if padding_mask is not None:
            if padding_mask.shape != (len(images), *images.shape[2:]):
                raise InputError(f"padding_mask {tuple(padding_mask.shape)} for pictures {tuple(images.shape)}")
            if not padding_mask.any():
                padding_mask = None
        maps = list(self.backbone(images).values())
        levels: list[Tensor] = []
        for index, projection in enumerate(self.input_proj):
            below = maps[index] if index < len(maps) else maps[-1] if index == len(maps) else levels[-1]
            levels.append(projection(below))
        shapes = [(int(level.shape[2]), int(level.shape[3])) for level in levels]
        masks = None if padding_mask is None else [_shrunk(padding_mask, shape) for shape in shapes]
        image = ImageFeatures(
            tokens=torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1),
            spatial_shapes=shapes,
            padding_mask=None if masks is None else torch.cat([mask.flatten(1) for mask in masks], dim=1),
            valid_ratios=None if masks is None else torch.stack([_valid_ratio(mask) for mask in masks], dim=1),
        )
        return self._attended(image, masks) if len(self.layers) else image

    def _attended(self, image: ImageFeatures, masks: Sequence[Tensor] | None) -> ImageFeatures:
        assert self.level_embed is not None
        count, device = len(image.tokens), image.tokens.device
        if masks is None:
            masks = [torch.zeros((1, *shape), dtype=torch.bool, device=device) for shape in image.spatial_shapes]
        width = image.tokens.shape[2]
        positions = torch.cat(
            [sine_positions(mask, width).to(image.tokens.dtype) + embed
             for mask, embed in zip(masks, self.level_embed, strict=True)], dim=1
        )  # fmt: skip
        references = image.scaled(_grid(image).expand(count, -1, -1))
        x = image.tokens
        for layer in self.layers:
            x = layer(x, positions, references, image)
        return ImageFeatures(x, image.spatial_shapes, image.padding_mask, image.valid_ratios)


class _EncoderLayer(nn.Module):
    def __init__(self, embed_dim: int, num_levels: int, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(embed_dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, image: ImageFeatures) -> Tensor:
        read = self.self_attn(x + positions, references, x, image.spatial_shapes, image.padding_mask)
        out: Tensor = self.ffn(self.norm1(x + read))
        return out


def sine_positions(mask: Tensor, width: int) -> Tensor:
    """``(B, H W, width)``: sines and cosines of the row (first half) and the column of every position.

    ``mask`` is bool ``(B, H, W)``, true for padding. Positions run from 0 to 2 pi over what is no padding.
    """
    half = width // 2
    scale = TEMPERATURE ** (2 * (torch.arange(half, device=mask.device) // 2) / half)
    encoded = []
    for axis in (1, 2):
        steps = (~mask).cumsum(axis, dtype=torch.float32)
        last = steps.narrow(axis, -1, 1)
        angles = ((steps - 0.5) / (last + 1e-6) * 2 * math.pi)[..., None] / scale
        encoded.append(torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=4).flatten(3))
    return torch.cat(encoded, dim=3).flatten(1, 2)


def _grid(image: ImageFeatures) -> Tensor:
    """``(B or 1, S, 2)``: the middle of every position as x and y of its picture without padding."""
    parts = []
    for level, (rows, columns) in enumerate(image.spatial_shapes):
        y = (torch.arange(rows, device=image.tokens.device) + 0.5) / rows
        x = (torch.arange(columns, device=image.tokens.device) + 0.5) / columns
        points = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).reshape(1, -1, 2)
        parts.append(points if image.valid_ratios is None else points / image.valid_ratios[:, level, None])
    return torch.cat(parts, dim=1).to(image.tokens.dtype)


def _shrunk(padding_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask at a level; every picture keeps its first position."""
    mask = functional.interpolate(padding_mask[:, None].float(), size=shape)[:, 0] > 0
    if mask[:, 0, 0].any():
        raise InputError("padding_mask: a picture is all padding; pictures are at the upper left of theirs")
    return mask


def _valid_ratio(mask: Tensor) -> Tensor:
    """``(B, 2)``: the part of the width and of the height that is no padding."""
    return torch.stack([(~mask[:, 0]).float().mean(dim=1), (~mask[:, :, 0]).float().mean(dim=1)], dim=1)


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(GROUPS, width), width)
