"""``core:margin``: classification with a margin, ArcFace (arXiv:1801.07698) or CosFace (arXiv:1801.09414).

B batch, D ``embed_dim``, C classes. With ``c_j = cos(f, W_j)`` the target logit is ``cos(arccos(c_y) + margin)``
(arcface, margin in radians) or ``c_y - margin`` (cosface); all logits are multiplied with ``scale``. The losses are
those of pytorch-metric-learning; the class vectors are kept as ``classifier.weight (C, D)``, like those of
``core:softmax``.
"""

from __future__ import annotations

import math
from typing import Any, Self

from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss
from torch import nn
from torch.nn import functional

from bowerbird.batch import Batch
from bowerbird.objectives.configs import MarginConfig
from bowerbird.objectives.softmax import accuracy, class_count
from bowerbird.protocols import BuildContext, Encoder, LossOutput, Objective


class Margin(Objective):
    """Softmax over cosines with a margin on the target class."""

    def __init__(self, encoder: Encoder, num_classes: int, config: MarginConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.embed_dim, num_classes, bias=False)
        sizes = {"num_classes": num_classes, "embedding_size": encoder.embed_dim, "scale": config.scale}
        if config.kind == "arcface":
            margin = 0.5 if config.margin is None else config.margin
            self.loss: Any = ArcFaceLoss(margin=math.degrees(margin), **sizes)
        else:
            self.loss = CosFaceLoss(margin=0.35 if config.margin is None else config.margin, **sizes)
        del self.loss.W  # (D, C) of the library; ours is lent to it for each forward pass

    @classmethod
    def build(cls, config: MarginConfig, encoder: Encoder, context: BuildContext) -> Self:
        return cls(encoder, class_count(context, "core:margin"), config)

    def forward(self, batch: Batch) -> LossOutput:
        embeddings, labels = self.encoder(batch).pooled.float(), batch["label"]
        weight = self.classifier.weight.float()
        self.loss.W = weight.t()
        try:
            loss = self.loss(embeddings, labels)
        finally:
            self.loss.W = None  # a tensor of the graph would keep it alive and forbid copies of the module
        cosines = functional.linear(functional.normalize(embeddings), functional.normalize(weight))
        return LossOutput(total=loss, stats={"accuracy": accuracy(cosines, labels)})
