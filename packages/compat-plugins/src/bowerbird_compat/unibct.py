"""Universal backward-compatible training: old-space prototypes for any classes, cleaned by the new encoder's view.

Zhang, Ge, Shen, Su, Wu, Yuan, Xu, Wang, Shan: Towards Universal Backward-Compatible Representation Learning, IJCAI
2022 (arXiv 2203.01583). Old vectors of classes that the old model never saw are noisy. Within a class they are averaged
along the neighbour graph of the *new* vectors, so that outliers of the class count little. The authors published no
code of it; docs/methods/unibct.md lists what was chosen. The objective is in ``unibct_objective``.

Letters: N samples, n samples of one class, C classes, D_old / D_new embedding sizes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_compat.bct import InfluenceLoss, checked_classifier
from bowerbird_compat.checks import (
    check_above_zero,
    check_finite,
    check_integers,
    check_no_class_missing,
    check_not_negative,
    integer_labels,
)
from bowerbird_compat.heads import MarginSoftmax
from bowerbird_compat.prototypes import Prototypes, evaluating, inputs_and_labels

__all__ = [
    "PrototypeLoss", "PrototypeRefresh", "Prototypes", "RefinedPrototypes", "embedded", "refine_prototypes",
    "transition_matrix",
]  # fmt: skip

Solver = Literal["closed", "iterate"]
Edges = Literal["row", "column"]


@dataclass(frozen=True)
class RefinedPrototypes(Prototypes):
    """Prototypes with the share that every sample has in the one of its class.

    Attributes:
        sample_weight: ``(N,)``, above 0, sums to 1 within each class.
    """

    sample_weight: Tensor


def transition_matrix(new: Tensor, temperature: float = 0.05, *, edges: Edges = "row") -> Tensor:
    """``(n, n)`` edges of one class: softmax of ``V V^T / temperature`` without the diagonal; rows sum to 1.

    ``new`` is ``V``, ``(n, D_new)``, used as it is given. A single sample leads to itself. With ``edges="column"`` the
    columns sum to 1 instead, as in the one public implementation: prototypes are then plain class means.
    """
    check_above_zero(temperature=temperature)
    if edges not in get_args(Edges):
        raise InputError(f"edges is {edges!r}; accepted: {', '.join(get_args(Edges))}.")
    if len(new) == 1:
        return new.new_ones(1, 1)
    similarity = (new @ new.T / temperature).fill_diagonal_(-math.inf)
    return similarity.softmax(dim=1 if edges == "row" else 0)


def refine_prototypes(
    old: Tensor,
    new: Tensor,
    labels: Tensor,
    *,
    lam: float = 0.9,
    temperature: float = 0.05,
    normalize_inputs: bool = True,
    normalize_output: bool = True,
    solver: Solver = "closed",
    max_iter: int = 200,
    tol: float = 1e-6,
    num_classes: int | None = None,
    on_missing: Literal["raise", "skip"] = "raise",
    edges: Edges = "row",
) -> RefinedPrototypes:
    """Structural prototype refinement: per class the mean of ``U* = (1 - lam)(I - lam E)^-1 U``.

    ``U`` are the old vectors of the class and ``E`` is the ``transition_matrix`` of its new vectors. The mean is a
    weighted one of ``U``, and it is the weights ``w = (1 - lam)/n (I - lam E)^-T 1`` that are solved for.

    Args:
        old: ``(N, D_old)``.
        new: ``(N, D_new)`` of the same samples in the same order.
        labels: ``(N,)`` int64, class indices.
        lam: In [0, 1); 0 gives the plain mean.
        temperature: Of the edges, above 0.
        normalize_inputs: Bring all vectors to norm 1 first.
        normalize_output: Bring the prototypes to norm 1.
        solver: ``closed`` (one linear system, ``O(n^3)``) or ``iterate`` (``O(n^2)`` per step, for large classes).
        max_iter: Steps at most; a warning where they do not suffice.
        tol: Bound on the sum of absolute errors of a class's weights.
        num_classes: C; by default the largest label + 1.
        on_missing: A class without samples: ``raise``, or ``skip`` (no row; see ``Prototypes.classes``).
        edges: See ``transition_matrix``.

    Computed in double precision; the result has the type of ``old`` and lies where ``old`` lies. No gradient.

    Raises:
        InputError: (a ``ValueError``) A setting out of range, shapes that do not fit, vectors that are not finite (the
            row is named), or classes without samples (they are listed).
        TypeError: Labels are not integers.
    """
    check_not_negative(lam=lam)
    check_integers(max_iter=max_iter, num_classes=1 if num_classes is None else num_classes)
    check_above_zero(tol=tol)
    if not lam < 1:
        raise InputError(f"lam is {lam}; it must be in [0, 1).")
    if solver not in get_args(Solver):
        raise InputError(f"solver is {solver!r}; accepted: {', '.join(get_args(Solver))}.")
    if max_iter < 1:
        raise InputError(f"max_iter is {max_iter}; it must be at least 1.")
    old, new = torch.as_tensor(old), torch.as_tensor(new)
    if not (old.is_floating_point() and new.is_floating_point()):
        raise InputError(f"Old vectors are {old.dtype} and new ones {new.dtype}; floating-point numbers are needed.")
    if old.ndim != 2 or new.ndim != 2 or len(old) != len(new):
        raise InputError(
            f"Old vectors have shape {tuple(old.shape)} and new ones {tuple(new.shape)}; "
            "(N, D_old) and (N, D_new) of the same N samples are needed."
        )
    labels = integer_labels(labels, len(old)).to(old.device)
    # The solution is small differences of nearly equal numbers: double precision, where the device has it.
    device = torch.device("cpu") if old.device.type == "mps" else old.device
    check_finite(old, "Old vectors")
    check_finite(new, "New vectors")
    u, v = (x.detach().to(device, torch.float64) for x in (old, new))
    if normalize_inputs:
        u, v = F.normalize(u), F.normalize(v)
    counts, classes = _counted(labels, num_classes, on_missing)

    weight, share = u.new_zeros(len(classes), u.shape[1]), u.new_zeros(len(u))
    by_class = labels.to(device).argsort(stable=True).split(counts[counts > 0].tolist())
    for row, members in enumerate(by_class):
        matrix = transition_matrix(v[members], temperature, edges=edges)
        share[members] = _solved(matrix, lam) if solver == "closed" else _iterated(matrix, lam, max_iter, tol)
        weight[row] = share[members] @ u[members]
    if normalize_output:
        weight = F.normalize(weight)
    return RefinedPrototypes(weight.to(old), counts, classes, share.to(old))


def _counted(labels: Tensor, num_classes: int | None, on_missing: str) -> tuple[Tensor, Tensor]:
    """``(C,)`` samples per class and the classes that get a row, both on the CPU."""
    if on_missing not in ("raise", "skip"):
        raise InputError(f"on_missing is {on_missing!r}; accepted: raise, skip.")
    if not len(labels):
        raise InputError("There are no samples, so there is nothing to average.")
    largest = int(labels.max())
    size = largest + 1 if num_classes is None else num_classes
    if int(labels.min()) < 0 or largest >= size:
        raise InputError(f"Labels are in {int(labels.min())}..{largest}; they must be in 0..{size - 1}.")
    counts = torch.bincount(labels.cpu(), minlength=size)
    if on_missing == "raise":
        check_no_class_missing(counts)
    return counts, (counts > 0).nonzero().flatten()


def _solved(matrix: Tensor, lam: float) -> Tensor:
    n = len(matrix)
    system = torch.eye(n, dtype=matrix.dtype, device=matrix.device) - lam * matrix.T
    return torch.linalg.solve(system, matrix.new_full((n,), (1 - lam) / n))


def _iterated(matrix: Tensor, lam: float, max_iter: int, tol: float) -> Tensor:
    n = len(matrix)
    weights = matrix.new_full((n,), 1 / n)
    moved = math.inf
    for _ in range(max_iter):
        following = lam * (weights @ matrix) + (1 - lam) / n
        moved = float((following - weights).abs().sum())
        weights = following
        if moved * lam <= tol * (1 - lam):  # a contraction by lam: this bounds the distance to the limit
            return weights
    warnings.warn(
        f"Prototype refinement: {max_iter} steps left an error of up to {moved * lam / (1 - lam):.1e} (tol {tol:.1e}) "
        f"in a class of {n}; raise max_iter, or use solver='closed'.",
        stacklevel=3,
    )
    return weights


# ---------------------------------------------------------------------------------------------------------- training


class PrototypeLoss(nn.Module):
    """New embeddings classified against old-space prototypes.

    ``mean CE(scale * unit(f) P^T, y)``, or with the logits of ``margin``, over the samples of known classes. Embeddings
    of another size are cut, or padded with zeros.

    Args:
        prototypes: ``(C, D_old)``, row c for class c, or ``Prototypes``. Copied into a buffer: no gradient, no weight
            decay, saved with the module.
        scale: Factor of the logits, 1 to 64. With 1, as published, they lie in [-1, 1] and pull weakly.
        margin: Takes the place of the plain cosines; it has its own scale, which ``scale`` multiplies.
        known_classes: Class indices: only these have a row, and only their samples count. ``None``: all.
        weight: Factor of the loss, at least 0.
    """

    def __init__(
        self,
        prototypes: Tensor | Prototypes,
        scale: float = 1.0,
        margin: MarginSoftmax | None = None,
        known_classes: Tensor | Sequence[int] | None = None,
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        rows, present = _rows_of(prototypes)
        known = present if known_classes is None else _known(known_classes, present)
        self._taken = [present.index(c) for c in known]
        self._classes = present
        self.influence = InfluenceLoss(
            rows[self._taken],
            {c: row for row, c in enumerate(known)},
            weight,
            normalize=True,
            scale=scale,
            margin=margin,
        )

    @property
    def prototypes(self) -> Tensor:
        """``(R, D_old)`` the rows in use, of known classes in order."""
        return self.influence.old_classifier

    def set_prototypes(self, prototypes: Tensor | Prototypes) -> None:
        """Put other prototypes of the same classes and size in the place of these."""
        rows, present = _rows_of(prototypes)
        taken = rows[self._taken] if present == self._classes else rows[:0]
        if taken.shape != self.prototypes.shape:
            raise InputError(
                f"Prototypes of shape {tuple(rows.shape)} for classes {_some(present)} cannot replace those of "
                f"{len(self._classes)} classes ({_some(self._classes)}) with size {self.prototypes.shape[1]}."
            )
        with torch.no_grad():
            self.influence.old_classifier = checked_classifier(taken).to(self.prototypes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar; 0 without a known class. ``embeddings`` ``(B, D_new)``, ``labels`` ``(B,)`` int64."""
        return self.influence(embeddings, labels)


def _rows_of(prototypes: Tensor | Prototypes) -> tuple[Tensor, list[int]]:
    if isinstance(prototypes, Prototypes):
        return prototypes.weight, prototypes.classes.tolist()
    rows = torch.as_tensor(prototypes)
    return rows, list(range(len(rows)))


def _known(classes: Tensor | Sequence[int], present: Sequence[int]) -> list[int]:
    """Those of ``classes`` that have a row, in the order of the rows."""
    wanted = torch.as_tensor(classes)
    if wanted.ndim != 1 or not len(wanted) or wanted.dtype == torch.bool or wanted.is_floating_point():
        raise InputError(f"known_classes is {classes!r}; class indices are needed, or None for all classes.")
    known = set(wanted.tolist())
    if known.isdisjoint(present):
        raise InputError(
            f"No known class has a prototype: {_some(sorted(known))} are known, {_some(present)} have one."
        )
    return [c for c in present if c in known]


def _some(classes: Sequence[int]) -> str:
    return ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")


class PrototypeRefresh:
    """Refines the prototypes of a loss with the encoder as it is, at the start of given epochs.

    Args:
        loss: Whose prototypes are replaced.
        encoder: The new encoder: a callable on a batch, as in ``build_prototypes``. Run in eval mode without gradient.
        loader: One pass over the training set, without shuffling or augmentation, or a function that gives one:
            batches with a ``label``, or pairs ``(inputs, labels)``.
        old_cache: ``(N, D_old)`` old vectors in the order of ``loader``.
        epochs: Epoch indices, counted from 0.
        settings: Further arguments of ``refine_prototypes``.
    """

    def __init__(
        self,
        loss: PrototypeLoss,
        encoder: Callable[[Any], Any],
        loader: Iterable[Any] | Callable[[], Iterable[Any]],
        old_cache: Tensor,
        epochs: Sequence[int] = (10, 20),
        **settings: Any,
    ) -> None:
        if not epochs or min(epochs) < 0:
            raise InputError(f"epochs is {list(epochs)}; epoch indices of at least 0 are needed.")
        self.loss, self.encoder, self.loader, self.old_cache = loss, encoder, loader, old_cache
        self.epochs, self.settings = frozenset(epochs), settings

    def on_epoch_start(self, epoch: int) -> bool:
        """Refreshes if ``epoch`` is one of ``epochs``; says whether it did."""
        if epoch not in self.epochs:
            return False
        self.refresh()
        return True

    def refresh(self) -> None:
        """Refreshes now."""
        new, labels = embedded(self.encoder, self.loader() if callable(self.loader) else self.loader)
        self.loss.set_prototypes(refine_prototypes(self.old_cache, new, labels, **self.settings))


def embedded(encoder: Callable[[Any], Any], loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Embeddings ``(N, D)`` float32 and labels ``(N,)`` of one pass, on the CPU, in eval mode without gradient."""
    vectors, labels = [], []
    with evaluating(encoder):
        for batch in loader:
            inputs, of_batch = inputs_and_labels(batch)
            output = encoder(inputs)
            vectors.append(torch.as_tensor(getattr(output, "pooled", output)).float().cpu())
            labels.append(torch.as_tensor(of_batch).cpu())
    if not vectors:
        raise InputError("The loader gave no batch, so there is nothing to refine.")
    return torch.cat(vectors), torch.cat(labels)
