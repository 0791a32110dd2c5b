"""Average precision of a gallery, estimated from a weighted sample of its items.

A smaller gallery is an easier one: with a tenth of the items, a tenth of the wrong ones stand before each right one,
and the average precision of a sample is far above that of its gallery wherever a query has few right answers. Here
every sampled item has a weight, the number of items that it stands for (1 / its probability to be drawn). For a sampled
right answer with A right and B wrong items of the gallery above it, ``precision = (1 + A) / (1 + A + B)``; average
precision is the mean of these, weighted by the right answers' weights, as in the inferred average precision of Yilmaz
and Aslam, "Estimating Average Precision with Incomplete and Imperfect Judgments" (CIKM 2006).

A and B are estimated. Counting the weights above is unbiased, but says 0 where no wrong item of the *sample* is above
although some of the gallery are, and ``1 / (1 + B)`` punishes that: with 5 right answers among 20,000 items a sample of
1,000 gave 0.58 for 0.41. So the count is combined with a prior (empirical Bayes): distances of wrong items are
standardised per query and pooled over the queries, which resolves the near tail far below one item of a query's
sample. The number of sampled wrong items above is Poisson with a rate that is gamma distributed around the pooled one;
its shape ``alpha``, how much queries differ, is estimated from the sample by moments. The unsampled ones then are
negative binomial, and the expectation of the precision is an integral over [0, 1] in closed form. Where many sampled
items are above, the count decides. Where right and wrong items were drawn alike (a few large classes) the errors of A
and B cancel in the ratio, and the counts are used as they are; with all weights 1 that is the average precision itself.

Q queries, N sampled items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bowerbird.gallery.merge import unit_spread

TAIL = 3.0  # sampled items above, up to which alpha is estimated: where the prior has a say
MANY = 40.0  # items above, from which the expectation is that of the ratio of expectations
UNEVEN = 2.0  # the prior is used where wrong items stand for so many times more items than right ones
POOL = 40_000  # standardised distances that are pooled at most
_X, _W = np.polynomial.legendre.leggauss(16)
_X, _W = (_X + 1) / 2, _W / 2


def average_precision_of_sample(
    keys: NDArray[np.floating],
    order: NDArray[np.int64],
    right: NDArray[np.bool_],
    own: NDArray[np.bool_],
    weights: NDArray[np.float64],
    *,
    depth: int | None = None,
) -> NDArray[np.float64]:
    """Float64 ``(Q,)``, the estimated average precision of each query; 0 where it has no right answer in the sample.

    Args:
        keys: ``(Q, N)``, smaller = nearer; any scale that is comparable within a query.
        order: ``(Q, N)``, the items' positions by key, ties settled.
        right: ``(Q, N)``, the item is a right answer.
        own: ``(Q, N)``, the item is the query and does not count.
        weights: ``(N,)``, at least 1.
        depth: Only right answers up to this rank count, and at most so many are expected (mAP@depth).
    """
    # Everything below is by rank: column j of a row is the item that stands at rank j.
    right = np.take_along_axis(right, order, axis=1)
    each = np.asarray(weights, np.float64)[order]
    if own.any():
        own = np.take_along_axis(own, order, axis=1)
        each[own] = 0.0
        wrong = ~(right | own)
    else:
        wrong = ~right
    query, rank = np.nonzero(right)
    weight = each[query, rank]
    of_right = np.where(right, each, 0.0)
    upto = np.cumsum(each, axis=1)[query, rank] - weight
    a = np.cumsum(of_right, axis=1)[query, rank] - weight
    b = np.maximum(upto - a, 0.0)
    counted = (1 + a) / (1 + a + b)
    of_wrong = each - of_right
    rarer = _items_per_sampled(of_wrong) > UNEVEN * _items_per_sampled(of_right)
    if rarer.any():
        seen_right = np.cumsum(right, axis=1, dtype=np.int32)[query, rank].astype(np.float64) - 1
        seen_wrong = np.cumsum(wrong, axis=1, dtype=np.int32)[query, rank].astype(np.float64)
        ranked = np.take_along_axis(np.asarray(keys, np.float64), order, axis=1)
        standard = _standardised(ranked, of_wrong)
        at = standard[query, rank]
        a, _, _ = _posterior(a, seen_right, at, standard, right, of_right, query, but=1)
        b, shape, scale = _posterior(b, seen_wrong, at, standard, wrong, of_wrong, query)
        precision = (1 + a) / (1 + a + b)
        few = np.flatnonzero((a + seen_wrong < MANY) & rarer[query])
        # E[1 / (c + X)] = integral of x^(c-1) E[x^X]; X is negative binomial: E[x^X] = (1 + scale (1 - x))^-shape.
        power = _X ** (a + seen_wrong)[few, None]
        spread = (1 + scale[few, None] * (1 - _X)) ** -shape[few, None]
        precision[few] = (1 + a[few]) * ((power * spread) @ _W)
        precision = np.where(rarer[query], precision, counted)
    else:
        precision = counted
    expected = np.bincount(query, weight, len(keys))
    if depth is not None:
        stand_for = np.maximum(weight, 1)
        precision = precision * np.clip(depth - (a + b), 0, stand_for) / stand_for
        expected = np.minimum(expected, depth)
    total = np.bincount(query, weight * precision, len(keys))
    return total / np.where(expected > 0, expected, 1.0)


def _standardised(keys: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys minus their weighted mean over their weighted deviation, by query."""
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    mean = np.einsum("qn,qn->q", weights, keys)[:, None] / total
    centred = keys - mean
    spread = np.sqrt(np.einsum("qn,qn,qn->q", weights, centred, centred)[:, None] / total)
    centred /= unit_spread(spread)
    return centred


def _posterior(
    counted: NDArray[np.float64],
    seen: NDArray[np.float64],
    at: NDArray[np.float64],
    standard: NDArray[np.float64],
    kind: NDArray[np.bool_],
    of_kind: NDArray[np.float64],
    query: NDArray[np.int64],
    *,
    but: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """For each right answer: ``(expected items of this kind above it, shape, scale of the unsampled ones)``.

    Args:
        counted: Weights above.
        seen: Sampled items above.
        at: Its standardised key.
        kind: ``(Q, N)``, which items are counted, and
        of_kind: their weights; 0 elsewhere.
        but: Items of this kind that are not above it for certain (itself).
    """
    totals = of_kind.sum(axis=1)
    size = _items_per_sampled(of_kind)[query]
    places = np.flatnonzero(kind)
    if len(places) > POOL:
        # By chance: rows are sorted, and every n-th place could be the same rank in all of them.
        places = places[np.random.default_rng(0).integers(len(places), size=POOL)]
    pooled = standard.ravel()[places]
    mass = of_kind.ravel()[places] / np.maximum(totals, 1e-12)[places // kind.shape[1]]
    by_key = np.argsort(pooled)
    upto = np.concatenate([[0.0], np.cumsum(mass[by_key])]) / max(mass.sum(), 1e-12)
    rate = upto[np.searchsorted(pooled[by_key], at)] * np.maximum(totals[query] - but, 0) / size
    observed = counted / size
    alpha = _alpha(observed, rate)
    shape, scale = alpha + observed, (size - 1) / (1 + alpha / np.maximum(rate, 1e-12))
    return np.where(size > 1 + 1e-9, seen + shape * scale, counted), shape, scale


def _items_per_sampled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(Q,)``: the weight of the item that a gallery's item stands behind, on average; at least 1."""
    squares = np.einsum("qn,qn->q", weights, weights)
    return np.maximum(squares / np.maximum(weights.sum(axis=1), 1e-12), 1.0)


def _alpha(observed: NDArray[np.float64], rate: NDArray[np.float64]) -> float:
    """Shape of the gamma by moments: ``Var = rate + rate^2 / alpha``. Small: queries differ, the prior says little."""
    tail = rate < TAIL
    if tail.sum() < 20:
        return 1.0
    observed, rate = observed[tail], rate[tail]
    excess = ((observed - rate) ** 2 - rate).sum()
    return float(np.clip((rate**2).sum() / max(excess, 1e-9), 0.05, 50))
