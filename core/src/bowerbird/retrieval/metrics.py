"""Ranking metrics, with every choice that papers leave silent made a switch. See docs/methods/upgrade-evaluation.md.

A metric takes a ranking (``RankedList``) and what counts as right (``Relevance``) and returns one value per query
(``PerQuery``). Before ranks are counted, items are excluded in this order: the query item itself (by id), then the
query's ignored items (junk). Everything else stays; items that no query asks for can only push positives down.

Q queries, K ranked items, N gallery items. Pure functions on numpy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError, did_you_mean
from bowerbird.retrieval.ranking import PAD_ID, RankedList, Relevance, ragged

if TYPE_CHECKING:
    from numpy.typing import NDArray

AP_KINDS = ("ap", "ties", "at_k", "trapezoid", "at_r")
TIES = ("stable", "pessimistic", "optimistic")
NO_POSITIVE = ("exclude", "zero", "raise")
WIDE = 256  # rows longer than this are looked up one by one, 7 times faster at 2,000 ids and 20 times at 16,000

__all__ = [
    "AP_KINDS", "NO_POSITIVE", "PAD_ID", "TIES", "PerQuery", "RankedList", "Relevance", "Revisited",
    "average_precision", "cmc", "precision", "recall_all", "revisited_precision", "revisited_protocol",
    "revisited_relevance",
]  # fmt: skip


@dataclass(frozen=True)
class PerQuery:
    """One value per query.

    Attributes:
        values: ``(Q,)``, or ``(Q, len(ks))``; NaN where the query is not valid.
        valid: bool ``(Q,)``; means are over these queries.
    """

    values: NDArray[np.float64]
    valid: NDArray[np.bool_]

    @property
    def num_valid(self) -> int:
        return int(self.valid.sum())

    def mean(self) -> Any:
        """Mean over the valid queries: a float, or an array with one entry per k."""
        mean = self.values[self.valid].mean(axis=0)
        return float(mean) if mean.ndim == 0 else mean

    def __float__(self) -> float:
        mean = np.asarray(self.mean())
        if mean.size != 1:
            raise InputError(f"there are values for {mean.size} ranks k; one number needs a single k.")
        return float(mean.item())


# ------------------------------------------------------------------------------------------------------ metrics


def cmc(
    ranked: RankedList,
    rel: Relevance,
    ks: int | Sequence[int] = (1, 5, 10),
    *,
    form: str = "first",
    tie: str = "stable",
    no_positive: str = "exclude",
) -> PerQuery:
    """Cumulative match characteristic; CMC@k = R@k: is a positive among the first k?

    Args:
        ranked, rel: The rankings and what is right.
        ks: Ranks; one integer gives values ``(Q,)``, a sequence ``(Q, len(ks))``.
        form: ``first`` (first match), or ``all`` as in old re-identification code: the j-th positive (from 0) at
            0-based rank r adds 1 / n at rank r - j. For comparison only.
        tie: Order of equal scores: ``stable`` (as ranked), ``pessimistic`` (wrong items first), ``optimistic``.
        no_positive: A query without positives is left out (``exclude``), counts 0 (``zero``), or is refused
            (``raise``).

    Raises:
        InputError: No valid query, or a bad switch.
    """
    judged = _judge(ranked, rel, tie)
    if form == "first":
        # A positive that a truncated ranking does not show is missed at every k, also at one beyond the ranking's end.
        return _at_ranks(ks, lambda k: judged.found(k) > 0, judged, no_positive)
    if form == "all":
        column = np.arange(judged.relevant.shape[1])
        place = column - (np.cumsum(judged.relevant, axis=1) - 1)  # r - j at the positives
        share = judged.relevant / np.maximum(judged.num_relevant, 1)[:, None]
        return _at_ranks(ks, lambda k: (share * (place < k)).sum(axis=1), judged, no_positive)
    raise InputError(f"form must be first or all; got {form!r}.")


def precision(
    ranked: RankedList,
    rel: Relevance,
    ks: int | Sequence[int] = (1, 5, 10),
    *,
    tie: str = "stable",
    no_positive: str = "exclude",
) -> PerQuery:
    """Precision@k: positives among the first k, divided by k."""
    judged = _judge(ranked, rel, tie)
    return _at_ranks(ks, lambda k: judged.found(k) / k, judged, no_positive)


def recall_all(
    ranked: RankedList,
    rel: Relevance,
    ks: int | Sequence[int] = (1, 5, 10),
    *,
    tie: str = "stable",
    no_positive: str = "exclude",
) -> PerQuery:
    """recall_all@k: the share of all positives that is among the first k. Not what this family calls R@k (``cmc``)."""
    judged = _judge(ranked, rel, tie)
    n = np.maximum(judged.num_relevant, 1)
    return _at_ranks(ks, lambda k: judged.found(k) / n, judged, no_positive)


def revisited_precision(
    ranked: RankedList,
    rel: Relevance,
    ks: int | Sequence[int] = (1, 5, 10),
    *,
    tie: str = "stable",
    no_positive: str = "exclude",
) -> PerQuery:
    """mP@k of revisited Oxford and Paris: positives among the first kq, divided by kq = min(k, rank of the last
    positive)."""
    judged = _judge(ranked, rel, tie)
    width = judged.relevant.shape[1]
    last = (judged.relevant * np.arange(1, width + 1)).max(axis=1, initial=0)

    # no positive stands behind the last one: those among the first kq are those among the first k
    def at(k: int) -> NDArray[np.float64]:
        return judged.found(k) / np.maximum(np.minimum(k, last), 1)

    return _at_ranks(ks, at, judged, no_positive)


def average_precision(
    ranked: RankedList,
    rel: Relevance,
    kind: str = "ap",
    k: int | None = None,
    *,
    tie: str = "stable",
    no_positive: str = "exclude",
) -> PerQuery:
    """Average precision of each query, in one of the five published forms. ``.mean()`` is the mAP.

    With ranks r_1 < r_2 < ... of the n positives (1-based, after exclusions; a positive that is not ranked adds
    nothing):

    - ``ap``: ``1/n sum_j j / r_j`` (Market-1501 script)
    - ``ties``: sum over distinct scores of (step of recall) x precision (openBCT, BT-2, FCT)
    - ``at_k``: ``1/min(n, k) sum_{r_j <= k} j / r_j`` (GLDv2 with k = 100, OpenCompatible)
    - ``trapezoid``: ``1/n sum_j ((j-1)/(r_j - 1) + j/r_j) / 2``, first term 1 if ``r_j = 1`` (revisited Oxford and
      Paris)
    - ``at_r``: ``1/n sum_{r_j <= n} j / r_j`` (MAP@R)

    Args:
        ranked, rel: The rankings and what is right.
        kind: See above; the names with ``ap_`` in front are accepted too.
        k: Of ``at_k``; default 100.
        tie: As in ``cmc``. ``ties`` does not depend on it.
        no_positive: As in ``cmc``.

    Raises:
        InputError: No valid query, or a bad switch.
    """
    kind = kind if kind == "ap" else str(kind).removeprefix("ap_")
    if kind not in AP_KINDS:
        raise InputError(
            f"no average precision {kind!r}; accepted: {', '.join(AP_KINDS)}.{did_you_mean(kind, AP_KINDS)}"
        )
    if k is not None and kind != "at_k":
        raise InputError(f"k belongs to average precision at_k; got k={k} for {kind!r}.")
    k = checked_rank(100 if k is None else k)
    judged = _judge(ranked, rel, tie)
    hit, n = judged.relevant, np.maximum(judged.num_relevant, 1).astype(np.float64)
    rank = np.arange(1, hit.shape[1] + 1)
    found = np.cumsum(hit, axis=1)
    at_rank = found / rank
    if kind == "ties":
        end = _group_ends(judged)
        at_rank = np.take_along_axis(at_rank, end, axis=1)
    elif kind == "trapezoid":
        before = np.where(rank == 1, 1.0, (found - 1) / np.maximum(rank - 1, 1))
        at_rank = (before + at_rank) / 2
    elif kind == "at_k":
        hit, n = hit & (rank <= k), np.minimum(n, k)
    elif kind == "at_r":
        hit = hit & (rank <= n[:, None])
    return _per_query((hit * at_rank).sum(axis=1) / n, judged, no_positive)


@dataclass(frozen=True)
class Revisited:
    """``ap``: trapezoid average precision; ``precision``: mP@k, ``(Q, len(ks))``."""

    ap: PerQuery
    precision: PerQuery


def revisited_protocol(
    ranked: RankedList,
    easy: Any,
    hard: Any,
    junk: Any = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Revisited]:
    """Revisited Oxford and Paris: set-ups ``easy``, ``medium``, ``hard``. Give full rankings.

    Args:
        ranked: Rankings of the whole gallery.
        easy, hard, junk: Per query ids, as ``Relevance.positives``.
        ks: Ranks of mP@k.

    Returns:
        Per set-up: ``easy`` (positives easy, ignored junk and hard), ``medium`` (positives easy and hard, ignored
        junk) and ``hard`` (positives hard, ignored junk and easy). A query without positives in a set-up is not valid
        there (NaN).
    """
    return {
        name: Revisited(average_precision(ranked, rel, "trapezoid"), revisited_precision(ranked, rel, ks))
        for name, rel in revisited_relevance(easy, hard, junk).items()
    }


def revisited_relevance(easy: Any, hard: Any, junk: Any = None) -> dict[str, Relevance]:
    """What is right and what is ignored in ``easy``, ``medium`` and ``hard``; see ``revisited_protocol``."""
    easy, hard = ragged(easy, "easy"), ragged(hard, "hard")
    junk = ragged([[]] * len(easy) if junk is None else junk, "junk")
    if not len(easy) == len(hard) == len(junk):
        raise InputError(
            f"easy, hard and junk must have one entry per query; got {len(easy)}, {len(hard)}, {len(junk)}."
        )

    def union(*lists: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        return [np.concatenate(arrays) for arrays in zip(*lists, strict=True)]

    return {
        "easy": Relevance(easy, union(junk, hard)),
        "medium": Relevance(union(easy, hard), junk),
        "hard": Relevance(hard, union(junk, easy)),
    }


# ------------------------------------------------------------------------------------------------------- inside


@dataclass(frozen=True)
class _Judged:
    """Rankings after exclusions, moved to the left: is the item at this rank relevant, and its score."""

    relevant: NDArray[np.bool_]  # (Q, K), False behind the end of a row
    scores: NDArray[np.floating]  # (Q, K)
    num_ranked: NDArray[np.int64]  # (Q,) length of each row
    num_relevant: NDArray[np.int64]  # (Q,) n, ranked or not

    def found(self, k: int) -> NDArray[np.int64]:
        """``(Q,)``: relevant items among the first k."""
        return self.relevant[:, :k].sum(axis=1)


def _judge(ranked: RankedList, rel: Relevance, tie: str) -> _Judged:
    if tie not in TIES:
        raise InputError(f"tie must be one of {', '.join(TIES)}; got {tie!r}.{did_you_mean(str(tie), TIES)}")
    if not isinstance(ranked, RankedList) or not isinstance(rel, Relevance):
        raise InputError(
            f"a metric takes a RankedList and a Relevance; got {type(ranked).__name__} and {type(rel).__name__}. "
            "See RankedList.from_scores and Relevance.from_labels."
        )
    if len(ranked) != len(rel):
        raise InputError(f"the ranking has {len(ranked)} queries, the relevance {len(rel)}.")
    removed = [np.append(ignored, own) for ignored, own in zip(rel.ignore, rel.self_ids, strict=True)]
    wanted = [np.setdiff1d(p, r) for p, r in zip(rel.positives, removed, strict=True)]  # distinct, without the excluded
    relevant = _member(ranked.ids, wanted)
    keep = (ranked.ids != PAD_ID) & ~_member(ranked.ids, removed)
    scores = ranked.scores
    if not keep.all():
        order = np.argsort(~keep, axis=1, kind="stable")
        relevant = np.take_along_axis(relevant & keep, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
    num_ranked = keep.sum(axis=1)
    num_relevant = np.array([len(w) for w in wanted], np.int64)
    judged = _Judged(relevant, scores, num_ranked, num_relevant)
    if tie == "stable" or not relevant.shape[1]:
        return judged
    group = _group_ends(judged)  # equal within a tie, increasing along the row
    first = relevant if tie == "pessimistic" else ~relevant
    order = np.argsort(2 * group + first, axis=1, kind="stable")
    return _Judged(np.take_along_axis(relevant, order, axis=1), scores, num_ranked, num_relevant)


def _group_ends(judged: _Judged) -> NDArray[np.int64]:
    """``(Q, K)``: the last column that has the same score as this one."""
    q, width = judged.relevant.shape
    column = np.broadcast_to(np.arange(width), (q, width))
    is_end = np.ones((q, width), bool)
    is_end[:, :-1] = judged.scores[:, 1:] != judged.scores[:, :-1]
    is_end |= column >= judged.num_ranked[:, None] - 1
    return np.minimum.accumulate(np.where(is_end, column, width)[:, ::-1], axis=1)[:, ::-1]


def _per_query(values: NDArray[np.floating], judged: _Judged, no_positive: str) -> PerQuery:
    if no_positive not in NO_POSITIVE:
        raise InputError(f"no_positive must be one of {', '.join(NO_POSITIVE)}; got {no_positive!r}.")
    empty = judged.num_relevant == 0
    if no_positive == "raise" and empty.any():
        raise InputError(
            f"{empty.sum()} of {len(empty)} queries have no positive, first query {np.flatnonzero(empty)[0]}."
        )
    values = np.array(values, np.float64)
    valid = np.ones(len(empty), bool)
    if no_positive == "zero":
        values[empty] = 0.0
    else:
        values[empty] = np.nan
        valid = ~empty
    if not valid.any():
        raise InputError(
            f"none of the {len(empty)} queries has a positive in the gallery after exclusions; nothing can be "
            "measured. Check that labels or ids of queries and gallery speak of the same things."
        )
    return PerQuery(values.astype(np.float64), valid)


def _at_ranks(
    ks: int | Sequence[int], value_at: Callable[[int], NDArray[Any]], judged: _Judged, no_positive: str
) -> PerQuery:
    single = np.ndim(ks) == 0
    values = [value_at(checked_rank(k)) for k in np.atleast_1d(np.asarray(ks)).tolist()]
    if not values:
        raise InputError("ks must name at least one rank.")
    return _per_query(values[0] if single else np.stack(values, axis=1), judged, no_positive)


def checked_rank(k: Any) -> int:
    """``k`` as an integer of at least 1. Raises ``InputError`` for anything else."""
    try:
        rank = int(k)
    except (TypeError, ValueError, OverflowError):
        rank = 0
    if rank != k or rank < 1:
        raise InputError(f"a rank k must be an integer of at least 1; got {k!r}.")
    return rank


def _member(ids: NDArray[np.int64], sets: list[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """``(Q, K)``: is ``ids[q, i]`` in ``sets[q]``?"""
    sizes = [len(s) for s in sets]
    if not sum(sizes):
        return np.zeros(ids.shape, bool)
    if ids.shape[1] > WIDE:
        return np.stack(
            [np.isin(row, s) if len(s) else np.zeros(len(row), bool) for row, s in zip(ids, sets, strict=True)]
        )
    # short rows: all at once, since a call of numpy for each would cost more than what it does
    flat = np.concatenate(sets)
    known, code = np.unique(flat, return_inverse=True)
    keys = np.sort(np.repeat(np.arange(len(sets)), sizes) * len(known) + code)
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    wanted = np.arange(len(sets))[:, None] * len(known) + place
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return (known[place] == ids) & (keys[at] == wanted)
