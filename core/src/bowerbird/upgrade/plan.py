"""``plan``: whether to upgrade, by which strategy, in which order, and what it costs. Reads only.

A sample of the gallery is encoded by the new encoder; its old vectors are the stored ones. Labelled queries then
measure the old and the new system on the sample, and each strategy's curve is computed as serving would do it
(``forecast``), with each merger. Strategies that fit a map are fitted on one half of the sample and forecast on the
other, those that fit nothing (their map was trained together with the new encoder, or they need none) on all of it;
each is compared with the old level on its own items.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import BowerbirdError, InputError, UpgradeError
from bowerbird.gallery.space import Space
from bowerbird.registry import get_registry
from bowerbird.retrieval.intervals import Interval, bootstrap_interval, paired_difference
from bowerbird.upgrade.backfill import backfill_plan, order_positions
from bowerbird.upgrade.canary import check_canary
from bowerbird.upgrade.fitting import trained_transform
from bowerbird.upgrade.forecast import ForecastCurve, Forecaster, PairedVectors
from bowerbird.upgrade.plan_record import GIVEN_VECTORS, Costs, OrderForecast, Plan
from bowerbird.upgrade.queries import QuerySet, no_label
from bowerbird.upgrade.sample import Sample, take_sample
from bowerbird.upgrade.start import check_store
from bowerbird.upgrade.state import space_dict
from bowerbird.upgrade.strategies import (
    Strategy,
    TrainingPairs,
    load_strategy,
    strategy_names,
    switches_at_end,
    transform_direction,
)
from bowerbird.upgrade.verdict import FEWEST_QUERIES, Recommendation, recommend, short_name

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.transform import VectorTransform
    from bowerbird.upgrade.encoding import ItemEncoder

CLEARLY = 0.005  # a merger or an order that is not better by this is not worth a departure from the usual one


def plan(
    gallery: Gallery,
    new: ItemEncoder | None = None,
    *,
    old_encoder: ItemEncoder | None = None,
    label_key: str | None = None,
    queries: QuerySet | None = None,
    num_queries: int = 500,
    sample: int = 2000,
    paired: PairedVectors | None = None,
    space: Space | None = None,
    strategies: Sequence[str] | None = None,
    order: str | Sequence[str] = "core:random",
    order_settings: Mapping[str, Any] | None = None,
    mergers: Sequence[str] | None = None,
    metric: str = "map",
    price_per_hour: float | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """Measure, forecast, recommend. Changes nothing.

    Args:
        new: The new encoder. Without it, ``paired`` must have the vectors (an encoder known by its vectors alone).
        old_encoder: Needed for ``queries`` that are images; also proves that it is the one that filled the gallery.
        label_key: Metadata key of the items' label. Without ``queries``, sampled items are the queries, each without
            itself.
        queries: Labelled queries.
        num_queries: At most so many sampled items are queries.
        sample: Items to encode; all of them where the gallery has fewer. Half of them are for fitting where a strategy
            fits a map.
        paired: A ready sample, instead of encoding one. Half of its items and queries are for fitting.
        space: Identity of the new space for ``paired``.
        strategies: Names of ``upgrade`` records; default: all that are installed.
        order: Of the backfill. Several: the forecasts are of the first, and the recommended strategy is forecast with
            the others, too.
        order_settings: Of those orders that have settings of these names.
        mergers: Names of ``merger`` records; default: all that are installed.
        metric: ``map``, ``map@100`` (what ``watch`` measures) or ``r1``.
        price_per_hour: Of the machine that encodes, in any currency.
        seed: Of sample, queries, order and bootstrap.
        progress: Called with (what is done now, steps done, steps in all).

    Raises:
        UpgradeError: If an upgrade is under way, the gallery is empty, or its store cannot run an upgrade.
        SpaceError: If the old encoder does not reproduce the gallery's vectors, or the new one is the old one.
        InputError: If labels or an encoder are missing, or an order lacks what it needs.
        UnknownNameError: If there is no such strategy, merger or order; suggests close names.
    """
    snapshot = gallery.snapshot()
    if snapshot.upgrade is not None:
        raise UpgradeError(f"an upgrade of {gallery.path} is {snapshot.upgrade.state}; see `bowerbird upgrade status`")
    if snapshot.new.count == 0:
        raise UpgradeError(f"gallery {gallery.path} is empty: there is nothing to plan for")
    if sample < 1 or num_queries < 1:
        raise InputError(f"sample and num_queries must be at least 1; got {sample} and {num_queries}")
    if price_per_hour is not None and not (math.isfinite(price_per_hour) and price_per_hour >= 0):
        raise InputError(f"price_per_hour is {price_per_hour}; it must be 0 or more")
    old = snapshot.spaces[snapshot.serving]
    if new is None and paired is None:
        raise InputError("plan needs the new encoder, or a paired sample of vectors")
    new_space = new.space if new is not None else space
    if new_space is None:
        assert paired is not None
        new_space = Space(GIVEN_VECTORS, "known by its vectors only", int(np.shape(paired.gallery_new)[1]))
    check_store(gallery, new_space)
    if new_space.fingerprint == old.fingerprint:
        raise UpgradeError(f"the gallery already serves space {old}; there is nothing to upgrade")
    # A wrong name, and an order that lacks what it needs, are told before anything is encoded.
    registry = get_registry()
    chosen = dict(load_strategy(name) for name in strategies or strategy_names())
    joined = [registry.get("retriever", name, role="merger").name for name in mergers or _merger_names()]
    orders = [registry.get("retriever", name, role="order").name for name in _as_list(order)]
    per_order = [_settings_of(name, order_settings, alone=len(orders) == 1) for name in orders]
    if label_key is not None and all(item.metadata.get(label_key) is None for item in gallery.items()):
        raise InputError(no_label(gallery, label_key))
    nothing_to_encode = new is not None and new.reads_images and not _has_images(gallery)
    moves = {}
    if paired is None:
        for name, settings in zip(orders, per_order, strict=True):
            full = backfill_plan(gallery, name, settings=settings, seed=seed, label_key=label_key)
            shares = np.empty(snapshot.num_limit)
            shares[full] = (np.arange(len(full)) + 1) / len(full)
            moves[name] = shares
    canary = check_canary(gallery, old_encoder) if old_encoder is not None else None

    trained = {name: trained_transform(strategy, new, old) for name, strategy in chosen.items()}
    fit = any(transform_direction(strategy) is not None and trained[name] is None for name, strategy in chosen.items())
    if paired is None:
        assert new is not None
        taken = take_sample(
            gallery, new, old, old_encoder=old_encoder, label_key=label_key, queries=queries, num_queries=num_queries,
            size=sample, fit=fit and label_key is not None, seed=seed,
            progress=progress and (lambda done, total: progress("encoding a sample", done, total)),
        )  # fmt: skip
        moved = {name: shares[taken.nums] for name, shares in moves.items()}
    else:
        taken = _split(paired, old, new_space, seed, fit=fit)
        moved = {}
        for name, settings in zip(orders, per_order, strict=True):
            positions = order_positions(name, taken.nums, paired.gallery_old, settings=settings, seed=seed)
            moved[name] = np.empty(len(positions))
            moved[name][positions] = (np.arange(len(positions)) + 1) / len(positions)
    rate = taken.items_per_second
    hours = snapshot.live / rate / 3600 if rate else None
    price = hours * price_per_hour if hours is not None and price_per_hour is not None else None
    itemsize = 2 if any(segment.info.dtype == "float16" for segment in getattr(snapshot, "segments", ())) else 4
    vector_bytes = snapshot.live * new_space.dim * itemsize
    # The old vectors are written once more in backfill order when the upgrade begins.
    peak_bytes = vector_bytes + snapshot.live * old.dim * itemsize

    interval: dict[str, Interval] = {}
    curves: list[ForecastCurve] = []
    compared: list[OrderForecast] = []
    transforms: dict[str, VectorTransform] = {}
    counted = 0
    if taken.everything is None or taken.held is None:
        verdict = Recommendation(
            "no-verdict",
            None,
            f"without labels nothing can be measured; give label_key, or at least {FEWEST_QUERIES} labelled queries.",
            0,
            FEWEST_QUERIES,
        )
    else:
        forecaster = Forecaster(taken.everything, metric, seed=seed)
        held = forecaster if taken.held is taken.everything else Forecaster(taken.held, metric, seed=seed)
        ways: dict[str, _Way] = {}
        first = moved[orders[0]]
        asked = {name: strategy for name, strategy in chosen.items() if not switches_at_end(strategy)}
        for number, (name, strategy) in enumerate(asked.items()):
            if progress is not None:
                progress(f"forecasting {short_name(name)}", number, len(asked))
            fits = transform_direction(strategy) is not None and trained[name] is None
            way = _Way(
                gallery, name, strategy, held if fits else forecaster, taken.held_rows if fits else None, old,
                new_space, taken.training, trained[name], seed, nothing_to_encode,
            )  # fmt: skip
            ways[name] = way
            made = [way.curve(first, merger) for merger in _own_first(way.strategy, joined)]
            curves += made[:1] if made[0].unavailable else made
            if way.transform is not None:
                transforms[way.name] = way.transform
        if progress is not None:
            progress("forecasting", len(asked), len(asked))
        curves += [forecaster.full(), forecaster.do_nothing(), forecaster.switch_now(first)]
        from_images = new is None or new.reads_images
        curves = [
            replace(
                curve,
                costs=_costs(curve, chosen.get(curve.name), hours, price, peak_bytes, vector_bytes, from_images),
            )
            for curve in curves
        ]
        gain, verdict = recommend(forecaster.old_old, forecaster.new_new, curves, order=orders[0], seed=seed)
        for number, curve in enumerate(curves):
            if curve.merger and (curve.name, curve.merger) == (verdict.strategy, verdict.merger):
                source = held if curve.trained_on else forecaster
                curves[number] = replace(curve, differences=source.differences(curve))
        interval = {
            "old_old": bootstrap_interval(forecaster.old_old, seed=seed),
            "new_new": bootstrap_interval(forecaster.new_new, seed=seed),
            "new_old": bootstrap_interval(forecaster.new_old, seed=seed),
            "gain": gain,
        }
        counted = verdict.queries
        if len(orders) > 1 and verdict.strategy in ways:
            best = next(c for c in curves if (c.name, c.merger) == (verdict.strategy, verdict.merger))
            compared = _compare_orders(ways[verdict.strategy], best, {name: moved[name] for name in orders}, seed)
            verdict = _with_order(verdict, compared)

    return Plan(
        gallery=str(gallery.path),
        old={**space_dict(old), "canary": canary},
        new=space_dict(new_space),
        items=snapshot.live,
        sample=taken.taken,
        sample_failed=taken.failed,
        queries=counted,
        metric=metric,
        old_old=interval.get("old_old"),
        new_new=interval.get("new_new"),
        new_old=interval.get("new_old"),
        gain=interval.get("gain"),
        curves=tuple(curves),
        order=orders[0],
        items_per_second=rate,
        hours=hours,
        vector_bytes=vector_bytes,
        peak_bytes=peak_bytes,
        price=price,
        recommendation=verdict,
        seed=seed,
        created_at=time.time(),
        orders=tuple(compared),
        order_settings=dict(order_settings or {}),
        label_key=label_key,
        trained_on=0 if taken.training is None else len(taken.training),
        transforms=transforms,
    )


class _Way:
    """One strategy on one sample: fitted once, forecast with any order and merger."""

    def __init__(self, gallery: Gallery, name: str, strategy: Strategy, forecaster: Forecaster,
                 rows: np.ndarray | None, old: Space, new: Space, training: TrainingPairs | None,
                 trained: VectorTransform | None, seed: int, no_images: bool) -> None:  # fmt: skip
        self.name, self.strategy, self.transform, self._rows = name, strategy, trained, rows
        self._forecaster, self._reason = forecaster, ""
        self._queries: Any = None
        self._held: Any = None
        direction = transform_direction(strategy)
        try:
            if no_images and direction != "gallery":
                raise UpgradeError(
                    "the items have no images (no uri), so that they cannot be encoded again; only a lift works"
                )
            strategy.check(gallery, old, new)
            queries = {old.fingerprint: forecaster.paired.query_old, new.fingerprint: forecaster.paired.query_new}
            if direction is None:
                self._queries = strategy.old_part_queries(queries, old, new)
                return
            if self.transform is None:
                if training is None:
                    raise InputError("it is fitted on items that both encoders have encoded; there are none to spare")
                self.transform = strategy.fit(training, seed=seed)  # type: ignore[attr-defined]
                self._trained_on = len(training)
            if self.transform.evidence.get("usable") is False:
                raise UpgradeError(
                    str(self.transform.evidence.get("sentence") or "its map is of no use on held-out pairs")
                )
            if direction == "query":
                self._queries = strategy.old_part_queries(queries, old, new, self.transform)
            else:
                self._queries, self._held = forecaster.paired.query_new, self.transform(forecaster.paired.gallery_old)
        except BowerbirdError as exc:
            self._reason = str(exc)

    _trained_on = 0

    def curve(self, moved: np.ndarray, merger: str) -> ForecastCurve:
        if self._reason:
            return ForecastCurve(self.name, (), (), (), float("nan"), self._reason)
        registry = get_registry()
        target = registry.load(registry.get("retriever", merger, role="merger"))
        if self._rows is not None:
            moved = moved[self._rows]
        return self._forecaster.curve(
            self.name, self._queries, moved, merger=target, merger_name=merger, old_part_vectors=self._held,
            trained_on=self._trained_on,
        )  # fmt: skip


def _compare_orders(way: _Way, best: ForecastCurve, moved: Mapping[str, np.ndarray], seed: int) -> list[OrderForecast]:
    def areas(curve: ForecastCurve) -> np.ndarray:
        assert curve.values is not None
        return (np.diff(curve.shares)[:, None] * (curve.values[1:] + curve.values[:-1]) / 2).sum(axis=0)

    found = []
    for name, shares in moved.items():
        curve = way.curve(shares, best.merger)
        assert curve.area_interval is not None
        difference = paired_difference(areas(best), areas(curve), seed=seed)
        found.append(OrderForecast(name, curve.area_interval, curve.max_nfr, difference))
    return found


def _with_order(verdict: Recommendation, orders: Sequence[OrderForecast]) -> Recommendation:
    best = max(orders, key=lambda order: order.area.mean)
    usual = orders[0]
    if best is usual or best.difference.low <= 0 or best.difference.mean < CLEARLY:
        text = f" No other order is clearly better than {usual.name} (area {usual.area.mean:.4f})."
        return replace(verdict, reason=verdict.reason + text)
    text = (
        f" Order {best.name} gives the most area: {best.area.mean:.4f}, {best.difference.mean:+.4f} "
        f"[{best.difference.low:+.4f}, {best.difference.high:+.4f}] against {usual.name}."
    )
    return replace(verdict, order=best.name, reason=verdict.reason + text)


def _costs(
    curve: ForecastCurve, strategy: Strategy | None, hours: float | None, price: float | None, peak: int,
    new_bytes: int, from_images: bool,
) -> Costs | None:  # fmt: skip
    if curve.unavailable:
        return None
    if curve.name == "do-not-upgrade":
        return Costs(0.0, None if price is None else 0.0, 0, 1, False, True)
    if strategy is None:
        return Costs(hours, price, peak, 1, from_images, curve.name == "full")
    lifts = transform_direction(strategy) == "gallery"
    # After a lift queries are encoded by the new encoder alone; the lifted vectors stay until the end.
    old_too = strategy.needs_old_encoder and not lifts
    return Costs(hours, price, peak + (new_bytes if lifts else 0), 2 if old_too else 1, from_images, old_too)


def _own_first(strategy: Strategy, mergers: Sequence[str]) -> list[str]:
    own = get_registry().get("retriever", strategy.merger, role="merger").name
    return [own, *(name for name in mergers if name != own)]


def _merger_names() -> list[str]:
    return [record.name for record in get_registry().records(kind="retriever", role="merger")]


def _as_list(order: str | Sequence[str]) -> list[str]:
    names = [order] if isinstance(order, str) else list(order)
    if not names:
        raise InputError("plan needs an order of the backfill, for example core:random")
    return list(dict.fromkeys(names))


def _settings_of(order: str, settings: Mapping[str, Any] | None, *, alone: bool) -> dict[str, Any] | None:
    """Of several orders each takes the settings that it has."""
    if alone or not settings:
        return None if settings is None else dict(settings)
    registry = get_registry()
    config = registry.load_config(registry.get("retriever", order, role="order"))
    known = set() if config is None else set(config.model_fields)
    return {name: value for name, value in settings.items() if name in known}


def _has_images(gallery: Gallery) -> bool:
    return any(item.uri for item in gallery.items())


def _split(paired: PairedVectors, old: Space, new: Space, seed: int, *, fit: bool) -> Sample:
    """A given sample. Where something is fitted: disjoint halves of the items; queries of the training half are left
    out."""
    count = len(paired.gallery_old)
    everyone = np.arange(count)
    if not fit:
        return Sample(paired, everyone, paired, everyone, None, count, 0, None)
    held = np.zeros(count, bool)
    held[np.random.default_rng([seed, 1]).permutation(count)[: -(-count // 2)]] = True
    rows, rest = np.flatnonzero(held), np.flatnonzero(~held)
    labels = [paired.gallery_labels[row] for row in rest.tolist()]
    training = TrainingPairs(paired.gallery_old[rest], paired.gallery_new[rest], labels, old, new)
    asked = np.arange(len(paired.query_old))
    if paired.gallery_ids is not None and paired.query_ids is not None:
        seen = {str(paired.gallery_ids[row]) for row in rest.tolist()}
        asked = np.array([row for row in asked.tolist() if str(paired.query_ids[row]) not in seen], np.int64)
        if not len(asked):
            raise InputError(
                "every query of the sample is an item that is needed for fitting; give queries of their own"
            )
    assert paired.gallery_weights is not None
    weights = paired.gallery_weights[rows]
    weights = weights / weights.sum() * paired.gallery_weights.sum()

    def take(values: Any, at: np.ndarray) -> Any:
        return None if values is None else [values[row] for row in at.tolist()]

    def part(rows: np.ndarray, weights: np.ndarray) -> PairedVectors:
        return PairedVectors(
            paired.gallery_old[rows], paired.gallery_new[rows], paired.query_old[asked], paired.query_new[asked],
            take(paired.gallery_labels, rows), take(paired.query_labels, asked), take(paired.gallery_ids, rows),
            take(paired.query_ids, asked), weights,
        )  # fmt: skip

    everything = part(everyone, paired.gallery_weights)
    return Sample(everything, everyone, part(rows, np.maximum(weights, 1.0)), rows, training, count, 0, None)
