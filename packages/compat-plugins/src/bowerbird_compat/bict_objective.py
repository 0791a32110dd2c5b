"""``compat:bict`` as it is trained: the first stage of BiCT, a backward-compatible new encoder.

Su et al. 2022 (arXiv 2204.13919): BCT, or the contrastive loss towards the old vector of the same item. The second
stage, the forward transform, needs vectors only: ``bowerbird_compat.bict.fit_forward_transform``.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import InputError
from bowerbird.protocols import BuildContext, Encoder, LossOutput
from bowerbird_compat.bct import BCTConfig, BCTObjective, InfluenceLoss
from bowerbird_compat.compatible_losses import CompatibleContrastiveLoss
from bowerbird_compat.feature_cache import FeatureCache
from bowerbird_compat.heads import match_dim


class BackwardContrast(nn.Module):
    """The contrastive loss of RACT without its new-to-new negatives, for vectors of any two sizes.

    Args:
        weight: lambda_b, at least 0.
        temperature: Above 0; 0.01 in OpenCompatible.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 0.01) -> None:
        super().__init__()
        if not (0 <= weight < float("inf") and 0 < temperature < float("inf")):
            raise InputError(f"weight={weight}, temperature={temperature}; at least 0 and above 0 are needed.")
        self.weight, self.temperature = float(weight), float(temperature)
        self.loss = CompatibleContrastiveLoss(temperature, topk=None, new_to_new=False, weight=weight)

    def forward(self, embeddings: Tensor, old: Tensor, labels: Tensor) -> Tensor:
        """``embeddings`` ``(B, d_new)`` are cut or padded to the size of ``old`` ``(B, d_old)``."""
        if self.weight == 0:
            return embeddings[:0].sum()
        value: Tensor = self.loss(match_dim(embeddings, old.shape[1]), old, labels)
        return value


class BiCTConfig(BCTConfig):
    """Settings of ``compat:bict``: those of ``compat:bct``, with ``influence_weight`` as lambda_b, and two more."""

    backward: Literal["influence", "contrastive"] = Field(
        "influence", description="influence: as in compat:bct; contrastive: towards the old vector of the same item"
    )
    temperature: float = Field(0.01, gt=0, description="of the contrastive loss")


class BiCTObjective(BCTObjective):
    """``CE(new classifier) + lambda_b * backward loss``.

    Needs ``image`` (or ``frozen_features``), ``label`` and ``index``. With ``influence`` it is ``compat:bct``. With
    ``contrastive`` the old vectors of the training items are made once, without augmentation.
    """

    method = "compat:bict"
    config: BiCTConfig

    def __init__(self, encoder: Encoder, num_classes: int, influence: InfluenceLoss | None, config: BiCTConfig) -> None:
        super().__init__(encoder, num_classes, influence, config)  # type: ignore[arg-type]  # only forward reads it
        self.contrast: BackwardContrast | None = None
        self.old_vectors: FeatureCache | None = None  # no module: neither trained nor saved

    @classmethod
    def build(cls, config: BiCTConfig, encoder: Encoder, context: BuildContext) -> Self:  # type: ignore[override]
        """As ``compat:bct``. Raises ``RecipeError`` without an old model, or for a training split without classes."""
        if config.backward == "influence":
            return super().build(config, encoder, context)
        old = cls.old_model(config, encoder, context)
        self = cls(encoder, len(context.classes), None, config)
        self.contrast = BackwardContrast(config.influence_weight, config.temperature)
        batches = context.eval_batches(old.encoder, keys=("image", "label", "index"))
        self.old_vectors = FeatureCache.build(old.encoder, batches, key="index")
        self.old, self.context = old, context
        return self

    def forward(self, batch: Batch) -> LossOutput:
        """Parts ``new`` and ``influence`` or ``contrast`` (weighted); stat ``accuracy`` (with the margin)."""
        if self.contrast is None or self.old_vectors is None:
            return super().forward(batch)
        embeddings, labels = self.encoder(batch).pooled, batch["label"]
        new, accuracy = self.classify(embeddings, labels)
        old = self.old_vectors.get(batch["index"]).to(embeddings.device)
        contrast = self.contrast(embeddings, old, labels)
        return LossOutput(new + contrast, {"new": new.detach(), "contrast": contrast.detach()}, {"accuracy": accuracy})

    def evidence(self) -> dict[str, Any]:
        return {**super().evidence(), "backward": self.config.backward}
