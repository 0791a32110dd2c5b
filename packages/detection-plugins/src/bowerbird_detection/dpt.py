"""``detection:dpt``: a pyramid transformer (PVT) whose patches are deformable from the second stage on.

Source: "DPT: Deformable Patch-based Transformer for Visual Recognition", ACM Multimedia 2021, arXiv:2107.14467.

As an image encoder it has a class token in its last stage, whose output is the embedding. As the backbone of a detector
it has none and gives the maps of all stages. B pictures, H x W pixels, S stages, stage s of width D_s on a grid of
(H / t_s) x (W / t_s) tokens, t_s = p * 2^s (s = 0 .. S-1), p the side of the first patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features
from bowerbird_detection.depatch import DeformablePatchEmbed, FixedPatchEmbed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MERGED = 2  # tokens per side that become one from stage to stage

Patches = Literal["deformable", "frozen", "fixed"]


class Block(nn.Module):
    """Pre-norm attention, whose keys and values are read from a map that is ``sr_ratio`` times smaller, and an MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, sr_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, sr_ratio)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """``(B, N, D)`` to ``(B, N, D)``."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), list(grid)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class Stage(nn.Module):
    """Patches, positions and blocks. ``prefix``: rows of the position table for the class token, 0 or 1."""

    def __init__(self, embed: nn.Module, blocks: Sequence[Block], dim: int, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.embed = embed
        self.positions = nn.Parameter(torch.zeros(1, prefix + grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList(blocks)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, maps: Tensor, class_token: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """``(B, C, h, w)`` to tokens ``(B, N, D)`` and their grid; the class token, where it is given, comes first."""
        tokens, grid = self.embed(maps)
        tokens = tokens + self._positions(grid)
        if class_token is not None:
            first = (class_token + self.positions[:, :1]).expand(len(tokens), -1, -1)
            tokens = torch.cat((first.to(tokens.dtype), tokens), dim=1)
        for block in self.blocks:
            tokens = block(tokens, grid)
        return tokens, grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """``(1, N, D)``: the table, resized bilinearly for another grid than its own."""
        table = self.positions[:, self.prefix :]
        if grid == self.grid:
            return table
        codes = table.transpose(1, 2).unflatten(2, self.grid)
        return F.interpolate(codes, size=grid, mode="bilinear").flatten(2).transpose(1, 2)


class DPT(Encoder):
    """The network.

    Args:
        image_size: Side of square pictures, or (height, width), for which the position tables are made; pictures of
            other sizes are accepted, the tables are resized then.
        dims, depths, heads, mlp_ratios, sr_ratios: Per stage: width, number of blocks, attention heads, hidden width of
            the MLPs over the width, and how much smaller the map of keys and values is per side.
        patch_size: p.
        points_per_side: Of deformable patches.
        patches: From the second stage on: ``deformable``; ``frozen``, the same layers with boxes that are never trained
            (what is not deformation in DePatch); or ``fixed``, convolutions: a PVT.
        class_token: The embedding is the class token's; without it, the mean of the tokens.
        drop_path: Largest rate of stochastic depth; it grows linearly from 0 over the blocks.
        preprocessing: How a picture file is prepared; ``None`` where only tensors come.

    Raises:
        InputError: Sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        patch_size: int = 4,
        points_per_side: int = 3,
        patches: Patches = "deformable",
        class_token: bool = True,
        drop_path: float = 0.0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        check_stages(dims, depths, heads, mlp_ratios, sr_ratios, class_token=class_token)
        self.dims, self.sr_ratios, self.patch_size = tuple(dims), tuple(sr_ratios), patch_size
        self.embed_dim, self.preprocessing = dims[-1], preprocessing
        grids = self.grids(*((image_size, image_size) if isinstance(image_size, int) else image_size))
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        stages = []
        for s, dim in enumerate(dims):
            embed: nn.Module
            if s == 0:
                embed = FixedPatchEmbed(3, dim, patch_size)
            elif patches == "fixed":
                embed = FixedPatchEmbed(dims[s - 1], dim, MERGED)
            else:
                embed = DeformablePatchEmbed(dims[s - 1], dim, MERGED, points_per_side)
            chosen = rates[sum(depths[:s]) : sum(depths[: s + 1])]
            blocks = [Block(dim, heads[s], mlp_ratios[s], sr_ratios[s], rate) for rate in chosen]
            stages.append(Stage(embed, blocks, dim, grids[s], int(class_token and s == len(dims) - 1)))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim)) if class_token else None
        self._initialize(frozen=patches == "frozen")

    def _initialize(self, *, frozen: bool) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for part in self.modules():
            if isinstance(part, DeformablePatchEmbed):
                part.reset_offsets()  # one of the linear layers above
                if frozen:
                    part.freeze_offsets()
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    @classmethod
    def build(cls, config: DPTConfig) -> Self:
        """Raises ``DataError`` for weights that do not fit, naming what differs."""
        encoder = cls(**config.architecture(), preprocessing=config.preprocessing())
        if config.weights is not None:
            load_dpt_weights(encoder, config.weights)
        return encoder

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` without the source of the first weights: the weights lie beside it."""
        return {key: value for key, value in config.items() if key != "weights"}

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """(rows, columns) of the tokens of every stage. Raises ``InputError`` for sides that do not divide."""
        total = self.strides[-1]
        if height < 1 or width < 1 or height % total or width % total:
            raise InputError(
                f"pictures of {height} x {width} pixels: both sides must be multiples of {total}, the stride of the "
                f"last of {len(self.dims)} stages"
            )
        for stride, ratio in zip(self.strides, self.sr_ratios, strict=True):
            if min(height, width) // stride < ratio:
                raise InputError(
                    f"pictures of {height} x {width} pixels: the map at stride {stride} has {height // stride} x "
                    f"{width // stride} tokens, fewer than sr_ratio = {ratio} per side"
                )
        return [(height // stride, width // stride) for stride in self.strides]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """As a detector's backbone: maps ``(B, D_s, H / t_s, W / t_s)`` of all stages. The class token is not used.

        Args:
            images: ``(B, 3, H, W)``, normalised; both sides multiples of the last stride.

        Raises:
            InputError: A wrong shape.
        """
        self._check(images)
        maps = []
        for stage in self.stages:
            tokens, grid = stage(images)
            images = tokens.transpose(1, 2).unflatten(2, grid)
            maps.append(images)
        return maps

    @property
    def strides(self) -> tuple[int, ...]:
        """t_s of the maps of ``feature_maps``."""
        return tuple(self.patch_size * MERGED**s for s in range(len(self.dims)))

    def without_class_token(self) -> Self:
        """This network, changed: no class token and no row for it in the last position table.

        What ``feature_maps`` gives is the same. Every parameter but the last norm's then has a gradient in a detector.
        """
        last: Any = self.stages[-1]
        if self.cls_token is not None:
            self.cls_token = None
            last.positions = nn.Parameter(last.positions.detach()[:, 1:].clone())
            last.prefix = 0
        return self

    def forward(self, batch: Batch) -> Features:
        """Reads ``image (B, 3, H, W)``. Raises ``InputError`` for a wrong shape."""
        maps: Tensor = batch["image"]
        self._check(maps)
        for stage in self.stages[:-1]:
            tokens, grid = stage(maps)
            maps = tokens.transpose(1, 2).unflatten(2, grid)
        tokens, grid = self.stages[-1](maps, self.cls_token)
        tokens = self.norm(tokens)
        if self.cls_token is None:
            return Features(pooled=tokens.mean(dim=1), tokens=tokens, grid=grid)
        return Features(pooled=tokens[:, 0], tokens=tokens[:, 1:], grid=grid)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W)")
        self.grids(images.shape[2], images.shape[3])


def check_stages(
    dims: Sequence[int], depths: Sequence[int], heads: Sequence[int], mlp_ratios: Sequence[float],
    sr_ratios: Sequence[int], *, class_token: bool,
) -> None:  # fmt: skip
    """Raises ``InputError`` where the settings of the stages do not fit each other."""
    given = {"dims": dims, "depths": depths, "heads": heads, "mlp_ratios": mlp_ratios, "sr_ratios": sr_ratios}
    if len({len(values) for values in given.values()}) != 1 or not dims:
        counts = ", ".join(f"{name} has {len(values)}" for name, values in given.items())
        raise InputError(f"every stage needs one value of each: {counts}")
    for name, values in given.items():
        if min(values) <= 0:
            raise InputError(f"{name} = {list(values)}: expected values above 0")
    for dim, count in zip(dims, heads, strict=True):
        if dim % count:
            raise InputError(f"a width of {dim} cannot be shared by {count} heads; dims {list(dims)}, {list(heads)}")
    if class_token and sr_ratios[-1] != 1:
        raise InputError(
            f"sr_ratios = {list(sr_ratios)}: the last must be 1 with a class token, which has no place in a map; or "
            "choose class_token = false"
        )


# ---------------------------------------------------------------------------------------------------- weights


def load_dpt_weights(encoder: DPT, path: str | Path) -> None:
    """Fill ``encoder`` with an export's weights or with those of the published code; a classifier is left out.

    The published code numbers its stages from 1: ``patch_embed2.output_proj.weight``, ``pos_embed2``, ``block2.0...``.

    Raises:
        DataError: The file cannot be read, or is of another architecture; the message lists what differs.
    """
    state = {_own_name(name): value for name, value in read_weights(path).items() if not name.startswith("head.")}
    follow = ("value_spatial_shapes", "value_level_start_index", "box_coder.anchor")  # from the size of the picture
    load_strictly(encoder, {k: v for k, v in state.items() if not k.endswith(follow)}, source=str(path))


def _own_name(name: str) -> str:
    parts = {"patch_embed": "embed", "pos_embed": "positions", "block": "blocks"}
    found = re.match(r"(patch_embed|pos_embed|block)(\d+)(.*)", name)
    return f"stages.{int(found[2]) - 1}.{parts[found[1]]}{found[3]}" if found else name


# --------------------------------------------------------------------------------------------------- settings


class DPTConfig(BaseModel):
    """Settings of ``detection:dpt``. By default DPT-Tiny."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: int | tuple[int, int] = Field(
        default=224, description="Side of square pictures, or [height, width], in pixels; multiples of the last stride."
    )
    dims: tuple[int, ...] = Field(default=(64, 128, 320, 512), strict=False, description="Width of every stage.")
    depths: tuple[int, ...] = Field(default=(2, 2, 2, 2), strict=False, description="Blocks of every stage.")
    heads: tuple[int, ...] = Field(default=(1, 2, 5, 8), strict=False, description="Attention heads of every stage.")
    mlp_ratios: tuple[float, ...] = Field(
        default=(8.0, 8.0, 4.0, 4.0), strict=False, description="Hidden width of the MLPs over dims, per stage."
    )
    sr_ratios: tuple[int, ...] = Field(
        default=(8, 4, 2, 1), strict=False, description="How much smaller the map of keys and values is, per stage."
    )
    patch_size: int = Field(default=4, ge=1, description="Side of the patches of pixels; later stages merge 2 x 2.")
    points_per_side: int = Field(default=3, ge=2, description="Points read per side of a deformable patch.")
    patches: Patches = Field(
        default="deformable",
        description="From the second stage on: deformable; frozen: the same layers, boxes never trained; fixed: PVT.",
    )
    class_token: bool = Field(default=True, description="The embedding: the class token, or the mean of the tokens.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Largest rate of stochastic depth.")
    weights: str | None = Field(
        default=None, description="First weights: a file of an export or of the published code (tensors only)."
    )
    resize: Literal["squash", "crop"] = Field(
        default="squash", description="squash: the whole picture; crop: shorter side, then the centre."
    )
    crop_pct: float = Field(
        default=1.0, gt=0, le=1, description="With resize = 'crop': share of the side that is kept."
    )
    mean: tuple[float, float, float] = Field(default=IMAGENET_MEAN, strict=False, description="Of red, green, blue.")
    std: tuple[float, float, float] = Field(default=IMAGENET_STD, strict=False, description="Of red, green, blue.")

    @model_validator(mode="before")
    @classmethod
    def _image_size_is_a_pair(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("image_size"), list):
            values = {**values, "image_size": tuple(values["image_size"])}
        return values

    @model_validator(mode="after")
    def _it_can_be_built(self) -> Self:
        try:
            with torch.device("meta"):  # every check of the network, without its weights
                DPT(**self.architecture())
        except InputError as error:
            raise ValueError(str(error)) from error
        return self

    def architecture(self) -> dict[str, Any]:
        """The arguments of the encoder but for the preprocessing."""
        others = {"weights", "resize", "crop_pct", "mean", "std"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in others}

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            size=self.image_size, mean=self.mean, std=self.std, resize=self.resize, crop_pct=self.crop_pct
        )


def tiny() -> dict[str, Any]:
    """DPT-Tiny: 15.2 M parameters with the classifier of ImageNet."""
    return _published(2, 2, 2, 2)


def small() -> dict[str, Any]:
    """DPT-Small: 26.4 M parameters."""
    return _published(3, 4, 6, 3)


def medium() -> dict[str, Any]:
    """DPT-Medium: 46.1 M parameters."""
    return _published(3, 4, 18, 3)


def _published(*depths: int) -> dict[str, Any]:
    fields = DPTConfig.model_fields
    shared = ("image_size", "dims", "heads", "mlp_ratios", "sr_ratios", "patch_size", "points_per_side")
    return {name: fields[name].default for name in shared} | {"depths": depths}
