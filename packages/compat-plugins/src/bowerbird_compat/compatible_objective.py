"""What the objectives of this package share: a new classifier, the old model, and the relation that is exported.

B batch, C classes, D embedding size.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, Encoder, Objective
from bowerbird_compat.heads import MarginSoftmax
from bowerbird_compat.old_model import OldModel, measured_compatibility


class CompatibleConfig(BaseModel):
    """Settings that all of them have."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    old_run: str | None = Field(
        None, description="folder of the run that trained the old encoder, or of the exported encoder"
    )
    old_encoder: str | None = Field(
        None, description="instead of old_run: an encoder by name, such as core:timm?model=resnet18"
    )
    classifier: Literal["softmax", "cosine", "cosface", "arcface", "arcface_monotone"] = Field(
        "softmax", description="the new classifier: linear, or cosine with a margin"
    )
    scale: float = Field(30.0, gt=0, description="factor of the new logits; not used by softmax")
    margin: float = Field(0.3, ge=0, description="margin of cosface and arcface, for arcface in radians")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the classification loss")
    measure: bool = Field(True, description="measure the compatibility on training items when the encoder is exported")

    @model_validator(mode="after")
    def _one_old_model(self) -> Self:
        if self.old_run is not None and self.old_encoder is not None:
            raise ValueError("give old_run or old_encoder, not both")
        return self


class CompatibleObjective(Objective):
    """A classification loss on the new embedding, beside which a subclass puts its compatibility loss.

    ``classifier`` holds ``W_new`` ``(C, D)``; ``old`` and ``context`` are no modules: neither trained nor saved.
    """

    method: ClassVar[str]

    def __init__(self, encoder: Encoder, num_classes: int, config: CompatibleConfig, *, bias: bool = True) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        linear = config.classifier == "softmax"
        self.classifier = nn.Linear(encoder.embed_dim, num_classes, bias=bias and linear)
        self.head: MarginSoftmax | None = None
        if config.classifier != "softmax":
            kind = "none" if config.classifier == "cosine" else config.classifier
            self.head = MarginSoftmax(kind, config.scale, config.margin)
        self.old: OldModel | None = None
        self.context: BuildContext | None = None

    @classmethod
    def old_model(cls, config: CompatibleConfig, encoder: Encoder, context: BuildContext) -> OldModel:
        """The old model, on the device of ``encoder``.

        Raises ``RecipeError`` where none is named or the training split has no classes.
        """
        if config.old_run is None and config.old_encoder is None:
            raise RecipeError(f"{cls.method} needs the old model: set objective.old_run to the folder of its run.")
        if not context.classes:
            raise RecipeError(f"{cls.method} needs a data set with labels; the training split has no classes.")
        old = OldModel.load(config.old_run, config.old_encoder, context)
        old.encoder.to(next(encoder.parameters()).device)
        return old

    def classify(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The classification loss and the accuracy (with the margin), scalars."""
        if self.head is None:
            logits = self.classifier(embeddings)
        else:
            logits = self.head(embeddings, self.classifier.weight, labels)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return loss, (logits.detach().argmax(dim=1) == labels).float().mean()

    def evidence(self) -> dict[str, Any]:
        """What the relation says about the training, beside ``method`` and what was measured."""
        return {}

    def relations(self) -> list[dict[str, Any]]:
        """The relation that the export records: ``compatible`` with the old space, with its measured evidence."""
        if self.old is None or self.context is None:
            return []
        evidence = {"method": self.method, **self.evidence()}
        if self.config.measure:
            evidence |= measured_compatibility(self.exported_encoder(), self.old.encoder, self.context)
        return [{"kind": "compatible", "to": self.old.fingerprint(), "evidence": evidence}]
