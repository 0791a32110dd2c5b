"""Old and new models against each other: self and cross tests, gains, and sequences of upgrades.

``M(a, b)`` is a metric with queries by model a and gallery by model b. Self test ``M(new, new)``, cross test
``M(new, old)``, old level ``M(old, old)``, ceiling ``M(star, star)`` with a new model trained without regard to the
old one. The new model is compatible where the cross test is strictly better than the old level (Shen et al., Towards
Backward-Compatible Representation Learning, arXiv 2003.11942).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError, did_you_mean
from bowerbird.retrieval.flips import APFlips, Flips, ap_flips, flips
from bowerbird.retrieval.metrics import PAD_ID, PerQuery, RankedList, Relevance, average_precision, cmc

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

DISTANCES = ("cosine", "dot", "l2")
Metric = Callable[[RankedList, Relevance], PerQuery]  # the means below also take a metric that returns a number
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------- models and their data


@dataclass(frozen=True)
class Embeddings:
    """What one model makes of the data: ``queries`` (Q, D) and ``gallery`` (N, D)."""

    queries: Any
    gallery: Any


@dataclass(frozen=True)
class RetrievalData:
    """Queries, a gallery and what is right.

    Attributes:
        relevance: In gallery positions (or in ``gallery_ids``).
        queries, gallery: What encoders take; not needed where models are given as ``Embeddings``. Without a gallery the
            queries are their own gallery: build ``relevance`` with ``exclude_self=True``.
        gallery_ids: ``(N,)`` ids that ``relevance`` speaks of; default: positions.
    """

    relevance: Relevance
    queries: Any = None
    gallery: Any = None
    gallery_ids: Any = None


Model = Embeddings | Callable[[Any], Any]  # vectors, or an encoder: items -> (n, D)


def similarity(queries: ArrayLike, gallery: ArrayLike, distance: str = "cosine") -> NDArray[np.floating]:
    """``(Q, N)`` scores, larger = nearer, in the precision of the inputs (float32 for half precision).

    Args:
        queries, gallery: ``(Q, D)`` and ``(N, D)``.
        distance: ``cosine``, ``dot``, or ``l2`` (the negative Euclidean distance).

    Raises:
        InputError: Different widths (vectors are never cut to fit), values that are not finite, or for cosine a zero
            vector.
    """
    q, g = _vectors(queries, "queries"), _vectors(gallery, "gallery")
    if q.shape[1] != g.shape[1]:
        raise InputError(f"queries have {q.shape[1]} dimensions, the gallery {g.shape[1]}; they cannot be compared.")
    if distance == "cosine":
        return _normalised(q, "queries") @ _normalised(g, "gallery").T
    if distance == "dot":
        return q @ g.T
    if distance == "l2":
        a, b = q.astype(np.float64), g.astype(np.float64)  # the difference of squares leaves few digits of float32
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * (a @ b.T)
        return (-np.sqrt(np.maximum(squares, 0))).astype(np.result_type(q, g))
    raise InputError(
        f"no distance {distance!r}; accepted: {', '.join(DISTANCES)}.{did_you_mean(str(distance), DISTANCES)}"
    )


def measure(
    query_model: Model,
    gallery_model: Model,
    data: RetrievalData | Relevance,
    metric: Metric = average_precision,
    *,
    distance: str = "cosine",
) -> PerQuery:
    """``M(query_model, gallery_model)`` per query."""
    data = _data(data)
    scores = similarity(_embed(query_model, data).queries, _embed(gallery_model, data).gallery, distance)
    return metric(_ranked(scores, data), data.relevance)


def self_test(
    encoder: Model, data: RetrievalData | Relevance, metric: Metric = average_precision, *, distance: str = "cosine"
) -> float:
    """``M(encoder, encoder)``, mean over valid queries. ``measure`` keeps the single queries."""
    return float(measure(encoder, encoder, data, metric, distance=distance))


def cross_test(
    encoders: tuple[Model, Model],
    data: RetrievalData | Relevance,
    metric: Metric = average_precision,
    *,
    distance: str = "cosine",
) -> float:
    """``M(query encoder, gallery encoder)`` of the pair ``encoders``: (new, old) for the cross test of an upgrade."""
    if not isinstance(encoders, (tuple, list)) or len(encoders) != 2:
        raise InputError("a cross test needs the pair (query encoder, gallery encoder).")
    query_model, gallery_model = encoders
    return float(measure(query_model, gallery_model, data, metric, distance=distance))


@dataclass(frozen=True)
class StrictCompatibility:
    """Share of pairs that satisfy the strict definition: all pairs, same class, different class; and ``(Q,)`` per query
    (NaN where a query has no pair)."""

    share: float
    positives: float
    negatives: float
    per_query: NDArray[np.float64]


def strict_compatibility(
    old: Model, new: Model, data: RetrievalData | Relevance, *, distance: str = "cosine"
) -> StrictCompatibility:
    """The share of pairs (i, j) with ``d(new_i, old_j) <= d(old_i, old_j)`` if j is right for i, ``>=`` otherwise.

    Excluded items (the query itself, ignored ones) form no pair. The definition asks for every pair, which no trained
    model satisfies; the share is what can be compared.
    """
    data = _data(data)
    before, after = _embed(old, data), _embed(new, data)
    level = similarity(before.queries, before.gallery, distance)
    cross = similarity(after.queries, before.gallery, distance)
    n = level.shape[1]
    ids = np.arange(n) if data.gallery_ids is None else np.asarray(data.gallery_ids)
    rel = data.relevance
    counted, positive = np.ones(level.shape, bool), np.zeros(level.shape, bool)
    for q, (right, ignored, own) in enumerate(zip(rel.positives, rel.ignore, rel.self_ids, strict=True)):
        positive[q] = np.isin(ids, right)
        counted[q] = ~np.isin(ids, np.append(ignored, own))
    satisfied = np.where(positive, cross >= level, cross <= level)  # scores: larger = nearer

    def share(pairs: NDArray[np.bool_]) -> float:
        return float(satisfied[pairs].mean()) if pairs.any() else float("nan")

    number = counted.sum(axis=1)
    per_query = np.where(number > 0, (satisfied & counted).sum(axis=1) / np.maximum(number, 1), np.nan)
    return StrictCompatibility(share(counted), share(counted & positive), share(counted & ~positive), per_query)


# ----------------------------------------------------------------------------------------------------------- gains


def update_gain(m_cross: ArrayLike, m_old: ArrayLike, m_star: ArrayLike) -> Any:
    """``(M(new, old) - M(old, old)) / (M(star, star) - M(old, old))`` (BCT, equation 9); scalars or arrays.

    Undefined, and NaN (logged), where the ceiling is not above the old level. Can be negative or exceed 1.
    """
    cross, old, star = _broadcast(m_cross, m_old, m_star)
    room = star - old
    if (room <= 0).any():
        logger.warning("update gain is undefined where M(star, star) <= M(old, old): NaN.")
    gain = np.divide(cross - old, room, out=np.full(np.broadcast(cross, room).shape, np.nan), where=room > 0)
    return float(gain) if gain.ndim == 0 else gain


def new_model_loss(m_new: ArrayLike, m_star: ArrayLike) -> Any:
    """``(M(new, new) - M(star, star)) / M(star, star)``: what compatibility costs the new model; NaN where star is
    0."""
    new, star = _broadcast(m_new, m_star)
    loss = np.divide(new - star, star, out=np.full(np.broadcast(new, star).shape, np.nan), where=star != 0)
    return float(loss) if loss.ndim == 0 else loss


@dataclass(frozen=True)
class AdvBCTScores:
    """Sigmoids, so 0.5 means no change: ``p_comp`` of the update gain, ``p_up`` of the new model's loss, and ``p_1``,
    their harmonic mean."""

    p_comp: float
    p_up: float
    p_1: float


def advbct_scores(m_cross: ArrayLike, m_old: ArrayLike, m_new: ArrayLike, m_star: ArrayLike) -> AdvBCTScores:
    """The scores of AdvBCT over a list of data sets.

    Args:
        m_cross, m_old, m_new, m_star: ``(S,)`` M(new, old), M(old, old), M(new, new), M(star, star) per data set.
    """
    if not np.size(m_cross):
        raise InputError("there is no data set to take the mean over.")
    gain, loss = np.atleast_1d(update_gain(m_cross, m_old, m_star)), np.atleast_1d(new_model_loss(m_new, m_star))
    p_comp, p_up = float(_sigmoid(gain).mean()), float(_sigmoid(loss).mean())
    return AdvBCTScores(p_comp, p_up, 2 * p_comp * p_up / (p_comp + p_up))


# ------------------------------------------------------------------------------------------------ one pair of models


@dataclass(frozen=True)
class CompatibilityReport:
    """Everything about one upgrade.

    Attributes:
        metrics: ``{"new/old": {"mAP": PerQuery, "R@1": PerQuery, ...}, ...}``; the key is query model / gallery model.
        compatible: ``{"mAP": is M(new, old) > M(old, old)?, ...}``; empty where new queries and old gallery have
            different widths.
        flips: Keys ``new/old vs_old``, ``new/new vs_old``, ``new/new vs_start``: the system, and the reference it is
            counted against (``vs_start`` = new queries on the old gallery).
        ap_flips: Likewise.
        update_gain, new_model_loss: ``{"mAP": ..., ...}``; empty without a star model.
    """

    metrics: Mapping[str, Mapping[str, PerQuery]]
    compatible: Mapping[str, bool]
    flips: Mapping[str, Flips]
    ap_flips: Mapping[str, APFlips]
    update_gain: Mapping[str, float] = field(default_factory=dict)
    new_model_loss: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Flat numbers: ``new/old mAP``, ``new/new vs_old nfr`` and so on."""
        result = {f"{pair} {name}": value.mean() for pair, row in self.metrics.items() for name, value in row.items()}
        for pair, counted in self.flips.items():
            result |= {f"{pair} {name}": getattr(counted, name) for name in ("nfr", "pfr", "relative")}
            result[f"{pair} ap_drops"] = self.ap_flips[pair].share
        result |= {f"update_gain {name}": value for name, value in self.update_gain.items()}
        return result | {f"new_model_loss {name}": value for name, value in self.new_model_loss.items()}

    def table(self) -> str:
        """Text with one line per pair of models and one per flip count."""
        names = list(next(iter(self.metrics.values())))
        lines = [f"{'query/gallery':18}" + "".join(f"{name:>9}" for name in names)]
        for pair, row in self.metrics.items():
            lines.append(f"{pair:18}" + "".join(f"{value.mean():9.4f}" for value in row.values()))
        lines.append(f"{'flips':18}{'NFR':>9}{'PFR':>9}{'rel. NFR':>9}{'AP drops':>9}")
        for pair, c in self.flips.items():
            lines.append(f"{pair:18}{c.nfr:9.4f}{c.pfr:9.4f}{c.relative:9.4f}{self.ap_flips[pair].share:9.4f}")
        lines += [f"{name}: compatible {'yes' if yes else 'no'}" for name, yes in self.compatible.items()]
        lines += [f"{name}: update gain {value:.4f}" for name, value in self.update_gain.items()]
        return "\n".join(lines)


def compatibility_report(
    old: Model,
    new: Model,
    star: Model | None = None,
    *,
    data: RetrievalData | Relevance,
    kind: str = "ap",
    ap_k: int | None = None,
    k: int = 1,
    ks: int | Sequence[int] = (1, 5, 10),
    eps: float = 0.01,
    tie: str = "stable",
    distance: str = "cosine",
) -> CompatibilityReport:
    """Old/old, new/old and new/new (and star/star, star/old), with flips and gains.

    Args:
        old, new, star: Models, as vectors or encoders; ``star`` is a new model trained without the old one.
        data: Queries, gallery and relevance; the ``Relevance`` alone where all models are ``Embeddings``.
        kind, ap_k: Of ``average_precision``.
        k: A query is right, for flips, where a positive is among the first k.
        ks: Ranks of R@k.
        eps: An AP that falls by more is an AP flip.
        tie: As in ``cmc``.
        distance: As in ``similarity``.

    Pairs whose vectors have different widths are left out.
    """
    data, ranks = _data(data), np.atleast_1d(np.asarray(ks)).tolist()
    vectors = {
        name: _embed(model, data) for name, model in (("old", old), ("new", new), ("star", star)) if model is not None
    }
    metrics: dict[str, dict[str, PerQuery]] = {}
    correct: dict[str, PerQuery] = {}
    aps: dict[str, PerQuery] = {}
    for a, b in (("old", "old"), ("new", "old"), ("new", "new"), ("star", "old"), ("star", "star")):
        if a not in vectors or np.shape(vectors[a].queries)[1:] != np.shape(vectors[b].gallery)[1:]:
            continue
        scores = similarity(vectors[a].queries, vectors[b].gallery, distance)
        ranked = _ranked(scores, data)
        pair = f"{a}/{b}"
        aps[pair] = average_precision(ranked, data.relevance, kind, ap_k, tie=tie)
        correct[pair] = cmc(ranked, data.relevance, k, tie=tie)
        at = cmc(ranked, data.relevance, ranks, tie=tie)
        metrics[pair] = {"mAP": aps[pair]} | {
            f"R@{rank}": PerQuery(at.values[:, column], at.valid) for column, rank in enumerate(ranks)
        }
    references = {
        "new/old vs_old": ("new/old", "old/old"),
        "new/new vs_old": ("new/new", "old/old"),
        "new/new vs_start": ("new/new", "new/old"),
    }
    counted = {name: pair for name, pair in references.items() if pair[0] in correct and pair[1] in correct}
    means = {pair: {name: value.mean() for name, value in row.items()} for pair, row in metrics.items()}
    names = list(means["old/old"])
    crossed = "new/old" in means
    return CompatibilityReport(
        metrics=metrics,
        compatible={n: means["new/old"][n] > means["old/old"][n] for n in names} if crossed else {},
        flips={name: flips(correct[ref], correct[system]) for name, (system, ref) in counted.items()},
        ap_flips={name: ap_flips(aps[ref], aps[system], eps) for name, (system, ref) in counted.items()},
        update_gain={n: update_gain(means["new/old"][n], means["old/old"][n], means["star/star"][n]) for n in names}
        if crossed and star is not None
        else {},
        new_model_loss={n: new_model_loss(means["new/new"][n], means["star/star"][n]) for n in names}
        if star is not None
        else {},
    )


# ------------------------------------------------------------------------------------------------ many upgrades


def compatibility_matrix(
    models: Sequence[Model],
    data: RetrievalData | Relevance,
    metric: Metric = average_precision,
    *,
    distance: str = "cosine",
) -> NDArray[np.float64]:
    """``(T, T)`` lower triangle ``C[i, j] = M(model i, gallery by model j)``, models in order of release; NaN above
    it."""
    data = _data(data)
    vectors = [_embed(model, data) for model in models]
    matrix = np.full((len(vectors), len(vectors)), np.nan)
    for i, query_side in enumerate(vectors):
        for j in range(i + 1):
            matrix[i, j] = float(measure(query_side, vectors[j], data, metric, distance=distance))
    return matrix


def average_compatibility(matrix: ArrayLike, strict: bool = True) -> float:
    """Share of pairs i > j with ``C[i, j] > C[j, j]``; not strict: ``>=``. Needs two models."""
    c = _triangle(matrix, at_least=2)
    i, j = np.tril_indices(len(c), -1)
    level = c[j, j]
    return float((c[i, j] > level if strict else c[i, j] >= level).mean())


def average_multimodel_accuracy(matrix: ArrayLike) -> float:
    """Mean of the lower triangle with the diagonal; a true 0 counts."""
    c = _triangle(matrix, at_least=1)
    return float(c[np.tril_indices(len(c))].mean())


def forgetting(matrix: ArrayLike) -> NDArray[np.float64]:
    """``(T-1,)`` per gallery j: the best of ``C[l, j]``, j <= l < T, minus ``C[T, j]`` (T the last model). Adapted from
    continual learning. ``.mean()`` is the mean forgetting."""
    c = _triangle(matrix, at_least=2)
    return np.array([c[j:-1, j].max() - c[-1, j] for j in range(len(c) - 1)])


def backward_transfer(matrix: ArrayLike) -> float:
    """Mean over galleries j < T of ``C[T, j] - C[j, j]``."""
    c = _triangle(matrix, at_least=2)
    return float((c[-1, :-1] - np.diag(c)[:-1]).mean())


# ---------------------------------------------------------------------------------------------------------- inside


def _broadcast(*values: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    arrays = [np.asarray(m, np.float64) for m in values]
    try:
        return tuple(np.broadcast_arrays(*arrays))
    except ValueError:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise InputError(f"one value per data set is needed on each side; got shapes {shapes}.") from None


def _triangle(matrix: ArrayLike, at_least: int) -> NDArray[np.float64]:
    c = np.asarray(matrix, np.float64)
    if c.ndim != 2 or c.shape[0] != c.shape[1] or len(c) < at_least:
        raise InputError(f"needs a square matrix of at least {at_least} models; got {c.shape}.")
    if np.isnan(c[np.tril_indices(len(c))]).any():
        raise InputError("the lower triangle of the compatibility matrix holds NaN.")
    return c


def _data(data: RetrievalData | Relevance) -> RetrievalData:
    if isinstance(data, Relevance):
        return RetrievalData(data)
    if not isinstance(data, RetrievalData):
        raise InputError(f"needs RetrievalData, or a Relevance where models are Embeddings; got {type(data).__name__}.")
    return data


def _ranked(scores: NDArray[np.floating], data: RetrievalData) -> RankedList:
    """The rankings of the whole gallery, in the ids that the relevance speaks of."""
    if data.gallery_ids is None:
        last = max((int(ids.max()) for ids in data.relevance.positives if len(ids)), default=PAD_ID)
        if last >= scores.shape[1]:
            raise InputError(
                f"the relevance names position {last} of a gallery of {scores.shape[1]} items. It belongs to another "
                "gallery; or it speaks of ids: give them as RetrievalData(relevance, gallery_ids=...)."
            )
    return RankedList.from_scores(scores, ids=data.gallery_ids)


def _embed(model: Model, data: RetrievalData) -> Embeddings:
    if isinstance(model, Embeddings):
        return model
    if data.queries is None:
        raise InputError(
            "an encoder needs RetrievalData with queries; give models as Embeddings where vectors are ready."
        )
    queries = model(data.queries)
    if data.gallery is not None:
        return Embeddings(queries, model(data.gallery))
    if (data.relevance.self_ids == PAD_ID).all():
        raise InputError("the queries are their own gallery; build the relevance with exclude_self=True or with ids.")
    return Embeddings(queries, queries)


def _vectors(values: Any, name: str) -> NDArray[np.floating]:
    if hasattr(values, "detach"):  # a tensor, which may still want gradients, or be of a type that numpy has not
        values = values.detach()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if array.ndim != 2:
        raise InputError(f"{name} must have shape (n, D); got {array.shape}.")
    if not np.isfinite(array).all():
        raise InputError(f"{name} hold NaN or infinity, first in row {np.argwhere(~np.isfinite(array))[0][0]}.")
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _normalised(vectors: NDArray[np.floating], name: str) -> NDArray[np.floating]:
    zero = ~vectors.any(axis=1)
    if zero.any():
        raise InputError(f"row {np.flatnonzero(zero)[0]} of {name} is the zero vector; it has no cosine.")
    with np.errstate(over="ignore", under="ignore"):
        squares = (vectors**2).sum(axis=1)
    if not ((squares > np.finfo(vectors.dtype).tiny) & (squares < np.inf)).all():
        # squares of such entries leave the range of the type: a direction has no size
        vectors = vectors / np.abs(vectors).max(axis=1, keepdims=True)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return (1 + np.tanh(x / 2)) / 2
