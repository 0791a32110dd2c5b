"""Backward-compatible training: a new encoder whose queries can be compared with the vectors of the old one.

Shen, Xiong, Xia, Soatto: Towards Backward-Compatible Representation Learning, CVPR 2020 (arXiv 2003.11942). The loss
of the new classifier gets a second term, the influence loss: the *old*, frozen classifier must also recognise the new
embedding. Where the paper is silent the authors' later code is followed (openBCT), see docs/methods/bct.md.

Letters: B batch, C_old / C_new classes, d_old / d_new embedding sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, LossOutput
from bowerbird_compat.checks import check_above_zero, check_integers, check_not_negative, full_precision, integer_labels
from bowerbird_compat.compatible_objective import CompatibleConfig, CompatibleObjective
from bowerbird_compat.heads import MarginSoftmax, match_dim
from bowerbird_compat.old_model import OldModel
from bowerbird_compat.prototypes import Prototypes, build_prototypes

__all__ = [
    "BCTConfig", "BCTObjective", "InfluenceLoss", "MarginSoftmax", "Prototypes", "build_prototypes", "match_dim",
]  # fmt: skip

Reduction = Literal["mean", "sum", "none"]


class InfluenceLoss(nn.Module):
    """Cross-entropy of the frozen old classifier on new embeddings.

    ``weight * mean CE(scale * A(f) W_old^T, class_map[y])`` over the samples whose class the old classifier knows,
    where ``A`` keeps the first ``d_old`` entries of ``f`` or appends zeros.

    Args:
        old_classifier: ``(C_old, d_old)``, copied into a buffer: it is saved with the module, and never a parameter.
            A row of zeros (a class without samples) is refused.
        class_map: New class -> row of ``old_classifier``. ``None``: the same indices; labels from ``C_old`` on are
            unknown.
        weight: Factor of the term (lambda), at least 0.
        normalize: Whether ``A(f)`` is brought to norm 1. The rows of ``old_classifier`` are used as they are given.
        scale: Factor of the logits. Without one, unit embeddings give logits in [-1, 1], whose cross-entropy cannot
            fall.
        margin: Cosine logits with a margin instead of linear ones; embeddings and rows are then normalised there.
        reduction: ``mean`` and ``sum`` are over the known samples only; ``none`` gives ``(B,)`` with 0 at the others.
        label_smoothing: In [0, 1), as in ``torch.nn.functional.cross_entropy``.

    Attributes:
        last_num_valid: How many samples of the last batch had an old class.
    """

    old_classifier: Tensor
    _rows: Tensor

    def __init__(
        self,
        old_classifier: Tensor,
        class_map: Mapping[int, int] | None = None,
        weight: float = 1.0,
        normalize: bool = False,
        scale: float = 1.0,
        margin: MarginSoftmax | None = None,
        reduction: Reduction = "mean",
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise InputError(f"reduction is {reduction!r}; accepted: {', '.join(get_args(Reduction))}.")
        check_not_negative(weight=weight)
        check_above_zero(scale=scale)
        check_not_negative(label_smoothing=label_smoothing)
        if not label_smoothing < 1:
            raise InputError(f"label_smoothing is {label_smoothing}; it must be in [0, 1).")
        if margin is not None and not isinstance(margin, nn.Module):
            raise InputError(f"margin is {margin!r}; give MarginSoftmax(kind, scale, margin) or None.")
        old_classifier = torch.as_tensor(old_classifier)
        self.register_buffer("old_classifier", checked_classifier(old_classifier))
        self.register_buffer("_rows", _row_of_class(class_map, len(old_classifier)).to(old_classifier.device))
        self.weight, self.scale, self.normalize = float(weight), float(scale), bool(normalize)
        self.margin, self.reduction, self.label_smoothing = margin, reduction, float(label_smoothing)
        self.last_num_valid = 0

    def old_labels(self, labels: Tensor) -> Tensor:
        """``(B,)`` rows of the old classifier, -1 where the class is not known to it."""
        known = (labels >= 0) & (labels < len(self._rows))
        return (
            torch.where(known, self._rows[labels.where(known, 0)], -1)
            if len(self._rows)
            else labels.new_full(labels.shape, -1)
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The term, a scalar; 0 if no label is known. ``embeddings`` ``(B, d_new)`` as they come, ``labels`` ``(B,)``.

        Raises ``TypeError`` for labels that are not integers, ``InputError`` for shapes that do not fit.
        """
        embeddings = torch.as_tensor(embeddings)
        if embeddings.ndim != 2:
            raise InputError(f"Embeddings have shape {tuple(embeddings.shape)}; (batch, size) is needed.")
        rows = self.old_labels(integer_labels(labels, len(embeddings)))
        valid = rows >= 0
        self.last_num_valid = int(valid.sum())
        if self.last_num_valid == 0 or self.weight == 0:
            # Connected to the graph, and 0 whatever the embeddings are: training is then exactly plain training.
            zero = embeddings[:0].sum()
            return zero if self.reduction != "none" else zero.expand(len(embeddings))
        if self.last_num_valid < len(embeddings):
            embeddings, rows = embeddings[valid], rows[valid]
        # Half precision would round scaled logits to a quarter, at a scale of 64.
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            features = match_dim(full_precision(embeddings), self.old_classifier.shape[1])
            logits = self._logits(features, rows)
            loss = F.cross_entropy(logits, rows, reduction=self.reduction, label_smoothing=self.label_smoothing)
        if self.reduction == "none":
            loss = loss.new_zeros(len(valid)).masked_scatter(valid, loss)
        return self.weight * loss

    def _logits(self, features: Tensor, rows: Tensor) -> Tensor:
        if self.margin is not None:
            return self.scale * self.margin(features, self.old_classifier, rows)
        if self.normalize:
            features = F.normalize(features)
        if self.scale != 1:
            features = self.scale * features  # not the logits: they are many more
        return F.linear(features, self.old_classifier.to(features.dtype))


def checked_classifier(weight: Tensor) -> Tensor:
    """A copy of a finite float matrix ``(C_old, d_old)`` without rows of zeros, without gradient."""
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise InputError(
            f"Old classifier: {weight.dtype} of shape {tuple(weight.shape)}; a float matrix (C_old, d_old) is due."
        )
    if not torch.isfinite(weight).all():
        raise InputError("The old classifier holds values that are not finite (NaN or infinity).")
    empty = (weight == 0).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"Rows {empty[:20]} of the old classifier are zero: these classes had no sample. "
            "Leave them out: build_prototypes(..., on_missing='skip') and its class_map()."
        )
    return weight.detach().clone()


def _row_of_class(class_map: Mapping[int, int] | None, num_rows: int) -> Tensor:
    """Lookup table: entry ``c`` is the row of new class ``c``, or -1."""
    if class_map is None:
        return torch.arange(num_rows)
    if not isinstance(class_map, Mapping):
        raise InputError(f"class_map is {class_map!r}; a mapping from new classes to rows is needed.")
    for new, row in class_map.items():
        check_integers(**{"a class of class_map": new, "a row of class_map": row})
        if new < 0 or not 0 <= row < num_rows:
            raise InputError(f"class_map has {new} -> {row}; classes are at least 0 and rows in 0..{num_rows - 1}.")
    table = torch.full((max(class_map, default=-1) + 1,), -1, dtype=torch.int64)
    for new, row in class_map.items():
        table[new] = row
    return table


class BCTConfig(CompatibleConfig):
    """Settings of ``compat:bct``."""

    influence_weight: float = Field(1.0, ge=0, description="factor of the influence loss (lambda)")
    old_classifier: Literal["auto", "real", "prototypes"] = Field(
        "auto",
        description="real: the classifier the old encoder was trained with, its classes matched by name; "
        "prototypes: class means of old embeddings of the new training split; "
        "auto: real if it knows every new class, else prototypes",
    )
    influence_normalize: bool | None = Field(
        None,
        description="unit embeddings in the influence loss; default: true for prototypes, false for a real classifier",
    )
    influence_scale: float | None = Field(
        None, gt=0, description="factor of the old logits; default: 16 with unit embeddings, else 1"
    )
    normalize_prototypes: bool = Field(False, description="give prototypes norm 1")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of both losses")


def openbct() -> dict[str, Any]:
    """Settings of the authors' code: linear classifiers, raw embeddings, lambda 1."""
    return {
        "influence_weight": 1.0,
        "old_classifier": "real",
        "influence_normalize": False,
        "influence_scale": 1.0,
        "classifier": "softmax",
    }


def prototypes() -> dict[str, Any]:
    """For new classes that the old model never saw: class means, unit embeddings, scale 16."""
    return {
        "influence_weight": 1.0,
        "old_classifier": "prototypes",
        "influence_normalize": True,
        "influence_scale": 16.0,
    }


class BCTObjective(CompatibleObjective):
    """``CE(new classifier) + lambda * influence loss`` on one embedding; see ``BCTConfig``.

    Needs ``image`` (or ``frozen_features``) and ``label``. The old encoder runs only while this is built (for
    prototypes) and when the export is measured, never in training.
    """

    method = "compat:bct"
    config: BCTConfig

    def __init__(self, encoder: Encoder, num_classes: int, influence: InfluenceLoss, config: BCTConfig) -> None:
        super().__init__(encoder, num_classes, config)
        self.influence = influence

    @classmethod
    def build(cls, config: BCTConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Loads the old model, matches its classes with ``context.classes`` by name, makes the old classifier.

        Raises ``RecipeError`` where no old model is named, the training split has no classes, or the old model has no
        such classifier.
        """
        old = cls.old_model(config, encoder, context)
        influence = cls._influence(config, old, context)
        self = cls(encoder, len(context.classes), influence, config)
        self.old, self.context = old, context
        return self

    @staticmethod
    def _influence(config: BCTConfig, old: OldModel, context: BuildContext) -> InfluenceLoss:
        row_of = {name: row for row, name in enumerate(old.classes)}
        shared = {new: row_of[name] for new, name in enumerate(context.classes) if name in row_of}
        source = config.old_classifier
        if source == "auto":
            source = "real" if old.classifier is not None and len(shared) == len(context.classes) else "prototypes"
        if source == "real":
            if old.classifier is None:
                raise RecipeError(
                    f"old_classifier = 'real', but {old.path} holds no classifier. Use old_classifier = 'prototypes'."
                )
            if not shared:
                raise RecipeError(
                    f"old_classifier = 'real', but no class of the training split ({_some(context.classes)}) "
                    f"is a class of {old.path} ({_some(old.classes)}). Use old_classifier = 'prototypes'."
                )
            weight, class_map = old.classifier, shared
        else:
            made = build_prototypes(
                old.encoder, context.eval_batches(old.encoder), len(context.classes),
                normalize=config.normalize_prototypes, on_missing="skip",
            )  # fmt: skip
            weight, class_map = made.weight, made.class_map()
        normalize = source == "prototypes" if config.influence_normalize is None else config.influence_normalize
        if normalize and source == "real":
            weight = F.normalize(weight)  # unit embeddings against the rows of a cosine classifier
        scale = config.influence_scale or (16.0 if normalize else 1.0)
        return InfluenceLoss(
            weight, class_map, config.influence_weight, normalize, scale, label_smoothing=config.label_smoothing
        )

    def forward(self, batch: Batch) -> LossOutput:
        """Parts ``new`` and ``influence`` (weighted); stats ``accuracy`` (with the margin), ``influence_samples``."""
        embeddings, labels = self.encoder(batch).pooled, batch["label"]
        new, accuracy = self.classify(embeddings, labels)
        influence = self.influence(embeddings, labels)
        stats: dict[str, float | Tensor] = {
            "accuracy": accuracy, "influence_samples": float(self.influence.last_num_valid),
        }  # fmt: skip
        return LossOutput(new + influence, {"new": new.detach(), "influence": influence.detach()}, stats)

    def evidence(self) -> dict[str, Any]:
        return {"influence_weight": self.config.influence_weight}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"
