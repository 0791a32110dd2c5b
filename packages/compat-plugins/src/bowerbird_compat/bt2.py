"""BT2: backward compatibility in a few added dimensions, so that the new model's own quality need not suffer.

Zhou, Li, Shrivastava, Zhao, Torralba, Tian, Lim: BT^2: Backward-compatible Training with Basis Transformation, ICCV
2023 (arXiv 2211.03989). Orthonormal maps move information between the entries that old vectors are compared with and
the others, and lose none. The path of the authors' ResNet code is followed, see docs/methods/bt2.md.

Letters: B batch, N items, C classes, F trunk, d new (teacher) size, d_old, k added. A vector has ``d + k`` entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import register_parametrization

from bowerbird.errors import InputError
from bowerbird_compat.bct import InfluenceLoss
from bowerbird_compat.checks import (
    check_above_zero,
    check_batch,
    check_classes,
    check_integers,
    check_not_negative,
    cosine_distance,
    integer_labels,
)
from bowerbird_compat.feature_cache import FeatureCache

__all__ = ["BT2Loss", "BT2Output", "BasisTransformHead", "FeatureCache", "FoldedHead", "compare"]

OrthogonalMap = Literal["matrix_exp", "cayley", "householder"]


@dataclass(frozen=True)
class BT2Output:
    """What the head returns.

    Attributes:
        logits: ``(B, C)`` of the new classifier; ``None`` where the head has none.
        backward: ``(B, d_old)``, not normalised: compared with old vectors.
        teacher: ``(B, d)`` of norm 1: follows the teacher.
        embedding: ``(B, d + k)``, the new vector; it begins with ``backward``. Its squared norm is ``1 + scale^2``
            (``scale^2`` with k = 0).
    """

    logits: Tensor | None
    backward: Tensor
    teacher: Tensor
    embedding: Tensor


class BasisTransformHead(nn.Module):
    """From the trunk's output ``h`` to the new vector ``z``; section 3.2 of the paper.

    With ``u = unit(h[:d])``, ``v = unit(W h+ + c)``: ``m = [unit(v[:k]), scale u Q_new^T]``, and ``z`` is ``m`` with
    its first ``d_old`` entries turned by ``Q_old``. Inner products of new vectors are those of ``m`` whatever the two
    orthogonal matrices are.

    Args:
        in_dim: F, at least ``new_dim``; ``new_dim + old_dim`` in the paper.
        new_dim: d, size of the teacher's vectors.
        old_dim: d_old, at most ``new_dim + added_dim``.
        added_dim: k, in ``0..old_dim``.
        scale: Weight of the teacher part against the added part, above 0: 2 in the authors' settings, 3 in their code.
        num_classes: C of a new classifier ``teacher -> logits`` without bias; ``None``: no classifier.
        rectify: Whether ``h+`` is ``relu(h)`` (their ResNet) or ``h`` (their vision transformer).
        orthogonal_map: How the matrices are kept orthogonal, see ``torch.nn.utils.parametrizations.orthogonal``.

    Raises:
        InputError: (a ``ValueError``) Sizes that do not fit together.

    ``new_basis.weight`` and ``old_basis.weight`` are the orthogonal matrices; an orthogonal matrix may be assigned.
    """

    def __init__(
        self,
        in_dim: int,
        new_dim: int,
        old_dim: int,
        added_dim: int = 32,
        scale: float = 2.0,
        num_classes: int | None = None,
        *,
        rectify: bool = True,
        orthogonal_map: OrthogonalMap = "matrix_exp",
    ) -> None:
        super().__init__()
        check_sizes(in_dim, new_dim, old_dim, added_dim)
        check_above_zero(scale=scale)
        check_integers(num_classes=1 if num_classes is None else num_classes)
        if num_classes is not None and num_classes < 1:
            raise InputError(f"num_classes is {num_classes}; it must be at least 1, or None for no classifier.")
        self.in_dim, self.new_dim, self.old_dim, self.added_dim = in_dim, new_dim, old_dim, added_dim
        self.scale, self.rectify = float(scale), rectify
        # With k = 0 nothing would read it.
        self.free = nn.Linear(in_dim, old_dim) if added_dim else None
        self.new_basis = _orthogonal(new_dim, orthogonal_map)
        self.old_basis = _orthogonal(old_dim, orthogonal_map)
        self.classifier = nn.Linear(new_dim, num_classes, bias=False) if num_classes is not None else None

    @property
    def embed_dim(self) -> int:
        return self.new_dim + self.added_dim

    def forward(self, features: Tensor) -> BT2Output:
        """``features`` ``(B, F)``: the trunk's pooled output, not normalised.

        Raises ``InputError`` for another shape.
        """
        _check_features(features, self.in_dim)
        # Half precision would leave the matrices orthogonal to two digits only.
        with torch.autocast(device_type=features.device.type, enabled=False):
            # Not of `weight`: to look at that is to compute it.
            features = features.to(next(self.old_basis.parameters()).dtype)
            teacher = F.normalize(features[:, : self.new_dim])
            mixed = self.scale * self.new_basis(teacher)
            if self.free is not None:
                free = F.normalize(self.free(features.relu() if self.rectify else features))
                mixed = torch.cat([F.normalize(free[:, : self.added_dim]), mixed], dim=1)
            backward = self.old_basis(mixed[:, : self.old_dim])
            embedding = torch.cat([backward, mixed[:, self.old_dim :]], dim=1)
            logits = None if self.classifier is None else self.classifier(teacher)
        return BT2Output(logits, backward, teacher, embedding)

    def export(self) -> nn.Module:
        """For serving only: ``(B, F) -> embedding (B, d + k)``, both orthogonal maps folded into one matrix."""
        return FoldedHead(self)


class FoldedHead(nn.Module):
    """``BasisTransformHead`` as one matrix on ``[unit(free), teacher]``; frozen."""

    matrix: Tensor

    def __init__(self, head: BasisTransformHead) -> None:
        super().__init__()
        self.in_dim, self.new_dim, self.rectify = head.in_dim, head.new_dim, head.rectify
        self.free: nn.Linear | None = None
        k, size = head.added_dim, head.embed_dim
        with torch.no_grad():
            q_new, q_old = head.new_basis.weight, head.old_basis.weight
            first, second = (torch.eye(size, dtype=q_old.dtype, device=q_old.device) for _ in range(2))
            first[k:, k:] = head.scale * q_new
            second[: head.old_dim, : head.old_dim] = q_old
            self.register_buffer("matrix", second @ first)
            if head.free is not None:  # rows beyond the k-th only scale what is normalised anyway
                self.free = nn.Linear(head.in_dim, k, dtype=q_old.dtype, device=q_old.device).requires_grad_(False)
                self.free.weight.copy_(head.free.weight[:k])
                self.free.bias.copy_(head.free.bias[:k])

    def forward(self, features: Tensor) -> Tensor:
        _check_features(features, self.in_dim)
        with torch.autocast(device_type=features.device.type, enabled=False):
            features = features.to(self.matrix.dtype)
            parts = [F.normalize(features[:, : self.new_dim])]
            if self.free is not None:
                parts.insert(0, F.normalize(self.free(features.relu() if self.rectify else features)))
            return F.linear(torch.cat(parts, dim=1), self.matrix)


def check_sizes(in_dim: int, new_dim: int, old_dim: int, added_dim: int) -> None:
    check_integers(in_dim=in_dim, new_dim=new_dim, old_dim=old_dim, added_dim=added_dim)
    if min(new_dim, old_dim) < 1:
        raise InputError(f"new_dim is {new_dim} and old_dim {old_dim}; both must be at least 1.")
    if in_dim < new_dim:
        raise InputError(f"in_dim is {in_dim}; the trunk must give at least new_dim = {new_dim} entries.")
    if not 0 <= added_dim <= old_dim:
        raise InputError(f"added_dim is {added_dim}; it must be in 0..old_dim, and old_dim is {old_dim}.")
    if old_dim > new_dim + added_dim:
        raise InputError(
            f"old_dim is {old_dim}, more than new_dim + added_dim = {new_dim + added_dim}: the new vector would be "
            "shorter than the old one. Raise new_dim or added_dim."
        )


def _check_features(features: Tensor, in_dim: int) -> None:
    if features.ndim != 2 or features.shape[1] != in_dim:
        raise InputError(f"Features have shape {tuple(features.shape)}; (batch, {in_dim}) is needed.")


def _orthogonal(size: int, orthogonal_map: OrthogonalMap) -> nn.Linear:
    if orthogonal_map not in get_args(OrthogonalMap):
        raise InputError(f"orthogonal_map is {orthogonal_map!r}; accepted: {', '.join(get_args(OrthogonalMap))}.")
    linear = nn.Linear(size, size, bias=False)
    start = nn.init.orthogonal_(linear.weight).detach().clone()
    if orthogonal_map == "householder":
        register_parametrization(linear, "weight", _WholeSigns())
    made: nn.Linear = orthogonal(linear, orthogonal_map=orthogonal_map)  # type: ignore[assignment]
    made.weight = start
    return made


class _WholeSigns(nn.Module):
    """What torch's Householder map reads from the diagonal of its parameter are signs, and it cuts them to whole
    numbers: after one step of weight decay 0.99 would be 0, and the matrix zero."""

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter.tril(-1) + torch.diag(parameter.detach().diagonal().sign())

    def right_inverse(self, parameter: Tensor) -> Tensor:
        return parameter


class BT2Loss(nn.Module):
    """``CE + w_i CE(P unit(b), y) + w_o (1 - cos(b, old)) + w_t (1 - cos(u, teacher))``, means over the batch.

    Args:
        prototypes: P, ``(C, d_old)``: class means of old vectors. The rows are used as they are given.
        teacher_weight, influence_weight, old_weight: Factors, at least 0; 1, 10, 5 in the paper.
        class_map: New class -> row of ``prototypes``; default: the same indices.
        influence_scale: Factor of the logits of the influence term, which are in [-1, 1] without one.
        label_smoothing: Of both cross-entropies, in [0, 1). The authors' settings name 0.1, their trainer does not
            use it.
    """

    def __init__(
        self,
        prototypes: Tensor,
        teacher_weight: float = 1.0,
        influence_weight: float = 10.0,
        old_weight: float = 5.0,
        *,
        class_map: Mapping[int, int] | None = None,
        influence_scale: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_not_negative(teacher_weight=teacher_weight, influence_weight=influence_weight, old_weight=old_weight)
        self.influence = InfluenceLoss(
            prototypes, class_map, normalize=True, scale=influence_scale, label_smoothing=label_smoothing
        )
        self.teacher_weight, self.influence_weight = float(teacher_weight), float(influence_weight)
        self.old_weight, self.label_smoothing = float(old_weight), float(label_smoothing)

    def forward(self, out: BT2Output, labels: Tensor, old: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Scalars without their weights, ``cls`` (only where there are logits), ``influence``, ``old``, ``teacher``;
        and the weighted sum ``total``.

        Args:
            out: Of ``BasisTransformHead``.
            labels: ``(B,)`` integers.
            old: ``(B, d_old)`` of the same items by the old encoder; no gradient reaches it.
            teacher: ``(B, d)`` of the same items by the teacher; no gradient reaches it.

        Raises:
            InputError: (a ``ValueError``) Shapes that do not fit.
            TypeError: Labels are not integers.
        """
        for name, given, ours in (("old", old, out.backward), ("teacher", teacher, out.teacher)):
            if given.shape != ours.shape:
                raise InputError(
                    f"The {name} vectors have shape {tuple(given.shape)}; {tuple(ours.shape)} is needed. "
                    f"Build the head with {'old_dim' if name == 'old' else 'new_dim'} = the size of the {name} vectors."
                )
        size = self.influence.old_classifier.shape[1]
        if size != out.backward.shape[1]:
            raise InputError(f"The prototypes have size {size}, and the head's old_dim is {out.backward.shape[1]}.")
        labels = integer_labels(labels, len(old)).to(out.backward.device)
        check_batch(out.backward)
        terms = {
            "influence": self.influence(out.backward, labels),
            "old": cosine_distance(out.backward, old),
            "teacher": cosine_distance(out.teacher, teacher),
        }
        total = self.influence_weight * terms["influence"] + self.old_weight * terms["old"]
        total = total + self.teacher_weight * terms["teacher"]
        if out.logits is not None:
            check_classes(labels, out.logits.shape[1])
            terms["cls"] = F.cross_entropy(out.logits, labels, label_smoothing=self.label_smoothing)
            total = total + terms["cls"]
        return {**terms, "total": total}


def compare(query: Tensor, gallery: Tensor, *, gallery_version: Literal["old", "new"]) -> Tensor:
    """Distances ``(Q, G)`` of new queries: 1 minus the inner product, nothing is normalised.

    Args:
        query: ``(Q, d + k)`` new vectors.
        gallery: ``(G, D)``. An old gallery should hold unit vectors.
        gallery_version: ``old``: only the first ``D`` entries of the queries count. ``new``: the sizes must agree.
            Between new vectors, which all have one norm, the order is that of cosine distance.

    Raises:
        InputError: (a ``ValueError``) Sizes that do not fit, or another version.
    """
    query, gallery = torch.as_tensor(query), torch.as_tensor(gallery)
    if query.ndim != 2 or gallery.ndim != 2:
        raise InputError(f"query {tuple(query.shape)} and gallery {tuple(gallery.shape)} must be matrices.")
    size = gallery.shape[1]
    if gallery_version not in ("old", "new"):
        raise InputError(f"gallery_version is {gallery_version!r}; accepted: old, new.")
    if gallery_version == "new" and size != query.shape[1]:
        raise InputError(f"Queries have size {query.shape[1]} and the new gallery {size}; if it is old, say so.")
    if size > query.shape[1]:
        raise InputError(f"Queries have size {query.shape[1]}, and the old gallery has more: {size}.")
    both = torch.promote_types(query.dtype, gallery.dtype)
    return 1 - query[:, :size].to(both) @ gallery.to(both).T
