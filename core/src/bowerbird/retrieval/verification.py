"""Face verification (1:1) and identification (1:N) in the manner of IJB-B and IJB-C.

Scores are similarities, larger = more alike. For a cross test, score templates of the new model against templates of
the old one: first template of a pair, or the gallery, from the old model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bowerbird.errors import InputError
from bowerbird.retrieval.metrics import checked_rank

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PAIR_BLOCK = 65_536


def template_features(
    embeddings: ArrayLike,
    template_ids: ArrayLike,
    media_ids: ArrayLike,
    *,
    flipped: ArrayLike | None = None,
    detector_score: ArrayLike | None = None,
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """One unit vector per template (a person's set of images and video frames).

    Per face: embedding plus the embedding of the mirrored image, times the detector's score. Per template: mean within
    each media id, sum over media, L2 normalisation. So ten frames of one video weigh as much as one photograph.

    Args:
        embeddings: ``(F, D)``, one row per face.
        template_ids, media_ids: ``(F,)`` integers.
        flipped: ``(F, D)`` embeddings of the mirrored images.
        detector_score: ``(F,)``.

    Returns:
        ``(T, D)`` features and the ``(T,)`` template ids that they belong to, ascending.

    Raises:
        InputError: Shapes that do not fit, NaN, or a template whose sum is the zero vector.
    """
    faces = _floats(embeddings)
    templates, media = np.asarray(template_ids), np.asarray(media_ids)
    if faces.ndim != 2 or templates.shape != faces.shape[:1] or media.shape != faces.shape[:1]:
        raise InputError(
            "needs embeddings (F, D) with template and media ids (F,); "
            f"got {faces.shape}, {templates.shape}, {media.shape}."
        )
    if flipped is not None:
        mirrored = np.asarray(flipped)
        if mirrored.shape != faces.shape:
            raise InputError(f"flipped must have the shape of embeddings {faces.shape}; got {mirrored.shape}.")
        faces = faces + mirrored
    if detector_score is not None:
        weight = np.asarray(detector_score)
        if weight.shape != faces.shape[:1]:
            raise InputError(f"detector_score must have shape ({len(faces)},); got {weight.shape}.")
        faces = faces * weight[:, None]
    _refuse_nan(faces, "embeddings")

    medium, of_medium = np.unique(np.stack([templates, media], axis=1), axis=0, return_inverse=True)
    of_medium = of_medium.reshape(-1)
    means = np.zeros((len(medium), faces.shape[1]), faces.dtype)
    np.add.at(means, of_medium, faces)
    means /= np.bincount(of_medium, minlength=len(medium))[:, None].astype(faces.dtype)
    known, of_template = np.unique(medium[:, 0], return_inverse=True)
    features = np.zeros((len(known), faces.shape[1]), faces.dtype)
    np.add.at(features, of_template, means)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    if (norms == 0).any():
        raise InputError(
            f"template {known[np.flatnonzero(norms == 0)[0]]} sums to the zero vector; it has no direction."
        )
    return features / norms, known


def pair_scores(first: ArrayLike, second: ArrayLike, pair_a: ArrayLike, pair_b: ArrayLike) -> NDArray[np.floating]:
    """``(P,)`` dot products of rows ``pair_a`` of ``first`` with rows ``pair_b`` of ``second``.

    Self test: both are the new model's features. Cross test: ``first`` from the old model, ``second`` from the new one.
    """
    a, b = _floats(first), _floats(second)
    if a.shape[1:] != b.shape[1:]:
        raise InputError(f"features of widths {a.shape[1:]} and {b.shape[1:]} have no dot product.")
    left, right = np.asarray(pair_a), np.asarray(pair_b)
    for name, rows, features in (("pair_a", left, a), ("pair_b", right, b)):
        if rows.size and (not np.issubdtype(rows.dtype, np.integer) or rows.min() < 0 or rows.max() >= len(features)):
            raise InputError(f"{name} must be row numbers in 0..{len(features) - 1}.")
    if left.shape != right.shape or left.ndim != 1:
        raise InputError(f"pair_a and pair_b must have the same shape (P,); got {left.shape} and {right.shape}.")
    scores = np.empty(len(left), np.result_type(a, b))
    for start in range(0, len(left), PAIR_BLOCK):  # 15 million pairs of 512 numbers at once would be 64 GB
        part = slice(start, start + PAIR_BLOCK)
        scores[part] = np.einsum("pd,pd->p", a[left[part]], b[right[part]])
    return scores


@dataclass(frozen=True)
class Verification:
    """One entry per target: true and false positive rate of the operating point, and its threshold (accepted: score >=
    threshold; ``inf`` where nothing is accepted)."""

    tpr: NDArray[np.float64]
    fpr: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    targets: NDArray[np.float64]


def verification_at_fpr(
    scores: ArrayLike,
    labels: ArrayLike,
    targets: float | Sequence[float] = (1e-4, 1e-5, 1e-6),
    kind: str = "at_most",
) -> Verification:
    """True positive rate of 1:1 verification at given false positive rates.

    Args:
        scores: ``(P,)``, one per pair.
        labels: ``(P,)``, 1 for a pair of one person.
        targets: False positive rates in 0..1.
        kind: ``at_most``: the largest TPR whose FPR does not exceed the target. ``nearest``: the point of the ROC
            curve, points on straight pieces dropped, whose FPR is nearest to the target (of two equally near the
            larger FPR), as the published scripts do; with few negative pairs it can exceed the target.

    Raises:
        InputError: NaN scores, labels other than 0 and 1, only one of the two kinds of pairs, or a bad target.
    """
    score, label = _floats(scores), np.asarray(labels)
    if score.ndim != 1 or label.shape != score.shape:
        raise InputError(f"scores and labels must have the same shape (P,); got {score.shape} and {label.shape}.")
    _refuse_nan(score, "scores")
    if not np.isin(label, (0, 1)).all():
        raise InputError(f"labels must be 0 or 1; got {np.unique(label)[:5].tolist()}.")
    if kind not in ("at_most", "nearest"):
        raise InputError(f"kind must be at_most or nearest; got {kind!r}.")
    wanted = _rates(targets)
    same = label.astype(bool)
    num_same, num_other = int(same.sum()), int((~same).sum())
    if not num_same or not num_other:
        raise InputError(f"needs pairs of one person and of two; got {num_same} and {num_other}.")

    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # a threshold accepts all equal scores
    true = np.concatenate([[0], np.cumsum(same[order])[last]])
    false = np.concatenate([[0], np.cumsum(~same[order])[last]])
    threshold = np.concatenate([[np.inf], score[order][last]])
    if kind == "nearest" and len(true) > 3:
        bend = np.diff(true[1:], 2).astype(bool) | np.diff(false[1:], 2).astype(bool)
        kept = np.concatenate([[True, True], bend, [True]])
        true, false, threshold = true[kept], false[kept], threshold[kept]
    fpr = false / num_other
    if kind == "at_most":
        at = np.searchsorted(fpr, wanted, side="right") - 1
    else:
        at = len(fpr) - 1 - np.abs(fpr[::-1, None] - wanted).argmin(axis=0)
    return Verification(true[at] / num_same, fpr[at], threshold[at], wanted)


def fold_accuracy(scores: ArrayLike, labels: ArrayLike, folds: int = 10) -> NDArray[np.bool_]:
    """bool ``(P,)``: is each pair judged right with the threshold that is best on the other folds (the LFW protocol)?

    Folds are consecutive parts of the list, as its authors ordered it. A pair is accepted where its score reaches the
    threshold; of several best thresholds (scores of the other folds, and infinity) the lowest is taken.

    Args:
        scores: ``(P,)``, larger = more alike.
        labels: ``(P,)``, 1 for a pair of one person.
        folds: At least 2, at most P.

    Raises:
        InputError: Shapes that do not fit, NaN, labels other than 0 and 1, or more folds than pairs.
    """
    score, label = _floats(scores), np.asarray(labels)
    if score.ndim != 1 or label.shape != score.shape or not np.isin(label, (0, 1)).all():
        raise InputError(f"needs scores (P,) and labels 0 or 1; got shapes {score.shape} and {label.shape}.")
    _refuse_nan(score, "scores")
    if not 2 <= folds <= len(score):
        raise InputError(f"folds must be 2 to {len(score)}, the number of pairs; got {folds}.")
    same = label.astype(bool)
    right = np.empty(len(score), bool)
    for fold in np.array_split(np.arange(len(score)), folds):
        others = np.setdiff1d(np.arange(len(score)), fold, assume_unique=True)
        order = others[np.argsort(score[others], kind="stable")]
        # accepting the items from position i on: right are the same pairs from i on and the different ones before
        correct = np.append(np.cumsum(same[order][::-1])[::-1], 0) + np.append(0, np.cumsum(~same[order]))
        edge = np.append(True, np.diff(score[order]) > 0)  # equal scores are accepted together
        candidates = np.append(np.flatnonzero(edge), len(order))
        best = candidates[correct[candidates].argmax()]
        threshold = score[order[best]] if best < len(order) else np.inf
        right[fold] = (score[fold] >= threshold) == same[fold]
    return right


@dataclass(frozen=True)
class Identification:
    """1:N identification against one gallery.

    Attributes:
        tpir: ``(F,)`` true positive identification rate at each target: mated probes that are right at rank 1 with a
            score above the threshold, divided by the mated probes.
        thresholds: ``(F,)``.
        targets: ``(F,)``.
        hits: ``{k: number of mated probes with their subject among the first k}``.
        num_mated, num_probes: Probes whose subject is in the gallery, and all.
        ranks: int64 ``(P,)`` 1-based rank of the best template of the probe's subject; 0 for non-mated probes.
        best_scores: ``(P,)`` score of each probe's best match.
    """

    tpir: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    targets: NDArray[np.float64]
    hits: dict[int, int]
    num_mated: int
    num_probes: int
    ranks: NDArray[np.int64]
    best_scores: NDArray[np.floating]

    def rank_rate(self, k: int) -> float:
        """Share of mated probes with their subject among the first k."""
        return int(((self.ranks > 0) & (self.ranks <= k)).sum()) / self.num_mated


def identification_at_fpir(
    scores: ArrayLike,
    probe_subjects: ArrayLike,
    gallery_subjects: ArrayLike,
    targets: float | Sequence[float] = (0.01, 0.1),
    ks: int | Sequence[int] = (1, 5, 10),
) -> Identification:
    """True positive identification rate at given false positive identification rates.

    The threshold for rate f is the ``max(floor(f n) - 1, 0)``-th largest (from 0) of the best scores of the n non-mated
    probes; below f = 1/n it is the largest of them.

    Args:
        scores: ``(P, G)``, probes by gallery templates. Equal scores rank by gallery position.
        probe_subjects, gallery_subjects: ``(P,)``, ``(G,)``.
        targets: Rates in 0..1.
        ks: Ranks of ``hits``.

    Raises:
        InputError: NaN scores, shapes that do not fit, no mated or no non-mated probe.
    """
    score, probe, gallery = _floats(scores), np.asarray(probe_subjects), np.asarray(gallery_subjects)
    if score.shape != (*probe.shape, *gallery.shape) or score.ndim != 2 or not len(gallery):
        raise InputError(
            f"scores must be (P, G) for {probe.shape} probes and {gallery.shape} templates; got {score.shape}."
        )
    _refuse_nan(score, "scores")
    wanted, wanted_ranks = _rates(targets), [checked_rank(k) for k in np.atleast_1d(np.asarray(ks)).tolist()]
    mated = np.isin(probe, gallery)
    if not mated.any() or mated.all():
        raise InputError(
            f"{int(mated.sum())} of {len(mated)} probes have their subject in the gallery; "
            "needs some that do and some that do not."
        )
    order = np.argsort(-score, axis=1, kind="stable")
    right = gallery[order] == probe[:, None]
    ranks = np.where(mated, right.argmax(axis=1) + 1, 0)
    best = score.max(axis=1)
    others = np.sort(best[~mated])[::-1]
    thresholds = others[np.maximum(np.floor(wanted * len(others)).astype(int) - 1, 0)]
    accepted = (ranks == 1)[:, None] & (best[:, None] > thresholds)
    num_mated = int(mated.sum())
    return Identification(
        tpir=accepted.sum(axis=0) / num_mated,
        thresholds=thresholds,
        targets=wanted,
        hits={k: int(((ranks > 0) & (ranks <= k)).sum()) for k in wanted_ranks},
        num_mated=num_mated,
        num_probes=len(probe),
        ranks=ranks,
        best_scores=best,
    )


@dataclass(frozen=True)
class TwoGalleries:
    """``tpir``: mean over galleries G1 and G2; ``accuracy``: ``{k: (hits of G1 + hits of G2) / number of probes}``."""

    tpir: NDArray[np.float64]
    accuracy: dict[int, float]


def combine_galleries(first: Identification, second: Identification) -> TwoGalleries:
    """The IJB protocol searches every probe in two galleries of disjoint subjects."""
    if first.num_probes != second.num_probes or not np.array_equal(first.targets, second.targets):
        raise InputError("the two galleries must have been searched with the same probes and targets.")
    accuracy = {k: (first.hits[k] + second.hits[k]) / first.num_probes for k in first.hits if k in second.hits}
    return TwoGalleries((first.tpir + second.tpir) / 2, accuracy)


def _floats(values: ArrayLike) -> NDArray[np.floating]:
    array = np.asarray(values)
    if array.dtype == np.float16:  # its sums overflow at 65,504
        return array.astype(np.float32)
    return array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float64)


def _refuse_nan(array: NDArray[np.floating], name: str) -> None:
    if np.isnan(array).any():
        raise InputError(f"{name} hold NaN, first in row {np.argwhere(np.isnan(array))[0][0]}.")


def _rates(targets: float | Sequence[float]) -> NDArray[np.float64]:
    wanted = np.atleast_1d(np.asarray(targets, np.float64))
    if wanted.ndim != 1 or not ((wanted >= 0) & (wanted <= 1)).all():
        raise InputError(f"targets must be rates in 0..1; got {wanted.tolist()}.")
    return wanted
