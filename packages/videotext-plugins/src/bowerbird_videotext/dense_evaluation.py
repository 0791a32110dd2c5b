"""What embeddings of frames say about the course of an action: which phase, how far, and which other frames are alike.

The four measures of CARL and MV-Former (arXiv 2203.14957, section 4.2; arXiv 2311.10873, section 4; after Dwibedi et
al., arXiv 1904.07846, section 4). All are of one kind of action; a data set with several is measured one by one.

A video is an array of embeddings ``(T_i, P)``, one row per frame, and its phases are whole numbers ``(T_i,)``. Frames
with a phase below 0 have none: all measures that are given phases leave them out first, as if they were not in the
video. ``labelled`` does so for Kendall's tau, which is given none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.stats import kendalltau
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import r2_score

from bowerbird.errors import InputError

Floats = NDArray[np.floating[Any]]
Classify = Callable[[ArrayLike], NDArray[np.int64]]  # embeddings (n, P) to phases (n,)


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
    classify = phase_classifier(train_embeddings, train_labels, c=c, max_iter=max_iter)
    parts = ((train_embeddings, train_labels, "training"), (val_embeddings, val_labels, "validation"))
    return Scores(*(_share_right(classify, *part) for part in parts))


def phase_classifier(
    embeddings: Sequence[ArrayLike], labels: Sequence[ArrayLike], *, c: float = 1.0, max_iter: int = 10_000
) -> Classify:
    """The fitted regression of ``phase_classification``. Raises as that does."""
    videos, phases = _several_phases(embeddings, labels)
    model = LogisticRegression(C=c, max_iter=max_iter).fit(np.concatenate(videos), np.concatenate(phases))
    predict: Classify = model.predict
    return predict


def linear_classification(
    train_embeddings: Sequence[ArrayLike],
    train_labels: Sequence[ArrayLike],
    val_embeddings: Sequence[ArrayLike],
    val_labels: Sequence[ArrayLike],
    **settings: Any,
) -> Scores:
    """Accuracies in 0..1 of ``linear_classifier``, the protocol of FineGym, whose ``settings`` it takes.

    Raises:
        InputError: As ``phase_classification``, or settings out of range.
    """
    classify = linear_classifier(train_embeddings, train_labels, **settings)
    parts = ((train_embeddings, train_labels, "training"), (val_embeddings, val_labels, "validation"))
    return Scores(*(_share_right(classify, *part) for part in parts))


def linear_classifier(
    embeddings: Sequence[ArrayLike],
    labels: Sequence[ArrayLike],
    *,
    epochs: int = 50,
    lr: float = 1.0,
    momentum: float = 0.9,
    weight_decay: float = 1e-6,
    batch_videos: int = 10,
    seed: int = 0,
) -> Classify:
    """A linear layer, trained with stochastic gradient descent on the cross-entropy of all frames of some videos.

    Momentum, decay and batch are those of MV-Former's evaluation on FineGym; ``epochs`` and ``lr`` are ours. It starts
    from zeros.

    Args:
        embeddings, labels: Of the videos that it is trained on.
        epochs: Passes over the videos, each in another order.
        lr: In the first epoch; it falls to 0 along half a cosine, epoch by epoch.
        batch_videos: Videos of a step.
        seed: Of the order of the videos.

    Raises:
        InputError: As ``phase_classifier``, or settings out of range.
    """
    import torch
    from torch.nn.functional import cross_entropy

    if epochs < 1 or batch_videos < 1 or not lr > 0 or not 0 <= momentum < 1 or weight_decay < 0:
        raise InputError(
            f"epochs = {epochs}, batch_videos = {batch_videos}, lr = {lr}, momentum = {momentum}, weight_decay = "
            f"{weight_decay}: expected twice 1 or more, above 0, 0 to below 1, and 0 or more"
        )
    videos, phases = _several_phases(embeddings, labels)
    classes = np.unique(np.concatenate(phases))
    frames = [torch.from_numpy(np.asarray(video, np.float32)) for video in videos]
    targets = [torch.from_numpy(np.searchsorted(classes, one)) for one in phases]
    weight = torch.zeros(len(classes), frames[0].shape[1], requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr, momentum=momentum, weight_decay=weight_decay)
    generator = np.random.default_rng(seed)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = generator.permutation(len(frames)).tolist()
        for first in range(0, len(order), batch_videos):
            chosen = order[first : first + batch_videos]
            logits = torch.cat([frames[i] for i in chosen]) @ weight.T + bias
            optimizer.zero_grad()
            cross_entropy(logits, torch.cat([targets[i] for i in chosen])).backward()
            optimizer.step()
    fitted, offset = weight.detach().numpy(), bias.detach().numpy()

    def classify(embeddings: ArrayLike) -> NDArray[np.int64]:
        found: NDArray[np.int64] = classes[(np.asarray(embeddings) @ fitted.T + offset).argmax(axis=1)]
        return found

    return classify


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
    train, train_phases = labelled(train_embeddings, train_labels, "training")
    val, val_phases = labelled(val_embeddings, val_labels, "validation")
    phases = phases if phases is not None else 1 + max(int(one.max()) for one in (*train_phases, *val_phases))
    if phases < 2:
        raise InputError(f"phase progression needs 2 phases or more; there are {phases}")
    fitted, measured = (
        np.concatenate([progression_targets(one, phases) for one in labels]) for labels in (train_phases, val_phases)
    )
    frames, others = np.concatenate(train), np.concatenate(val)
    model = LinearRegression().fit(frames, fitted)
    return Scores(float(r2_score(fitted, model.predict(frames))), float(r2_score(measured, model.predict(others))))


def progression_targets(labels: ArrayLike, phases: int) -> NDArray[np.float64]:
    """``(T, K - 1)``: frames since the last frame of every phase but the last (below 0 before it), over T.

    ``labels (T,)`` are of frames that have a phase, all of them. Raises ``InputError`` where a video lacks a phase.
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
        embeddings: Of two videos or more; where frames without a phase shall not count, of ``labelled``.
        stride: Every how many frames are compared.

    Raises:
        InputError: Fewer than two videos, shapes that do not fit, or a stride below 1.
    """
    taus = pair_taus(embeddings, stride=stride)
    return float(np.nanmean(taus)) if np.isfinite(taus).any() else float("nan")


def pair_taus(embeddings: Sequence[ArrayLike], *, stride: int = 1) -> NDArray[np.float64]:
    """``(N, N)``: tau-b of video i looked up in video j; NaN where there is none, and of a video with itself."""
    videos = _strided(_checked(embeddings, "compared"), stride, "Kendall's tau")
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
    videos, phases = (_strided(one, stride, "frame retrieval") for one in labelled(embeddings, labels, "measured"))
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


def labelled(
    embeddings: Sequence[ArrayLike], labels: Sequence[ArrayLike], which: str = "given"
) -> tuple[list[Floats], list[NDArray[Any]]]:
    """The videos and their phases without the frames whose phase is below 0.

    Args:
        which: Of the videos, for messages.

    Raises:
        InputError: No videos, shapes that do not fit, numbers that are not finite, or a video of which no frame has a
            phase.
    """
    if len(embeddings) != len(labels):
        raise InputError(f"{len(embeddings)} {which} videos and labels of {len(labels)}: expected one or more of both")
    videos, phases = _checked(embeddings, which), [np.asarray(one) for one in labels]
    for i, (video, one) in enumerate(zip(videos, phases, strict=True)):
        if one.shape != video.shape[:1]:
            raise InputError(
                f"video {i} of the {which} videos has embeddings of shape {video.shape} and phases of shape "
                f"{one.shape}; expected (frames, P) and (frames,)"
            )
        if not (one >= 0).any():
            raise InputError(f"video {i} of the {which} videos has no frame with a phase; leave it out")
    kept = [one >= 0 for one in phases]
    return (
        [video[known] for video, known in zip(videos, kept, strict=True)],
        [one[known] for one, known in zip(phases, kept, strict=True)],
    )


def _checked(embeddings: Sequence[ArrayLike], which: str) -> list[Floats]:
    """Videos ``(T_i, P)`` of finite numbers, one or more."""
    videos = [np.asarray(one) for one in embeddings]
    if not videos:
        raise InputError(f"there are no {which} videos: expected one or more")
    for i, video in enumerate(videos):
        if video.ndim != 2 or not len(video) or video.shape[1] != videos[0].shape[-1]:
            raise InputError(
                f"video {i} of the {which} videos has embeddings of shape {video.shape}; expected (frames, P), and P "
                "the same in all"
            )
        if not np.isfinite(video).all():
            raise InputError(f"video {i} of the {which} videos has embeddings that are no finite numbers")
    return videos


def _several_phases(
    embeddings: Sequence[ArrayLike], labels: Sequence[ArrayLike]
) -> tuple[list[Floats], list[NDArray[Any]]]:
    videos, phases = labelled(embeddings, labels, "training")
    if len(np.unique(np.concatenate(phases))) < 2:
        raise InputError("phase classification: the training videos have one phase only; there is nothing to learn")
    return videos, phases


def _share_right(classify: Classify, embeddings: Sequence[ArrayLike], labels: Sequence[ArrayLike], which: str) -> float:
    videos, phases = labelled(embeddings, labels, which)
    return float((classify(np.concatenate(videos)) == np.concatenate(phases)).mean())


def _strided(videos: Sequence[NDArray[Any]], stride: int, measure: str) -> list[NDArray[Any]]:
    """Every ``stride``-th frame of two videos or more."""
    if len(videos) < 2:
        raise InputError(f"{measure} compares videos with each other: expected 2 or more, found {len(videos)}")
    if stride < 1:
        raise InputError(f"stride = {stride}: expected 1 or more")
    return [one[::stride] for one in videos]
