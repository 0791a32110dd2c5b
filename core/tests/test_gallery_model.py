"""Random operations on a gallery and on a dictionary: the two never differ."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from gallery_world import NEW, OLD, encode, queries, vector
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bowerbird.gallery import Gallery, Space

BOTH = queries(2, seed=5)
IDS = st.integers(0, 30).map("id-{}".format)


class GalleryAgainstDictionary(RuleBasedStateMachine):
    """``model``: id -> (space, content); kept in the order of adding."""

    @initialize()
    def create(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.gallery = Gallery.create(Path(self.folder.name) / "g", OLD)
        self.model: dict[str, tuple[Space, str]] = {}
        self.order: list[str] = []
        self.serving, self.target = OLD, None
        self.snapshots: list = []

    def teardown(self) -> None:
        if hasattr(self, "gallery"):
            self.gallery.close()
            self.folder.cleanup()

    def _remember(self, name: str, space: Space, content: str) -> None:
        if name in self.model:
            self.order.remove(name)
        self.model[name] = (space, content)
        self.order.append(name)

    @rule(
        names=st.lists(IDS, min_size=1, max_size=6, unique=True), content=st.sampled_from(["a", "b"]), old=st.booleans()
    )
    def add_or_replace(self, names: list[str], content: str, old: bool) -> None:
        space = self.target if self.target is not None and not old else self.serving
        rows = np.array([vector(name, space, content) for name in names])
        hashes = [content] * len(names)
        self.gallery.add(names, rows, content_hashes=hashes, space=space.fingerprint, replace=True)
        for name in names:
            self._remember(name, space, content)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.order), min_size=1, max_size=4, unique=True))
        self.gallery.delete(names)
        for name in names:
            del self.model[name]
            self.order.remove(name)

    @precondition(lambda self: self.target is None)
    @rule(seed=st.integers(0, 5))
    def begin(self, seed: int) -> None:
        self.target = NEW if self.serving == OLD else OLD
        order = np.random.default_rng(seed).permutation(self.gallery.snapshot().new.nums)
        self.gallery.store.begin_upgrade(
            self.target, strategy="test", order_name="core:random", order=order, task_items=4
        )

    @precondition(lambda self: self.target is not None)
    @rule(tasks=st.integers(1, 4))
    def work(self, tasks: int) -> None:
        for _ in range(tasks):
            task = self.gallery.store.lease_task("worker")
            if task is None:
                return
            self.gallery.store.commit_task(task, task.nums, encode(task.items, self.target))
            for item in task.items:
                self.model[item.id] = (self.target, self.model[item.id][1])

    @precondition(lambda self: self.target is not None)
    @rule()
    def finish(self) -> None:
        self.work(10**6)
        self.gallery.store.finish_upgrade(verified=True)
        self.serving, self.target = self.target, None

    @precondition(lambda self: self.target is not None)
    @rule()
    def rollback(self) -> None:
        self.gallery.store.rollback(encode_old=lambda items: encode(items, self.serving))
        self.model = {name: (self.serving, content) for name, (_, content) in self.model.items()}
        self.target = None

    @precondition(lambda self: self.target is None)
    @rule()
    def compact(self) -> None:
        self.gallery.compact()
        self.snapshots.clear()  # names of items deleted before are forgotten by a compaction

    @rule()
    def reopen(self) -> None:
        path = self.gallery.path
        self.gallery.close()
        self.gallery = Gallery.open(path)
        self.snapshots.clear()

    @rule()
    def keep_a_snapshot(self) -> None:
        snapshot = self.gallery.snapshot()
        if all(kept is not snapshot for kept, _ in self.snapshots):
            self.snapshots.append((snapshot, self._search(snapshot)))

    def _search(self, snapshot) -> list[list[str]]:
        known = {fingerprint: BOTH[fingerprint] for fingerprint in snapshot.spaces}
        return self.gallery.search(known, 5, snapshot=snapshot).ids

    def _expected(self, row: int, k: int) -> list[str]:
        keyed = []
        for position, name in enumerate(self.order):
            space, content = self.model[name]
            query = BOTH[space.fingerprint][row].astype(np.float64)
            distance = np.float32(1 - vector(name, space, content).astype(np.float64) @ (query / np.linalg.norm(query)))
            keyed.append((distance, space != (self.target or self.serving), position, name))
        return [name for *_, name in sorted(keyed)[:k]]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "gallery"):
            return
        assert len(self.gallery) == len(self.model)
        result = self.gallery.search(BOTH if self.target else BOTH[self.serving.fingerprint], 5)
        for row in range(2):
            assert result.ids[row] == self._expected(row, 5)
        for snapshot, ids in self.snapshots:
            assert self._search(snapshot) == ids  # what a snapshot showed it shows for ever
        report = self.gallery.verify()
        assert report.ok, str(report)


TestGalleryAgainstDictionary = GalleryAgainstDictionary.TestCase
TestGalleryAgainstDictionary.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
