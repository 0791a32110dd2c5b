"""``plan``: whether to upgrade, by which strategy, and what it costs. Reads only.

A sample of the gallery is encoded by the new encoder; its old vectors are the stored ones. Labelled queries then
measure the old and the new system on the sample, and each strategy's curve is computed as serving would do it
(``forecast``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import BowerbirdError, InputError, UpgradeError
from bowerbird.files import write_json
from bowerbird.gallery.space import Space
from bowerbird.registry import get_registry
from bowerbird.retrieval.intervals import Interval, bootstrap_interval
from bowerbird.upgrade.canary import check_canary
from bowerbird.upgrade.forecast import ForecastCurve, Forecaster, PairedVectors
from bowerbird.upgrade.queries import QuerySet, no_label
from bowerbird.upgrade.run import order_positions
from bowerbird.upgrade.state import space_dict
from bowerbird.upgrade.strategies import load_strategy, strategy_names, switches_at_end
from bowerbird.upgrade.verdict import FEWEST_QUERIES, Recommendation, recommend

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item
    from bowerbird.upgrade.encoding import ItemEncoder


@dataclass(frozen=True)
class Plan:
    """What is known before an upgrade.

    Attributes:
        old, new: The two spaces: fingerprint, encoder, dim; ``canary`` of the old one is the median cosine of stored
            items that were encoded again (``None`` where the old encoder was not given).
        items: Live items of the gallery.
        sample, sample_failed: Sampled items that were measured, and those that could not be encoded.
        queries: Queries that counted.
        metric: ``map`` or ``r1``.
        old_old, new_new, new_old, gain: Means with 95 % intervals over the queries, on the sample; ``gain`` is the
            paired difference new/new minus old/old. ``None`` without labels.
        curves: Forecasts; the strategies that cannot serve this pair say why.
        order: Of the forecasts.
        items_per_second: Of the new encoder, measured here, fetching included; ``None`` for given vectors.
        hours: Of one worker for the whole gallery.
        vector_bytes: What the new vectors take on the disk.
        peak_bytes: What the upgrade adds at most until it is finished.
        price: ``hours`` times the price per hour.
        recommendation: One, with its reason.
    """

    gallery: str
    old: dict[str, Any]
    new: dict[str, Any]
    items: int
    sample: int
    sample_failed: int
    queries: int
    metric: str
    old_old: Interval | None
    new_new: Interval | None
    new_old: Interval | None
    gain: Interval | None
    curves: tuple[ForecastCurve, ...]
    order: str
    items_per_second: float | None
    hours: float | None
    vector_bytes: int
    peak_bytes: int
    price: float | None
    recommendation: Recommendation
    seed: int
    created_at: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return _plain(asdict(self))

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())

    def curve(self, name: str) -> ForecastCurve:
        for curve in self.curves:
            if name in (curve.name, curve.name.partition(":")[2]):
                return curve
        raise InputError(f"the plan has no curve {name!r}; it has {', '.join(c.name for c in self.curves)}")


def plan(
    gallery: Gallery,
    new: ItemEncoder | None = None,
    *,
    old_encoder: ItemEncoder | None = None,
    label_key: str | None = None,
    queries: QuerySet | None = None,
    num_queries: int = 300,
    sample: int = 1000,
    paired: PairedVectors | None = None,
    space: Space | None = None,
    strategies: Sequence[str] | None = None,
    order: str = "core:random",
    order_settings: dict[str, Any] | None = None,
    metric: str = "map",
    price_per_hour: float | None = None,
    seed: int = 0,
) -> Plan:
    """Measure, forecast, recommend. Changes nothing.

    Args:
        new: The new encoder. Without it, ``paired`` must have the vectors (an encoder known by its vectors alone).
        old_encoder: Needed for ``queries`` that are images; also proves that it is the one that filled the gallery.
        label_key: Metadata key of the items' label. Without ``queries``, sampled items are the queries, each without
            itself.
        queries: Labelled queries.
        num_queries: At most so many sampled items are queries.
        sample: Items to encode; all of them where the gallery has fewer.
        paired: A ready sample, instead of encoding one.
        space: Identity of the new space for ``paired``.
        strategies: Names of ``upgrade`` records; default: all that are installed.
        order: Of the backfill.
        metric: ``map`` or ``r1``.
        price_per_hour: Of the machine that encodes, in any currency.
        seed: Of sample, queries, order and bootstrap.

    Raises:
        UpgradeError: If an upgrade is under way, or the gallery is empty.
        SpaceError: If the old encoder does not reproduce the gallery's vectors, or the new one is the old one.
        InputError: If labels or an encoder are missing.
        UnknownNameError: If there is no such strategy or order; suggests close names.
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
        new_space = Space("given-vectors", "known by its vectors only", int(np.shape(paired.gallery_new)[1]))
    if new_space.fingerprint == old.fingerprint:
        raise UpgradeError(f"the gallery already serves space {old}; there is nothing to upgrade")
    for name in strategies or ():
        load_strategy(name)  # a wrong name is told before anything is encoded
    get_registry().get("retriever", order, role="order")
    canary = check_canary(gallery, old_encoder) if old_encoder is not None else None

    rate, failed = None, 0
    if paired is None:
        assert new is not None
        paired, rate, failed, taken = _sample(
            gallery, new, old, old_encoder, label_key, queries, num_queries, sample, seed
        )
    else:
        taken = len(paired.gallery_old)

    interval: dict[str, Interval] = {}
    curves: list[ForecastCurve] = []
    if paired is None:
        needed = FEWEST_QUERIES
        counted = 0
        verdict = Recommendation(
            "no-verdict",
            None,
            f"without labels nothing can be measured; give label_key, or at least {needed} labelled queries.",
            0,
            needed,
        )
    else:
        forecaster = Forecaster(paired, metric)
        positions = order_positions(
            order, np.arange(forecaster.items), paired.gallery_old, settings=order_settings, seed=seed
        )
        curves = [
            *(
                _strategy_curve(gallery, name, forecaster, old, new_space, positions)
                for name in strategies or strategy_names()
                if not switches_at_end(load_strategy(name)[1])
            ),
            forecaster.full(),
            forecaster.switch_now(positions),
        ]
        gain, verdict = recommend(forecaster.old_old, forecaster.new_new, curves, seed=seed)
        interval = {
            "old_old": bootstrap_interval(forecaster.old_old, seed=seed),
            "new_new": bootstrap_interval(forecaster.new_new, seed=seed),
            "new_old": bootstrap_interval(forecaster.new_old, seed=seed),
            "gain": gain,
        }
        counted = verdict.queries

    itemsize = np.dtype(gallery.storage.dtype).itemsize
    vector_bytes = snapshot.live * new_space.dim * itemsize
    hours = snapshot.live / rate / 3600 if rate else None
    return Plan(
        gallery=str(gallery.path),
        old={**space_dict(old), "canary": canary},
        new=space_dict(new_space),
        items=snapshot.live,
        sample=taken,
        sample_failed=failed,
        queries=counted,
        metric=metric,
        old_old=interval.get("old_old"),
        new_new=interval.get("new_new"),
        new_old=interval.get("new_old"),
        gain=interval.get("gain"),
        curves=tuple(curves),
        order=order,
        items_per_second=rate,
        hours=hours,
        vector_bytes=vector_bytes,
        # The old vectors are written once more in backfill order when the upgrade begins.
        peak_bytes=vector_bytes + snapshot.live * old.dim * itemsize,
        price=hours * price_per_hour if hours is not None and price_per_hour is not None else None,
        recommendation=verdict,
        seed=seed,
        created_at=time.time(),
    )


def _sample(
    gallery: Gallery,
    new: ItemEncoder,
    old: Space,
    old_encoder: ItemEncoder | None,
    label_key: str | None,
    queries: QuerySet | None,
    num_queries: int,
    sample: int,
    seed: int,
) -> tuple[PairedVectors | None, float | None, int, int]:
    """``(paired sample or None without labels, items per second, items that failed, items that were measured)``."""
    part = gallery.snapshot().new
    nums = np.sort(part.nums)
    chosen = np.sort(np.random.default_rng(seed).permutation(nums)[:sample])
    found = gallery.store.items(chosen)
    items = [found[num] for num in chosen.tolist()]
    labels = None if label_key is None else [item.metadata.get(label_key) for item in items]
    if labels is not None and all(label is None for label in labels):
        raise InputError(no_label(gallery, label_key))
    clock = _Clock()
    result = new.items(items, clock)
    rows = result.positions.tolist()
    if not rows:
        raise InputError(
            f"none of the {len(items)} sampled items can be encoded, the first: {next(iter(result.failures.values()))}"
        )
    if labels is None:
        return None, clock.rate, len(result.failures), len(rows)
    kept_labels = [_label(labels[row], items[row]) for row in rows]
    ids = [items[row].id for row in rows]
    old_vectors = part.vectors_of(chosen[result.positions])
    if queries is None:
        asked = [row for row, position in enumerate(rows) if labels[position] is not None][:num_queries]
        asked_set = QuerySet(
            [kept_labels[r] for r in asked], None, [ids[r] for r in asked], old_vectors[asked], result.vectors[asked]
        )
    else:
        if queries.labels is None:
            raise InputError("plan needs labelled queries; this query set has no labels")
        asked_set = queries.encode(gallery, old, new, old_encoder)
    assert asked_set.labels is not None
    paired = PairedVectors(
        old_vectors, result.vectors, asked_set.old, asked_set.new, kept_labels, asked_set.labels, ids, asked_set.ids
    )
    return paired, clock.rate, len(result.failures), len(rows)


def _label(label: Any, item: Item) -> str:
    """An item without a label is a distractor: relevant to no query."""
    return str(label) if label is not None else f"no label {item.num}"


def _strategy_curve(
    gallery: Gallery, name: str, forecaster: Forecaster, old: Space, new: Space, order: np.ndarray
) -> ForecastCurve:
    try:
        full_name, strategy = load_strategy(name)
        strategy.check(gallery, old, new)
        queries = {old.fingerprint: forecaster.paired.query_old, new.fingerprint: forecaster.paired.query_new}
        registry = get_registry()
        merger = registry.load(registry.get("retriever", strategy.merger, role="merger"))
        rescale = getattr(merger, "rescale", None)
        return forecaster.curve(full_name, strategy.old_part_queries(queries, old, new), order, rescale=rescale)
    except BowerbirdError as exc:
        return ForecastCurve(name, (), (), (), float("nan"), str(exc))


class _Clock:
    """Items per second over the batches after the first, which pays for warming up; over a single one if need be."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.counts = [0]

    def __call__(self, count: int) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(count)

    @property
    def rate(self) -> float | None:
        first = 1 if len(self.times) > 2 else 0
        items, seconds = sum(self.counts[first + 1 :]), self.times[-1] - self.times[first]
        return items / seconds if items and seconds > 0 else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
