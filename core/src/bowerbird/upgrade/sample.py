"""The items on which an upgrade is planned: both encoders' vectors of some, drawn so that they speak for the gallery.

With labels the draw is stratified. A uniform sample of a gallery of many small classes has hardly a right answer in it;
here about half of the items share a label with a query, the others are drawn from all the rest, and each item's weight
says how many it stands for (``bowerbird.upgrade.estimate``). Where a strategy is fitted, half of the sample is drawn
first, uniformly, for that alone: a forecast on the pairs that a map was fitted on would flatter it.

N items.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bowerbird.errors import InputError
from bowerbird.upgrade.forecast import PairedVectors
from bowerbird.upgrade.queries import QuerySet
from bowerbird.upgrade.strategies import TrainingPairs

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item, Space
    from bowerbird.upgrade.encoding import ItemEncoder


@dataclass(frozen=True)
class Sample:
    """Encoded items.

    Attributes:
        paired: To forecast on; ``None`` without labels.
        nums: int64 ``(N,)`` item numbers of ``paired``'s gallery.
        training: To fit on, disjoint from ``paired``; ``None`` where nothing is fitted.
        taken, failed: Items that were encoded, and those that could not be.
        items_per_second: Of the new encoder.
    """

    paired: PairedVectors | None
    nums: np.ndarray
    training: TrainingPairs | None
    taken: int
    failed: int
    items_per_second: float | None


@dataclass(frozen=True)
class Draw:
    """Item numbers: ``training``; ``gallery`` with ``weights``; ``queries`` among the gallery's."""

    training: np.ndarray
    gallery: np.ndarray
    weights: np.ndarray
    queries: np.ndarray


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
    weights: list[float] = []
    for label, group in members.items():
        take = min(len(group), cap)
        if take and len(chosen) + take <= room:
            chosen += group[:take]
            weights += [everyone[label] / take] * take
        else:
            # A class for which there is no room is left out; its queries with it.
            others += group if asked is not None else []
            everyone.pop(label)
    left = rng.permutation(np.array(others, np.int64))[: budget - len(chosen)]
    strangers = len(labels) - sum(everyone.values())
    gallery = np.concatenate([np.array(chosen, np.int64), left])
    weight = np.concatenate([weights, np.full(len(left), max(strangers / max(len(left), 1), 1.0))])
    by_num = np.argsort(gallery)
    return Draw(np.sort(training), gallery[by_num], np.maximum(weight[by_num], 1.0), queries[np.isin(queries, chosen)])


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
) -> Sample:
    """Draw items of the space ``old`` that is written, encode them by ``new``, and pair them with their stored vectors.

    Args:
        only_pairs: Nothing is to be forecast: take half of ``size`` items, all of them to fit on.

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
        drawn = Draw(np.sort(chosen), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))

    clock = _Clock()
    wanted = np.concatenate([drawn.training, drawn.gallery])
    found = gallery.store.items(wanted)
    items = [found[num] for num in wanted.tolist()]
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
    rows = np.flatnonzero(~is_training)
    positions = result.positions[rows] - len(drawn.training)
    paired = None
    if label_key is not None and len(rows):
        paired = _paired(gallery, new, old, old_encoder, queries, drawn, items, labels, rows, positions,
                         old_rows, result.vectors)  # fmt: skip
    return Sample(paired, drawn.gallery[positions], training, len(result.positions), len(result.failures), clock.rate)


def _paired(gallery: Gallery, new: ItemEncoder, old: Space, old_encoder: ItemEncoder | None,
            queries: QuerySet | None, drawn: Draw, items: Sequence[Item], labels: Mapping[int, str | None],
            rows: np.ndarray, positions: np.ndarray, old_rows: np.ndarray, new_rows: np.ndarray,
            ) -> PairedVectors | None:  # fmt: skip
    kept = [items[len(drawn.training) + position] for position in positions.tolist()]
    names = [labels[item.num] for item in kept]
    # An item without a label is a distractor: relevant to no query.
    shown = [f"no label {item.num}" if name is None else name for item, name in zip(kept, names, strict=True)]
    ids = [item.id for item in kept]
    if queries is None:
        asking = set(drawn.queries.tolist())
        at = [at for at, item in enumerate(kept) if item.num in asking]
        if not at:
            return None
        one = rows[at]
        queries = QuerySet([shown[a] for a in at], None, [ids[a] for a in at], old_rows[one], new_rows[one])
    else:
        queries = queries.encode(gallery, old, new, old_encoder)
    assert queries.labels is not None
    return PairedVectors(
        old_rows[rows], new_rows[rows], queries.old, queries.new, shown, [str(label) for label in queries.labels],
        ids, queries.ids, drawn.weights[positions],
    )  # fmt: skip


class _Clock:
    """Items per second over the batches after the first, which pays for warming up; over a single one if need be."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]
        self.counts = [0]

    def __call__(self, count: int) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(count)

    @property
    def rate(self) -> float | None:
        first = 1 if len(self.times) > 2 else 0
        items, seconds = sum(self.counts[first + 1 :]), self.times[-1] - self.times[first]
        return items / seconds if items and seconds > 0 else None
