"""``compat:unibct`` as it is trained: warm up, then classify against prototypes that are refined at given epochs.

Zhang et al., IJCAI 2022 (arXiv 2203.01583); the parts are in ``unibct``, see docs/methods/unibct.md.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn

from bowerbird.batch import Batch
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, Encoder, LossOutput, Objective
from bowerbird_compat.heads import MarginKind, MarginSoftmax
from bowerbird_compat.old_model import OldModel, measured_compatibility
from bowerbird_compat.unibct import PrototypeLoss, PrototypeRefresh, embedded, refine_prototypes


class UniBCTConfig(BaseModel):
    """Settings of ``compat:unibct``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    old_run: str | None = Field(
        None, description="folder of the run that trained the old encoder, or of the exported encoder"
    )
    old_encoder: str | None = Field(
        None, description="instead of old_run: an encoder by name, such as core:timm?model=resnet18"
    )
    lam: float = Field(0.9, ge=0, lt=1, description="propagation along the neighbour graph; 0: plain class means")
    temperature: float = Field(0.05, gt=0, description="of the edges of the neighbour graph")
    solver: Literal["closed", "iterate"] = Field(
        "closed", description="closed: one linear system per class; iterate: for classes of many thousands"
    )
    refresh_epochs: list[int] = Field(
        [10, 20],
        min_length=1,
        description="epochs (from 0) at whose start prototypes are refined; before the first of them the new encoder "
        "trains freely",
    )
    prototype_weight: float = Field(1.0, ge=0, description="factor of the prototype loss from the first refresh on")
    prototype_scale: float = Field(16.0, gt=0, description="factor of the cosines with the prototypes")
    prototype_margin: float = Field(0.0, ge=0, description="arcface margin in the prototype loss, radians")
    known_only: bool = Field(False, description="prototype loss only for classes that the old model knows by name")
    classifier: Literal["softmax", "cosine", "cosface", "arcface", "arcface_monotone"] = Field(
        "softmax", description="the new classifier: linear with bias, or cosine with a margin"
    )
    scale: float = Field(30.0, gt=0, description="factor of the new logits; not used by softmax")
    margin: float = Field(0.3, ge=0, description="margin of cosface and arcface, for arcface in radians")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the classification loss")
    measure: bool = Field(True, description="measure the compatibility on training items when the encoder is exported")

    @field_validator("refresh_epochs")
    @classmethod
    def _from_zero(cls, epochs: list[int]) -> list[int]:
        if min(epochs) < 0:
            raise ValueError("epochs are counted from 0")
        return epochs

    @model_validator(mode="after")
    def _one_old_model(self) -> Self:
        if self.old_run is not None and self.old_encoder is not None:
            raise ValueError("give old_run or old_encoder, not both")
        return self


def mixbct() -> dict[str, Any]:
    """Settings of the public re-implementation in MixBCT, for 35 epochs: plain prototype loss without a scale."""
    return {
        "lam": 0.9, "temperature": 0.05, "refresh_epochs": [10, 20], "prototype_scale": 1.0,
        "classifier": "arcface_monotone", "scale": 64.0, "margin": 0.5,
    }  # fmt: skip


def advbct() -> dict[str, Any]:
    """The prototype loss of the re-implementation in AdvBCT: arcface, known classes only."""
    return {"prototype_scale": 30.0, "prototype_margin": 0.3, "known_only": True}


class UniBCTObjective(Objective):
    """``CE(new classifier) + prototype_weight * prototype loss``, the latter from the first refresh on.

    Needs ``image`` (or ``frozen_features``) and ``label``. The old encoder runs once, while this is built, and when the
    export is measured.
    """

    def __init__(self, encoder: Encoder, num_classes: int, prototypes: PrototypeLoss, config: UniBCTConfig) -> None:
        super().__init__()
        self.encoder, self.prototypes, self.config = encoder, prototypes, config
        self.classifier = nn.Linear(encoder.embed_dim, num_classes, bias=config.classifier == "softmax")
        self.head: MarginSoftmax | None = None
        if config.classifier != "softmax":
            kind: MarginKind = "none" if config.classifier == "cosine" else config.classifier
            self.head = MarginSoftmax(kind, config.scale, config.margin)
        self.epoch = 0
        self._refresh: PrototypeRefresh | None = None
        self._old: OldModel | None = None
        self._context: BuildContext | None = None

    @classmethod
    def build(cls, config: UniBCTConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Loads the old model and embeds the training split with it; prototypes start as unit class means.

        Raises ``RecipeError`` where no old model is named, the training split has no classes, or ``known_only`` finds
        no class of the old model in it.
        """
        if config.old_run is None and config.old_encoder is None:
            raise RecipeError("compat:unibct needs the old model: set objective.old_run to the folder of its run.")
        if not context.classes:
            raise RecipeError("compat:unibct needs a data set with labels; the training split has no classes.")
        old = OldModel.load(config.old_run, config.old_encoder, context)
        known = None
        if config.known_only:
            known = torch.tensor([c for c, name in enumerate(context.classes) if name in set(old.classes)])
            if not len(known):
                raise RecipeError(
                    f"known_only = true, but no class of the training split is a class of {old.path}. "
                    "Use known_only = false."
                )
        old.encoder.to(next(encoder.parameters()).device)
        vectors, labels = embedded(old.encoder, context.eval_batches(old.encoder))
        settings: dict[str, Any] = {"num_classes": len(context.classes), "on_missing": "skip"}
        means = refine_prototypes(vectors, vectors, labels, lam=0.0, **settings)
        margin = (
            MarginSoftmax("arcface", config.prototype_scale, config.prototype_margin)
            if config.prototype_margin
            else None
        )
        scale = 1.0 if margin is not None else config.prototype_scale
        loss = PrototypeLoss(means, scale, margin, known, weight=config.prototype_weight)
        self = cls(encoder, len(context.classes), loss, config)
        # No modules: neither the old model nor the refresh is trained or saved with this objective.
        self._old, self._context = old, context
        self._refresh = PrototypeRefresh(
            loss, encoder, lambda: context.eval_batches(encoder), vectors, config.refresh_epochs, lam=config.lam,
            temperature=config.temperature, solver=config.solver, **settings,
        )  # fmt: skip
        return self

    def on_epoch_start(self, epoch: int) -> None:
        """Refines the prototypes with the encoder as it is, at ``refresh_epochs``."""
        self.epoch = epoch
        if self._refresh is not None:
            self._refresh.on_epoch_start(epoch)

    def forward(self, batch: Batch) -> LossOutput:
        """Parts ``new`` and ``prototype`` (weighted; 0 before the first refresh); stat ``accuracy``."""
        embeddings, labels = self.encoder(batch).pooled, batch["label"]
        logits = (
            self.classifier(embeddings) if self.head is None else self.head(embeddings, self.classifier.weight, labels)
        )
        new = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        begun = self.epoch >= min(self.config.refresh_epochs)
        prototype = self.prototypes(embeddings, labels) if begun else torch.zeros_like(new)
        stats = {"accuracy": (logits.detach().argmax(dim=1) == labels).float().mean()}
        return LossOutput(new + prototype, {"new": new.detach(), "prototype": prototype.detach()}, stats)

    def relations(self) -> list[dict[str, Any]]:
        """The relation that the export records: ``compatible`` with the old space, with its measured evidence."""
        if self._old is None or self._context is None:
            return []
        evidence: dict[str, Any] = {"method": "compat:unibct", "prototype_weight": self.config.prototype_weight}
        if self.config.measure:
            evidence |= measured_compatibility(self.exported_encoder(), self._old.encoder, self._context)
        return [{"kind": "compatible", "to": self._old.fingerprint(), "evidence": evidence}]
