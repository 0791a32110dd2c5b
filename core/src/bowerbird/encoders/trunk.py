"""What the built-in encoders share: a trunk from some library, an optional projection, and a trunk that may be frozen.

B batch, F width of the trunk, D ``embed_dim``, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.configs import HeadConfig
from bowerbird.protocols import Encoder, Features, freeze


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
