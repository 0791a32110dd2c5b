"""Regression-alleviating compatible training: a new encoder for a gallery that is half old and half new.

Zhang, Ge, Shen, Li, Yuan, Xu, Wang, Shan: Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training
in Image Retrieval, ICLR 2022 (arXiv 2201.09724). While a gallery is backfilled, a wrong item that has its new vector
already can beat the right item that still has its old one. The compatibility losses here therefore hold both kinds of
wrong items against the right old vector. Where the paper is silent the authors' code is followed (OpenCompatible), see
docs/methods/ract.md.

Letters: B batch, C classes, D embedding size, N gallery items. The losses are in ``compatible_losses``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, LossOutput
from bowerbird.upgrade import orders
from bowerbird_compat.checks import check_above_zero, check_finite, check_integers, integer_labels
from bowerbird_compat.compatible_losses import (
    ClassLevelCompatibleLoss,
    CompatibleContrastiveLoss,
    CompatibleTripletLoss,
)
from bowerbird_compat.compatible_objective import CompatibleConfig, CompatibleObjective
from bowerbird_compat.distillation import DistillationLoss, FocalDistillationLoss
from bowerbird_compat.old_model import OldModel
from bowerbird_compat.prototypes import evaluating

__all__ = [
    "BackfillState", "ClassLevelCompatibleLoss", "CompatibleContrastiveLoss", "CompatibleTripletLoss",
    "DistillationLoss", "FocalDistillationLoss", "RACTConfig", "RACTObjective", "backfill_order",
]  # fmt: skip

# ------------------------------------------------------------------------------------------------------- backfilling


def backfill_order(
    old_gallery: Tensor,
    centers: Tensor | None,
    strategy: Literal["entropy", "least_confidence", "margin", "random"] = "entropy",
    temperature: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The order in which gallery items are encoded again, int64 ``(N,)``: most uncertain first, ties by index.

    For tensors; ``bowerbird.upgrade.orders`` has the definitions, and the order ``core:uncertainty`` of an upgrade.

    Args:
        old_gallery: ``(N, D)`` old vectors, in any scale.
        centers: ``(C, D)`` class centres or classifier rows; not read by ``random``.
        strategy: Of ``p = softmax(cos / temperature)``: its entropy, 1 - largest, or 1 - (largest - second).
        temperature: Above 0.
        generator: Read by ``random`` only.

    Raises ``InputError`` (a ``ValueError``): shapes, temperature, strategy, or a row that is not finite (named).
    """
    check_above_zero(temperature=temperature)
    if strategy == "random":
        gallery = torch.as_tensor(old_gallery)
        if gallery.ndim != 2:
            raise InputError(f"Old vectors have shape {tuple(gallery.shape)}; (N, D) is needed.")
        check_finite(gallery, "Old vectors")
        return torch.randperm(len(old_gallery), generator=generator)
    if centers is None:
        raise InputError(f"Strategy {strategy!r} needs class centres; give centers, or strategy='random'.")
    vectors, rows = (np.asarray(torch.as_tensor(t).detach().cpu().double()) for t in (old_gallery, centers))
    return torch.from_numpy(orders.backfill_order(vectors, rows, strategy, temperature))


@dataclass
class BackfillState:
    """One gallery while it is backfilled: one vector per item, the first ``done`` items of ``order`` have new ones.

    Attributes:
        order: ``(N,)`` int64, a permutation of ``0..N - 1``.
        done: In ``0..N``.
    """

    order: Tensor
    done: int = 0

    def __post_init__(self) -> None:
        self.order = torch.as_tensor(self.order)
        if not self.order.numel():
            self.order = self.order.long()  # an empty list has no type
        size = len(self.order)
        if not torch.equal(integer_labels(self.order, size).sort().values.cpu(), torch.arange(size)):
            raise InputError(f"order must be a permutation of 0..{size - 1}.")
        check_integers(done=self.done)
        if not 0 <= self.done <= size:
            raise InputError(f"done is {self.done}; it must be in 0..{size}.")

    @property
    def fraction(self) -> float:
        """Share of the items that have new vectors, 0 to 1; an empty gallery is done."""
        return self.done / len(self.order) if len(self.order) else 1.0

    def advance(self, n: int) -> None:
        """The next ``n`` items of the order have been encoded, or all that are left."""
        check_integers(n=n)
        if n < 0:
            raise InputError(f"n is {n}; a backfill does not go back.")
        self.done = min(self.done + n, len(self.order))

    def vectors(self, old: Tensor, new: Tensor) -> Tensor:
        """``(N, D)`` what the index holds now, from all old and all new vectors ``(N, D)``."""
        if old.shape != new.shape or old.ndim != 2 or len(old) != len(self.order):
            raise InputError(
                f"Old vectors {tuple(old.shape)} and new ones {tuple(new.shape)} must both be ({len(self.order)}, D)."
            )
        moved = self.order[: self.done].to(old.device)
        return old.index_copy(0, moved, new.to(old)[moved])


# ---------------------------------------------------------------------------------------------------------- training


class RACTConfig(CompatibleConfig):
    """Settings of ``compat:ract``."""

    compatibility: Literal["contrastive", "triplet", "class", "l2", "lwf", "focal"] = Field(
        "contrastive",
        description="form of the compatibility loss; class: needs the old classifier, with every new class; "
        "baselines: l2: mean squared difference of unit vectors; lwf: what the old classifier says (needs it); "
        "focal: squared difference, counted more where the prediction is right",
    )
    new_to_new: bool = Field(
        True, description="new vectors of other classes as negatives, too; false: the baseline without RACT's term"
    )
    weight: float = Field(1.0, ge=0, description="factor of the compatibility loss")
    temperature: float = Field(0.01, gt=0, description="of the contrastive form, and of the new side of lwf")
    old_temperature: float = Field(0.01, gt=0, description="of the old side of lwf")
    focal_alpha: float = Field(1.0, ge=0, description="of focal: factor of every item")
    focal_beta: float = Field(5.0, ge=0, description="of focal: what a right prediction adds to it")
    topk: int = Field(10, description="hardest negatives per kind, contrastive and triplet; 0: all")
    triplet_margin: float = Field(0.8, ge=0, description="of the triplet form, on distances of unit vectors (0 to 2)")
    gather: bool = Field(True, description="negatives from all processes")
    detach_keys: bool | None = Field(
        None, description="no gradient through new vectors that are negatives; default: as gather"
    )
    old_features: Literal["step", "cached"] = Field(
        "step",
        description="step: the old encoder sees the same augmented picture; cached: it runs once over the training "
        "split, without augmentation (always so with train.cache_trunk)",
    )

    @model_validator(mode="after")
    def _linear_logits(self) -> Self:
        if self.compatibility == "class" and self.classifier != "softmax":
            raise ValueError("compatibility = 'class' compares linear logits; it needs classifier = 'softmax'")
        return self


def opencompatible() -> dict[str, Any]:
    """Settings of the authors' code."""
    return {"compatibility": "contrastive", "new_to_new": True, "weight": 1.0, "temperature": 0.01, "topk": 10}


def contra() -> dict[str, Any]:
    """The baseline of the authors' code: the same without new-to-new negatives."""
    return opencompatible() | {"new_to_new": False}


class RACTObjective(CompatibleObjective):
    """``CE(new classifier) + weight * compatibility loss``; see ``RACTConfig``.

    Needs ``image`` (or ``frozen_features``) and ``label``; ``index`` with cached old features. ``old_features`` in the
    batch are used where they are given.
    """

    method = "compat:ract"
    config: RACTConfig

    def __init__(self, encoder: Encoder, num_classes: int, compatibility: nn.Module | None, config: RACTConfig) -> None:
        super().__init__(encoder, num_classes, config, bias=False)
        self.compatibility = compatibility
        self._cached: Tensor | None = None

    @classmethod
    def build(cls, config: RACTConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Loads the old model and freezes it.

        Raises ``RecipeError`` where no old model is named, the training split has no classes, the sizes of the
        embeddings or the preparation of pictures differ, or a form that needs the old classifier lacks it.
        """
        old = cls.old_model(config, encoder, context)
        if old.encoder.embed_dim != encoder.embed_dim:
            raise RecipeError(
                f"compat:ract compares new with old embeddings: the new encoder has size {encoder.embed_dim}, "
                f"{old.path} has {old.encoder.embed_dim}. Set encoder.embed_dim = {old.encoder.embed_dim}."
            )
        if config.old_features == "step" and old.encoder.preprocessing != encoder.preprocessing:
            raise RecipeError(
                f"old_features = 'step' gives both encoders the same picture, but {old.path} prepares pictures "
                "differently from the new encoder. Use the same preparation, or old_features = 'cached'."
            )
        self = cls(encoder, len(context.classes), _compatibility(config, old, context), config)
        self.old, self.context = old, context
        return self

    def forward(self, batch: Batch) -> LossOutput:
        """Parts ``new`` and ``compatibility`` (weighted); stats ``accuracy`` (with the margin), ``old_cosine``."""
        embeddings, labels = self.encoder(batch).pooled, batch["label"]
        new, accuracy = self.classify(embeddings, labels)
        old = self._old_embeddings(batch).to(embeddings)
        loss, weight = self.compatibility, self.classifier.weight
        if loss is None:
            compatibility = self.config.weight * F.mse_loss(F.normalize(embeddings), F.normalize(old))
        elif isinstance(loss, ClassLevelCompatibleLoss):
            compatibility = loss(embeddings, labels, weight)
        elif isinstance(loss, DistillationLoss):
            compatibility = loss(embeddings, old)
        elif isinstance(loss, FocalDistillationLoss):
            compatibility = loss(embeddings, old, labels, F.linear(embeddings, weight))
        else:
            compatibility = loss(embeddings, old, labels)
        stats = {"accuracy": accuracy, "old_cosine": F.cosine_similarity(embeddings.detach(), old).mean()}
        return LossOutput(new + compatibility, {"new": new.detach(), "compatibility": compatibility.detach()}, stats)

    def _old_embeddings(self, batch: Batch) -> Tensor:
        if "old_features" in batch:
            return batch["old_features"].detach()
        if self.old is None or self.context is None:
            raise InputError("The batch has no old_features, and this objective was not built with an old model.")
        if self.config.old_features == "step" and "image" in batch:
            with torch.no_grad():
                return self.old.encoder(batch).pooled
        # Cached features of a trunk are features of pictures without augmentation: nothing is lost by one pass.
        if self._cached is None:
            with evaluating(self.old.encoder):
                passes = self.context.eval_batches(self.old.encoder)
                self._cached = torch.cat([self.old.encoder(part).pooled.float().cpu() for part in passes])
        return self._cached[batch["index"].cpu()]

    def evidence(self) -> dict[str, Any]:
        config = self.config
        return {"compatibility": config.compatibility, "new_to_new": config.new_to_new, "weight": config.weight}


def _compatibility(config: RACTConfig, old: OldModel, context: BuildContext) -> nn.Module | None:
    shared: dict[str, Any] = {"gather": config.gather, "detach_keys": config.detach_keys, "weight": config.weight}
    if config.compatibility == "contrastive":
        return CompatibleContrastiveLoss(config.temperature, config.topk, config.new_to_new, **shared)
    if config.compatibility == "triplet":
        return CompatibleTripletLoss(config.triplet_margin, config.topk, config.new_to_new, **shared)
    if config.compatibility == "l2":
        return None
    if config.compatibility == "focal":
        return FocalDistillationLoss(config.focal_alpha, config.focal_beta, weight=config.weight)
    if old.classifier is None:
        raise RecipeError(
            f"compatibility = {config.compatibility!r} needs the old classifier, but {old.path} holds none."
        )
    if config.compatibility == "lwf":
        return DistillationLoss(old.classifier, config.temperature, config.old_temperature, weight=config.weight)
    row_of = {name: row for row, name in enumerate(old.classes)}
    unknown = [name for name in context.classes if name not in row_of]
    if unknown:
        raise RecipeError(
            f"compatibility = 'class' needs every class in the old model; {old.path} lacks {', '.join(unknown[:5])}. "
            "Use compatibility = 'contrastive'."
        )
    rows = old.classifier[[row_of[name] for name in context.classes]]
    return ClassLevelCompatibleLoss(rows, config.new_to_new, weight=config.weight)
