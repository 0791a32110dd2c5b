"""In which order a gallery is backfilled. Every order is computed from the stored old vectors; no image is read.

``core:random`` is the default. ``core:uncertainty`` moves those items first of whose class the old encoder was least
sure (Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval",
arXiv 2201.09724, backfilling section): with class centres ``c_j`` and ``p = softmax(cos(o, c_j) / temperature)``

    entropy             -sum_j p_j log p_j
    least_confidence    1 - p_(1)
    margin              1 - (p_(1) - p_(2))

``core:class-distance`` goes by the distance of an item to its class mean, as the backfill of "Lambda-orthogonality
regularization for compatible representation learning" (arXiv 2509.16664) does. ``core:traffic`` goes by a log of
requests: what people ask for most is new first.

An order is a function of item numbers and old vectors. One that needs more says so by an attribute: ``needs_labels``
(it is called with ``labels=``, one per item, ``None`` without one) and ``needs_names`` (``names=``, the item ids). One
that does not look at vectors says ``needs_vectors = False``, and is called with ``None`` in their place.

Shapes: N items, D width of the old vectors, C classes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.errors import DataError, InputError, MissingExtraError, UnknownNameError, did_you_mean

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


random_order.needs_vectors = False  # type: ignore[attr-defined]


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


def class_distance_order(
    ids: Any,
    old_vectors: Any,
    *,
    seed: int = 0,
    centers: Any = None,
    labels: Sequence[Any] | None = None,
    first: str = "far",
    clusters: int | None = None,
) -> np.ndarray:
    """Positions of the items by cosine distance to the mean of their class; equals stay in order of position.

    Args:
        ids: ``(N,)``, the items' numbers.
        old_vectors: ``(N, D)``, their vectors in the old space; need not be normalised.
        seed: Of the k-means that stands in for classes where nothing else is known.
        centers: ``(C, D)`` class means; an item without a label belongs to the nearest.
        labels: N labels, ``None`` without one. Their means are the class means where ``centers`` is ``None``.
        first: ``far``: what the old encoder placed worst is moved first. ``near``: the other end.
        clusters: C of the k-means; as in ``uncertainty_order``.

    Returns:
        int64 ``(N,)``, a permutation of 0..N-1.

    Raises:
        InputError: If shapes do not fit, or ``first`` is neither end.
    """
    if first not in ("far", "near"):
        raise InputError(f"first is {first!r}; accepted: 'far', 'near'")
    if len(ids) != len(old_vectors) or (labels is not None and len(labels) != len(ids)):
        raise InputError("order 'core:class-distance' needs one id, one vector and, where given, one label per item")
    if len(ids) == 0:
        return np.empty(0, np.int64)
    unit = _unit(_matrix(old_vectors, "old vectors"))
    known = np.zeros(len(unit), bool) if labels is None else np.array([label is not None for label in labels])
    own = np.full(len(unit), -1)
    if labels is not None and known.any():
        names = sorted({str(label) for label in labels if label is not None})
        row = {name: number for number, name in enumerate(names)}
        own[known] = [row[str(label)] for label in labels if label is not None]
        means = class_means(unit, labels)
    elif centers is not None:
        means = _matrix(centers, "centers")
    else:
        count = clusters or min(max(2, round((len(ids) / 2) ** 0.5)), 1000)
        means = spherical_kmeans(unit, min(count, len(ids)), seed=seed)
    if means.shape[1] != unit.shape[1]:
        raise InputError(f"class centres have width {means.shape[1]}, the old vectors have width {unit.shape[1]}")
    means = _unit(means, zero_ok=True)
    distance = np.empty(len(unit))
    for start in range(0, len(unit), _BLOCK):
        block = slice(start, start + _BLOCK)
        cosines = unit[block] @ means.T
        of = np.where(own[block] >= 0, own[block], cosines.argmax(axis=1))
        distance[block] = 1 - cosines[np.arange(len(of)), of]
    return np.argsort(-distance if first == "far" else distance, kind="stable").astype(np.int64)


class_distance_order.needs_labels = True  # type: ignore[attr-defined]


def traffic_order(
    ids: Any,
    old_vectors: Any = None,
    *,
    seed: int = 0,
    centers: Any = None,
    names: Sequence[str] | None = None,
    log: str | None = None,
    first: str = "most",
) -> np.ndarray:
    """Positions of the items by how often they were requested; equals in a seeded random order.

    Args:
        ids: ``(N,)``, the items' numbers.
        names: N item ids, as the log has them.
        log: File of requests: see ``read_traffic``.
        first: ``most``: what is requested most is moved first. ``least``: the other end.

    Returns:
        int64 ``(N,)``, a permutation of 0..N-1.

    Raises:
        InputError: Without a log, or with one that names no item of the gallery; says what to give.
    """
    if first not in ("most", "least"):
        raise InputError(f"first is {first!r}; accepted: 'most', 'least'")
    if not len(ids):
        return np.empty(0, np.int64)
    if log is None or names is None:
        raise InputError(
            "order 'core:traffic' needs a log of requests: --set log=FILE (.csv, .jsonl, .json or .parquet with a "
            "column id and, where rows are not single requests, a column count)"
        )
    counts = read_traffic(log)
    hits = np.array([counts.get(name, 0.0) for name in names])
    if not hits.any():
        example = next(iter(counts), "")
        raise InputError(
            f"the log {log} names none of the {len(names)} items (it has ids such as {example!r}, the gallery such as "
            f"{names[0]!r}); are these its item ids?"
        )
    chance = np.random.default_rng(seed).permutation(len(hits))
    return np.lexsort((chance, -hits if first == "most" else hits)).astype(np.int64)


traffic_order.needs_names = True  # type: ignore[attr-defined]
traffic_order.needs_vectors = False  # type: ignore[attr-defined]


def read_traffic(path: str) -> dict[str, float]:
    """Requests by item id, from a log with a column ``id`` (or ``item_id``, ``item``) and, optionally, ``count`` (or
    ``hits``, ``requests``): ``.csv`` with a header, ``.jsonl``, ``.json`` (``{id: count}`` or a list of objects or
    ids), ``.parquet`` (extra ``[tables]``). Without a count every row is one request.

    Raises:
        DataError: If the file cannot be read, has no such column, or a count is no number of at least 0; names the row.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(f"the log {path}: there is no such file")
    try:
        match source.suffix.lower():
            case ".csv":
                with source.open(newline="", encoding="utf-8-sig") as file:
                    rows: Any = list(csv.DictReader(file))
            case ".jsonl":
                rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
            case ".json":
                rows = json.loads(source.read_text(encoding="utf-8"))
            case ".parquet":
                try:
                    import pyarrow.parquet as parquet
                except ImportError as exc:
                    raise MissingExtraError(
                        f"{path} needs pyarrow. Install it: pip install 'bowerbird-core[tables]'"
                    ) from exc
                rows = parquet.read_table(source).to_pylist()
            case other:
                raise InputError(f"the log {path} ends in {other!r}; accepted: .csv, .jsonl, .json, .parquet")
    except (OSError, ValueError, csv.Error) as exc:
        raise DataError(f"the log {path} cannot be read: {exc}") from exc
    if isinstance(rows, dict):
        rows = [{"id": name, "count": count} for name, count in rows.items()]
    counts: dict[str, float] = {}
    for number, row in enumerate(rows, start=1):
        row = row if isinstance(row, dict) else {"id": row}
        name = next((row[key] for key in ("id", "item_id", "item") if row.get(key) is not None), None)
        if name is None:
            raise DataError(f"the log {path}, row {number}: no column id; it has {', '.join(map(str, row)) or 'none'}")
        given = next((row[key] for key in ("count", "hits", "requests") if key in row), 1)
        try:
            count = float(given)
        except (TypeError, ValueError):
            count = float("nan")
        if not (np.isfinite(count) and count >= 0):
            raise DataError(f"the log {path}, row {number}: count is {given!r}; a number of at least 0 is needed")
        counts[str(name)] = counts.get(str(name), 0.0) + count
    return counts


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
