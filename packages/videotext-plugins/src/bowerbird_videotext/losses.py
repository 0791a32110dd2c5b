"""Similarities of texts and videos, and the losses that order them. Rows are texts, columns are videos.

The normalised softmax loss and the max-margin loss of Bain et al., ICCV 2021 (arXiv 2104.00650).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, relu

from bowerbird.errors import InputError


def cosine_similarity_matrix(texts: Tensor, videos: Tensor, eps: float = 1e-8) -> Tensor:
    """Cosines ``(Q, G)`` of ``texts (Q, P)`` and ``videos (G, P)``; a row of zeros has similarity 0 to everything.

    Raises:
        InputError: Not two matrices of the same width.
    """
    if texts.ndim != 2 or videos.ndim != 2 or texts.shape[1] != videos.shape[1]:
        raise InputError(
            f"texts have shape {tuple(texts.shape)}, videos {tuple(videos.shape)}; expected (Q, P) and (G, P)"
        )
    with torch.autocast(texts.device.type, enabled=False):  # three digits are too few to divide by a temperature
        return unit(texts, eps) @ unit(videos, eps).T


def unit(vectors: Tensor, eps: float = 1e-8) -> Tensor:
    """Every vector over the larger of its length and ``eps``, in float32 at least."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=eps)


def symmetric_info_nce(similarity: Tensor, temperature: float = 0.05) -> Tensor:
    """Text-to-video plus video-to-text cross-entropy over the batch; pair i is row i and column i.

    The directions are summed, not averaged: 2 ln N where all similarities are equal.

    Args:
        similarity: ``(N, N)``.
        temperature: Divides the similarities; above 0.

    Raises:
        InputError: The matrix is not square, or the temperature not above 0.
    """
    _check_square(similarity)
    if not temperature > 0:
        raise InputError(f"temperature = {temperature}: expected above 0")
    logits = similarity.to(torch.promote_types(similarity.dtype, torch.float32)) / temperature
    own = torch.arange(len(logits), device=logits.device)
    return cross_entropy(logits, own) + cross_entropy(logits.T, own)


def max_margin_loss(similarity: Tensor, margin: float = 0.2, *, fix_norm: bool = True) -> Tensor:
    """Mean of max(0, margin - s_ii + s_ij) and max(0, margin - s_ii + s_ji) over the pairs of a batch.

    Args:
        similarity: ``(N, N)``.
        margin: By how much a pair should be nearer than others.
        fix_norm: Over the 2 N (N - 1) pairs that do not belong together; else over all 2 N^2, where each of the 2 N
            others adds ``margin``.

    Raises:
        InputError: The matrix is not square, or holds one pair where two are needed.
    """
    _check_square(similarity)
    count = len(similarity)
    if fix_norm and count < 2:
        raise InputError("a margin between pairs needs a batch of 2 or more")
    own = similarity.diagonal()
    terms = relu(margin - own[:, None] + similarity) + relu(margin - own[None, :] + similarity)
    if not fix_norm:
        return terms.mean() / 2
    others = ~torch.eye(count, dtype=torch.bool, device=similarity.device)
    return terms[others].mean() / 2


def _check_square(similarity: Tensor) -> None:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) == 0:
        raise InputError(f"similarity has shape {tuple(similarity.shape)}; expected (N, N), texts by videos")
