"""Classifier heads shared by the methods of this package: sizes made equal, margins on cosine logits.

Letters: B batch, C classes, D embedding size.

The margins are written here and not taken from pytorch-metric-learning: its ``ArcFaceLoss`` and ``CosFaceLoss`` own
their weight matrix, return the mean loss and not the logits, and always mask by their own label range. Compatible
training needs the logits against a *given, frozen* matrix and a mean over a part of the batch.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from bowerbird.errors import InputError, did_you_mean
from bowerbird_compat.checks import check_above_zero, check_integers, check_not_negative, full_precision, integer_labels

MarginKind = Literal["none", "cosface", "arcface", "arcface_monotone"]
DimMode = Literal["truncate_or_pad", "strict"]

COSINE_EPS = 1e-7  # arccos has an infinite derivative at -1 and 1


def match_dim(x: Tensor | NDArray[np.floating], dim: int, mode: DimMode = "truncate_or_pad") -> Tensor:
    """``x`` with ``dim`` entries in its last axis: the first ``dim`` are kept, or zeros are appended.

    Args:
        x: ``(B, D)`` (any leading axes); an array becomes a tensor.
        dim: Wanted size, at least 1.
        mode: ``strict`` accepts no difference.

    Raises:
        InputError: (a ``ValueError``) In strict mode when the sizes differ; for a ``dim`` below 1 or an unknown mode.

    Shen et al., CVPR 2020: the new embedding is compared with the old classifier and gallery through this map.
    """
    if mode not in get_args(DimMode):
        raise InputError(
            f"mode is {mode!r}; accepted: {', '.join(get_args(DimMode))}.{did_you_mean(str(mode), get_args(DimMode))}"
        )
    check_integers(dim=dim)
    if dim < 1:
        raise InputError(f"dim is {dim}; it must be at least 1.")
    x = torch.as_tensor(x)
    size = x.shape[-1]
    if size == dim:
        return x
    if mode == "strict":
        raise InputError(
            f"Embeddings have size {size} and size {dim} is needed. "
            "Use equal sizes, or mode='truncate_or_pad' to keep the first entries or append zeros."
        )
    return x[..., :dim] if size > dim else F.pad(x, (0, dim - size))


class MarginSoftmax(nn.Module):
    """Scaled cosine logits whose target entry is made harder by a margin.

    With ``c_j = cos(f, W_j)`` and target class ``y`` the target's cosine becomes

    - ``none``: ``c_y``
    - ``cosface``: ``c_y - margin`` (Wang et al., CVPR 2018)
    - ``arcface``: ``cos(arccos(c_y) + margin)`` (Deng et al., CVPR 2019)
    - ``arcface_monotone``: the same, but ``c_y - margin * sin(pi - margin)`` where ``c_y <= cos(pi - margin)``, so
      that a worse angle never gives a better logit

    and all logits are multiplied by ``scale``. Target cosines are clamped to ``[-1 + 1e-7, 1 - 1e-7]`` before arccos.

    Args:
        kind: One of the above.
        scale: Above 0.
        margin: At least 0; an angle in radians (at most pi) for the arcface kinds.
    """

    def __init__(self, kind: MarginKind = "none", scale: float = 1.0, margin: float = 0.0) -> None:
        super().__init__()
        kinds = get_args(MarginKind)
        if kind not in kinds:
            raise InputError(f"kind is {kind!r}; accepted: {', '.join(kinds)}.{did_you_mean(str(kind), kinds)}")
        check_above_zero(scale=scale)
        check_not_negative(margin=margin)
        if kind.startswith("arcface") and margin > math.pi:
            raise InputError(f"margin is {margin}; an angle in radians of at most pi is needed for {kind}.")
        self.kind, self.scale, self.margin = kind, float(scale), float(margin)

    def forward(self, embeddings: Tensor, weight: Tensor, labels: Tensor | None = None) -> Tensor:
        """``(B, C)`` logits of ``embeddings`` ``(B, D)`` against ``weight`` ``(C, D)``; both are normalised here.

        Called with two arguments, ``(cosine, labels)``, it takes ready cosines, as ``apply_margin`` does.

        Raises ``TypeError`` for labels that are not integers, ``InputError`` for sizes that differ.
        """
        if labels is None:
            return self.apply_margin(embeddings, weight)
        if embeddings.shape[-1] != weight.shape[-1]:
            raise InputError(
                f"Embeddings have size {embeddings.shape[-1]} and the classifier {weight.shape[-1]}; use match_dim."
            )
        # Half precision cannot resolve cosines near 1, where the margins act.
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            embeddings = full_precision(embeddings)
            return self.apply_margin(
                F.linear(F.normalize(embeddings), F.normalize(weight.to(embeddings.dtype))), labels
            )

    def apply_margin(self, cosine: Tensor, labels: Tensor) -> Tensor:
        """``(B, C)`` logits from ready cosines ``(B, C)``; ``cosine`` is left as it is."""
        labels = integer_labels(labels, len(cosine))
        cosine = full_precision(cosine)
        if self.kind == "none" or self.margin == 0 or not len(labels):
            return cosine * self.scale
        column = labels.unsqueeze(1)
        target = cosine.gather(1, column)
        return cosine.scatter(1, column, self._harder(target)) * self.scale

    def _harder(self, target: Tensor) -> Tensor:
        if self.kind == "cosface":
            return target - self.margin
        angle = torch.arccos(target.clamp(-1 + COSINE_EPS, 1 - COSINE_EPS))
        harder = torch.cos(angle + self.margin)
        if self.kind == "arcface":
            return harder
        fallback = target - self.margin * math.sin(math.pi - self.margin)
        return torch.where(target > math.cos(math.pi - self.margin), harder, fallback)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, scale={self.scale:g}, margin={self.margin:g}"
