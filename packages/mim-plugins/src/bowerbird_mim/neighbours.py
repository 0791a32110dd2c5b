"""Weighted votes of nearest neighbours, the classifier without training of self-supervision.

N training items, M test items, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bowerbird.errors import InputError


def knn_votes(
    train: Tensor, labels: Tensor, test: Tensor, k: int = 20, temperature: float = 0.07, *, block: int = 1024
) -> Tensor:
    """Votes of the ``k`` nearest training items for every class: ``(M, classes)``.

    A neighbour with cosine s votes for its class with exp(s / temperature) (Wu et al., CVPR 2018; DINO, section 4.1).
    The votes for an item are divided by that of its nearest neighbour, so that no temperature is too low.

    Args:
        train: ``(N, D)`` unit vectors, a tensor or an array; computed with in float32 at least.
        labels: Whole numbers ``(N,)``, from 0.
        test: ``(M, D)`` unit vectors.
        k: Neighbours, 1 to N.
        temperature: Above 0.
        block: Test items at a time.

    Raises:
        InputError: Shapes that do not fit, or values outside these ranges.
    """
    train, labels, test = torch.as_tensor(train), torch.as_tensor(labels), torch.as_tensor(test)
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or labels.shape != train.shape[:1]:
        raise InputError(
            f"train {tuple(train.shape)}, labels {tuple(labels.shape)}, test {tuple(test.shape)}: expected (N, D), "
            "(N,) and (M, D)"
        )
    if not 1 <= k <= len(train) or not temperature > 0:
        raise InputError(f"k = {k}, temperature = {temperature}: expected 1 to {len(train)} neighbours, and above 0")
    if labels.is_floating_point() or labels.min() < 0:
        raise InputError(f"labels are {labels.dtype}, the smallest is {labels.min()}: expected whole numbers from 0")
    dtype = torch.promote_types(torch.promote_types(train.dtype, test.dtype), torch.float32)
    train, test, labels = train.to(dtype), test.to(dtype), labels.long()
    similarity, neighbours = nearest(train, test, k, block=block)
    return votes_of(similarity, labels[neighbours], int(labels.max()) + 1, temperature)


def nearest(train: Tensor, test: Tensor, k: int, *, block: int = 1024) -> tuple[Tensor, Tensor]:
    """Dot products and positions ``(M, k)`` of the ``k`` nearest training items, nearest first.

    Raises:
        InputError: ``k`` outside 1 to N.
    """
    if not 1 <= k <= len(train):
        raise InputError(f"k = {k}: expected 1 to {len(train)} neighbours")
    found = [(test[start : start + block] @ train.T).topk(k, dim=1) for start in range(0, max(1, len(test)), block)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def votes_of(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """``(M, classes)`` votes of neighbours with these dot products and labels ``(M, k)``, nearest first."""
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    return similarity.new_zeros(len(similarity), classes).scatter_add_(1, labels, weights)


def knn_classify(train: Tensor, labels: Tensor, test: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The class with most votes of the ``k`` nearest training items, int64 ``(M,)``; see ``knn_votes``."""
    return knn_votes(train, labels, test, k, temperature).argmax(dim=1)
