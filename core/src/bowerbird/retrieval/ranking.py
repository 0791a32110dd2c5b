"""A ranking and what is right in it: the two arguments of every metric.

Q queries, K ranked items, N gallery items. numpy arrays; CPU torch tensors are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from bowerbird.retrieval.index import Hits

PAD_ID = -1


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
            k: Keep the first k only, at least 1.
        """
        if k is not None and k < 1:
            raise InputError(f"k must be at least 1; got {k}.")
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
        if (gallery == PAD_ID).any():
            raise InputError(f"{PAD_ID} is no id of a gallery item: it pads rankings.")
        order = np.argsort(-matrix, axis=1, kind="stable")[:, :k]
        return cls(gallery[order], np.take_along_axis(matrix, order, axis=1))

    @classmethod
    def from_distances(cls, distances: ArrayLike, *, ids: ArrayLike | None = None, k: int | None = None) -> Self:
        """``from_scores`` of the negative distances."""
        matrix = np.asarray(distances)
        # the negative of an unsigned integer is a large one
        signed = matrix if np.issubdtype(matrix.dtype, np.floating) else matrix.astype(np.float64)
        return cls.from_scores(-signed, ids=ids, k=k)

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
        positives = ragged(self.positives, "positives")
        q = len(positives)
        ignore = ragged([[]] * q if self.ignore is None else self.ignore, "ignore")
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
            if np.issubdtype(theirs.dtype, np.integer) and (theirs == PAD_ID).any():
                raise InputError(f"{PAD_ID} is no id of a gallery item: it pads rankings.")
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
        cameras = [np.asarray([] if cams is None else cams) for cams in (query_cams, gallery_cams)]
        if query_cams is not None and [c.shape for c in cameras] != [queries.shape, gallery.shape]:
            raise InputError(
                f"cameras have shapes {cameras[0].shape} and {cameras[1].shape}; "
                f"labels {queries.shape}, {gallery.shape}."
            )

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
            theirs = cameras[1]
            ignore = [ranked_ids[m[theirs[m] == c]] for m, c in zip(same, cameras[0], strict=True)]
        return cls([ranked_ids[m] for m in same], ignore, self_ids)


def ragged(values: Any, name: str) -> list[NDArray[np.int64]]:
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
