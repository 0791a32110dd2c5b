"""``run``: the resumable worker that moves a gallery to the new space, and how an upgrade begins.

A worker leases a task, encodes its items and commits their vectors in one atomic step. The store sees to it that a kill
at any point loses at most the task in hand, that a second worker shares the rest, and that serving is right all along.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError, PluginError, UpgradeError
from bowerbird.gallery.store import LeaseLostError
from bowerbird.registry import get_registry
from bowerbird.upgrade.canary import check_canary
from bowerbird.upgrade.orders import class_means
from bowerbird.upgrade.state import UpgradeStatus, status
from bowerbird.upgrade.strategies import load_strategy
from bowerbird.upgrade.watch import WatchEntry, WatchSet, freeze_watch, watch

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.gallery.space import Space
    from bowerbird.upgrade.encoding import ItemEncoder

LEASE_SECONDS = 120.0
TASK_ITEMS = 512
WATCH_EVERY = 0.05


@dataclass(frozen=True)
class RunReport:
    """What one call of ``run`` did.

    Attributes:
        reason: Why it ended: ``complete``, ``stop-after``, ``stop-at-share``, ``paused``, ``stop-rule``, or ``ended``
            (finished or rolled back by another process).
        encoded: Items that this call committed.
        failed: Attempts of this call that failed (an item is tried three times).
        seconds: Wall time.
        share: Share of the live items that are in the new space now, 0 to 1.
        watched: What ``watch`` measured meanwhile.
    """

    reason: str
    encoded: int
    failed: int
    seconds: float
    share: float
    watched: tuple[WatchEntry, ...] = ()
    failures: tuple[tuple[str, int, str], ...] = ()

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.encoded / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rate": self.rate}


def begin(
    gallery: Gallery,
    new: Space,
    *,
    strategy: str = "rank-merge",
    order: str = "core:random",
    order_settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    centers: Any = None,
    label_key: str | None = None,
    task_items: int | None = None,
    old_encoder: ItemEncoder | None = None,
    watch_set: WatchSet | None = None,
) -> UpgradeState:
    """Start an upgrade to the space ``new``. Search results do not change by it.

    Args:
        strategy: Name of an ``upgrade`` record.
        order: Name of an ``order`` record.
        order_settings: Its settings, checked against its config model.
        seed: Of the order.
        centers: ``(C, D)`` class centres in the old space, for orders that use them.
        label_key: Metadata key with the items' class; class means of the old vectors are the centres then.
        task_items: Items that a worker leases and commits at once. Default: 512, fewer in a small gallery, so that a
            share at which a run stops is met within two percent, but at least 4.
        old_encoder: Where given, it must reproduce stored old vectors (a swapped model of the same size is caught).
        watch_set: Queries whose old results are frozen now; see ``bowerbird.upgrade.watch``.

    Raises:
        UpgradeError: If an upgrade is under way, or the strategy cannot serve this pair of spaces.
        UnknownNameError: If there is no such strategy or order; suggests close names.
    """
    snapshot = gallery.snapshot()
    if snapshot.upgrade is not None:
        raise UpgradeError(
            f"an upgrade of {gallery.path} to {snapshot.spaces[snapshot.upgrade.new]} is {snapshot.upgrade.state}; "
            "finish it or roll it back before another one"
        )
    old = snapshot.spaces[snapshot.serving]
    name, chosen = load_strategy(strategy)
    chosen.check(gallery, old, new)
    if old_encoder is not None:
        check_canary(gallery, old_encoder)
    plan = backfill_plan(gallery, order, settings=order_settings, seed=seed, centers=centers, label_key=label_key)
    order_name = get_registry().get("retriever", order, role="order").name
    frozen = freeze_watch(gallery, watch_set, old, new) if watch_set is not None else None
    state = gallery.store.begin_upgrade(
        new,
        strategy=name,
        merger=chosen.merger,
        order_name=order_name,
        order=plan,
        task_items=task_items or min(TASK_ITEMS, max(4, -(-len(plan) // 50))),
        settings={"seed": seed, "order_settings": dict(order_settings or {}), "label_key": label_key},
    )
    if frozen is not None:
        try:
            frozen.save(gallery, state.id)
        except BaseException:
            gallery.store.rollback()  # nothing has moved; an upgrade that was to be watched is watched, or not begun
            raise
    return state


def backfill_plan(
    gallery: Gallery,
    order: str,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    centers: Any = None,
    label_key: str | None = None,
) -> np.ndarray:
    """int64 ``(N,)`` item numbers of the gallery in backfill order.

    Raises:
        PluginError: If the order does not return a permutation.
    """
    part = gallery.snapshot().new
    # By item number: the plan must not depend on where rows happen to lie.
    nums = np.sort(part.nums)
    return nums[order_positions(order, nums, part.vectors_of(nums), settings=settings, seed=seed,
                                centers=_centers(gallery, nums, part, centers, label_key))]  # fmt: skip


def order_positions(
    order: str,
    ids: np.ndarray,
    old_vectors: np.ndarray,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    centers: Any = None,
) -> np.ndarray:
    """Positions 0..N-1 in the order of the record ``order``, checked to be a permutation."""
    registry = get_registry()
    record = registry.get("retriever", order, role="order")
    if registry.load_config(record) is None and settings:
        raise InputError(f"order {record.name!r} has no settings; got {', '.join(settings)}")
    options: dict[str, Any] = {}
    if settings:
        from bowerbird.recipe import build_config

        config = build_config(record, dict(settings), where=f"settings of order {record.name}")
        options = config.model_dump() if config is not None else {}
    positions = np.asarray(registry.load(record)(ids, old_vectors, seed=seed, centers=centers, **options))
    if positions.shape != (len(ids),) or not np.array_equal(np.sort(positions), np.arange(len(ids))):
        raise PluginError(
            f"order {record.name!r} ({record.target}) returned no permutation of 0..{len(ids) - 1}: {positions.shape}"
        )
    return positions.astype(np.int64)


def _centers(gallery: Gallery, nums: np.ndarray, part: Any, centers: Any, label_key: str | None) -> Any:
    if centers is not None or label_key is None:
        return centers
    items = gallery.store.items(nums)
    labels = [items[num].metadata.get(label_key) for num in nums.tolist()]
    if all(label is None for label in labels):
        raise InputError(
            f"no item of {gallery.path} has the metadata key {label_key!r}, from which classes were to be read"
        )
    return class_means(part.vectors_of(nums), labels)


@dataclass
class _Limits:
    """When to stop, and how fast to go."""

    stop_after: int | None = None
    stop_at_share: float | None = None
    rate: float | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.stop_after is not None and self.stop_after < 1:
            raise InputError(f"stop_after is {self.stop_after}; it must be at least 1 item")
        if self.stop_at_share is not None and not 0 < self.stop_at_share <= 1:
            raise InputError(f"stop_at_share is {self.stop_at_share}; it must be above 0 and at most 1")
        if self.rate is not None and not self.rate > 0:
            raise InputError(f"rate is {self.rate}; it must be above 0 items per second")

    def reached(self, done: int, share: float) -> str | None:
        if self.stop_after is not None and done >= self.stop_after:
            return "stop-after"
        if self.stop_at_share is not None and share >= self.stop_at_share:
            return "stop-at-share"
        return None

    def keep_to_rate(self, done: int) -> None:
        if self.rate is not None:
            time.sleep(max(0.0, self.started + done / self.rate - time.monotonic()))


def run(
    gallery: Gallery,
    encoder: ItemEncoder,
    *,
    rate: float | None = None,
    stop_after: int | None = None,
    stop_at_share: float | None = None,
    watch_every: float | None = None,
    max_nfr: float | None = None,
    progress: Callable[[int, UpgradeStatus], None] | None = None,
    **begin_settings: Any,
) -> RunReport:
    """Work on the upgrade to the encoder's space until it is complete or a limit is reached; begin it if need be.

    Several processes may run at once; each ends when all is done. Ctrl-C gives the task in hand back; ``kill -9`` costs
    one task of encoding.

    Args:
        encoder: Of the new space.
        rate: At most so many items per second.
        stop_after: End once this call has committed so many items (at the end of the task that reaches it).
        stop_at_share: End once this share of the live items is new.
        watch_every: Measure the watch set after each such share of the gallery; 0.05 where only ``max_nfr`` is given.
        max_nfr: Pause the upgrade once a measurement shows a higher rate of negative flips against the old system.
        progress: Called after every batch with (items of this batch, status at the last commit), and after every commit
            with (0, status).
        begin_settings: Arguments of ``begin``, read where this call begins the upgrade.

    Raises:
        UpgradeError: If another upgrade is under way, or this one is paused.
        SpaceError: If the encoder is not the one of the upgrade's new space, or stops reproducing its space.
    """
    limits = _Limits(stop_after, stop_at_share, rate)
    if watch_every is None and max_nfr is not None:
        watch_every = WATCH_EVERY  # a rule that is never looked at would stop nothing
    if watch_every is not None and not 0 < watch_every <= 1:
        raise InputError(f"watch_every is {watch_every}; it is a share of the gallery, above 0 and at most 1")
    state = gallery.store.upgrade_state()
    if state is None:
        state = begin(gallery, encoder.space, **begin_settings)
    else:
        _check_same_upgrade(gallery, state, encoder, begin_settings)
        check_canary(gallery, encoder)  # against the vectors that are new already
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"
    encoded = failed = 0
    watched: list[WatchEntry] = []
    now = status(gallery)
    next_watch = now.share + watch_every if watch_every is not None else None

    while True:
        reason = limits.reached(encoded, now.share)
        task = gallery.store.lease_task(owner, LEASE_SECONDS) if reason is None else None
        if task is None:
            reason = reason or _why_no_task(gallery)
            if reason == "leased":  # what is left is in the hands of other workers, who may die
                _free_leases_of_the_dead(gallery)
                time.sleep(0.1)
                now = _status_after(gallery, now)
                continue
            break
        if task.upgrade != state.id:  # ours ended and another began, to a space that this encoder may not know
            _give_back(gallery, task)
            reason = "ended"
            break
        renewed = time.monotonic()

        def on_batch(count: int, task: Any = task, now: UpgradeStatus = now) -> None:
            nonlocal renewed
            if time.monotonic() - renewed > LEASE_SECONDS / 4:
                gallery.store.renew(task, LEASE_SECONDS)
                renewed = time.monotonic()
            if progress is not None:
                progress(count, now)

        try:
            result = encoder.items(task.items, on_batch)
            nums = task.nums
            failures = {int(nums[position]): error for position, error in result.failures.items()}
            gallery.store.commit_task(task, nums[result.positions], result.vectors, failures=failures)
        except LeaseLostError:
            continue  # another worker has it by now, or the upgrade ended; the next lease tells
        except BaseException:
            _give_back(gallery, task)
            raise
        encoded += len(result.positions)
        failed += len(failures)
        now = _status_after(gallery, now)
        if progress is not None:
            progress(0, now)
        if next_watch is not None and watch_every is not None and now.share >= next_watch - 1e-9:
            next_watch = now.share + watch_every
            try:
                watched.append(watch(gallery, max_nfr=max_nfr))
            except UpgradeError:
                if gallery.store.upgrade_state() is not None:
                    raise
                continue  # it ended meanwhile; the next lease tells
            if watched[-1].stopped:
                reason = "stop-rule"
                break
        limits.keep_to_rate(encoded)

    measured = watched[-1].share if watched else 0.0
    if next_watch is not None and reason == "complete" and encoded and measured < now.share:
        watched.append(watch(gallery, max_nfr=max_nfr))
    end = _status_after(gallery, now)
    return RunReport(
        reason=reason,
        encoded=encoded,
        failed=failed,
        seconds=time.monotonic() - limits.started,
        share=end.share,
        watched=tuple(watched),
        failures=end.failures,
    )


def _check_same_upgrade(
    gallery: Gallery, state: UpgradeState, encoder: ItemEncoder, begin_settings: Mapping[str, Any]
) -> None:
    if state.new != encoder.space.fingerprint:
        target = gallery.snapshot().spaces[state.new]
        raise UpgradeError(
            f"an upgrade of {gallery.path} to {target} is {state.state}, and this encoder makes vectors of "
            f"{encoder.space}. Run it with its own encoder, or finish it or roll it back first"
        )
    asked = begin_settings.get("strategy")
    if asked is not None and load_strategy(asked)[0] != state.strategy:
        raise UpgradeError(
            f"the upgrade under way has strategy {state.strategy!r}; {asked!r} cannot replace it. Leave it out, or "
            "roll the upgrade back first"
        )
    if state.state == "paused":
        raise UpgradeError(
            f"the upgrade of {gallery.path} is paused; `bowerbird upgrade resume {gallery.path}` lets workers go on"
        )


def _status_after(gallery: Gallery, last: UpgradeStatus) -> UpgradeStatus:
    """The status now, or the last one of an upgrade that another process has ended."""
    try:
        now = status(gallery)
    except UpgradeError:
        return last
    return now if now.id == last.id else last


def _why_no_task(gallery: Gallery) -> str:
    state = gallery.store.upgrade_state()
    if state is None:
        return "ended"
    if state.state == "paused":
        return "paused"
    return "complete" if gallery.store.progress().complete else "leased"


def _give_back(gallery: Gallery, task: Any) -> None:
    with contextlib.suppress(UpgradeError):  # it is no longer ours, or the upgrade ended: nothing to give back
        gallery.store.release_task(task)


def _free_leases_of_the_dead(gallery: Gallery) -> None:
    """Free the tasks of workers of this machine that no longer live, without waiting for their leases to run out.

    Where that is wrong (a worker in another container of the same name), its commit is refused by the fencing token.
    """
    host = socket.gethostname()
    with gallery.store.catalog.reading() as db:
        owners = [row[0] for row in db.execute("SELECT DISTINCT owner FROM task WHERE state = 'leased'")]
    for owner in owners:
        name, _, rest = owner.rpartition(":")[0].rpartition(":")
        if name == host and rest.isdigit() and not _lives(int(rest)):
            with gallery.store.catalog.writing() as db:
                db.execute(
                    "UPDATE task SET state = 'free', owner = NULL WHERE state = 'leased' AND owner = ?", (owner,)
                )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
