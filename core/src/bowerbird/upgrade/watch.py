"""``watch``: quality on a fixed set of queries while a gallery is upgraded, and the rule that stops it.

The queries, their vectors in both spaces and the results of the old system are frozen when the upgrade begins
(``GALLERY/watch/<upgrade>.npz``), so that a measurement needs no encoder and no image. Each measurement is one line of
``GALLERY/watch/<upgrade>.jsonl``.

Q queries, K results kept per query, D width of a space.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import CorruptionError, InputError, SpaceError, UpgradeError
from bowerbird.gallery.vectors import unit_vectors
from bowerbird.retrieval.flips import churn, flips
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision, cmc
from bowerbird.upgrade.serve import SearchService

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery, SearchResult
    from bowerbird.gallery.space import Space

DEPTH = 100  # results per query that are kept: the quality is mAP@100
CHURN_AT = 10
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class WatchSet:
    """Queries to watch.

    Attributes:
        old: ``(Q, D)`` vectors in the old space.
        new: ``(Q, D)`` vectors in the new space.
        labels: Q labels, compared with the metadata ``label_key`` of the results; ``None``: only churn is measured, and
            a flip is a query whose first result is another one than under the old system.
        label_key: Metadata key of the items' label.
        ids: Q item ids where the queries are items of the gallery; a query is not counted as its own result.
    """

    old: Any
    new: Any
    labels: Sequence[Any] | None = None
    label_key: str | None = None
    ids: Sequence[str] | None = None


@dataclass(frozen=True)
class WatchEntry:
    """One measurement.

    Attributes:
        share: Share of the items in the new space.
        quality: mAP@100; NaN without labels.
        r1: Share of the queries with a right first result; NaN without labels.
        nfr, pfr: Negative and positive flips against the frozen results of the old system (``vs_old``). Without labels
            ``nfr`` is the share of queries whose first result changed, and ``pfr`` is 0.
        churn: Mean share of the first 10 results that changed.
        old_distances, new_distances: Quantiles 10, 50 and 90 % of the distance of the nearest item of each side: how
            the two sides are calibrated. Empty for a side without items.
        stopped: Whether ``max_nfr`` was exceeded, so that the upgrade was paused.
    """

    share: float
    quality: float
    r1: float
    nfr: float
    pfr: float
    churn: float
    old_distances: tuple[float, ...]
    new_distances: tuple[float, ...]
    stopped: bool
    max_nfr: float | None
    time: float

    def to_dict(self) -> dict[str, Any]:
        return {key: None if value != value else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class FrozenWatch:
    """A ``WatchSet`` with the results of the old system: ``nums`` int64 ``(Q, K)``, padded with -1."""

    old: np.ndarray
    new: np.ndarray
    labels: np.ndarray | None
    label_key: str | None
    self_nums: np.ndarray  # int64 (Q,), -1 where the query is no item
    nums: np.ndarray
    right: np.ndarray  # int8 (Q,): 1 right, 0 wrong, -1 not valid, at rank 1 under the old system

    def save(self, gallery: Gallery, upgrade: int) -> None:
        content = io.BytesIO()
        np.savez_compressed(
            content,
            old=self.old,
            new=self.new,
            self_nums=self.self_nums,
            nums=self.nums,
            right=self.right,
            label_key=np.array(self.label_key or ""),
            labels=np.empty(0, str) if self.labels is None else self.labels,
        )
        gallery.storage.write_file(f"watch/{upgrade}.npz", content.getvalue())

    @classmethod
    def load(cls, gallery: Gallery, upgrade: int) -> FrozenWatch:
        name = f"watch/{upgrade}.npz"
        content = gallery.storage.read_file(name)
        if content is None:
            raise UpgradeError(
                f"upgrade {upgrade} of {gallery.path} was begun without queries to watch; they are frozen at its "
                "start: give --label-key or --queries to `bowerbird upgrade run` when it begins"
            )
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as data:
                return cls(
                    data["old"],
                    data["new"],
                    data["labels"] if len(data["labels"]) else None,
                    str(data["label_key"]) or None,
                    data["self_nums"],
                    data["nums"],
                    data["right"],
                )
        except (ValueError, KeyError, OSError, EOFError) as exc:
            raise CorruptionError(f"{name} of {gallery.path} cannot be read: {exc}") from exc


def freeze_watch(gallery: Gallery, queries: WatchSet, old: Space, new: Space) -> FrozenWatch:
    """Search the old system once, before the upgrade begins.

    Raises:
        InputError: If numbers of rows differ, or there are no queries.
    """
    old_rows = unit_vectors(queries.old, old.dim, what="old query vectors")
    new_rows = unit_vectors(queries.new, new.dim, what="new query vectors")
    count = len(old_rows)
    for what, value in (("new", new_rows), ("labels", queries.labels), ("ids", queries.ids)):
        if value is not None and len(value) != count:
            raise InputError(f"the watch set has {count} old query vectors and {len(value)} {what}: they do not pair")
    if count == 0:
        raise InputError("a watch set needs at least one query, got none")
    if queries.labels is not None and queries.label_key is None:
        raise InputError("labels of queries need label_key, the metadata key of the items' label")
    items = gallery.get_many(list(queries.ids)) if queries.ids is not None else [None] * count
    self_nums = np.array([-1 if item is None else item.num for item in items], np.int64)
    found = SearchService(gallery).search(vectors={old.fingerprint: old_rows}, k=DEPTH + 1)
    labels = None if queries.labels is None else np.array([str(label) for label in queries.labels])
    frozen = FrozenWatch(old_rows, new_rows, labels, queries.label_key, self_nums, found.nums, np.zeros(count, np.int8))
    _, right = _judge(gallery, frozen, found.nums)
    return FrozenWatch(old_rows, new_rows, labels, queries.label_key, self_nums, found.nums, right)


def watch(gallery: Gallery, *, max_nfr: float | None = None) -> WatchEntry:
    """Measure once, append to the history, and pause the upgrade if the stop rule says so.

    Args:
        max_nfr: Largest rate of negative flips against the old system that is accepted, 0 to 1. ``None``: no rule.

    Raises:
        UpgradeError: If no upgrade is under way, or it was begun without queries to watch.
    """
    if max_nfr is not None and not 0 <= max_nfr <= 1:
        raise InputError(f"max_nfr is {max_nfr}; it is a share of the queries, 0 to 1")
    snapshot = gallery.snapshot()
    if snapshot.upgrade is None:
        from bowerbird.upgrade.state import no_upgrade

        raise UpgradeError(no_upgrade(gallery))
    frozen = FrozenWatch.load(gallery, snapshot.upgrade.id)
    service = SearchService(gallery)
    vectors = {snapshot.upgrade.old: frozen.old, snapshot.upgrade.new: frozen.new}
    try:
        found = service.search(vectors=vectors, k=DEPTH + 1)
    except SpaceError:
        # The upgrade ended between the snapshot and the search.
        if gallery.store.upgrade_state() is None:
            from bowerbird.upgrade.state import no_upgrade

            raise UpgradeError(no_upgrade(gallery)) from None
        raise
    quality, right = _judge(gallery, frozen, found.nums)
    if frozen.labels is not None:
        valid = (right >= 0) & (frozen.right >= 0)
        rate = flips(frozen.right[valid], right[valid])
        nfr, pfr, r1 = rate.nfr, rate.pfr, float(np.mean(right[right >= 0]))
    else:
        before, after = _without_self(frozen, frozen.nums), _without_self(frozen, found.nums)
        nfr, pfr, r1 = float(np.mean(before[:, 0] != after[:, 0])), 0.0, float("nan")
    shared = service.state().share
    stopped = max_nfr is not None and nfr > max_nfr
    entry = WatchEntry(
        share=shared,
        quality=quality,
        r1=r1,
        nfr=nfr,
        pfr=pfr,
        churn=float(churn(_without_self(frozen, frozen.nums), _without_self(frozen, found.nums), CHURN_AT).mean()),
        old_distances=_nearest(frozen, found, 0),
        new_distances=_nearest(frozen, found, 1),
        stopped=stopped,
        max_nfr=max_nfr,
        time=time.time(),
    )
    if stopped:
        gallery.store.pause()
    gallery.storage.append_line(f"watch/{snapshot.upgrade.id}.jsonl", json.dumps(entry.to_dict()))
    return entry


def level_before(gallery: Gallery) -> float:
    """mAP@100 of the results that were frozen when the upgrade began: the old system on the watched queries.

    Raises:
        UpgradeError: If no upgrade is under way, or its watched queries have no labels.
    """
    state = gallery.store.upgrade_state()
    if state is None:
        raise UpgradeError(f"no upgrade of {gallery.path} is under way")
    frozen = FrozenWatch.load(gallery, state.id)
    if frozen.labels is None:
        raise UpgradeError(f"the watched queries of upgrade {state.id} have no labels, so that no quality is measured")
    return _judge(gallery, frozen, frozen.nums)[0]


def history(gallery: Gallery, upgrade: int | None = None) -> list[dict[str, Any]]:
    """Measurements of an upgrade (default: the last one that has any), oldest first, as plain data."""
    if upgrade is None:
        numbers = [int(PurePath(name).stem) for name in gallery.storage.files("watch") if name.endswith(".jsonl")]
        if not numbers:
            return []
        upgrade = max(numbers)
    content = gallery.storage.read_file(f"watch/{upgrade}.jsonl")
    # A line that a kill cut short is no measurement.
    lines = (content or b"").decode("utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _judge(gallery: Gallery, frozen: FrozenWatch, nums: np.ndarray) -> tuple[float, np.ndarray]:
    """``(mAP@DEPTH, right at rank 1 as int8: -1 not valid)``; NaN and zeros without labels."""
    if frozen.labels is None or frozen.label_key is None:
        return float("nan"), np.zeros(len(nums), np.int8)
    key = frozen.label_key
    labels = frozen.labels.tolist()
    # mAP@DEPTH asks which hits are right, and how many items would be, up to DEPTH besides the query itself: a large
    # gallery is read only until there are so many of every label.
    some: dict[str, list[int]] = {label: [] for label in labels}
    wanted = set(labels)
    for item in gallery.items():
        label = str(item.metadata.get(key))
        if label in wanted:
            some[label].append(item.num)
            if len(some[label]) > DEPTH:
                wanted.remove(label)
                if not wanted:
                    break
    hits = gallery.store.items(np.unique(nums[nums >= 0]))
    label_of = {num: str(item.metadata.get(key)) for num, item in hits.items()}
    positives = [
        np.array(sorted({*some[label], *(num for num in row if label_of.get(num) == label)}), np.int64)
        for label, row in zip(labels, nums.tolist(), strict=True)
    ]
    relevance = Relevance(positives, self_ids=frozen.self_nums)
    ranked = RankedList(nums)
    right = cmc(ranked, relevance, 1)
    outcome = np.where(right.valid, np.nan_to_num(right.values), -1).astype(np.int8)
    return float(average_precision(ranked, relevance, "at_k", DEPTH).mean()), outcome


def _without_self(frozen: FrozenWatch, nums: np.ndarray) -> np.ndarray:
    """``(Q, DEPTH)`` without the query item itself, padded with -1."""
    keep = nums != np.where(frozen.self_nums < 0, -2, frozen.self_nums)[:, None]
    order = np.argsort(~keep, axis=1, kind="stable")
    out = np.where(np.take_along_axis(keep, order, axis=1), np.take_along_axis(nums, order, axis=1), -1)
    return out[:, :DEPTH]


def _nearest(frozen: FrozenWatch, found: SearchResult, side: int) -> tuple[float, ...]:
    """Quantiles over the queries of the smallest distance on one side, among the results without the query itself."""
    counted = (found.sides == side) & (found.nums != frozen.self_nums[:, None])
    distances = np.where(counted, found.distances, np.inf).min(axis=1)
    distances = distances[np.isfinite(distances)]
    return tuple(round(float(q), 6) for q in np.quantile(distances, QUANTILES)) if len(distances) else ()
