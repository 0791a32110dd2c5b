"""Two baselines of compatible training that imitate the old model: learning without forgetting, focal distillation.

As in OpenCompatible (types ``lwf`` and ``fd`` of its trainer), see docs/methods/ract.md. Li and Hoiem: Learning without
Forgetting, ECCV 2016; Yan et al.: Positive-Congruent Training, CVPR 2021 (arXiv 2011.09161).

B batch, C classes, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_compat.checks import (
    check_above_zero,
    check_batch,
    check_classes,
    check_not_negative,
    frozen_classifier,
    full_precision,
    integer_labels,
)


class DistillationLoss(nn.Module):
    """The old classifier should say of the new embedding what it says of the old one.

    ``weight * mean CE(log_softmax(W_old f_new / temperature), softmax(W_old f_old / old_temperature))``. No labels.

    Args:
        old_classifier: ``(C, D)``, copied into a buffer; never trained.
        temperature, old_temperature: Of the new and of the old side, above 0.
        weight: Factor, at least 0.
    """

    old_classifier: Tensor

    def __init__(
        self, old_classifier: Tensor, temperature: float = 0.01, old_temperature: float = 0.01, *, weight: float = 1.0
    ) -> None:
        super().__init__()
        check_above_zero(temperature=temperature, old_temperature=old_temperature)
        check_not_negative(weight=weight)
        self.register_buffer("old_classifier", frozen_classifier(old_classifier))
        self.temperature, self.old_temperature, self.weight = float(temperature), float(old_temperature), float(weight)

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        """The loss, a scalar, from raw embeddings ``(B, D)``; ``old`` gets no gradient. Raises ``InputError``."""
        _check_pair(new, old)
        if new.shape[1] != self.old_classifier.shape[1]:
            raise InputError(f"Embeddings have size {new.shape[1]}, the old classifier {self.old_classifier.shape[1]}.")
        with torch.autocast(device_type=new.device.type, enabled=False):
            new = full_precision(new)
            rows = self.old_classifier.to(new.dtype)
            said = (F.linear(old.detach().to(new.dtype), rows) / self.old_temperature).softmax(dim=1)
            return self.weight * F.cross_entropy(F.linear(new, rows) / self.temperature, said)


class FocalDistillationLoss(nn.Module):
    """Squared distance to the old embedding, counted more where the prediction is right already.

    ``weight * mean_i (alpha + beta * right_i) * mean_d (f_new - f_old)^2``.

    Args:
        alpha, beta: At least 0; 1 and 5 in OpenCompatible.
        weight: Factor, at least 0.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 5.0, *, weight: float = 1.0) -> None:
        super().__init__()
        check_not_negative(alpha=alpha, beta=beta, weight=weight)
        self.alpha, self.beta, self.weight = float(alpha), float(beta), float(weight)

    def forward(self, new: Tensor, old: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            new, old: ``(B, D)`` raw embeddings; ``old`` gets no gradient.
            labels: ``(B,)`` integers.
            logits: ``(B, C)`` of the new classifier: whose predictions are right or wrong. They get no gradient.

        Raises ``InputError`` for shapes that do not fit, ``TypeError`` for labels that are not integers.
        """
        _check_pair(new, old)
        if logits.ndim != 2 or len(logits) != len(new):
            raise InputError(f"logits have shape {tuple(logits.shape)}; ({len(new)}, C) is needed.")
        labels = integer_labels(labels, len(new)).to(logits.device)
        check_classes(labels, logits.shape[1])
        right = logits.detach().argmax(dim=1) == labels
        new = full_precision(new)
        each = (new - old.detach().to(new.dtype)).square().mean(dim=1)
        return self.weight * ((self.alpha + self.beta * right.to(each.dtype)) * each).mean()


def _check_pair(new: Tensor, old: Tensor) -> None:
    if new.ndim != 2 or new.shape != old.shape:
        raise InputError(f"New embeddings {tuple(new.shape)} and old ones {tuple(old.shape)} must both be (B, D).")
    check_batch(new)
