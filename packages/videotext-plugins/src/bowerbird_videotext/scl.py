"""Losses of embeddings of frames: which frames of two views, or of two videos, show the same moment?

Sequence contrastive loss: Chen, Wei, Li, Xu: Frame-wise Action Representations for Long Videos via Sequence Contrastive
Learning, CVPR 2022 (arXiv 2203.14957), equations 2 to 5, as in the code of MV-Former (arXiv 2311.10873).
Cycle-consistency loss: Dwibedi, Aytar, Tompson, Sermanet, Zisserman: Temporal Cycle-Consistency Learning, CVPR 2019
(arXiv 1904.07846), sections 3.2 and 3.3.

B clips of 2 views each, N videos, T frames, P width of an embedding.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bowerbird.errors import InputError

Negatives = Literal["batch", "batch_noself", "single", "single_noself"]
NEGATIVES = ("batch", "batch_noself", "single", "single_noself")
CycleLoss = Literal["regression_mse_var", "regression_mse", "regression_huber", "classification"]
_LOG_MASKED = math.log(1e-6)  # of the weight as a negative of a frame that is not there
_EPSILON = 1e-6  # added to a probability before its logarithm


def sequence_contrastive_loss(
    z: Tensor,
    times: Tensor,
    lengths: Tensor,
    valid: Tensor,
    temperature: float = 0.1,
    variance: float = 10.0,
    negatives: Negatives = "single_noself",
) -> Tensor:
    """The scalar loss: the divergence of p from g, the mean over all real frames i.

    ``g_ij`` is a Gaussian of the distance in time between frame i and frame j of the other view of its clip, summing to
    1 over j; ``p_ij`` a softmax of ``z_i . z_j / temperature`` over the negatives of i.

    Args:
        z: ``(B, 2, T, P)``, of norm 1.
        times: ``(B, 2, T)``, place of each frame in its video, in frames.
        lengths: ``(B, 2)``, frames of the video.
        valid: ``(B, 2, T)``, true where a frame is real.
        variance: Of the Gaussian, in frames^2.
        negatives: ``batch``: all frames of the batch; ``single``: only those of the own clip; ``_noself``: without
            those of the own view.

    Raises:
        InputError: Shapes that do not fit, or values out of range.
    """
    _check_views(z, times, lengths, valid)
    if temperature <= 0 or variance <= 0:
        raise InputError(f"temperature = {temperature}, variance = {variance}: expected numbers above 0")
    if negatives not in NEGATIVES:
        raise InputError(f"negatives = {negatives!r}; accepted: {', '.join(NEGATIVES)}")
    clips, views, frames = times.shape
    single = negatives.startswith("single")
    # Frames in groups that share their negatives: one of each clip (G = B, R = 2 T), or one of all (G = 1, R = 2 B T).
    groups = (clips, views * frames) if single else (1, clips * views * frames)
    vectors = z.reshape(*groups, -1)
    real, time = valid.reshape(groups).bool(), times.reshape(groups).to(z.dtype)
    length = lengths.to(z.dtype)[:, :, None].expand(-1, -1, frames).reshape(groups)
    view = torch.arange(groups[1], device=z.device) // frames  # numbered through the group
    same_view, same_clip = view[:, None] == view, (view // views)[:, None] == view // views
    both_real = real[:, :, None] & real[:, None]  # (G, R, R), as everything below

    distance = (time / length)[:, :, None] * length[:, None] - time[:, None]  # in frames of j's video
    closeness = torch.exp(-distance.square() / (2 * variance)) * (same_clip & ~same_view & both_real)
    total = closeness.sum(dim=2, keepdim=True)
    target = closeness / total.where(total > 0, 1.0)

    logits = vectors @ vectors.transpose(1, 2) / temperature
    # A sum of exponentials, without overflow: weights go in as logarithms, and those of weight 0 are left out.
    counted = logits.masked_fill(same_view, -torch.inf) if negatives.endswith("noself") else logits
    counted = torch.where(both_real, counted, logits + _LOG_MASKED)
    if single and clips > 1:
        counted = torch.cat([counted, _unreal_elsewhere(vectors, real) / temperature + _LOG_MASKED], dim=2)
    normalizer = torch.logsumexp(counted, dim=2, keepdim=True)
    # Pairs that are no target are left out before the exponential: without weight, it knows no bounds.
    p = torch.exp((logits - normalizer).where(target > 0, 0.0))
    terms = torch.xlogy(target, target) - target * torch.log(p + _EPSILON)
    return terms.sum() / real.sum().clamp(min=1)


def _unreal_elsewhere(vectors: Tensor, real: Tensor) -> Tensor:
    """``(B, R, M)``: products of ``vectors (B, R, P)`` with the M frames that are not there, -inf in their own clip.

    They keep a small weight as negatives of all clips.
    """
    clip, _ = torch.where(~real)
    own = torch.arange(len(vectors), device=vectors.device)[:, None, None] == clip
    return (vectors @ vectors[~real].T).masked_fill(own, -torch.inf)


def cycle_consistency_loss(
    z: Tensor,
    times: Tensor,
    lengths: Tensor,
    valid: Tensor | None = None,
    *,
    loss: CycleLoss = "regression_mse_var",
    similarity: Literal["l2", "cosine"] = "l2",
    temperature: float = 0.1,
    variance_lambda: float = 0.001,
    normalize_indices: bool = True,
    huber_delta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """The scalar loss: from each frame to its soft nearest neighbour in another video, and back to where it came from.

    The mean over all real frames of all ordered pairs of videos that have some. ``regression_*`` compare the expected
    time of the return with that of the label (squared error, ``_huber`` the Huber loss; ``_var`` divides the squared
    error by the variance of the return and adds ``variance_lambda`` times its logarithm), ``classification`` is the
    cross-entropy of return and label. The label is the frame itself; smoothed, it is shared with the video's other
    frames in equal parts.

    Args:
        z: ``(N, T, P)``.
        times: ``(N, T)``, place of each frame in its video, in frames.
        lengths: ``(N,)``, frames of the video.
        valid: ``(N, T)``, true where a frame is real; ``None``: everywhere.
        similarity: ``l2``: minus the squared distance; ``cosine``: the dot product. Divided by P and temperature.
        normalize_indices: Times as shares of the length of the video.
        label_smoothing: Part of the label that goes to the other frames.

    Raises:
        InputError: Shapes that do not fit, fewer than two videos, or an unknown loss.
    """
    if z.ndim != 3 or len(z) < 2 or times.shape != z.shape[:2] or lengths.shape != z.shape[:1]:
        raise InputError(
            f"z {tuple(z.shape)}, times {tuple(times.shape)}, lengths {tuple(lengths.shape)}: expected (N, T, P), "
            "(N, T), (N,) with at least two videos"
        )
    if valid is not None and valid.shape != times.shape:
        raise InputError(f"valid has the shape {tuple(valid.shape)}; expected {tuple(times.shape)}")
    videos = len(times)
    real = torch.ones_like(times, dtype=torch.bool) if valid is None else valid.bool()
    first, second = torch.where(~torch.eye(videos, dtype=torch.bool, device=z.device))  # all ordered pairs
    here, there = z[first], z[second]
    scale = z.shape[-1] * temperature
    out = _similarity(here, there, similarity) / scale  # (pairs, T, T)
    seen = real | ~real.any(dim=1, keepdim=True)  # a softmax over nothing is no number; such videos count nowhere
    out = out.masked_fill(~seen[second][:, None], -torch.inf)
    neighbours = out.softmax(dim=-1) @ there
    back = _similarity(neighbours, here, similarity) / scale
    back = back.masked_fill(~seen[first][:, None], -torch.inf)
    chosen = real[first] & real[second].any(dim=1)[:, None]
    count = chosen.sum().clamp(min=1)
    label = _smoothed_labels(real, label_smoothing, z.dtype)[first]
    if loss == "classification":
        log_p = back.log_softmax(dim=-1).where(chosen[:, None], 0.0)
        return -((label * log_p).sum(dim=-1) * chosen).sum() / count
    place = times.to(z.dtype) / lengths.to(z.dtype)[:, None] if normalize_indices else times.to(z.dtype)
    place = place[first]
    probability = back.softmax(dim=-1)
    expected = (probability * place[:, None]).sum(dim=-1)
    wanted = (label * place[:, None]).sum(dim=-1)
    error = wanted - expected
    if loss == "regression_mse":
        values = error.square()
    elif loss == "regression_huber":
        values = F.huber_loss(expected, wanted, reduction="none", delta=huber_delta)
    elif loss == "regression_mse_var":
        spread = (probability * (place[:, None] - expected[..., None]).square()).sum(dim=-1)
        log_variance = spread.clamp(min=torch.finfo(spread.dtype).tiny).log()
        values = torch.exp(-log_variance) * error.square() + variance_lambda * log_variance
    else:
        raise InputError(
            f"loss = {loss!r}; accepted: regression_mse_var, regression_mse, regression_huber, classification"
        )
    return values.where(chosen, 0.0).sum() / count


def _similarity(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """``(pairs, T, T)`` of ``(pairs, T, P)`` twice."""
    if kind == "cosine":
        return a @ b.transpose(1, 2)
    if kind != "l2":
        raise InputError(f"similarity = {kind!r}; accepted: l2, cosine")
    squares = a.square().sum(dim=-1)[:, :, None] + b.square().sum(dim=-1)[:, None]
    return 2 * a @ b.transpose(1, 2) - squares


def _smoothed_labels(real: Tensor, smoothing: float, dtype: torch.dtype) -> Tensor:
    """``(N, T, T)``, row t of a video: 1 - smoothing for frame t, equal parts of the rest for its other real frames."""
    own = torch.eye(real.shape[1], dtype=dtype, device=real.device)
    others = (real.sum(dim=1) - 1).clamp(min=1).to(dtype)[:, None, None]
    return (1 - smoothing) * own + smoothing / others * (1 - own) * real[:, None]


def _check_views(z: Tensor, times: Tensor, lengths: Tensor, valid: Tensor) -> None:
    fits = z.ndim == 4 and z.shape[1] == 2 and times.shape == z.shape[:3] and valid.shape == z.shape[:3]
    if not fits or lengths.shape != z.shape[:2]:
        raise InputError(
            f"z {tuple(z.shape)}, times {tuple(times.shape)}, lengths {tuple(lengths.shape)}, valid "
            f"{tuple(valid.shape)}: expected (B, 2, T, P), (B, 2, T), (B, 2), (B, 2, T)"
        )
