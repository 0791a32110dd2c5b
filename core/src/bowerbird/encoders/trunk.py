"""What the built-in encoders share: a trunk from some library, an optional projection, and a trunk that may be frozen.

B batch, F width of the trunk, D ``embed_dim``, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.protocols import Encoder, Features, freeze


class HeadConfig(BaseModel):
    """Settings of the projection after the trunk."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    embed_dim: int | None = Field(default=None, ge=1, description="Width of the embedding; none: that of the trunk.")
    head: Literal["linear", "mlp", "none"] | None = Field(
        default=None, description="Projection after the trunk; by default linear where embed_dim is given, else none."
    )
    freeze_trunk: bool = Field(default=False, description="Train the projection only; statistics of norms stay fixed.")

    @model_validator(mode="after")
    def _head_and_width_agree(self) -> Self:
        if self.head == "none" and self.embed_dim is not None:
            raise ValueError("head = 'none' keeps the width of the trunk: leave out embed_dim, or choose linear or mlp")
        if self.head in ("linear", "mlp") and self.embed_dim is None:
            raise ValueError(f"head = {self.head!r} needs embed_dim")
        return self


class ImageConfig(HeadConfig):
    """Settings of how a picture is prepared; what is left out is what the weights were trained with."""

    image_size: int | None = Field(default=None, ge=8, le=2048, description="Side of the square input in pixels.")
    resize: Literal["squash", "crop"] | None = Field(
        default=None, description="squash: the whole picture; crop: shorter side, then the centre."
    )

    def prepared(self, default: Preprocessing) -> Preprocessing:
        """``default`` with the settings that were given."""
        values = default.to_dict()
        if self.image_size is not None:
            values["size"] = self.image_size
        if self.resize is not None:
            values["resize"] = self.resize
        return Preprocessing.from_dict(values)


class TrunkEncoder(Encoder):
    """``head(trunk(batch))``.

    Args:
        trunk: Module that maps a batch to ``Features`` with ``pooled (B, F)``.
        trunk_dim: F.
        config: The projection, and whether the trunk is trained.
        preprocessing: How a picture is prepared; ``None`` for texts.

    A frozen trunk gives no tokens, so that features from its cache and features from pictures are the same.
    """

    def __init__(
        self, trunk: nn.Module, *, trunk_dim: int, config: HeadConfig, preprocessing: Preprocessing | None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.preprocessing = preprocessing
        self.is_frozen = config.freeze_trunk
        self.trunk_dim = trunk_dim
        self.embed_dim = config.embed_dim or trunk_dim
        self.head = _make_head(config, trunk_dim)
        if self.is_frozen:
            freeze(trunk)

    def forward(self, batch: Batch) -> Features:
        cached = batch.get("frozen_features")
        if cached is None and self.is_frozen:
            cached = self.trunk(batch).pooled
        if cached is not None:
            return Features(pooled=self.head(cached))
        features: Features = self.trunk(batch)
        return Features(
            pooled=self.head(features.pooled), tokens=features.tokens, grid=features.grid, mask=features.mask
        )

    def frozen_trunk(self, batch: Batch) -> Tensor | None:
        return self.trunk(batch).pooled if self.is_frozen else None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.is_frozen:
            self.trunk.eval()  # running means of a frozen network must not drift
        return self

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` without the source of the first weights: the weights lie beside it."""
        return {key: value for key, value in config.items() if key not in ("weights", "pretrained")}


def _make_head(config: HeadConfig, trunk_dim: int) -> nn.Module:
    if config.embed_dim is None:
        return nn.Identity()
    if config.head == "mlp":
        return nn.Sequential(nn.Linear(trunk_dim, trunk_dim), nn.GELU(), nn.Linear(trunk_dim, config.embed_dim))
    return nn.Linear(trunk_dim, config.embed_dim)
