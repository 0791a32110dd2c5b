"""A process that dies at any step of an operation on a stack of upgrades leaves the state before it, or after it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gallery_world import vectors
from sequence_world import V1, V2, V3, begin, encode, queries, stored, work

from bowerbird.gallery import Gallery

SCRIPT = Path(__file__).parent / "sequence_killed.py"
NAMES = [f"id-{n:02d}" for n in range(40)]


@pytest.mark.parametrize("operation", ["begin", "rollback", "finish"])
def test_a_process_that_dies_at_any_step_leaves_the_state_before_or_after(tmp_path, operation):
    source = tmp_path / "source"
    with Gallery.create(source, V1) as gallery:
        gallery.add(NAMES, vectors(NAMES, V1))
        begin(gallery, V2)
        work(gallery, 5)
        if operation != "begin":
            begin(gallery, V3)
            work(gallery, 3 if operation == "rollback" else 1000)
            gallery.add(["late"], vectors(["late"], V3), space=V3.fingerprint)
        before, stack = stored(gallery), gallery.snapshot().stack
    (tmp_path / "killed").mkdir()
    subprocess.run([sys.executable, str(SCRIPT), source, tmp_path / "killed", operation], check=True)
    outcomes = []
    copies = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    assert len(copies) > 5
    for path in copies:
        with Gallery.open(path) as gallery:
            assert gallery.verify().ok, str(gallery.verify())
            snapshot = gallery.snapshot()
            happened = snapshot.stack != stack
            outcomes.append(happened)
            if not happened:
                after = stored(gallery)
                assert {name: rows for name, rows in after.items() if rows} == {k: v for k, v in before.items() if v}
                if operation == "begin":  # it may have been halted already; nothing else
                    gallery.store.resume()
            elif operation == "begin":
                assert {k: v for k, v in stored(gallery).items() if v} == {k: v for k, v in before.items() if v}
            elif operation == "rollback":
                assert snapshot.stack == (V1.fingerprint, V2.fingerprint) and snapshot.upgrade.state == "paused"
                gallery.store.resume()
            if snapshot.upgrade is not None:
                work(gallery, 1000)
            last = gallery.snapshot().write_space
            count = len(NAMES) + (operation != "begin")
            assert gallery.snapshot().new.count == count == len(gallery)
            expected = encode(list(gallery.items()), last)
            assert np.array_equal(gallery.snapshot().new.vectors_of(np.arange(count)), expected)
            assert len(gallery.search({last.fingerprint: queries()[last.fingerprint]}, count).ids[0]) == count
    assert outcomes == sorted(outcomes) and outcomes[-1] and not outcomes[0]
