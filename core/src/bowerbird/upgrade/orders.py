"""In which order a gallery is backfilled. Every order is computed from the stored old vectors; no image is read.

``core:random`` is the default. ``core:uncertainty`` moves those items first of whose class the old encoder was least
sure (Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval",
arXiv 2201.09724, backfilling section): with class centres ``c_j`` and ``p = softmax(cos(o, c_j) / temperature)``

    entropy             -sum_j p_j log p_j
    least_confidence    1 - p_(1)
    margin              1 - (p_(1) - p_(2))

Shapes: N items, D width of the old vectors, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bowerbird.errors import DataError, InputError, UnknownNameError, did_you_mean

UNCERTAINTIES = ("entropy", "least_confidence", "margin")
_BLOCK = 16_384  # rows whose class probabilities are held at once


def random_order(ids: Any, old_vectors: Any = None, *, seed: int = 0, centers: Any = None) -> np.ndarray:
    """Positions 0..N-1 shuffled. Depends on ``seed`` and on N only.

    Args:
        ids: ``(N,)``, the items' numbers.
        old_vectors: Not read.
        seed: Any non-negative integer.
        centers: Not read.

    Returns:
        int64 ``(N,)``, a permutation of 0..N-1: what is moved first stands first.
    """
    return np.random.default_rng(seed).permutation(len(ids)).astype(np.int64)


def uncertainty_order(
    ids: Any,
    old_vectors: Any,
    *,
    seed: int = 0,
    centers: Any = None,
    strategy: str = "entropy",
    temperature: float = 0.1,
    clusters: int | None = None,
) -> np.ndarray:
    """Positions of the items, the most uncertain first; equals stay in order of position.

    Args:
        ids: ``(N,)``, the items' numbers.
        old_vectors: ``(N, D)``, their vectors in the old space; need not be normalised.
        seed: Of the k-means that stands in for class centres where ``centers`` is ``None``.
        centers: ``(C, D)`` class means or classifier rows, or ``None``.
        strategy: One of ``UNCERTAINTIES``.
        temperature: Of the softmax over cosines, above 0.
        clusters: C of the k-means; by default ``round(sqrt(N / 2))`` but at least 2 and at most 1,000.

    Returns:
        int64 ``(N,)``, a permutation of 0..N-1.
    """
    if len(ids) != len(old_vectors):
        raise InputError(
            f"order 'core:uncertainty' got {len(ids)} ids for {len(old_vectors)} vectors; it needs one each"
        )
    if len(ids) == 0:
        return np.empty(0, np.int64)
    if centers is None:
        count = clusters or min(max(2, round((len(ids) / 2) ** 0.5)), 1000)
        centers = spherical_kmeans(old_vectors, min(count, len(ids)), seed=seed)
    return backfill_order(old_vectors, centers, strategy, temperature)


def backfill_order(
    old_gallery: Any,
    centers: Any,
    strategy: str = "entropy",
    temperature: float = 0.1,
    generator: np.random.Generator | int | None = None,
) -> np.ndarray:
    """The order of a backfill from old vectors and class centres.

    Args:
        old_gallery: ``(N, D)`` old vectors, in any scale.
        centers: ``(C, D)`` class centres or classifier rows, in any scale; not read by ``random``.
        strategy: ``entropy``, ``least_confidence``, ``margin`` or ``random``.
        temperature: Of the softmax over cosines, above 0.
        generator: A numpy generator or a seed; read by ``random`` only.

    Returns:
        int64 ``(N,)``, a permutation of 0..N-1, most uncertain first, ties by position.

    Raises:
        UnknownNameError: If there is no such strategy.
        InputError: If the shapes do not fit or the temperature is not above 0.
        DataError: If a row is not finite; names the row.
    """
    if strategy == "random":
        return np.random.default_rng(generator).permutation(len(old_gallery)).astype(np.int64)
    old_gallery = _matrix(old_gallery, "old vectors")
    scores = np.empty(len(old_gallery))
    for start in range(0, len(scores), _BLOCK):  # (N, C) probabilities of a large gallery would not fit into memory
        block = slice(start, start + _BLOCK)
        scores[block] = uncertainty_scores(class_probabilities(old_gallery[block], centers, temperature), strategy)
    return np.argsort(-scores, kind="stable").astype(np.int64)


def class_probabilities(vectors: Any, centers: Any, temperature: float = 0.1) -> np.ndarray:
    """``softmax(cos(vector, centre) / temperature)``: float64 ``(N, C)`` from ``(N, D)`` and ``(C, D)``."""
    vectors, centers = _matrix(vectors, "old vectors"), _matrix(centers, "centers")
    if vectors.shape[1] != centers.shape[1]:
        raise InputError(f"class centres have width {centers.shape[1]}, the old vectors have width {vectors.shape[1]}")
    if not len(centers):
        raise InputError("an uncertainty order needs at least one class centre, got none")
    if not (np.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature is {temperature}; it must be above 0")
    logits = _unit(vectors) @ _unit(centers).T / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def uncertainty_scores(probabilities: Any, strategy: str = "entropy") -> np.ndarray:
    """``(N,)`` scores of ``(N, C)`` probabilities, larger = more uncertain.

    The range is 0..log C for ``entropy``, 0..1 - 1/C for ``least_confidence``, 0..1 for ``margin``.
    """
    p = np.asarray(probabilities, np.float64)
    if strategy == "entropy":
        return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)
    if strategy == "least_confidence":
        return 1.0 - p.max(axis=1)
    if strategy == "margin":
        if p.shape[1] == 1:  # a single class: there is no second one to be confused with
            return 1.0 - p[:, 0]
        top = np.partition(p, p.shape[1] - 2, axis=1)[:, -2:]
        return 1.0 - (top[:, 1] - top[:, 0])
    raise UnknownNameError(
        f"no uncertainty {strategy!r}.{did_you_mean(strategy, UNCERTAINTIES)} Known: {', '.join(UNCERTAINTIES)}"
    )


def class_means(vectors: Any, labels: Sequence[Any]) -> np.ndarray:
    """``(C, D)`` means of the unit vectors of each label, in sorted order of the labels' text. ``None`` is no label."""
    unit = _unit(_matrix(vectors, "old vectors"))
    names = sorted({str(label) for label in labels if label is not None})
    if not names:
        raise DataError("class centres were asked for, but no item has a label; give centers, or leave the label out")
    row = {name: i for i, name in enumerate(names)}
    known = np.array([label is not None for label in labels])
    index = np.array([row[str(label)] for label in labels if label is not None])
    sums = np.zeros((len(names), unit.shape[1]))
    np.add.at(sums, index, unit[known])
    return sums / np.bincount(index, minlength=len(names))[:, None]


def spherical_kmeans(
    vectors: Any, clusters: int, *, seed: int = 0, iterations: int = 20, sample: int = 20_000
) -> np.ndarray:
    """Unit centres ``(clusters, D)`` of a k-means by cosine, seeded by k-means++.

    At most ``sample`` rows are used, drawn with ``seed``. A cluster that loses its members takes the row that fits its
    own centre worst.
    """
    vectors = _matrix(vectors, "old vectors")
    if not 1 <= clusters <= len(vectors):
        raise InputError(f"k-means was asked for {clusters} clusters of {len(vectors)} vectors")
    rng = np.random.default_rng(seed)
    if len(vectors) > sample:
        vectors = vectors[np.sort(rng.choice(len(vectors), max(sample, clusters), replace=False))]
    unit = _unit(vectors)
    centers = np.empty((clusters, unit.shape[1]))
    centers[0] = unit[rng.integers(len(unit))]
    nearest = 1.0 - unit @ centers[0]
    for j in range(1, clusters):
        weights = np.clip(nearest, 0.0, None)
        total = weights.sum()
        chosen = rng.choice(len(unit), p=weights / total) if total > 0 else rng.integers(len(unit))
        centers[j] = unit[chosen]
        nearest = np.minimum(nearest, 1.0 - unit @ centers[j])
    assigned = None
    for _ in range(iterations):
        similarity = unit @ centers.T
        previous, assigned = assigned, similarity.argmax(axis=1)
        if previous is not None and np.array_equal(previous, assigned):
            break
        sums = np.zeros_like(centers)
        np.add.at(sums, assigned, unit)
        empty = np.flatnonzero(np.bincount(assigned, minlength=clusters) == 0)
        worst = np.argsort(similarity.max(axis=1), kind="stable")[: len(empty)]
        sums[empty] = unit[worst]
        centers = _unit(sums, zero_ok=True)
    return centers


def _matrix(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2:
        raise InputError(f"{what} must have shape (N, D), got {array.shape}")
    for start in range(0, len(array), _BLOCK):
        finite = np.isfinite(array[start : start + _BLOCK]).all(axis=1)
        if not finite.all():
            raise DataError(f"{what}: row {start + int(np.argmin(finite))} has NaN or infinity")
    return array


def _unit(vectors: np.ndarray, *, zero_ok: bool = False) -> np.ndarray:
    """float64 rows of length 1."""
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not zero_ok and (norms == 0).any():
        raise DataError(f"row {int(np.argmin(norms))} is a zero vector; it has no direction")
    return vectors / np.where(norms > 0, norms, 1.0)
