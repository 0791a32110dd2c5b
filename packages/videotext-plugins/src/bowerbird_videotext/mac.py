"""``videotext:mac``: contrastive training on a random part of the patches and on captions with hidden words.

Shu et al., "Masked Contrastive Pre-Training for Efficient Video-Text Retrieval" (MAC), arXiv 2212.00986. What is not
kept never enters the video encoder: there is no decoder and nothing is restored. The rule that picks patches is that of
MAE (He et al., CVPR 2022). See docs/methods/mac.md for what the report leaves open and what is taken here.

B batch, T frames, N patches per frame, k kept ones, L word pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_videotext.contrastive import ContrastiveConfig, opened, pair_accuracy, pair_entries, pair_similarities
from bowerbird_videotext.dual_encoder import DualEncoder
from bowerbird_videotext.losses import symmetric_info_nce
from bowerbird_videotext.transforms import ClipTransform

MaskMode = Literal["frame", "tube"]

# ------------------------------------------------------------------------------------------------ masks


def kept_count(patches: int, ratio: float) -> int:
    """k = floor(N (1 - ratio)), but at least 1; a product that rounding put just below a whole number counts as it.

    Raises:
        InputError: ``ratio`` is outside [0, 1), or there is no patch.
    """
    if not 0 <= ratio < 1:
        raise InputError(f"ratio = {ratio}: expected 0 to below 1")
    if patches < 1:
        raise InputError(f"patches = {patches}: expected 1 or more")
    return max(1, int(patches * (1 - ratio) + 1e-6))


def patch_ranks(noise: Tensor) -> Tensor:
    """Rank of every patch in its row of ``noise (..., N)``, int64: patches of rank below k are kept.

    The rank is also the place of a patch in [kept, dropped], both in the order of the noise (MAE's ``ids_restore``).
    """
    return noise.argsort(dim=-1, stable=True).argsort(dim=-1)


def kept_patches(noise: Tensor, ratio: float) -> Tensor:
    """The patches with the least noise of every frame, in rising order: ``(B, T, N)`` to int64 ``(B, T, k)``."""
    count = kept_count(noise.shape[-1], ratio)
    return noise.argsort(dim=-1, stable=True)[..., :count].sort(dim=-1).values


def random_patch_mask(
    batch: int,
    frames: int,
    patches: int,
    ratio: float,
    mode: MaskMode = "frame",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Patches to keep, drawn at random: int64 ``(B, T, k)``, k = max(1, floor(N (1 - ratio))), rising in every frame.

    Args:
        batch: B.
        frames: T.
        patches: N.
        ratio: Share that is dropped, 0 to below 1.
        mode: ``frame``: drawn anew for every frame; ``tube``: the same places in all frames of a clip.
        generator: What is drawn from; torch's own by default.

    Raises:
        InputError: Values outside these ranges.
    """
    if batch < 0 or frames < 1:
        raise InputError(f"batch = {batch}, frames = {frames}: expected 0 or more, and 1 or more")
    _check_mode(mode)
    kept_count(patches, ratio)
    device = "cpu" if generator is None else generator.device
    noise = torch.rand(batch, 1 if mode == "tube" else frames, patches, generator=generator, device=device)
    return kept_patches(noise, ratio).expand(-1, frames, -1).contiguous()


def mask_tokens(
    ids: Tensor,
    special_mask: Tensor,
    mask_id: int,
    ratio: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``ids`` with ``mask_id`` in the place of every piece, each by itself with probability ``ratio``.

    Args:
        ids: int64 ``(B, L)``.
        special_mask: bool ``(B, L)``, true where a piece stays: class and separator pieces, padding.
        mask_id: Index of ``[MASK]``.
        ratio: 0 to 1; 1 masks all that are not special.
        generator: What is drawn from; torch's own by default.

    Raises:
        InputError: ``ratio`` is outside [0, 1], or the shapes differ.
    """
    device = ids.device if generator is None else generator.device
    return masked_pieces(ids, special_mask, mask_id, ratio, torch.rand(ids.shape, generator=generator, device=device))


def masked_pieces(ids: Tensor, special_mask: Tensor, mask_id: int, ratio: float, noise: Tensor) -> Tensor:
    """``mask_tokens`` with given uniform ``noise (B, L)`` in [0, 1)."""
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio = {ratio}: expected 0 to 1")
    if special_mask.shape != ids.shape or noise.shape != ids.shape:
        raise InputError(
            f"ids have shape {tuple(ids.shape)}, special_mask {tuple(special_mask.shape)}, the noise "
            f"{tuple(noise.shape)}; expected the same"
        )
    hidden = (noise.to(ids.device) < ratio) & ~special_mask.bool()
    return torch.where(hidden, mask_id, ids)


def special_pieces(ids: Tensor, special_ids: list[int]) -> Tensor:
    """True where a piece is one of ``special_ids``, bool ``(B, L)``."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for special in special_ids:  # numbers rather than a tensor of them: nothing is copied to a GPU
        found |= ids == special
    return found


def _check_mode(mode: str) -> None:
    if mode not in ("frame", "tube"):
        raise InputError(f"mode = {mode!r}: expected frame or tube")


# ------------------------------------------------------------------------------------------------ objective


class MACConfig(ContrastiveConfig):
    """Settings of ``videotext:mac``."""

    video_ratio: float = Field(default=0.6, ge=0, lt=1, description="Share of the patches of a frame that is dropped.")
    text_ratio: float = Field(default=0.15, ge=0, le=1, description="Probability that a word piece is hidden.")
    mode: MaskMode = Field(default="frame", description="Other patches in every frame, or the same in all (tube).")
    unmasked_end: float = Field(
        default=0.0, ge=0, le=1, description="Share of the steps, at the end, that see whole clips and captions."
    )


@dataclass(frozen=True)
class MaskedClip:
    """A clip with the noise of its masks: entries ``patch_noise (T, N)`` and ``piece_noise (max_tokens,)`` beside
    those of ``clip``. Masks then depend on the item, not on the process that reads it."""

    clip: ItemTransform
    frames: int
    patches: int
    pieces: int
    mode: MaskMode

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        entries = self.clip(item, generator)
        noise = generator.random((1 if self.mode == "tube" else self.frames, self.patches), np.float32)
        if self.mode == "tube":
            noise = np.repeat(noise, self.frames, axis=0)
        return {**entries, "patch_noise": noise, "piece_noise": generator.random(self.pieces, np.float32)}


class MACObjective(Objective):
    """The loss of ``videotext:frozen`` between the kept patches of clips and captions with hidden words.

    Args:
        encoder: With its tokenizer.
        video_ratio: Share of the patches of a frame that is dropped, 0 to below 1.
        text_ratio: Probability that a word piece is hidden, 0 to 1.
        mode: ``frame`` or ``tube``; see ``random_patch_mask``.
        temperature: Above 0.
        unmasked_from: The first step, counted from 0, without masks; ``None``: all have them.
        views: What makes clips and noise in the processes that read the data; ``None`` where only tensors come.
    """

    encoder: DualEncoder

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        video_ratio: float = 0.6,
        text_ratio: float = 0.15,
        mode: MaskMode = "frame",
        temperature: float = 0.05,
        unmasked_from: int | None = None,
        views: ItemTransform | None = None,
    ) -> None:
        super().__init__()
        kept_count(1, video_ratio)
        _check_mode(mode)
        if not 0 <= text_ratio <= 1 or not temperature > 0:
            raise InputError(f"text_ratio = {text_ratio}, temperature = {temperature}: expected 0 to 1, and above 0")
        self.encoder = encoder
        self.video_ratio, self.text_ratio, self.mode, self.temperature = video_ratio, text_ratio, mode, temperature
        self.unmasked_from, self.views = unmasked_from, views
        self.masks = True

    @classmethod
    def build(cls, config: MACConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for another encoder, and where there are no captions to make a vocabulary of."""
        dual = opened(encoder, context, "videotext:mac")
        clip = ClipTransform(dual.preprocessing, dual.frames, config.clips)
        last = round(config.unmasked_end * context.total_steps)
        return cls(
            dual,
            video_ratio=config.video_ratio,
            text_ratio=config.text_ratio,
            mode=config.mode,
            temperature=config.temperature,
            unmasked_from=context.total_steps - last if last else None,
            views=MaskedClip(
                clip, clip.frames, dual.video_encoder.num_patches, dual.ready_tokenizer().max_length, config.mode
            ),
        )

    def item_transform(self) -> ItemTransform | None:
        return self.views

    def before_step(self, step: int) -> None:
        self.masks = self.unmasked_from is None or step < self.unmasked_from

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``video (B, T, 3, H, W)`` (or ``image``) and ``text``.

        ``patch_noise (B, T, N)`` and ``piece_noise (B, at least L)``, uniform in [0, 1), decide the masks where the
        batch has them; else they are drawn from torch's generator.
        """
        video, text = pair_entries(batch)
        keep = None
        if self.masks and self.video_ratio > 0:
            keep = self._kept(video, batch)
        if self.masks and self.text_ratio > 0:
            text = self._hidden(text, batch)
        videos = self.encoder.encode_video(video, keep=keep)
        similarity = pair_similarities(self.encoder.encode_text(text), videos)
        total = symmetric_info_nce(similarity, self.temperature)
        return LossOutput(total=total, stats={"batch_accuracy": pair_accuracy(similarity)})

    def _kept(self, video: Tensor, batch: Batch) -> Tensor:
        self.encoder.video_encoder.check_video(video)
        size, frames, patches = len(video), video.shape[1], self.encoder.video_encoder.num_patches
        if "patch_noise" not in batch:
            return random_patch_mask(size, frames, patches, self.video_ratio, self.mode).to(video.device)
        noise = batch["patch_noise"]
        if noise.shape != (size, frames, patches):
            raise InputError(f"patch_noise has shape {tuple(noise.shape)}; expected {(size, frames, patches)}")
        return kept_patches(noise, self.video_ratio)

    def _hidden(self, text: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        ids = text["input_ids"]
        tokenizer = self.encoder.ready_tokenizer()
        special = special_pieces(ids, [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id])
        if "piece_noise" in batch:
            noise = batch["piece_noise"][:, : ids.shape[1]]
        else:
            noise = torch.rand(ids.shape, device=ids.device)
        return {**text, "input_ids": masked_pieces(ids, special, tokenizer.mask_id, self.text_ratio, noise)}
