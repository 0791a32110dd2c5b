"""``scale:ray``: the workers of an upgrade on a Ray cluster, or on a local Ray where there is none.

Ray starts processes and says when one died. It keeps nothing: what is done and what is in hand stands in the gallery,
as for every other worker, so that a lost cluster costs the tasks in hand and no more.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray

from bowerbird.errors import InputError, without_passwords
from bowerbird.gallery.open import folder_of
from bowerbird.upgrade.executors import checked_workers, supervise, thread_environment, threads_per_worker
from bowerbird.upgrade.run import WorkerShare
from bowerbird.upgrade.worker import Event, Job, work

LOCAL_STORE_BYTES = 100 << 20  # nothing goes through Ray's object store but lines of text


class RayExecutor:
    """So many actors, spread over the cluster that RAY_ADDRESS names; without it over a Ray of this machine.

    Each has one CPU by Ray's count, and its part of the GPUs where the cluster has some.
    """

    speaks = True

    def __init__(self, workers: int | None = None) -> None:
        self.workers = checked_workers(workers)

    def prepare(self, begin: Callable[[], Job]) -> Job:
        return begin()

    def run(self, job: Job, tell: Callable[[int, Event], None]) -> list[WorkerShare]:
        """See ``bowerbird.upgrade.engines.Executor``.

        Raises:
            InputError: If the cluster is too small, or has machines that cannot reach the gallery's folder.
        """
        started = not ray.is_initialized()
        if started:
            _connect(self.workers)
        try:
            resources = ray.cluster_resources()
            machines = [node for node in ray.nodes() if node["Alive"]]
            self._check(job, resources.get("CPU", 0), len(machines))
            environment = thread_environment(threads_per_worker(-(-self.workers // len(machines))))
            actor = ray.remote(_Actor).options(
                num_cpus=1,
                num_gpus=min(1.0, resources.get("GPU", 0) / self.workers),
                max_concurrency=3,  # it works, and answers
                scheduling_strategy="SPREAD",
                runtime_env={"env_vars": environment},
            )
            own = job.for_one_of(self.workers)
            return supervise(lambda index: _RayWorker(actor.remote(), own, index), self.workers, tell)
        finally:
            if started:
                ray.shutdown()

    def _check(self, job: Job, cpus: float, machines: int) -> None:
        if cpus < self.workers:
            raise InputError(
                f"{self.workers} workers need as many CPUs, and the Ray cluster has {cpus:g}; ask for fewer workers"
            )
        if machines > 1 and folder_of(job.gallery) is not None:
            raise InputError(
                f"the gallery {job.gallery} is a folder of this machine, and the Ray cluster has {machines} machines. "
                "Copy it to a database that all of them reach (`bowerbird gallery copy`), or use --engine local"
            )


def _connect(workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(address=address, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as exc:
            raise InputError(
                f"there is no Ray cluster at RAY_ADDRESS={without_passwords(address)}: "
                f"{without_passwords(str(exc))}. Start it, or unset RAY_ADDRESS to use a Ray of this machine"
            ) from exc
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ray.init(
        address="local", num_cpus=max(cores, workers), include_dashboard=False, log_to_driver=False,
        object_store_memory=LOCAL_STORE_BYTES,
    )  # fmt: skip


class _Actor:
    """The process of a worker: one thread works, others answer."""

    def __init__(self) -> None:
        self._said: deque[Event] = deque()
        self._stop = threading.Event()

    def work(self, job: dict[str, Any], index: int) -> None:
        work(Job(**job), index, self._said.append, self._stop.is_set)

    def said(self) -> list[Event]:
        return [self._said.popleft() for _ in range(len(self._said))]

    def stop(self) -> None:
        self._stop.set()


class _RayWorker:
    """An actor as ``supervise`` sees it. Never waits for Ray."""

    def __init__(self, actor: Any, job: Job, index: int) -> None:
        self.actor = actor
        actor.work.remote(asdict(job), index)
        self._asked = actor.said.remote()
        self._over = False
        self._death = ""

    def poll(self) -> tuple[list[Event], bool]:
        if self._over or not ray.wait([self._asked], timeout=0)[0]:
            return [], self._over
        try:
            events = ray.get(self._asked)
        except ray.exceptions.RayError as exc:
            self._over, self._death = True, str(exc).strip().partition("\n")[0]
            return [], True
        self._over = any(event["event"] in ("ended", "failed") for event in events)
        if not self._over:
            self._asked = self.actor.said.remote()
        return events, self._over

    def how_it_died(self) -> str:
        return f"Ray lost it: {self._death}"

    def interrupt(self) -> None:
        self.actor.stop.remote()

    def kill(self) -> None:
        ray.kill(self.actor)
