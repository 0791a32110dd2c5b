"""ACSL, a classification loss for detectors with many classes of very unequal size, and the box head that has it.

Wang, Zhu, Zhao, Zeng, Wang, Tang: Adaptive Class Suppression Loss for Long-Tail Object Detection, CVPR 2021
(arXiv 2104.00885).

Every class has its own sigmoid. A box does not push all other classes down, only those that it is confused with; the
background pushes down the classes of a frequency group in a share of its rows. N boxes, C classes and the background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird_detection.configs import ClassLoss

BACKGROUND_FRACTIONS = (0.01, 0.1, 1.0)  # of the background rows that push down rare, common, frequent classes
GROUPS = ("rare", "common", "frequent")
PRIOR = 0.01  # first probability of every class in a new classifier

Fractions = float | Sequence[float]
Reduction = Literal["mean", "sum", "none"]


def adaptive_class_suppression_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    score_threshold: float = 0.7,
    class_frequency: Tensor | None = None,
    background_fractions: Fractions = BACKGROUND_FRACTIONS,
    background_index: int = 0,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    drawn_rows: Sequence[Tensor] | None = None,
) -> Tensor:
    """Weighted sigmoid cross-entropy ``1/N sum_ij w_ij BCE(z_ij, [j = y_i])``, w from ``suppression_weights``.

    Its gradient is ``w_ij (sigmoid(z_ij) - [j = y_i]) / N``. Without boxes it is 0, connected to ``logits``.

    Args:
        logits: z, ``(N, C + 1)``.
        reduction: ``mean`` over all rows, the background's included; ``sum``; or ``none``: entries ``(N, C + 1)``.

    The other arguments, and what is raised: as ``suppression_weights``.
    """
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction = {reduction!r}: expected 'mean', 'sum' or 'none'")
    weights = suppression_weights(
        logits,
        labels,
        score_threshold=score_threshold,
        class_frequency=class_frequency,
        background_fractions=background_fractions,
        background_index=background_index,
        generator=generator,
        drawn_rows=drawn_rows,
    )
    return _weighted_cross_entropy(logits, labels, weights, reduction)


def sigmoid_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The baseline: ACSL with all weights 1, the background's column included.

    Args:
        logits: ``(N, C + 1)``.
        labels: Whole numbers ``(N,)`` in 0..C.
    """
    _check(logits, labels)
    return _weighted_cross_entropy(logits, labels, None, "mean")


def _weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    entries: Tensor = _WeightedEntries.apply(_at_least_float32(logits), labels.long()[:, None], weights)
    if reduction == "none":
        return entries
    return entries.sum() if reduction == "sum" else entries.sum() / max(1, len(logits))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _WeightedEntries(torch.autograd.Function):
    """w_ij BCE(z_ij, [j = y_i]), ``(N, C + 1)``.

    With s = -z at the targets, z at the other entries that count and -inf elsewhere, it is softplus(s), and its
    derivative sigmoid(s), with the sign turned at the targets. So no entry is below 0, and neither targets nor float
    weights are made: over 1,203 classes they would take longer than the loss itself.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, column: Tensor, weights: Tensor | None) -> Tensor:
        signed = logits.clone() if weights is None else logits.masked_fill(~weights, -torch.inf)
        signed.scatter_(1, column, -logits.gather(1, column))
        ctx.save_for_backward(signed, column)
        return functional.softplus(signed, threshold=50)  # torch's own limit, 20, is too low for float64

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        signed, column = ctx.saved_tensors
        slope = signed.sigmoid()
        slope.scatter_(1, column, -slope.gather(1, column))
        return slope.mul_(gradient), None, None


@torch.no_grad()
def suppression_weights(
    logits: Tensor,
    labels: Tensor,
    *,
    score_threshold: float = 0.7,
    class_frequency: Tensor | None = None,
    background_fractions: Fractions = BACKGROUND_FRACTIONS,
    background_index: int = 0,
    generator: torch.Generator | None = None,
    drawn_rows: Sequence[Tensor] | None = None,
) -> Tensor:
    """Which entries of the logits count: w of the loss.

    A row of class y counts at y and wherever its probability is at least ``score_threshold``, the background's column
    included. A background row counts at the background's column and at the classes of those groups that it was drawn
    for; for each group, ``int(fraction * N0)`` of the N0 background rows are drawn, independently of the other groups.

    Args:
        logits: ``(N, C + 1)``.
        labels: Whole numbers ``(N,)`` in 0..C.
        score_threshold: In (0, 1).
        class_frequency: Group of every column ``(C + 1,)``: 0 rare, 1 common, 2 frequent; the background's entry is not
            read. ``None``: all classes are frequent.
        background_fractions: Of rare, common and frequent classes, or one for all; in 0..1.
        background_index: Column of the background; may count from the end.
        generator: Of the draws; torch's global one by default.
        drawn_rows: Instead of drawing: indices of the background rows that push down rare, common, frequent classes.

    Returns:
        bool ``(N, C + 1)``.

    Raises:
        InputError: A label that is no column, a threshold, fraction or group out of range, or a wrong shape.
    """
    _check(logits, labels)
    if not 0 < score_threshold < 1:
        raise InputError(f"score_threshold = {score_threshold}: expected a probability above 0 and below 1")
    columns = logits.shape[1]
    if not -columns <= background_index < columns:
        raise InputError(f"background_index = {background_index}: there are {columns} columns")
    background_index %= columns
    fractions = _fractions(background_fractions)
    in_group = _groups(class_frequency, columns, background_index, logits.device)

    background = labels == background_index
    foreground = (~background).nonzero()[:, 0]
    weights = torch.zeros_like(logits, dtype=torch.bool)
    weights[foreground] = _at_least_float32(logits[foreground]).sigmoid_() >= score_threshold
    rows = background.nonzero()[:, 0]
    if drawn_rows is None:
        drawn_rows = [rows[_draw(fraction, len(rows), generator).to(rows.device)] for fraction in fractions]
    elif len(drawn_rows) != len(GROUPS):
        raise InputError(f"drawn_rows has {len(drawn_rows)} entries; expected one for each of {', '.join(GROUPS)}")
    given = torch.cat([torch.as_tensor(drawn, device=rows.device).flatten() for drawn in drawn_rows]).long()
    if not torch.isin(given, rows).all():
        raise InputError(f"drawn_rows names rows that are not of the background, or none of the {len(labels)} rows")
    for group, drawn in zip(in_group, drawn_rows, strict=True):
        weights[drawn] |= group
    weights.scatter_(1, labels.long()[:, None], True)
    return weights


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != (len(logits),):
        raise InputError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected (boxes, classes + 1) and (boxes,)"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels are {labels.dtype}; expected whole numbers")
    if torch.compiler.is_compiling() or not len(labels):
        return
    lowest, highest = labels.aminmax()
    if lowest < 0 or highest >= logits.shape[1]:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"labels have {int(wrong)}; expected 0 to {logits.shape[1] - 1}, the columns of the logits")


def _fractions(given: Fractions) -> tuple[float, ...]:
    # A number may be of numpy's or torch's kinds, too.
    shared = isinstance(given, int | float) or getattr(given, "ndim", None) == 0
    fractions = (float(given),) * 3 if shared else tuple(float(value) for value in given)  # type: ignore[arg-type, union-attr]
    if len(fractions) != len(GROUPS):
        raise InputError(f"background_fractions has {len(fractions)} values; expected one for each of {GROUPS}, or one")
    for group, fraction in zip(GROUPS, fractions, strict=True):
        if not 0 <= fraction <= 1:
            raise InputError(f"background_fractions: {fraction} for {group} classes; expected a share from 0 to 1")
    return fractions


def _groups(class_frequency: Tensor | None, columns: int, background_index: int, device: torch.device) -> list[Tensor]:
    """bool ``(C + 1,)`` of rare, common, frequent classes."""
    if class_frequency is None:
        groups = torch.full((columns,), 2, device=device)
    else:
        groups = torch.as_tensor(class_frequency).to(device, copy=True)
        if groups.shape != (columns,):
            raise InputError(
                f"class_frequency {tuple(groups.shape)}: expected {(columns,)}, a group for every column of the logits"
            )
    groups[background_index] = -1
    found = [groups == group for group in range(len(GROUPS))]
    known = torch.stack(found).any(dim=0)
    known[background_index] = True
    if not torch.compiler.is_compiling() and not known.all():
        column = int((~known).nonzero()[0, 0])
        raise InputError(
            f"class_frequency[{column}] = {groups[column].item()}: expected 0 (rare), 1 (common) or 2 (frequent)"
        )
    return found


def _draw(fraction: float, count: int, generator: torch.Generator | None) -> Tensor:
    """Positions of ``int(fraction * count)`` of ``count`` rows, without replacement."""
    wanted = int(fraction * count)
    if wanted == count:
        return torch.arange(count)
    device = "cpu" if generator is None else generator.device
    return torch.randperm(count, generator=generator, device=device)[:wanted]


# --------------------------------------------------------------------------------------------- in a detector's head


class ACSLBoxHead(RoIHeads):
    """torchvision's heads of R-CNN with another classification loss, and the scores that belong to it.

    It takes the arguments of ``RoIHeads`` and:

    Args:
        class_loss: ``acsl``; ``sigmoid``, its baseline with all weights 1; or ``softmax``, torchvision's own.
        score_threshold, class_frequency, background_fractions, generator: As ``suppression_weights``.

    Sigmoid scores do not compete: after training use ``score_thresh = 0`` and more detections per picture (300).
    """

    def __init__(
        self,
        *args: Any,
        class_loss: ClassLoss = "acsl",
        score_threshold: float = 0.7,
        class_frequency: Tensor | None = None,
        background_fractions: Fractions = BACKGROUND_FRACTIONS,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if class_loss not in ("softmax", "sigmoid", "acsl"):
            raise InputError(f"class_loss = {class_loss!r}: expected 'softmax', 'sigmoid' or 'acsl'")
        if not 0 < score_threshold < 1:
            raise InputError(f"score_threshold = {score_threshold}: expected a probability above 0 and below 1")
        self.class_loss: ClassLoss = class_loss
        self.score_threshold = score_threshold
        self.background_fractions, self.generator = _fractions(background_fractions), generator
        # It comes with the data: a detector that is read from its folder has none and needs none.
        groups = None if class_frequency is None else torch.as_tensor(class_frequency)
        self.register_buffer("class_frequency", groups, persistent=False)
        self._sampled_labels: list[Tensor] = []

    @classmethod
    def of(cls, heads: RoIHeads, **settings: Any) -> Self:
        """``heads`` with another loss: the same modules, nothing is copied. ``settings`` are those of the class."""
        made = cls(
            heads.box_roi_pool,
            heads.box_head,
            heads.box_predictor,
            heads.proposal_matcher.high_threshold,
            heads.proposal_matcher.low_threshold,
            heads.fg_bg_sampler.batch_size_per_image,
            heads.fg_bg_sampler.positive_fraction,
            heads.box_coder.weights,
            heads.score_thresh,
            heads.nms_thresh,
            heads.detections_per_img,
            heads.mask_roi_pool,
            heads.mask_head,
            heads.mask_predictor,
            heads.keypoint_roi_pool,
            heads.keypoint_head,
            heads.keypoint_predictor,
            **settings,
        )
        return made.train(heads.training)

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of sampled boxes: logits ``(N, C + 1)``, labels ``(N,)``, 0 the background."""
        if self.class_loss == "softmax":
            return functional.cross_entropy(logits, labels)
        if self.class_loss == "sigmoid":
            return sigmoid_classification_loss(logits, labels)
        return adaptive_class_suppression_loss(
            logits,
            labels,
            score_threshold=self.score_threshold,
            class_frequency=self.class_frequency,
            background_fractions=self.background_fractions,
            generator=self.generator,
        )

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        sampled = super().select_training_samples(proposals, targets)
        self._sampled_labels = sampled[2]
        return sampled

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        """torchvision's pass, with ``loss_classifier`` replaced: its logits and labels are picked up on the way."""
        if not self.training or self.class_loss == "softmax":
            return super().forward(features, proposals, image_shapes, targets)
        seen: list[Tensor] = []
        hook = self.box_predictor.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            hook.remove()
        labels, self._sampled_labels = torch.cat(self._sampled_labels), []
        return result, {**losses, "loss_classifier": self.classification_loss(seen[0], labels)}

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[Any]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As torchvision's, with a sigmoid for every class in the place of the softmax; the background is left out."""
        if self.class_loss == "softmax":
            found: tuple[list[Tensor], list[Tensor], list[Tensor]] = super().postprocess_detections(
                class_logits, box_regression, proposals, image_shapes
            )
            return found
        counts = [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode(box_regression, proposals)[:, 1:].split(counts)
        probabilities = class_logits.sigmoid()[:, 1:].split(counts)
        all_boxes, all_scores, all_labels = [], [], []
        for boxes, scores, shape in zip(decoded, probabilities, image_shapes, strict=True):
            row, label = (scores > self.score_thresh).nonzero(as_tuple=True)
            chosen, score = clip_boxes_to_image(boxes[row, label], shape), scores[row, label]
            kept = remove_small_boxes(chosen, min_size=1e-2)
            kept = kept[batched_nms(chosen[kept], score[kept], label[kept], self.nms_thresh)]
            kept = kept[: self.detections_per_img]
            all_boxes.append(chosen[kept])
            all_scores.append(score[kept])
            all_labels.append(label[kept] + 1)
        return all_boxes, all_scores, all_labels


def initialize_classifier(layer: nn.Linear) -> None:
    """For sigmoids: small weights, and every class with probability ``PRIOR``."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, -math.log((1 - PRIOR) / PRIOR))


def freeze_all_but(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Leave a gradient only to the named parameters and to those of the named modules; return their names.

    Raises ``UnknownNameError`` for a name that is neither.
    """
    known = dict(model.named_parameters())
    modules = {name for name, module in model.named_modules() if name and next(module.parameters(), None) is not None}
    for name in names:
        if name not in known and name not in modules:
            raise UnknownNameError(
                f"{type(model).__name__} has no parameters {name!r}.{did_you_mean(name, [*known, *modules])}"
            )
    for name, parameter in known.items():
        parameter.requires_grad_(any(name == kept or name.startswith(f"{kept}.") for kept in names))
    return [name for name, parameter in known.items() if parameter.requires_grad]
