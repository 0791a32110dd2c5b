"""A plan as a page, or as a picture of its curves. Needs the extra ``[report]``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bowerbird.report import Series, line_chart, render_page, themed
from bowerbird.upgrade.tables import (
    METRIC_NAMES,
    by_gain,
    bytes_text,
    hours_text,
    is_recommended,
    own_old_level,
    precision_text,
    price_text,
    rate_text,
    unique_names,
)
from bowerbird.upgrade.verdict import short_name

if TYPE_CHECKING:
    from bowerbird.upgrade.forecast import ForecastCurve
    from bowerbird.upgrade.plan_record import Plan

RECOMMENDED = "blue"  # of no other line
COLORS = ("red", "green", "purple", "orange", "sky")  # of the other strategies
MARKERS = "s^Dv*PX"
REFERENCES = {"full": "black", "switch-now": "grey"}  # what is done without any strategy


def plan_svg(plan: Plan, *, in_page: bool = False) -> str:
    """The forecast curves: of each strategy the one with the best area, between the levels of the old and new model.

    The recommended one comes first, is thicker and has the band of its difference to the old model. On white, as a file
    of its own; ``in_page``: in the colours of the page around it.
    """
    metric = METRIC_NAMES[plan.metric]
    levels = {}
    if plan.old_old is not None and plan.new_new is not None:
        levels = {"old model": plan.old_old.mean, "new model": plan.new_new.mean}
    svg = line_chart(
        _series(plan), xlabel="% of the gallery re-encoded", ylabel=f"{metric} (0 to 1, more is better)",
        title=f"Forecast of {metric} while items move, order {short_name(plan.order)}",
        levels=levels, ident="plan", size=(8.4, 5.2), legend_below=True, background=None if in_page else "white",
    )  # fmt: skip
    return themed(svg) if in_page else svg


def plan_page(plan: Plan) -> str:
    """One self-contained HTML page: recommendation, what to run, what was measured, curves, table, costs."""
    return render_page(
        "plan.html.j2",
        {
            "plan": plan,
            "metric": METRIC_NAMES[plan.metric],
            "made": time.strftime("%Y-%m-%d %H:%M", time.localtime(plan.created_at)),
            "command": plan.next_command(),
            "chart": plan_svg(plan, in_page=True) if plan.old_old is not None else "",
            "band": any(curve.differences for curve in plan.curves),
            "name_of": unique_names([curve.name for curve in plan.curves]),
            "merger_of": unique_names([curve.merger for curve in plan.curves]),
            "curves": sorted(
                (curve for curve in plan.curves if not curve.unavailable),
                key=lambda curve: (by_gain(curve), not is_recommended(plan, curve)),
            ),
            "is_best": lambda curve: is_recommended(plan, curve),
            "refused": [curve for curve in plan.curves if curve.unavailable],
            "fitted": next((curve for curve in plan.curves if curve.trained_on), None),
            "precision": precision_text(plan),
            "bytes_text": bytes_text,
            "hours_text": hours_text,
            "price_text": price_text,
            "rate_text": rate_text,
            "own_old_level": own_old_level,
            "short_name": short_name,
        },
    )


def best_curves(plan: Plan) -> list[ForecastCurve]:
    """One curve per name, the recommended one first: of each the recommended merger's, else the one with the largest
    area. Not ``do-not-upgrade``, which is the level of the old model."""
    verdict = plan.recommendation
    best: dict[str, ForecastCurve] = {}
    for curve in plan.curves:
        if curve.unavailable or curve.name == "do-not-upgrade":
            continue
        chosen = (curve.name, curve.merger) == (verdict.strategy, verdict.merger)
        if chosen or curve.name not in best or (curve.area > best[curve.name].area and curve.name != verdict.strategy):
            best[curve.name] = curve
    return sorted(best.values(), key=lambda curve: curve.name != verdict.strategy)


def _series(plan: Plan) -> list[Series]:
    shown = best_curves(plan)
    name_of = unique_names([curve.name for curve in plan.curves])
    made: list[Series] = []
    others = 0
    for curve in shown:
        recommended, reference = curve.name == plan.recommendation.strategy, REFERENCES.get(curve.name)
        label = name_of[curve.name] + ("*" if curve.trained_on else "")
        label += f", {short_name(curve.merger)}" if curve.merger else ""
        if curve.name == "full":
            label += ": wait, then switch"
        old = own_old_level(curve)
        band = curve.differences if old is not None else ()
        made.append(
            Series(
                label + (" (recommended)" if recommended else ""),
                [100 * share for share in curve.shares],
                curve.quality,
                color=RECOMMENDED if recommended else reference or COLORS[others % len(COLORS)],
                # What waits has a value for the whole way and another at its very end, and nothing at the shares.
                marker="" if curve.name == "full" else "o" if recommended else MARKERS[others % len(MARKERS)],
                dashed=reference is not None and not recommended,
                low=[old + one.low for one in band] if band and old is not None else None,
                high=[old + one.high for one in band] if band and old is not None else None,
                step=curve.name == "full",
                width=3.0 if recommended else 1.5,
            )
        )
        others += not recommended
    return made
