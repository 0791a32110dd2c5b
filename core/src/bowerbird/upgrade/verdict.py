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
NO_REGRET = 0.01  # how far below the old level a curve may fall and still be recommended


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


def recommend(
    old: PerQuery, new: PerQuery, curves: Sequence[ForecastCurve], *, seed: int = 0
) -> tuple[Interval, Recommendation]:
    """``(paired difference new - old, recommendation)``.

    Args:
        old: Quality of each query under the old system.
        new: The same queries under the new one.
        curves: Forecasts; those with ``unavailable`` set, ``full``, ``do-not-upgrade`` and ``switch-now`` are not
            recommended unless nothing else is left, and then ``full``.
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

    old_level = old.mean()
    usable = [c for c in curves if not c.unavailable and c.name not in ("full", "switch-now", "do-not-upgrade")]
    safe = [c for c in usable if min(c.quality) >= old_level - NO_REGRET]
    if not safe:
        reason = (
            f"new/new minus old/old is {gain}, but no strategy that is installed and can serve this pair keeps the "
            "old level on the way. Encode everything into a second gallery, then switch."
        )
        return interval, Recommendation("upgrade", "full", reason, count)
    best = max(safe, key=lambda c: (round(c.area, 3), -c.max_nfr))
    merged = f" merged by {best.merger}" if best.merger else ""
    reason = (
        f"new/new minus old/old is {gain}; {best.name}{merged} never falls below the old level, has the largest area "
        f"({best.area:.4f}; waiting until the end gives {old_level:.4f}) and at most {best.max_nfr:.1%} negative flips."
    )
    return interval, Recommendation("upgrade", best.name, reason, count, merger=best.merger)
