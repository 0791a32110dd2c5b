"""From measurements to one recommendation with its reason.

All differences are paired: the same queries under both systems. Shapes: Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bowerbird.retrieval.intervals import Interval, paired_difference
from bowerbird.retrieval.metrics import PerQuery
from bowerbird.upgrade.forecast import ForecastCurve

FEWEST_QUERIES = 30  # below this a bootstrap interval is not worth showing as a verdict
SMALLEST_GAIN = 0.01  # the difference in quality that a larger sample should be able to settle
NO_REGRET = 0.01  # a curve that is shown to fall further below the old level is unsafe
LARGE_DIP = 0.03  # and so is one that seems to fall so far, though the queries are too few to show it
PRECISE = 0.03  # a forecast area is promised to be within this of what other queries will measure, given enough queries
SAME = 0.005  # areas that differ by less are settled by flips


@dataclass(frozen=True)
class Recommendation:
    """What to do.

    Attributes:
        decision: ``upgrade``, ``do-not-upgrade`` or ``no-verdict``.
        strategy: The strategy to use; ``None`` unless the decision is ``upgrade``.
        reason: One or two sentences with the numbers that decided.
        queries: Number of queries that counted.
        queries_needed: How many would settle the question, or ``None`` where these were enough.
        merger, order: To use with the strategy; empty where none is recommended.
    """

    decision: str
    strategy: str | None
    reason: str
    queries: int
    queries_needed: int | None = None
    merger: str = ""
    order: str = ""


def queries_needed(differences: np.ndarray, *, gain: float = SMALLEST_GAIN) -> int:
    """Queries for which a difference of ``max(|mean|, gain)`` is found with 80 % power at the two-sided 5 % level."""
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 1.0
    target = max(abs(float(np.mean(differences))), gain) if len(differences) else gain
    return max(FEWEST_QUERIES, math.ceil(((1.96 + 0.84) * spread / target) ** 2))


def queries_for_precision(interval: Interval, queries: int, *, within: float = PRECISE) -> int | None:
    """Queries with which half of the interval's width would be ``within``; ``None`` where it is now."""
    half = (interval.high - interval.low) / 2
    return None if half <= within else math.ceil(queries * (half / within) ** 2)


def recommend(
    old: PerQuery, new: PerQuery, curves: Sequence[ForecastCurve], *, order: str = "", seed: int = 0
) -> tuple[Interval, Recommendation]:
    """``(paired difference new - old, recommendation)``.

    Args:
        old: Quality of each query under the old system.
        new: The same queries under the new one.
        curves: Forecasts; those with ``unavailable`` set, ``full``, ``do-not-upgrade`` and ``switch-now`` are not
            recommended unless nothing else is left, and then ``full``.
        order: Of the backfill in the forecasts.

    A strategy is unsafe where the interval of (quality at its worst share minus old level), paired by query, lies below
    ``-NO_REGRET``, or the difference itself is below ``-LARGE_DIP`` and the queries are too few to tell. Of the others
    the one with the largest area over the old level is recommended; within ``SAME`` the one with fewer flips; ``full``
    where none has a larger area than waiting until the end.
    """
    interval = paired_difference(old, new, seed=seed)
    differences = (new.values - old.values)[old.valid & new.valid]
    count = len(differences)
    gain = f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    needed = queries_needed(differences)
    if count < FEWEST_QUERIES:
        return interval, Recommendation(
            "no-verdict",
            None,
            f"{count} labelled queries are too few for a verdict; about {needed} are needed.",
            count,
            needed,
        )
    if interval.high < 0:
        reason = f"the new encoder is worse on these queries: new/new minus old/old is {gain}."
        return interval, Recommendation("do-not-upgrade", None, reason, count)
    if interval.low <= 0:
        if interval.high < SMALLEST_GAIN:
            reason = f"the new encoder gains less than {SMALLEST_GAIN}: new/new minus old/old is {gain}."
            return interval, Recommendation("do-not-upgrade", None, reason, count)
        reason = (
            f"no gain is shown: new/new minus old/old is {gain}, which contains 0. "
            f"About {max(needed, count + 1)} labelled queries would settle it."
        )
        return interval, Recommendation("do-not-upgrade", None, reason, count, max(needed, count + 1))

    usable = [c for c in curves if not c.unavailable and c.name not in ("full", "switch-now", "do-not-upgrade")]
    safe = [c for c in usable if _unsafe(c) is None]
    begins = f"new/new minus old/old is {gain}"
    if not safe:
        least = max(usable, key=lambda c: _over(c.dip), default=None)
        why = "none of the strategies that were asked for is possible for this pair" if least is None else (
            f"every strategy falls below the old level on the way, {_called(least)} least: {_unsafe(least)}"
        )  # fmt: skip
        reason = f"{begins}, but {why}. Encode everything, then switch."
        return interval, Recommendation("upgrade", "full", reason, count)
    most = max(_over(c.gain) for c in safe)
    best = min((c for c in safe if _over(c.gain) >= most - SAME), key=lambda c: (c.max_nfr, -_over(c.gain)))
    if most <= 0:
        reason = (
            f"{begins}, but no strategy is better on the way than waiting until the end; {_called(best)} comes "
            f"closest, with an area of {_signed(best.gain)} over the old level. Encode everything, then switch."
        )
        return interval, Recommendation("upgrade", "full", reason, count)
    assert best.gain is not None
    doubt = "" if best.gain.low > 0 else ", which these queries do not show for certain"
    ordered = f", order {short_name(order)}" if order else ""
    reason = (
        f"{begins}. {_called(best)}{ordered}: area {best.area:.4f}, {_signed(best.gain)} over waiting until the end"
        f"{doubt}; at its worst ({best.worst_share:.0%} moved) {_signed(best.dip)} against the old level; at most "
        f"{best.max_nfr:.1%} negative flips."
    )
    return interval, Recommendation("upgrade", best.name, reason, count, merger=best.merger, order=order)


def short_name(name: str) -> str:
    """``rank-merge`` for ``compat:rank-merge``."""
    return name.partition(":")[2] or name


def _called(curve: ForecastCurve) -> str:
    return short_name(curve.name) + (f" merged by {short_name(curve.merger)}" if curve.merger else "")


def _over(interval: Interval | None) -> float:
    """Of a curve that a ``Forecaster`` made."""
    assert interval is not None
    return interval.mean


def _signed(interval: Interval | None) -> str:
    assert interval is not None
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _unsafe(curve: ForecastCurve) -> str | None:
    """Why the curve must not be relied on, or ``None``."""
    assert curve.dip is not None
    at = f"{_signed(curve.dip)} at {curve.worst_share:.0%} moved"
    if curve.dip.high < -NO_REGRET:
        return at
    if curve.dip.mean < -LARGE_DIP:
        return f"{at}, which more queries might clear"
    return None
