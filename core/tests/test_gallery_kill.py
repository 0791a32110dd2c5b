"""``kill -9`` at fifty random moments of ingest and upgrade: nothing acknowledged is lost, the end is the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gallery_killed import BATCHES, DELETED
from gallery_world import NEW, queries, vectors

from bowerbird.gallery import Gallery

SCRIPT = Path(__file__).parent / "gallery_killed.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
KILLS = 50
QUERIES = queries()[NEW.fingerprint]


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def run_and_kill(path: Path, moment: random.Random) -> tuple[list[str], bool]:
    """What one process acknowledged before it was killed, and whether it came to its end.

    The moment is counted from an acknowledgement drawn at random, so that a slow machine does not kill every process
    while it still imports.
    """
    process = start(path)
    assert process.stdout is not None
    lines: list[str] = []
    after, pause = moment.randrange(5), moment.random() * 0.02
    if after == 4:
        time.sleep(pause * 20)  # at its start: import, creation, recovery
    else:
        for line in process.stdout:
            lines.append(line.strip())
            if len(lines) > after:
                break
        time.sleep(pause)
    process.kill()
    rest, _ = process.communicate()
    lines += rest.split("\n")[:-1] if rest else []
    return lines, "done" in lines


def assert_nothing_acknowledged_is_lost(path: Path, acknowledged: set[str]) -> None:
    with Gallery.open(path) as gallery:
        report = gallery.verify()
        assert report.ok, str(report)
        snapshot = gallery.snapshot()
        for line in acknowledged:
            kind, _, number = line.partition(" ")
            if kind == "added":
                assert all(name in gallery for name in BATCHES[int(number)][1:])
            if kind == "migrated":
                assert int(number) in snapshot.new.nums
            if kind == "deleted":
                assert not any(name in gallery for name in DELETED)


@pytest.mark.slow
def test_a_gallery_killed_at_fifty_random_moments_ends_equal_to_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert start(undisturbed).communicate()[0].endswith("done\n")
    names = [*sorted(name for batch in BATCHES for name in batch[1:]), "late"]
    with Gallery.open(undisturbed) as gallery:
        assert sorted(item.id for item in gallery.items()) == sorted(names)
        assert np.array_equal(gallery.vectors_of(names), vectors(names, NEW))
        expected = gallery.search(QUERIES, 50)

    kills, run = 0, 0
    moment = random.Random(0)
    while kills < KILLS:
        path = tmp_path / f"run-{run}"
        acknowledged: set[str] = set()
        ended = False
        while not ended and kills < KILLS:
            lines, ended = run_and_kill(path, moment)
            kills += not ended
            acknowledged.update(lines)
            if path.exists():
                assert_nothing_acknowledged_is_lost(path, acknowledged)
        if not ended:
            assert start(path).communicate()[0].endswith("done\n")
        with Gallery.open(path) as gallery:
            assert sorted(item.id for item in gallery.items()) == sorted(names)
            assert np.array_equal(gallery.vectors_of(names), vectors(names, NEW))
            result = gallery.search(QUERIES, 50)
            assert result.ids == expected.ids and np.array_equal(result.distances, expected.distances)
            assert gallery.verify().ok
        run += 1
