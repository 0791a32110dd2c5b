"""What MIMDet's networks begin with: the stems, and the fixed positions of the tokens (arXiv 2204.02964).

B batch, H x W picture, D width of the tokens, p = 2^depth their stride.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bowerbird.errors import InputError

# ---------------------------------------------------------------------------------------------------------- positions


def sincos_positions(dim: int, grid: tuple[int, int], class_row: bool = False) -> Tensor:
    """Fixed 2-D position codes of MAE: float64 ``(rows * columns, dim)``, with ``class_row`` zeros in front.

    With q = dim / 4 and w_i = 10000^(-i / q), the cell at row y and column x has
    ``[sin(x w), cos(x w), sin(y w), cos(y w)]``.

    Raises:
        InputError: ``dim`` is no multiple of 4, or the grid is empty.
    """
    if dim < 4 or dim % 4:
        raise InputError(f"dim = {dim}: 2-D sine-cosine positions need a multiple of 4")
    if min(grid) < 1:
        raise InputError(f"grid = {grid}: expected at least one row and one column")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = (
        index.reshape(-1, 1) * frequencies
        for index in torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    )
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    return torch.cat([table.new_zeros(1, dim), table]) if class_row else table


def resize_positions(table: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A table of positions for another grid, by bicubic interpolation; a class row in front stays as it is.

    Args:
        table: ``(1, L, D)`` or ``(1, 1 + L, D)`` of the grid ``own``.
        own: Its rows and columns.
        grid: The wanted rows and columns.

    Raises:
        InputError: The table is not of the grid ``own``.
    """
    first = table.shape[1] - own[0] * own[1]
    if table.ndim != 3 or first not in (0, 1):
        raise InputError(f"a table of positions of shape {tuple(table.shape)} is none of {own[0]} x {own[1]} cells")
    if own == grid:
        return table
    codes = table[:, first:].reshape(1, *own, -1).permute(0, 3, 1, 2)
    codes = functional.interpolate(codes, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :first], codes.flatten(2).transpose(1, 2)], dim=1)


def fixed_table(dim: int, grid: tuple[int, int]) -> nn.Parameter:
    """``sincos_positions`` as a parameter ``(1, 1 + rows * columns, dim)`` that is not trained."""
    table = sincos_positions(dim, grid, class_row=True)[None]  # the class row is the checkpoints' form; nobody reads it
    return nn.Parameter(table.to(torch.get_default_dtype()), requires_grad=False)


# -------------------------------------------------------------------------------------------------------------- stems


class StemMaps(NamedTuple):
    """``c2 (B, D/4, 4H/p, 4W/p)``, ``c3 (B, D/2, 2H/p, 2W/p)`` and ``c4 (B, D, H/p, W/p)``."""

    c2: Tensor
    c3: Tensor
    c4: Tensor


class ConvStem(nn.Module):
    """3 x 3 convolutions with stride 2, each with layer norm over (C, H, W) and GELU; the last with a 1 x 1 one behind.

    The width doubles with every stage up to D. Receptive fields overlap, and the norm is over the whole padded picture.

    Args:
        in_chans: Channels of the picture.
        embed_dim: D, a multiple of ``2^(depth - 1)``.
        depth: Number of stages, at least 3; the tokens have stride ``2^depth``.

    Raises:
        InputError: Values outside these ranges.
    """

    def __init__(self, in_chans: int, embed_dim: int, depth: int = 4) -> None:
        super().__init__()
        if depth < 3:
            raise InputError(f"depth = {depth}: a stem has at least 3 stages, the last three give maps")
        if in_chans < 1 or embed_dim < 1 or embed_dim % 2 ** (depth - 1):
            raise InputError(
                f"in_chans = {in_chans}, embed_dim = {embed_dim}: expected at least one channel, and a width that is a "
                f"multiple of {2 ** (depth - 1)}, since it halves with every stage below the last"
            )
        self.in_chans, self.embed_dim, self.stride = in_chans, embed_dim, 2**depth
        widths = [in_chans, *(embed_dim // 2**i for i in reversed(range(depth)))]
        stages: list[list[nn.Module]] = [
            [nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, b, eps=1e-6), nn.GELU()]
            for a, b in pairwise(widths)
        ]
        stages[-1].append(nn.Conv2d(embed_dim, embed_dim, 1))
        self.proj = nn.ModuleList(nn.Sequential(*stage) for stage in stages)

    def forward(self, images: Tensor) -> StemMaps:
        maps = []
        for stage in self.proj:
            images = stage(images)
            maps.append(images)
        return StemMaps(*maps[-3:])


class PatchStem(nn.Module):
    """What ``ConvStem`` takes the place of: ViT's patches, and transposed convolutions up to the finer maps.

    Its ``proj`` has the name and the shape of a ViT's, so that pre-trained patch embeddings are loaded.
    """

    def __init__(self, in_chans: int, embed_dim: int, depth: int = 4) -> None:
        super().__init__()
        if depth < 3 or in_chans < 1 or embed_dim < 4 or embed_dim % 4:
            raise InputError(
                f"in_chans = {in_chans}, embed_dim = {embed_dim}, depth = {depth}: expected at least one channel, a "
                "multiple of 4, and at least 3"
            )
        self.in_chans, self.embed_dim, self.stride = in_chans, embed_dim, 2**depth
        self.proj = nn.Conv2d(in_chans, embed_dim, self.stride, stride=self.stride)
        half, quarter = embed_dim // 2, embed_dim // 4
        self.up3 = self._doubled(embed_dim, half)
        self.up2 = nn.Sequential(self._doubled(embed_dim, half), self._doubled(half, quarter))

    @staticmethod
    def _doubled(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False),
            nn.GroupNorm(1, outputs, eps=1e-6),
            nn.GELU(),
        )

    def forward(self, images: Tensor) -> StemMaps:
        c4 = self.proj(images)
        return StemMaps(self.up2(c4), self.up3(c4), c4)
