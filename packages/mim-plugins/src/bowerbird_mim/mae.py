"""Masked autoencoders: a quarter of the patches is encoded, a light decoder restores the pixels of the others.

He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (arXiv 2111.06377).
The default target is the per-patch normalised picture, as in the official recipe; the paper's tables use raw pixels
(``norm_pix_loss = false``).

B batch, L patches, V visible patches, D encoder width, E decoder width, P numbers per patch (p * p * C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_mim.patches import normalize_patches, patchify, sincos_position_embedding, unpatchify
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.views import View
from bowerbird_mim.vit import ViTEncoder, initialize, vit_of

__all__ = [
    "MAEConfig", "MAEObjective", "MAEOutput", "MaskPlan", "MaskedAutoencoder", "MaskedDecoder",
    "masked_reconstruction_loss", "patchify", "random_mask", "sincos_position_embedding", "unpatchify",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ mask and loss


@dataclass(frozen=True)
class MaskPlan:
    """Which patches are visible.

    Attributes:
        ids_keep: int64 ``(B, V)``: visible patches, by ascending noise.
        mask: ``(B, L)``, 1 at masked patches, 0 at visible ones, in the dtype of the noise.
        ids_restore: int64 ``(B, L)``: where each patch lies in [visible, masked].
    """

    ids_keep: Tensor
    mask: Tensor
    ids_restore: Tensor


def random_mask(noise: Tensor, mask_ratio: float) -> MaskPlan:
    """Per picture, the ``int(L * (1 - mask_ratio))`` patches with the smallest noise stay visible.

    Args:
        noise: ``(B, L)``, uniform in [0, 1).
        mask_ratio: In (0, 1).

    Raises:
        InputError: A wrong shape or ratio, or no patch would be masked, or none kept.
    """
    if noise.ndim != 2:
        raise InputError(f"noise has shape {tuple(noise.shape)}; expected (B, L), one value per patch")
    if not 0 < mask_ratio < 1:
        raise InputError(f"mask_ratio = {mask_ratio}: expected a share between 0 and 1, both excluded")
    length = noise.shape[1]
    visible = int(length * (1 - mask_ratio))
    if not 0 < visible < length:
        raise InputError(
            f"mask_ratio = {mask_ratio} of {length} patches keeps {visible}: at least one must be kept and one masked"
        )
    order = noise.argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    mask = (ids_restore >= visible).to(noise.dtype)
    return MaskPlan(ids_keep=order[:, :visible], mask=mask, ids_restore=ids_restore)


def masked_reconstruction_loss(pred: Tensor, target: Tensor, mask: Tensor, norm_pix: bool = True) -> Tensor:
    """Mean squared error over the numbers of masked patches: a scalar, in float32 at least.

    Args:
        pred: ``(B, L, P)``.
        target: ``(B, L, P)``, the patches of the picture (``patchify``), not yet normalised.
        mask: ``(B, L)``, 1 or true at masked patches.
        norm_pix: Normalise every target patch to mean 0 and unbiased variance 1 first.

    Raises:
        InputError: Shapes that do not fit, no masked patch, or patches of one number that should be normalised.
    """
    if pred.shape != target.shape or pred.ndim != 3 or mask.shape != pred.shape[:2]:
        raise InputError(
            f"pred {tuple(pred.shape)}, target {tuple(target.shape)} and mask {tuple(mask.shape)} do not fit: expected "
            "(B, L, P), (B, L, P) and (B, L)"
        )
    pred, target = at_least_float32(pred), at_least_float32(target)
    weights = mask.to(pred.dtype)
    total = weights.sum()
    if not torch.compiler.is_compiling() and total == 0:
        raise InputError("mask has no masked patch: there is nothing to predict")
    if norm_pix:
        target = normalize_patches(target)
    error = (pred - target).square().mean(dim=-1)  # (B, L)
    return (error * weights).sum() / total


# ------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class MAEOutput:
    """``loss``: scalar; ``pred``: ``(B, L, P)``; ``mask``: ``(B, L)``; ``latent``: ``(B, 1 + V, D)``."""

    loss: Tensor
    pred: Tensor
    mask: Tensor
    latent: Tensor


class MaskedDecoder(nn.Module):
    """From the tokens of visible patches to predictions for all patches.

    ``decoder_embed`` (D to E), mask tokens at the masked places, the class token in front, fixed positions added to all
    L + 1 tokens, blocks, layer norm, ``decoder_pred`` (E to P).
    """

    def __init__(self, encoder: ViTEncoder, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        if dim < 4 or heads < 1 or dim % 4 or dim % heads:
            raise InputError(f"decoder_dim = {dim} must be a multiple of 4 and of decoder_heads = {heads}")
        if depth < 0:
            raise InputError(f"decoder_depth = {depth}: expected a number of blocks, 0 or more")
        self.decoder_embed = nn.Linear(encoder.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = sincos_position_embedding(dim, encoder.grid, class_token=True)[None]
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(encoder.make_block(dim=dim, num_heads=heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=encoder.layer_norm_eps)
        self.decoder_pred = nn.Linear(dim, encoder.patch_size**2 * encoder.in_channels)
        initialize(self, "xavier")
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """``(B, 1 + V, D)`` and ``(B, L)`` to ``(B, L, P)``."""
        x = self.decoder_embed(latent)  # (B, 1 + V, E)
        masked = ids_restore.shape[1] + 1 - x.shape[1]
        fill = self.mask_token.to(x.dtype).expand(len(x), masked, -1)
        patches = torch.cat([x[:, 1:], fill], dim=1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def predict(self, latent: Tensor, ids_keep: Tensor, ids_masked: Tensor, *, masked_only: bool = True) -> Tensor:
        """The numbers of ``forward`` for less work; patches in the order that the ids have.

        Before the first block a masked place is the mask token plus its position: equal in all pictures, so the first
        block's norm, queries, keys and values of it are computed once per place. In the last block, masked places ask
        the others, and nobody asks the visible ones any more. Attention does not depend on the order of tokens, so none
        is put back.

        Args:
            latent: ``(B, 1 + V, D)``, the class token first.
            ids_keep: int64 ``(B, V)``: the patches of ``latent``.
            ids_masked: int64 ``(B, L - V)``: all others.
            masked_only: Leave out the visible patches.

        Returns:
            ``(B, L - V, P)`` in the order of ``ids_masked``, or ``(B, L, P)`` in that of ``[ids_keep, ids_masked]``.
        """
        seen = self.decoder_embed(latent)  # (B, 1 + V, E)
        table = self.decoder_pos_embed[0]
        places = F.embedding(ids_keep + 1, table)
        seen = torch.cat([seen[:, :1] + table[:1], seen[:, 1:] + places], dim=1)
        unseen = self.mask_token[0] + table[1:]  # (L, E): one row per place, for the whole batch
        first = 1 + ids_keep.shape[1] if masked_only else 1  # the first token whose prediction is wanted
        block: Any
        for i, block in enumerate(self.decoder_blocks):
            start = first if i == len(self.decoder_blocks) - 1 else 0
            if i == 0:
                qkv = block.attn.qkv(block.norm1(seen))
                shared = F.embedding(ids_masked, block.attn.qkv(block.norm1(unseen)).to(qkv.dtype))
                x = torch.cat([seen, F.embedding(ids_masked, unseen).to(seen.dtype)], dim=1)
                x = attended(block, x, torch.cat([qkv, shared], dim=1), start)
            else:
                x = attended(block, x, block.attn.qkv(block.norm1(x)), start)
        if not self.decoder_blocks:
            x = torch.cat([seen, F.embedding(ids_masked, unseen).to(seen.dtype)], dim=1)[:, first:]
        return self.decoder_pred(self.decoder_norm(x))


def attended(block: Any, x: Tensor, qkv: Tensor, start: int) -> Tensor:
    """What a block of ``ViTEncoder.make_block`` makes of the tokens from ``start`` on; all of them are attended to.

    Args:
        block: A timm ``Block``.
        x: ``(B, T, E)``.
        qkv: ``(B, T, 3 E)``, queries, keys and values of ``x`` after the block's first norm.
        start: The first token that is wanted.
    """
    batch, length, width = x.shape
    heads = block.attn.num_heads
    query, key, value = qkv.reshape(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query[:, :, start:], key, value)
    x = x[:, start:] + block.attn.proj(mixed.transpose(1, 2).reshape(batch, length - start, width))
    return x + block.mlp(block.norm2(x))


class MaskedAutoencoder(nn.Module):
    """Encoder of visible patches, decoder of all of them, loss on the masked ones.

    Args:
        encoder: The ViT that is kept after training.
        decoder_dim: E, a multiple of 4 and of ``decoder_heads``.
        decoder_depth: Number of the decoder's blocks.
        decoder_heads: Its attention heads.
        norm_pix_loss: Predict normalised patches.

    Raises:
        InputError: Another encoder, or sizes that do not fit each other.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = vit_of(encoder, "a masked autoencoder")
        self.decoder = MaskedDecoder(encoder, decoder_dim, decoder_depth, decoder_heads)
        self.norm_pix_loss = norm_pix_loss

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> MAEOutput:
        """Loss of one random mask.

        Args:
            images: ``(B, C, H, W)`` of the encoder's size.
            mask_ratio: In (0, 1).
            noise: ``(B, L)`` that decides the masks; drawn from torch's generator if it is not given.

        Raises:
            InputError: Pictures of another size than the encoder's, or a noise of another shape.
        """
        noise = checked_noise(self.encoder, images, noise)
        plan = random_mask(noise, mask_ratio)
        latent = self.encoder.tokens(images, ids_keep=plan.ids_keep)
        pred = self.decoder(latent, plan.ids_restore)
        target = patchify(images, self.encoder.patch_size)
        loss = masked_reconstruction_loss(pred, target, plan.mask, self.norm_pix_loss)
        return MAEOutput(loss=loss, pred=pred, mask=plan.mask, latent=latent)


def checked_noise(encoder: ViTEncoder, images: Tensor, noise: Tensor | None) -> Tensor:
    """``noise`` or fresh noise ``(B, L)``. Raises ``InputError`` where pictures or noise do not fit the encoder.

    An empty batch does not fit, either: its loss would be the mean of nothing.
    """
    if encoder.check_images(images) != encoder.grid:
        raise InputError(
            f"images are {images.shape[2]} x {images.shape[3]} pixels; the decoder's positions are for "
            f"{encoder.image_size[0]} x {encoder.image_size[1]}"
        )
    if not len(images):
        raise InputError(f"images have shape {tuple(images.shape)}: expected at least one picture")
    length = encoder.grid[0] * encoder.grid[1]
    if noise is None:
        return torch.rand(len(images), length, device=images.device)
    if noise.shape != (len(images), length):
        raise InputError(f"noise has shape {tuple(noise.shape)}; expected ({len(images)}, {length})")
    return noise


# ------------------------------------------------------------------------------------------------ objective


class PixelConfig(BaseModel):
    """What methods that restore pixels with a decoder share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    norm_pix_loss: bool = Field(default=True, description="Predict patches normalised to mean 0 and variance 1.")
    decoder_dim: int = Field(default=512, ge=4, description="Width of the decoder.")
    decoder_depth: int = Field(default=8, ge=0, description="Number of the decoder's blocks.")
    decoder_heads: int = Field(default=16, ge=1, description="Attention heads of the decoder.")
    crop_scale: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(0.2, 1.0), description="Range of the random crop's share of the picture."
    )

    def autoencoder(self, encoder: ViTEncoder) -> MaskedAutoencoder:
        return MaskedAutoencoder(
            encoder,
            decoder_dim=self.decoder_dim,
            decoder_depth=self.decoder_depth,
            decoder_heads=self.decoder_heads,
            norm_pix_loss=self.norm_pix_loss,
        )


class MAEConfig(PixelConfig):
    """Settings of ``mim:mae``."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="Share of the patches that is hidden.")


@dataclass(frozen=True)
class NoisyView:
    """One random crop and flip, and a number per patch that decides the masks: entries ``image`` and ``noise``."""

    view: View
    num_patches: int

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        image = self.view(item["image"], generator)
        return {"image": image, "noise": generator.random(self.num_patches, np.float32)}


def noisy_view(encoder: ViTEncoder, crop_scale: tuple[float, float]) -> NoisyView:
    assert encoder.preprocessing is not None
    return NoisyView(View(preprocessing=encoder.preprocessing, scale=crop_scale), encoder.grid[0] * encoder.grid[1])


class MAEObjective(Objective):
    """``mim:mae``. The decoder is thrown away; the exported encoder sees all patches."""

    def __init__(self, model: MaskedAutoencoder, config: MAEConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    @property
    def encoder(self) -> ViTEncoder:  # type: ignore[override]  # one owner: a second one would store it twice
        return self.model.encoder

    @classmethod
    def build(cls, config: MAEConfig, encoder: Encoder, context: BuildContext) -> Self:
        vit = vit_of(encoder, "mim:mae")
        random_mask(torch.zeros(1, vit.grid[0] * vit.grid[1]), config.mask_ratio)  # refuses an impossible ratio now
        return cls(config.autoencoder(vit), config)

    def item_transform(self) -> ItemTransform:
        return noisy_view(self.model.encoder, self.config.crop_scale)

    def forward(self, batch: Batch) -> LossOutput:
        output = self.model(batch["image"], self.config.mask_ratio, batch["noise"])
        return LossOutput(total=output.loss)
