"""The synthesised classifier: one mean of old unit embeddings per class (Shen et al., CVPR 2020, section 3.2).

It stands in for the old classifier when that is lost, or when the new training set has classes the old model never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_compat.checks import check_integers, check_no_class_missing, integer_labels

OnMissing = Literal["raise", "zero", "skip"]


@dataclass(frozen=True)
class Prototypes:
    """Class means of an encoder.

    Attributes:
        weight: ``(R, D)`` one row per class. Means of unit vectors have a norm of at most 1: a class whose samples
            scatter has a shorter row than one whose samples agree.
        counts: ``(num_classes,)`` int64, number of samples of every class.
        classes: ``(R,)`` int64, the class of every row. All classes in order, except after ``on_missing="skip"``.
    """

    weight: Tensor
    counts: Tensor
    classes: Tensor

    def class_map(self) -> dict[int, int]:
        """Class -> row, for the classes that have samples: the ``class_map`` of ``InfluenceLoss``."""
        return {int(c): row for row, c in enumerate(self.classes) if self.counts[c] > 0}


def build_prototypes(
    encoder: Callable[[Any], Any],
    loader: Iterable[Any],
    num_classes: int,
    *,
    normalize: bool = False,
    on_missing: OnMissing = "raise",
) -> Prototypes:
    """Mean of the unit embeddings of every class, over one pass of ``loader``.

    Args:
        encoder: What embeds a batch: returns ``(B, D)``, or an object with such a ``pooled``. A module is run in eval
            mode and put back into its mode afterwards. No gradient is kept.
        loader: Yields batches: dicts with a ``label`` (given whole to ``encoder``) or pairs ``(inputs, labels)``. They
            should be made with the encoder's evaluation transform. Tensors or arrays.
        num_classes: Labels are in ``0..num_classes - 1``.
        normalize: Whether the rows get norm 1 in the end.
        on_missing: A class without samples: ``raise``; ``zero`` gives it a row of zeros, which ``InfluenceLoss``
            refuses; ``skip`` leaves its row out (see ``Prototypes.classes``).

    Raises:
        InputError: (a ``ValueError``) A class has no sample (they are listed), a label is out of range, an embedding is
            not finite, or there is no batch at all.
        TypeError: Labels are not integers.
    """
    if on_missing not in get_args(OnMissing):
        raise InputError(f"on_missing is {on_missing!r}; accepted: {', '.join(get_args(OnMissing))}.")
    check_integers(num_classes=num_classes)
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}; it must be at least 1.")
    sums: Tensor | None = None
    counts = torch.zeros(num_classes, dtype=torch.int64)
    dtype = torch.float32
    with evaluating(encoder):
        for batch in loader:
            inputs, labels = inputs_and_labels(batch)
            output = encoder(inputs)
            embeddings = torch.as_tensor(getattr(output, "pooled", output))
            unit, labels = _checked(embeddings, labels, num_classes)
            if sums is not None and embeddings.shape[1] != sums.shape[1]:
                raise InputError(f"The encoder gave size {sums.shape[1]} and then {embeddings.shape[1]}.")
            if sums is None:
                dtype = embeddings.dtype
                sums = torch.zeros(num_classes, embeddings.shape[1], dtype=torch.float64)
            # Sums in float64: the order of the samples then matters only far below float32's precision.
            sums.index_add_(0, labels, unit)
            counts += torch.bincount(labels, minlength=num_classes)
    if sums is None:
        raise InputError("The loader gave no batch, so there is nothing to average.")

    if on_missing == "raise":
        check_no_class_missing(counts)
    weight = sums / counts.clamp(min=1).unsqueeze(1)
    if normalize:
        weight = F.normalize(weight)
    classes = torch.arange(num_classes)
    if on_missing == "skip":
        classes = (counts > 0).nonzero().flatten()
    return Prototypes(weight[classes].to(dtype), counts, classes)


def inputs_and_labels(batch: Any) -> tuple[Any, Any]:
    """What the encoder is given of a batch, and its labels: see ``build_prototypes``."""
    if isinstance(batch, dict):
        if "label" not in batch:
            raise InputError(f"A batch has no 'label'; it has {', '.join(map(repr, batch))}.")
        return batch, batch["label"]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise InputError("The loader must give dicts with a 'label', or pairs (inputs, labels).")
    return batch[0], batch[1]


@contextmanager
def evaluating(encoder: object) -> Iterator[None]:
    """No gradients and eval mode inside; every part of a module in its former mode afterwards, also after an error."""
    modes = {m: m.training for m in encoder.modules()} if isinstance(encoder, nn.Module) else {}
    for module in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _checked(embeddings: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Unit embeddings in float64 and int64 labels, both on the CPU."""
    if embeddings.ndim != 2:
        raise InputError(f"The encoder gave shape {tuple(embeddings.shape)}; (batch, size) is needed.")
    labels = integer_labels(labels, len(embeddings)).cpu()
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise InputError(f"Label {int(outside[0])} is outside 0..{num_classes - 1}.")
    embeddings = embeddings.detach().to("cpu", torch.float64)
    if not torch.isfinite(embeddings).all():
        raise InputError("The encoder gave embeddings that are not finite (NaN or infinity).")
    return F.normalize(embeddings), labels
