"""``Backfill``: looks after the process that moves items, and remembers in the gallery that it should run.

What is to be done is read from the gallery at every look: a command that pauses, resumes, finishes or rolls back is
followed as if it had been asked here. What this service has begun stands in ``serve/worker.json`` of the gallery; a
service that is started again goes on with it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bowerbird import errors
from bowerbird.errors import BowerbirdError
from bowerbird.gallery.open import folder_of
from bowerbird.serve.problems import scrubbed
from bowerbird.serve.schemas import WorkerView
from bowerbird.upgrade.executors import WorkerProcess, thread_environment
from bowerbird.upgrade.worker import CRASHED, Event

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.serve.metrics import Metrics
    from bowerbird.serve.settings import ServeSettings

log = logging.getLogger("bowerbird.serve")

JOB_FILE = "serve/worker.json"
FIRST_PAUSE = 0.5  # seconds before a process that died is started again; doubled each time
MOST_STARTS = 6  # in a row, without one commit
PATIENCE = 10.0  # seconds for a task in hand after a pause; then it is given back
RATE_SECONDS = 10.0
TEMPORARY = (CRASHED, errors.StoreUnavailableError.exit_code)
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """What this service works on.

    Attributes:
        ref: Of the new encoder.
        space: Fingerprint of the new space.
        after: Number of the last upgrade before it: tells which one it is if the service dies while it begins.
        upgrade: Its own number; ``None`` until it has begun.
        rate, watch_every, max_nfr: See ``bowerbird.upgrade.run.run``.
        resumed_at: Time of the last resume: what stopped it before is settled.
    """

    ref: str
    space: str
    after: int
    upgrade: int | None
    rate: float | None
    watch_every: float | None
    max_nfr: float | None
    resumed_at: float = 0.0

    def is_of(self, state: UpgradeState) -> bool:
        if self.upgrade is None:
            return state.new == self.space and state.id == self.after + 1
        return state.id == self.upgrade


def start_child(task: str, settings: ServeSettings, line: Mapping[str, Any]) -> WorkerProcess:
    """A process of ``bowerbird.serve.worker`` on the gallery of a service. Blocks for some milliseconds.

    Its process group is its own, for Ctrl-C; its session is not, because some systems share out their cores by sessions
    first, and by priorities only within one.
    """
    environment = {**thread_environment(1), "OMP_WAIT_POLICY": "PASSIVE"}
    folder = folder_of(settings.gallery)
    place = settings.gallery if folder is None else str(folder.resolve())
    usual = {"task": task, "gallery": place, "device": settings.device, "nice": settings.backfill_nice}
    return WorkerProcess("bowerbird.serve.worker", {**usual, **line}, environment, process_group=0)


async def end_child(process: WorkerProcess, *, seconds: float = PATIENCE) -> None:
    """Ask it to give its task back and to end; after so many seconds it is killed."""
    process.interrupt()
    deadline = time.monotonic() + seconds
    while not process.poll()[1] and time.monotonic() < deadline:
        await asyncio.sleep(POLL_SECONDS)
    await asyncio.to_thread(process.kill)


def error_of(event: Event) -> BowerbirdError:
    """The error that a process has told, of its own class."""
    kind = getattr(errors, event.get("kind", ""), None)
    if isinstance(kind, type) and issubclass(kind, BowerbirdError):
        return kind(event["error"])
    return errors.StoreUnavailableError(f"the background process failed: {event['error']}")


class Backfill:
    """The worker of one service. All methods are called in its event loop.

    Attributes:
        job: What it works on; ``None`` where this service has begun nothing.
        version: Grows with everything that ``view`` would show differently.
    """

    def __init__(self, settings: ServeSettings, gallery: Gallery, metrics: Metrics) -> None:
        self.settings, self.gallery, self.metrics = settings, gallery, metrics
        self.job: Job | None = None
        self.version = 0
        self._process: WorkerProcess | None = None
        self._last: Event | None = None  # how the process that ended, ended
        self._begun: asyncio.Future[int] | None = None
        self._state: Literal["none", "starting", "working", "stopping", "paused", "done", "failed"] = "none"
        self._error: str | None = None
        self._moved = 0
        self._starts = 0
        self._start_at = 0.0
        self._stop_at: float | None = None  # when a process that should end is interrupted
        self._encoded: deque[tuple[float, int]] = deque()
        self._turn = asyncio.Lock()  # an act, or a look
        metrics.gauge("bowerbird_upgrade_rate", "Items per second of the worker.", lambda: self.rate() or 0.0)

    # ---------------------------------------------------------------------------------------------- what is asked

    async def begin(self, job: Job, settings: Mapping[str, Any]) -> int:
        """Let the process begin the upgrade, and go on with it. Returns its number.

        Raises:
            BowerbirdError: What refused it; nothing was begun.
        """
        async with self._turn:
            await self._take(job)
            self._begun = asyncio.get_running_loop().create_future()
            try:
                await self._start(begin=settings)
                number = await self._begun  # set by a look
            except BaseException:
                await self.stop()
                state = await asyncio.to_thread(self.gallery.store.upgrade_state)
                if state is None or not job.is_of(state):
                    await self._forget()
                    raise
                number = state.id  # it had begun when its process died
            finally:
                self._begun = None
            await self._take(replace(job, upgrade=number))
            return number

    async def take(self, job: Job) -> None:
        """Work on this from now on, also after a restart of the service. What failed before is forgotten."""
        async with self._turn:
            if self.job is not None and replace(self.job, resumed_at=job.resumed_at) != job:
                await self.stop()  # the next look starts one that is told of it
            await self._take(job)

    async def _take(self, job: Job) -> None:
        await asyncio.to_thread(self._remember, job)
        self.job, self._error, self._starts, self._start_at = job, None, 0, 0.0
        self._show("starting" if self._process is None else self._state)

    async def forget(self) -> None:
        """Work on nothing."""
        async with self._turn:
            await self._forget()

    async def _forget(self) -> None:
        if self._process is not None:
            self._show("stopping")
        await self.stop()
        if self.job is not None:
            await asyncio.to_thread(self._remember, None)
        self.job, self._error, self._moved = None, None, 0
        self._show("none")

    def recall(self) -> None:
        """Read what the service before this one worked on. Blocks."""
        content = self.gallery.storage.read_file(JOB_FILE)
        try:
            self.job = Job(**json.loads(content)) if content else None
        except (ValueError, TypeError) as exc:
            log.warning("%s cannot be read, so that no upgrade goes on by itself: %s", JOB_FILE, exc)

    def _remember(self, job: Job | None) -> None:
        self.gallery.storage.write_file(JOB_FILE, b"" if job is None else json.dumps(asdict(job)).encode())

    # --------------------------------------------------------------------------------------------------- the looks

    async def look(self, state: UpgradeState | None, complete: bool) -> None:
        """Hear the process, and start or stop one as the gallery asks for. Called a few times a second."""
        self._listen()
        if self.job is None or self._turn.locked():
            return
        async with self._turn:
            await self._look(self.job, state, complete)

    async def _look(self, job: Job, state: UpgradeState | None, complete: bool) -> None:
        if state is None or not job.is_of(state):
            await self._forget()  # finished or rolled back, here or by a command
            return
        if job.upgrade is None:  # the service died while it began
            await self._take(replace(job, upgrade=state.id))
        if self._process is not None and not (self._last and self._last["event"] == "ended"):
            self._stop_in_time(state)
        elif state.state == "paused":
            self._show("paused")
        elif complete:
            self._show("done")
        elif self._state == "failed" or self._process is not None:
            pass
        elif time.monotonic() >= self._start_at:
            await self._start()

    def _listen(self) -> None:
        if self._process is None:
            return
        events, over = self._process.poll()
        for event in events:
            self._hear(event)
        if over:
            process, self._process, self._stop_at = self._process, None, None
            last = self._last or {"event": "failed", "error": process.how_it_died(), "exit_code": CRASHED}
            process.kill()  # its pipes
            self._ended(last)

    def _hear(self, event: Event) -> None:
        name = event["event"]
        if name == "begun" and self._begun is not None and not self._begun.done():
            self._begun.set_result(event["upgrade"])
        if name == "encoded":
            now = time.monotonic()
            self._encoded.append((now, event["count"]))
            while len(self._encoded) > 3 and self._encoded[0][0] < now - RATE_SECONDS:
                self._encoded.popleft()
        if name == "committed":
            self._moved += event["count"]
            self._starts = 0
        if name in ("ended", "failed"):
            self._last = event
        if name in ("begun", "encoded", "committed") and self._state == "starting":
            self._show("working")
        self.version += name == "committed"

    def _ended(self, last: Event) -> None:
        self._encoded.clear()
        self.version += 1
        if self._begun is not None:
            if not self._begun.done():
                self._begun.set_exception(error_of(last))
            return
        if last["event"] == "ended":
            self._start_at = time.monotonic() + FIRST_PAUSE  # where it ended and there is still work
            return
        if self._state == "stopping":
            return
        self._error = str(last["error"])
        log.warning("the background worker ended: %s", self._error)
        if last["exit_code"] in TEMPORARY and self._starts < MOST_STARTS:
            self._start_at = time.monotonic() + FIRST_PAUSE * 2 ** (self._starts - 1)
            self._show("starting")
        else:
            self._show("failed")

    async def _start(self, begin: Mapping[str, Any] | None = None) -> None:
        job = self.job
        assert job is not None
        line = {
            "ref": job.ref, "upgrade": job.upgrade, "begin": dict(begin or {}),
            "rate": job.rate, "watch_every": job.watch_every, "max_nfr": job.max_nfr,
        }  # fmt: skip
        self._last = None
        if self._starts:
            self.metrics.worker_restarted()
        self._starts += 1
        self._process = await asyncio.to_thread(start_child, "move", self.settings, line)
        self._show("starting")

    def _stop_in_time(self, state: UpgradeState) -> None:
        """A paused upgrade lets its worker commit what it has in hand, for a while."""
        assert self._process is not None
        if state.state != "paused":
            self._stop_at = None
            if self._state == "stopping":
                self._show("working")
        elif self._stop_at is None:
            self._stop_at = time.monotonic() + PATIENCE
            self._show("stopping")
        elif time.monotonic() >= self._stop_at:
            self._process.interrupt()
            self._stop_at = time.monotonic() + PATIENCE

    def abandon(self) -> None:
        """Wait no longer for an upgrade to begin."""
        if self._begun is not None and not self._begun.done():
            self._begun.set_exception(errors.StoreUnavailableError("the service was stopped before the upgrade began"))

    async def stop(self) -> None:
        """End the process. The job stays, for the next service."""
        if self._process is not None:
            process, self._process = self._process, None
            self._encoded.clear()
            await end_child(process)

    # -------------------------------------------------------------------------------------------------------- view

    def _show(self, state: Literal["none", "starting", "working", "stopping", "paused", "done", "failed"]) -> None:
        self.version += state != self._state
        self._state = state

    def rate(self) -> float | None:
        """Items per second of the last while; ``None`` where there is none yet."""
        encoded = list(self._encoded)
        if len(encoded) < 2:
            return None
        return sum(count for _, count in encoded[1:]) / max(time.monotonic() - encoded[0][0], 1e-3)

    def view(self, left: int) -> WorkerView:
        """``left``: items that are not in the new space yet."""
        rate = self.rate()
        working = self._state == "working"
        return WorkerView(
            state=self._state,
            rate=rate if working else None,
            seconds_left=left / rate if working and rate else None,
            moved=self._moved,
            error=scrubbed(self._error) if self._error and self._state in ("failed", "starting") else None,
        )
