"""Ctrl-C in the moment after a commit, and while a transaction waits for its turn."""

from __future__ import annotations

import signal
import sqlite3
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.catalog import CATALOG, Catalog

OLD, NEW = Space("a" * 64, "old", 8), Space("b" * 64, "new", 6)
IDS = [f"item-{n}" for n in range(60)]


def rows(space, seed=0):
    return np.random.default_rng(seed).normal(size=(len(IDS), space.dim)).astype(np.float32)


@pytest.fixture
def interrupted_after_commit(monkeypatch):
    """Armed, the next transaction is committed and then interrupted."""
    writing, armed = Catalog.writing, []

    @contextmanager
    def interrupted(self):
        with writing(self) as db:
            yield db
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(Catalog, "writing", interrupted)
    return lambda: armed.append(True)


def check(path, count, new):
    with Gallery.open(path) as gallery:
        assert gallery.verify().ok
        assert sum(gallery.counts().values()) == count and gallery.counts().get(NEW.fingerprint, 0) == new


def test_items_that_were_added(tmp_path, interrupted_after_commit):
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        gallery.add(IDS[:20], rows(OLD)[:20])
        interrupted_after_commit()
        with pytest.raises(KeyboardInterrupt):
            gallery.add(IDS[20:40], rows(OLD)[20:40])
        gallery.add(IDS[40:], rows(OLD)[40:])
        assert np.allclose(gallery.vectors_of(IDS[20:40]) @ gallery.vectors_of(IDS[20:40]).T, _cosines(OLD, 20, 40))
    check(tmp_path / "g", 60, 0)


def test_a_transaction_that_waits_for_its_turn_is_not_left_open(tmp_path, request):
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        gallery.add(IDS[:20], rows(OLD)[:20])
        other = sqlite3.connect(tmp_path / "g" / CATALOG, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.4, lambda: other.execute("ROLLBACK"))
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C: KeyboardInterrupt
        request.addfinalizer(lambda: signal.signal(signal.SIGALRM, before))
        release.start()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            gallery.add(IDS[20:40], rows(OLD)[20:40])
        release.join()
        other.close()
        gallery.add(IDS[40:], rows(OLD)[40:])  # neither this process nor another is locked out
    check(tmp_path / "g", 40, 0)


def test_an_upgrade_that_was_begun_and_a_task_that_was_committed(tmp_path, interrupted_after_commit):
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        gallery.add(IDS, rows(OLD))
        before = gallery.search(rows(OLD)[:5], 10)
        interrupted_after_commit()
        with pytest.raises(KeyboardInterrupt):
            gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random", task_items=20)
        assert gallery.store.upgrade_state() is not None
        both = {OLD.fingerprint: rows(OLD)[:5], NEW.fingerprint: rows(NEW)[:5]}
        assert gallery.search(both, 10).ids == before.ids
        for number in range(3):
            task = gallery.store.lease_task("worker")
            assert task is not None
            vectors = rows(NEW)[[IDS.index(item.id) for item in task.items]]
            if number == 1:
                interrupted_after_commit()
                with pytest.raises(KeyboardInterrupt):
                    gallery.store.commit_task(task, task.nums, vectors)
            else:
                gallery.store.commit_task(task, task.nums, vectors)
        assert gallery.store.progress().complete
    check(tmp_path / "g", 60, 60)


def _cosines(space, start, stop):
    unit = rows(space)[start:stop]
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ unit.T
