"""Upgrades on top of upgrades: what is searched where, what a rollback returns to, and what finish ends."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from gallery_world import vectors
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sequence_world import V1, V2, V3, V4, VERSIONS, begin, brute_force, encode, queries, stored, vector, work

from bowerbird.errors import CorruptionError, UpgradeError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.tasks import LeaseLostError

NAMES = [f"id-{n:03d}" for n in range(60)]
FIRST = [V1, V2, V3]


@pytest.fixture
def gallery(tmp_path):
    with Gallery.create(tmp_path / "g", V1) as opened:
        opened.add(NAMES, vectors(NAMES, V1))
        yield opened


def counts(gallery: Gallery) -> list[int]:
    return [part.count for part in gallery.snapshot().parts]


def test_an_upgrade_on_top_moves_no_item_and_changes_no_result(gallery):
    begin(gallery, V2)
    work(gallery, 7)
    before, found = stored(gallery), gallery.search(queries(FIRST[:2]), 15)
    begin(gallery, V3)
    assert counts(gallery) == [32, 28, 0]
    assert {k: v for k, v in stored(gallery).items() if v} == before
    again = gallery.search(queries(FIRST), 15)
    assert again.ids == found.ids and np.array_equal(again.distances, found.distances)
    assert gallery.verify().ok


def test_without_saying_on_top_a_second_upgrade_is_refused(gallery):
    begin(gallery, V2)
    with pytest.raises(UpgradeError, match="--on-top"):
        begin(gallery, V3, on_top=False)
    with pytest.raises(UpgradeError, match="already has a part in"):
        begin(gallery, V1)
    with pytest.raises(UpgradeError, match="already has a part in"):
        begin(gallery, V2)
    assert gallery.store.upgrade_state().state == "running"


def test_only_the_topmost_upgrade_gives_out_tasks_and_the_oldest_items_come_first(gallery):
    begin(gallery, V2)
    task = gallery.store.lease_task("slow")
    work(gallery, 3)
    begin(gallery, V3)
    with pytest.raises(LeaseLostError):
        gallery.store.commit_task(task, task.nums, encode(task.items, V2))
    old = {gallery.get(name).num for name in NAMES} & set(gallery.snapshot().parts[0].nums.tolist())
    moved = work(gallery, len(old) // 4)
    assert counts(gallery)[0] == 0 and len(moved) == len(old)
    work(gallery, 1000)
    assert counts(gallery) == [0, 0, len(NAMES)]


def test_rollback_pops_one_level_to_the_last_bit_and_the_one_below_goes_on(gallery):
    begin(gallery, V2)
    work(gallery, 7)
    before = stored(gallery)
    found = gallery.search(queries(FIRST[:2]), 15)
    begin(gallery, V3)
    work(gallery, 9)
    assert gallery.store.rollback() == 0
    state = gallery.store.upgrade_state()
    assert (state.new, state.state) == (V2.fingerprint, "paused")
    assert stored(gallery) == before
    again = gallery.search(queries(FIRST[:2]), 15)
    assert again.ids == found.ids and np.array_equal(again.distances, found.distances)
    assert work(gallery, 1) == []
    gallery.store.resume()
    work(gallery, 1000)
    assert counts(gallery) == [0, len(NAMES)]
    gallery.store.rollback()
    assert stored(gallery) == {V1.fingerprint: {n: vector(name, V1).tobytes() for n, name in enumerate(NAMES)}}
    assert [entry["state"] for entry in gallery.store.history()] == ["rolled-back", "rolled-back"]


def test_finish_of_the_topmost_ends_all_and_drops_every_older_vector(gallery):
    begin(gallery, V2)
    work(gallery, 4)
    begin(gallery, V3)
    work(gallery, 4)
    begin(gallery, V4)
    with pytest.raises(UpgradeError, match="have no vector of the new space"):
        gallery.store.finish_upgrade(verified=True)
    work(gallery, 1000)
    gallery.store.finish_upgrade(verified=True)
    snapshot = gallery.snapshot()
    assert (snapshot.serving, snapshot.upgrade, counts(gallery)) == (V4.fingerprint, None, [len(NAMES)])
    assert {segment.info.space for segment in snapshot.segments} == {V4.fingerprint}
    assert [entry["state"] for entry in gallery.store.history()] == ["superseded", "superseded", "finished"]
    assert gallery.verify().ok and not gallery.verify().notes
    assert list((gallery.path / "plan").glob("*.i64")) == []


def test_uploads_edits_and_deletes_during_a_stack_survive_its_rollback(gallery):
    begin(gallery, V2)
    work(gallery, 5)
    begin(gallery, V3)
    work(gallery, 3)
    gallery.add(["new-3"], vectors(["new-3"], V3), space=V3.fingerprint)
    gallery.add(["new-1"], vectors(["new-1"], V1), space=V1.fingerprint)
    gallery.add([NAMES[0]], [vector(NAMES[0], V2, "b")], content_hashes=["b"], space=V2.fingerprint, replace=True)
    gallery.delete(NAMES[-3:])
    with pytest.raises(UpgradeError, match="1 items were added or edited"):
        gallery.store.rollback()
    assert gallery.store.rollback(encode_old=lambda items: encode(items, V2)) == 0
    assert gallery.vectors_of(["new-3", NAMES[0]], V2.fingerprint).shape == (2, V2.dim)
    gallery.store.resume()
    moved = work(gallery, 1000)
    assert "new-1" in moved and counts(gallery) == [0, len(NAMES) - 1]
    assert gallery.verify().ok


def test_items_that_are_left_pending_are_encoded_by_the_upgrade_below(gallery):
    begin(gallery, V2)
    begin(gallery, V3)
    gallery.add(["new-3"], vectors(["new-3"], V3), space=V3.fingerprint)
    assert gallery.store.rollback(leave_pending=True) == 1
    gallery.store.resume()
    assert "new-3" in work(gallery, 1000)
    assert gallery.pending() == [] and gallery.verify().ok


def test_a_begin_that_fails_leaves_the_lower_upgrade_running(gallery):
    begin(gallery, V2)
    before = stored(gallery)
    with pytest.raises(ValueError, match="twice"):
        begin(gallery, V3, order=np.array([0, 0]))
    assert gallery.store.upgrade_state().state == "running" and stored(gallery) == before
    assert work(gallery, 1)


def test_damage_of_a_vector_that_a_rollback_would_need_is_told_before_an_upgrade_is_put_on_top(gallery):
    begin(gallery, V2)
    work(gallery, 1000)
    path = gallery.path
    file = next(path.glob("seg/*.f32"))
    by_space = {segment.info.sid: segment.info.space for segment in gallery.snapshot().segments}
    file = next(f for f in path.glob("seg/*.f32") if by_space.get(f.stem) == V1.fingerprint)
    gallery.close()
    with file.open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff\xff")
    with Gallery.open(path) as again, pytest.warns(UserWarning, match="damaged"):
        with pytest.raises(CorruptionError, match="rollback would return"):
            begin(again, V3)
        assert again.store.upgrade_state().state == "running"


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_upgrade_that_switches_at_its_end_shows_no_new_vector_before(gallery):
    begin(gallery, V2, settings={"switches_at_end": True})
    before = gallery.search({V1.fingerprint: queries([V1])[V1.fingerprint]}, 10)
    work(gallery, 14)
    found = gallery.search({V1.fingerprint: queries([V1])[V1.fingerprint]}, 10)
    assert counts(gallery) == [4, 56]
    assert found.ids == before.ids and np.array_equal(found.distances, before.distances)
    assert (found.sides == 0).all()
    work(gallery, 1)
    assert (gallery.search(queries([V1, V2]), 10).sides == 1).all()


class SequenceAgainstDictionary(RuleBasedStateMachine):
    """``model``: id -> {position of a space in the stack: content}; what an item has is searched in its newest."""

    @initialize()
    def create(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.gallery = Gallery.create(Path(self.folder.name) / "g", V1)
        self.stack: list[Space] = [V1]
        self.items: dict[str, tuple[str, set[str]]] = {}  # content, fingerprints in which it has a vector

    def teardown(self) -> None:
        if hasattr(self, "gallery"):
            self.gallery.close()
            self.folder.cleanup()

    @rule(
        names=st.lists(st.integers(0, 25).map("id-{}".format), min_size=1, max_size=8, unique=True),
        content=st.sampled_from("ab"),
        age=st.integers(0, 3),
    )
    def add_or_replace(self, names: list[str], content: str, age: int) -> None:
        space = self.stack[max(0, len(self.stack) - 1 - age)]
        rows = np.array([vector(name, space, content) for name in names])
        self.gallery.add(names, rows, content_hashes=[content] * len(names), space=space.fingerprint, replace=True)
        for name in names:
            self.items.pop(name, None)
            self.items[name] = (content, {space.fingerprint})

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.items)), min_size=1, max_size=4, unique=True))
        self.gallery.delete(names)
        for name in names:
            del self.items[name]

    @precondition(lambda self: len(self.stack) < 4)
    @rule(seed=st.none() | st.integers(0, 3))
    def begin(self, seed: int | None) -> None:
        free = [space for space in VERSIONS if space not in self.stack]
        nums = np.concatenate([part.nums for part in self.gallery.snapshot().parts])
        order = None if seed is None else np.random.default_rng(seed).permutation(nums)
        begin(self.gallery, free[0], order=order)
        self.stack.append(free[0])

    @precondition(lambda self: len(self.stack) > 1)
    @rule(tasks=st.integers(1, 4))
    def work(self, tasks: int) -> None:
        self.gallery.store.resume()
        for name in work(self.gallery, tasks):
            self.items[name][1].add(self.stack[-1].fingerprint)

    @precondition(lambda self: len(self.stack) > 1)
    @rule()
    def a_worker_dies(self) -> None:
        self.gallery.store.lease_task("dead", lease_s=-1)

    @precondition(lambda self: len(self.stack) > 1)
    @rule()
    def rollback(self) -> None:
        gone, lower = self.stack.pop(), self.stack[-1]
        self.gallery.store.rollback(encode_old=lambda items: encode(items, lower))
        for _, has in self.items.values():
            has.discard(gone.fingerprint)
            if not has:
                has.add(lower.fingerprint)

    @precondition(lambda self: len(self.stack) > 1)
    @rule()
    def finish(self) -> None:
        self.work(10**6)
        self.gallery.store.finish_upgrade(verified=True)
        self.stack = self.stack[-1:]
        self.items = {name: (content, {self.stack[0].fingerprint}) for name, (content, _) in self.items.items()}

    @rule()
    def reopen(self) -> None:
        path = self.gallery.path
        self.gallery.close()
        self.gallery = Gallery.open(path)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "gallery"):
            return
        snapshot = self.gallery.snapshot()
        assert snapshot.stack == tuple(space.fingerprint for space in self.stack)
        names = {item.num: item.id for item in self.gallery.items()}
        assert sorted(names.values()) == sorted(self.items)
        seen: list[str] = []
        for age, part in enumerate(snapshot.parts):
            newer = {space.fingerprint for space in self.stack[age + 1 :]}
            here = sorted(names[num] for num in part.nums.tolist())
            expected = [
                name for name, (_, has) in self.items.items() if part.space.fingerprint in has and not has & newer
            ]
            assert here == sorted(expected)
            for num in part.nums.tolist():
                row = vector(names[num], part.space, self.items[names[num]][0])
                assert part.vectors_of(np.array([num]))[0].tobytes() == row.tobytes()
            seen += here
        assert sorted(seen) == sorted(self.items)  # none missing, none twice
        given = queries(self.stack, 2, seed=5)
        assert self.gallery.search(given, 6).ids == brute_force(self.gallery, given, 6)
        report = self.gallery.verify()
        assert report.ok, str(report)


TestSequenceAgainstDictionary = SequenceAgainstDictionary.TestCase
TestSequenceAgainstDictionary.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
