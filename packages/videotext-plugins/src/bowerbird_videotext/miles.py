"""``videotext:miles``: a dual encoder that also restores the features of hidden patches of its clips.

Ge, Ge, Liu, Wang, Wu, Shan, Qie, Luo: *MILES: Visual BERT Pre-training with Injected Language Semantics for Video-text
Retrieval*, ECCV 2022 (arXiv 2204.12408). The targets come from a slowly following copy of the video encoder, which has
learned from captions: patches become aligned with words. Only the encoder of the authors is public; what is inferred
is named in docs/methods/miles.md.

B pairs, T frames, N patches, M masked patches of a batch, P width of the shared space.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_videotext.contrastive import (
    ContrastiveConfig,
    opened,
    pair_accuracy,
    pair_entries,
    pair_similarities,
)
from bowerbird_videotext.dual_encoder import DualEncoder
from bowerbird_videotext.losses import symmetric_info_nce, unit
from bowerbird_videotext.snapshot import SnapshotEncoder
from bowerbird_videotext.space_time import SpaceTimeTransformer
from bowerbird_videotext.transforms import ClipTransform
from bowerbird_videotext.video_masks import MASKS, MaskMode, tube_block_mask

__all__ = [
    "MILESConfig", "MILESObjective", "MaskedClips", "SnapshotEncoder", "VideoTower", "masked_feature_regression",
    "tube_block_mask",
]  # fmt: skip

Contrast = Literal["masked", "full"]


def masked_feature_regression(pred: Tensor, target: Tensor, normalize: bool = True) -> Tensor:
    """How far predicted features are from their targets, a scalar; 0 where there are none.

    Args:
        pred: ``(M, P)``.
        target: ``(M, P)``; gets no gradient.
        normalize: Mean of the squared distances of unit vectors, 2 - 2 cos, in 0..4; else the mean over tokens and
            channels of the squared differences.

    Raises:
        InputError: Not two matrices of the same shape.
    """
    if pred.ndim != 2 or pred.shape != target.shape:
        raise InputError(f"pred has shape {tuple(pred.shape)}, target {tuple(target.shape)}; expected (M, P) for both")
    target = target.detach()
    if len(pred) == 0:
        return pred.sum()  # 0, and differentiable
    if normalize:
        return (unit(pred) - unit(target)).square().sum(dim=1).mean()
    wide = torch.promote_types(pred.dtype, torch.float32)
    return (pred.to(wide) - target.to(wide)).square().mean()


def share_of_processes(rows: Tensor) -> Tensor | float:
    """How many ``rows`` this process has, over the mean of all processes: the mean of losses weighted by it is that of
    the joint batch. 1 in one process."""
    if not dist.is_distributed():
        return 1.0
    count = torch.tensor(float(len(rows)), device=rows.device)
    return count / dist.mean_over_processes(count).clamp(min=1)


class MaskedClips:
    """Clips with a mask of their patches: adds ``patch_mask``, bool ``(T, N)``, to the entries of ``clips``.

    Args:
        clips: Makes ``video (T, 3, H, W)``.
        grid: (rows, columns) of patches of a frame.
        ratio: Share of them that is hidden.
        mode: In what shape.
    """

    def __init__(self, clips: ItemTransform, grid: tuple[int, int], ratio: float, mode: MaskMode) -> None:
        self.clips, self.grid, self.ratio, self.mode = clips, grid, ratio, mode

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        entries = self.clips(item, generator)
        mask = MASKS[self.mode](1, self.grid, len(entries["video"]), self.ratio, generator)
        return entries | {"patch_mask": mask[0]}


class VideoTower(nn.Module):
    """The video half of a dual encoder: clips and a mask to the projected features of the masked patches ``(M, P)``."""

    def __init__(self, encoder: SpaceTimeTransformer, projection: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, video: Tensor, mask: Tensor) -> Tensor:
        """The clip is seen whole; ``mask`` (bool ``(B, T, N)``) only chooses."""
        _, patches = self.encoder(video, return_tokens=True)
        return self.projection(patches[mask])


class MILESConfig(ContrastiveConfig):
    """Settings of ``videotext:miles``."""

    mask_ratio: float = Field(default=0.5, ge=0, lt=1, description="Share of the patches that is hidden.")
    mask_mode: MaskMode = Field(
        default="tube_block",
        description="tube_block: rectangles, the same in all frames; random_tube: single places, the same in all "
        "frames; random: single places of every frame.",
    )
    weight: float = Field(default=1.0, ge=0, description="Of the masked features.")
    normalize_targets: bool = Field(default=True, description="Compare directions only, not lengths.")
    contrast_on: Contrast = Field(
        default="masked",
        description="Which clip is compared with its caption: the masked one, as in the paper; or the full one, which "
        "costs another pass.",
    )
    momentum: float = Field(default=0.99, ge=0, le=1, description="Of the snapshot: 0 copies, 1 never moves.")
    update_every: int = Field(default=1, ge=1, description="Steps between two updates of the snapshot.")


class MILESObjective(Objective):
    """NCE(text, video) + weight * regression of the features of masked patches onto the snapshot's.

    Args:
        encoder: A dual encoder with its tokenizer. Gets a mask token, which is not exported.
        temperature: Of the contrastive loss.
        mask_ratio, mask_mode: Of the clips that ``clips`` makes.
        weight: Of the regression.
        normalize_targets: Compare directions only.
        contrast_on: ``masked`` or ``full`` clips are compared with captions.
        momentum, update_every: Of the snapshot; see ``SnapshotEncoder``.
        clips: What makes clips in the processes that read the data; ``None`` where only tensors come.

    Raises:
        InputError: A value outside its range.
    """

    encoder: DualEncoder

    def __init__(
        self,
        encoder: DualEncoder,
        *,
        temperature: float = 0.05,
        mask_ratio: float = 0.5,
        weight: float = 1.0,
        normalize_targets: bool = True,
        contrast_on: Contrast = "masked",
        mask_mode: MaskMode = "tube_block",
        momentum: float = 0.99,
        update_every: int = 1,
        clips: ItemTransform | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0 or not weight >= 0 or not 0 <= mask_ratio < 1:
            raise InputError(
                f"temperature = {temperature}, weight = {weight}, mask_ratio = {mask_ratio}: expected above 0, 0 or "
                "more, and 0 to below 1"
            )
        if contrast_on not in get_args(Contrast) or mask_mode not in MASKS:
            raise InputError(
                f"contrast_on = {contrast_on!r}, mask_mode = {mask_mode!r}: expected one of "
                f"{', '.join(get_args(Contrast))}, and one of {', '.join(MASKS)}"
            )
        self.encoder = encoder
        tower = VideoTower(encoder.video_encoder, encoder.video_proj)
        self.snapshot = SnapshotEncoder(tower, momentum, update_every)  # before there is a mask token to copy
        encoder.video_encoder.create_mask_token()
        self.temperature, self.weight, self.normalize_targets = temperature, weight, normalize_targets
        self.mask_ratio, self.mask_mode, self.contrast_on, self.clips = mask_ratio, mask_mode, contrast_on, clips

    @classmethod
    def build(cls, config: MILESConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for another encoder, and where there are no captions to make a vocabulary of."""
        dual = opened(encoder, context, "videotext:miles")
        return cls(
            dual,
            temperature=config.temperature,
            mask_ratio=config.mask_ratio,
            weight=config.weight,
            normalize_targets=config.normalize_targets,
            contrast_on=config.contrast_on,
            mask_mode=config.mask_mode,
            momentum=config.momentum,
            update_every=config.update_every,
            clips=ClipTransform(dual.preprocessing, dual.frames, config.clips),
        )

    def item_transform(self) -> ItemTransform | None:
        if self.clips is None:
            return None
        return MaskedClips(self.clips, self.encoder.video_encoder.grid, self.mask_ratio, self.mask_mode)

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``video (B, T, 3, H, W)`` (or ``image``), ``text``, and ``patch_mask``, bool ``(B, T, N)``."""
        video, text = pair_entries(batch)
        if "patch_mask" not in batch:
            raise InputError(f"the batch needs patch_mask, which patches are hidden; it has {', '.join(batch)}")
        mask, encoder = batch["patch_mask"], self.encoder

        whole, patches = encoder.video_encoder(video, mask=mask, return_tokens=True)
        restored = encoder.video_proj(patches[mask])
        clip = encoder.video_proj(whole) if self.contrast_on == "masked" else encoder.encode_video(video)
        matches = pair_similarities(encoder.encode_text(text), clip)
        regression = masked_feature_regression(restored, self.snapshot(video, mask), self.normalize_targets)
        parts = {
            "text_video": symmetric_info_nce(matches, self.temperature),
            "masked_features": regression * share_of_processes(restored),
        }
        total = parts["text_video"] + self.weight * parts["masked_features"]
        return LossOutput(total=total, parts=parts, stats={"batch_accuracy": pair_accuracy(matches)})

    def after_step(self, step: int) -> None:
        self.snapshot.update(step + 1)

    def exported_encoder(self) -> Encoder:
        """A copy of the encoder without the mask token."""
        exported = copy.deepcopy(self.encoder)
        exported.video_encoder.register_parameter("mask_token", None)
        return exported
