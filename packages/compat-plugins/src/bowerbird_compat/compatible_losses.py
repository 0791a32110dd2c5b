"""Compatibility losses of hot-refresh upgrades: the right old vector against wrong old and wrong new ones.

Zhang et al., ICLR 2022 (arXiv 2201.09724); see ``ract`` and docs/methods/ract.md.

Letters: B batch, K keys (the batch, or the batches of all processes), C classes, D embedding size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.errors import InputError
from bowerbird_compat.checks import (
    check_above_zero,
    check_batch,
    check_classes,
    check_finite,
    check_integers,
    check_not_negative,
    frozen_classifier,
    full_precision,
    integer_labels,
)

Reduction = Literal["mean", "none"]
Miner = Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]


class _PairwiseLoss(nn.Module):
    """What the contrastive and the triplet loss share: settings, keys, and which of them are negatives."""

    def __init__(
        self, topk: int | None, new_to_new: bool, gather: bool, detach_keys: bool | None, weight: float, reduction: str,
        miner: Miner | None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_not_negative(weight=weight)
        if reduction not in get_args(Reduction):
            raise InputError(f"reduction is {reduction!r}; accepted: {', '.join(get_args(Reduction))}.")
        if topk is not None:
            check_integers(topk=topk)
        self.topk = int(topk) if topk is not None and topk > 0 else None
        self.new_to_new, self.gather, self.weight, self.reduction = new_to_new, gather, float(weight), reduction
        self.detach_keys = gather if detach_keys is None else detach_keys
        self.miner = miner
        self._warned = False

    def forward(self, new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar (``(B,)`` with ``reduction="none"``).

        Args:
            new: ``(B, D)`` embeddings of the new encoder, in any scale.
            old: ``(B, D)`` of the old encoder for the same pictures, in any scale. They get no gradient.
            labels: ``(B,)`` int64, class indices.

        A batch without two different labels costs 0, with a warning the first time.

        Raises ``InputError`` (a ``ValueError``) for shapes that do not fit and for rows that are not finite (they are
        named), ``TypeError`` for labels that are not integers.
        """
        labels = _checked_pair(new, old, labels)
        # Half precision cannot hold cosines divided by a temperature of 0.01.
        with torch.autocast(device_type=new.device.type, enabled=False):
            new = full_precision(new)
            u, o = F.normalize(new), F.normalize(old.detach().to(new.dtype))
            old_keys, key_labels = o, labels
            if self.gather:
                old_keys, key_labels = dist.gathered(o), dist.gathered(labels)
            blocks = [old_keys]
            if self.new_to_new:
                keys = u.detach() if self.detach_keys else u
                blocks.append(dist.gathered(keys) if self.gather else keys)
            excluded = labels.unsqueeze(1) == key_labels
            if excluded.all():
                self._warn_once(len(key_labels))
            left_out = [excluded if self.miner is None else self._mined(u, labels, k, key_labels) for k in blocks]
            each = self.weight * self._terms(u, o, blocks, left_out)
        if not torch.isfinite(each.detach()).all():  # every row is in its own term; which one was it?
            check_finite(new, "New embeddings")
            check_finite(old, "Old embeddings")
        return each if self.reduction == "none" else each.sum() / max(len(each), 1)

    def _terms(self, u: Tensor, o: Tensor, blocks: list[Tensor], excluded: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def _mined(self, u: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor) -> Tensor:
        """``(B, K)``: true where the miner did not choose a pair of different labels."""
        assert self.miner is not None
        with torch.no_grad():
            chosen = self.miner(u, labels, keys, key_labels)
        anchors, negatives = chosen[-2 if len(chosen) == 4 else 0], chosen[-1]  # pairs a, p, a, n; or triplets a, p, n
        left_out = torch.ones(len(u), len(keys), dtype=torch.bool, device=u.device)
        left_out[anchors, negatives] = False
        return left_out | (labels.unsqueeze(1) == key_labels)

    def _warn_once(self, size: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: a batch of {size} has no two different labels, so no negatives; its loss is "
                "0. Use larger batches, or batches of several classes.",
                stacklevel=4,
            )


class CompatibleContrastiveLoss(_PairwiseLoss):
    """An embedding must be nearer to its own old vector than to old and new vectors of other classes.

    With unit vectors ``u`` (new) and ``o`` (old) and ``N(i)`` the items with another label than ``i``

        L = -1/B sum_i log [ e^(u_i.o_i/t) / (e^(u_i.o_i/t) + sum_N(i) e^(u_i.o_k/t) + sum_N(i) e^(u_i.u_k/t)) ]

    Only the old vector of the same picture is a positive; others of its class are neither positive nor negative.

    Args:
        temperature: t, above 0.
        topk: Only that many of the most similar negatives of each of the two sums; ``None`` or less than 1: all.
        new_to_new: The last sum, which RACT adds. Without it: the point-to-point baseline (``contra``).
        gather: Negatives from the batches of all processes of the group; every process needs the same batch size.
        detach_keys: No gradient through ``u_k``. Default: as ``gather``, because gathered vectors carry no gradient in
            the published code. The value of the loss does not depend on it.
        weight: Factor, at least 0.
        reduction: ``none`` gives ``(B,)``.
        miner: Chooses negatives before ``topk``, per block: any miner of pytorch-metric-learning, called with
            embeddings, labels, keys, labels of the keys. The positives that it returns are not used.
    """

    def __init__(
        self,
        temperature: float = 0.01,
        topk: int | None = 10,
        new_to_new: bool = True,
        gather: bool = False,
        detach_keys: bool | None = None,
        weight: float = 1.0,
        *,
        reduction: Reduction = "mean",
        miner: Miner | None = None,
    ) -> None:
        super().__init__(topk, new_to_new, gather, detach_keys, weight, reduction, miner)
        check_above_zero(temperature=temperature)
        self.temperature = float(temperature)

    def _terms(self, u: Tensor, o: Tensor, blocks: list[Tensor], excluded: list[Tensor]) -> Tensor:
        logits = [(u * o).sum(dim=1, keepdim=True)]
        for keys, left_out in zip(blocks, excluded, strict=True):
            similarity = (u @ keys.T).masked_fill(left_out, -math.inf)  # masked before the largest are taken
            if self.topk is not None:
                similarity = similarity.topk(min(self.topk, similarity.shape[1]), dim=1).values
            logits.append(similarity)
        scores = torch.cat(logits, dim=1) / self.temperature
        return scores.logsumexp(dim=1) - scores[:, 0]


class CompatibleTripletLoss(_PairwiseLoss):
    """The same with hinges on Euclidean distances ``d`` of unit vectors (0 to 2).

    ``max(0, margin - (d(u_i, negative) - d(u_i, o_i)))``, averaged over the ``topk`` nearest old negatives of every
    item, plus the same average over its nearest new negatives. A place in the ``topk`` that no negative fills counts
    with 0.

    Args:
        margin: At least 0.
        topk: ``None`` or less than 1: all K.
        new_to_new: The average over new negatives, which RACT adds.
        gather, detach_keys, weight, reduction, miner: As in ``CompatibleContrastiveLoss``.
    """

    def __init__(
        self,
        margin: float = 0.8,
        topk: int | None = 10,
        new_to_new: bool = True,
        *,
        gather: bool = False,
        detach_keys: bool | None = None,
        weight: float = 1.0,
        reduction: Reduction = "mean",
        miner: Miner | None = None,
    ) -> None:
        super().__init__(topk, new_to_new, gather, detach_keys, weight, reduction, miner)
        check_not_negative(margin=margin)
        self.margin = float(margin)

    def _terms(self, u: Tensor, o: Tensor, blocks: list[Tensor], excluded: list[Tensor]) -> Tensor:
        positive = torch.linalg.vector_norm(u - o, dim=1, keepdim=True)
        total = positive.new_zeros(len(u)) + 0.0 * positive.squeeze(1)  # connected where there is no hinge at all
        for keys, left_out in zip(blocks, excluded, strict=True):
            # Through a matrix product short distances would lose half of their digits.
            distance = torch.cdist(u, keys, compute_mode="donot_use_mm_for_euclid_dist")
            distance = distance.masked_fill(left_out, math.inf)
            count = distance.shape[1] if self.topk is None else min(self.topk, distance.shape[1])
            nearest = distance.topk(count, dim=1, largest=False).values
            total = total + (self.margin - (nearest - positive)).clamp(min=0).mean(dim=1)
        return total


class ClassLevelCompatibleLoss(nn.Module):
    """The old classifier must recognise the embedding, against the other old and the other *new* classifier rows.

    Cross-entropy over the logits ``[W_old f, W_new f without the target's]`` with target ``y`` in the first block. It
    needs the same classes, in the same order, in both classifiers.

    Args:
        old_classifier: ``(C, D)``, copied into a buffer; never trained.
        new_to_new: The second block, which RACT adds. Without it: BCT's influence loss.
        weight: Factor, at least 0.
    """

    old_classifier: Tensor

    def __init__(self, old_classifier: Tensor, new_to_new: bool = True, *, weight: float = 1.0) -> None:
        super().__init__()
        check_not_negative(weight=weight)
        self.register_buffer("old_classifier", frozen_classifier(old_classifier))
        self.new_to_new, self.weight = new_to_new, float(weight)

    def forward(self, new: Tensor, labels: Tensor, new_classifier: Tensor | None = None) -> Tensor:
        """The loss, a scalar, from raw embeddings ``(B, D)``, labels ``(B,)`` and ``W_new`` ``(C, D)``.

        ``new_classifier`` gets a gradient; it may be left out where ``new_to_new`` is false. Raises ``InputError`` (a
        ``ValueError``) for shapes that do not fit, ``TypeError`` for labels that are not integers.
        """
        classes, size = self.old_classifier.shape
        if new.ndim != 2 or new.shape[1] != size:
            raise InputError(f"Embeddings have shape {tuple(new.shape)}; the old classifier needs (batch, {size}).")
        check_finite(new, "New embeddings")
        labels = integer_labels(labels, len(new))
        check_batch(new)
        check_classes(labels, classes)
        if self.new_to_new and (new_classifier is None or new_classifier.shape != self.old_classifier.shape):
            found = None if new_classifier is None else tuple(new_classifier.shape)
            raise InputError(
                f"The new classifier has shape {found}; the old one has {(classes, size)}, and the class-level "
                "form needs the same classes in both."
            )
        with torch.autocast(device_type=new.device.type, enabled=False):
            new = full_precision(new)
            logits = F.linear(new, self.old_classifier.to(new.dtype))
            if self.new_to_new and new_classifier is not None:
                others = F.linear(new, new_classifier.to(new.dtype))
                others = others.scatter(1, labels[:, None], -math.inf)
                logits = torch.cat([logits, others], dim=1)
            return self.weight * F.cross_entropy(logits, labels)


def _checked_pair(new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    if new.ndim != 2 or new.shape != old.shape:
        raise InputError(
            f"New embeddings have shape {tuple(new.shape)} and old ones {tuple(old.shape)}; both must be (B, D). "
            "This method compares them entry by entry: give the new encoder the size of the old one."
        )
    return integer_labels(labels, len(new))
