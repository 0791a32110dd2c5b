"""``compat:unibct`` as it is trained: warm up, then classify against prototypes that are refined at given epochs.

Zhang et al., IJCAI 2022 (arXiv 2203.01583); the parts are in ``unibct``, see docs/methods/unibct.md.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator

from bowerbird.batch import Batch
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, Encoder, LossOutput
from bowerbird_compat.compatible_objective import CompatibleConfig, CompatibleObjective
from bowerbird_compat.heads import MarginSoftmax
from bowerbird_compat.unibct import PrototypeLoss, PrototypeRefresh, embedded, refine_prototypes

REFRESH_AT = (2 / 7, 4 / 7)  # epochs 10 and 20 of 35, as in MixBCT


class UniBCTConfig(CompatibleConfig):
    """Settings of ``compat:unibct``."""

    lam: float = Field(0.9, ge=0, lt=1, description="propagation along the neighbour graph; 0: plain class means")
    temperature: float = Field(0.05, gt=0, description="of the edges of the neighbour graph")
    solver: Literal["closed", "iterate"] = Field(
        "closed", description="closed: one linear system per class; iterate: for classes of many thousands"
    )
    refresh_epochs: list[int] | None = Field(
        None,
        min_length=1,
        description="epochs (from 0) at whose start prototypes are refined; before the first of them the new encoder "
        "trains freely; default: after 2/7 and 4/7 of all steps, which is epochs 10 and 20 of 35",
    )
    prototype_weight: float = Field(1.0, ge=0, description="factor of the prototype loss from the first refresh on")
    prototype_scale: float = Field(16.0, gt=0, description="factor of the cosines with the prototypes")
    prototype_margin: float = Field(0.0, ge=0, description="arcface margin in the prototype loss, radians")
    known_only: bool = Field(False, description="prototype loss only for classes that the old model knows by name")

    @field_validator("refresh_epochs")
    @classmethod
    def _from_zero(cls, epochs: list[int] | None) -> list[int] | None:
        if epochs is not None and min(epochs) < 0:
            raise ValueError("epochs are counted from 0")
        return epochs


def mixbct() -> dict[str, Any]:
    """Settings of the public re-implementation in MixBCT, for 35 epochs: plain prototype loss without a scale."""
    return {
        "lam": 0.9, "temperature": 0.05, "refresh_epochs": [10, 20], "prototype_scale": 1.0,
        "classifier": "arcface_monotone", "scale": 64.0, "margin": 0.5,
    }  # fmt: skip


def advbct() -> dict[str, Any]:
    """The prototype loss of the re-implementation in AdvBCT: arcface, known classes only."""
    return {"prototype_scale": 30.0, "prototype_margin": 0.3, "known_only": True}


class UniBCTObjective(CompatibleObjective):
    """``CE(new classifier) + prototype_weight * prototype loss``, the latter from the first refresh on.

    Needs ``image`` (or ``frozen_features``) and ``label``. The old encoder runs once, while this is built, and when the
    export is measured.
    """

    method = "compat:unibct"
    config: UniBCTConfig

    def __init__(self, encoder: Encoder, num_classes: int, prototypes: PrototypeLoss, config: UniBCTConfig) -> None:
        super().__init__(encoder, num_classes, config)
        self.prototypes = prototypes
        self.begun = 0 in (config.refresh_epochs or ())  # whether the prototype loss counts yet
        self._refresh: PrototypeRefresh | None = None
        self._refresh_steps: tuple[int, ...] = ()

    @classmethod
    def build(cls, config: UniBCTConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Loads the old model and embeds the training split with it; prototypes start as unit class means.

        Raises ``RecipeError`` where no old model is named, the training split has no classes, or ``known_only`` finds
        no class of the old model in it.
        """
        old = cls.old_model(config, encoder, context)
        known = None
        if config.known_only:
            known = torch.tensor([c for c, name in enumerate(context.classes) if name in set(old.classes)])
            if not len(known):
                raise RecipeError(
                    f"known_only = true, but no class of the training split is a class of {old.path}. "
                    "Use known_only = false."
                )
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
        self.old, self.context = old, context
        if config.refresh_epochs is None:
            self._refresh_steps = tuple(round(share * context.total_steps) for share in REFRESH_AT)
        self._refresh = PrototypeRefresh(
            loss, encoder, lambda: context.eval_batches(encoder), vectors, config.refresh_epochs or (0,),
            lam=config.lam, temperature=config.temperature, solver=config.solver, **settings,
        )  # fmt: skip
        return self

    def on_epoch_start(self, epoch: int) -> None:
        """Refines the prototypes with the encoder as it is, at ``refresh_epochs``."""
        if self.config.refresh_epochs is None:
            return
        self.begun = epoch >= min(self.config.refresh_epochs)
        if self._refresh is not None:
            self._refresh.on_epoch_start(epoch)

    def before_step(self, step: int) -> None:
        """The same at shares of all steps, where ``refresh_epochs`` is not set."""
        if self.config.refresh_epochs is None and self._refresh is not None:
            self.begun = step >= self._refresh_steps[0]
            if step in self._refresh_steps:
                self._refresh.refresh()

    def forward(self, batch: Batch) -> LossOutput:
        """Parts ``new`` and ``prototype`` (weighted; 0 before the first refresh); stat ``accuracy``."""
        embeddings, labels = self.encoder(batch).pooled, batch["label"]
        new, accuracy = self.classify(embeddings, labels)
        prototype = self.prototypes(embeddings, labels) if self.begun else torch.zeros_like(new)
        parts = {"new": new.detach(), "prototype": prototype.detach()}
        return LossOutput(new + prototype, parts, {"accuracy": accuracy})

    def evidence(self) -> dict[str, Any]:
        return {"prototype_weight": self.config.prototype_weight}
