"""Merging the hits of the disjoint parts of a gallery that is being upgraded.

The parts are searched each in its own space, and a *merger* joins their lists. Every merger keeps the order within a
part, and one part alone as it is, so that an upgrade begins exactly at the old system and ends exactly at the new one.

    core:distance       by distance: the rank merge of Seo et al., "Online Backfilling with No Regret for Large-Scale
                        Image Retrieval" (arXiv 2301.03767)
    core:zscore         by distances standardised per query and part on a background sample
    core:proportional   by rank divided by the size of the part: no distance of one model is compared with the other's

A merger is called with two parts ``(old, new, k)``; ``merge_many`` joins any number, oldest first. One that is more
than a comparison of distances has the method ``keys``, which brings the hits of all parts to one scale, and says what
it must be told: ``background_items`` (a sample of each part's distances, ``background=``) or ``needs_counts`` (how many
items each part has, ``counts=``). The top k of each part are enough for the top k of the union.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError, IntegrityError
from bowerbird.retrieval.index import Hits, in_order

TIES = ("new_first", "old_first", "lower_id")
NO_SPREAD = 1e-6  # of cosine distances: no more than the rounding of float32 products
Merger = Callable[..., Hits]


def unit_spread(deviations: NDArray[np.float64]) -> NDArray[np.float64]:
    """What to divide by for standardised distances: the deviations; 1 where distances differ by rounding alone."""
    return np.where(deviations > NO_SPREAD, deviations, 1.0)


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
    return merge_parts([old, new], k, tie=tie, duplicates=duplicates)


def merge_parts(
    parts: Sequence[Hits],
    k: int,
    *,
    keys: Sequence[np.ndarray] | None = None,
    tie: str = "new_first",
    duplicates: str = "keep_new",
) -> Hits:
    """The first ``k`` of any number of lists of hits, in the order of ``keys``; see ``merge_by_distance``.

    Args:
        parts: Hits of each part, the oldest space first.
        keys: For each part an array of the shape of its distances, smaller = earlier. Default: the distances.
        duplicates: ``keep_new`` keeps the copy of the newest part.
    """
    size = _positive(k)
    if tie not in TIES:
        raise InputError(f"tie is {tie!r}; accepted: {', '.join(TIES)}")
    if duplicates not in ("keep_new", "raise"):
        raise InputError(f"duplicates is {duplicates!r}; accepted: keep_new, raise")
    if not parts:
        raise InputError("there are no parts to merge")
    names = ("old", "new") if len(parts) == 2 else tuple(f"part {number}" for number in range(len(parts)))
    matrices = [_matrix(hits, name) for hits, name in zip(parts, names, strict=True)]
    if len({(len(ids), one) for ids, _, one in matrices}) != 1:
        raise InputError(
            "the lists of hits belong to different queries: shapes "
            + " and ".join(str(np.shape(hits.ids)) for hits in parts)
        )
    ids = np.concatenate([ids for ids, _, _ in matrices], axis=1)
    distances = np.concatenate([distances for _, distances, _ in matrices], axis=1)
    part = np.repeat(np.arange(len(parts)), [ids.shape[1] for ids, _, _ in matrices])
    sort_by = distances if keys is None else np.concatenate([np.atleast_2d(key) for key in keys], axis=1)
    if sort_by.shape != distances.shape:
        raise InputError(f"the keys of {distances.shape} hits have shape {sort_by.shape}")
    sort_by = np.where(ids < 0, np.inf, sort_by)

    by_id = np.sort(ids, axis=1)
    if ((by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] >= 0)).any():
        stale = _older_copies(ids, part)
        if duplicates == "raise":
            twice = sorted({int(i) for i in ids[stale]})
            raise IntegrityError(f"{len(twice)} items are in the old and in the new part: {twice[:10]}")
        ids, sort_by, distances = (
            np.where(stale, gone, values) for values, gone in ((ids, -1), (sort_by, np.inf), (distances, np.inf))
        )
    # Padding has the largest key of all, so that a real hit at distance inf still stands before it.
    id_key = np.where(ids < 0, np.iinfo(np.int64).max, ids)
    side = part * {"new_first": -1, "old_first": 1, "lower_id": 0}[tie]
    order = np.lexsort((id_key, np.broadcast_to(side, ids.shape), ids < 0, sort_by), axis=1)[:, :size]
    ids, distances = in_order(order, ids, distances)
    if ids.shape[1] < size:
        missing = size - ids.shape[1]
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=-1)
        distances = np.pad(distances, ((0, 0), (0, missing)), constant_values=np.inf)
    return Hits(ids[0], distances[0]) if matrices[0][2] else Hits(ids, distances)


def merge_many(
    merger: Merger,
    parts: Sequence[Hits],
    k: int,
    *,
    background: Sequence[np.ndarray] | None = None,
    counts: Sequence[int] | None = None,
) -> Hits:
    """What ``merger`` makes of any number of parts, the oldest space first.

    Args:
        background: Of each part, distances ``(Q, B)`` to a sample of its items; see ``background_items``.
        counts: Of each part, how many items could have been hits; see ``needs_counts``.

    A merger without ``keys`` is applied to the parts one after the other; one that must be told something joins two.
    """
    bring_to_one_scale: Any = getattr(merger, "keys", None)
    if bring_to_one_scale is not None:
        return merge_parts(parts, k, keys=bring_to_one_scale(parts, background=background, counts=counts))
    told: dict[str, Any] = {}
    if getattr(merger, "background_items", 0):
        told["background"] = background
    if getattr(merger, "needs_counts", False):
        told["counts"] = counts
    if told and len(parts) > 2:
        raise InputError(f"{len(parts)} parts are to be joined; merger {merger!r} has no method keys and joins two")
    if told:
        return merger(*parts, k, **told)
    merged = parts[0]
    for part in parts[1:]:
        merged = merger(merged, part, k)
    return merged


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
        return merge_many(self, [old, new], k, background=background)

    def keys(
        self, parts: Sequence[Hits], *, background: Sequence[np.ndarray] | None = None, counts: Any = None
    ) -> list[np.ndarray]:
        """Of each part an array of the shape of its distances; on all of them a smaller number is nearer."""
        if background is None or min(np.shape(sample)[-1] for sample in background) < self.fewest:
            return [np.asarray(hits.distances) for hits in parts]
        return [self.rescale(hits.distances, sample) for hits, sample in zip(parts, background, strict=True)]

    @staticmethod
    def rescale(distances: np.ndarray, background: np.ndarray) -> np.ndarray:
        """``(distances - mean) / std`` by row, float64; ``distances`` ``(Q, M)``, ``background`` ``(Q, B)``.

        A background of one distance only (std 0, but for rounding) moves the distances but does not stretch them.
        """
        rows = np.atleast_2d(np.asarray(background, np.float64))
        spread = rows.std(axis=1, keepdims=True)
        centred = np.atleast_2d(np.asarray(distances, np.float64)) - rows.mean(axis=1, keepdims=True)
        scaled = centred / unit_spread(spread)
        return scaled.reshape(np.shape(distances))


class ProportionalMerge:
    """Merge by rank: every part contributes in proportion to the number of its items.

    The j-th hit of a part with n items has the key ``(j - 1/2) / n``: the share of its part that is nearer to the
    query. So the first m of the merged list hold about ``m n / N`` hits of a part, for every m, whatever the two
    models' distances are. Within a part nothing is reordered, and a part with no items contributes nothing, so that
    both ends of an upgrade are exact. Right where the items that moved are a fair sample of all (a random order); where
    one part holds what the query looks for, distances know it and ranks do not.

    Attributes:
        needs_counts: The caller says how many items each part has. Without it, plain distances are merged.
    """

    needs_counts = True

    def __call__(self, old: Hits, new: Hits, k: int, *, counts: tuple[int, int] | None = None) -> Hits:
        """The first ``k`` of two lists of hits; ``counts``: how many items of each part could have been hits."""
        return merge_many(self, [old, new], k, counts=counts)

    def keys(
        self,
        parts: Sequence[Hits],
        *,
        counts: Sequence[int] | None = None,
        background: Any = None,
        weights: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Of each part an array of the shape of its distances; on all of them a smaller number is nearer.

        ``weights``: of each part ``(M,)``, how many items each hit stands for, where the hits are a sample, as in a
        forecast.
        """
        if counts is None:
            return [np.asarray(hits.distances) for hits in parts]
        if len(counts) != len(parts):
            raise InputError(f"{len(parts)} parts need as many counts; got {list(counts)}")
        keys = []
        for number, (hits, count) in enumerate(zip(parts, counts, strict=True)):
            ids, distances, one = _matrix(hits, "merged")
            order = _by_distance(ids, distances)
            each = np.ones(ids.shape[1]) if weights is None else np.asarray(weights[number], np.float64)
            up_to = np.cumsum(each[order], axis=1) - each[order] / 2
            rank = np.empty(ids.shape, np.float64)
            np.put_along_axis(rank, order, up_to, axis=1)
            scaled = rank / max(int(count), 1)
            keys.append(scaled[0] if one else scaled)
        return keys


merge_by_zscore = ZScoreMerge()
merge_in_proportion = ProportionalMerge()


def _positive(k: Any) -> int:
    try:
        size = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        size = 0
    if size < 1:
        raise InputError(f"k is {k!r}; it must be a whole number of at least 1")
    return size


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


def _by_distance(ids: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """``(Q, M)`` positions by distance, equal ones by lower id, padding last."""
    order = np.argsort(distances, axis=1)
    near = np.take_along_axis(distances, order, axis=1)
    tied = (near[:, 1:] == near[:, :-1]).any(axis=1)
    # Sorting by three keys costs ten times as much, and few rows need it.
    order[tied] = np.lexsort((ids[tied], ids[tied] < 0, distances[tied]), axis=1)
    return order


def _older_copies(ids: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Bool ``(Q, W)``: a real hit whose id is among the hits of a newer part of the same query, too."""
    order = np.lexsort((np.broadcast_to(-part, ids.shape), ids), axis=1)
    sorted_ids = np.take_along_axis(ids, order, axis=1)
    repeated = np.zeros(ids.shape, bool)
    repeated[:, 1:] = (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] >= 0)
    stale = np.zeros(ids.shape, bool)
    np.put_along_axis(stale, order, repeated, axis=1)
    return stale
