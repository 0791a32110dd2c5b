"""What the contract of a store works with: spaces, vectors that depend on nothing but names, workers, and a model."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np

from bowerbird.errors import SnapshotGoneError, SpaceError
from bowerbird.gallery import Gallery, Item, Space, open_gallery
from bowerbird.gallery.tasks import LeaseLostError

FIRST = Space("contract-space-1", "contract:first", 12)
SECOND = Space("contract-space-2", "contract:second", 20)
THIRD = Space("contract-space-3", "contract:third", 8)


def vector(name: str, space: Space, content: str = "") -> np.ndarray:
    """Float32 ``(D,)`` of length 1: the same in every process."""
    digest = hashlib.sha256(f"{space.fingerprint} {name} {content}".encode()).digest()
    row = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(space.dim).astype(np.float32)
    return row / np.linalg.norm(row)


def vectors(names: Sequence[str], space: Space) -> np.ndarray:
    return np.array([vector(name, space) for name in names], np.float32).reshape(len(names), space.dim)


def encode(items: Sequence[Item], space: Space) -> np.ndarray:
    rows = [vector(item.id, space, item.content_hash or "") for item in items]
    return np.array(rows, np.float32).reshape(len(items), space.dim)


def queries(count: int = 4) -> dict[str, np.ndarray]:
    """Unit query vectors ``(count, D)`` in every space."""
    rng = np.random.default_rng(5)
    drawn = {space.fingerprint: rng.standard_normal((count, space.dim)) for space in (FIRST, SECOND, THIRD)}
    return {
        name: (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for name, rows in drawn.items()
    }


def begin(gallery: Gallery, space: Space, *, seed: int | None = None, task_items: int = 8, on_top: bool = False) -> Any:
    """Begin an upgrade, in a random order where a seed is given."""
    nums = np.sort(np.concatenate([part.nums for part in gallery.snapshot().parts]))
    order = None if seed is None else np.random.default_rng(seed).permutation(nums)
    return gallery.store.begin_upgrade(
        space, strategy="contract", order_name="core:random", order=order, task_items=task_items, on_top=on_top
    )


def work(gallery: Gallery, owner: str = "worker", *, tasks: int | None = None, lease_s: float = 300.0) -> int:
    """Lease and commit tasks until there are none, or ``tasks`` of them; returns how many items were committed."""
    done = 0
    while tasks is None or tasks > 0:
        task = gallery.store.lease_task(owner, lease_s)
        if task is None:
            break
        space = gallery.snapshot().write_space
        gallery.store.commit_task(task, task.nums, encode(task.items, space))
        done += len(task.items)
        tasks = None if tasks is None else tasks - 1
    return done


class WorkerProcess:
    """A process that works on the upgrade of the gallery at ``url``, ``pause`` seconds per task; prints each commit."""

    def __init__(self, url: str, owner: str, *, pause: float = 0.0, lease_s: float = 300.0) -> None:
        arguments = [sys.executable, "-m", __name__, url, owner, str(pause), str(lease_s)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)

    def commits(self, count: int) -> None:
        """Wait until it has committed ``count`` tasks."""
        assert self.process.stdout is not None
        for _ in range(count):
            assert self.process.stdout.readline(), f"the worker ended early, with code {self.process.wait()}"

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        self.process.kill()
        self.process.communicate()

    def finished(self) -> int:
        """Wait for its end; returns its exit code."""
        self.process.communicate(timeout=120)
        return self.process.returncode


def _main(url: str, owner: str, pause: str, lease_s: str) -> None:
    with open_gallery(url) as gallery:
        while True:
            task = gallery.store.lease_task(owner, float(lease_s))
            if task is None:
                if gallery.store.upgrade_state() is None or gallery.store.progress().complete:
                    return
                time.sleep(0.05)  # the rest is in the hands of others, who may die
                continue
            time.sleep(float(pause))
            gallery.store.commit_task(task, task.nums, encode(task.items, gallery.snapshot().write_space))
            print(len(task.items), flush=True)


class Model:
    """What a gallery should hold, as a dictionary, and random operations on both.

    Attributes:
        items: id -> (space, content), in the order of adding.
        log: What was done, for the message of a failure.
    """

    def __init__(self, gallery: Gallery, seed: int, *, rollback: bool) -> None:
        self.gallery, self.rng, self.can_roll_back = gallery, np.random.default_rng(seed), rollback
        self.items: dict[str, tuple[Space, str]] = {}
        self.serving: Space = FIRST
        self.target: Space | None = None
        self.log: list[str] = []
        self.queries = queries(2)

    def step(self) -> None:
        """One operation, chosen at random among those that are possible."""
        idle = (self.add, self.add, self.delete, self.begin, self.compact)
        moving = (self.add, self.add, self.add_old, self.delete, self.some_work, self.some_work, self.finish)
        choices = idle if self.target is None else moving + ((self.roll_back,) if self.can_roll_back else ())
        operation = choices[self.rng.integers(len(choices))]
        self.log.append(operation.__name__)
        operation()

    def _names(self) -> list[str]:
        return [f"id-{number}" for number in self.rng.permutation(25)[: self.rng.integers(1, 6)]]

    def add(self, space: Space | None = None) -> None:
        space = space or self.target or self.serving
        names, content = self._names(), str(self.rng.integers(3))
        rows = np.array([vector(name, space, content) for name in names])
        hashes = [content] * len(names)
        self.gallery.add(names, rows, content_hashes=hashes, space=space.fingerprint, replace=True)
        for name in names:
            self.items.pop(name, None)
            self.items[name] = (space, content)

    def add_old(self) -> None:
        self.add(self.serving)

    def delete(self) -> None:
        names = [name for name in self._names() if name in self.items]
        self.gallery.delete(names)
        for name in names:
            del self.items[name]

    def begin(self) -> None:
        self.target = SECOND if self.serving == FIRST else FIRST
        begin(self.gallery, self.target, seed=int(self.rng.integers(9)), task_items=4)

    def some_work(self) -> None:
        assert self.target is not None
        for _ in range(self.rng.integers(1, 4)):
            task = self.gallery.store.lease_task("model")
            if task is None:
                return
            self.gallery.store.commit_task(task, task.nums, encode(task.items, self.target))
            for item in task.items:
                self.items[item.id] = (self.target, self.items[item.id][1])

    def finish(self) -> None:
        assert self.target is not None
        work(self.gallery, "model")
        self.gallery.store.finish_upgrade(verified=True)
        self.items = {name: (self.target, content) for name, (_, content) in self.items.items()}
        self.serving, self.target = self.target, None

    def roll_back(self) -> None:
        self.gallery.store.rollback(encode_old=lambda items: encode(items, self.serving))
        self.items = {name: (self.serving, content) for name, (_, content) in self.items.items()}
        self.target = None

    def compact(self) -> None:
        self.gallery.compact()

    def check(self) -> None:
        """The gallery and the dictionary hold the same, and a search finds what sorting the dictionary finds."""
        told = f"after {self.log}"
        assert [item.id for item in self.gallery.items()] == list(self.items), told
        assert len(self.gallery) == len(self.items), told
        newest = self.target or self.serving
        counted = {space.fingerprint: 0 for space in {self.serving, newest}}
        for space, _ in self.items.values():
            counted[space.fingerprint] += 1
        assert self.gallery.counts() == counted, told
        found = self.gallery.search({space: self.queries[space] for space in counted}, 5)
        for row, ids in enumerate(found.ids):
            ranked = []
            for position, (name, (space, content)) in enumerate(self.items.items()):
                query = self.queries[space.fingerprint][row].astype(np.float64)
                distance = np.float32(1 - vector(name, space, content).astype(np.float64) @ query)
                ranked.append((distance, space != newest, position, name))
            assert ids == [name for *_, name in sorted(ranked)[:5]], told


class Rush:
    """Threads that add, delete, work and search at once, each with a gallery of its own, until they are stopped.

    Attributes:
        names: Ids that should be there.
        errors: What went wrong, as tracebacks.
        searches: How many searches were checked: each must show every live item of its epoch, once.
    """

    def __init__(self, url: str, open_it: Any) -> None:
        self.url, self.open = url, open_it
        with open_it(url) as gallery:
            self.names = {item.id for item in gallery.items()}
        self.errors: list[str] = []
        self.searches = self._added = 0
        self._stopped = threading.Event()
        jobs = (self._write, self._work, self._work, self._search)
        self._threads = [threading.Thread(target=self._repeat, args=(job,)) for job in jobs]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, job: Any) -> None:
        try:
            with self.open(self.url, lock_timeout=60.0) as gallery:
                while not self._stopped.is_set():
                    job(gallery)
        except Exception:
            self.errors.append(traceback.format_exc())

    def _write(self, gallery: Gallery) -> None:
        names = [f"rush-{self._added + number}" for number in range(3)]
        self._added += 3
        space = gallery.snapshot().write_space
        try:
            gallery.add(names, vectors(names, space), space=space.fingerprint)
        except SpaceError:  # the upgrade ended between the two lines
            return
        self.names.update(names)
        gone = sorted(self.names)[:: len(self.names) // 3][:2]
        gallery.delete(gone)
        self.names.difference_update(gone)
        time.sleep(0.01)

    def _work(self, gallery: Gallery) -> None:
        task = gallery.store.lease_task(threading.current_thread().name)
        state = gallery.store.upgrade_state()
        if task is None or state is None or task.upgrade != state.id:
            time.sleep(0.01)
            return
        space = gallery.snapshot().spaces[state.new]
        with contextlib.suppress(LeaseLostError):  # the upgrade ended
            gallery.store.commit_task(task, task.nums, encode(task.items, space))

    def _search(self, gallery: Gallery) -> None:
        snapshot = gallery.snapshot()
        given = {name: rows for name, rows in queries(2).items() if name in snapshot.spaces}
        with contextlib.suppress(SnapshotGoneError):
            for ids in gallery.search(given, 2000, snapshot=snapshot).ids:
                assert len(set(ids)) == len(ids) == snapshot.live, (len(set(ids)), len(ids), snapshot.live)
            self.searches += 1


if __name__ == "__main__":
    _main(*sys.argv[1:])
