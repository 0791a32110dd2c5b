"""A plan as a page, or as a picture of its curves. Needs the extra ``[report]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bowerbird.report import Series, line_chart, render_page
from bowerbird.report.charts import PALETTE
from bowerbird.upgrade.tables import METRIC_NAMES, bytes_text

if TYPE_CHECKING:
    from bowerbird.upgrade.forecast import ForecastCurve
    from bowerbird.upgrade.plan_record import Plan

MARKERS = "os^Dv*PX"


def plan_svg(plan: Plan) -> str:
    """The forecast curves: of each strategy the one with the best area, and the levels of the old and new system."""
    shown = best_curves(plan)
    colors = list(PALETTE)
    series = [
        Series(
            curve.name + (f", {curve.merger.partition(':')[2]}" if curve.merger else ""),
            [100 * share for share in curve.shares],
            curve.quality,
            color=colors[number % len(colors)],
            marker=MARKERS[number % len(MARKERS)],
            dashed=curve.name in ("full", "do-not-upgrade", "switch-now"),
        )
        for number, curve in enumerate(shown)
    ]
    levels = {} if plan.old_old is None or plan.new_new is None else {
        "old": plan.old_old.mean, "new": plan.new_new.mean
    }  # fmt: skip
    metric = METRIC_NAMES[plan.metric]
    return line_chart(
        series, xlabel="% of the gallery re-encoded", ylabel=metric, title=f"Forecast, order {plan.order}",
        levels=levels, ident="plan", size=(8.4, 4.8),
    )  # fmt: skip


def plan_page(plan: Plan) -> str:
    """One self-contained HTML page: recommendation, curves, table, costs."""
    return render_page(
        "plan.html.j2",
        {
            "plan": plan,
            "metric": METRIC_NAMES[plan.metric],
            "disk": bytes_text(plan.peak_bytes),
            "chart": plan_svg(plan) if plan.old_old is not None else "",
            "curves": [curve for curve in plan.curves if not curve.unavailable],
            "refused": [curve for curve in plan.curves if curve.unavailable],
        },
    )


def best_curves(plan: Plan) -> list[ForecastCurve]:
    """One curve per name: the recommended merger's, else the one with the largest area."""
    best: dict[str, ForecastCurve] = {}
    for curve in plan.curves:
        if curve.unavailable:
            continue
        chosen = (curve.name, curve.merger) == (plan.recommendation.strategy, plan.recommendation.merger)
        if chosen or curve.name not in best or (
            curve.area > best[curve.name].area and curve.name != plan.recommendation.strategy
        ):  # fmt: skip
            best[curve.name] = curve
    return list(best.values())
