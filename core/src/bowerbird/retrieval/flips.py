"""Flips: queries that one system answers and another does not.

The reference must be named by whoever reports a flip rate: ``vs_old`` (old queries on the old gallery) or ``vs_start``
(new queries on the old gallery, before any backfill).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bowerbird.errors import InputError
from bowerbird.retrieval.metrics import PAD_ID, PerQuery, checked_rank

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from bowerbird.retrieval.metrics import RankedList


@dataclass(frozen=True)
class Flips:
    """Flip rates of a system against its reference, over the queries valid in both.

    Attributes:
        nfr: Negative flip rate: share of queries right under the reference and wrong now.
        pfr: Positive flip rate. ``pfr - nfr`` is the change of accuracy.
        conditional: Negative flips per query that was right; NaN where none was.
        relative: ``nfr / (acc_ref (1 - acc_new))``: 1 = as many as if the errors of the two were independent; NaN
            where a factor is 0.
        acc_ref, acc_new: Accuracies.
        change: int8 ``(Q,)``: -1 negative flip, +1 positive flip, 0 same outcome or not counted.
        valid: bool ``(Q,)``: the queries that were counted.
    """

    nfr: float
    pfr: float
    conditional: float
    relative: float
    acc_ref: float
    acc_new: float
    change: NDArray[np.int8]
    valid: NDArray[np.bool_]


def flips(
    correct_ref: PerQuery | ArrayLike,
    correct_new: PerQuery | ArrayLike,
    *,
    query_ids_ref: ArrayLike | None = None,
    query_ids_new: ArrayLike | None = None,
) -> Flips:
    """Count flips between two systems.

    Args:
        correct_ref: ``(Q,)`` outcomes 0/1 of the reference system, for example ``cmc(ranked, rel, 1)``; NaN where a
            query is not valid.
        correct_new: ``(Q,)`` outcomes of the current system for the same queries in the same order.
        query_ids_ref, query_ids_new: Ids of the queries; where given, they must be equal.

    Raises:
        InputError: The query sets differ, an outcome is neither 0 nor 1, or no query is valid in both.
    """
    ref, valid_ref = _outcomes(correct_ref, "correct_ref")
    new, valid_new = _outcomes(correct_new, "correct_new")
    _same_queries(len(ref), len(new), query_ids_ref, query_ids_new)
    valid = valid_ref & valid_new
    n = int(valid.sum())
    if not n:
        raise InputError("no query is valid under both systems; there are no flips to count.")
    change = np.where(valid, new.astype(np.int8) - ref.astype(np.int8), 0).astype(np.int8)
    num_right = int((ref & valid).sum())
    acc_ref, acc_new = num_right / n, int((new & valid).sum()) / n
    negative = int((change < 0).sum())
    chance = acc_ref * (1 - acc_new)
    return Flips(
        nfr=negative / n,
        pfr=int((change > 0).sum()) / n,
        conditional=negative / num_right if num_right else float("nan"),
        relative=negative / n / chance if chance else float("nan"),
        acc_ref=acc_ref,
        acc_new=acc_new,
        change=change,
        valid=valid,
    )


@dataclass(frozen=True)
class APFlips:
    """``share`` of queries whose AP fell by more than eps, ``mean_drop`` of those (0 where none), ``drops`` (Q,): AP
    lost by each such query, 0 for the others, NaN where not valid."""

    share: float
    mean_drop: float
    drops: NDArray[np.float64]


def ap_flips(ap_ref: PerQuery | ArrayLike, ap_new: PerQuery | ArrayLike, eps: float = 0.01) -> APFlips:
    """Queries with ``ap_new < ap_ref - eps``.

    Raises:
        InputError: The query sets differ in size, no query is valid in both, or a negative ``eps``.
    """
    if not eps >= 0:
        raise InputError(f"eps must be at least 0; got {eps}.")
    ref, new = _values(ap_ref, "ap_ref"), _values(ap_new, "ap_new")
    _same_queries(len(ref), len(new), None, None)
    valid = ~np.isnan(ref) & ~np.isnan(new)
    if not valid.any():
        raise InputError("no query is valid under both systems; there are no flips to count.")
    fell = valid & (new < ref - eps)
    drops = np.where(fell, ref - new, np.where(valid, 0.0, np.nan))
    return APFlips(float(fell.sum() / valid.sum()), float(drops[fell].mean()) if fell.any() else 0.0, drops)


def churn(
    ids_ref: RankedList | ArrayLike, ids_new: RankedList | ArrayLike, k: int | None = None
) -> NDArray[np.float64]:
    """``(Q,)``: the share of the first k results that changed, ``1 - |both| / k``; order does not matter.

    Args:
        ids_ref, ids_new: Rankings ``(Q, K)``, best first, ``-1`` padded.
        k: Default: K. Where a gallery gives fewer than k results, their number takes the place of k.

    Raises:
        InputError: Different numbers of queries, or k beyond the rankings.
    """
    a, b = (np.asarray(getattr(ids, "ids", ids)) for ids in (ids_ref, ids_new))
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b):
        raise InputError(f"the two rankings must be (Q, K) with the same queries; got {a.shape} and {b.shape}.")
    k = min(a.shape[1], b.shape[1]) if k is None else checked_rank(k)
    if not 1 <= k <= min(a.shape[1], b.shape[1]):
        raise InputError(f"k must be in 1..{min(a.shape[1], b.shape[1])}, the length of the shorter ranking; got {k}.")
    a, b = a[:, :k], b[:, :k]
    real_a, real_b = a != PAD_ID, b != PAD_ID
    both = np.array([len(np.intersect1d(x[m], y[n])) for x, m, y, n in zip(a, real_a, b, real_b, strict=True)])
    size = np.maximum(real_a.sum(axis=1), real_b.sum(axis=1))
    return np.where(size > 0, 1 - both / np.maximum(size, 1), 0.0)


def _values(values: PerQuery | ArrayLike, name: str) -> NDArray[np.float64]:
    if isinstance(values, PerQuery):
        array = np.where(values.valid, values.values.T, np.nan).T
    else:
        array = np.asarray(values, np.float64)
    if array.ndim == 2 and array.shape[1] == 1:  # of one k
        array = array[:, 0]
    if array.ndim != 1:
        raise InputError(f"{name} must have shape (Q,), one value per query; got {array.shape}.")
    return array


def _outcomes(correct: PerQuery | ArrayLike, name: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    array = _values(correct, name)
    valid = ~np.isnan(array)
    if not np.isin(array[valid], (0, 1)).all():
        raise InputError(f"{name} must hold 0 and 1 only, right or wrong per query; got {array[valid][:5].tolist()}...")
    return valid & (array == 1), valid


def _same_queries(num_ref: int, num_new: int, ids_ref: ArrayLike | None, ids_new: ArrayLike | None) -> None:
    if num_ref != num_new:
        raise InputError(f"flips compare two systems on the same queries; got {num_ref} and {num_new} queries.")
    for ids in (ids_ref, ids_new):
        if ids is not None and np.shape(ids) != (num_ref,):
            raise InputError(f"there are {num_ref} queries; got query ids of shape {np.shape(ids)}.")
    if ids_ref is not None and ids_new is not None and not np.array_equal(np.asarray(ids_ref), np.asarray(ids_new)):
        raise InputError("flips compare two systems on the same queries; the query ids differ (or their order does).")
