"""What embeddings of frames say about the course of an action: which phase, how far, and which other frames are alike.

The four measures of CARL and MV-Former (arXiv 2203.14957, section 4.2; arXiv 2311.10873, section 4; after Dwibedi et
al., arXiv 1904.07846, section 4). All are of one kind of action; a data set with several is measured one by one.

A video is an array of embeddings ``(T_i, P)``, one row per frame, and its phases are whole numbers ``(T_i,)``. Frames
with a phase below 0 are left out by whoever has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.stats import kendalltau
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import r2_score

from bowerbird.errors import InputError

Floats = NDArray[np.floating[Any]]


class Scores(NamedTuple):
    """Of the frames that a model was fitted on, and of others."""

    train: float
    validation: float


def phase_classification(
    train_embeddings: Sequence[ArrayLike],
    train_labels: Sequence[ArrayLike],
    val_embeddings: Sequence[ArrayLike],
    val_labels: Sequence[ArrayLike],
    *,
    c: float = 1.0,
    max_iter: int = 10_000,
) -> Scores:
    """Accuracies in 0..1 of a multinomial logistic regression with an L2 penalty.

    Args:
        train_embeddings, train_labels: Of the videos that the regression is fitted on.
        val_embeddings, val_labels: Of other videos.
        c: Inverse strength of the penalty.

    Raises:
        InputError: No videos, shapes that do not fit, or only one phase to learn.
    """
    model = phase_classifier(train_embeddings, train_labels, c=c, max_iter=max_iter)
    parts = ((train_embeddings, train_labels, "training"), (val_embeddings, val_labels, "validation"))
    return Scores(*(float(model.score(*_frames(*part))) for part in parts))


def phase_classifier(
    embeddings: Sequence[ArrayLike], labels: Sequence[ArrayLike], *, c: float = 1.0, max_iter: int = 10_000
) -> LogisticRegression:
    """The regression of ``phase_classification``, fitted. Raises as that does."""
    frames, phases = _frames(embeddings, labels, "training")
    if len(np.unique(phases)) < 2:
        raise InputError("phase classification: the training videos have one phase only; there is nothing to learn")
    return LogisticRegression(C=c, max_iter=max_iter).fit(frames, phases)


def phase_progression(
    train_embeddings: Sequence[ArrayLike],
    train_labels: Sequence[ArrayLike],
    val_embeddings: Sequence[ArrayLike],
    val_labels: Sequence[ArrayLike],
    *,
    phases: int | None = None,
) -> Scores:
    """R^2 of a linear regression on the time left to the end of each phase but the last; the mean over phases.

    The targets are those of ``progression_targets``. R^2 is at most 1, and below 0 where the mean would be better.

    Args:
        phases: K; by default one more than the largest phase.

    Raises:
        InputError: As ``phase_classification``, a video that lacks a phase, or fewer than two phases.
    """
    _frames(train_embeddings, train_labels, "training")
    _frames(val_embeddings, val_labels, "validation")
    labels = [np.asarray(one) for one in (*train_labels, *val_labels)]
    phases = phases if phases is not None else 1 + max(int(one.max()) for one in labels)
    if phases < 2:
        raise InputError(f"phase progression needs 2 phases or more; there are {phases}")
    targets = [progression_targets(one, phases) for one in labels]
    fitted, measured = np.concatenate(targets[: len(train_labels)]), np.concatenate(targets[len(train_labels) :])
    train, val = (np.concatenate([np.asarray(one) for one in videos]) for videos in (train_embeddings, val_embeddings))
    model = LinearRegression().fit(train, fitted)
    return Scores(float(r2_score(fitted, model.predict(train))), float(r2_score(measured, model.predict(val))))


def progression_targets(labels: ArrayLike, phases: int) -> NDArray[np.float64]:
    """``(T, K - 1)``: frames since the last frame of every phase but the last (below 0 before it), over T.

    Raises ``InputError`` where a video lacks a phase.
    """
    labels = np.asarray(labels)
    columns = []
    for phase in range(phases - 1):
        (found,) = np.nonzero(labels == phase)
        if not len(found):
            raise InputError(
                f"phase progression: a video of {len(labels)} frames has none of phase {phase}; it has the phases "
                f"{sorted(set(labels.tolist()))}. Leave such videos out"
            )
        columns.append((np.arange(len(labels)) - found[-1]) / len(labels))
    return np.stack(columns, axis=1)


def kendalls_tau(embeddings: Sequence[ArrayLike], *, stride: int = 1) -> float:
    """Kendall's tau-b, the mean over all ordered pairs of videos: do nearest neighbours come in the same order?

    The nearest frame of the other video is looked for by squared Euclidean distance. 1: in the same order, -1: in the
    reverse one. Pairs without a value, such as those whose neighbours are all one frame, are left out; NaN where none
    is left.

    Args:
        embeddings: Of two videos or more.
        stride: Every how many frames are compared.

    Raises:
        InputError: Fewer than two videos, shapes that do not fit, or a stride below 1.
    """
    taus = pair_taus(embeddings, stride=stride)
    return float(np.nanmean(taus)) if np.isfinite(taus).any() else float("nan")


def pair_taus(embeddings: Sequence[ArrayLike], *, stride: int = 1) -> NDArray[np.float64]:
    """``(N, N)``: tau-b of video i looked up in video j; NaN where there is none, and of a video with itself."""
    videos = [video[::stride] for video in _several(embeddings, stride, "Kendall's tau")]
    taus = np.full((len(videos), len(videos)), np.nan)
    for i, video in enumerate(videos):
        for j, other in enumerate(videos):
            if i != j and len(video) > 1:
                neighbours = cdist(video, other, "sqeuclidean").argmin(axis=1)
                taus[i, j] = kendalltau(np.arange(len(video)), neighbours).statistic
    return taus


def frame_retrieval_ap(
    embeddings: Sequence[ArrayLike],
    labels: Sequence[ArrayLike],
    ks: Sequence[int] = (5, 10, 15),
    *,
    stride: int = 1,
) -> dict[int, float]:
    """AP@K: the share of the K nearest frames of all other videos that are of the same phase.

    The mean over the frames of a video, then over videos. By squared Euclidean distance.

    Args:
        embeddings, labels: Of two videos or more.
        ks: Every K.
        stride: Every how many frames are compared, as queries and as answers.

    Raises:
        InputError: Fewer than two videos, shapes that do not fit, a stride below 1, or K larger than what the other
            videos of a video have.
    """
    shares = retrieval_shares(embeddings, labels, ks, stride=stride)
    return {k: float(values.mean()) for k, values in shares.items()}


def retrieval_shares(
    embeddings: Sequence[ArrayLike], labels: Sequence[ArrayLike], ks: Sequence[int] = (5, 10, 15), *, stride: int = 1
) -> Mapping[int, NDArray[np.float64]]:
    """AP@K of every video ``(N,)``, by K."""
    _frames(embeddings, labels, "the")
    videos = [video[::stride] for video in _several(embeddings, stride, "frame retrieval")]
    phases = [np.asarray(one)[::stride] for one in labels]
    total = sum(map(len, videos))
    fewest = total - max(map(len, videos))
    if not ks or min(ks) < 1 or max(ks) > fewest:
        raise InputError(
            f"AP@K for K of {list(ks)}: expected numbers from 1 to {fewest}, the frames that the other videos of the "
            "longest one have"
        )
    shares: dict[int, list[float]] = {k: [] for k in ks}
    for i, video in enumerate(videos):
        others = np.concatenate([one for j, one in enumerate(videos) if j != i])
        answers = np.concatenate([one for j, one in enumerate(phases) if j != i])
        order = np.argsort(cdist(video, others, "sqeuclidean"), axis=1, kind="stable")[:, : max(ks)]
        right = answers[order] == phases[i][:, None]
        for k in ks:
            shares[k].append(float(right[:, :k].mean()))
    return {k: np.asarray(values) for k, values in shares.items()}


def _frames(embeddings: Sequence[ArrayLike], labels: Sequence[ArrayLike], which: str) -> tuple[Floats, NDArray[Any]]:
    """All frames of all videos with their phases."""
    if len(embeddings) == 0 or len(embeddings) != len(labels):
        raise InputError(f"{len(embeddings)} {which} videos and labels of {len(labels)}: expected one or more of both")
    for i, (video, phases) in enumerate(zip(embeddings, labels, strict=True)):
        found, shape = np.shape(video), np.shape(phases)
        if len(found) != 2 or not found[0] or shape != found[:1] or found[1] != np.shape(embeddings[0])[1]:
            raise InputError(
                f"video {i} of the {which} videos has embeddings of shape {found} and phases of shape {shape}; "
                f"expected (frames, {np.shape(embeddings[0])[-1]}) and (frames,)"
            )
        if not np.isfinite(video).all():
            raise InputError(f"video {i} of the {which} videos has embeddings that are no finite numbers")
    return np.concatenate([np.asarray(one) for one in embeddings]), np.concatenate([np.asarray(one) for one in labels])


def _several(embeddings: Sequence[ArrayLike], stride: int, measure: str) -> list[Floats]:
    videos = [np.asarray(one) for one in embeddings]
    if len(videos) < 2:
        raise InputError(f"{measure} compares videos with each other: expected 2 or more, found {len(videos)}")
    if stride < 1:
        raise InputError(f"stride = {stride}: expected 1 or more")
    if any(one.ndim != 2 or not len(one) or one.shape[1] != videos[0].shape[-1] for one in videos):
        raise InputError(f"{measure}: embeddings of shapes {[one.shape for one in videos]}; expected (frames, P)")
    return videos
