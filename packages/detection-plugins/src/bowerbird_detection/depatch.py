"""Deformable patch embedding: every patch chooses its own centre and size before it is read.

Source: "DPT: Deformable Patch-based Transformer for Visual Recognition", ACM Multimedia 2021, arXiv:2107.14467.

B pictures, C channels, H x W positions, p side of a patch, N = gh x gw patches (gh = H / p, gw = W / p, row by row), D
width of the tokens, k points per side. Boxes and points are x before y, in 0..1 of the whole map: 0 and 1 are its outer
edges, so that the centre of pixel column i lies at (i + 0.5) / W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.errors import InputError

# tanh of it is 1/4: at first a box has half the side of its patch. For p = 2 its corners are the four pixel centres.
SIZE_BIAS = math.log(math.sqrt(5 / 3))


def decode_patch_boxes(pred: Tensor, size_bias: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """Predictions of the offset branch as boxes.

    The centre moves by at most one patch, a half size is at most one patch, and what leaves the map is cut off at its
    edge. Sizes below zero are zero; there, and at a cut edge, the gradient is zero.

    Args:
        pred: ``(B, N, 4)``: shifts x and y, sizes x and y, before their tanh.
        size_bias: ``(2,)``, added to the sizes x and y.
        grid: (gh, gw) with gh * gw = N; a number where they are equal.

    Returns:
        ``(B, N, 4)`` x1 y1 x2 y2 in 0..1.

    Raises:
        InputError: The shapes do not fit.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if pred.ndim != 3 or pred.shape[1:] != (rows * columns, 4) or size_bias.shape != (2,):
        raise InputError(
            f"predictions {tuple(pred.shape)} and size_bias {tuple(size_bias.shape)} do not fit a grid of "
            f"{rows} x {columns}; expected (B, {rows * columns}, 4) and (2,)"
        )
    options: dict[str, Any] = {"device": pred.device, "dtype": pred.dtype}
    y, x = torch.meshgrid(torch.arange(rows, **options), torch.arange(columns, **options), indexing="ij")
    cells = torch.tensor((columns, rows), **options)  # per axis: cells are 1 / cells wide and high
    anchors = (torch.stack((x, y), dim=-1).flatten(0, 1) + 0.5) / cells  # (N, 2)
    centres = anchors + pred[..., :2].tanh() / cells
    half = (pred[..., 2:] + size_bias).tanh().relu() / cells
    return torch.cat((centres - half, centres + half), dim=-1).clamp(0, 1)


def box_sampling_grid(boxes: Tensor, k: int) -> Tensor:
    """k x k points in every box, evenly from corner to corner; x is the slow axis: point u * k + v has the u-th x.

    Args:
        boxes: ``(B, N, 4)`` x1 y1 x2 y2.
        k: At least 2.

    Returns:
        ``(B, N * k * k, 2)``.

    Raises:
        InputError: k is below 2, or ``boxes`` has another shape.
    """
    if k < 2:
        raise InputError(f"points per side: found {k}; a box needs at least 2, its corners")
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise InputError(f"boxes have shape {tuple(boxes.shape)}; expected (B, N, 4)")
    steps = torch.arange(k, device=boxes.device, dtype=boxes.dtype) / (k - 1)
    low, high = boxes[..., :2, None], boxes[..., 2:, None]
    x, y = (low + (high - low) * steps).unbind(dim=2)  # (B, N, k) each
    points = torch.stack((x[..., :, None].expand(-1, -1, k, k), y[..., None, :].expand(-1, -1, k, k)), dim=-1)
    return points.flatten(1, 3)


def sample_points(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear reading of every channel at points; what lies outside the map is zero.

    Args:
        features: ``(B, C, H, W)``.
        points: ``(B, P, 2)``, x y in 0..1.

    Returns:
        ``(B, P, C)``.

    Raises:
        InputError: The shapes do not fit.
    """
    if features.ndim != 4 or points.ndim != 3 or points.shape[2] != 2 or len(points) != len(features):
        raise InputError(
            f"features {tuple(features.shape)} and points {tuple(points.shape)} do not fit; expected (B, C, H, W) and "
            "(B, P, 2)"
        )
    # align_corners = False is the convention that -1 and 1 are the outer edges.
    read = F.grid_sample(features, 2 * points[:, None] - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
    return read[:, :, 0].transpose(1, 2)


# ------------------------------------------------------------------------------------------------- modules


class FixedPatchEmbed(nn.Module):
    """Convolution with kernel and stride p, then a norm: ``(B, C, H, W)`` to tokens ``(B, N, D)`` and (gh, gw)."""

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int = 2,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise InputError(f"patch_size = {patch_size}: expected at least 1")
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = norm_layer(embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Raises ``InputError`` where H or W is no multiple of p, or for another number of channels."""
        grid = patch_grid(x, self.patch_size)
        if x.shape[1] != self.proj.in_channels:
            raise InputError(f"expected maps (B, {self.proj.in_channels}, H, W), found shape {tuple(x.shape)}")
        return self.norm(self.proj(x).flatten(2).transpose(1, 2)), grid


class _BoxCoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wh_bias = nn.Parameter(torch.full((2,), SIZE_BIAS))


class DeformablePatchEmbed(nn.Module):
    """DePatch: in the place of a convolution of kernel and stride p.

    A plain patch embedding predicts four numbers per patch; they become a box; k x k points of the box are read from
    the map, and a linear layer makes a token of what was read. The prediction begins at zero, with boxes that do not
    depend on the picture. Everything is computed in the precision of the weights, also under autocast: half precision
    is too coarse for positions.

    Parameters have the names of the published code; what its weights hold besides (``value_spatial_shapes``,
    ``value_level_start_index``, ``box_coder.anchor``) follows from the shape of the map and is left out when loading.

    Args:
        in_channels: C.
        embed_dim: D.
        patch_size: p.
        points_per_side: k, at least 2.
        norm_layer: Makes the two norms from D.

    Raises:
        InputError: Values outside these ranges.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        patch_size: int = 2,
        points_per_side: int = 3,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if points_per_side < 2:
            raise InputError(f"points_per_side = {points_per_side}: a box needs at least 2, its corners")
        self.patch_size, self.points_per_side = patch_size, points_per_side
        self.patch_embed = FixedPatchEmbed(in_channels, embed_dim, patch_size, norm_layer)
        self.offset_predictor = nn.Linear(embed_dim, 4, bias=False)
        self.box_coder = _BoxCoder()
        self.output_proj = nn.Linear(points_per_side**2 * in_channels, embed_dim)
        self.norm = norm_layer(embed_dim)
        self.reset_offsets()
        self.register_load_state_dict_pre_hook(_leave_out_what_follows_from_the_grid)

    def reset_offsets(self) -> None:
        """Boxes as at first. To be called again by who initialises the linear layers of a network."""
        nn.init.zeros_(self.offset_predictor.weight)
        nn.init.constant_(self.box_coder.wh_bias, SIZE_BIAS)

    def freeze_offsets(self) -> None:
        """Keep the boxes of now out of training: after ``reset_offsets``, what is left of a patch is not deformed."""
        for part in (self.patch_embed, self.offset_predictor, self.box_coder):
            part.requires_grad_(False)

    def boxes(self, x: Tensor) -> Tensor:
        """``(B, N, 4)`` x1 y1 x2 y2 in 0..1. Raises ``InputError`` where H or W is no multiple of p."""
        tokens, grid = self.patch_embed(x)
        return decode_patch_boxes(self.offset_predictor(F.gelu(tokens)), self.box_coder.wh_bias, grid)

    def forward(self, x: Tensor, return_boxes: bool = False) -> Any:
        """``(B, C, H, W)`` to ``(tokens (B, N, D), (gh, gw))``, and boxes ``(B, N, 4)`` where they are asked for.

        Raises ``InputError`` where H or W is no multiple of p.
        """
        grid = patch_grid(x, self.patch_size)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.output_proj.weight.dtype)
            boxes = self.boxes(x)
            read = sample_points(x, box_sampling_grid(boxes, self.points_per_side))  # (B, N * k * k, C)
            tokens = self.norm(self.output_proj(read.reshape(*boxes.shape[:2], -1)))
        return (tokens, grid, boxes) if return_boxes else (tokens, grid)


def _leave_out_what_follows_from_the_grid(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in ("value_spatial_shapes", "value_level_start_index", "box_coder.anchor"):
        state.pop(prefix + name, None)


def patch_grid(x: Tensor, patch_size: int) -> tuple[int, int]:
    """(H / p, W / p). Raises ``InputError`` for what is no map, and where H or W is no multiple of p."""
    if x.ndim != 4:
        raise InputError(f"expected maps (B, C, H, W), found shape {tuple(x.shape)}")
    height, width = x.shape[2:]
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise InputError(
            f"a map of {height} x {width} cannot be cut into patches of {patch_size}: both sides must be multiples of "
            f"{patch_size}"
        )
    return height // patch_size, width // patch_size


# ------------------------------------------------------------------------------------------------- other networks


class _Merging(nn.Module):
    """DePatch in the form of timm's merging layers: maps in, ``(B, h, w, D)`` out; odd sides are padded, as there."""

    def __init__(self, embed: DeformablePatchEmbed, *, channels_last: bool) -> None:
        super().__init__()
        self.embed, self.channels_last = embed, channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        x = F.pad(x, (0, -x.shape[3] % self.embed.patch_size, 0, -x.shape[2] % self.embed.patch_size))
        tokens, grid = self.embed(x)
        return tokens.unflatten(1, grid)


def replace_patch_embeds(
    model: nn.Module, stages: int | Collection[int] = (1, 2, 3), *, points_per_side: int = 3
) -> nn.Module:
    """Put DePatch where a pyramid transformer of timm halves its maps: PVT-v2, Swin and Swin-v2.

    Weights of the layers that are replaced are lost: train the network, or at least these layers, afterwards.

    Args:
        model: Changed in place.
        stages: Whose patches are replaced, one or several, counted from 0. Stage 0 keeps its own: it reads pixels.
        points_per_side: k.

    Returns:
        ``model``.

    Raises:
        InputError: Another kind of network, or a stage that it does not have.
    """
    found = getattr(model, "stages", getattr(model, "layers", ()))
    made = {
        number: _replacement(getattr(stage, "downsample", None), points_per_side) for number, stage in enumerate(found)
    }
    replaceable = [number for number, layer in made.items() if layer is not None]
    if not replaceable:
        raise InputError(f"{type(model).__name__} has no patches to replace; accepted: timm's PVT-v2, Swin and Swin-v2")
    stages = (stages,) if isinstance(stages, int) else stages
    unknown = sorted(set(stages) - set(replaceable))
    if unknown:
        raise InputError(
            f"stages {unknown} of {type(model).__name__} have no patches to replace; accepted: {replaceable}"
        )
    for number in stages:
        found[number].downsample = made[number]
    return model


def _replacement(layer: Any, points_per_side: int) -> nn.Module | None:
    """``None`` for a layer of another kind. Known by what it has: timm has a class of the same name per network."""
    if type(layer).__name__ == "OverlapPatchEmbed":
        channels, width, last = layer.proj.in_channels, layer.proj.out_channels, False
        patch_size = layer.proj.stride[0]
    elif type(layer).__name__ == "PatchMerging":
        channels, width, last = layer.dim, layer.out_dim, True
        patch_size = 2
    else:
        return None
    embed = DeformablePatchEmbed(channels, width, patch_size, points_per_side)
    nn.init.trunc_normal_(embed.output_proj.weight, std=0.02)
    nn.init.zeros_(embed.output_proj.bias)
    return _Merging(embed, channels_last=last).to(next(layer.parameters()))
