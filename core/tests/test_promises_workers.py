"""Promises: any number of workers, killed or not, end at the gallery of one; a rollback gives every bit back."""

from __future__ import annotations

import random

import gallery_world
import numpy as np
import pytest
import upgrade_world
import workers_world
from gallery_world import NEW, OLD
from promises_world import FULL, add, assert_is, encoder_of, everything, promise, vectors  # noqa: F401
from upgrade_world import by_item, make_gallery, new_encoder, query_vectors, stored

from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import begin, finish
from bowerbird.upgrade.engines import run_workers
from bowerbird.upgrade.executors import LocalExecutor
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import serve

ITEMS = 4_000 if FULL else 400
ROLLBACKS = 200 if FULL else 8
STRATEGY = "world:two-queries"


@pytest.fixture(autouse=True)
def world(monkeypatch):
    get_registry().register_module("world", upgrade_world)
    monkeypatch.setenv("PYTHONPATH", workers_world.HERE)
    yield
    get_registry().unregister("world")


def outcome(gallery):
    """Everything that a user of the finished gallery could see of its vectors."""
    finish(gallery)
    assert gallery.verify().ok
    found = serve(gallery).search(vectors=query_vectors(), k=20)
    return stored(gallery), found.ids, found.distances.tobytes()


def test_one_two_and_three_workers_killed_or_not_end_at_the_same_gallery(tmp_path, promise):  # noqa: F811
    with make_gallery(tmp_path / "one", ITEMS) as alone:
        run(alone, by_item(new_encoder()), strategy=STRATEGY, task_items=20)
        expected = outcome(alone)
    cases = [(2, None), (3, None), (2, 33), (3, 150)]
    different, shares = 0, []
    for workers, die_on in cases:
        folder = tmp_path / f"{workers}-{die_on}"
        folder.mkdir()
        with make_gallery(folder / "g", ITEMS) as gallery:
            begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=20)
            work = workers_world.job(gallery, delay=0.001, die_on=die_on, once=str(folder / "died"))
            report = run_workers(gallery, lambda work=work: work, LocalExecutor(workers))
            assert (folder / "died").exists() == (die_on is not None)
            assert sum(share.restarts for share in report.workers) == (die_on is not None)
            shares.append([share.encoded for share in report.workers])
            different += outcome(gallery) != expected
    promise.update(
        promise="two and three workers, killed in the middle or not: same final gallery as one process", items=ITEMS,
        cases=[{"workers": workers, "killed": die_on is not None} for workers, die_on in cases],
        items_by_worker=shares, different_galleries=different,
    )  # fmt: skip
    assert different == 0


def test_a_rollback_after_random_operations_is_bit_exact(tmp_path, promise):  # noqa: F811
    queries = gallery_world.queries(10, seed=4)
    operations = different = 0
    for seed in range(ROLLBACKS):
        draw = random.Random(seed)
        contents = {f"item-{n:03d}": "a" for n in range(120)}
        with Gallery.create(tmp_path / f"g{seed}", OLD) as gallery:
            add(gallery, contents, OLD)
            before = gallery.search(queries[OLD.fingerprint], 50)
            untouched = dict(contents)
            gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random", task_items=8)
            only_moved = seed % 4 == 0  # then the results, too, must be those of before
            for number in range(draw.randint(1, 30)):
                operations += 1
                kind = "work" if only_moved else draw.choice(["work", "work", "upload", "edit", "delete", "pause"])
                if kind == "work":
                    gallery.store.resume()
                    run(gallery, encoder_of(NEW), stop_after=draw.randint(1, 20))
                elif kind == "upload":
                    given = {f"late-{number}": "a"}
                    add(gallery, given, draw.choice([OLD, NEW]))
                    contents.update(given)
                elif kind == "edit":
                    given = {draw.choice(list(contents)): f"edit {number}"}
                    add(gallery, given, draw.choice([OLD, NEW]), replace=True)
                    contents.update(given)
                elif kind == "delete":
                    gone = draw.sample(list(contents), 3)
                    gallery.delete(gone)
                    for name in gone:
                        del contents[name]
                else:
                    gallery.store.pause()
                everything(gallery, queries)
            gallery.store.rollback(encode_old=lambda items: encoder_of(OLD).items(items).vectors)
            assert_is(gallery, contents, OLD)
            after = gallery.search(queries[OLD.fingerprint], 50)
            if only_moved:
                assert untouched == contents
                different += after.ids != before.ids or after.distances.tobytes() != before.distances.tobytes()
            with Gallery.create(tmp_path / f"fresh{seed}", OLD) as fresh:
                add(fresh, contents, OLD)
                again = fresh.search(queries[OLD.fingerprint], 50)
                different += after.ids != again.ids or not np.array_equal(after.distances, again.distances)
    promise.update(
        promise="rollback after random operations is bit-exact", rollbacks=ROLLBACKS, operations=operations,
        seeds=[0, ROLLBACKS - 1], different_galleries=different,
    )  # fmt: skip
    assert different == 0
