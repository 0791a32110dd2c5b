"""``compat:metric-compatible``: the learnable-new variant of online backfilling, in the training loop.

Seo et al. (arXiv 2301.03767): the new embedding and the reverse query transform on top of it are trained together, so
that the distances of both systems can be merged. See ``online_backfilling`` and docs/methods/online-backfilling.md.

D_old / D_new embedding sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch.nn.functional as F
from pydantic import Field

from bowerbird.batch import Batch
from bowerbird.errors import DataError
from bowerbird.gallery.transform import VectorTransform
from bowerbird.protocols import BuildContext, Encoder, LossOutput
from bowerbird_compat.compatible_objective import CompatibleConfig, CompatibleObjective
from bowerbird_compat.feature_cache import FeatureCache
from bowerbird_compat.online_backfilling import MetricCompatibleLoss, ReverseQueryTransform, TopK
from bowerbird_compat.vector_transforms import transform_steps


class MetricCompatibleConfig(CompatibleConfig):
    """Settings of ``compat:metric-compatible``."""

    temperature: float = Field(0.1, gt=0, description="of the contrastive terms")
    cross_system_negatives: bool = Field(
        True, description="negatives of the other system, too; false: each system on its own"
    )
    topk: int = Field(0, ge=0, description="nearest negatives of each system that count; 0: all")
    regression_weight: float = Field(1.0, ge=0, description="factor of the distance to the old query")
    old_weight: float = Field(1.0, ge=0, description="factor of the term of the old system")
    new_weight: float = Field(1.0, ge=0, description="factor of the term of the new system")
    classification_weight: float = Field(
        1.0, ge=0, description="factor of the classification loss; 0: the terms of the paper alone"
    )
    hidden: int | None = Field(
        None, ge=1, description="width of the reverse transform's residual branch; default: linear"
    )


class MetricCompatibleObjective(CompatibleObjective):
    """``classification + regression + old term + new term``; ``reverse`` is the reverse query transform.

    The exported encoder is the new one; it is *not* compatible with the old space by itself: its queries reach old
    vectors through ``reverse``, which the export carries and the strategy ``compat:reverse-transform`` serves.

    Needs ``image`` (or ``frozen_features``), ``label`` and ``index``. The old encoder runs once, while this is built.
    """

    method = "compat:metric-compatible"
    config: MetricCompatibleConfig

    def __init__(
        self, encoder: Encoder, num_classes: int, old_vectors: FeatureCache, config: MetricCompatibleConfig
    ) -> None:
        super().__init__(encoder, num_classes, config)
        self.old_vectors = old_vectors  # no module: neither trained nor saved
        self.reverse = ReverseQueryTransform(encoder.embed_dim, old_vectors.vectors.shape[1], config.hidden)
        self.loss = MetricCompatibleLoss(
            config.temperature, config.cross_system_negatives, True, TopK(config.topk) if config.topk else None,
            weights=(config.regression_weight, config.old_weight, config.new_weight),
        )  # fmt: skip

    @classmethod
    def build(cls, config: MetricCompatibleConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Raises ``RecipeError`` where no old model is named or the training split has no classes."""
        old = cls.old_model(config, encoder, context)
        batches = context.eval_batches(old.encoder, keys=("image", "label", "index"))
        self = cls(encoder, len(context.classes), FeatureCache.build(old.encoder, batches, key="index"), config)
        self.old = old
        if not config.classification_weight:
            self.classifier.requires_grad_(False)  # nothing trains it
        return self

    def forward(self, batch: Batch) -> LossOutput:
        """Parts ``classification`` (weighted), ``rqt_cos``, ``mcl_old``, ``mcl_new`` (``cl_...`` without cross-system
        negatives; unweighted); stat ``accuracy``."""
        embeddings, labels = self.encoder(batch).pooled, batch["label"]
        old = self.old_vectors.get(batch["index"]).to(embeddings)
        # Served queries have norm 1, so that is what the reverse transform learns from.
        terms = self.loss(self.reverse(F.normalize(embeddings)), old, embeddings, labels)
        total = terms.pop("total")
        loss, accuracy = self.classify(embeddings, labels)
        loss = self.config.classification_weight * loss
        parts = {"classification": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
        return LossOutput(total + loss, parts, {"accuracy": accuracy})

    def relations(self) -> list[dict[str, Any]]:
        """The relation that the export records: queries reach the old space through the reverse transform."""
        if self.old is None:
            return []
        steps, evidence = transform_steps(self.reverse), {"method": self.method}
        return [{"kind": "transform", "to": self.old.fingerprint(), "steps": steps, "evidence": evidence}]


def reverse_transform_of(run: str | Path, old: str | Path | None = None) -> VectorTransform:
    """The reverse query transform that a run of ``compat:metric-compatible`` has trained, as its export carries it.

    Args:
        run: Folder of the finished run, or of an export of it.
        old: The old encoder; default: the one that the run was trained for.

    Raises ``DataError`` where the run has trained none, or none for ``old``.
    """
    from bowerbird.encoders import load_encoder

    new = load_encoder(run, device="cpu")
    targets = [relation["to"] for relation in new.spec.relations if relation["kind"] == "transform"]
    if old is not None:
        wanted = load_encoder(old, device="cpu").fingerprint
        targets = [target for target in targets if target == wanted]
    psi = new.transform_to(targets[0]) if targets else None
    if psi is None:
        for_old = "" if old is None else f" for the old encoder {str(old)!r}"
        raise DataError(
            f"the run {str(run)!r} has no reverse transform{for_old}; was it trained with compat:metric-compatible?"
        )
    return psi
