"""``core:softmax``: an encoder trained as a classifier, with a linear or a cosine head.

B batch, D ``embed_dim``, C classes. Logits are ``W f + b``, or ``scale * cos(W_c, f)`` with ``cosine = true``
(NormFace, arXiv:1704.06369). The classifier is dropped after training; its rows stay beside the exported encoder, so
that later encoders can be trained to be compatible with it.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from bowerbird.batch import Batch
from bowerbird.errors import RecipeError
from bowerbird.objectives.configs import SoftmaxConfig
from bowerbird.protocols import BuildContext, Encoder, LossOutput, Objective


class Softmax(Objective):
    """Cross-entropy of a linear classifier on the embedding."""

    def __init__(self, encoder: Encoder, num_classes: int, config: SoftmaxConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.embed_dim, num_classes, bias=not config.cosine)
        self.label_smoothing = config.label_smoothing
        self.scale = (config.scale or 16.0) if config.cosine else None

    @classmethod
    def build(cls, config: SoftmaxConfig, encoder: Encoder, context: BuildContext) -> Self:
        return cls(encoder, class_count(context, "core:softmax"), config)

    def logits(self, embeddings: Tensor) -> Tensor:
        """``(B, D)`` to ``(B, C)``."""
        if self.scale is None:
            return self.classifier(embeddings)
        return self.scale * functional.linear(
            functional.normalize(embeddings), functional.normalize(self.classifier.weight)
        )

    def forward(self, batch: Batch) -> LossOutput:
        logits = self.logits(self.encoder(batch).pooled)
        loss = functional.cross_entropy(logits.float(), batch["label"], label_smoothing=self.label_smoothing)
        return LossOutput(total=loss, stats={"accuracy": accuracy(logits, batch["label"])})


def accuracy(logits: Tensor, labels: Tensor) -> Any:
    """Share of rows whose largest logit is that of the label, as a scalar tensor on the same device."""
    with torch.no_grad():
        return (logits.argmax(dim=1) == labels).float().mean()


def class_count(context: BuildContext, name: str) -> int:
    """Number of classes of the training split. Raises ``RecipeError`` where there are fewer than two."""
    if len(context.classes) < 2:
        raise RecipeError(f"objective {name!r} needs at least 2 classes; the data set has {len(context.classes)}")
    return len(context.classes)
