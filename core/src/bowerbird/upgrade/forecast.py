"""What a strategy would give, before anything is changed: curves of quality and flips over the share of moved items.

Works on arrays only, so that it serves encoders that are known by their vectors alone. The curve of a strategy at share
``b`` is computed exactly as serving would: the first ``floor(b N)`` items of the order are searched with new queries in
the new space, the others with the strategy's queries in the old space, and the two lists are merged by distance.

Shapes: Q queries, N gallery items of the sample, Do and Dn widths of the two spaces, S shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bowerbird.errors import DataError, InputError
from bowerbird.retrieval.compatibility import similarity
from bowerbird.retrieval.curves import DEFAULT_BETAS, BackfillState, backfill_curve
from bowerbird.retrieval.flips import flips
from bowerbird.retrieval.index import unit_rows
from bowerbird.retrieval.metrics import PerQuery, RankedList, Relevance, average_precision, cmc
from bowerbird.upgrade.strategies import match_width

METRICS = ("map", "r1")


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

    def __post_init__(self) -> None:
        for name in ("gallery_old", "gallery_new", "query_old", "query_new"):
            object.__setattr__(self, name, _checked(getattr(self, name), name))
        for side in ("gallery", "query"):
            rows = len(getattr(self, f"{side}_old"))
            for name in (f"{side}_new", f"{side}_labels", f"{side}_ids"):
                value = getattr(self, name)
                if value is not None and len(value) != rows:
                    raise DataError(f"{name} has {len(value)} rows, {side}_old has {rows}: they do not pair")
        for version in ("old", "new"):
            widths = [getattr(self, f"{side}_{version}").shape[1] for side in ("gallery", "query")]
            if widths[0] != widths[1]:
                raise DataError(
                    f"the {version} gallery vectors have width {widths[0]}, the {version} queries {widths[1]}"
                )

    def relevance(self) -> Relevance:
        """Same label = relevant. Rankings use positions in the gallery."""
        known = self.query_ids is not None and self.gallery_ids is not None
        return Relevance.from_labels(
            np.array([str(label) for label in self.query_labels]),
            np.array([str(label) for label in self.gallery_labels]),
            query_ids=np.asarray(self.query_ids, str) if known else None,
            gallery_ids=np.asarray(self.gallery_ids, str) if known else None,
        )


@dataclass(frozen=True)
class ForecastCurve:
    """The forecast of one strategy.

    Attributes:
        name: Of the strategy; also ``full`` (switch at the end) and ``switch-now`` (new queries on old vectors).
        shares: ``(S,)`` ascending, from 0 to 1.
        quality: ``(S,)``, mean over the valid queries.
        nfr: ``(S,)``, share of the queries that were right at rank 1 under the old system and are wrong at this share.
        area: Integral of ``quality`` over the share.
        unavailable: Empty, or why the strategy cannot serve this pair in the gallery as it is.
    """

    name: str
    shares: tuple[float, ...]
    quality: tuple[float, ...]
    nfr: tuple[float, ...]
    area: float
    unavailable: str = ""

    @property
    def max_nfr(self) -> float:
        return max(self.nfr)

    @property
    def start(self) -> float:
        return self.quality[0]

    @property
    def end(self) -> float:
        return self.quality[-1]


class Forecaster:
    """Curves of several strategies over one sample; what they share is computed once.

    Args:
        paired: The sample.
        metric: ``map`` (mean average precision) or ``r1`` (recall at rank 1).

    Attributes:
        old_old, new_new, new_old: Quality of each query, with queries by the first and gallery by the second encoder.
            ``new_old`` compares unrelated spaces unless the new encoder was trained for the old one.
    """

    def __init__(self, paired: PairedVectors, metric: str = "map") -> None:
        if metric not in METRICS:
            raise InputError(f"metric is {metric!r}; known: {', '.join(METRICS)}")
        self.paired, self.metric = paired, metric
        self.items = len(paired.gallery_old)
        self._relevance = paired.relevance()
        self._new_scores = similarity(paired.query_new, paired.gallery_new)
        self._mixed_queries = match_width(paired.query_new, paired.gallery_old.shape[1])
        old_scores = similarity(paired.query_old, paired.gallery_old)
        self.old_old, self._right_before = self._measure(RankedList.from_scores(old_scores))
        self.new_new, self._right_after = self._measure(RankedList.from_scores(self._new_scores))
        mixed_scores = similarity(self._mixed_queries, paired.gallery_old)
        self.new_old, _ = self._measure(RankedList.from_scores(mixed_scores))

    def curve(
        self,
        name: str,
        old_part_queries: np.ndarray,
        order: np.ndarray,
        shares: Sequence[float] = DEFAULT_BETAS,
        *,
        rescale: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> ForecastCurve:
        """The curve of a strategy that searches the old part with ``old_part_queries`` ``(Q, Do)``.

        Args:
            name: Of the strategy.
            order: Permutation of 0..N-1: what is moved first stands first.
            shares: Ascending, from 0 to 1.
            rescale: Of the strategy's merger, where it brings distances to one scale. The whole sample is the
                background here; serving has the part of it that is old, or new, at that moment.
        """
        old_scores, new_scores = similarity(old_part_queries, self.paired.gallery_old), self._new_scores
        if rescale is not None:
            old_scores, new_scores = (-rescale(1 - scores, 1 - scores) for scores in (old_scores, new_scores))
        state = BackfillState(old_scores, new_scores)
        nfr: list[float] = []

        def metric(ranking: RankedList) -> PerQuery:
            quality, right = self._measure(ranking)
            nfr.append(flips(self._right_before, right).nfr)
            return quality

        curve = backfill_curve(state, order, shares, metric)
        return ForecastCurve(name, tuple(shares), tuple(curve.values.tolist()), tuple(nfr), curve.area())

    def switch_now(self, order: np.ndarray, shares: Sequence[float] = DEFAULT_BETAS) -> ForecastCurve:
        """New queries on one mixed index at once, whatever the two spaces have to do with each other."""
        return self.curve("switch-now", self._mixed_queries, order, shares)

    def full(self, shares: Sequence[float] = DEFAULT_BETAS) -> ForecastCurve:
        """The old system until every item is done, then the new one."""
        old, new = self.old_old.mean(), self.new_new.mean()
        nfr = flips(self._right_before, self._right_after).nfr
        before = len(shares) - 1
        # The step is at 1 exactly, so that the area is that of the old level and not of a ramp on the last interval.
        return ForecastCurve("full", tuple(shares), (old,) * before + (new,), (0.0,) * before + (nfr,), old)

    def _measure(self, ranking: RankedList) -> tuple[PerQuery, PerQuery]:
        """``(quality, right at rank 1)`` of each query."""
        # The first two are enough to know the first result, also where the very first is the query itself.
        right = cmc(RankedList(ranking.ids[:, :2], ranking.scores[:, :2]), self._relevance, 1)
        return (right if self.metric == "r1" else average_precision(ranking, self._relevance)), right


def _checked(vectors: Any, name: str) -> np.ndarray:
    array = np.asarray(vectors, np.float32)
    if array.ndim != 2 or not len(array):
        raise DataError(f"{name} must have shape (rows, width) with at least one row, got {array.shape}")
    return unit_rows(array, what=name)
