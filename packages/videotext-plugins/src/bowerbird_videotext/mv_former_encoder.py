"""``videotext:mv-former``: an encoder of videos that embeds every frame (``bowerbird_videotext.mv_former``).

B clips, T frames, S patches of C channels, C' global channels, P width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features
from bowerbird_videotext.frozen_frames import FrozenFrames
from bowerbird_videotext.mv_former import (
    FixedWidthTokens,
    FramePooling,
    LearnableSpatialTokenPooling,
    MultiEntityVideoTransformer,
)
from bowerbird_videotext.mv_former_config import MVFormerConfig
from bowerbird_videotext.sampling import real_frames


class MVFormerEncoder(Encoder):
    """Frozen image backbone, entity tokens, transformer over the frames.

    ``Features.pooled`` is the mean of the embeddings of a clip's frames, ``tokens`` are these embeddings ``(B, T, P)``,
    of norm 1, and ``mask`` says which frames are real.

    Args:
        backbone: Not trained.
        config: Of everything else.
        source: Settings that build the backbone's modules again.
    """

    preprocessing: Preprocessing

    def __init__(self, backbone: FrozenFrames, config: MVFormerConfig, source: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.source = config, dict(source)
        self.backbone = backbone
        self.preprocessing = backbone.preprocessing
        self.frames, self.embed_dim = config.frames, config.embed_dim
        self.needs_global = config.pool in ("cls", "fixed-width") or config.num_dynamic > 0
        self.head = MultiEntityVideoTransformer(
            self._pooling(), config.hidden, config.layers, config.heads, config.ffn, config.embed_dim,
            config.entity_one_hot if config.pool in ("tokens", "fixed-width") else "none", config.reduction,
            config.frames, mlp_widths=(config.mlp_width, config.mlp_width), dropout=config.dropout,
        )  # fmt: skip

    @classmethod
    def build(cls, config: MVFormerConfig) -> Self:
        """Raises ``UnknownNameError`` for an unknown backbone, ``InputError`` for blocks that it does not have."""
        backbone, source = FrozenFrames.of(
            config.backbone, config.blocks, arguments=config.backbone_arguments, weights=config.weights,
            pretrained=config.pretrained, image_size=config.image_size, chunk=config.chunk,
        )  # fmt: skip
        return cls(backbone, config, source)

    def _pooling(self) -> nn.Module:
        c, channels, width = self.config, self.backbone.channels, self.backbone.global_channels
        if c.pool == "tokens":
            return LearnableSpatialTokenPooling(
                channels, c.pool_channels, c.num_static, c.num_dynamic, c.dynamic_control, c.value_passthrough,
                c.normalize_keys, c.disjoint, global_channels=width,
            )  # fmt: skip
        if c.pool == "fixed-width":
            return FixedWidthTokens(width, c.pool_channels, c.num_static + c.num_dynamic)
        return FramePooling(width if c.pool == "cls" else channels, c.pool)

    def forward(self, batch: Batch) -> Features:
        """Of ``video`` ``(B, T, 3, H, W)`` or ``image`` ``(B, 3, H, W)``.

        ``frame_valid`` bool ``(B, T)`` says which frames are real; without it, frames of zeros at the end are not.

        Raises:
            InputError: The batch has neither, or another shape.
        """
        video = batch["image"][:, None] if "video" not in batch and "image" in batch else batch.get("video")
        if video is None or video.ndim != 5 or video.shape[2] != 3:
            found = "nothing" if video is None else f"shape {tuple(video.shape)}"
            raise InputError(f"videotext:mv-former needs video of shape (B, T, 3, H, W); found {found}")
        valid = batch.get("frame_valid")
        valid = real_frames(video) if valid is None else valid.bool()
        embeddings = F.normalize(self.frame_embeddings(*self.frozen_features(video), valid), dim=-1)
        weight = valid.to(embeddings.dtype)[..., None]
        pooled = (embeddings * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        return Features(pooled=pooled, tokens=embeddings, mask=valid)

    def frozen_features(self, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches ``(B, T, S, C)`` and, where the pooling needs them, global features ``(B, T, C')``; no gradient."""
        patches, vectors = self.backbone(video.flatten(0, 1), with_global=self.needs_global)
        shape = video.shape[:2]
        return patches.unflatten(0, shape), None if vectors is None else vectors.unflatten(0, shape)

    def frame_embeddings(
        self, patches: Tensor, global_features: Tensor | None = None, frame_valid: Tensor | None = None
    ) -> Tensor:
        """``(B, T, P)``, not normalised, from what ``frozen_features`` gives."""
        embeddings: Tensor = self.head(patches, frame_valid, global_features=global_features)
        return embeddings

    @torch.inference_mode()
    def embed_frames(self, parts: Iterable[Tensor]) -> Tensor:
        """``(T, P)``, of norm 1, of all T frames of a video that comes in parts ``(n, 3, H, W)``.

        Only the features of the frames are kept, not the frames.
        """
        features = [self.frozen_features(part[None]) for part in parts]
        vectors = [part for _, part in features if part is not None]
        patches = torch.cat([part for part, _ in features], dim=1)
        embeddings = self.frame_embeddings(patches, torch.cat(vectors, dim=1) if vectors else None)
        return F.normalize(embeddings[0], dim=-1)

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` with the backbone's architecture in the place of where its weights came from."""
        kept = {key: value for key, value in config.items() if key not in ("weights", "pretrained", *self.source)}
        return kept | {key: value for key, value in self.source.items() if value not in (None, {})}
