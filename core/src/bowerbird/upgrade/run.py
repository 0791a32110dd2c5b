"""``run``: the resumable worker that moves a gallery to the new space.

A worker leases a task, encodes its items and commits their vectors in one atomic step. The store sees to it that a kill
at any point loses at most the task in hand, that a second worker shares the rest, and that serving is right all along.
``bowerbird.upgrade.start`` says how an upgrade begins; ``bowerbird.upgrade.engines`` starts several workers.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bowerbird.errors import InputError, SpaceError, StoreUnavailableError, UpgradeError
from bowerbird.gallery.tasks import LeaseLostError
from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.patience import Patience, may_pass
from bowerbird.upgrade.start import join
from bowerbird.upgrade.state import UpgradeStatus, status
from bowerbird.upgrade.watch import WatchEntry, watch

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.tasks import Lease

LEASE_SECONDS = 120.0
WATCH_EVERY = 0.05
STORE_PATIENCE = 300.0  # seconds for which a store may stay away
TASK_SECONDS = 5.0  # of work in one commit at most, where the rate is limited: what a kill may cost
TOLD_SECONDS = 10.0  # of waiting for other workers, after which it is said what is waited for
IDLE_SECONDS = 0.1  # between two looks, while the rest is in the hands of other workers


@dataclass(frozen=True)
class WorkerShare:
    """What one of several workers did.

    Attributes:
        index: 0 to the number of workers - 1.
        reason: As in ``RunReport``, or ``failed``.
        encoded: Items that it committed, those of processes that died in its place included.
        failed: Attempts that failed.
        seconds: Wall time.
        restarts: How often its process died and was started again.
        error: Why it failed, or ``None``.
        exit_code: 0, or what a command should return for ``error``.
    """

    index: int
    reason: str
    encoded: int
    failed: int
    seconds: float
    restarts: int = 0
    error: str | None = None
    exit_code: int = 0


@dataclass(frozen=True)
class RunReport:
    """What one call of ``run`` did, or several workers did together.

    Attributes:
        reason: Why it ended: ``complete``, ``stop-after``, ``stop-at-share``, ``paused``, ``stop-rule``, ``ended``
            (finished or rolled back by another process), ``stopped`` (it was asked to), or, of several workers,
            ``failed`` (all that is left is what failing workers could not do).
        encoded: Items that this call committed.
        failed: Attempts of this call that failed (an item is tried three times).
        seconds: Wall time.
        share: Share of the live items that are in the new space now, 0 to 1.
        watched: What ``watch`` measured meanwhile.
        failures: ``(item id, attempts, error)`` of items that cannot be encoded.
        workers: The share of each, where there were several.
    """

    reason: str
    encoded: int
    failed: int
    seconds: float
    share: float
    watched: tuple[WatchEntry, ...] = ()
    failures: tuple[tuple[str, int, str], ...] = ()
    workers: tuple[WorkerShare, ...] = ()

    @property
    def rate(self) -> float:
        """Items per second."""
        return self.encoded / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rate": self.rate}


@dataclass
class Limits:
    """When to stop, and how fast to go; see ``run``. Raises ``InputError`` for values that make no sense."""

    stop_after: int | None = None
    stop_at_items: int | None = None
    stop_at_share: float | None = None
    rate: float | None = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.stop_after is not None and self.stop_after < 1:
            raise InputError(f"stop_after is {self.stop_after}; it must be at least 1 item")
        if self.stop_at_items is not None and self.stop_at_items < 1:
            raise InputError(f"stop_at_items is {self.stop_at_items}; it must be at least 1 item")
        if self.stop_at_share is not None and not 0 < self.stop_at_share <= 1:
            raise InputError(f"stop_at_share is {self.stop_at_share}; it must be above 0 and at most 1")
        if self.rate is not None and not self.rate > 0:
            raise InputError(f"rate is {self.rate}; it must be above 0 items per second")

    @property
    def of_the_gallery(self) -> bool:
        """Whether other workers' items count."""
        return self.stop_at_items is not None or self.stop_at_share is not None

    def reached(self, done: int, now: UpgradeStatus) -> str | None:
        if self.stop_after is not None and done >= self.stop_after:
            return "stop-after"
        if self.stop_at_items is not None and now.new_items >= self.stop_at_items:
            return "stop-after"
        if self.stop_at_share is not None and now.share >= self.stop_at_share:
            return "stop-at-share"
        return None

    def others_will_reach(self, now: UpgradeStatus, tasks: int, task_items: int) -> bool:
        """Whether the ``tasks`` that other workers have in hand are enough: one more would go beyond the limit."""
        expected = now.new_items + tasks * task_items
        if self.stop_at_items is not None and expected >= self.stop_at_items:
            return True
        searched = now.old_items + now.new_items
        return self.stop_at_share is not None and expected >= self.stop_at_share * searched

    @property
    def most_at_once(self) -> int | None:
        """Items to lease at once, however large the tasks are; ``None``: whole tasks."""
        return None if self.rate is None else max(1, round(self.rate * TASK_SECONDS))

    def keep_to_rate(self, done: int, meanwhile: Callable[[], None]) -> None:
        """Wait until ``done`` items are due; ``meanwhile`` is called again and again, and may end it by raising."""
        while self.rate is not None and (wait := self.started + done / self.rate - time.monotonic()) > 0:
            meanwhile()
            time.sleep(min(wait, IDLE_SECONDS))


class Watching:
    """Measures the watch set after each share ``every`` of the gallery, whoever moved it.

    Raises:
        InputError: If ``every`` or ``max_nfr`` is no share.
    """

    def __init__(self, gallery: Gallery, *, every: float | None, max_nfr: float | None, share: float) -> None:
        if every is None and max_nfr is not None:
            every = WATCH_EVERY  # a rule that is never looked at would stop nothing
        if every is not None and not 0 < every <= 1:
            raise InputError(f"watch_every is {every}; it is a share of the gallery, above 0 and at most 1")
        if max_nfr is not None and not 0 <= max_nfr <= 1:
            raise InputError(f"max_nfr is {max_nfr}; it is a share of the queries, 0 to 1")
        self.gallery, self.every, self.max_nfr = gallery, every, max_nfr
        self.first = share
        self.next = share + (every or 0)
        self.entries: list[WatchEntry] = []

    @property
    def stopped(self) -> bool:
        return bool(self.entries) and self.entries[-1].stopped

    def look(self, share: float) -> bool:
        """Measure if it is time to; whether the stop rule paused the upgrade."""
        if self.every is None or share < self.next - 1e-9 or self.stopped:
            return self.stopped
        try:
            self.entries.append(watch(self.gallery, max_nfr=self.max_nfr))
        except UpgradeError:
            if self.gallery.store.upgrade_state() is not None:
                raise  # otherwise it ended meanwhile
        self.next = share + self.every  # not before: a store that was away is asked again
        return self.stopped

    def at_the_end(self, share: float) -> bool:
        """The last measurement of this run, where something moved since the one before."""
        measured = self.entries[-1].share if self.entries else self.first
        if measured < share:
            self.next = share
            return self.look(share)
        return self.stopped


def run(
    gallery: Gallery,
    encoder: ItemEncoder,
    *,
    rate: float | None = None,
    stop_after: int | None = None,
    stop_at_items: int | None = None,
    stop_at_share: float | None = None,
    watch_every: float | None = None,
    max_nfr: float | None = None,
    progress: Callable[[int, UpgradeStatus], None] | None = None,
    stop: Callable[[], bool] | None = None,
    upgrade: int | None = None,
    store_patience: float = STORE_PATIENCE,
    **begin_settings: Any,
) -> RunReport:
    """Work on the upgrade to the encoder's space until it is complete or a limit is reached; begin it if need be.

    Several processes may run at once; each ends when all is done. Ctrl-C gives the task in hand back; ``kill -9`` costs
    one task of encoding.

    Args:
        encoder: Of the new space.
        rate: At most so many items per second. Of large tasks, pieces of five seconds are leased and committed.
        stop_after: End once this call has committed so many items (at the end of the task that reaches it).
        stop_at_items: End once so many items of the gallery are in the new space, whoever moved them. Tasks are
            committed whole: the task that reaches it may go beyond, and no other, however many workers there are.
        stop_at_share: End once this share of the live items is new; as exact as ``stop_at_items``.
        watch_every: Measure the watch set after each such share of the gallery; 0.05 where only ``max_nfr`` is given.
        max_nfr: Pause the upgrade once a measurement shows a higher rate of negative flips against the old system.
        progress: Called after every batch with (items of this batch, status at the last commit), and after every commit
            with (0, status). An exception of it is a warning, and it is not called again.
        stop: Asked before every task and after every batch; ``True`` gives the task in hand back and ends.
        upgrade: Work on the upgrade of this number only, and begin none.
        store_patience: Seconds for which the store may stay away before the call ends with ``StoreUnavailableError``.
        begin_settings: Arguments of ``bowerbird.upgrade.start.begin``, read where this call begins the upgrade.

    Raises:
        UpgradeError: If another upgrade is under way, or this one is paused.
        SpaceError: If the encoder is not the one of the upgrade's new space, or stops reproducing its space.
        StoreUnavailableError: If the store stayed away; calling ``run`` again goes on where it was.
    """
    limits = Limits(stop_after, stop_at_items, stop_at_share, rate)
    patient = Patience(str(gallery.path), store_patience)
    watching = Watching(gallery, every=watch_every, max_nfr=max_nfr, share=0.0)
    try:
        state = join(gallery, encoder, upgrade=upgrade, **begin_settings)
        now = status(gallery)
    except (UpgradeError, SpaceError):
        under_way = gallery.store.upgrade_state()
        if upgrade is None or (under_way is not None and under_way.id == upgrade):
            raise
        return RunReport(reason="ended", encoded=0, failed=0, seconds=0.0, share=0.0)  # before, or in this moment
    owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"
    task_items = int(state.settings.get("task_items", 0))
    pieces = {} if limits.most_at_once is None else {"most": limits.most_at_once}
    task_items = min(task_items, pieces.get("most", task_items))
    tell = tolerant(progress)
    dead = _TheDead(owner)
    encoded = failed = 0
    watching.first, watching.next = now.share, now.share + (watching.every or 0)

    with _giving_back(gallery, owner):
        while True:
            reason = "stopped" if stop is not None and stop() else limits.reached(encoded, now)
            task = None
            if reason is None and not limits.others_will_reach(now, now.tasks.get("leased", 0), task_items):
                task = patient(gallery.store.lease_task, owner, LEASE_SECONDS, **pieces)
            if task is not None and limits.of_the_gallery:  # two workers may have seen the same room for one more task
                earlier = sum(lease.task < task.id for lease in patient(gallery.store.leases))
                now = patient(_status_after, gallery, now)
                if limits.others_will_reach(now, earlier, task_items):
                    _give_back(gallery, task)
                    continue
            if task is None:
                reason = reason or patient(_why_no_task, gallery, state.id)
                if reason == "leased":  # what is left is in the hands of other workers, who may die
                    patient(dead.free, gallery)
                    time.sleep(IDLE_SECONDS)
                    now = patient(_status_after, gallery, now)
                    continue
                break
            if task.upgrade != state.id:  # ours ended and another began, to a space that this encoder may not know
                _give_back(gallery, task)
                reason = "ended"
                break
            renewed = time.monotonic()
            in_hand = 0

            def hold(task: Any = task) -> None:
                nonlocal renewed
                if time.monotonic() - renewed > LEASE_SECONDS / 4:
                    patient(gallery.store.renew, task, LEASE_SECONDS)
                    renewed = time.monotonic()
                if stop is not None and stop():
                    raise _StopAsked

            def on_batch(
                count: int, now: UpgradeStatus = now, before: int = encoded, hold: Callable[[], None] = hold
            ) -> None:
                nonlocal in_hand
                in_hand += count
                tell(count, now)
                hold()
                # After every batch, not after the task: the load on the machine is even, and an end is heard of soon.
                limits.keep_to_rate(before + in_hand, hold)

            try:
                result = encoder.items(task.items, on_batch)
                nums = task.nums
                failures = {int(nums[position]): error for position, error in result.failures.items()}
                patient(gallery.store.commit_task, task, nums[result.positions], result.vectors, failures=failures)
            except LeaseLostError:
                now = patient(_status_after, gallery, now)
                continue  # another worker has it by now, or the upgrade ended; the next lease tells
            except _StopAsked:
                _give_back(gallery, task)
                reason = "stopped"
                break
            encoded += len(result.positions)
            failed += len(failures)
            now = patient(_status_after, gallery, now)
            patient(gallery.tend_index)  # an approximate index grows with the new part, in a small share of our time
            tell(0, now)
            if patient(watching.look, now.share):
                reason = "stop-rule"
                break

    if reason == "complete" and encoded:
        patient(lambda: gallery.tend_index(share=1))
    if reason in ("complete", "stop-after", "stop-at-share") and encoded:
        watching.at_the_end(now.share)
    end = patient(_status_after, gallery, now)
    return RunReport(
        reason=reason,
        encoded=encoded,
        failed=failed,
        seconds=time.monotonic() - limits.started,
        share=end.share,
        watched=tuple(watching.entries),
        failures=end.failures,
    )


class _StopAsked(Exception):
    """``stop`` said so in the middle of a task."""


def tolerant(progress: Callable[[int, UpgradeStatus], None] | None) -> Callable[[int, UpgradeStatus], None]:
    """``progress``, without the power to cost a task: what it draws is less than what was encoded."""
    broken = progress is None

    def tell(count: int, now: UpgradeStatus) -> None:
        nonlocal broken
        if broken or progress is None:
            return
        try:
            progress(count, now)
        except Exception as exc:
            broken = True
            warnings.warn(
                f"the progress function failed and is not called again ({type(exc).__name__}: {exc}); the upgrade "
                "goes on",
                RuntimeWarning,
                stacklevel=2,
            )

    return tell


def _status_after(gallery: Gallery, last: UpgradeStatus) -> UpgradeStatus:
    """The status now, or the last one of an upgrade that another process has ended."""
    try:
        now = status(gallery)
    except StoreUnavailableError:
        raise
    except UpgradeError:
        return last
    return now if now.id == last.id else last


def _why_no_task(gallery: Gallery, upgrade: int) -> str:
    state = gallery.store.upgrade_state()
    if state is None or state.id != upgrade:
        return "ended"
    if state.state == "paused":
        return "paused"
    try:
        return "complete" if gallery.store.progress().complete else "leased"
    except UpgradeError:
        return "ended"


def _give_back(gallery: Gallery, task: Any) -> None:
    try:
        gallery.store.release_task(task)
    except UpgradeError:
        pass  # it is no longer ours, or the upgrade ended: nothing to give back
    except Exception as exc:
        if not may_pass(exc):
            raise
        # The store is away: the lease runs out, or another worker sees that nobody renews it.


@contextmanager
def _giving_back(gallery: Gallery, owner: str) -> Iterator[None]:
    """Whatever ends the block by an exception, ``owner`` has no task in hand afterwards.

    Its leases are looked up, because Ctrl-C may come when a lease is committed and its task not yet returned.
    """
    try:
        yield
    except BaseException:
        with suppress(Exception):  # what ended the block is told; the lease of a store that is away runs out
            for lease in gallery.store.leases():
                if lease.owner == owner:
                    gallery.store.free_lease(lease)
        raise


class _TheDead:
    """Frees the tasks of workers that no longer live.

    A process of this machine is looked up. Of a worker elsewhere only the lease is seen: one that nobody renewed for
    longer than a lease lasts, *by this process's own clock, which nobody can set*, is free. Lease times alone would not
    do: they are another machine's wall clock, and after a jump back they lie far in the future. A lease of this worker
    itself, which asks here because it has nothing in hand, is one whose answer was lost on its way: free, too.

    Where that is wrong (a worker in another container of the same name), its commit is refused by the fencing token.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.host = socket.gethostname()
        self._seen: dict[Lease, float] = {}
        self._told = False

    def free(self, gallery: Gallery) -> None:
        now = time.monotonic()
        leases = gallery.store.leases()
        self._seen = {lease: self._seen.get(lease, now) for lease in leases}
        for lease in leases:
            name, _, rest = lease.owner.rpartition(":")[0].rpartition(":")
            died_here = name == self.host and rest.isdigit() and not _lives(int(rest))
            if lease.owner == self.owner or died_here or now - self._seen[lease] > LEASE_SECONDS:
                gallery.store.free_lease(lease)
            elif now - self._seen[lease] > TOLD_SECONDS and not self._told:
                self._told = True
                warnings.warn(
                    f"waiting for the last tasks of {gallery.path}, which other workers have in hand (such as "
                    f"{lease.owner}); one that gives no sign for {LEASE_SECONDS:g} s is given up, and its task is done "
                    "here",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
