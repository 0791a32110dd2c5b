"""Pictures as sequences of patches, and the fixed position codes of MAE.

B batch, C channels, H x W pixels, p patch side, L patches (row by row), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bowerbird.errors import InputError


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises ``InputError`` where a side is no multiple of the patch side."""
    if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise InputError(
            f"a picture of {height} x {width} pixels cannot be divided into patches of {patch_size}: both sides must "
            "be multiples of patch_size"
        )
    return height // patch_size, width // patch_size


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, L, p * p * C)``; inside a patch the order is row, column, channel (MAE, section 3).

    Raises:
        InputError: Not four dimensions, or a side is no multiple of ``patch_size``.
    """
    if images.ndim != 4:
        raise InputError(f"images have shape {tuple(images.shape)}; expected (B, C, H, W)")
    batch, channels, height, width = images.shape
    rows, columns = patch_grid(height, width, patch_size)
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int, channels: int = 3) -> Tensor:
    """The inverse of ``patchify``: ``(B, L, p * p * C)`` to ``(B, C, H, W)``.

    Raises:
        InputError: The shape does not fit ``grid``, ``patch_size`` and ``channels``.
    """
    rows, columns = grid
    if patches.ndim != 3 or patches.shape[1:] != (rows * columns, patch_size**2 * channels):
        raise InputError(
            f"patches have shape {tuple(patches.shape)}; a grid of {rows} x {columns} patches of side {patch_size} "
            f"with {channels} channels needs (B, {rows * columns}, {patch_size**2 * channels})"
        )
    cut = patches.reshape(len(patches), rows, columns, patch_size, patch_size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), channels, rows * patch_size, columns * patch_size)


def sincos_position_embedding(dim: int, grid: tuple[int, int], class_token: bool = False) -> Tensor:
    """Fixed 2-D position codes ``(L, D)``; the column fills the first half of a row (MAE, official code).

    With q = D / 4 and w_k = 10000^(-k / q), the patch at row y and column x has
    ``[sin(x w), cos(x w), sin(y w), cos(y w)]``. Computed in float64, returned in the default dtype.

    Args:
        dim: D, a multiple of 4.
        grid: Rows and columns.
        class_token: Put a row of zeros in front: ``(L + 1, D)``.

    Raises:
        InputError: ``dim`` is no multiple of 4, or the grid is empty.
    """
    rows, columns = grid
    if dim < 4 or dim % 4:
        raise InputError(f"dim = {dim}: 2-D sine-cosine position codes need a multiple of 4")
    if rows < 1 or columns < 1:
        raise InputError(f"grid = {grid}: expected at least one row and one column")
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    angles_x, angles_y = x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies  # (L, D / 4)
    table = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)
    if class_token:
        table = torch.cat([table.new_zeros(1, dim), table])
    return table.to(torch.get_default_dtype())


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Every patch with mean 0 and *unbiased* variance 1, ``eps`` inside the root: ``(B, L, P)`` to ``(B, L, P)``.

    Raises:
        InputError: P = 1: one number has no variance.
    """
    if patches.shape[-1] < 2:
        raise InputError(
            "patches of one number (patch_size = 1, one channel) cannot be normalised: set norm_pix_loss = false"
        )
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()
