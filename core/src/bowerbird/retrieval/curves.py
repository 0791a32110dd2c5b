"""The backfill curve: quality while a gallery moves from old to new vectors.

An order of the N gallery items is fixed; at fraction beta the first ``floor(beta N)`` hold new vectors. Area and gain
as in FastFill (Jaeckle et al., arXiv 2303.04766).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.errors import InputError
from bowerbird.retrieval.compatibility import similarity
from bowerbird.retrieval.flips import Flips, flips
from bowerbird.retrieval.metrics import PerQuery, RankedList

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

DEFAULT_BETAS = tuple(i / 10 for i in range(11))


def num_backfilled(beta: float, n: int) -> int:
    """``floor(beta n)``; 1e-9 is added first so that 0.7 of 10 items are 7."""
    return min(n, int(np.floor(beta * n + 1e-9)))


@dataclass(frozen=True)
class BackfillState:
    """Scores of every query with every gallery item, on either side of the upgrade.

    Attributes:
        old_scores: ``(Q, N)`` while the item holds its old vector.
        new_scores: ``(Q, N)`` once it holds its new vector.
    """

    old_scores: NDArray[np.floating]
    new_scores: NDArray[np.floating]

    def __post_init__(self) -> None:
        if np.ndim(self.old_scores) != 2 or np.shape(self.old_scores) != np.shape(self.new_scores):
            raise InputError(
                f"old and new scores must have the same shape (Q, N); got {np.shape(self.old_scores)} "
                f"and {np.shape(self.new_scores)}."
            )

    @classmethod
    def from_vectors(
        cls,
        query_new: ArrayLike,
        gallery_old: ArrayLike,
        gallery_new: ArrayLike,
        *,
        query_old: ArrayLike | None = None,
        distance: str = "cosine",
    ) -> Self:
        """From vectors. Without ``query_old`` new queries search the old part too (compatible models); with it, each
        part is searched in its own space and ranks are merged by score."""
        old_side = query_new if query_old is None else query_old
        return cls(similarity(old_side, gallery_old, distance), similarity(query_new, gallery_new, distance))

    @property
    def num_items(self) -> int:
        return int(np.shape(self.old_scores)[1])


@dataclass(frozen=True)
class Curve:
    """``values[i]`` is the metric at ``betas[i]``; ``per_query`` holds the single queries where the metric gave them.

    Raises:
        InputError: Betas not increasing, or without 0 or 1; values that are not finite.
    """

    betas: Any
    values: Any
    per_query: Sequence[PerQuery] | None = None

    def __post_init__(self) -> None:
        betas, values = _betas(self.betas), np.asarray(self.values, np.float64)
        if values.shape != betas.shape:
            raise InputError(f"a curve needs one value per beta; got {values.shape} for {betas.shape}.")
        odd = ~np.isfinite(values)
        if odd.any():
            raise InputError(f"the curve is {values[odd][0]} at beta {betas[odd][0]}.")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "values", values)

    def area(self) -> float:
        """Integral over beta in 0..1 by trapezoids: the mean quality of a backfill of constant speed."""
        return float((np.diff(self.betas) * (self.values[1:] + self.values[:-1]) / 2).sum())

    def relative_gain(self, m_old: float, m_new: float | None = None) -> float:
        """``(area - M(old, old)) / (M(new, new) - M(old, old))``: 0.5 for linear improvement. ``m_new`` defaults to
        the value at beta = 1. Undefined, and NaN, unless M(new, new) is above M(old, old); only a curve that stays at
        M(old, old) all the time has gained 0."""
        room = (self.values[-1] if m_new is None else m_new) - m_old
        if room > 0:
            return float((self.area() - m_old) / room)
        return 0.0 if room == 0 and (self.values == m_old).all() else float("nan")

    def drawdown(self) -> float:
        """The deepest fall below an earlier value."""
        return float((np.maximum.accumulate(self.values) - self.values).max())

    def negative_steps(self) -> int:
        """How many steps of the grid go down."""
        return int((np.diff(self.values) < 0).sum())

    def beta_at(self, share: float = 0.9, m_start: float | None = None) -> float:
        """The first beta (linear between grid points) at which ``share`` of the final gain is reached.

        The gain is counted from ``m_start``, by default the value at beta = 0. NaN where beta = 1 brings no gain.
        """
        start = float(self.values[0] if m_start is None else m_start)
        gain = float(self.values[-1]) - start
        if gain <= 0:
            return float("nan")
        level = start + share * gain
        if share <= 1:
            level = min(level, float(self.values[-1]))  # rounding must not lift it above what is reached
        reached = np.flatnonzero(self.values >= level)
        if not len(reached):
            return float("nan")
        i = int(reached[0])
        if i == 0:
            return float(self.betas[0])
        (b0, b1), (v0, v1) = self.betas[i - 1 : i + 1], self.values[i - 1 : i + 1]
        return float(b0 + (level - v0) / (v1 - v0) * (b1 - b0))

    def regret(self, m_old: float) -> float:
        """``m(0) - M(old, old)``: negative where switching the query model on makes things worse."""
        return float(self.values[0] - m_old)

    def gap(self, m_star: float) -> float:
        """``m(1) - M(star, star)``."""
        return float(self.values[-1] - m_star)

    def flips(self, reference: PerQuery) -> list[Flips]:
        """Flips at every beta against ``reference``; the metric must be a 0/1 outcome such as ``cmc`` at one k."""
        if self.per_query is None:
            raise InputError("this curve has no values of single queries; its metric must return a PerQuery.")
        return [flips(reference, at_beta) for at_beta in self.per_query]


def backfill_curve(
    state: BackfillState,
    order: ArrayLike,
    betas: ArrayLike = DEFAULT_BETAS,
    metric: Callable[[RankedList], PerQuery | float] | None = None,
    *,
    gallery_ids: ArrayLike | None = None,
) -> Curve:
    """Evaluate ``metric`` at every fraction of the backfill.

    Args:
        state: Scores on both sides.
        order: Permutation of 0..N-1; ``order[0]`` is backfilled first.
        betas: Increasing fractions that contain 0 and 1.
        metric: Ranking -> one value per query, for example ``lambda ranked: average_precision(ranked, rel)``.
        gallery_ids: ``(N,)`` ids in the rankings; default: positions.

    Raises:
        InputError: No permutation, or a grid without 0 or 1.
    """
    if not callable(metric):
        raise InputError(f"backfill_curve needs a metric, a function of the ranking; got {metric!r}.")
    grid, n = _betas(betas), state.num_items
    permutation = np.asarray(order)
    whole = np.issubdtype(permutation.dtype, np.integer) or not permutation.size
    if permutation.shape != (n,) or not whole or not np.array_equal(np.sort(permutation), np.arange(n)):
        raise InputError(f"order must be a permutation of 0..{n - 1}, one entry per gallery item.")
    old_scores, new_scores, moved = np.asarray(state.old_scores), np.asarray(state.new_scores), 0
    scores = old_scores.astype(np.result_type(old_scores, new_scores))  # a copy that holds both without rounding
    results: list[PerQuery | float] = []
    for beta in grid:
        count = num_backfilled(float(beta), n)
        columns = permutation[moved:count].astype(np.int64)  # only what moved since the last fraction
        scores[:, columns], moved = new_scores[:, columns], count
        results.append(metric(RankedList.from_scores(scores, ids=gallery_ids)))
    kept = [r for r in results if isinstance(r, PerQuery)]
    values = [float(r) for r in results]
    return Curve(grid, values, kept if len(kept) == len(results) else None)


def _betas(betas: ArrayLike) -> NDArray[np.float64]:
    grid = np.asarray(betas, np.float64)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1 or not (np.diff(grid) > 0).all():
        raise InputError(f"betas must increase from 0 to 1, both included; got {grid.tolist()}.")
    return grid
