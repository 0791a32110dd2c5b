"""Executors of core: worker processes of this machine, and the processes of torchrun.

``supervise`` looks after workers wherever they run; executors of plugins use it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from bowerbird.errors import InputError
from bowerbird.upgrade.run import WorkerShare
from bowerbird.upgrade.worker import CRASHED, Event, Job, work

MAX_RESTARTS = 3  # of each worker: what kills a fourth process is in the data or on the machine, not chance
GRACE_SECONDS = 30.0  # for giving tasks back after Ctrl-C
POLL_SECONDS = 0.02
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def threads_per_worker(workers: int) -> int:
    """How many of this machine's cores one of so many workers may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def checked_workers(workers: int | None) -> int:
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; it must be at least 1")
    return workers or 1


class Worker(Protocol):
    """A started worker, wherever it runs."""

    def poll(self) -> tuple[list[Event], bool]:
        """What it said since the last call, and whether it is over: no more will come."""

    def how_it_died(self) -> str:
        """For one that is over and never said how it ended."""

    def interrupt(self) -> None:
        """Ask it to give its task back and to end."""

    def kill(self) -> None:
        """End it now. Does nothing where it is over."""


@dataclass
class _Post:
    """A worker's place: processes may follow each other in it."""

    worker: Worker
    started: float
    restarts: int = 0
    encoded: int = 0  # by processes that died, and by this one so far
    before: int = 0  # by those that died
    failed: int = 0
    last: Event | None = None
    start_at: float = 0.0
    share: WorkerShare | None = None


def supervise(
    start: Callable[[int], Worker],
    workers: int,
    tell: Callable[[int, Event], None],
    *,
    max_restarts: int = MAX_RESTARTS,
) -> list[WorkerShare]:
    """Start workers 0 to ``workers - 1``, relay what they say, and start one again that died without saying why.

    A worker that reports an error of the user's (a wrong encoder, a store that stayed away) is not started again.
    """
    posts = [_Post(start(index), time.monotonic()) for index in range(workers)]
    try:
        while any(post.share is None for post in posts):
            for index, post in enumerate(posts):
                if post.share is None:
                    _look_after(index, post, start, tell, max_restarts)
            time.sleep(POLL_SECONDS)
    except BaseException:
        for post in posts:
            post.worker.interrupt()
        deadline = time.monotonic() + GRACE_SECONDS
        while not all(post.worker.poll()[1] for post in posts) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        raise
    finally:
        for post in posts:
            post.worker.kill()
    return [post.share for post in posts if post.share is not None]


def _look_after(
    index: int, post: _Post, start: Callable[[int], Worker], tell: Callable[[int, Event], None], max_restarts: int
) -> None:
    if post.start_at:
        if time.monotonic() >= post.start_at:
            post.worker, post.last, post.start_at, post.before = start(index), None, 0.0, post.encoded
        return
    events, over = post.worker.poll()
    for event in events:
        if event["event"] in ("ended", "failed"):
            post.last = event
        if event["event"] == "committed":
            post.encoded += event["count"]
        if event["event"] != "ready":
            tell(index, event)
    if not over:
        return
    seconds = time.monotonic() - post.started
    last = post.last or {"event": "failed", "error": post.worker.how_it_died(), "exit_code": CRASHED}
    if last["event"] == "ended":
        report = last["report"]
        post.share = WorkerShare(
            index, report["reason"], post.before + report["encoded"], report["failed"], seconds, post.restarts
        )
        return
    if post.last is None:
        tell(index, last)
    if last["exit_code"] == CRASHED and post.restarts < max_restarts:
        post.worker.kill()  # what is left of it: pipes, not a process
        post.restarts += 1
        post.start_at = time.monotonic() + 0.1 * 2**post.restarts
        return
    post.share = WorkerShare(index, "failed", post.encoded, 0, seconds, post.restarts, last["error"], last["exit_code"])


# ------------------------------------------------------------------------------------------------------- executors


class LocalExecutor:
    """``core:local``: so many processes on this machine."""

    speaks = True

    def __init__(self, workers: int | None = None, *, max_restarts: int = MAX_RESTARTS) -> None:
        self.workers = checked_workers(workers)
        self.max_restarts = max_restarts

    def prepare(self, begin: Callable[[], Job]) -> Job:
        return begin()

    def run(self, job: Job, tell: Callable[[int, Event], None]) -> list[WorkerShare]:
        own = job.for_one_of(self.workers)
        environment = thread_environment(threads_per_worker(self.workers))
        return supervise(
            lambda index: WorkerProcess(
                "bowerbird.upgrade.worker", {"job": asdict(own), "index": index}, environment, start_new_session=True
            ),
            self.workers,
            tell,
            max_restarts=self.max_restarts,
        )


def thread_environment(threads: int) -> dict[str, str]:
    """The variables that hold a process to so many threads; a smaller number that the user has set stays."""
    out = {}
    for name in THREADS:
        given = os.environ.get(name, "")
        out[name] = given if given.isdigit() and 0 < int(given) < threads else str(threads)
    return out


class WorkerProcess:
    """A process of this machine that runs ``python -m MODULE``, which calls ``bowerbird.upgrade.worker.converse``.

    Args:
        line: What it is told on its standard input, plain data.
        environment: Variables besides those of this process.
        options: Of ``subprocess.Popen``: a session or a group of its own, so that Ctrl-C reaches it once, from here.
    """

    def __init__(self, module: str, line: Mapping[str, Any], environment: Mapping[str, str], **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}, **options,
        )  # fmt: skip
        self.ready = False
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already; that will be seen
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # the end of a line is missing where a kill cut it off
                self._said.put(json.loads(line))

    def poll(self) -> tuple[list[Event], bool]:
        over = self.process.poll() is not None and not self._reader.is_alive()
        events = []
        while not self._said.empty():
            events.append(self._said.get())
        self.ready = self.ready or bool(events)
        return events, over

    def how_it_died(self) -> str:
        code = self.process.returncode
        if code is not None and code < 0:
            return f"its process was ended by signal {signal.Signals(-code).name}"
        return f"its process ended with code {code}"

    def interrupt(self) -> None:
        self.poll()
        if not self.ready:  # it imports, and has nothing in hand
            self.process.kill()
        elif self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(timeout=1)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class TorchrunExecutor:
    """``core:torchrun``: every process that torchrun started is a worker; the one of rank 0 speaks.

        torchrun --nproc-per-node 4 -m bowerbird upgrade run photos --to runs/new --engine torchrun

    torchrun ends all of them when one dies; with ``--max-restarts`` it starts them again. Both are safe: leases decide.
    """

    def __init__(self, workers: int | None = None) -> None:
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            count = workers or 4
            raise InputError(
                "engine 'torchrun' works inside torchrun, and this process was not started by it. Start it so: "
                f"torchrun --nproc-per-node {count} -m bowerbird upgrade run GALLERY --to ENCODER --engine torchrun; "
                f"or use --engine local --workers {count}"
            )
        self.rank, self.workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.speaks = self.rank == 0
        if workers not in (None, 1, self.workers):
            raise InputError(
                f"torchrun started {self.workers} processes and --workers asks for {workers}; leave --workers out"
            )

    def prepare(self, begin: Callable[[], Job]) -> Job:
        from bowerbird import dist

        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.workers))
        with contextlib.ExitStack() as stack:
            stack.enter_context(dist.plain_data_group(threads=threads_per_worker(on_this_machine)))
            if self.speaks:
                job = None
                try:
                    job = begin()
                finally:
                    dist.from_main(None if job is None else asdict(job))
            else:
                told = dist.from_main(None)
                if told is None:
                    raise SystemExit(0)  # rank 0 says what is wrong and returns its code
                job = Job(**told)
            self._group = stack.pop_all()  # stays open until the workers are done
        return job

    def run(self, job: Job, tell: Callable[[int, Event], None]) -> list[WorkerShare]:
        from bowerbird import dist

        events: list[Event] = []
        started = time.monotonic()
        encoded = 0

        def hear(event: Event) -> None:
            nonlocal encoded
            if event["event"] in ("ended", "failed"):
                events.append(event)
            elif event["event"] == "committed":
                encoded += event["count"]
            if self.speaks:
                tell(self.rank, event)

        with self._group:
            work(job.for_one_of(self.workers), int(os.environ.get("LOCAL_RANK", "0")), hear)
            last, seconds = events[-1], time.monotonic() - started
            if last["event"] == "ended":
                report = last["report"]
                own = WorkerShare(self.rank, report["reason"], report["encoded"], report["failed"], seconds)
            else:
                own = WorkerShare(self.rank, "failed", encoded, 0, seconds, 0, last["error"], last["exit_code"])
            return dist.from_all(own)
