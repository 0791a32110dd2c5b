"""What a strategy would give, before anything is changed: curves of quality and flips over the share of moved items.

Works on arrays only, so that it serves encoders that are known by their vectors alone. At share ``b`` the items that
come first in the order are searched with new queries in the new space, the others with the strategy's queries in the
space that they have; the lists are joined by the merger itself, with its background and its tie rule, as serving does.

A smaller gallery is an easier one, so average precision is that of the whole gallery, estimated from the sample by its
items' weights (``bowerbird.upgrade.estimate``). Recall at rank 1 and flips look at one item only and are those of the
sample.

Shapes: Q queries, N gallery items of the sample, Do and Dn widths of the two spaces, S shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bowerbird.errors import DataError, InputError
from bowerbird.gallery.merge import Merger, merge_by_distance, merge_many
from bowerbird.gallery.routing import match_width
from bowerbird.retrieval.compatibility import similarity
from bowerbird.retrieval.curves import DEFAULT_BETAS, Curve
from bowerbird.retrieval.flips import flips
from bowerbird.retrieval.index import Hits, unit_rows
from bowerbird.retrieval.intervals import Interval, bootstrap_interval
from bowerbird.retrieval.metrics import PerQuery
from bowerbird.upgrade.estimate import average_precision_of_sample

METRICS = ("map", "map@100", "r1")
DEPTH = 100  # of map@100, which is what ``watch`` measures


@dataclass(frozen=True)
class PairedVectors:
    """A sample of items and queries, each encoded by both encoders.

    Attributes:
        gallery_old: ``(N, Do)``; made unit rows.
        gallery_new: ``(N, Dn)``; row i is the same item as row i of ``gallery_old``.
        query_old: ``(Q, Do)``.
        query_new: ``(Q, Dn)``.
        gallery_labels: N labels of any kind; an item is relevant to a query when their labels are equal.
        query_labels: Q labels.
        gallery_ids: N ids; by default positions.
        query_ids: Q ids. A query that is itself a gallery item (same id) is not counted as its own answer.
        gallery_weights: ``(N,)``, how many items of the gallery each sampled one stands for, at least 1. Default: 1
            each; the forecast is then that of a gallery of N items.

    Raises:
        DataError: If rows do not pair, are not finite or are zero; names what and where.
    """

    gallery_old: np.ndarray
    gallery_new: np.ndarray
    query_old: np.ndarray
    query_new: np.ndarray
    gallery_labels: Sequence[Any]
    query_labels: Sequence[Any]
    gallery_ids: Sequence[str] | None = None
    query_ids: Sequence[str] | None = None
    gallery_weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("gallery_old", "gallery_new", "query_old", "query_new"):
            object.__setattr__(self, name, _checked(getattr(self, name), name))
        for side in ("gallery", "query"):
            rows = len(getattr(self, f"{side}_old"))
            for name in (f"{side}_new", f"{side}_labels", f"{side}_ids", f"{side}_weights"):
                value = getattr(self, name, None)
                if value is not None and len(value) != rows:
                    raise DataError(f"{name} has {len(value)} rows, {side}_old has {rows}: they do not pair")
        for version in ("old", "new"):
            widths = [getattr(self, f"{side}_{version}").shape[1] for side in ("gallery", "query")]
            if widths[0] != widths[1]:
                raise DataError(
                    f"the {version} gallery vectors have width {widths[0]}, the {version} queries {widths[1]}"
                )
        weights = np.ones(len(self.gallery_old)) if self.gallery_weights is None else self.gallery_weights
        weights = np.asarray(weights, np.float64)
        if not np.isfinite(weights).all() or (weights < 1 - 1e-9).any():
            raise DataError("gallery_weights must be 1 or more: an item stands for itself at least")
        object.__setattr__(self, "gallery_weights", weights)


@dataclass(frozen=True)
class ForecastCurve:
    """The forecast of one strategy with one merger.

    Attributes:
        name: Of the strategy; also ``full`` (switch at the end), ``do-not-upgrade`` and ``switch-now`` (new queries on
            whatever vectors there are).
        shares: ``(S,)`` ascending, from 0 to 1.
        quality: ``(S,)``, mean over the valid queries.
        nfr: ``(S,)``, share of the queries that were right at rank 1 under the old system and are wrong at this share.
        area: Integral of ``quality`` over the share.
        unavailable: Empty, or why the strategy cannot serve this pair in the gallery as it is.
        merger: Record that joins the parts; empty where there is nothing to join.
        area_interval, start_interval, end_interval: 95 % intervals over the queries.
        values: ``(S, Q)`` quality of each query, NaN where it does not count; for paired comparisons, not saved.
        trained_on: Pairs on which the strategy's transform was fitted; 0 where it has none.
        items: Sampled items of the forecast.
        gain: Paired difference of the area to the old level: what the strategy brings over waiting until the end.
        dip: Paired difference of the quality at the worst share to the old level.
        differences: ``(S,)`` paired differences of the quality to the old level; of the recommended curve only.
        costs: See ``bowerbird.upgrade.plan_record.Costs``.
    """

    name: str
    shares: tuple[float, ...]
    quality: tuple[float, ...]
    nfr: tuple[float, ...]
    area: float
    unavailable: str = ""
    merger: str = ""
    area_interval: Interval | None = None
    start_interval: Interval | None = None
    end_interval: Interval | None = None
    values: np.ndarray | None = None
    trained_on: int = 0
    items: int = 0
    gain: Interval | None = None
    dip: Interval | None = None
    differences: tuple[Interval, ...] = ()
    costs: Any = None

    @property
    def max_nfr(self) -> float:
        return max(self.nfr)

    @property
    def start(self) -> float:
        return self.quality[0]

    @property
    def end(self) -> float:
        return self.quality[-1]

    @property
    def worst_share(self) -> float:
        return self.shares[int(np.argmin(self.quality))]

    def share_at_gain(self, gain: float, old_level: float) -> float:
        """The first share (linear between the measured ones) at which ``gain`` (0 to 1) of what the upgrade brings over
        ``old_level`` is there; NaN where it brings nothing."""
        return Curve(self.shares, self.quality).beta_at(gain, old_level)


class Forecaster:
    """Curves of several strategies over one sample; what they share is computed once.

    Args:
        paired: The sample.
        metric: ``map`` (mean average precision), ``map@100`` (of the first 100 results), ``r1`` (recall at rank 1).
        seed: Of the bootstrap.

    Attributes:
        old_old, new_new, new_old: Quality of each query, with queries by the first and gallery by the second encoder.
            ``new_old`` compares unrelated spaces unless the new encoder was trained for the old one.
    """

    def __init__(self, paired: PairedVectors, metric: str = "map", *, seed: int = 0) -> None:
        if metric not in METRICS:
            raise InputError(f"metric is {metric!r}; known: {', '.join(METRICS)}")
        self.paired, self.metric, self.seed = paired, metric, seed
        self.items = len(paired.gallery_old)
        assert paired.gallery_weights is not None
        self._weights = paired.gallery_weights
        self._uniform = bool(np.ptp(self._weights) == 0)
        self._right, self._self = _relevance(paired)
        self.valid: np.ndarray = np.asarray(self._right.any(axis=1))
        if not self.valid.any():
            raise InputError("no query has a right answer in the sample; are the labels of queries and items the same?")
        self._new_distances = 1 - similarity(paired.query_new, paired.gallery_new)
        self._mixed_queries = match_width(paired.query_new, paired.gallery_old.shape[1])
        self.old_old, self._right_before = self._alone(1 - similarity(paired.query_old, paired.gallery_old))
        self.new_new, self._right_after = self._alone(self._new_distances)
        self.new_old, _ = self._alone(1 - similarity(self._mixed_queries, paired.gallery_old))

    def curve(
        self,
        name: str,
        old_part_queries: np.ndarray,
        order: np.ndarray,
        shares: Sequence[float] = DEFAULT_BETAS,
        *,
        merger: Merger = merge_by_distance,
        merger_name: str = "",
        old_part_vectors: np.ndarray | None = None,
        trained_on: int = 0,
    ) -> ForecastCurve:
        """The curve of a strategy that searches the old part with ``old_part_queries`` ``(Q, D)``.

        Args:
            name: Of the strategy.
            order: Permutation of 0..N-1: what is moved first stands first. Or floats ``(N,)``: the share of the gallery
                at which each item is moved, above 0 and at most 1.
            shares: Ascending, from 0 to 1.
            merger: Joins the parts.
            old_part_vectors: ``(N, D)``, what the items hold before they are moved. Default: their old vectors.
        """
        held = self.paired.gallery_old if old_part_vectors is None else old_part_vectors
        moved_at = _moved_at(order, self.items)
        grid = Curve(shares, np.zeros(len(shares))).betas  # checks it
        # Columns stand in the order in which they move, so that both parts are slices at every share.
        columns = np.argsort(moved_at, kind="stable")
        counts = np.searchsorted(moved_at[columns], grid + 1e-9, side="right")
        parts = _Parts(
            columns, 1 - similarity(old_part_queries, held[columns]), self._new_distances[:, columns],
            self._weights[columns], self._right[:, columns], self._self[:, columns],
        )  # fmt: skip
        results = [self._measure(parts, *self._merged(parts, int(moved), merger)) for moved in counts]
        return self._made(name, grid, results, merger_name, trained_on)

    def switch_now(self, order: np.ndarray, shares: Sequence[float] = DEFAULT_BETAS) -> ForecastCurve:
        """New queries on one mixed index at once, whatever the two spaces have to do with each other."""
        return self.curve("switch-now", self._mixed_queries, order, shares)

    def full(self, shares: Sequence[float] = DEFAULT_BETAS) -> ForecastCurve:
        """The old system until every item is done, then the new one."""
        before = [(self.old_old, self._right_before)] * (len(shares) - 1)
        made = self._made("full", shares, [*before, (self.new_new, self._right_after)])
        # The step is at 1 exactly, so that the area is that of the old level and not of a ramp on the last interval.
        old = self._interval(self.old_old.values)
        nothing = Interval(0.0, 0.0, 0.0, old.level)
        return replace(made, area=old.mean, area_interval=old, gain=nothing, dip=nothing)

    def do_nothing(self, shares: Sequence[float] = DEFAULT_BETAS) -> ForecastCurve:
        """The old system for ever."""
        return self._made("do-not-upgrade", shares, [(self.old_old, self._right_before)] * len(shares))

    def _made(
        self,
        name: str,
        shares: Any,
        results: Sequence[tuple[PerQuery, PerQuery]],
        merger: str = "",
        trained_on: int = 0,
    ) -> ForecastCurve:
        values = np.stack([quality.values for quality, _ in results])
        steps = np.diff(np.asarray(shares, np.float64))
        areas = (steps[:, None] * (values[1:] + values[:-1]) / 2).sum(axis=0)
        area = self._interval(areas)
        worst = int(np.argmin(values[:, self.valid].mean(axis=1)))
        return ForecastCurve(
            name=name,
            shares=tuple(float(share) for share in shares),
            quality=tuple(quality.mean() for quality, _ in results),
            nfr=tuple(flips(self._right_before, right).nfr for _, right in results),
            area=area.mean,
            merger=merger,
            area_interval=area,
            start_interval=self._interval(values[0]),
            end_interval=self._interval(values[-1]),
            values=np.where(self.valid, values, np.nan),
            trained_on=trained_on,
            items=self.items,
            gain=self._interval(areas - self.old_old.values),
            dip=self._interval(values[worst] - self.old_old.values),
        )

    def differences(self, curve: ForecastCurve) -> tuple[Interval, ...]:
        """Paired differences of one of this forecaster's curves to the old level, at each of its shares."""
        assert curve.values is not None
        return tuple(self._interval(values - self.old_old.values) for values in curve.values)

    def _interval(self, values: np.ndarray) -> Interval:
        return bootstrap_interval(PerQuery(values, self.valid), seed=self.seed)

    def _alone(self, distances: np.ndarray) -> tuple[PerQuery, PerQuery]:
        """``_measure`` of one system."""
        columns = np.arange(self.items)
        parts = _Parts(columns, distances, distances, self._weights, self._right, self._self)
        return self._measure(parts, distances, _ranked(distances, 0, columns))

    def _merged(self, parts: _Parts, moved: int, merger: Merger) -> tuple[np.ndarray, np.ndarray]:
        """``(keys (Q, N), order)``: how near the merger thinks each item is, and the items as serving shows them.

        ``moved``: the first so many columns are in the new part.
        """
        sides = [slice(moved, None), slice(0, moved)]
        if moved in (0, self.items):
            keys = parts.new if moved else parts.old
            return keys, _ranked(keys, moved, parts.columns)
        distances = [parts.old[:, moved:], parts.new[:, :moved]]
        shape = parts.old.shape
        keys = np.empty(shape)
        bring_to_one_scale: Any = getattr(merger, "keys", None)
        if merger is merge_by_distance:
            scaled = distances
        else:
            hits = [
                Hits(np.broadcast_to(parts.columns[side], near.shape), near)
                for side, near in zip(sides, distances, strict=True)
            ]
            wanted = getattr(merger, "background_items", 0)
            told: dict[str, Any] = {
                "background": [self._background(parts, s, d, wanted) for s, d in zip(sides, distances, strict=True)]
                if wanted else None,
                "counts": [int(parts.weights[side].sum().round()) for side in sides],
            }  # fmt: skip
            if bring_to_one_scale is None:
                shown = merge_many(merger, [_sorted(part) for part in hits], self.items, **told).ids
                place = np.empty(self.items, np.int64)
                place[parts.columns] = np.arange(self.items)
                order = place[shown]
                np.put_along_axis(keys, order, np.broadcast_to(np.arange(self.items, dtype=float), shape), axis=1)
                return keys, order
            if getattr(merger, "needs_counts", False) and not self._uniform:
                told["weights"] = [parts.weights[side] for side in sides]
            scaled = bring_to_one_scale(hits, **told)
        for side, key in zip(sides, scaled, strict=True):
            keys[:, side] = key
        return keys, _ranked(keys, moved, parts.columns)

    def _background(self, parts: _Parts, side: slice, near: np.ndarray, wanted: int) -> np.ndarray:
        """What serving would draw from a part of the gallery's size: evenly spaced items."""
        by_item = np.argsort(parts.columns[side])
        weights = parts.weights[side][by_item]
        size = min(wanted, max(1, int(weights.sum().round())))
        if self._uniform:
            chosen = np.linspace(0, len(by_item) - 1, size, dtype=np.int64)
        else:
            upto = np.cumsum(weights)
            chosen = np.searchsorted(upto, (np.arange(size) + 0.5) * upto[-1] / size)
        return near[:, by_item[chosen]]

    def _measure(self, parts: _Parts, keys: np.ndarray, order: np.ndarray) -> tuple[PerQuery, PerQuery]:
        """``(quality, right at rank 1)`` of each query; ``keys`` ``(Q, N)``, smaller = nearer."""
        top = order[:, :2]
        right, own = (np.take_along_axis(flags, top, axis=1) for flags in (parts.right, parts.own))
        # The first two are enough to know the first result, also where the very first is the query itself.
        at_one = PerQuery(np.where(own[:, 0], right[:, -1], right[:, 0]).astype(np.float64), self.valid)
        if self.metric == "r1":
            return at_one, at_one
        depth = DEPTH if self.metric == "map@100" else None
        values = average_precision_of_sample(keys, order, parts.right, parts.own, parts.weights, depth=depth)
        return PerQuery(values, self.valid), at_one


@dataclass(frozen=True)
class _Parts:
    """One strategy's view of the sample. Column j of every array is the item ``columns[j]``.

    Attributes:
        columns: int64 ``(N,)``, a permutation.
        old, new: ``(Q, N)`` distances of the queries before and after an item is moved.
        weights: ``(N,)``.
        right, own: bool ``(Q, N)``.
    """

    columns: np.ndarray
    old: np.ndarray
    new: np.ndarray
    weights: np.ndarray
    right: np.ndarray
    own: np.ndarray


def _ranked(keys: np.ndarray, moved: int, columns: np.ndarray) -> np.ndarray:
    """int64 ``(Q, N)``: columns by key; of equal keys the first ``moved`` columns stand first, then the lower item."""
    order = np.argsort(keys, axis=1)
    near = np.take_along_axis(keys, order, axis=1)
    tied = np.flatnonzero((near[:, 1:] == near[:, :-1]).any(axis=1))
    if len(tied):  # sorting stably costs several times as much, and few rows need it
        first = np.lexsort((columns, np.arange(len(columns)) >= moved))
        order[tied] = first[np.argsort(keys[np.ix_(tied, first)], axis=1, kind="stable")]
    return order


def _relevance(paired: PairedVectors) -> tuple[np.ndarray, np.ndarray]:
    """Bool ``(Q, N)``: the item is right for the query; the item is the query."""
    items = np.array([str(label) for label in paired.gallery_labels])
    queries = np.array([str(label) for label in paired.query_labels])
    own = np.zeros((len(queries), len(items)), bool)
    if paired.query_ids is not None and paired.gallery_ids is not None:
        own = np.asarray(paired.query_ids, str)[:, None] == np.asarray(paired.gallery_ids, str)[None, :]
    return (queries[:, None] == items[None, :]) & ~own, own


def _sorted(hits: Hits) -> Hits:
    order = np.argsort(hits.distances, axis=1, kind="stable")
    return Hits(np.take_along_axis(hits.ids, order, axis=1), np.take_along_axis(hits.distances, order, axis=1))


def _moved_at(order: Any, items: int) -> np.ndarray:
    """float ``(N,)``: the share of the gallery at which each item is moved."""
    order = np.asarray(order)
    if np.issubdtype(order.dtype, np.floating):
        if order.shape != (items,) or not ((order > 0) & (order <= 1)).all():
            raise InputError(f"the shares at which {items} items are moved must be above 0 and at most 1, one each")
        return order
    if order.shape != (items,) or not np.array_equal(np.sort(order), np.arange(items)):
        raise InputError(f"order must be a permutation of 0..{items - 1}, one entry per item of the sample")
    moved_at = np.empty(items)
    moved_at[order] = (np.arange(items) + 1) / items
    return moved_at


def _checked(vectors: Any, name: str) -> np.ndarray:
    array = np.asarray(vectors, np.float32)
    if array.ndim != 2 or not len(array):
        raise DataError(f"{name} must have shape (rows, width) with at least one row, got {array.shape}")
    return unit_rows(array, what=name)
