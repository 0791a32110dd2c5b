"""The items on which an upgrade is planned: both encoders' vectors of some, drawn so that they speak for the gallery.

With labels the draw is stratified. A uniform sample of a gallery of many small classes has hardly a right answer in it;
here about half of the items share a label with a query, the others are drawn from all the rest, and each item's weight
says how many it stands for (``bowerbird.upgrade.estimate``). Where a strategy is fitted, half of the sample is drawn
first, uniformly, for that alone: a forecast on the pairs that a map was fitted on would flatter it. Strategies that
fit nothing are forecast on both halves.

N items.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError
from bowerbird.upgrade.forecast import PairedVectors
from bowerbird.upgrade.queries import QuerySet
from bowerbird.upgrade.strategies import TrainingPairs

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Space
    from bowerbird.upgrade.encoding import ItemEncoder


@dataclass(frozen=True)
class Sample:
    """Encoded items.

    Attributes:
        everything: All of them, to forecast on what fits nothing; ``None`` without labels.
        nums: int64 ``(N,)`` item numbers of ``everything``'s gallery.
        held: To forecast on what was fitted on ``training``: ``everything`` without those; the same queries.
        held_rows: Positions of ``held``'s gallery in ``everything``'s.
        training: To fit on; ``None`` where nothing is fitted.
        taken, failed: Items that were encoded, and those that could not be.
        items_per_second: Of the new encoder.
    """

    everything: PairedVectors | None
    nums: np.ndarray
    held: PairedVectors | None
    held_rows: np.ndarray
    training: TrainingPairs | None
    taken: int
    failed: int
    items_per_second: float | None


@dataclass(frozen=True)
class Draw:
    """Item numbers: ``training``; ``gallery`` with ``weights``; ``queries`` among the gallery's.

    ``weights_together`` are those of training and gallery, one after the other, where both are one sample.
    """

    training: np.ndarray
    gallery: np.ndarray
    weights: np.ndarray
    queries: np.ndarray
    weights_together: np.ndarray


def draw(
    labels: Mapping[int, str | None],
    size: int,
    *,
    asked: Sequence[str] | None = None,
    num_queries: int = 500,
    fit: bool = False,
    seed: int = 0,
) -> Draw:
    """Choose items.

    Args:
        labels: Item number -> label, ``None`` without one.
        size: Of the draw.
        asked: Labels of queries that come from elsewhere. ``None``: items are the queries.
        num_queries: At most so many items are queries.
        fit: Keep half of the draw for fitting.
    """
    # A stream of its own: an order drawn with the same seed must not put the sampled items first.
    rng = np.random.default_rng([seed, 1])
    nums = rng.permutation(np.array(sorted(labels), np.int64))
    size = min(size, len(nums))
    training, rest = np.split(nums, [size // 2 if fit else 0])
    budget = size - len(training)
    queries = np.empty(0, np.int64)
    if asked is None:
        queries = np.array([num for num in rest.tolist() if labels[num] is not None][:num_queries], np.int64)
        asked = [str(labels[num]) for num in queries.tolist()]
    wanted = list(dict.fromkeys(asked))
    everyone: dict[str, int] = dict.fromkeys(wanted, 0)
    for label in labels.values():
        if label in everyone:
            everyone[label] += 1
    first = set(queries.tolist())
    members: dict[str, list[int]] = {label: [] for label in wanted}
    others: list[int] = []
    for num in sorted(rest.tolist(), key=lambda num: num not in first):  # stable: queries come first in their class
        group = members.get(labels[num]) if labels[num] is not None else None  # type: ignore[arg-type]
        (others if group is None else group).append(num)

    # Half for right answers, and what the rest does not need; at least a query and one right answer for each class.
    room = max(budget // 2, budget - len(others))
    most = max((len(group) for group in members.values()), default=0)
    cap = next((c for c in range(most, 1, -1) if sum(min(len(m), c) for m in members.values()) <= room), 2)
    chosen: list[int] = []
    taken: dict[str, int] = {}
    for label, group in members.items():
        take = min(len(group), cap)
        if take and len(chosen) + take <= room:
            chosen += group[:take]
            taken[label] = take
        else:
            # A class for which there is no room is left out; its queries with it.
            others += group if asked is not None else []
            everyone.pop(label)
    left = rng.permutation(np.array(others, np.int64))[: budget - len(chosen)]
    gallery = np.sort(np.concatenate([np.array(chosen, np.int64), left]))
    training = np.sort(training)

    def weights(nums: np.ndarray) -> np.ndarray:
        """Of each: items of its class over those in the sample. What is in no class of a query is one class."""
        classes = [label if (label := labels[num]) in taken else None for num in nums.tolist()]
        drawn = Counter(classes)
        strangers = len(labels) - sum(everyone[label] for label in taken)
        members = [strangers if label is None else everyone[label] for label in classes]
        return np.maximum([count / drawn[label] for count, label in zip(members, classes, strict=True)], 1.0)

    return Draw(
        training, gallery, weights(gallery), queries[np.isin(queries, chosen)],
        weights(np.concatenate([training, gallery])),
    )  # fmt: skip


def take_sample(
    gallery: Gallery,
    new: ItemEncoder,
    old: Space,
    *,
    old_encoder: ItemEncoder | None = None,
    label_key: str | None = None,
    queries: QuerySet | None = None,
    num_queries: int = 500,
    size: int = 2000,
    fit: bool = False,
    only_pairs: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Sample:
    """Draw items of the space ``old`` that is written, encode them by ``new``, and pair them with their stored vectors.

    Args:
        only_pairs: Nothing is to be forecast: take half of ``size`` items, all of them to fit on.
        progress: Called with (items encoded, items to encode).

    Raises:
        InputError: If the queries have no labels, or no item can be encoded.
    """
    part = gallery.snapshot().new
    live = set(part.nums.tolist())
    labels: dict[int, str | None] = dict.fromkeys(live)
    if label_key is not None:
        for item in gallery.items():
            if item.num in labels and item.metadata.get(label_key) is not None:
                labels[item.num] = str(item.metadata[label_key])
    if queries is not None and queries.labels is None:
        raise InputError("plan needs labelled queries; this query set has no labels")
    if queries is not None and label_key is None:
        raise InputError(
            "labelled queries need label_key (--label-key), the metadata key with the label of the gallery's items"
        )
    asked = None if queries is None or queries.labels is None else [str(label) for label in queries.labels]
    drawn = draw(labels, size, asked=asked, num_queries=num_queries, fit=fit, seed=seed)
    if only_pairs:
        chosen = np.random.default_rng([seed, 1]).permutation(np.array(sorted(live), np.int64))[: size // 2]
        none, nothing = np.empty(0, np.int64), np.empty(0)
        drawn = Draw(np.sort(chosen), none, nothing, none, nothing)

    wanted = np.concatenate([drawn.training, drawn.gallery])
    if not len(wanted):
        raise InputError(f"gallery {gallery.path} is empty: there is no item to encode for a sample")
    found = gallery.store.items(wanted)
    items = [found[num] for num in wanted.tolist()]
    clock = _Clock(len(items), progress)
    result = new.items(items, clock)
    if not len(result.positions):
        raise InputError(
            f"none of the {len(items)} sampled items can be encoded, the first: {next(iter(result.failures.values()))}"
        )
    old_rows = part.vectors_of(wanted[result.positions])
    is_training = result.positions < len(drawn.training)
    training = None
    if fit and is_training.any():
        rows = np.flatnonzero(is_training)
        known = None if label_key is None else [labels[int(wanted[result.positions[row]])] for row in rows]
        training = TrainingPairs(old_rows[rows], result.vectors[rows], known, old, new.space)
    held_rows = np.flatnonzero(~is_training)
    positions = result.positions[held_rows] - len(drawn.training)
    nums = wanted[result.positions]
    about: dict[str, Any] = {
        "nums": nums, "held_rows": held_rows, "training": training, "taken": len(result.positions),
        "failed": len(result.failures), "items_per_second": clock.rate,
    }  # fmt: skip
    if label_key is None or not len(held_rows):
        return Sample(everything=None, held=None, **about)
    # An item without a label is a distractor: relevant to no query.
    shown = [f"no label {num}" if (name := labels[num]) is None else name for num in nums.tolist()]
    ids = [found[num].id for num in nums.tolist()]
    if queries is None:
        asking = np.flatnonzero(np.isin(nums, drawn.queries))
        if not len(asking):
            return Sample(everything=None, held=None, **about)
        at = asking.tolist()
        asked_by = QuerySet([shown[a] for a in at], None, [ids[a] for a in at], old_rows[at], result.vectors[at])
    else:
        asked_by = queries.encode(gallery, old, new, old_encoder)

    def paired(rows: np.ndarray, weights: np.ndarray) -> PairedVectors:
        at = rows.tolist()
        return PairedVectors(
            old_rows[rows], result.vectors[rows], asked_by.old, asked_by.new, [shown[a] for a in at],
            [str(label) for label in asked_by.labels or []], [ids[a] for a in at], asked_by.ids, weights,
        )  # fmt: skip

    held = paired(held_rows, drawn.weights[positions])
    if not len(drawn.training):
        return Sample(everything=held, held=held, **about)
    everything = paired(np.arange(len(nums)), drawn.weights_together[result.positions])
    return Sample(everything=everything, held=held, **about)


class _Clock:
    """Items per second over the batches after the first, which pays for warming up; over a single one if need be."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.times = [time.perf_counter()]
        self.counts = [0]
        self.total, self.progress = total, progress

    def __call__(self, count: int) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(count)
        if self.progress is not None:
            self.progress(sum(self.counts), self.total)

    @property
    def rate(self) -> float | None:
        first = 1 if len(self.times) > 2 else 0
        items, seconds = sum(self.counts[first + 1 :]), self.times[-1] - self.times[first]
        return items / seconds if items and seconds > 0 else None
