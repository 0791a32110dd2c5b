"""What the parts of Obj2Seq share: features of pictures, logits, and two small layers.

B pictures, L levels, S = sum of H_l W_l positions, d width. Parameters have the names of the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

PRIOR = 0.01  # probability that a fresh object classifier gives
EPS = 1e-5


@dataclass(frozen=True)
class ImageFeatures:
    """Features of several levels, one after the other.

    Attributes:
        tokens: ``(B, S, d)``.
        spatial_shapes: (H_l, W_l) of every level.
        padding_mask: bool ``(B, S)``, true where a position is padding; ``None`` where none is.
        valid_ratios: ``(B, L, 2)``, the part of a level's width and height that is no padding; ``None``: all of it.
    """

    tokens: Tensor
    spatial_shapes: Sequence[tuple[int, int]]
    padding_mask: Tensor | None = None
    valid_ratios: Tensor | None = None

    def scaled(self, reference_points: Tensor, batch_index: Tensor | None = None) -> Tensor:
        """Points or boxes ``(N, Q, 2 or 4)`` of the pictures as those of the padded maps, ``(N, Q, L or 1, 2 or 4)``.

        ``batch_index`` ``(N,)`` says which picture a row belongs to.
        """
        points = reference_points[:, :, None]
        if self.valid_ratios is None:
            return points
        ratios = self.valid_ratios if batch_index is None else self.valid_ratios[batch_index]
        return points * ratios.repeat(1, 1, points.shape[-1] // 2)[:, None]


def at_least_float32(x: Tensor) -> Tensor:
    """For probabilities and sums: half precision rounds 0.999 to 1 and overflows above 65,504."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def logit(probability: Tensor, eps: float = EPS) -> Tensor:
    """``log(max(p, eps) / max(1 - p, eps))``."""
    return torch.log(probability.clamp(min=eps) / (1 - probability).clamp(min=eps))


class PromptClassifier(nn.Module):
    """``<W_2 relu(W_1 x + b_1) + b_2, v> / sqrt(d) + b``: how well a feature fits the vector of a category."""

    def __init__(self, embed_dim: int, prior: float = PRIOR) -> None:
        super().__init__()
        self.feature_linear = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in range(2))
        self.b = nn.Parameter(torch.tensor([-math.log((1 - prior) / prior)]))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """``x`` and ``vectors`` ``(..., d)`` that broadcast, to ``(...)``."""
        hidden = self.feature_linear[1](functional.relu(self.feature_linear[0](x)))
        return torch.einsum("...d,...d->...", hidden, vectors) / math.sqrt(x.shape[-1]) + self.b


class FeedForward(nn.Module):
    """``LN(x + W_2 relu(W_1 x))``."""

    def __init__(self, embed_dim: int, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(embed_dim, width), nn.Linear(width, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm2(x + self.linear2(functional.relu(self.linear1(x))))
        return out
