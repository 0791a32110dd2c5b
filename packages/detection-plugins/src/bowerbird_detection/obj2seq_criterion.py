"""Obj2Seq's matching and losses of objects, inside each prompt (arXiv:2209.13948, section 3.4).

N prompts (rows), Q queries of a row, G objects of a row, K keypoints. Boxes are centre, width and height in 0..1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from bowerbird.errors import InputError
from bowerbird_detection.obj2seq_layers import at_least_float32

OKSVariant = Literal["official", "coco"]
Match = tuple[Tensor, Tensor]  # queries and objects of a row, int64 of equal length
ALPHA, GAMMA = 0.25, 2.0
LARGEST_COST = 1e9  # in place of a cost that is no number: training then stops at the loss, not in the matching

# How exactly people place COCO's 17 points of a person, as a part of the person's size (COCO keypoint evaluation).
COCO_SIGMAS = (
    0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087,
    0.089, 0.089,
)  # fmt: skip
OTHER_SIGMA = 0.05  # of points that nobody measured


@dataclass(frozen=True)
class LossWeights:
    """Of the terms, both in the matching cost and in the losses."""

    classes: float = 2.0
    box: float = 5.0
    giou: float = 2.0
    keypoint: float = 40.0
    oks: float = 5.0


PAPER_WEIGHTS = LossWeights()


@torch.no_grad()
def match_prompted(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    pred_keypoints: Tensor | None = None,
    *,
    num_boxes: float = 1.0,
    num_points: float = 1.0,
    weights: LossWeights = PAPER_WEIGHTS,
    sigmas: Sequence[float] | None = None,
) -> list[Match]:
    """The assignment of objects to queries with the least cost, for every row by itself.

    The cost of a pair, with p the query's probability, b and k its box and keypoints, g and k* the object's:

        2 [0.25 (1-p)^2 (-log(p + 1e-8)) - 0.75 p^2 (-log(1 - p + 1e-8))] + 5 |b - g|_1 - 2 GIoU
        with keypoints: these divided by num_boxes, + 40 sum_vis |k - k*|_1 / num_points - 5 OKS / num_boxes

    Args:
        pred_logits: ``(N, Q)``, every row for one category; or ``(N, Q, C)``, then ``targets`` have ``labels``.
        pred_boxes: ``(N, Q, 4)``.
        targets: Of every row ``boxes (G, 4)``, with keypoints ``keypoints (G, K, 3)``: x and y in 0..1 and a flag,
            above 0 where a point is annotated. Points outside of the picture do not count.
        pred_keypoints: ``(N, Q, K, 2)``, where the category has keypoints.
        num_boxes, num_points: What the terms are divided by in training.
        sigmas: K numbers for the object keypoint similarity; by default COCO's for K = 17, else 0.05.

    Returns:
        For every row the matched queries, in order, and their objects: min(Q, G) of each, none for a row without
        objects.

    Raises:
        InputError: Shapes that do not fit, or boxes outside of 0..1.
    """
    pred_logits, pred_boxes = at_least_float32(pred_logits), at_least_float32(pred_boxes)
    pred_keypoints = None if pred_keypoints is None else at_least_float32(pred_keypoints)
    objects = _joined(pred_logits, pred_boxes, targets, pred_keypoints, sigmas)
    empty = torch.empty(0, dtype=torch.int64, device=pred_logits.device)
    matches = [(empty, empty)] * len(targets)
    if not len(objects.rows):
        return matches
    logits = pred_logits[objects.rows]  # (G of all rows, Q)
    if objects.labels is not None:
        logits = logits.gather(2, objects.labels[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
    p = logits.sigmoid()
    positive = ALPHA * (1 - p) ** GAMMA * -(p + 1e-8).log()
    negative = (1 - ALPHA) * p**GAMMA * -(1 - p + 1e-8).log()
    boxes = pred_boxes[objects.rows]
    cost = weights.classes * (positive - negative)
    cost = cost + weights.box * (boxes - objects.boxes[:, None]).abs().sum(-1)
    cost = cost - weights.giou * generalized_iou(corners(boxes), corners(objects.boxes[:, None]))
    if pred_keypoints is not None:
        assert objects.points is not None and objects.sigmas is not None
        points = pred_keypoints[objects.rows]
        gap = (points - objects.points[:, None]).abs().sum(-1) * objects.visible[:, None]
        similarity = keypoint_similarity(
            points, objects.points[:, None], objects.boxes[:, None], objects.visible[:, None], objects.sigmas
        )
        cost = cost / num_boxes + weights.keypoint * gap.sum(-1) / num_points - weights.oks * similarity / num_boxes
    costs = torch.nan_to_num(cost, nan=LARGEST_COST, posinf=LARGEST_COST, neginf=-LARGEST_COST).cpu().numpy()
    start = 0
    for row, count in enumerate(objects.counts):
        if count:
            queries, found = linear_sum_assignment(costs[start : start + count].T)
            matches[row] = (torch.from_numpy(queries).to(empty.device), torch.from_numpy(found).to(empty.device))
            start += count
    return matches


class PromptedSetCriterion(nn.Module):
    """The losses of objects, under the names of the authors' code; already weighted, to be summed.

        loss_ce     2/N_box sum over all rows and queries of the focal loss (alpha 0.25, gamma 2); matched queries are 1
        loss_bbox   5/N_box sum |b - g|_1              loss_giou   2/N_box sum (1 - GIoU)      over matched pairs
        loss_kps_l1 40/num_points sum_vis |k - k*|_1   loss_oks    5/N_box sum mean_vis (1 - exp(-d^2 / D))

    with d the distance of a point and A the area of the object's box, ``D = 2 A sigma`` in the authors' code
    (``oks_variant = "official"``) and ``2 A (2 sigma)^2`` by COCO's definition (``"coco"``), which their matching uses.

    Args:
        weights: The factors in front.
        oks_variant: D.
        sigmas: As of ``match_prompted``.
    """

    def __init__(
        self,
        weights: LossWeights = PAPER_WEIGHTS,
        *,
        oks_variant: OKSVariant = "official",
        sigmas: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if oks_variant not in ("official", "coco"):
            raise InputError(f"oks_variant = {oks_variant!r}: expected 'official' or 'coco'")
        self.weights, self.oks_variant, self.sigmas = weights, oks_variant, sigmas

    def forward(
        self,
        pred_logits: Tensor,
        pred_boxes: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        pred_keypoints: Tensor | None = None,
        *,
        num_boxes: float | None = None,
        num_points: float | None = None,
    ) -> dict[str, Tensor]:
        """Scalars by name; those of keypoints only with ``pred_keypoints``.

        ``num_boxes`` and ``num_points`` are those of the whole batch (mean over processes); by default those of
        ``targets``. They count as at least 1. Other arguments and errors as of ``match_prompted``.
        """
        pred_logits, pred_boxes = at_least_float32(pred_logits), at_least_float32(pred_boxes)
        pred_keypoints = None if pred_keypoints is None else at_least_float32(pred_keypoints)
        objects = _joined(pred_logits, pred_boxes, targets, pred_keypoints, self.sigmas)
        boxes_by = max(1.0, sum(objects.counts) if num_boxes is None else num_boxes)
        points_by = max(1.0, float(objects.visible.sum()) if num_points is None else num_points)
        matches = match_prompted(
            pred_logits, pred_boxes, targets, pred_keypoints,
            num_boxes=boxes_by, num_points=points_by, weights=self.weights, sigmas=self.sigmas,
        )  # fmt: skip
        rows, queries, found = _pairs(matches, objects.counts, pred_logits.device)
        wanted = torch.zeros_like(pred_logits)
        if objects.labels is None:
            wanted[rows, queries] = 1
        else:
            wanted[rows, queries, objects.labels[found]] = 1
        focal = sigmoid_focal_loss(pred_logits, wanted, alpha=ALPHA, gamma=GAMMA, reduction="sum")
        boxes, true = pred_boxes[rows, queries], objects.boxes[found]
        overlap = generalized_iou(corners(boxes), corners(true))
        losses = {
            "loss_ce": self.weights.classes * focal / boxes_by,
            "loss_bbox": self.weights.box * functional.l1_loss(boxes, true, reduction="sum") / boxes_by,
            "loss_giou": self.weights.giou * (1 - overlap).sum() / boxes_by,
        }
        if pred_keypoints is not None:
            assert objects.points is not None and objects.sigmas is not None
            points, true_points, seen = pred_keypoints[rows, queries], objects.points[found], objects.visible[found]
            gap = (points - true_points).abs().sum(-1)
            losses["loss_kps_l1"] = self.weights.keypoint * gap[seen].sum() / points_by
            squared = (points - true_points).square().sum(-1)
            scale = (2 * objects.sigmas) ** 2 if self.oks_variant == "coco" else objects.sigmas
            apart = 1 - torch.exp(-squared / (2 * true[:, 2:].prod(-1, keepdim=True) * scale + TINY))
            mean = (apart * seen).sum(-1) / seen.sum(-1).clamp(min=1)
            losses["loss_oks"] = self.weights.oks * mean.sum() / boxes_by
        return losses


# ------------------------------------------------------------------------------------------------------ geometry

TINY = 1e-15


def corners(boxes: Tensor) -> Tensor:
    """Centre, width, height ``(..., 4)`` to left, top, right, bottom."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al., CVPR 2019, arXiv:1902.09630) of boxes by corners ``(..., 4)`` that broadcast.

    Boxes without any area have an IoU of 0.
    """
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    return inner / union.clamp(min=TINY) - (hull - union) / hull.clamp(min=TINY)


def keypoint_similarity(points: Tensor, true: Tensor, boxes: Tensor, visible: Tensor, sigmas: Tensor) -> Tensor:
    """COCO's object keypoint similarity, ``(...)``; 0 where no point is visible.

    Args:
        points, true: ``(..., K, 2)`` that broadcast.
        boxes: ``(..., 4)``, of ``true``: their area is the object's.
        visible: bool ``(..., K)``.
        sigmas: ``(K,)``.
    """
    squared = (points - true).square().sum(-1)
    near = torch.exp(-squared / (2 * boxes[..., 2:].prod(-1, keepdim=True) * (2 * sigmas) ** 2 + TINY))
    return (near * visible).sum(-1) / visible.sum(-1).clamp(min=1)


# -------------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class _Objects:
    """The objects of all rows, one after the other."""

    counts: list[int]
    rows: Tensor
    boxes: Tensor
    labels: Tensor | None
    points: Tensor | None
    visible: Tensor
    sigmas: Tensor | None


def visible_points(keypoints: Tensor) -> Tensor:
    """bool ``(..., K)`` of keypoints ``(..., K, 3)``: annotated, and inside of the picture."""
    inside = (keypoints[..., :2] >= 0) & (keypoints[..., :2] <= 1)
    return (keypoints[..., 2] > 0) & inside.all(dim=-1)


def _joined(
    logits: Tensor,
    boxes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    keypoints: Tensor | None,
    sigmas: Sequence[float] | None,
) -> _Objects:
    count, queries = logits.shape[:2] if logits.ndim in (2, 3) else (-1, -1)
    if boxes.shape != (count, queries, 4) or len(targets) != count:
        raise InputError(
            f"pred_logits {tuple(logits.shape)}, pred_boxes {tuple(boxes.shape)} and {len(targets)} targets; expected "
            "(N, Q), (N, Q, 4) and N"
        )
    true = torch.cat([target["boxes"].reshape(-1, 4) for target in targets] or [boxes.new_zeros(0, 4)]).to(boxes)
    counts = [len(target["boxes"]) for target in targets]
    if not ((true >= 0) & (true <= 1)).all():
        wrong = true[((true < 0) | (true > 1) | true.isnan()).any(1)][0].tolist()
        raise InputError(
            f"target boxes: {wrong} is no box of centre, width and height in 0..1; divide by the picture's size"
        )
    labels = None
    if logits.ndim == 3:
        if any("labels" not in target for target in targets):
            raise InputError("pred_logits (N, Q, C) need the labels of the targets")
        found_labels = [target["labels"].reshape(-1) for target in targets]
        labels = torch.cat(found_labels or [torch.zeros(0)]).to(boxes.device, torch.int64)
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[2]):
            raise InputError(f"labels {labels.tolist()}: expected classes from 0 to {logits.shape[2] - 1}")
    points = spread = None
    visible = torch.zeros((len(true), 0), dtype=torch.bool, device=boxes.device)
    if keypoints is not None:
        number = keypoints.shape[2] if keypoints.ndim == 4 else -1
        if keypoints.shape != (count, queries, number, 2):
            raise InputError(f"pred_keypoints {tuple(keypoints.shape)}: expected (N, Q, K, 2)")
        for row, target in enumerate(targets):
            found = target["keypoints"].shape if "keypoints" in target else None
            if found != (counts[row], number, 3):
                raise InputError(
                    f"row {row}: keypoints of {counts[row]} objects with {number} points each (boxes and 2 x {number} "
                    f"numbers are {4 + 2 * number} steps) are expected as {(counts[row], number, 3)}, found "
                    f"{None if found is None else tuple(found)}"
                )
        joined = torch.cat([target["keypoints"] for target in targets] or [boxes.new_zeros(0, number, 3)]).to(boxes)
        visible = visible_points(joined)
        points = joined[..., :2]
        if sigmas is None:
            sigmas = COCO_SIGMAS if number == len(COCO_SIGMAS) else (OTHER_SIGMA,) * number
        if len(sigmas) != number:
            raise InputError(f"{len(sigmas)} sigmas for {number} keypoints: expected one for each")
        spread = boxes.new_tensor(sigmas)
    repeats = torch.tensor(counts, dtype=torch.int64, device=boxes.device)
    rows = torch.arange(count, device=boxes.device).repeat_interleave(repeats)
    return _Objects(counts, rows, true, labels, points, visible, spread)


def _pairs(matches: Sequence[Match], counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Row and query of every matched pair, and its object's position among those of all rows."""
    starts = [sum(counts[:row]) for row in range(len(counts))]
    rows = [torch.full_like(queries, row) for row, (queries, _) in enumerate(matches)]
    found = [objects + starts[row] for row, (_, objects) in enumerate(matches)]
    nothing = [torch.empty(0, dtype=torch.int64, device=device)]
    return torch.cat(rows or nothing), torch.cat([q for q, _ in matches] or nothing), torch.cat(found or nothing)
