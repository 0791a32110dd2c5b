"""Ranking metrics, with every choice that papers leave silent made a switch. See docs/methods/upgrade-evaluation.md.

A metric takes a ranking (``RankedList``) and what counts as right (``Relevance``) and returns one value per query
(``PerQuery``). Before ranks are counted, items are excluded in this order: the query item itself (by id), then the
query's ignored items (junk). Everything else stays; items that no query asks for can only push positives down.

Q queries, K ranked items, N gallery items. Pure functions on numpy arrays; CPU torch tensors are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from bowerbird.retrieval.index import Hits

PAD_ID = -1
AP_KINDS = ("ap", "ties", "at_k", "trapezoid", "at_r")
TIES = ("stable", "pessimistic", "optimistic")
NO_POSITIVE = ("exclude", "zero", "raise")


# ------------------------------------------------------------------------------------------------ data objects


@dataclass(frozen=True)
class RankedList:
    """The ranking of each query, best first.

    Attributes:
        ids: int64 ``(Q, K)`` gallery ids; ``-1`` pads rows that are shorter. Ids of a row are distinct.
        scores: ``(Q, K)``, larger = better, non-increasing along a row (the negative of a distance is a score).
            ``None``: the order alone is known, no two items are tied.

    Raises:
        InputError: Wrong shapes, NaN scores, scores that increase along a row, an id twice in a row.
    """

    ids: NDArray[np.int64]
    scores: Any = None

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"ids must be integers of shape (Q, K); got shape {ids.shape} of {ids.dtype}.")
        ids = ids.astype(np.int64)
        padded = ids == PAD_ID
        if self.scores is None:
            scores = np.broadcast_to(-np.arange(ids.shape[1], dtype=np.float64), ids.shape)
        else:
            scores = np.asarray(self.scores)
            if scores.shape != ids.shape:
                raise InputError(f"scores must have the shape of ids {ids.shape}; got {scores.shape}.")
            if np.isnan(scores[~padded]).any():
                raise InputError(f"scores hold NaN, first in query {np.argwhere(np.isnan(scores) & ~padded)[0][0]}.")
            rising = (scores[:, 1:] > scores[:, :-1]) & ~padded[:, 1:]
            if rising.any():
                query = int(np.argwhere(rising)[0][0])
                raise InputError(
                    f"scores of query {query} increase along the ranking. Larger means better: give RankedList its "
                    "best item first, or let RankedList.from_scores sort (for distances: from_distances)."
                )
        ordered = np.sort(ids, axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PAD_ID)
        if repeated.any():
            query, column = np.argwhere(repeated)[0]
            raise InputError(f"id {ordered[query, column]} is ranked twice for query {query}.")
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "scores", scores)

    @classmethod
    def from_scores(cls, scores: ArrayLike, *, ids: ArrayLike | None = None, k: int | None = None) -> Self:
        """Sort a score matrix: by score, largest first, and by gallery index where scores are equal.

        Args:
            scores: ``(Q, N)``, float32 or float64 (kept).
            ids: ``(N,)`` ids of the gallery items; default: their positions.
            k: Keep the first k only.
        """
        matrix = np.asarray(scores)
        if matrix.ndim != 2:
            raise InputError(f"scores must have shape (Q, N); got {matrix.shape}.")
        if np.isnan(matrix).any():
            raise InputError(f"scores hold NaN, first in query {np.argwhere(np.isnan(matrix))[0][0]}.")
        if not np.issubdtype(matrix.dtype, np.floating):
            matrix = matrix.astype(np.float64)
        gallery = np.arange(matrix.shape[1]) if ids is None else np.asarray(ids)
        if gallery.shape != matrix.shape[1:]:
            raise InputError(
                f"ids must have one entry per gallery item ({matrix.shape[1]}); got shape {gallery.shape}."
            )
        order = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
        return cls(gallery[order], np.take_along_axis(matrix, order, axis=1))

    @classmethod
    def from_distances(cls, distances: ArrayLike, *, ids: ArrayLike | None = None, k: int | None = None) -> Self:
        """``from_scores`` of the negative distances."""
        return cls.from_scores(-np.asarray(distances), ids=ids, k=k)

    @classmethod
    def from_hits(cls, hits: Hits) -> Self:
        """The ranking that a search returned."""
        return cls(np.atleast_2d(hits.ids), -np.atleast_2d(hits.distances))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Relevance:
    """What is right for each query, in gallery ids.

    Attributes:
        positives: Per query the ids that count as right: a sequence of Q sequences, or an integer array ``(Q, P)``
            padded with ``-1``. Positives outside a truncated ranking still count as missed.
        ignore: Likewise, the ids that are taken out of the ranking before ranks are counted; default: none.
        self_ids: ``(Q,)`` the id of the query item in the gallery, ``-1`` where it is not there; default: nowhere.
    """

    positives: Any
    ignore: Any = None
    self_ids: Any = None

    def __post_init__(self) -> None:
        positives = _ragged(self.positives, "positives")
        q = len(positives)
        ignore = _ragged([[]] * q if self.ignore is None else self.ignore, "ignore")
        self_ids = np.full(q, PAD_ID, np.int64) if self.self_ids is None else np.asarray(self.self_ids, np.int64)
        if len(ignore) != q or self_ids.shape != (q,):
            raise InputError(
                f"positives has {q} queries, ignore has {len(ignore)} and self_ids has shape {self_ids.shape}; "
                "they must have one entry per query."
            )
        object.__setattr__(self, "positives", positives)
        object.__setattr__(self, "ignore", ignore)
        object.__setattr__(self, "self_ids", self_ids)

    def __len__(self) -> int:
        return len(self.positives)

    @classmethod
    def from_labels(
        cls,
        query_labels: ArrayLike,
        gallery_labels: ArrayLike,
        *,
        query_ids: ArrayLike | None = None,
        gallery_ids: ArrayLike | None = None,
        query_cams: ArrayLike | None = None,
        gallery_cams: ArrayLike | None = None,
        exclude_self: bool = False,
    ) -> Self:
        """Same label = positive.

        Args:
            query_labels: ``(Q,)`` integers or strings. Floats are refused: large class numbers would collide.
            gallery_labels: ``(N,)``; ``-1`` marks distractors, which are never right.
            query_ids, gallery_ids: Item ids, both or neither; a gallery item with the query's id is the query itself
                and is excluded. Integer gallery ids are also the ids that rankings use; with strings, or without ids,
                rankings use positions in the gallery.
            query_cams, gallery_cams: Cameras, both or neither; gallery items with the query's label *and* camera are
                ignored (Market-1501).
            exclude_self: The gallery is the query set, in the same order: item i is removed for query i.
        """
        queries, gallery = _labels(query_labels, "query_labels"), _labels(gallery_labels, "gallery_labels")
        positions = np.arange(len(gallery))
        ranked_ids, self_ids = positions, None
        if (query_ids is None) != (gallery_ids is None):
            raise InputError("query_ids and gallery_ids must be given together.")
        if query_ids is not None:
            mine, theirs = np.asarray(query_ids), np.asarray(gallery_ids)
            if mine.shape != queries.shape or theirs.shape != gallery.shape:
                raise InputError(
                    f"ids have shapes {mine.shape} and {theirs.shape}; labels {queries.shape}, {gallery.shape}."
                )
            if len(np.unique(theirs)) != len(theirs):
                raise InputError("gallery_ids must be unique.")
            if np.issubdtype(theirs.dtype, np.integer):
                ranked_ids = theirs.astype(np.int64)
            self_ids = _find(mine, theirs, ranked_ids)
        if exclude_self:
            if len(queries) != len(gallery):
                raise InputError(
                    f"exclude_self needs the gallery to be the query set; got {len(queries)} and {len(gallery)} items."
                )
            self_ids = ranked_ids
        if (query_cams is None) != (gallery_cams is None):
            raise InputError("query_cams and gallery_cams must be given together.")

        known, group = np.unique(gallery, return_inverse=True)
        members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group, minlength=len(known)))[:-1])
        place = np.minimum(np.searchsorted(known, queries), max(len(known) - 1, 0))
        nothing = np.empty(0, np.int64)
        same = [
            members[p] if len(known) and known[p] == label and label != PAD_ID else nothing
            for p, label in zip(place, queries, strict=True)
        ]
        ignore = None
        if query_cams is not None:
            cams = np.asarray(gallery_cams)
            ignore = [ranked_ids[m[cams[m] == c]] for m, c in zip(same, np.asarray(query_cams), strict=True)]
        return cls([ranked_ids[m] for m in same], ignore, self_ids)


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
        return _at_ranks(ks, lambda k: judged.relevant[:, :k].any(axis=1), judged, no_positive)
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
    return _at_ranks(ks, lambda k: judged.relevant[:, :k].sum(axis=1) / k, judged, no_positive)


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
    return _at_ranks(ks, lambda k: judged.relevant[:, :k].sum(axis=1) / n, judged, no_positive)


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
    last = np.where(judged.relevant.any(axis=1), width - judged.relevant[:, ::-1].argmax(axis=1), 0)
    found = np.concatenate([np.zeros((len(last), 1)), np.cumsum(judged.relevant, axis=1)], axis=1)

    def at(k: int) -> NDArray[np.float64]:
        cut = np.minimum(k, last)
        return found[np.arange(len(cut)), cut] / np.maximum(cut, 1)

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
    kind = kind if kind == "ap" else kind.removeprefix("ap_")
    if kind not in AP_KINDS:
        raise InputError(
            f"no average precision {kind!r}; accepted: {', '.join(AP_KINDS)}.{did_you_mean(kind, AP_KINDS)}"
        )
    if k is not None and kind != "at_k":
        raise InputError(f"k belongs to average precision at_k; got k={k} for {kind!r}.")
    k = _rank(100 if k is None else k)
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
    easy, hard = _ragged(easy, "easy"), _ragged(hard, "hard")
    junk = _ragged([[]] * len(easy) if junk is None else junk, "junk")
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


def _judge(ranked: RankedList, rel: Relevance, tie: str) -> _Judged:
    if tie not in TIES:
        raise InputError(f"tie must be one of {', '.join(TIES)}; got {tie!r}.{did_you_mean(str(tie), TIES)}")
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


def _at_ranks(ks: int | Sequence[int], value_at: Any, judged: _Judged, no_positive: str) -> PerQuery:
    single = np.ndim(ks) == 0
    values = [value_at(_rank(k)) for k in np.atleast_1d(np.asarray(ks)).tolist()]
    if not values:
        raise InputError("ks must name at least one rank.")
    return _per_query(values[0] if single else np.stack(values, axis=1), judged, no_positive)


def _rank(k: Any) -> int:
    if int(k) != k or k < 1:
        raise InputError(f"a rank k must be an integer of at least 1; got {k!r}.")
    return int(k)


def _member(ids: NDArray[np.int64], sets: list[NDArray[np.int64]]) -> NDArray[np.bool_]:
    """``(Q, K)``: is ``ids[q, i]`` in ``sets[q]``?"""
    sizes = [len(s) for s in sets]
    if not sum(sizes):
        return np.zeros(ids.shape, bool)
    flat = np.concatenate(sets)
    known, code = np.unique(flat, return_inverse=True)
    keys = np.sort(np.repeat(np.arange(len(sets)), sizes) * len(known) + code)
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    wanted = np.arange(len(sets))[:, None] * len(known) + place
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return (known[place] == ids) & (keys[at] == wanted)


def _ragged(values: Any, name: str) -> list[NDArray[np.int64]]:
    """Q int64 arrays without the padding ``-1``."""
    rows: Iterable[Any] = values
    if not isinstance(values, (list, tuple)):
        array = np.asarray(values)
        if array.ndim != 2 and not (array.ndim == 1 and array.dtype == object):  # object: one array per query
            raise InputError(
                f"{name} must be one sequence of ids per query, or an array (Q, P); got shape {array.shape}."
            )
        rows = array
    result = []
    for row in rows:
        array = np.asarray(sorted(row) if isinstance(row, (set, frozenset)) else row)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise InputError(f"{name} must be integer ids, one sequence per query; got {row!r}.")
        array = array.astype(np.int64)
        result.append(array[array != PAD_ID])
    return result


def _labels(values: ArrayLike, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1 or np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} must be a list of integers or strings; got shape {array.shape} of {array.dtype}.")
    return array


def _find(wanted: NDArray[Any], known: NDArray[Any], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of ``wanted`` the entry of ``ids`` at its place in ``known``, ``-1`` where it is not there."""
    if not len(known):
        return np.full(len(wanted), PAD_ID, np.int64)
    order = np.argsort(known, kind="stable")
    place = order[np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)]
    return np.where(known[place] == wanted, ids[place], PAD_ID)
