"""Merging the hits of two disjoint parts of a gallery that is being upgraded.

Distance rank merge of Seo et al., "Online Backfilling with No Regret for Large-Scale Image Retrieval"
(arXiv 2301.03767): the union of both lists, sorted by distance. The top k of each part are enough for the top k of the
union.
"""

from __future__ import annotations

import operator

import numpy as np

from bowerbird.errors import InputError, IntegrityError
from bowerbird.retrieval.index import Hits

TIES = ("new_first", "old_first", "lower_id")


def merge_by_distance(old: Hits, new: Hits, k: int, tie: str = "new_first", *, duplicates: str = "keep_new") -> Hits:
    """The ``k`` nearest of two lists of hits, ascending by distance.

    Args:
        old: Hits among the items that still have old vectors; ids int64 ``(M,)`` or ``(Q, M)``, distances of the same
            shape. Padding has id -1 and distance ``inf``. Need not be sorted.
        new: Hits among the items that have new vectors, ``(L,)`` or ``(Q, L)``.
        k: Length of the result, at least 1. Shorter unions are padded.
        tie: What stands first among equal distances: ``new_first``, ``old_first`` or ``lower_id``; then the lower id.
        duplicates: An id in both parts: ``keep_new`` keeps the new copy, ``raise`` raises.

    Returns:
        Hits ``(k,)`` or ``(Q, k)``, like the arguments.

    Raises:
        InputError: If the shapes do not fit, ``k`` is below 1, an argument is unknown, or a distance is NaN.
        IntegrityError: With ``duplicates="raise"``, if an id is in both parts of one query; lists the ids.
    """
    try:
        size = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        size = 0
    if size < 1:
        raise InputError(f"k is {k!r}; it must be a whole number of at least 1")
    k = size
    if tie not in TIES:
        raise InputError(f"tie is {tie!r}; accepted: {', '.join(TIES)}")
    if duplicates not in ("keep_new", "raise"):
        raise InputError(f"duplicates is {duplicates!r}; accepted: keep_new, raise")
    old_ids, old_distances, one = _matrix(old, "old")
    new_ids, new_distances, new_one = _matrix(new, "new")
    if one != new_one or len(old_ids) != len(new_ids):
        raise InputError(
            f"the two lists of hits belong to different queries: shapes {np.shape(old.ids)} and {np.shape(new.ids)}"
        )

    ids = np.concatenate([old_ids, new_ids], axis=1)
    distances = np.concatenate([old_distances, new_distances], axis=1)
    width_old = old_ids.shape[1]
    if width_old and new_ids.shape[1]:
        stale = _in_both(old_ids, new_ids)
        if stale.any():
            if duplicates == "raise":
                twice = sorted({int(i) for i in old_ids[stale]})
                raise IntegrityError(f"{len(twice)} items are in the old and in the new part: {twice[:10]}")
            ids[:, :width_old][stale] = -1
            distances[:, :width_old][stale] = np.inf
    # Padding has the largest key of all, so that a real hit at distance inf still stands before it.
    id_key = np.where(ids < 0, np.iinfo(np.int64).max, ids)
    side = np.zeros(ids.shape[1], np.int8)
    side[:width_old] = {"new_first": 1, "old_first": -1, "lower_id": 0}[tie]
    order = np.lexsort((id_key, np.broadcast_to(side, ids.shape), ids < 0, distances), axis=1)[:, :k]
    ids, distances = np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)
    if ids.shape[1] < k:
        missing = k - ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=-1)
        distances = np.pad(distances, ((0, 0), (0, missing)), constant_values=np.inf)
    return Hits(ids[0], distances[0]) if one else Hits(ids, distances)


class ZScoreMerge:
    """Merge by distances that are brought to one scale, per query and per model.

    Two models' distances are rarely on one scale: the model whose distances are smaller crowds the other's items out.
    Here a distance becomes ``(d - mean) / std`` of the query's distances to a background sample of the part that it is
    in. Within a part nothing is reordered, so that an upgrade still begins exactly at the old and ends exactly at the
    new system. The hits keep their cosine distances, which then need not ascend.

    Attributes:
        background_items: How many items of each part the caller samples.
        fewest: With fewer items than this in a part, plain distances are merged: a scale cannot be estimated.
    """

    background_items = 1000
    fewest = 32

    def __call__(
        self, old: Hits, new: Hits, k: int, *, background: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Hits:
        """The ``k`` nearest of two lists of hits, in the order of their standardised distances.

        Args:
            old, new: Hits ``(Q, M)`` and ``(Q, L)``.
            background: Distances ``(Q, B)`` of the queries to samples of the old and of the new part, each with the
                query vectors of its part. ``None``: plain distances are merged.
        """
        if background is None or min(np.shape(part)[-1] for part in background) < self.fewest:
            return merge_by_distance(old, new, k)
        scaled = [
            Hits(hits.ids, self.rescale(hits.distances, part))
            for hits, part in zip((old, new), background, strict=True)
        ]
        merged = merge_by_distance(scaled[0], scaled[1], k)
        return Hits(merged.ids, _distances_of(merged.ids, old, new))

    @staticmethod
    def rescale(distances: np.ndarray, background: np.ndarray) -> np.ndarray:
        """``(distances - mean) / std`` by row, float64; ``distances`` ``(Q, M)``, ``background`` ``(Q, B)``.

        A background of one distance only (std 0) moves the distances but does not stretch them.
        """
        rows = np.atleast_2d(np.asarray(background, np.float64))
        spread = rows.std(axis=1, keepdims=True)
        scaled = (np.atleast_2d(np.asarray(distances, np.float64)) - rows.mean(axis=1, keepdims=True)) / np.where(
            spread > 0, spread, 1.0
        )
        return scaled.reshape(np.shape(distances))


merge_by_zscore = ZScoreMerge()


def _distances_of(ids: np.ndarray, old: Hits, new: Hits) -> np.ndarray:
    """The cosine distance of each merged id, that of the new copy where there are two; ``inf`` for padding."""
    known_ids = np.concatenate([np.atleast_2d(new.ids), np.atleast_2d(old.ids)], axis=1)
    known = np.concatenate([np.atleast_2d(new.distances), np.atleast_2d(old.distances)], axis=1)
    rows = np.atleast_2d(ids)
    found = (rows[:, :, None] == known_ids[:, None, :]).argmax(axis=2)
    distances = np.where(rows < 0, np.inf, np.take_along_axis(known, found, axis=1))
    return distances.astype(known.dtype, copy=False).reshape(np.shape(ids))


def _matrix(hits: Hits, name: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """Ids int64 ``(Q, M)``, distances ``(Q, M)``, and whether they were given for one query."""
    ids = np.asarray(hits.ids, np.int64)
    distances = np.asarray(hits.distances)
    if not np.issubdtype(distances.dtype, np.floating):
        distances = distances.astype(np.float64)
    if ids.shape != distances.shape or ids.ndim not in (1, 2):
        raise InputError(
            f"{name} hits have ids of shape {ids.shape} and distances of shape {distances.shape}; need (k,) or (Q, k)"
        )
    if np.isnan(distances).any():
        raise InputError(f"{name} hits have a NaN distance")
    return np.atleast_2d(ids), np.atleast_2d(distances), ids.ndim == 1


def _in_both(old_ids: np.ndarray, new_ids: np.ndarray) -> np.ndarray:
    """Bool ``(Q, M)``: the old hit is a real one and its id is among the new hits of the same query."""
    return (old_ids[:, :, None] == new_ids[:, None, :]).any(axis=2) & (old_ids >= 0)
