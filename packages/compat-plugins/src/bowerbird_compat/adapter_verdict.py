"""What a map between two spaces is worth, measured on pairs that it was not fitted on.

A map has one of two uses. ``query``: new queries are brought into the old space, and search old vectors. ``gallery``:
stored old vectors are lifted into the new space, and new queries search them. Either way the answer is held against
what the true vectors of the target space would have found.

Labels say what is right; without them the lists of the target system itself are the reference. No torch.

N pairs, Di and Do widths of source and target, Q queries among the pairs, k results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bowerbird.errors import InputError, SpaceError
from bowerbird.gallery.transform import VectorTransform
from bowerbird.retrieval.intervals import bootstrap_interval
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision
from bowerbird_compat.adapter_maps import unit

Direction = Literal["query", "gallery"]
Level = Literal["good", "usable with loss", "not usable", "undecided"]

MIN_HELD_OUT = 10  # pairs below which nothing at all can be said
WIDTH = 0.05  # half of the interval that a verdict should have
UNRELATED = 1.5  # an overlap of up to that many times what chance finds says that nothing relates the two sides
# Of the share that is kept, with labels (of the old system's mAP) and without (of the target system's own results).
THRESHOLDS = {True: (0.95, 0.75), False: (0.7, 0.3)}


@dataclass(frozen=True)
class Verdict:
    """What was measured. Shares are in [0, 1] unless said otherwise.

    Attributes:
        level: ``good``, ``usable with loss``, ``not usable``, or ``undecided`` for lack of pairs.
        sentence: The same for people, with the numbers.
        direction: ``query`` or ``gallery``.
        pairs: Held-out pairs: all of them are the gallery.
        queries: How many of them were queries.
        k: Length of the lists that were compared.
        cosine: Mean cosine of mapped and true vectors; ``chance_cosine``: with those of other items.
        overlap: Mean share of the target system's first k that the mapped system finds, and its 95 % interval.
        chance_overlap: What a map to nowhere would have.
        recall_at_1, recall_at_10: How often the true vector of the same item is the nearest, or among 10.
        kept: ``(mean, low, high)``. With labels: mAP with the map by the old system's mAP (above 1: better than the old
            system). Without: ``overlap``.
        quality: With labels mAP@100 of ``old``, ``new`` and ``mapped``; else ``None``.
        pairs_needed: Held-out pairs for an interval of +- 0.05 around ``kept``.
    """

    level: Level
    sentence: str
    direction: Direction
    pairs: int
    queries: int
    k: int
    cosine: float
    chance_cosine: float
    overlap: tuple[float, float, float]
    chance_overlap: float
    recall_at_1: float
    recall_at_10: float
    kept: tuple[float, float, float]
    quality: dict[str, float] | None
    pairs_needed: int

    @property
    def usable(self) -> bool:
        return self.level in ("good", "usable with loss")

    def evidence(self) -> dict[str, Any]:
        """Plain JSON data, for ``VectorTransform.evidence``; ``verdict`` is the level."""
        rounded = {name: _rounded(value) for name, value in asdict(self).items() if name != "level"}
        return {"verdict": self.level, "usable": self.usable, **rounded}


def judge_transform(
    transform: VectorTransform,
    source: ArrayLike,
    target: ArrayLike,
    *,
    direction: Direction = "query",
    labels: Sequence[Any] | NDArray[Any] | None = None,
    k: int = 10,
    max_queries: int = 1000,
    max_pairs: int = 10_000,
    seed: int = 0,
) -> Verdict:
    """Measure ``transform`` on pairs that it was not fitted on.

    Args:
        transform: From the space of ``source`` to the space of ``target``.
        source: ``(N, Di)``.
        target: ``(N, Do)``; row i is the same item as row i of ``source``.
        direction: What the map is for, see the module.
        labels: N labels of any kind; an item is right for a query if their labels are equal. ``None`` for an item: no
            other is right for it.
        k: Length of the lists, at least 1; at most an eighth of the pairs, beyond which chance finds too much.
        max_queries, max_pairs: Above that, pairs are drawn with ``seed``.
        seed: Also of the bootstrap.

    Raises:
        InputError: (a ``ValueError``) Rows that do not pair, fewer than 10 pairs, or another direction.
        SpaceError: Vectors of other widths than the transform's.
    """
    if direction not in get_args(Direction):
        raise InputError(f"direction is {direction!r}; accepted: {', '.join(get_args(Direction))}.")
    if k < 1 or max_queries < 1:
        raise InputError(f"k={k}, max_queries={max_queries}; at least 1.")
    x, y = _paired(transform, source, target)
    if labels is not None and len(labels) != len(x):
        raise InputError(f"{len(labels)} labels for {len(x)} pairs.")
    if len(x) < MIN_HELD_OUT:
        raise InputError(f"{len(x)} held-out pairs; a verdict needs at least {MIN_HELD_OUT}, better some hundreds.")
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(x), min(len(x), max_pairs), replace=False))
    x, y = unit(x[chosen]), unit(y[chosen])
    number = len(x)
    k = min(k, max(1, number // 8))
    asked = np.sort(rng.choice(number, min(number, max_queries), replace=False))
    mapped = transform(x)

    # Scores (Q, N) of the mapped and of the true target system; a query does not find itself.
    scores = mapped[asked] @ y.T if direction == "query" else y[asked] @ mapped.T
    truth = y[asked] @ y.T
    own = scores[np.arange(len(asked)), asked]
    rank_of_own = (scores > own[:, None]).sum(axis=1)
    for block in (scores, truth):
        block[np.arange(len(asked)), asked] = -np.inf
    overlap = _overlap(scores, truth, k, rng)
    quality: dict[str, float] | None = None
    kept = _interval(overlap, seed)
    if labels is not None:
        classes = _codes([labels[i] for i in chosen])
        sides = (x, y) if direction == "gallery" else (y, x)
        old, new = (_average_precision(side[asked] @ side.T, classes, asked) for side in sides)
        values = _average_precision(scores, classes, asked)
        if np.isfinite(old).any() and np.nanmean(old) > 0:
            quality = {name: float(np.nanmean(v)) for name, v in (("old", old), ("new", new), ("mapped", values))}
            kept = _ratio(values, old, seed)
    own_cosine = float(np.mean(np.sum(mapped * y, axis=1)))
    other_cosine = float(np.mean(np.sum(mapped * np.roll(y, 1, axis=0), axis=1)))

    half = (kept[2] - kept[1]) / 2
    needed = max(number, math.ceil(number * (half / WIDTH) ** 2)) if half > WIDTH else number
    chance = k / (number - 1)
    found = _interval(overlap, seed)
    level = _level(kept, half, labelled=quality is not None)
    # Where much of the gallery is right, unrelated vectors keep much of a mAP: the lists must be alike, too.
    if found[0] <= UNRELATED * chance:
        level = "not usable"
    elif found[1] <= UNRELATED * chance and level != "not usable":
        level, needed = "undecided", max(needed, 4 * number)
    sentence = _sentence(level, kept, quality, k, number, needed, direction, found[0], chance)
    return Verdict(
        level, sentence, direction, number, len(asked), k, own_cosine, other_cosine, found, chance,
        float((rank_of_own < 1).mean()), float((rank_of_own < 10).mean()), kept, quality, needed,
    )  # fmt: skip


def _paired(transform: VectorTransform, source: ArrayLike, target: ArrayLike) -> tuple[NDArray, NDArray]:
    x, y = np.asarray(source), np.asarray(target)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise InputError(f"source {x.shape} and target {y.shape} must be (N, Di) and (N, Do) of the same N items.")
    if (x.shape[1], y.shape[1]) != (transform.dim_in, transform.dim_out):
        raise SpaceError(
            f"the transform {transform} goes from width {transform.dim_in} to {transform.dim_out}, and these pairs go "
            f"from {x.shape[1]} to {y.shape[1]}; are source and target swapped?"
        )
    return x, y


def _overlap(scores: NDArray, truth: NDArray, k: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Share per query of the first k of ``truth`` among the first k of ``scores``.

    Equal scores come in another order on each side: lists of an encoder that gives one vector to all agree by chance.
    """
    order = rng.permutation(truth.shape[1])
    found = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    due = order[np.argpartition(-truth[:, order], k - 1, axis=1)[:, :k]]
    return np.array([len(np.intersect1d(a, b)) / k for a, b in zip(found, due, strict=True)])


def _average_precision(scores: NDArray, classes: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.float64]:
    """mAP@100 per query; NaN for a query for which nothing is right."""
    ids = np.arange(len(classes))
    relevant = Relevance.from_labels(classes[asked], classes, query_ids=asked, gallery_ids=ids)
    ranked = RankedList.from_scores(np.where(np.isfinite(scores), scores, -2), k=min(101, len(classes)))
    result = average_precision(ranked, relevant, "at_k", 100, no_positive="zero")
    shared = np.bincount(classes)[classes[asked]] > 1
    return np.where(shared, result.values, np.nan)


def _codes(labels: Sequence[Any]) -> NDArray[np.int64]:
    """Class numbers; an item without a label is alone in its class."""
    known: dict[str, int] = {}
    names = (f"alone {i}" if label is None else f"is {label}" for i, label in enumerate(labels))
    return np.array([known.setdefault(name, len(known)) for name in names])


def _interval(values: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    made = bootstrap_interval(values, samples=1000, seed=seed)
    return made.mean, made.low, made.high


def _ratio(values: NDArray, reference: NDArray, seed: int) -> tuple[float, float, float]:
    """Ratio of two means over the same queries, with its bootstrap interval."""
    both = np.isfinite(values) & np.isfinite(reference)
    values, reference = np.asarray(values[both]), np.asarray(reference[both])
    draws = np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))
    below = np.maximum(reference[draws].mean(axis=1), 1e-12)
    low, high = np.quantile(values[draws].mean(axis=1) / below, [0.025, 0.975])
    return float(values.mean() / reference.mean()), float(low), float(high)


def _level(kept: tuple[float, float, float], half: float, *, labelled: bool) -> Level:
    good, usable = THRESHOLDS[labelled]
    mean, low, high = kept
    if high < usable:
        return "not usable"
    if low < usable and half > WIDTH:
        return "undecided"
    if mean < usable:
        return "not usable"
    return "good" if low >= good else "usable with loss"


def _sentence(
    level: Level, kept: tuple[float, float, float], quality: dict[str, float] | None, k: int, pairs: int, needed: int,
    direction: Direction, overlap: float, chance: float,
) -> str:  # fmt: skip
    what = {"query": "New queries on old vectors", "gallery": "New queries on lifted vectors"}[direction]
    interval = f"(95 % interval {kept[1]:.2f} to {kept[2]:.2f}, {pairs} held-out pairs)"
    if quality is not None:
        measured = f"{what} keep {kept[0]:.2f} of the old system's mAP {interval}"
    else:
        target = "old" if direction == "query" else "new"
        measured = f"{what} find {kept[0]:.2f} of the {target} system's first {k} results {interval}"
    if level == "undecided":
        return f"Undecided: {measured}. Too few pairs: about {needed} held-out ones are needed for +- {WIDTH:g}."
    if overlap <= UNRELATED * chance:
        return (
            f"Not usable: {measured}; chance is {chance:.2f}. The two sets of vectors are unrelated: do the rows pair?"
        )
    return f"{level[0].upper()}{level[1:]}: {measured}."


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, tuple | list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value
