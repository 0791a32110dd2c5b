"""``kill -9`` of the worker at random moments: the upgrade resumes to the gallery that an undisturbed one gives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import upgrade_world
from upgrade_world import by_item, make_gallery, new_encoder, query_vectors, stored

from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import begin, finish, status
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import serve

KILLS = 15
ITEMS = 1500

WORKER = """
import sys, time
sys.path.insert(0, {here!r})
import upgrade_world
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import ItemEncoder
from bowerbird.upgrade.run import run

get_registry().register_module("world", upgrade_world)
new = upgrade_world.new_encoder()

def encode(items):
    time.sleep(0.002)
    return new(items)

with Gallery.open(sys.argv[1]) as gallery:
    print("ready", flush=True)
    run(gallery, ItemEncoder(encode, space=new.space()), strategy="world:two-queries", task_items=20)
"""


@pytest.fixture(autouse=True)
def world():
    get_registry().register_module("world", upgrade_world)
    yield
    get_registry().unregister("world")


def test_fifteen_kills_at_random_moments_change_nothing(tmp_path):
    queries = query_vectors(count=10)
    with make_gallery(tmp_path / "undisturbed", ITEMS) as calm:
        run(calm, by_item(new_encoder()), strategy="world:two-queries", task_items=20)
        expected, results = stored(calm), serve(calm).search(vectors=queries)
    make_gallery(tmp_path / "g", ITEMS).close()
    with Gallery.open(tmp_path / "g") as gallery:
        begin(gallery, new_encoder().space(), strategy="world:two-queries", task_items=20)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(here=str(Path(__file__).parent)))
    moments = random.Random(7)
    kills, shares = 0, []
    for _ in range(KILLS):
        worker = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "g")],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert worker.stdout is not None
        worker.stdout.readline()
        time.sleep(moments.uniform(0.0, 0.15))
        worker.send_signal(signal.SIGKILL)
        kills += worker.wait() == -signal.SIGKILL
        worker.stdout.close()
        with Gallery.open(tmp_path / "g") as gallery:
            snapshot = gallery.snapshot()
            both = np.concatenate([snapshot.old.nums, snapshot.new.nums])
            assert np.array_equal(np.sort(both), np.arange(ITEMS)), "every item is on one side, and on one only"
            shares.append(status(gallery).share)
    assert shares == sorted(shares), "what was committed stays"
    assert kills >= 5, f"only {kills} workers were killed before they were done"
    with Gallery.open(tmp_path / "g") as gallery:
        assert run(gallery, by_item(new_encoder())).share == 1
        found = serve(gallery).search(vectors=queries)
        assert found.ids == results.ids
        assert np.array_equal(found.distances, results.distances)
        assert stored(gallery) == expected
        finish(gallery)
        assert gallery.verify().ok


def test_two_workers_share_an_upgrade(tmp_path):
    make_gallery(tmp_path / "g", 600).close()
    with Gallery.open(tmp_path / "g") as gallery:
        begin(gallery, new_encoder().space(), strategy="world:two-queries", task_items=20)
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(here=str(Path(__file__).parent)))
    workers = [
        subprocess.Popen([sys.executable, str(script), str(tmp_path / "g")], stdout=subprocess.DEVNULL) for _ in "ab"
    ]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    with Gallery.open(tmp_path / "g") as gallery:
        assert status(gallery).complete
        vectors = gallery.vectors_of([upgrade_world.item_id(n) for n in range(600)])
        assert np.array_equal(vectors, new_encoder().vectors(range(600)))
