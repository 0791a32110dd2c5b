"""Promise: ``kill -9`` of any worker or of the server, at any point, changes nothing about the gallery that comes out.

Two workers backfill while a server searches, uploads, edits and deletes. One of the three is killed at a random moment
and started again, over and over. BOWERBIRD_PROMISES=full kills 200 times.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

import gallery_world
import numpy as np
import pytest
from gallery_world import NEW, OLD
from promises_world import (
    FULL,
    INITIAL,
    add,
    difference,
    everything,
    gallery_of_the_server,
    plan_of_the_server,
    promise,  # noqa: F401  # a fixture
    server,
    start,
    worker,
)

from bowerbird.gallery import Gallery

KILLS = 200 if FULL else 12
SEED = 0
DELAY = 0.02  # of a worker per batch
PAUSE = 0.01  # of the server per step


def expected() -> dict[str, str]:
    return {**gallery_of_the_server(), **{f"step-{n:03d}": "" for n in range(len(plan_of_the_server()))}}


def run_round(folder, moments: random.Random, kills_left: int) -> tuple[Counter, list[float], str | None]:
    """One gallery, from the first item to the end.

    Returns kills by role, the shares at which they happened, and how the finished gallery differs from the right one.
    """
    path = folder / "g"
    queries = gallery_world.queries(2, seed=2)
    with Gallery.create(path, OLD) as gallery:
        add(gallery, INITIAL, OLD)
        gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random", task_items=8)
        made = {
            "worker 0": lambda: start(worker, str(path), DELAY),
            "worker 1": lambda: start(worker, str(path), DELAY),
            "server": lambda: start(server, str(path), PAUSE),
        }
        processes = {name: make() for name, make in made.items()}
        kills: Counter = Counter()
        shares = []
        try:
            deadline = time.monotonic() + 120
            while True:
                assert time.monotonic() < deadline, "the round does not come to its end"
                served = path.with_suffix(".served").exists()
                done = served and gallery.store.progress().complete
                if done:
                    break
                if sum(kills.values()) >= kills_left:
                    time.sleep(0.02)
                    continue
                time.sleep(moments.uniform(0.0, 0.3))
                name = moments.choice([name for name, process in processes.items() if process.is_alive()] or [None])
                if name is None or (name == "server" and path.with_suffix(".served").exists()):
                    continue
                processes[name].kill()
                processes[name].join()
                if processes[name].exitcode == -signal.SIGKILL:
                    kills[name] += 1
                    everything(gallery, queries)
                    counts = gallery.counts()
                    shares.append(counts.get(NEW.fingerprint, 0) / max(1, sum(counts.values())))
                processes[name] = made[name]()
            path.with_suffix(".over").touch()
            for process in processes.values():
                process.join(30)
            assert [process.exitcode for process in processes.values()] == [0, 0, 0], "nobody found anything wrong"
        finally:
            for process in processes.values():
                process.kill()
        assert gallery.verify().ok
        gallery.store.finish_upgrade(verified=True)
        return kills, shares, difference(gallery, expected(), NEW)


def test_kills_of_workers_and_server_at_random_moments_give_the_gallery_of_no_kills(
    tmp_path,
    promise,  # noqa: F811
):
    moments = random.Random(SEED)
    kills: Counter = Counter()
    shares: list[float] = []
    differences: list[str | None] = []
    while sum(kills.values()) < KILLS:
        folder = tmp_path / str(len(differences))
        folder.mkdir()
        killed, at, difference_found = run_round(folder, moments, KILLS - sum(kills.values()))
        kills.update(killed)
        shares += at
        differences.append(difference_found)
        assert len(differences) <= 10 * KILLS
    different = sum(found is not None for found in differences)
    promise.update(
        promise="kill -9 of any worker or of the server: same final gallery", kills=sum(kills.values()),
        by_role=dict(sorted(kills.items())), galleries=len(differences), different_galleries=different,
        seed=SEED,
        share_at_kills_quartiles=[round(float(q), 3) for q in np.quantile(shares, [0, 0.25, 0.5, 0.75, 1])],
    )  # fmt: skip
    assert different == 0, differences
    assert sum(kills.values()) >= KILLS
    if FULL:
        assert set(kills) == {"worker 0", "worker 1", "server"}


def test_without_kills_the_gallery_is_the_expected_one(tmp_path):
    kills, _, different = run_round(tmp_path, random.Random(SEED), 0)
    assert not kills
    assert different is None, different


@pytest.fixture(autouse=True, scope="module")
def forked_from_a_quiet_process():
    start(time.sleep, 0).join()
