"""MST: DINO whose student does not see some patches that its teacher finds unimportant, and restores the whole picture.

Li, Chen, Yang, Li, Zhu, Zhao, Deng, Wu, Zhao, Tang, Wang: MST: Masked Self-Supervised Transformer for Visual
Representation, NeurIPS 2021 (arXiv 2106.05656). No code was published; what the paper leaves open is in
docs/methods/mst.md.

B batch, L patches, h heads, D width, p patch side. Rows of the two global crops lie crop by crop, as in DINO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput
from bowerbird_mim.crops import MultiCrop
from bowerbird_mim.dino import DINOConfig, DINOObjective, SelfDistillation
from bowerbird_mim.distillation import GLOBAL_VIEWS, crop_major
from bowerbird_mim.patches import unpatchify
from bowerbird_mim.precision import at_least_float32
from bowerbird_mim.vit import ViTEncoder, initialize, vit_of

__all__ = [
    "GlobalImageDecoder", "MSTConfig", "MSTObjective", "MSTOutput", "MaskStrategy", "MaskedSelfDistillation",
    "attention_guided_mask", "class_attention", "restoration_loss", "tokens_and_class_attention",
]  # fmt: skip

MaskStrategy = Literal["none", "random", "attention_low"]


# ------------------------------------------------------------------------------------------------ mask and loss


def class_attention(attention: Tensor) -> Tensor:
    """How much the class token looks at every patch, mean over heads, without gradient: ``(B, L)``.

    Args:
        attention: ``(B, h, 1 + L, 1 + L)`` of the last block, softmax over the last axis; the class token is first.
    """
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3] or attention.shape[3] < 2:
        raise InputError(f"attention has shape {tuple(attention.shape)}; expected (B, heads, 1 + L, 1 + L)")
    return attention[:, :, 0, 1:].detach().mean(dim=1)


def attention_guided_mask(
    scores: Tensor, low_fraction: float = 0.25, mask_prob: float = 0.5, uniform: Tensor | None = None
) -> Tensor:
    """Which patches are hidden: bool ``(B, L)``.

    Candidates are the patches with scores below the k-th smallest of their picture (counted from 0), k =
    floor(L * low_fraction): the k least attended ones, fewer where scores are equal. A candidate is hidden where its
    ``uniform`` is below ``mask_prob``.

    Args:
        scores: ``(B, L)``.
        low_fraction: Share of the patches that are candidates, in [0, 1].
        mask_prob: In [0, 1].
        uniform: ``(B, L)``, uniform in [0, 1); drawn from torch's generator if it is not given.

    Raises:
        InputError: Shapes that do not fit, or shares outside [0, 1].
    """
    if scores.ndim != 2:
        raise InputError(f"scores have shape {tuple(scores.shape)}; expected (B, L)")
    if not (0 <= low_fraction <= 1 and 0 <= mask_prob <= 1):
        raise InputError(f"low_fraction = {low_fraction}, mask_prob = {mask_prob}: expected shares from 0 to 1")
    uniform = torch.rand(scores.shape, device=scores.device) if uniform is None else uniform
    if uniform.shape != scores.shape:
        raise InputError(f"uniform has shape {tuple(uniform.shape)}; expected {tuple(scores.shape)}")
    drawn = uniform < mask_prob
    length = scores.shape[1]
    k = math.floor(length * low_fraction + 1e-9)  # 196 * (1 / 7) is a little below 28
    if k == length:
        return drawn
    threshold = scores.sort(dim=1).values[:, k : k + 1]
    return (scores < threshold) & drawn


def restoration_loss(restored: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference over all pixels, in float32 at least: a scalar. Both ``(..., C, H, W)``."""
    if restored.shape != images.shape:
        raise InputError(f"restored {tuple(restored.shape)} and images {tuple(images.shape)} differ in shape")
    return F.l1_loss(at_least_float32(restored), images)


# ------------------------------------------------------------------------------------------------ model


def tokens_and_class_attention(encoder: ViTEncoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens after the final norm ``(B, 1 + L, D)``, and ``class_attention`` of the last block ``(B, L)``.

    Only the class token's row of the attention is computed a second time, not the whole matrix.
    """
    tokens = encoder.embed(images)
    for block in encoder.blocks[:-1]:
        tokens = block(tokens)
    last: Any = encoder.blocks[-1]
    attention, x = last.attn, last.norm1(tokens)
    batch, length, dim = x.shape
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(x[:, 0], weight[:dim], bias[:dim]).view(batch, encoder.num_heads, 1, -1)
    keys = F.linear(x, weight[dim : 2 * dim], bias[dim : 2 * dim]).view(batch, length, encoder.num_heads, -1)
    # In bfloat16 many patches would have equal scores.
    with torch.autocast(x.device.type, enabled=False):
        query, keys = at_least_float32(query), at_least_float32(keys)
        row = (query * attention.scale @ keys.permute(0, 2, 3, 1)).softmax(dim=-1)  # (B, h, 1, 1 + L)
    return encoder.norm(last(tokens)), row[:, :, 0, 1:].detach().mean(dim=1)


class GlobalImageDecoder(nn.Module):
    """From patch tokens to a picture: ``(B, L, D)`` and a grid to ``(B, C, rows * p, columns * p)``.

    Args:
        dim: D.
        patch_size: p; a power of 2 for ``conv``.
        channels: C.
        kind: ``conv``: log2(p) transposed convolutions (4 x 4, stride 2) with batch norm and ReLU that halve the
            channels down to 16, then a 3 x 3 convolution. ``linear``: one linear map per patch.

    Raises:
        InputError: An unknown kind, a size below 1, or ``conv`` for another ``patch_size`` than a power of 2.
    """

    def __init__(self, dim: int, patch_size: int, channels: int = 3, kind: Literal["conv", "linear"] = "conv") -> None:
        super().__init__()
        if kind not in ("conv", "linear"):
            raise InputError(f"kind = {kind!r}: expected conv or linear")
        if min(dim, patch_size, channels) < 1:
            raise InputError(f"dim = {dim}, patch_size = {patch_size}, channels = {channels}: all must be at least 1")
        self.dim = dim
        self.patch_size, self.channels, self.kind = patch_size, channels, kind
        if kind == "linear":
            self.layers: nn.Module = nn.Linear(dim, patch_size**2 * channels)
            initialize(self, "truncated")
            return
        if patch_size & (patch_size - 1):
            raise InputError(f"patch_size = {patch_size} is no power of 2: use the decoder kind 'linear'")
        parts: list[nn.Module] = []
        width = dim
        for _ in range(patch_size.bit_length() - 1):
            narrower = max(16, width // 2)
            # No bias: batch norm would take it away.
            parts += [nn.ConvTranspose2d(width, narrower, 4, 2, 1, bias=False), nn.BatchNorm2d(narrower), nn.ReLU()]
            width = narrower
        self.layers = nn.Sequential(*parts, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Raises ``InputError`` for tokens of another width or number than ``dim`` and ``grid`` say."""
        if tokens.ndim != 3 or tokens.shape[1:] != (grid[0] * grid[1], self.dim):
            raise InputError(
                f"tokens have shape {tuple(tokens.shape)}; a grid of {grid} needs (B, {grid[0] * grid[1]}, {self.dim})"
            )
        if self.kind == "linear":
            return unpatchify(self.layers(tokens), grid, self.patch_size, self.channels)
        return self.layers(tokens.transpose(1, 2).unflatten(2, grid))


@dataclass(frozen=True)
class MSTOutput:
    """Scalars, and what they were made of. Rows of the two global crops lie crop by crop.

    Attributes:
        loss: The weighted sum of the two.
        distillation: DINO's loss.
        restoration: Mean absolute error of the restored crops, or ``None`` without a decoder.
        mask: bool ``(2 * B, L)``, true where the student did not see a patch.
        reconstruction: ``(2 * B, C, H, W)``, or ``None``.
        scores: ``(2 * B, L)``: the teacher's class attention, or ``None`` where the strategy does not ask for it.
        student, teacher: Logits, as in ``DINOOutput``.
    """

    loss: Tensor
    distillation: Tensor
    restoration: Tensor | None
    mask: Tensor
    reconstruction: Tensor | None
    scores: Tensor | None
    student: Tensor
    teacher: Tensor


class MaskedSelfDistillation(nn.Module):
    """DINO with masked global crops for the student, and a decoder that restores them unmasked.

    Args:
        dino: Student, teacher and loss; the backbone is a ``ViTEncoder`` that pools its class token.
        decoder: From the student's patch tokens to pictures; ``None`` for no restoration.
        ce_weight, restore_weight: Of the two losses.
        mask_strategy: ``attention_low`` (MST), ``random`` (every patch with probability low_fraction * mask_prob: the
            same number on average) or ``none``.
        low_fraction, mask_prob: See ``attention_guided_mask``.

    Raises:
        InputError: Another backbone, or values outside their ranges.
    """

    def __init__(
        self,
        dino: SelfDistillation,
        decoder: GlobalImageDecoder | None,
        ce_weight: float = 1.0,
        restore_weight: float = 0.6,
        *,
        mask_strategy: MaskStrategy = "attention_low",
        low_fraction: float = 0.25,
        mask_prob: float = 0.5,
    ) -> None:
        super().__init__()
        vit = vit_of(dino.student.backbone, "mim:mst")
        if vit.pooling != "class":
            raise InputError(
                f"mim:mst reads the class token's attention, and this mim:vit pools {vit.pooling!r}: set "
                "encoder.pooling = 'class'"
            )
        if mask_strategy not in ("none", "random", "attention_low"):
            raise InputError(f"mask_strategy = {mask_strategy!r}: expected none, random or attention_low")
        if not (0 <= low_fraction <= 1 and 0 <= mask_prob <= 1):
            raise InputError(f"low_fraction = {low_fraction}, mask_prob = {mask_prob}: expected shares from 0 to 1")
        if not (ce_weight >= 0 and restore_weight >= 0):
            raise InputError(
                f"ce_weight = {ce_weight}, restore_weight = {restore_weight}: expected numbers of at least 0"
            )
        self.dino, self.decoder = dino, decoder
        self.ce_weight, self.restore_weight = ce_weight, restore_weight
        self.mask_strategy, self.low_fraction, self.mask_prob = mask_strategy, low_fraction, mask_prob
        # Without masks a token would be a parameter that no loss reaches.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim)) if mask_strategy != "none" else None
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    @property
    def vit(self) -> ViTEncoder:
        return vit_of(self.dino.student.backbone, "mim:mst")

    def forward(
        self, global_views: Tensor, local_views: Tensor | None = None, uniform: Tensor | None = None
    ) -> MSTOutput:
        """Both losses of a batch.

        Args:
            global_views: ``(B, 2, C, H, W)``.
            local_views: ``(B, n - 2, C, h, w)``, or none. They are never masked.
            uniform: ``(B, 2, L)`` that decides the masks; drawn from torch's generator if it is not given.

        Raises:
            InputError: Shapes that do not fit.
        """
        images, *small = self.dino.groups(global_views, local_views)
        grid = self.vit.check_images(images)
        if uniform is not None:
            if uniform.shape != (len(global_views), GLOBAL_VIEWS, grid[0] * grid[1]):
                raise InputError(
                    f"uniform has shape {tuple(uniform.shape)}; expected ({len(global_views)}, {GLOBAL_VIEWS}, "
                    f"{grid[0] * grid[1]})"
                )
            uniform = crop_major(uniform)
        teacher, scores = self.teach(images)
        mask = self.draw_mask(scores, uniform, (len(images), grid[0] * grid[1]), images.device)

        student = self.dino.student
        chosen = None if self.mask_token is None else mask
        tokens = self.vit.tokens(images, token_mask=chosen, mask_token=self.mask_token)
        logits = student.head(torch.cat([tokens[:, 0], *(student.backbone({"image": x}).pooled for x in small)]))
        distillation = self.dino.loss(logits, teacher)
        loss, restoration, restored = self.ce_weight * distillation, None, None
        if self.decoder is not None:
            restored = self.decoder(tokens[:, 1:], grid)
            restoration = restoration_loss(restored, images)
            loss = loss + self.restore_weight * restoration
        return MSTOutput(
            loss=loss,
            distillation=distillation,
            restoration=restoration,
            mask=mask,
            reconstruction=restored,
            scores=scores,
            student=logits,
            teacher=teacher,
        )

    @torch.no_grad()
    def teach(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits ``(N, K)`` of global crops, and its class attention ``(N, L)`` where masks need it."""
        network = self.dino.teacher_network
        if self.mask_strategy != "attention_low":
            return network(images), None
        tokens, scores = tokens_and_class_attention(vit_of(network.backbone, "mim:mst"), images)
        return network.head(tokens[:, 0]), scores

    def draw_mask(
        self, scores: Tensor | None, uniform: Tensor | None, shape: tuple[int, int], device: torch.device
    ) -> Tensor:
        """bool ``(N, L)``."""
        if self.mask_strategy == "none":
            return torch.zeros(shape, dtype=torch.bool, device=device)
        if scores is not None:
            return attention_guided_mask(scores, self.low_fraction, self.mask_prob, uniform)
        return (torch.rand(shape, device=device) if uniform is None else uniform) < self.low_fraction * self.mask_prob


# ------------------------------------------------------------------------------------------------ objective


class MSTConfig(DINOConfig):
    """Settings of ``mim:mst``: those of ``mim:dino``, and of masks and restoration."""

    mask_strategy: MaskStrategy = Field(
        default="attention_low", description="Hide what the teacher looks at least, patches at random, or nothing."
    )
    low_fraction: float = Field(default=0.25, ge=0, le=1, description="Share of the patches that may be hidden.")
    mask_prob: float = Field(default=0.5, ge=0, le=1, description="How often such a patch is hidden.")
    ce_weight: float = Field(default=1.0, ge=0, description="Weight of DINO's loss.")
    restore_weight: float = Field(default=0.6, ge=0, description="Weight of the restoration; 0: no decoder.")
    decoder: Literal["conv", "linear"] = Field(
        default="conv", description="Decoder: transposed convolutions (patch_size a power of 2), or one linear layer."
    )


@dataclass(frozen=True)
class MaskedCrops:
    """Crops, and a number per patch of the global ones that decides the masks: the entry ``uniform (2, L)``."""

    crops: MultiCrop
    num_patches: int

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        uniform = generator.random((GLOBAL_VIEWS, self.num_patches), np.float32)
        return {**self.crops(item, generator), "uniform": uniform}


class MSTObjective(DINOObjective):
    """``mim:mst``. Decoder, heads and student are thrown away; the exported encoder is the teacher's backbone."""

    config: MSTConfig

    @property
    def dino(self) -> SelfDistillation:
        assert isinstance(self.model, MaskedSelfDistillation)
        return self.model.dino

    @classmethod
    def build(cls, config: MSTConfig, encoder: Encoder, context: BuildContext) -> Self:  # type: ignore[override]
        vit = vit_of(encoder, "mim:mst")
        decoder = None
        if config.restore_weight > 0:
            decoder = GlobalImageDecoder(vit.embed_dim, vit.patch_size, vit.in_channels, config.decoder)
        model = MaskedSelfDistillation(
            config.self_distillation(vit, context),
            decoder,
            config.ce_weight,
            config.restore_weight,
            mask_strategy=config.mask_strategy,
            low_fraction=config.low_fraction,
            mask_prob=config.mask_prob,
        )
        return cls(model, config)

    def item_transform(self) -> ItemTransform:
        if self.config.mask_strategy == "none":
            return self.crops
        rows, columns = vit_of(self.encoder, "mim:mst").grid
        return MaskedCrops(self.crops, rows * columns)

    def forward(self, batch: Batch) -> LossOutput:
        local = batch["local_views"] if self.config.local_crops else None
        uniform = None if self.config.mask_strategy == "none" else batch["uniform"]
        output: MSTOutput = self.model(batch["global_views"], local, uniform)
        parts = {"distillation": output.distillation}
        if output.restoration is not None:
            parts["restoration"] = output.restoration
        stats = {**self.dino.loss.entropies(output.teacher), "masked": output.mask.float().mean()}
        return LossOutput(total=output.loss, parts=parts, stats=stats)
