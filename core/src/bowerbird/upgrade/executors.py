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
            lambda index: _Process(own, index, environment), self.workers, tell, max_restarts=self.max_restarts
        )


def thread_environment(threads: int) -> dict[str, str]:
    """The variables that hold a process to so many threads; a smaller number that the user has set stays."""
    out = {}
    for name in THREADS:
        given = os.environ.get(name, "")
        out[name] = given if given.isdigit() and 0 < int(given) < threads else str(threads)
    return out


class _Process:
    """A worker process. In a session of its own, so that Ctrl-C reaches it once, from here."""

    def __init__(self, job: Job, index: int, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bowerbird.upgrade.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        self.ready = False
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already; that will be seen
            self.process.stdin.write(json.dumps({"job": asdict(job), "index": index}).encode() + b"\n")
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
        from datetime import timedelta

        from torch import distributed, set_num_threads

        # A process may wait for the others as long as a backfill takes.
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's own default, for training
            set_num_threads(threads_per_worker(int(os.environ.get("LOCAL_WORLD_SIZE", self.workers))))
        box: list[Any] = [None]
        if self.speaks:
            try:
                box[0] = asdict(begin())
                distributed.broadcast_object_list(box)
            except BaseException:
                distributed.broadcast_object_list(box)
                distributed.destroy_process_group()
                raise
        else:
            distributed.broadcast_object_list(box)
            if box[0] is None:
                distributed.destroy_process_group()
                raise SystemExit(0)  # rank 0 says what is wrong and returns its code
        return Job(**box[0])

    def run(self, job: Job, tell: Callable[[int, Event], None]) -> list[WorkerShare]:
        from torch import distributed

        events: list[Event] = []
        started = time.monotonic()
        said = [0]

        def hear(event: Event) -> None:
            if event["event"] in ("ended", "failed"):
                events.append(event)
            elif event["event"] == "committed":
                said[0] += event["count"]
            if self.speaks:
                tell(self.rank, event)

        work(job.for_one_of(self.workers), int(os.environ.get("LOCAL_RANK", "0")), hear)
        last, seconds = events[-1], time.monotonic() - started
        if last["event"] == "ended":
            report = last["report"]
            own = WorkerShare(self.rank, report["reason"], report["encoded"], report["failed"], seconds)
        else:
            own = WorkerShare(self.rank, "failed", said[0], 0, seconds, 0, last["error"], last["exit_code"])
        shares: list[Any] = [None] * self.workers
        distributed.all_gather_object(shares, own)
        distributed.destroy_process_group()
        return shares
