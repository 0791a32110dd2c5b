"""What every store of galleries must do, whatever it is made of: subclass ``StoreContract`` and run it with pytest.

class TestAcme(StoreContract):
    name = "acme:store"

    def new_url(self) -> str: ...      # of a gallery that does not exist yet
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bowerbird.errors import (
    BowerbirdError,
    GalleryError,
    InputError,
    MissingExtraError,
    SnapshotGoneError,
    UnknownNameError,
    UpgradeError,
)
from bowerbird.gallery import Gallery
from bowerbird.gallery.protocol import FEATURES
from bowerbird.gallery.tasks import MAX_FAILURES, LeaseLostError, Task
from bowerbird.gallery.transform import VectorTransform
from bowerbird.testing.contract import Contract
from bowerbird.testing.store_world import (
    FIRST,
    SECOND,
    THIRD,
    Model,
    Rush,
    WorkerProcess,
    begin,
    encode,
    queries,
    vector,
    vectors,
    work,
)

NAMES = [f"id-{number:03}" for number in range(40)]
QUERIES = queries()


class StoreContract(Contract):
    """Role ``store``: see ``bowerbird.gallery.protocol``.

    Attributes:
        sequences, operations: So many random sequences of so many operations are compared with a dictionary.
    """

    kind = "retriever"
    role = "store"
    sequences = 3
    operations = 25

    def new_url(self) -> str:
        """Where a gallery can be created."""
        raise NotImplementedError

    @pytest.fixture
    def url(self) -> str:
        return self.new_url()

    @pytest.fixture
    def gallery(self, url: str) -> Iterator[Gallery]:
        """Forty items in the first space: ``year`` 0 to 3, ``kind`` even or null."""
        with self.target.create(url, FIRST) as gallery:
            fill(gallery)
            yield gallery

    def needs(self, feature: str) -> None:
        if feature not in self.target.features:
            pytest.skip(f"the store does not have the feature {feature!r}")

    # ------------------------------------------------------------------------------------------- what is kept

    def test_items_come_back_in_order_with_everything_that_was_given(self, gallery: Gallery) -> None:
        """Fix: keep id, uri, content hash and metadata; iterate by number, which rises with every item."""
        items = list(gallery.items(batch=7))
        assert [item.id for item in items] == NAMES
        assert [item.num for item in items] == sorted({item.num for item in items})
        assert items[5].uri == "id-005.jpg"
        assert dict(items[5].metadata) == {"year": 1, "kind": None}
        assert gallery.get("id-007") == items[7]
        assert gallery.get_many(["id-003", "nobody"]) == [items[3], None]
        assert gallery.store.items([items[2].num]) == {items[2].num: items[2]}
        assert "id-001" in gallery
        assert len(gallery) == 40

    def test_vectors_come_back_bit_for_bit(self, gallery: Gallery) -> None:
        """Fix: float32 in, the same float32 out."""
        nums, rows = gallery.vectors()
        names = gallery.storage.names(nums.tolist())
        assert np.array_equal(rows, vectors([names[num] for num in nums.tolist()], FIRST))
        assert np.array_equal(gallery.vectors_of(["id-009", "id-002"]), vectors(["id-009", "id-002"], FIRST))

    def test_what_was_written_is_there_after_opening_again(self, gallery: Gallery, url: str) -> None:
        """Fix: a call that returned is durable."""
        with self.target.open(url, readonly=True) as again:
            assert list(again.items()) == list(gallery.items())
            same(again, gallery, FIRST)
            assert again.spaces() == gallery.spaces()
            with pytest.raises(GalleryError, match="readonly"):
                again.delete(["id-000"])

    def test_replaced_content_is_another_item_of_the_same_id(self, gallery: Gallery) -> None:
        """Fix: an upsert gives the item a new number and its new vector; the old one is never found again."""
        before = gallery.get("id-004")
        gallery.add(["id-004", "fresh"], np.array([vector("id-004", FIRST, "edited"), vector("fresh", FIRST)]),
                    content_hashes=["edited", None], replace=True)  # fmt: skip
        after = gallery.get("id-004")
        assert after.num > before.num
        assert after.content_hash == "edited"
        assert len(gallery) == 41
        assert np.array_equal(gallery.vectors_of(["id-004"])[0], vector("id-004", FIRST, "edited"))
        assert gallery.search(vector("id-004", FIRST), 1).distances[0, 0] > 1e-3

    def test_deleted_items_are_gone_and_their_ids_are_free(self, gallery: Gallery) -> None:
        """Fix: delete all of the ids or none."""
        with pytest.raises(UnknownNameError):
            gallery.delete(["id-001", "nobody"])
        assert len(gallery) == 40
        assert gallery.delete(["id-001", "id-030"]) == 2
        assert len(gallery) == 38
        assert gallery.search(vector("id-001", FIRST), 1).distances[0, 0] > 1e-3
        gallery.add(["id-001"], vectors(["id-001"], FIRST))
        assert gallery.search(vector("id-001", FIRST), 1).ids == [["id-001"]]
        assert gallery.compact() == 2
        assert len(gallery) == 39
        assert gallery.verify().ok

    def test_bad_input_changes_nothing(self, gallery: Gallery, url: str) -> None:
        """Fix: check first, then write in one step."""
        nan = vectors(["x"], FIRST)
        nan[0, 3] = np.nan
        before = gallery.snapshot().epoch
        for bad in (
            lambda: gallery.add(["new", "id-001"], vectors(["new", "id-001"], FIRST)),
            lambda: gallery.add(["new"], nan),
            lambda: gallery.add(["new"], np.zeros((1, FIRST.dim), np.float32)),
            lambda: gallery.add(["new"], vectors(["new"], SECOND)),
            lambda: gallery.add(["new"], vectors(["new"], FIRST), space="unknown"),
            lambda: gallery.add(["new", "new"], vectors(["new", "new"], FIRST)),
            lambda: gallery.add([""], vectors(["new"], FIRST)),
            lambda: gallery.add(["new"], vectors(["new"], FIRST), metadata=[{"a": float("nan")}]),
            # As Python reads the name of a file that is not UTF-8.
            lambda: gallery.add(["\udcff"], vectors(["new"], FIRST)),
            lambda: gallery.add(["new"], vectors(["new"], FIRST), uris=["\udcff.jpg"]),
            lambda: gallery.add(["new"], vectors(["new"], FIRST), content_hashes=["\udcff"]),
            lambda: gallery.add(["new"], vectors(["new"], FIRST), metadata=[{"a": "\udcff"}]),
            lambda: gallery.get("\udcff"),
            lambda: gallery.search(vectors(["q"], SECOND)),
            lambda: self.target.create(url, FIRST),
            lambda: self.target.open(self.new_url()),
        ):
            with pytest.raises(BowerbirdError):
                bad()
        assert gallery.snapshot().epoch == before
        assert [item.id for item in gallery.items()] == NAMES

    def test_unusual_ids_and_metadata_are_kept(self, gallery: Gallery) -> None:
        """Fix: an id is any text of 1 to 1024 characters; metadata is any JSON object."""
        names = ["ü" * 1024, "a\tb'c\"d%s{}", "日本", "-1", "1e+20"]
        rows: list[dict[str, Any]] = [
            {"nested": {"list": [1, 2.5, None]}},
            {"quote'": "\\ \" '"},
            {"emoji": "🦜"},
            {"big": 2**60, "no": False},
            {"large": [1e16, -1.7e18, 1e300, 5e-324, 1.0], "text": '\\u0000 "1e+20" \\'},
        ]
        gallery.add(names, vectors(names, FIRST), metadata=rows)
        kept = [dict(item.metadata) if item else {} for item in gallery.get_many(names)]
        in_words = [[repr(sorted(row.items())) for row in metadata] for metadata in (kept, rows)]
        assert in_words[0] == in_words[1]  # 1e16 is a float and stays one
        assert gallery.search(vectors(names, FIRST), 1).ids == [[name] for name in names]

    def test_files_and_lines_are_kept_beside_the_gallery(self, gallery: Gallery, url: str) -> None:
        """Fix: `write_file` replaces as a whole, `append_line` adds to the end."""
        storage = gallery.storage
        assert storage.read_file("watch/1.npz") is None
        storage.write_file("watch/1.npz", b"\0\xffone")
        storage.write_file("watch/1.npz", b"\0\xfftwo")
        for line in ('{"a": 1}', '{"b": "ü"}'):
            storage.append_line("watch/1.jsonl", line)
        with self.target.open(url) as again:
            assert again.storage.read_file("watch/1.npz") == b"\0\xfftwo"
            assert again.storage.read_file("watch/1.jsonl") == '{"a": 1}\n{"b": "ü"}\n'.encode()
            assert again.storage.files("watch") == ["watch/1.jsonl", "watch/1.npz"]

    def test_spaces_relations_and_transforms_are_kept(self, gallery: Gallery, url: str) -> None:
        """Fix: every snapshot carries the registered relations; a transform is used by searches at once."""
        gallery.register_space(SECOND)
        gallery.register_space(SECOND)
        weight = np.random.default_rng(1).standard_normal((FIRST.dim, SECOND.dim)).astype(np.float32)
        gallery.relate(SECOND.fingerprint, FIRST.fingerprint, evidence={"map": 0.5})
        made = VectorTransform.linear(SECOND.fingerprint, FIRST.fingerprint, weight)
        gallery.register_transform(made, accept_unmeasured=True)
        with self.target.open(url) as again:
            assert {r.kind for r in again.relations()} == {"compatible", "transform"}
            found = again.search({SECOND.fingerprint: QUERIES[SECOND.fingerprint]}, 5)
            mapped = again.transforms()[0](QUERIES[SECOND.fingerprint])
            assert found.ids == again.search(mapped, 5).ids

    def test_a_relation_that_is_taken_back_is_gone_from_every_snapshot_and_no_other_is(
        self, gallery: Gallery, url: str
    ) -> None:
        """Fix: `unrelate` deletes one row and makes a new snapshot."""
        gallery.register_space(SECOND)
        gallery.relate(SECOND.fingerprint, FIRST.fingerprint)
        gallery.relate(FIRST.fingerprint, SECOND.fingerprint)
        assert len(gallery.snapshot().relations) == 2
        gallery.unrelate(SECOND.fingerprint, FIRST.fingerprint)
        with self.target.open(url) as again:
            for opened in (gallery, again):
                (left,) = opened.snapshot().relations
                assert (left.new, left.old) == (FIRST.fingerprint, SECOND.fingerprint)

    # ------------------------------------------------------------------------------------------------ searching

    def test_a_search_ranks_all_items_by_their_exact_distance(self, gallery: Gallery) -> None:
        """Fix: rank with `bowerbird.gallery.part.rank_exactly`; pad beyond the end with -1 and infinity."""
        found = gallery.search(QUERIES[FIRST.fingerprint], 50)
        stored = vectors(NAMES, FIRST).astype(np.float64)
        for row, query in enumerate(QUERIES[FIRST.fingerprint].astype(np.float64)):
            distances = (1 - stored @ query).astype(np.float32)
            order = np.lexsort((np.arange(40), distances))
            assert found.ids[row] == [NAMES[i] for i in order]
            assert np.allclose(found.distances[row, :40], distances[order], atol=1e-6)
        assert (found.nums[:, 40:] == -1).all()
        assert np.isinf(found.distances[:, 40:]).all()

    def test_copies_of_one_vector_are_ranked_by_their_number(self, gallery: Gallery) -> None:
        """Fix: look further than k where many items are at one distance."""
        copies = [f"copy-{number}" for number in range(60)]
        gallery.add(copies, np.repeat(vectors(["copy"], FIRST), 60, axis=0))
        assert gallery.search(vector("copy", FIRST), 7).ids[0] == copies[:7]

    def test_a_filter_gives_the_nearest_of_those_that_match(self, gallery: Gallery) -> None:
        """Fix: values of one key are alternatives, keys are joined by and, null is a missing key."""
        self.needs("where")
        rows = {name: {"year": n % 4, "kind": "even" if n % 2 == 0 else None} for n, name in enumerate(NAMES)}
        everything = gallery.search(QUERIES[FIRST.fingerprint], 40).ids
        for where, matches in (
            ({"year": 2}, lambda r: r["year"] == 2),
            ({"year": [0, 3]}, lambda r: r["year"] in (0, 3)),
            ({"year": [0, 1], "kind": "even"}, lambda r: r["year"] in (0, 1) and r["kind"] == "even"),
            ({"kind": None}, lambda r: r["kind"] is None),
            ({"kind": ["even", None]}, lambda r: True),
            ({"year": "2"}, lambda r: False),
            ({"nothing": 1}, lambda r: False),
        ):
            found = gallery.search(QUERIES[FIRST.fingerprint], 6, where=where).ids
            assert found == [[name for name in names if matches(rows[name])][:6] for names in everything], where
        nothing_has: list[Any] = [{"year": float("nan")}, {"year": -float("inf")}, {"kind": "\udcff"}, {"year": {}}]
        for bad in [*nothing_has, {"": 1}, ["year"]]:
            with pytest.raises(InputError):
                gallery.search(QUERIES[FIRST.fingerprint], 6, where=bad)
        assert gallery.search(QUERIES[FIRST.fingerprint], 6, where={"kind": "\0"}).ids == [[]] * 4

    def test_a_half_moved_gallery_is_searched_on_both_sides_and_counted_by_space(self, gallery: Gallery) -> None:
        """Fix: an item with a new vector is searched in the new space only, every other one in the old space only."""
        begin(gallery, SECOND, seed=3)
        moved = []
        for _ in range(2):
            task = leased(gallery, "worker")
            gallery.store.commit_task(task, task.nums, encode(task.items, SECOND))
            moved += [item.id for item in task.items]
        assert gallery.counts() == {FIRST.fingerprint: 24, SECOND.fingerprint: 16}
        found = gallery.search(asked(gallery), 40)
        for row in range(len(found)):
            assert sorted(found.ids[row]) == NAMES
            on_new = {name for name, side in zip(found.ids[row], found.sides[row], strict=True) if side == 1}
            assert on_new == set(moved)
        assert gallery.snapshot().part_of(SECOND.fingerprint).contains(np.array([gallery.get(moved[0]).num])).all()

    def test_a_snapshot_never_shows_anything_else(self, gallery: Gallery) -> None:
        """Fix: a snapshot is one epoch. What was dropped may be refused (`SnapshotGoneError`), not answered wrongly."""
        taken = gallery.snapshot()
        shown = gallery.search(QUERIES[FIRST.fingerprint], 10, snapshot=taken)
        gallery.delete(["id-000", shown.ids[0][0]])
        gallery.add(["fresh"], vectors(["fresh"], FIRST))
        begin(gallery, SECOND)
        work(gallery, tasks=2)
        again = gallery.search(QUERIES[FIRST.fingerprint], 10, snapshot=taken)
        assert again.ids == shown.ids
        assert np.array_equal(again.distances, shown.distances)
        assert taken.live == 40
        work(gallery)
        gallery.store.finish_upgrade(verified=True)
        with contextlib.suppress(SnapshotGoneError):
            assert gallery.search(QUERIES[FIRST.fingerprint], 10, snapshot=taken).ids == shown.ids

    def test_random_operations_agree_with_a_dictionary(self) -> None:
        """Fix: add, delete, begin, commit, finish, roll back and compact in any order lose or double nothing."""
        for seed in range(self.sequences):
            with self.target.create(self.new_url(), FIRST) as gallery:
                model = Model(gallery, seed, rollback="rollback" in self.target.features)
                for _ in range(self.operations):
                    model.step()
                    model.check()
                report = gallery.verify()
                assert report.ok, f"{report} after {model.log}"

    # ------------------------------------------------------------------------------------------------- upgrades

    def test_an_upgrade_ends_at_the_gallery_of_the_new_vectors(self, gallery: Gallery, url: str) -> None:
        """Fix: begin changes no result; finish serves the new space only, and refuses while items are old."""
        before = gallery.search(QUERIES[FIRST.fingerprint], 10)
        state = begin(gallery, SECOND, seed=1)
        assert (state.old, state.new, state.state) == (FIRST.fingerprint, SECOND.fingerprint, "running")
        start = gallery.search(asked(gallery), 10)
        assert start.ids == before.ids
        assert np.array_equal(start.distances, before.distances)
        with pytest.raises(UpgradeError):
            begin(gallery, THIRD)
        with pytest.raises(UpgradeError):
            gallery.store.finish_upgrade(verified=True)
        assert work(gallery) == 40
        assert gallery.store.progress().complete
        assert gallery.verify().ok
        gallery.store.finish_upgrade(verified=True)
        assert gallery.store.upgrade_state() is None
        assert gallery.snapshot().serving == SECOND.fingerprint
        assert [entry["state"] for entry in gallery.store.history()] == ["finished"]
        with self.target.create(self.new_url(), SECOND) as direct:
            fill(direct, SECOND)
            same(gallery, direct, SECOND)
        with self.target.open(url) as again:
            same(again, gallery, SECOND)

    def test_a_pause_gives_out_no_tasks_and_takes_those_that_are_out(self, gallery: Gallery) -> None:
        """Fix: pause and resume are states of the upgrade, seen by every worker."""
        begin(gallery, SECOND)
        task = leased(gallery, "worker")
        gallery.store.pause()
        assert state_of(gallery) == "paused"
        assert gallery.store.lease_task("other") is None
        gallery.store.commit_task(task, task.nums, encode(task.items, SECOND))
        gallery.store.resume()
        assert work(gallery) == 32

    def test_a_rollback_is_exact_to_the_bit(self, gallery: Gallery, url: str) -> None:
        """Fix: never touch an old vector before finish."""
        self.needs("rollback")
        before = gallery.search(QUERIES[FIRST.fingerprint], 20)
        begin(gallery, SECOND, seed=2)
        work(gallery, tasks=3)
        assert gallery.store.rollback() == 0
        after = gallery.search(QUERIES[FIRST.fingerprint], 20)
        assert after.ids == before.ids
        assert np.array_equal(after.distances, before.distances)
        assert np.array_equal(gallery.vectors_of(NAMES), vectors(NAMES, FIRST))
        assert gallery.verify().ok
        begin(gallery, SECOND)  # and it can be tried again
        assert work(gallery) == 40

    def test_items_that_came_meanwhile_need_an_old_vector_for_a_rollback(self, gallery: Gallery) -> None:
        """Fix: new items are written in the new space; a rollback encodes them, or leaves them pending."""
        self.needs("rollback")
        begin(gallery, SECOND)
        work(gallery, tasks=1)
        gallery.add(["late"], vectors(["late"], SECOND), space=SECOND.fingerprint)
        gallery.add(["old-late"], vectors(["old-late"], FIRST), space=FIRST.fingerprint)
        gallery.delete(["id-039"])
        with pytest.raises(UpgradeError):
            gallery.store.rollback()
        assert gallery.store.upgrade_state() is not None
        assert gallery.store.rollback(leave_pending=True) == 1
        assert [item.id for item in gallery.pending()] == ["late"]
        assert len(gallery) == 41
        assert gallery.counts() == {FIRST.fingerprint: 40}
        gallery.fill(["late"], vectors(["late"], FIRST))
        assert gallery.search(vector("late", FIRST), 1).ids == [["late"]]
        begin(gallery, SECOND)
        gallery.add(["later"], vectors(["later"], SECOND), space=SECOND.fingerprint)
        assert gallery.store.rollback(encode_old=lambda items: encode(items, FIRST)) == 0
        assert gallery.search(vector("later", FIRST), 1).ids == [["later"]]
        assert gallery.verify().ok

    def test_an_item_that_fails_three_times_stays_on_its_old_vector(self, gallery: Gallery) -> None:
        """Fix: queue a failed item again, list it with its error, and let `retry_failed` forget its failures."""
        begin(gallery, SECOND, task_items=40)
        bad = gallery.get("id-011").num
        for attempt in range(MAX_FAILURES):
            task = leased(gallery, "worker")
            good = task.nums[task.nums != bad]
            rows = encode([item for item in task.items if item.num != bad], SECOND)
            gallery.store.commit_task(task, good, rows, failures={bad: f"unreadable {attempt}"})
        progress = gallery.store.progress()
        assert progress.complete
        assert [tuple(failure) for failure in progress.failures] == [("id-011", MAX_FAILURES, "unreadable 2")]
        assert gallery.search({**asked(gallery), FIRST.fingerprint: vectors(["id-011"] * 4, FIRST)}, 1).ids[0] == [
            "id-011"
        ]
        assert gallery.store.retry_failed() == 1
        assert work(gallery) == 1
        gallery.store.finish_upgrade(verified=True)

    def test_upgrades_stack_and_a_rollback_takes_one_off(self, gallery: Gallery) -> None:
        """Fix: an item is in the newest space in which it has a vector; a rollback returns to the exact state below."""
        if "sequences" not in self.target.features:
            begin(gallery, SECOND)
            with pytest.raises(GalleryError):
                begin(gallery, THIRD, on_top=True)
            return
        begin(gallery, SECOND, seed=1)
        work(gallery, tasks=2)
        two = gallery.search(asked(gallery), 20)
        begin(gallery, THIRD, seed=4, on_top=True)
        assert np.array_equal(gallery.search(asked(gallery), 20).distances, two.distances)
        work(gallery, tasks=2)
        assert list(gallery.counts()) == [FIRST.fingerprint, SECOND.fingerprint, THIRD.fingerprint]
        assert sum(gallery.counts().values()) == 40
        assert gallery.counts()[THIRD.fingerprint] == 16
        if "rollback" in self.target.features:
            gallery.store.rollback()
            assert state_of(gallery) == "paused"
            back = gallery.search(asked(gallery), 20)
            assert back.ids == two.ids
            assert np.array_equal(back.distances, two.distances)
            begin(gallery, THIRD, on_top=True)
        work(gallery)
        gallery.store.finish_upgrade(verified=True)
        with self.target.create(self.new_url(), THIRD) as direct:
            fill(direct, THIRD)
            same(gallery, direct, THIRD)

    # --------------------------------------------------------------------------------------------------- leases

    def test_the_parts_below_are_those_that_a_rollback_returns_to(self, gallery: Gallery) -> None:
        """Fix: every item that has an older vector, in the newest older space; without an upgrade the parts."""
        assert [sorted(part.nums) for part in gallery.snapshot().parts_below] == [list(range(40))]
        begin(gallery, SECOND, seed=1)
        work(gallery, tasks=2)
        gallery.add(["late"], vectors(["late"], SECOND), space=SECOND.fingerprint)
        (below,) = gallery.snapshot().parts_below
        assert (below.count, sorted(below.nums)) == (40, list(range(40)))
        assert np.array_equal(below.vectors_of(np.arange(40)), vectors(NAMES, FIRST))
        assert below.search(QUERIES[FIRST.fingerprint], 50).ids[:, 40:].max() == -1
        self.needs("sequences")
        begin(gallery, THIRD, seed=4, on_top=True)
        before = [sorted(part.nums) for part in gallery.snapshot().parts[:2]]
        work(gallery, tasks=2)
        assert [sorted(part.nums) for part in gallery.snapshot().parts_below] == before
        assert [part.space.fingerprint for part in gallery.snapshot().parts_below] == [
            FIRST.fingerprint, SECOND.fingerprint,
        ]  # fmt: skip

    def test_a_gallery_without_pictures_is_lifted_by_a_transform(self, gallery: Gallery) -> None:
        """Fix: a lift reads the older vectors of an item while its new one is being written."""
        from bowerbird.upgrade.lift import begin_lift, lifter
        from bowerbird.upgrade.run import run
        from bowerbird.upgrade.state import finish

        weight = np.random.default_rng(3).standard_normal((SECOND.dim, FIRST.dim))
        transform = VectorTransform.linear(FIRST.fingerprint, SECOND.fingerprint, weight)
        begin_lift(gallery, transform, SECOND, strategy="core:full", task_items=16, accept_poor=True)
        gallery.add(["late"], vectors(["late"], FIRST), space=FIRST.fingerprint)
        assert run(gallery, lifter(gallery)).reason == "complete"
        finish(gallery, encoder=lifter(gallery))
        names = [*NAMES, "late"]
        assert np.allclose(gallery.vectors_of(names), transform(vectors(names, FIRST)), atol=1e-6)
        assert gallery.search({SECOND.fingerprint: QUERIES[SECOND.fingerprint]}, 50).ids[0]

    def test_of_a_large_task_a_piece_is_leased_and_the_rest_is_next(self, gallery: Gallery) -> None:
        """Fix: `lease_task(most=...)` makes two tasks of one, and keeps the order of work."""
        begin(gallery, SECOND, seed=3, task_items=30)
        whole = gallery.store.lease_task("a")
        assert whole is not None and len(whole.items) == 30
        gallery.store.release_task(whole)
        seen: list[str] = []
        for number, most in enumerate((7, 7, None)):
            piece = gallery.store.lease_task(f"worker-{number}", **({} if most is None else {"most": most}))
            assert piece is not None and len(piece.items) == (16 if most is None else most)
            seen += [item.id for item in piece.items]
            gallery.store.commit_task(piece, piece.nums, encode(piece.items, SECOND))
        assert seen == [item.id for item in whole.items]
        assert gallery.counts()[SECOND.fingerprint] == 30 and gallery.verify().ok
        expired = gallery.store.lease_task("slow", 0.001)
        assert expired is not None
        time.sleep(0.05)
        piece = gallery.store.lease_task("next", most=4)
        assert piece is not None and len(piece.items) == 4
        with pytest.raises(LeaseLostError):
            gallery.store.commit_task(expired, expired.nums, encode(expired.items, SECOND))
        gallery.store.release_task(piece)
        work(gallery)
        gallery.store.finish_upgrade(verified=True)
        assert gallery.counts() == {SECOND.fingerprint: 40} and gallery.verify().ok

    def test_no_task_is_in_two_hands(self, gallery: Gallery, url: str) -> None:
        """Fix: leasing is one atomic step, whoever asks."""
        begin(gallery, SECOND)
        with self.target.open(url) as other:
            tasks = [store.lease_task(f"w{i}") for i, store in enumerate([gallery.store, other.store] * 3)]
        assert tasks[-1] is None
        given = [item.id for task in tasks if task is not None for item in task.items]
        assert sorted(given) == NAMES
        assert {lease.owner for lease in gallery.store.leases()} == {"w0", "w1", "w2", "w3", "w4"}

    def test_an_expired_lease_goes_to_another_and_the_late_commit_is_refused(self, gallery: Gallery) -> None:
        """Fix: a later lease has a higher fencing token, and a commit with a lower one changes nothing."""
        begin(gallery, SECOND, task_items=40)
        late = leased(gallery, "slow", 0.05)
        time.sleep(0.2)
        taken = leased(gallery, "fast")
        assert taken.token > late.token
        for refused in (
            lambda: gallery.store.commit_task(late, late.nums, encode(late.items, SECOND)),
            lambda: gallery.store.renew(late),
            lambda: gallery.store.release_task(late),
        ):
            with pytest.raises(LeaseLostError):
                refused()
        assert gallery.counts()[SECOND.fingerprint] == 0
        gallery.store.commit_task(taken, taken.nums, encode(taken.items, SECOND))
        with pytest.raises(LeaseLostError):  # it is done; a commit whose answer was lost is not done twice
            gallery.store.commit_task(taken, taken.nums, encode(taken.items, SECOND))

    def test_a_renewed_lease_stays_and_a_task_given_back_is_free(self, gallery: Gallery) -> None:
        """Fix: `renew` counts from now; `release_task` and `free_lease` give the task to the next one who asks."""
        begin(gallery, SECOND, task_items=40)
        task = leased(gallery, "slow", 0.2)
        gallery.store.renew(task, 60)
        time.sleep(0.3)
        assert gallery.store.lease_task("other") is None
        gallery.store.release_task(task)
        again = leased(gallery, "other")
        (lease,) = gallery.store.leases()
        assert (lease.owner, lease.token) == ("other", again.token)
        gallery.store.renew(again, 30)
        assert gallery.store.free_lease(lease) is False  # it was renewed: its owner lives
        assert gallery.store.free_lease(gallery.store.leases()[0]) is True
        with pytest.raises(LeaseLostError):
            gallery.store.commit_task(again, again.nums, encode(again.items, SECOND))
        assert work(gallery) == 40

    def test_a_commit_must_answer_for_every_item_of_its_task(self, gallery: Gallery) -> None:
        """Fix: vectors or errors for all items, once, and nothing for others."""
        begin(gallery, SECOND)
        task = leased(gallery, "worker")
        rows = encode(task.items, SECOND)
        with pytest.raises(InputError):
            gallery.store.commit_task(task, task.nums[1:], rows[1:])
        with pytest.raises(InputError):
            gallery.store.commit_task(task, task.nums, rows, failures={int(task.nums[0]): "?"})
        with pytest.raises(BowerbirdError):
            gallery.store.commit_task(task, task.nums, rows[:, 1:])
        gallery.store.commit_task(task, task.nums, rows)

    def test_items_that_are_deleted_while_they_are_encoded_stay_deleted(self, gallery: Gallery) -> None:
        """Fix: a commit does not bring an item back, and counts only live ones."""
        begin(gallery, SECOND)
        task = leased(gallery, "worker")
        gallery.delete([task.items[0].id])
        gallery.store.commit_task(task, task.nums, encode(task.items, SECOND))
        assert task.items[0].id not in gallery
        assert gallery.counts() == {FIRST.fingerprint: 32, SECOND.fingerprint: 7}
        assert gallery.verify().ok

    def test_worker_processes_share_the_work_and_one_that_is_killed_costs_nothing(
        self, gallery: Gallery, url: str
    ) -> None:
        """Fix: what a killed worker had in hand comes back when its lease has run out."""
        begin(gallery, SECOND, seed=7, task_items=2)
        killed = WorkerProcess(url, "killed", pause=0.05, lease_s=1.0)
        other = WorkerProcess(url, "other", pause=0.02, lease_s=1.0)
        killed.commits(2)
        killed.kill()
        assert other.finished() == 0
        assert gallery.store.progress().complete
        assert gallery.verify().ok
        gallery.store.finish_upgrade(verified=True)
        with self.target.create(self.new_url(), SECOND) as direct:
            fill(direct, SECOND)
            same(gallery, direct, SECOND)

    def test_readers_writers_and_workers_at_once_lose_and_double_nothing(self, gallery: Gallery, url: str) -> None:
        """Fix: a search is of one epoch, whatever is committed between its parts; no two transactions deadlock."""
        rush = Rush(url, self.target.open)
        rush.start()
        for target in (SECOND, FIRST, THIRD):
            begin(gallery, target, seed=3, task_items=6)
            while not gallery.store.progress().complete and not rush.errors:
                time.sleep(0.02)
            if target is FIRST and "rollback" in self.target.features:
                gallery.store.rollback(encode_old=lambda items: encode(items, SECOND))
                continue
            while not rush.errors:
                try:
                    gallery.store.finish_upgrade(verified=True)
                    break
                except UpgradeError:  # an item came in the old space just now
                    time.sleep(0.02)
        rush.stop()
        assert not rush.errors, rush.errors[0]
        assert rush.searches > 0
        assert {item.id for item in gallery.items()} == rush.names
        assert gallery.verify().ok

    # ------------------------------------------------------------------------------------------------- features

    def test_the_features_of_a_gallery_are_those_of_its_store(self, gallery: Gallery) -> None:
        """Fix: name features of `bowerbird.gallery.protocol.FEATURES` only."""
        assert gallery.features <= self.target.features <= set(FEATURES)

    def test_an_approximate_index_finds_almost_everything(self, gallery: Gallery) -> None:
        """Fix: `set_index` builds it and measures its recall; distances stay exact; `exact` drops it again."""
        if "index" not in self.target.features:
            with pytest.raises(BowerbirdError):
                gallery.set_index("hnsw")
            return
        exact = gallery.search(QUERIES[FIRST.fingerprint], 5)
        try:
            built = gallery.set_index("hnsw")
        except MissingExtraError as exc:  # of a library that makes indexes
            pytest.skip(str(exc))
        assert len(built) == 1
        assert gallery.index()["kind"] == "hnsw"
        found = gallery.search(QUERIES[FIRST.fingerprint], 5)
        shared = [len(set(a) & set(b)) for a, b in zip(found.ids, exact.ids, strict=True)]
        assert sum(shared) >= 0.9 * 20
        gallery.add(["fresh"], vectors(["fresh"], FIRST))
        assert gallery.search(vector("fresh", FIRST), 1).ids == [["fresh"]]
        gallery.set_index("exact")
        again = gallery.search(QUERIES[FIRST.fingerprint], 5)
        assert gallery.index()["files"] == []
        assert set(again.ids[0]) <= {*NAMES, "fresh"}
        with pytest.raises(InputError):
            gallery.set_index("hsnw")

    def test_statistics_are_plain_data(self, gallery: Gallery) -> None:
        """Fix: `stats` names items, rows, bytes and the place, without a password."""
        stats = gallery.stats()
        assert stats["items"] == 40
        assert stats["rows"] == 40
        assert stats["dead_rows"] == 0
        assert stats["bytes"] > 0
        assert stats["path"] == str(gallery.path)


def fill(gallery: Gallery, space: Any = FIRST) -> None:
    """Forty items of ``space``."""
    metadata = [{"year": number % 4, "kind": "even" if number % 2 == 0 else None} for number in range(40)]
    gallery.add(NAMES, vectors(NAMES, space), uris=[f"{name}.jpg" for name in NAMES], metadata=metadata)


def leased(gallery: Gallery, owner: str, lease_s: float = 300.0) -> Task:
    """The next task; there is one."""
    task = gallery.store.lease_task(owner, lease_s)
    assert task is not None, "no task was given out"
    return task


def state_of(gallery: Gallery) -> str | None:
    upgrade = gallery.store.upgrade_state()
    return None if upgrade is None else upgrade.state


def asked(gallery: Gallery) -> dict[str, np.ndarray]:
    """The queries in every space that the gallery knows."""
    return {name: rows for name, rows in QUERIES.items() if name in gallery.snapshot().spaces}


def same(one: Gallery, other: Gallery, space: Any) -> None:
    """Both find the same items at the same distances, to the last bit."""
    first, second = (gallery.search(QUERIES[space.fingerprint], 15) for gallery in (one, other))
    assert first.ids == second.ids
    assert np.array_equal(first.distances, second.distances)
