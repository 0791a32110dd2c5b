"""Promise: no id is ever missing or doubled while uploads, deletes, edits and a backfill go on at once.

A model of the gallery is a dictionary. Random operations change both; worker processes move items all the while, and
readers search for everything. What a reader finds must be the model at one moment between the begin and the end of its
search, and every vector that of the item's content. BOWERBIRD_PROMISES=full makes 10,000 operations.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path

import gallery_world
import numpy as np
import pytest
from gallery_world import NEW, OLD
from promises_world import FULL, add, assert_is, encoder_of, everything, promise, start, vector, worker  # noqa: F401

from bowerbird.errors import UpgradeError
from bowerbird.gallery import Gallery

OPERATIONS = 10_000 if FULL else 300
WORKERS = 3 if FULL else 2
READERS = 2
SEEDS = (0,)
NAMES = [f"item-{n:03d}" for n in range(300)]
QUERIES = gallery_world.queries(2, seed=3)


class Model:
    """``now``: id -> content. Remembers the last states, so that a reader can be told which it may have seen."""

    def __init__(self) -> None:
        self.now: dict[str, str] = {}
        self.states: dict[int, dict[str, str]] = {0: {}}
        self.begun = self.ended = 0  # numbers of the operations that may, and that must be visible

    def change(self, after: dict[str, str], operation) -> None:
        self.states[self.begun + 1] = after
        self.begun += 1
        operation()
        self.now = after
        self.ended += 1
        self.states.pop(self.ended - 200, None)


def read(path: Path, model: Model, over: threading.Event, found: Counter, problems: list[str], seed: int) -> None:
    """A server of its own: searches for everything until it is ``over``."""
    draw = random.Random(seed)
    with Gallery.open(path, readonly=True) as gallery:
        while not over.is_set() and not problems:
            first = model.ended
            try:
                ids = everything(gallery, QUERIES)
            except AssertionError as exc:
                problems.append(str(exc))
                return
            last = model.begun
            seen = set(ids)
            candidates = [model.states[n] for n in range(first, last + 1) if n in model.states]
            if candidates and not any(seen == set(state) for state in candidates):
                nearest = min(candidates, key=lambda state: len(seen ^ set(state)))
                problems.append(f"search found {len(ids)} items; differs in {sorted(seen ^ set(nearest))[:5]}")
                return
            found["searches"] += 1
            found["between operations"] += first == last
            time.sleep(draw.uniform(0, 0.005))


class Operations:
    """Random operations on a gallery and on its model."""

    def __init__(self, gallery: Gallery, model: Model, seed: int) -> None:
        self.gallery, self.model = gallery, model
        self.draw = random.Random(seed)
        self.serving = OLD
        self.counts: Counter = Counter()
        self.edits = 0

    @property
    def target(self):
        return None if self.gallery.store.upgrade_state() is None else (NEW if self.serving == OLD else OLD)

    def one(self) -> None:
        absent = [name for name in NAMES if name not in self.model.now]
        kinds = {"upload": 30 if absent else 0, "edit": 20, "delete": 22, "search": 15, "pause": 2, "turn": 2}
        kind = self.draw.choices(list(kinds), list(kinds.values()))[0]
        getattr(self, kind)(absent)
        self.counts[kind] += 1

    def _space(self):
        target = self.target
        return self.draw.choice([self.serving, target, target]) if target else self.serving

    def upload(self, absent: list[str]) -> None:
        given = dict.fromkeys(self.draw.sample(absent, min(len(absent), self.draw.randint(1, 12))), "a")
        space = self._space()
        self.model.change({**self.model.now, **given}, lambda: add(self.gallery, given, space))

    def edit(self, absent: list[str]) -> None:
        present = list(self.model.now)
        if not present:
            return
        self.edits += 1
        chosen = self.draw.sample(present, min(len(present), self.draw.randint(1, 4)))
        given = dict.fromkeys(chosen, f"edit {self.edits}")
        space = self._space()
        self.model.change({**self.model.now, **given}, lambda: add(self.gallery, given, space, replace=True))

    def delete(self, absent: list[str]) -> None:
        present = list(self.model.now)
        if len(present) < 50:
            return
        gone = self.draw.sample(present, self.draw.randint(1, 10))
        after = {name: content for name, content in self.model.now.items() if name not in gone}
        self.model.change(after, lambda: self.gallery.delete(gone))

    def search(self, absent: list[str]) -> None:
        assert set(everything(self.gallery, QUERIES)) == set(self.model.now)
        if self.model.now:
            name = self.draw.choice(list(self.model.now))
            nearest = {space.fingerprint: vector(name, space, self.model.now[name])[None] for space in (OLD, NEW)}
            hit = self.gallery.search(nearest, 1)
            assert hit.ids == [[name]], "an item is found by its own vector"
            assert hit.distances[0, 0] < 1e-6, "and has the vector of its content, not of an earlier one"

    def pause(self, absent: list[str]) -> None:
        if self.target is not None:
            state = self.gallery.store.upgrade_state().state
            self.gallery.store.resume() if state == "paused" else self.gallery.store.pause()

    def turn(self, absent: list[str]) -> None:
        """Begin, finish or roll back an upgrade."""
        store = self.gallery.store
        target = self.target
        if target is None:
            to = NEW if self.serving == OLD else OLD
            nums = self.gallery.snapshot().new.nums
            order = np.random.default_rng(self.draw.randrange(2**32)).permutation(nums)
            store.begin_upgrade(to, strategy="test", order_name="core:random", order=order, task_items=16)
            self.counts["begin"] += 1
        elif self.draw.random() < 0.3:
            store.rollback(encode_old=lambda items: encoder_of(self.serving).items(items).vectors)
            self.counts["rollback"] += 1
        elif store.progress().complete:
            try:
                store.finish_upgrade(verified=self.gallery.verify().ok)
            except UpgradeError:  # a paused one with something in it
                return
            self.serving = target
            self.counts["finish"] += 1


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_in_the_gallery_is_found_once_at_every_moment(tmp_path, promise, seed):  # noqa: F811
    path = tmp_path / "g"
    model = Model()
    over, found, problems = threading.Event(), Counter(), []
    with Gallery.create(path, OLD) as gallery:
        gallery.register_space(NEW)
        workers = [start(worker, str(path), 0.005) for _ in range(WORKERS)]
        readers = [
            threading.Thread(target=read, args=(path, model, over, found, problems, number), daemon=True)
            for number in range(READERS)
        ]
        operations = Operations(gallery, model, seed)
        operations.upload(NAMES)
        for thread in readers:
            thread.start()
        try:
            for _ in range(OPERATIONS):
                operations.one()
                assert not problems, problems
        finally:
            over.set()
            path.with_suffix(".over").touch()
            for thread in readers:
                thread.join(30)
            for process in workers:
                process.join(30)
                process.kill()
        assert not problems, problems
        assert [process.exitcode for process in workers] == [0] * WORKERS
        if operations.target is not None:
            target = operations.target
            gallery.store.resume()
            from bowerbird.upgrade.run import run

            run(gallery, encoder_of(target))
            gallery.store.finish_upgrade(verified=True)
            operations.serving = target
        assert_is(gallery, model.now, operations.serving)
    promise.update(
        promise="no id missing or doubled under uploads, deletes, edits and backfill", operations=OPERATIONS, seed=seed,
        by_kind=dict(sorted(operations.counts.items())), searches_of_readers=found["searches"],
        workers=WORKERS, missing_or_doubled=len(problems),
    )  # fmt: skip
    assert found["searches"] > 10
    assert operations.counts["begin"] >= 1
