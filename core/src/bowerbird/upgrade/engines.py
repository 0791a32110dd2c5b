"""Several workers on one upgrade: who starts them, what they share, and what becomes of those that die.

    report = run_workers(gallery, lambda: Job(...), executor=load_executor("local")(4))

The truth is the gallery: its leases and fencing tokens keep two workers from one task, whatever started them. An
executor only starts processes and relays what they say. It is a record of role ``executor``; its target is a class as
``Executor`` below. Those of core are in ``bowerbird.upgrade.executors``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from bowerbird.errors import MissingExtraError, UnknownNameError, UpgradeError
from bowerbird.gallery.open import folder_of
from bowerbird.registry import get_registry
from bowerbird.upgrade.patience import Patience
from bowerbird.upgrade.run import STORE_PATIENCE, Limits, RunReport, Watching, WorkerShare, tolerant
from bowerbird.upgrade.start import check_store
from bowerbird.upgrade.state import UpgradeStatus, status
from bowerbird.upgrade.worker import Event, Job

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.snapshot import UpgradeState

# Of several reasons the one that tells what the upgrade needs next.
REASONS = ("stop-rule", "paused", "ended", "stopped", "stop-after", "stop-at-share", "complete")


class Executor(Protocol):
    """Starts workers somewhere.

    Attributes:
        workers: How many.
        speaks: Whether this process begins the upgrade, watches it, and talks to the user. Only under a launcher that
            starts the whole command several times is it ``False`` anywhere.
    """

    workers: int
    speaks: bool

    def __init__(self, workers: int | None = None) -> None:
        """Raises ``InputError`` where it cannot be used so."""

    def prepare(self, begin: Callable[[], Job]) -> Job:
        """The job, made by ``begin`` in the one process that speaks."""

    def run(self, job: Job, tell: Callable[[int, Event], None]) -> list[WorkerShare]:
        """Run the workers to their end. ``tell(index, event)`` is called in this thread with what they say.

        Ctrl-C (``KeyboardInterrupt``) ends every worker, each gives its task back, and is raised again.
        """


def load_executor(name: str) -> type[Executor]:
    """The executor ``core:local``, ``torchrun``, ...

    Raises:
        UnknownNameError: If there is none of this name; suggests close ones.
        MissingExtraError: If its package is not installed.
    """
    registry = get_registry()
    try:
        record = registry.get("retriever", name, role="executor")
    except UnknownNameError as exc:
        if name in ("ray", "scale:ray"):
            raise MissingExtraError("engine 'ray' comes with: pip install 'bowerbird-scale[ray]'") from exc
        raise
    return registry.load(record)


def run_workers(
    gallery: Gallery,
    begin: Callable[[], Job],
    executor: Executor,
    *,
    watch_every: float | None = None,
    max_nfr: float | None = None,
    progress: Callable[[int, UpgradeStatus], None] | None = None,
) -> RunReport:
    """Run an upgrade with the workers of ``executor``.

    The quality is watched here, in one place, as the share of the whole gallery grows; a stop rule pauses the upgrade
    and thereby every worker.

    Args:
        gallery: Open in this process, for watching.
        begin: Begins the upgrade, or checks the one under way, and says what a worker has to do. Called once.
        watch_every, max_nfr: See ``bowerbird.upgrade.run.run``.
        progress: As there; the status counts what all workers have encoded, committed or not.

    Returns:
        The sum, with each worker's share. ``reason`` is ``failed`` where workers failed and the upgrade is therefore
        not complete.
    """
    watching = Watching(gallery, every=watch_every, max_nfr=max_nfr, share=0.0)  # refused before anything begins
    check_store(gallery, also=("many-workers",))
    job = executor.prepare(begin)
    started = time.monotonic()
    last = status(gallery)
    watching.first, watching.next = last.share, last.share + (watching.every or 0)
    patient = Patience(str(gallery.path), job.store_patience)
    show = tolerant(progress)
    in_hand: dict[int, int] = {}

    def hear(index: int, event: Event) -> None:
        nonlocal last
        count = event.get("count", 0)
        if event["event"] == "encoded":
            in_hand[index] = in_hand.get(index, 0) + count
        else:
            in_hand[index] = 0  # it committed, or it ended and what it had in hand is done again
        if event["event"] == "committed":
            last = UpgradeStatus(**event["status"])
            patient(watching.look, last.share)
            count = 0
        show(count, replace(last, new_items=last.new_items + sum(in_hand.values())))

    shares = executor.run(job, hear)
    reason = _together(shares)
    if executor.speaks:
        with contextlib.suppress(UpgradeError):  # another process has ended it
            now = patient(status, gallery)
            last = now if now.id == job.upgrade else last
        show(0, last)  # what workers said may have come in another order than they committed
        if reason == "complete" and any(share.encoded for share in shares):
            patient(watching.at_the_end, last.share)
    return RunReport(
        reason="stop-rule" if watching.stopped else reason,
        encoded=sum(share.encoded for share in shares),
        failed=sum(share.failed for share in shares),
        seconds=time.monotonic() - started,
        share=last.share,
        watched=tuple(watching.entries),
        failures=last.failures,
        workers=tuple(shares),
    )


def make_job(
    gallery: Gallery,
    url: str,
    state: UpgradeState,
    loader: str,
    settings: Mapping[str, Any],
    *,
    rate: float | None = None,
    stop_after: int | None = None,
    stop_at_share: float | None = None,
    store_patience: float = STORE_PATIENCE,
) -> Job:
    """What the workers of an upgrade have to do. Several workers stop after so many items *together*.

    Raises:
        InputError: For a limit outside its range.
    """
    Limits(stop_after, None, stop_at_share, rate)
    items = None if stop_after is None else status(gallery).new_items + stop_after
    return Job(
        location(url), state.id, loader, settings, rate=rate, stop_at_items=items, stop_at_share=stop_at_share,
        store_patience=store_patience,
    )  # fmt: skip


def location(gallery: str) -> str:
    """The path or URL of a gallery, as a process with another working directory needs it."""
    folder = folder_of(gallery)
    return gallery if folder is None else str(folder.resolve())


def _together(shares: Sequence[WorkerShare]) -> str:
    reasons = {share.reason for share in shares}
    return next((reason for reason in REASONS if reason in reasons), "failed")
