"""MIMDet: a plain ViT, pre-trained by masked image modelling, as the backbone of a detector.

Fang, Yang, Wang, Ge, Shan, Wang: Unleashing Vanilla Vision Transformer with Masked Image Modeling for Object Detection,
ICCV 2023 (arXiv 2204.02964), in the form of its second version.

A small convolutional stem makes the tokens and the finest maps of the pyramid. In training the ViT sees a random part
of the tokens, and a light decoder, MAE's own, fills in the others. There is no class token anywhere.

B batch, H x W padded picture, p = 2^depth stride of the tokens (16), L = HW / p^2 tokens, K kept ones, D width of the
encoder, E width of the decoder. Parameters have the names of the authors' code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bowerbird.errors import InputError
from bowerbird_detection.mimdet_parts import (
    ConvStem,
    PatchStem,
    StemMaps,
    fixed_table,
    resize_positions,
    sincos_positions,
)
from bowerbird_detection.mimdet_weights import LoadReport, load_mae_checkpoint

__all__ = [
    "ConvStem", "LoadReport", "MIMDetBackbone", "MIMDetDecoder", "MIMDetEncoder", "PatchStem", "SampledTokens",
    "StemMaps", "load_mae_checkpoint", "mimdet_param_groups", "padding_mask_of", "resize_positions", "sample_tokens",
    "sincos_positions",
]  # fmt: skip

Fill = Literal["conv", "mask_token"]


# ----------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class SampledTokens:
    """A random part of the tokens of every picture.

    Attributes:
        tokens: ``(B, K, D)``, by ascending noise: not in the order of the picture.
        keep_ids: int64 ``(B, K)``, which tokens they are.
        restore_ids: int64 ``(B, L)``, the place of every token in the order of the noise; below K: kept.
    """

    tokens: Tensor
    keep_ids: Tensor
    restore_ids: Tensor


def sample_tokens(
    tokens: Tensor,
    ratio: float,
    padding_mask: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampledTokens:
    """Keep the ``K = int(L * ratio)`` tokens (at least one) with the smallest noise; padding comes last.

    Args:
        tokens: ``(B, L, D)``.
        ratio: In (0, 1].
        padding_mask: bool ``(B, L)`` or ``(B, rows, columns)``, true at tokens of padding. They are kept only where K
            exceeds the number of the others.
        noise: ``(B, L)``, below 100; drawn uniformly in [0, 1) if it is not given.
        generator: Of the noise; torch's global one by default.

    Raises:
        InputError: A ratio outside (0, 1], or shapes that do not fit.
    """
    if tokens.ndim != 3 or not tokens.shape[1]:
        raise InputError(f"tokens have shape {tuple(tokens.shape)}; expected (B, L, D) with at least one token")
    _check_ratio(ratio, "ratio")
    batch, length, width = tokens.shape
    if noise is None:
        device = tokens.device if generator is None else generator.device
        noise = torch.rand(batch, length, device=device, generator=generator)
    noise = noise.to(tokens.device)
    _check_noise(noise, (batch, length))
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool or padding_mask.flatten(1).shape != noise.shape:
            raise InputError(
                f"padding_mask is {padding_mask.dtype} {tuple(padding_mask.shape)}; expected bool {(batch, length)}, "
                "true at padding"
            )
        noise = noise.masked_fill(padding_mask.flatten(1).to(noise.device), 100.0)
    kept = max(1, int(length * ratio))
    order = noise.argsort(dim=1, stable=True)
    keep_ids = order[:, :kept]
    return SampledTokens(
        tokens=tokens.gather(1, keep_ids[..., None].expand(-1, -1, width)),
        keep_ids=keep_ids,
        restore_ids=order.argsort(dim=1),
    )


def padding_mask_of(image_sizes: Sequence[Sequence[int]] | Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """bool ``(B, rows, columns)``, true at tokens that hold no pixel of the picture.

    Args:
        image_sizes: ``(B, 2)``, height and width of every picture before it was padded.
        grid: Rows and columns of tokens of the padded batch.
        patch_size: p.
    """
    sizes = torch.as_tensor(image_sizes)
    if sizes.ndim != 2 or sizes.shape[1] != 2:
        raise InputError(f"image_sizes have shape {tuple(sizes.shape)}; expected (B, 2): height and width of each")
    rows, columns = (torch.arange(side, device=sizes.device) * patch_size for side in grid)  # first pixel of a cell
    below = rows[None] >= sizes[:, :1]
    beside = columns[None] >= sizes[:, 1:]
    return below[:, :, None] | beside[:, None, :]


def _check_noise(noise: Tensor, shape: tuple[int, int]) -> None:
    if noise.shape != shape:
        raise InputError(f"noise has shape {tuple(noise.shape)}; expected {shape}, one value per token")


def _check_ratio(ratio: float, name: str) -> None:
    if not 0 < ratio <= 1:
        raise InputError(f"{name} = {ratio}: expected a share of the tokens above 0 and at most 1")


# -------------------------------------------------------------------------------------------------- encoder, decoder


class MIMDetEncoder(nn.Module):
    """Stem and pre-norm ViT blocks without a class token.

    Args:
        image_size: Side of square pictures, or (height, width), for whose grid the table of positions is made.
        in_chans: Channels of the picture.
        embed_dim: D, a multiple of ``num_heads``, of 4 and as the stem needs.
        depth, num_heads, mlp_ratio: Of the blocks.
        drop_path: Largest rate of stochastic depth; it grows linearly from 0 over the blocks.
        norm_eps: Of the layer norms.
        stem: What makes tokens of pictures; by default ``ConvStem(in_chans, embed_dim)``.
        checkpointing: Compute the blocks again in the backward pass rather than keep what is inside of them.

    Raises:
        InputError: Sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 800,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        stem: ConvStem | PatchStem | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.patch_embed = ConvStem(in_chans, embed_dim) if stem is None else stem
        self.patch_size = self.patch_embed.stride
        if self.patch_embed.embed_dim != embed_dim:
            raise InputError(f"embed_dim = {embed_dim}, but the stem gives tokens of {self.patch_embed.embed_dim}")
        self.grid = _grid_of(image_size, self.patch_size)
        self.embed_dim, self.checkpointing = embed_dim, checkpointing
        self.pos_embed = fixed_table(embed_dim, self.grid)
        self.blocks = _blocks(embed_dim, depth, num_heads, mlp_ratio, norm_eps, drop_path)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        _xavier(self.blocks)

    def tokens(self, c4: Tensor) -> Tensor:
        """The stem's map ``(B, D, rows, columns)`` as tokens with positions ``(B, L, D)``, row by row."""
        grid = (c4.shape[2], c4.shape[3])
        return c4.flatten(2).transpose(1, 2) + resize_positions(self.pos_embed[:, 1:], self.grid, grid)

    def encode(self, tokens: Tensor) -> Tensor:
        """Blocks and the last norm: ``(B, K, D)`` to ``(B, K, D)``."""
        return self.norm(_through(self.blocks, tokens, self.checkpointing and self.training))


class MIMDetDecoder(nn.Module):
    """Fills in the tokens that the encoder did not see, and mixes all of them; the first blocks of MAE's decoder.

    Args:
        encoder_dim: D.
        image_size, patch_size: For whose grid the table of positions is made; as the encoder's.
        embed_dim: E, a multiple of ``num_heads`` and of 4.
        depth, num_heads, mlp_ratio, norm_eps: Of the blocks.
        fill: What stands where a token was dropped: ``conv``, a projection of the stem's map (version 2 of the paper),
            or ``mask_token``, one learned vector for all (version 1).
        checkpointing: As in ``MIMDetEncoder``.

    Raises:
        InputError: Sizes that do not fit each other.
    """

    def __init__(
        self,
        encoder_dim: int,
        *,
        image_size: int | tuple[int, int] = 800,
        patch_size: int = 16,
        embed_dim: int = 512,
        depth: int = 4,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-5,
        fill: Fill = "conv",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if fill not in ("conv", "mask_token"):
            raise InputError(f"fill = {fill!r}: expected conv or mask_token")
        self.grid = _grid_of(image_size, patch_size)
        self.encoder_dim, self.embed_dim, self.fill, self.checkpointing = encoder_dim, embed_dim, fill, checkpointing
        self.decoder_embed = nn.Linear(encoder_dim, embed_dim)
        if fill == "conv":
            self.conv_feat_proj = nn.Linear(encoder_dim, embed_dim)
        else:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            nn.init.normal_(self.mask_token, std=0.02)
        self.decoder_pos_embed = fixed_table(embed_dim, self.grid)
        self.decoder_blocks = _blocks(embed_dim, depth, num_heads, mlp_ratio, norm_eps)
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        _xavier(self)

    def forward(self, encoded: Tensor, keep_ids: Tensor, c4: Tensor) -> Tensor:
        """All tokens ``(B, L, E)``, row by row.

        Args:
            encoded: ``(B, K, D)`` of the encoder.
            keep_ids: int64 ``(B, K)``, which tokens these are.
            c4: The stem's map ``(B, D, rows, columns)``, without positions.
        """
        grid = (c4.shape[2], c4.shape[3])
        x = self.decoder_embed(encoded)
        if self.fill == "conv":
            others = self.conv_feat_proj(c4.flatten(2).transpose(1, 2))
        else:
            others = self.mask_token.expand(len(x), grid[0] * grid[1], -1)
        x = others.to(x.dtype).scatter(1, keep_ids[..., None].expand(-1, -1, x.shape[-1]), x)
        x = x + resize_positions(self.decoder_pos_embed[:, 1:], self.grid, grid)
        return self.decoder_norm(_through(self.decoder_blocks, x, self.checkpointing and self.training))


def _grid_of(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1 or height % patch_size or width % patch_size:
        raise InputError(f"image_size = {height} x {width}: expected multiples of the tokens' stride, {patch_size}")
    return height // patch_size, width // patch_size


def _blocks(
    dim: int, depth: int, num_heads: int, mlp_ratio: float, norm_eps: float, drop_path: float = 0.0
) -> nn.ModuleList:
    if num_heads < 1 or dim % num_heads or depth < 0 or not mlp_ratio > 0 or not 0 <= drop_path < 1:
        raise InputError(
            f"width {dim}, num_heads = {num_heads}, depth = {depth}, mlp_ratio = {mlp_ratio}, drop_path = {drop_path}: "
            "expected a width that is a multiple of num_heads, 0 or more, above 0, and 0 to below 1"
        )
    norm: Any = partial(nn.LayerNorm, eps=norm_eps)
    rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
    return nn.ModuleList(
        Block(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
    )


def _xavier(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def _through(blocks: nn.ModuleList, x: Tensor, checkpointing: bool) -> Tensor:
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    return x


# ----------------------------------------------------------------------------------------------------------- backbone


class MIMDetBackbone(nn.Module):
    """Pictures to maps c2 to c5, a random part of the tokens going through the encoder.

    Args:
        encoder, decoder: Made for the same width of tokens.
        train_ratio: Share of the tokens that the encoder sees in training mode, in (0, 1].
        test_ratio: The same in eval mode; below 1 the result is random. More than in training is better: use 1.

    ``channels`` are those of the four maps: (D/4, D/2, E, E); ``strides`` with p = 16: (4, 8, 16, 32).

    Raises:
        InputError: A ratio outside (0, 1], or parts that do not fit each other.
    """

    def __init__(
        self, encoder: MIMDetEncoder, decoder: MIMDetDecoder, train_ratio: float = 0.5, test_ratio: float = 1.0
    ) -> None:
        super().__init__()
        _check_ratio(train_ratio, "train_ratio")
        _check_ratio(test_ratio, "test_ratio")
        if decoder.encoder_dim != encoder.embed_dim:
            raise InputError(
                f"the decoder is for tokens of {decoder.encoder_dim}, the encoder gives tokens of {encoder.embed_dim}"
            )
        self.encoder, self.decoder = encoder, decoder
        self.train_ratio, self.test_ratio = train_ratio, test_ratio
        width, patch = encoder.embed_dim, encoder.patch_size
        self.channels = (width // 4, width // 2, decoder.embed_dim, decoder.embed_dim)
        self.strides = (patch // 4, patch // 2, patch, 2 * patch)

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[Sequence[int]] | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> OrderedDict[str, Tensor]:
        """``c2 (B, D/4, 4H/p, 4W/p)``, ``c3 (B, D/2, 2H/p, 2W/p)``, ``c4 (B, E, H/p, W/p)``, ``c5 (B, E, H/2p, W/2p)``.

        Args:
            images: ``(B, C, H, W)``, normalised, padded with zeros at the bottom and the right.
            image_sizes: ``(B, 2)``, heights and widths before padding; ``None``: there is no padding.
            noise, generator: See ``sample_tokens``.

        Raises:
            InputError: H or W is no multiple of 2p (32), or shapes do not fit.
        """
        self._check(images, image_sizes)
        stem = self.encoder.patch_embed(images)
        tokens = self.encoder.tokens(stem.c4)
        if noise is not None:
            _check_noise(noise, (tokens.shape[0], tokens.shape[1]))
        ratio = self.train_ratio if self.training else self.test_ratio
        if ratio == 1:  # every token is kept, and attention does not ask in which order: no noise, equal to the bit
            keep_ids = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        else:
            padding = None
            if image_sizes is not None:
                grid = (stem.c4.shape[2], stem.c4.shape[3])
                padding = padding_mask_of(image_sizes, grid, self.encoder.patch_size)
            sampled = sample_tokens(tokens, ratio, padding, noise, generator)
            tokens, keep_ids = sampled.tokens, sampled.keep_ids
        full = self.decoder(self.encoder.encode(tokens), keep_ids, stem.c4)
        c4 = full.transpose(1, 2).reshape(len(full), -1, *stem.c4.shape[2:])
        return OrderedDict(c2=stem.c2, c3=stem.c3, c4=c4, c5=functional.max_pool2d(c4, 2))

    def _check(self, images: Tensor, image_sizes: Sequence[Sequence[int]] | Tensor | None) -> None:
        channels, step = self.encoder.patch_embed.in_chans, 2 * self.encoder.patch_size
        if images.ndim != 4 or images.shape[1] != channels:
            raise InputError(f"images have shape {tuple(images.shape)}; expected (B, {channels}, H, W)")
        height, width = images.shape[2:]
        if min(height, width) < 1 or height % step or width % step:
            raise InputError(
                f"images are {height} x {width} pixels; both sides must be multiples of {step}: pad them with zeros at "
                "the bottom and the right and pass image_sizes"
            )
        if image_sizes is not None and len(image_sizes) != len(images):
            raise InputError(f"image_sizes are of {len(image_sizes)} pictures, images are {len(images)}")


# --------------------------------------------------------------------------------------------------- parameter groups


def mimdet_param_groups(
    model: nn.Module, base_lr: float, multiplier: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: what is new learns fast, what was pre-trained slowly, the stem in between.

    The stem gets ``base_lr``, the rest of the encoder ``base_lr / multiplier``, everything else (decoder, pyramid,
    heads) ``base_lr * multiplier``. Vectors and scalars (biases, norms) have no weight decay; position tables do not
    train at all. The authors use 2.0 with ViT-B and 3.5 with ViT-L.

    Args:
        model: A ``MIMDetBackbone``, or a model that holds one.
        base_lr, weight_decay: 8e-5 and 0.1 in the paper.
        multiplier: Above 0.

    Returns:
        Dicts with ``params``, ``lr`` and ``weight_decay``; every trainable parameter is in one of them.

    Raises:
        InputError: No ``MIMDetBackbone`` in the model, or a multiplier that is not above 0.
    """
    if not multiplier > 0:
        raise InputError(f"multiplier = {multiplier}: expected a number above 0")
    backbone = next((part for part in model.modules() if isinstance(part, MIMDetBackbone)), None)
    if backbone is None:
        raise InputError(f"{type(model).__name__} has no MIMDetBackbone: there are no parts of different pace")
    stem = {id(parameter) for parameter in backbone.encoder.patch_embed.parameters()}
    encoder = {id(parameter) for parameter in backbone.encoder.parameters()} - stem
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        lr = base_lr * multiplier
        if id(parameter) in stem:
            lr = base_lr
        elif id(parameter) in encoder:
            lr = base_lr / multiplier
        groups.setdefault((lr, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
