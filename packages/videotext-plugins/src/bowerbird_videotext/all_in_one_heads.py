"""Heads of the unified video-text transformer (Wang et al., CVPR 2023, arXiv 2203.07303).

B pairs, D width, V vocabulary, A answers.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError


class VideoTextMatchingHead(nn.Module):
    """Do video and text belong together? ``(B, D)`` to logits ``(B, 2)``: 0 no, 1 yes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled)

    def score(self, pooled: Tensor) -> Tensor:
        """``(..., D)`` to ``(...)``: the logit of "yes", by which pairs are ranked."""
        return pooled @ self.fc.weight[1] + self.fc.bias[1]


class MaskedLanguageHead(nn.Module):
    """Which word stood here? ``(..., D)`` to logits ``(..., V)``: linear, GELU, layer norm, linear, as in BERT."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.activation = nn.GELU()
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.decoder = nn.Linear(dim, vocab_size)

    def forward(self, words: Tensor) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(words))))


class OpenEndedQAHead(nn.Module):
    """Which of the known answers? ``(B, D)`` to logits ``(B, A)``: dropout, linear, layer norm, GELU, linear."""

    def __init__(self, dim: int, num_answers: int, dropout: float = 0.5) -> None:
        super().__init__()
        if num_answers < 1:
            raise InputError(f"num_answers = {num_answers}: expected 1 or more")
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(dim, dim // 2),
            nn.LayerNorm(dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, num_answers),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layers(pooled)


class MultipleChoiceScorer(nn.Module):
    """How well does a text fit its video? ``(..., D)`` to scores ``(...)``; options of one video are compared."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, 1)

    @classmethod
    def from_matching(cls, head: VideoTextMatchingHead) -> Self:
        """Starts as the row "yes" of a matching head, so that ranking goes on from what matching has learned."""
        scorer = cls(head.fc.in_features).to(head.fc.weight)
        with torch.no_grad():
            scorer.fc.weight.copy_(head.fc.weight[1:])
            scorer.fc.bias.copy_(head.fc.bias[1:])
        return scorer

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc(pooled).squeeze(-1)
