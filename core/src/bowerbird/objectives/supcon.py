"""``core:supcon``: supervised contrastive learning (arXiv:2004.11362), with the loss of pytorch-metric-learning.

Items of one class attract, all others of the batch repel. Batches need several items of a class: set
``train.items_per_class``. The loss compares items with each other, so a joined batch is not the mean of its parts: with
several processes each one compares the items of its own part.
"""

from __future__ import annotations

from typing import Self

import torch
from pytorch_metric_learning.losses import SupConLoss

from bowerbird.batch import Batch
from bowerbird.objectives.configs import SupConConfig
from bowerbird.protocols import BuildContext, Encoder, LossOutput, Objective


class SupCon(Objective):
    """Supervised contrastive loss on the embedding itself, without a projection that is thrown away."""

    def __init__(self, encoder: Encoder, config: SupConConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.loss = SupConLoss(temperature=config.temperature)

    @classmethod
    def build(cls, config: SupConConfig, encoder: Encoder, context: BuildContext) -> Self:
        return cls(encoder, config)

    def forward(self, batch: Batch) -> LossOutput:
        labels = batch["label"]
        loss = self.loss(self.encoder(batch).pooled.float(), labels)
        counts = torch.bincount(labels)[labels]
        return LossOutput(total=loss, stats={"share_with_positives": (counts > 1).float().mean()})
