"""A plain vision transformer that can encode a part of its patches, and that timm can read.

The blocks are timm's; parameters have timm's names, so that weights go both ways. What timm's own model lacks is here:
encoding of chosen patches only, replacing patch embeddings by a mask token before positions are added, position tables
for other picture sizes as in DINO, and the attention of the last block.

B batch, C channels, H x W pixels, p patch side, L = rows x columns patches, V kept patches, D width, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features, TimmForm
from bowerbird_mim.patches import patch_grid, sincos_position_embedding

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

ImageSize = int | tuple[int, int]


def image_sides(size: ImageSize) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


class PatchEmbedding(nn.Module):
    """Convolution with kernel and stride p: ``(B, C, H, W)`` to ``(B, L, D)``, row by row."""

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ViTEncoder(Encoder):
    """A vision transformer with a class token; pre-norm blocks, exact GELU, a final layer norm.

    Args:
        image_size: Side of square pictures, or (height, width), in pixels.
        patch_size: p. Divides both sides.
        in_channels: C.
        embed_dim: D, a multiple of ``num_heads``, and of 4 with sine-cosine positions.
        depth: Number of blocks.
        num_heads: h.
        mlp_ratio: Hidden width of a block's perceptron, over D.
        position: ``sincos`` (fixed, of MAE) or ``learned`` (of DINO and timm).
        pooling: What ``Features.pooled`` is: ``mean`` of the patch tokens after the final norm, or the ``class`` token.
        drop_path: Largest rate of stochastic depth; it grows linearly from 0 over the blocks.
        init: First weights: ``xavier`` as MAE (Xavier-uniform, also for the patch convolution), or ``truncated`` as
            DINO (truncated normal of 0.02, the patch convolution as PyTorch does).
        layer_norm_eps: Of every layer norm.
        preprocessing: How a picture file is prepared; ``None`` where only tensors come.

    Raises:
        InputError: Sizes that do not divide each other, or values outside these ranges.
    """

    def __init__(
        self,
        *,
        image_size: ImageSize = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        position: Literal["sincos", "learned"] = "sincos",
        pooling: Literal["mean", "class"] = "mean",
        drop_path: float = 0.0,
        init: Literal["xavier", "truncated"] = "xavier",
        layer_norm_eps: float = 1e-6,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        height, width = image_sides(image_size)
        self.grid = patch_grid(height, width, patch_size)
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"embed_dim = {embed_dim} is no multiple of num_heads = {num_heads}")
        if in_channels < 1 or depth < 0 or not mlp_ratio > 0 or not 0 <= drop_path < 1:
            raise InputError(
                f"in_channels = {in_channels}, depth = {depth}, mlp_ratio = {mlp_ratio}, drop_path = {drop_path}: "
                "expected 1 or more, 0 or more, above 0, and 0 to below 1"
            )
        if position not in ("sincos", "learned"):
            raise InputError(f"position = {position!r}: expected sincos or learned")
        if pooling not in ("mean", "class"):
            raise InputError(f"pooling = {pooling!r}: expected mean or class")
        if init not in ("xavier", "truncated"):
            raise InputError(f"init = {init!r}: expected xavier or truncated")
        self.image_size, self.patch_size, self.in_channels = (height, width), patch_size, in_channels
        self.embed_dim, self.depth, self.num_heads, self.mlp_ratio = embed_dim, depth, num_heads, mlp_ratio
        self.layer_norm_eps, self.pooling, self.preprocessing = layer_norm_eps, pooling, preprocessing

        rows, columns = self.grid
        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if position == "sincos":
            table = sincos_position_embedding(embed_dim, self.grid, class_token=True)[None]
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns + 1, embed_dim))
        self.blocks = nn.ModuleList(self.make_block(drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        initialize(self, init)
        nn.init.normal_(self.cls_token, std=0.02)
        if position == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @classmethod
    def build(cls, config: ViTConfig) -> Self:
        """Raises ``DataError`` for weights that do not fit, naming what differs."""
        from bowerbird_mim.timm_weights import load_vit_weights  # reads files; not needed to build fresh networks

        encoder = cls(**config.architecture(), preprocessing=config.preprocessing())
        if config.weights is not None:
            load_vit_weights(encoder, config.weights, resize_positions=config.resize_positions)
        return encoder

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` without the source of the first weights: the weights lie beside it."""
        return {key: value for key, value in config.items() if key not in ("weights", "resize_positions")}

    def timm_form(self) -> TimmForm:
        """The timm model that gives the same embedding; see ``bowerbird_mim.timm_weights``."""
        from bowerbird_mim.timm_weights import vit_timm_form

        return vit_timm_form(self)

    def make_block(self, drop_path: float = 0.0, dim: int | None = None, num_heads: int | None = None) -> nn.Module:
        """A fresh block of this encoder's kind, or of another width: decoders are made of them."""
        return Block(
            dim or self.embed_dim,
            num_heads or self.num_heads,
            self.mlp_ratio,
            qkv_bias=True,
            drop_path=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=self.layer_norm_eps),  # type: ignore[arg-type]
        )

    # -------------------------------------------------------------------------------------------- tokens

    def check_images(self, images: Tensor) -> tuple[int, int]:
        """The grid of ``images``. Raises ``InputError`` for a wrong shape."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise InputError(
                f"images have shape {tuple(images.shape)}; this encoder needs (B, {self.in_channels}, H, W)"
            )
        return patch_grid(images.shape[2], images.shape[3], self.patch_size)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """``(1, 1 + rows * columns, D)``: the table, resized for another grid than its own (``resized_positions``)."""
        if grid == self.grid:
            return self.pos_embed
        return torch.cat([self.pos_embed[:, :1], resized_positions(self.pos_embed[:, 1:], self.grid, grid)], dim=1)

    def embed(
        self,
        images: Tensor,
        *,
        ids_keep: Tensor | None = None,
        token_mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Tokens before the first block: ``(B, 1 + V, D)``, the class token first.

        Args:
            images: ``(B, C, H, W)``.
            ids_keep: int64 ``(B, V)``: the patches to encode, in this order; by default all of them in their own order.
            token_mask: ``(B, L)``, true where ``mask_token`` takes the place of a patch's embedding, before positions.
            mask_token: ``(1, 1, D)``.
        """
        table = self.positions(self.check_images(images))
        tokens = self.patch_embed(images)  # (B, L, D)
        if token_mask is not None:
            assert mask_token is not None
            tokens = torch.where(token_mask[..., None], mask_token.to(tokens.dtype), tokens)
        tokens = tokens + table[:, 1:]
        if ids_keep is not None:
            tokens = tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))
        first = (self.cls_token + table[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([first.to(tokens.dtype), tokens], dim=1)

    def encode(self, tokens: Tensor) -> Tensor:
        """All blocks and the final norm: ``(B, 1 + V, D)`` to ``(B, 1 + V, D)``."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def tokens(self, images: Tensor, **chosen: Tensor | None) -> Tensor:
        """``encode(embed(images, ...))``: ``(B, 1 + V, D)``, the class token first."""
        return self.encode(self.embed(images, **chosen))

    def last_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens after the final norm ``(B, 1 + L, D)`` and the last block's attention ``(B, h, 1 + L, 1 + L)``."""
        tokens = self.embed(images)
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        last: Any = self.blocks[-1]
        attention = last.attn
        x = last.norm1(tokens)
        batch, length, _ = x.shape
        qkv = attention.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] * attention.scale @ qkv[1].transpose(-2, -1)).softmax(dim=-1)
        return self.norm(last(tokens)), weights

    def forward(self, batch: Batch) -> Features:
        images = batch["image"]
        grid = self.check_images(images)
        tokens = self.tokens(images)
        patches = tokens[:, 1:]
        pooled = patches.mean(dim=1) if self.pooling == "mean" else tokens[:, 0]
        return Features(pooled=pooled, tokens=patches, grid=grid)


def resized_positions(table: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Bicubic resampling of the codes ``(1, L, D)`` of the patches of the grid ``own``, for the patches of ``grid``.

    As in DINO the scale factors are (rows + 0.1) / own rows and (columns + 0.1) / own columns: where ``grid`` is
    ``own``, the result still differs a little from the table.
    """
    codes = table.reshape(1, *own, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / own[0], (grid[1] + 0.1) / own[1])
    resampled = F.interpolate(codes, scale_factor=scale, mode="bicubic")
    assert resampled.shape[-2:] == grid, (tuple(resampled.shape), grid)
    return resampled.flatten(2).transpose(1, 2)


def initialize(module: nn.Module, kind: Literal["xavier", "truncated"]) -> None:
    """First weights of every linear layer, layer norm and patch convolution below ``module``; see ``ViTEncoder``."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            if kind == "xavier":
                nn.init.xavier_uniform_(part.weight)
            else:
                nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbedding) and kind == "xavier":
            nn.init.xavier_uniform_(part.proj.weight.view(part.proj.out_channels, -1))


class PatchViTConfig(BaseModel):
    """What encoders made of patches and transformer blocks share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: ImageSize = Field(default=224, description="Side of square pictures, or [height, width], in pixels.")
    patch_size: int = Field(default=16, ge=1, description="Side of a patch; divides the sides of a picture.")
    embed_dim: int = Field(default=384, ge=4, description="Width of the tokens.")
    depth: int = Field(default=12, ge=1, description="Number of blocks.")
    num_heads: int = Field(default=6, ge=1, description="Attention heads; a divisor of embed_dim.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of a block's perceptron, over embed_dim.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Largest rate of stochastic depth.")
    weights: str | None = Field(
        default=None,
        description="First weights: a file of timm's model (.safetensors, or .pth with tensors only), or its folder.",
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
    def _sizes_divide_each_other(self) -> Self:
        try:
            patch_grid(*image_sides(self.image_size), self.patch_size)
        except InputError as error:
            raise ValueError(str(error)) from error
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is no multiple of num_heads = {self.num_heads}")
        return self

    def architecture(self) -> dict[str, Any]:
        """The arguments of the encoder but for the preprocessing."""
        others = {"weights", "resize_positions", "resize", "crop_pct", "mean", "std"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in others}

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            size=self.image_size, mean=self.mean, std=self.std, resize=self.resize, crop_pct=self.crop_pct
        )


class ViTConfig(PatchViTConfig):
    """Settings of ``mim:vit``."""

    position: Literal["sincos", "learned"] = Field(
        default="sincos", description="Fixed sine-cosine codes (MAE, SAIM) or a learned table (DINO, timm)."
    )
    pooling: Literal["mean", "class"] = Field(
        default="mean", description="The embedding: mean of the patch tokens, or the class token."
    )
    init: Literal["xavier", "truncated"] = Field(default="xavier", description="First weights: as MAE, or as DINO.")
    resize_positions: bool = Field(
        default=False, description="With weights of another size of pictures: resample their table of positions."
    )

    @model_validator(mode="after")
    def _codes_fit_the_width(self) -> Self:
        if self.position == "sincos" and self.embed_dim % 4:
            raise ValueError(f"embed_dim = {self.embed_dim}: sine-cosine positions need a multiple of 4")
        return self


def tiny() -> dict[str, Any]:
    """ViT-Tiny: 5.5 M parameters at 224 pixels."""
    return {"embed_dim": 192, "depth": 12, "num_heads": 3}


def small() -> dict[str, Any]:
    """ViT-Small: 22 M parameters."""
    return {"embed_dim": 384, "depth": 12, "num_heads": 6}


def base() -> dict[str, Any]:
    """ViT-Base: 86 M parameters."""
    return {"embed_dim": 768, "depth": 12, "num_heads": 12}


def large() -> dict[str, Any]:
    """ViT-Large: 303 M parameters."""
    return {"embed_dim": 1024, "depth": 24, "num_heads": 16}


def vit_of(encoder: Encoder, method: str) -> ViTEncoder:
    """``encoder`` as the plain ViT that ``method`` needs. Raises ``InputError`` for another network."""
    if not isinstance(encoder, ViTEncoder):
        raise InputError(
            f"{method} encodes chosen patches and needs the encoder mim:vit, not {type(encoder).__name__}; "
            "weights of a timm ViT can be loaded with encoder.weights"
        )
    return encoder
