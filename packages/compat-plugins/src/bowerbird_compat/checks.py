"""What every method asks of its arguments, said in the same words. All raise ``InputError``, a ``ValueError``."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bowerbird.errors import InputError


def check_above_zero(**values: float) -> None:
    """Each of the named values is a finite number above 0."""
    for name, value in values.items():
        if not 0 < _number(value) < math.inf:
            raise InputError(f"{name} is {value}; it must be a finite number above 0.")


def check_not_negative(**values: float) -> None:
    """Each of the named values is a finite number of at least 0."""
    for name, value in values.items():
        if not 0 <= _number(value) < math.inf:
            raise InputError(f"{name} is {value}; it must be a finite number of at least 0.")


def check_integers(**values: Any) -> None:
    """Each of the named values is an integer; arrays and tensors with one entry are, truth values are not."""
    for name, value in values.items():
        try:
            operator.index(value)
        except TypeError:
            raise InputError(f"{name} is {value!r}; it must be an integer.") from None
        if isinstance(value, bool):
            raise InputError(f"{name} is {value!r}; it must be an integer.")


def _number(value: Any) -> float:
    """NaN for what is no number; arrays and tensors with one entry are numbers."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def check_finite(vectors: Tensor, what: str) -> None:
    """No row holds NaN or infinity; the first that does is named."""
    finite = torch.isfinite(vectors).all(dim=1)
    if not finite.all():
        raise InputError(f"{what}: row {int((~finite).nonzero()[0])} is not finite (NaN or infinity).")


def check_no_class_missing(counts: Tensor) -> None:
    """Every class has a sample; those without are listed."""
    missing = (counts == 0).nonzero().flatten().tolist()
    if missing:
        listed = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise InputError(
            f"{len(missing)} of {len(counts)} classes have no sample: {listed}. "
            "Give samples of every class, or on_missing='skip' to leave them out."
        )


def check_classes(labels: Tensor, classes: int) -> None:
    """All labels are in ``0..classes - 1``."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(f"Labels are in {int(labels.min())}..{int(labels.max())}; {classes} classes are known.")


def check_batch(vectors: Tensor) -> None:
    """There is a row to take a mean over."""
    if not len(vectors):
        raise InputError("The batch is empty; a mean needs at least one sample.")


def full_precision(vectors: Tensor) -> Tensor:
    """Half precision as float32, in which logits and distances are computed; others as they are."""
    return vectors.float() if vectors.dtype in (torch.float16, torch.bfloat16) else vectors


def cosine_distance(ours: Tensor, given: Tensor) -> Tensor:
    """Mean ``1 - cos`` of the rows of ``(B, D)``, whatever their lengths; ``given`` gets no gradient."""
    ours = full_precision(ours)
    return (1 - (F.normalize(ours) * F.normalize(given.detach().to(ours.dtype))).sum(dim=1)).mean()


def frozen_classifier(weight: Tensor) -> Tensor:
    """A copy of a finite matrix ``(C, D)`` without gradient."""
    weight = torch.as_tensor(weight)
    if weight.ndim != 2 or not torch.isfinite(weight).all():
        raise InputError(f"Old classifier of shape {tuple(weight.shape)}: a finite matrix (C, D) is due.")
    return weight.detach().clone()


def finite_vectors(values: ArrayLike | Tensor, name: str) -> Tensor:
    """``values`` as float32 ``(N, D)`` without gradient, N at least 1."""
    vectors = torch.as_tensor(values if isinstance(values, Tensor) else np.asarray(values)).detach().float()
    if vectors.ndim != 2 or not len(vectors):
        raise InputError(f"{name} vectors have shape {tuple(vectors.shape)}; (N, D) with N at least 1 is needed.")
    check_finite(vectors, f"{name} vectors")
    return vectors


def labels_of(items: ArrayLike | Tensor | None, count: int) -> Tensor | None:
    """``integer_labels`` of what may also be a list, or missing."""
    if items is None:
        return None
    return integer_labels(items if isinstance(items, Tensor) else np.asarray(items), count)


def integer_labels(labels: Tensor | NDArray[np.integer], batch: int) -> Tensor:
    """``labels``, a tensor or an array, as an int64 tensor ``(batch,)``.

    Raises:
        TypeError: The labels are not integers.
        InputError: (a ``ValueError``) There is not one label per embedding.
    """
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = torch.as_tensor(labels)
    if (
        not isinstance(labels, Tensor)
        or labels.dtype.is_floating_point
        or labels.dtype.is_complex
        or labels.dtype == torch.bool
    ):
        found = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"Labels must be a tensor of integers (class indices), found {found}.")
    if labels.shape != (batch,):
        raise InputError(f"{batch} embeddings need labels of shape ({batch},), found {tuple(labels.shape)}.")
    return (labels.clone() if labels.is_inference() else labels).long()  # a loss may keep them for its gradient
