"""How the command line shows a plan, a status and measurements."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bowerbird.upgrade.verdict import PRECISE, queries_for_precision, short_name

if TYPE_CHECKING:
    from bowerbird.retrieval.intervals import Interval
    from bowerbird.upgrade.forecast import ForecastCurve
    from bowerbird.upgrade.plan_record import Plan
    from bowerbird.upgrade.state import UpgradeStatus
    from bowerbird.upgrade.verdict import Recommendation
    from bowerbird.upgrade.watch import WatchEntry

METRIC_NAMES = {"map": "mAP", "map@100": "mAP@100", "r1": "R@1"}
SHOWN_SHARES = (0.0, 0.2, 0.5, 0.8, 1.0)
WIDTH = 120  # of the widest table; a narrower terminal breaks its lines, and cuts nothing


def show(*parts: RenderableType) -> None:
    """To standard output, at least ``WIDTH`` characters wide."""
    console = Console(highlight=False)
    Console(highlight=False, width=max(console.width, WIDTH)).print(Group(*parts))


def plan_table(plan: Plan) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    for name, space in (("old", plan.old), ("new", plan.new)):
        facts.add_row(name, f"{space['encoder']}", f"{space['dim']}-d", f"fingerprint {space['fingerprint'][:12]}")
    canary = plan.old["canary"]
    facts.add_row(
        "canary",
        "not checked" if canary is None else f"median cosine {canary:.4f}",
        "",
        "old encoder against stored vectors",
    )
    failed = f", {plan.sample_failed} could not be encoded" if plan.sample_failed else ""
    facts.add_row("sample", f"{plan.sample} of {plan.items} items{failed}", "", f"{plan.queries} queries")
    if plan.items_per_second is not None and plan.hours is not None:
        rate = f"{rate_text(plan.items_per_second)} items/s measured here"
        facts.add_row("time", f"{hours_text(plan.hours)} for one worker", "", rate)
    new, peak = bytes_text(plan.vector_bytes), bytes_text(plan.peak_bytes)
    facts.add_row("disk", f"{new} new vectors", "", f"at most {peak} until finish")
    if plan.price is not None:
        facts.add_row("price", price_text(plan.price), "", "in the currency of --price-per-hour")
    parts: list[RenderableType] = [facts, Text()]

    metric = METRIC_NAMES[plan.metric]
    if plan.old_old is not None:
        quality = Table(title=f"{metric} on the sample, 95 % interval", title_justify="left")
        for column in ("queries/gallery", metric, "low", "high"):
            quality.add_column(column, justify="left" if column == "queries/gallery" else "right")
        rows: tuple[tuple[str, Interval | None], ...] = (
            ("old/old", plan.old_old),
            ("new/new", plan.new_new),
            ("new/old", plan.new_old),
            ("gain (paired)", plan.gain),
        )
        for name, interval in rows:
            if interval is not None:
                quality.add_row(name, f"{interval.mean:.4f}", f"{interval.low:.4f}", f"{interval.high:.4f}")
        title = f"forecast of {metric} by share of moved items, order {short_name(plan.order)}"
        curves = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("strategy", "merger"):
            curves.add_column(column, no_wrap=True)
        for column in (*(f"{share:.0%}" for share in SHOWN_SHARES), "area", "over waiting, 95 %", "flips", "passes"):
            curves.add_column(column, justify="right", no_wrap=True)
        name_of = unique_names([curve.name for curve in plan.curves])
        merger_of = unique_names([curve.merger for curve in plan.curves])
        refused = [
            Text(f"not possible: {name_of[curve.name]}: {_first_sentence(curve.unavailable)}", style="dim")
            for curve in plan.curves
            if curve.unavailable
        ]
        for curve in sorted((c for c in plan.curves if not c.unavailable), key=by_gain):
            values = dict(zip(curve.shares, curve.quality, strict=True))
            shown = [f"{values[share]:.3f}" if share in values else "" for share in SHOWN_SHARES]
            best = is_recommended(plan, curve)
            gain = curve.gain
            curves.add_row(
                name_of[curve.name] + ("*" if curve.trained_on else ""),
                merger_of[curve.merger],
                *shown,
                f"{curve.area:.3f}",
                "" if gain is None or not curve.merger else f"{gain.mean:+.3f} {gain.low:+.3f}..{gain.high:+.3f}",
                f"{curve.max_nfr:.1%}",
                "" if curve.costs is None else str(curve.costs.encoder_passes),
                style="bold" if best else None,
            )
        precision = [Text(text, style="dim") for text in [precision_text(plan)] if text]
        parts += [quality, Text(), curves, *precision, *refused, Text()]
        fitted = next((curve for curve in plan.curves if curve.trained_on), None)
        if fitted is not None:
            level = own_old_level(fitted)
            alone = "" if level is None else f", on which the old model has {metric} {level:.3f}"
            parts += [Text(f"* fitted on {plan.trained_on} items, forecast on the other {fitted.items}{alone}"), Text()]
        if plan.orders:
            orders = Table(title=f"orders of the backfill, {plan.recommendation.strategy}", title_justify="left")
            for column in ("order", "area", "against the first", "worst flips"):
                orders.add_column(column, justify="left" if column == "order" else "right")
            for order in plan.orders:
                change = order.difference
                orders.add_row(
                    order.name,
                    f"{order.area.mean:.4f}",
                    "" if order is plan.orders[0] else f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]",
                    f"{order.max_nfr:.1%}",
                )
            parts += [orders, Text()]
    verdict = plan.recommendation
    headline = {
        "upgrade": f"upgrade by {_how(verdict)}",
        "do-not-upgrade": "do not upgrade",
        "no-verdict": "no verdict",
    }
    parts.append(Text(f"Recommendation: {headline[verdict.decision]}", style="bold"))
    parts.append(Text(verdict.reason))
    return Group(*parts)


def is_recommended(plan: Plan, curve: ForecastCurve) -> bool:
    verdict = plan.recommendation
    if verdict.decision == "do-not-upgrade":
        return curve.name == verdict.decision
    return (curve.name, curve.merger) == (verdict.strategy, verdict.merger)


def own_old_level(curve: ForecastCurve) -> float | None:
    """The old level on the curve's own items: those that are not for fitting, where something is fitted."""
    return None if curve.gain is None else curve.area - curve.gain.mean


def precision_text(plan: Plan) -> str:
    """How far the areas can be off for want of queries; empty where there are enough."""
    widest = max(
        (curve.area_interval for curve in plan.curves if curve.area_interval is not None),
        key=lambda interval: interval.high - interval.low,
        default=None,
    )
    needed = None if widest is None else queries_for_precision(widest, plan.queries)
    if widest is None or needed is None:
        return ""
    half = (widest.high - widest.low) / 2
    return f"{plan.queries} queries tell an area to +-{half:.3f}; about {needed} would tell it to +-{PRECISE}"


def unique_names(names: Sequence[str]) -> dict[str, str]:
    """Each name without the plugin before its colon, where that leaves no two alike."""
    short = {name: short_name(name) for name in names}
    seen = list(short.values())
    return {name: cut if seen.count(cut) == 1 else name for name, cut in short.items()}


def by_gain(curve: ForecastCurve) -> float:
    """Sorts curves by what they are worth: best over waiting first."""
    return -round(curve.area if curve.gain is None else curve.gain.mean, 9)  # ties stay as they were


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?]) |, and ", text, maxsplit=1)[0].rstrip(".;")


def _how(verdict: Recommendation) -> str:
    with_merger = f", merger {short_name(verdict.merger)}" if verdict.merger else ""
    return f"{short_name(verdict.strategy or '')}{with_merger}"


def status_text(status: UpgradeStatus) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("upgrade", f"{status.id}, {status.state}{', every task done' if status.complete else ''}")
    for name, space in (("from", status.old), ("to", status.new)):
        facts.add_row(name, f"{space['encoder']} ({space['dim']}-d, {space['fingerprint'][:12]})")
    facts.add_row("strategy", f"{status.strategy}, merger {status.merger}, order {status.order}")
    facts.add_row("moved", f"{status.new_items} of {status.items} items ({status.share:.1%})")
    if status.covered:
        facts.add_row("on top of", f"{status.covered} other upgrade{'s' * (status.covered > 1)}; items by space:")
        for part in status.parts:
            facts.add_row("", f"{part['items']:>10} {part['encoder']} ({part['dim']}-d, {part['fingerprint'][:12]})")
    for item, attempts, error in status.failures[:10]:
        facts.add_row("failed", f"{item} ({attempts} of 3 attempts): {error}")
    if len(status.failures) > 10:
        facts.add_row("", f"and {len(status.failures) - 10} more")
    return facts


def watch_table(entries: Sequence[WatchEntry | dict[str, Any]]) -> RenderableType:
    rows = [entry if isinstance(entry, dict) else entry.to_dict() for entry in entries]
    unlabelled = all(row["r1"] is None for row in rows)
    caption = (
        "flips and churn: against the old system's frozen results\n"
        "d: median distance of the nearest old and of the nearest new item"
    )
    if unlabelled:
        caption += "\nqueries without labels: every first result that changed counts as a negative flip"
    table = Table(caption=caption, caption_justify="left")
    for column in ("moved", "mAP@100", "R@1", "negative flips", "positive flips", "churn@10", "d(old)", "d(new)", ""):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            f"{row['share']:.1%}",
            *("-" if row[key] is None else f"{row[key]:.4f}" for key in ("quality", "r1")),
            *(f"{row[key]:.2%}" for key in ("nfr", "pfr", "churn")),
            *(f"{row[key][1]:.3f}" if row[key] else "-" for key in ("old_distances", "new_distances")),
            "paused" if row["stopped"] else "",
        )
    return table


def hours_text(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:.1f} h"


def rate_text(rate: float) -> str:
    return f"{rate:.1f}" if rate < 100 else f"{rate:.0f}"


def price_text(price: float) -> str:
    return "less than 0.01" if 0 < price < 0.01 else f"{price:.2f}"


def bytes_text(count: int) -> str:
    value, unit = float(count), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, bigger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
