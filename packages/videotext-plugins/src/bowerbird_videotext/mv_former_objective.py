"""``videotext:mv-former``: frames that are near in time in two views of a video get embeddings that are alike.

B videos, 2 views, T frames, P width of an embedding.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_videotext.mv_former import ProjectionHead
from bowerbird_videotext.mv_former_config import MVFormerObjectiveConfig
from bowerbird_videotext.mv_former_encoder import MVFormerEncoder
from bowerbird_videotext.mv_former_views import CachedViews, FrameCache, TwoViews, cache_frames
from bowerbird_videotext.scl import cycle_consistency_loss, sequence_contrastive_loss


class MVFormerObjective(Objective):
    """Two views of every video, their frames' embeddings, a projection that is thrown away, and the loss."""

    encoder: MVFormerEncoder

    def __init__(
        self, encoder: MVFormerEncoder, config: MVFormerObjectiveConfig, cache: FrameCache | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.config, self.cache = encoder, config, cache
        self.head = ProjectionHead(encoder.embed_dim)

    @classmethod
    def build(cls, config: MVFormerObjectiveConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` for another encoder, ``DataError`` where features that shall be kept cannot be."""
        if not isinstance(encoder, MVFormerEncoder):
            raise RecipeError(
                f"videotext:mv-former trains the encoder videotext:mv-former, not a {type(encoder).__name__}"
            )
        if not config.cache:
            return cls(encoder, config)
        if context.dataset is None:
            raise RecipeError("objective.cache: there is no data set whose features could be kept; set cache = false")
        root = config.cache_root or Path(os.environ.get("BOWERBIRD_CACHE", "~/.cache/bowerbird")) / "mv-former"
        return cls(encoder, config, cache_frames(encoder, context.dataset, root.expanduser()))

    def item_transform(self) -> ItemTransform:
        frames, views = self.encoder.config.frames, self.config.views
        if self.cache is not None:
            return CachedViews(self.cache, frames, views)
        return TwoViews(self.encoder.preprocessing, frames, views)

    def forward(self, batch: Batch) -> LossOutput:
        """Of ``views`` ``(B, 2, T, 3, H, W)`` or ``patches`` ``(B, 2, T, S, C)``, with times, lengths and valid.

        Raises:
            InputError: The batch has neither.
        """
        z = self.projected(batch)
        device = z.device.type
        with torch.autocast(device, enabled=False):  # similarities over a temperature of 0.1 are not for 8 bits
            return LossOutput(total=self._loss(z.float(), batch["times"], batch["lengths"], batch["valid"]))

    def projected(self, batch: Batch) -> Tensor:
        """``(B, 2, T, P)``, of norm 1, what the loss sees."""
        if "patches" in batch:
            patches, vectors = batch["patches"].flatten(0, 1), batch.get("global_features")
            vectors = None if vectors is None else vectors.flatten(0, 1)
        elif "views" in batch:
            patches, vectors = self.encoder.frozen_features(batch["views"].flatten(0, 1))
        else:
            raise InputError(f"the batch needs views or patches; it has {', '.join(batch) or 'nothing'}")
        valid = batch["valid"]
        embeddings = self.encoder.frame_embeddings(patches, vectors, valid.flatten(0, 1))
        return F.normalize(self.head(embeddings), dim=-1).unflatten(0, valid.shape[:2])

    def _loss(self, z: Tensor, times: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
        c = self.config
        if c.loss == "cycle":
            losses = [
                cycle_consistency_loss(*video, temperature=c.temperature)
                for video in zip(z, times, lengths, valid, strict=True)
            ]
            return torch.stack(losses).mean()
        if c.negatives.startswith("batch"):  # the frames of all processes
            z, times, lengths, valid = (
                dist.gathered(z),
                dist.gathered(times),
                dist.gathered(lengths),
                dist.gathered(valid.to(torch.uint8)),
            )
        return sequence_contrastive_loss(z, times, lengths, valid, c.temperature, c.variance, c.negatives)
