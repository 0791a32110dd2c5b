"""What a plan holds, and how it is saved: as JSON, as a page, as a picture."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bowerbird.errors import InputError
from bowerbird.files import write_atomically, write_json
from bowerbird.retrieval.intervals import Interval
from bowerbird.upgrade.forecast import ForecastCurve
from bowerbird.upgrade.strategies import load_strategy, transform_direction
from bowerbird.upgrade.verdict import Recommendation

if TYPE_CHECKING:
    from bowerbird.gallery.transform import VectorTransform

GIVEN_VECTORS = "given-vectors"  # fingerprint of a new space that is known by the vectors of a sample alone


@dataclass(frozen=True)
class Costs:
    """What a strategy takes.

    Attributes:
        hours: Of one worker's encoder, for the whole gallery; ``None`` where the speed is not known.
        price: ``hours`` times the price per hour.
        peak_bytes: What the gallery grows by at most until ``finish``.
        encoder_passes: Per query while the upgrade is under way.
        needs_images: Whether the items' images must be read again; not so where the new vectors are given.
        needs_old_encoder: Whether the old encoder must be at hand until the end.
    """

    hours: float | None
    price: float | None
    peak_bytes: int
    encoder_passes: int
    needs_images: bool
    needs_old_encoder: bool


@dataclass(frozen=True)
class OrderForecast:
    """What another order of the backfill gives the recommended strategy.

    Attributes:
        area: Of its curve, with its interval.
        difference: Paired difference of the area to that of the plan's own order.
    """

    name: str
    area: Interval
    max_nfr: float
    difference: Interval


@dataclass(frozen=True)
class Plan:
    """What is known before an upgrade.

    Attributes:
        old, new: The two spaces: fingerprint, encoder, dim; ``canary`` of the old one is the median cosine of stored
            items that were encoded again (``None`` where the old encoder was not given).
        items: Live items of the gallery.
        sample, sample_failed: Sampled items that were encoded, and those that could not be.
        queries: Queries that counted.
        metric: ``map``, ``map@100`` or ``r1``.
        old_old, new_new, new_old, gain: Means with 95 % intervals over the queries; ``gain`` is the paired difference
            new/new minus old/old. ``None`` without labels.
        curves: Forecasts, one for each strategy and merger; the strategies that cannot serve this pair say why.
        order: Of the forecasts. ``orders``: what others would give the recommended strategy.
        items_per_second: Of the new encoder, measured here, fetching included; ``None`` for given vectors.
        hours: Of one worker for the whole gallery.
        vector_bytes: What the new vectors take on the disk.
        peak_bytes: What the upgrade adds at most until it is finished.
        price: ``hours`` times the price per hour.
        recommendation: One, with its reason.
        trained_on: Pairs on which transforms were fitted.
        transforms: Strategy -> its transform, fitted on the training half or trained together with the new encoder;
            saved beside the plan.
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
    orders: tuple[OrderForecast, ...] = ()
    order_settings: Mapping[str, Any] = field(default_factory=dict)
    label_key: str | None = None
    trained_on: int = 0
    transforms: Mapping[str, VectorTransform] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        made: dict[str, Any] = _plain(self)
        made["transforms"] = {name: transform.fingerprint for name, transform in self.transforms.items()}
        return made

    def save(self, path: str | Path) -> None:
        """As JSON, with the fitted transforms beside it (``NAME.STRATEGY.safetensors``); or, by the ending of the path,
        as a page (``.html``) or as a picture of the curves (``.svg``)."""
        path = Path(path)
        if path.suffix.lower() in (".html", ".svg"):
            from bowerbird.upgrade.plan_page import plan_page, plan_svg

            drawn = plan_page(self) if path.suffix.lower() == ".html" else plan_svg(self)
            write_atomically(path, drawn)
            return
        for name, transform in self.transforms.items():
            transform.save(transform_file(path, name))
        write_json(path, self.to_dict())

    def next_command(self) -> str | None:
        """The command line that does what is recommended, to be run in the folder in which the plan was made.

        ``None`` where nothing is recommended, and for a new encoder that no command can load. Everything is named, so
        that it is the same wherever the plan was saved; a map that the strategy needs is fitted when it begins.
        """
        verdict, encoder = self.recommendation, str(self.new["encoder"])
        if verdict.strategy is None or encoder.startswith("black-box:") or self.new["fingerprint"] == GIVEN_VECTORS:
            return None
        if transform_direction(load_strategy(verdict.strategy)[1]) == "gallery":
            words = ["lift", self.gallery, "--to", encoder]
        else:
            order = verdict.order or self.order
            words = ["run", self.gallery, "--to", encoder, "--strategy", verdict.strategy]
            words += ["--merger", verdict.merger] if verdict.merger else []
            words += ["--order", order]
            for name, value in self.order_settings.items() if order == self.order else ():
                words += ["--set", f"{name}={json.dumps(value)}"]
            words += ["--seed", str(self.seed)] if self.seed else []
        words += ["--label-key", self.label_key] if self.label_key is not None else []
        return shlex.join(["bowerbird", "upgrade", *words])

    def curve(self, name: str, merger: str | None = None) -> ForecastCurve:
        """The curve of a strategy; with its own merger unless another one is named."""
        found = [c for c in self.curves if name in (c.name, c.name.partition(":")[2])]
        if merger is not None:
            found = [c for c in found if merger in (c.merger, c.merger.partition(":")[2])]
        if not found:
            raise InputError(f"the plan has no curve {name!r}; it has {', '.join(c.name for c in self.curves)}")
        return found[0]


def transform_file(plan_path: Path, strategy: str) -> Path:
    return plan_path.with_name(f"{plan_path.stem}.{strategy.replace(':', '-')}.safetensors")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        hidden = ("values", "transforms")
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.name not in hidden}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
