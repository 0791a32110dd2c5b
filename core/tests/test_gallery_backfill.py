"""The low-level operations of an upgrade: two disjoint parts, leases with fencing tokens, finish and rollback."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from gallery_world import NEW, OLD, encode, queries, vectors

from bowerbird.errors import InputError, SpaceError, UpgradeError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.merge import merge_by_distance
from bowerbird.gallery.tasks import LeaseLostError
from bowerbird.retrieval.index import Hits

NAMES = [f"item-{i:04d}" for i in range(200)]
BOTH = queries()


@pytest.fixture
def gallery(tmp_path: Path):
    with Gallery.create(tmp_path / "gallery", OLD) as made:
        made.add(NAMES, vectors(NAMES, OLD))
        yield made


def begin(gallery: Gallery, **options) -> None:
    order = np.random.default_rng(3).permutation(gallery.snapshot().new.nums)
    gallery.store.begin_upgrade(
        NEW, **{"strategy": "test", "order_name": "core:random", "order": order, "task_items": 30, **options}
    )


def work(gallery: Gallery, tasks: int = 10**6, owner: str = "worker") -> int:
    done = 0
    while done < tasks and (task := gallery.store.lease_task(owner)) is not None:
        gallery.store.commit_task(task, task.nums, encode(task.items, NEW))
        done += 1
    return done


def same(left, right) -> bool:
    return left.ids == right.ids and np.array_equal(left.distances, right.distances)


def fresh(path: Path, space: Space, names: list[str]) -> Gallery:
    made = Gallery.create(path, space)
    made.add(names, vectors(names, space))
    return made


def test_at_zero_percent_results_are_bit_identical_to_before(gallery: Gallery) -> None:
    before = gallery.search(BOTH[OLD.fingerprint], 20)
    begin(gallery)
    assert same(gallery.search(BOTH, 20), before)
    assert same(gallery.search({OLD.fingerprint: BOTH[OLD.fingerprint]}, 20), before)  # the empty part needs no queries


def test_at_a_hundred_percent_they_are_bit_identical_to_a_gallery_built_from_new_vectors(
    gallery: Gallery, tmp_path: Path
) -> None:
    begin(gallery)
    work(gallery)
    with fresh(tmp_path / "direct", NEW, NAMES) as direct:
        expected = direct.search(BOTH[NEW.fingerprint], 20)
        assert same(gallery.search(BOTH, 20), expected)
        assert gallery.verify().ok
        gallery.store.finish_upgrade(verified=True)
        assert same(gallery.search(BOTH[NEW.fingerprint], 20), expected)
        assert gallery.counts() == direct.counts() == {NEW.fingerprint: 200}


def test_half_way_each_part_is_searched_in_its_space_and_the_hits_are_merged(gallery: Gallery, tmp_path: Path) -> None:
    begin(gallery)
    work(gallery, tasks=3)
    snapshot = gallery.snapshot()
    names = {num: item.id for num, item in gallery.store.items(range(200)).items()}
    parts = []
    for part in snapshot.parts:
        listed = [names[num] for num in sorted(part.nums.tolist())]
        with fresh(tmp_path / part.space.fingerprint[:3], part.space, listed) as alone:
            found = alone.search(BOTH[part.space.fingerprint], 15)
            nums = np.where(found.nums < 0, -1, np.sort(part.nums)[np.maximum(found.nums, 0)])
            parts.append(Hits(nums, found.distances))
    expected = merge_by_distance(*parts, 15)
    result = gallery.search(BOTH, 15)
    assert np.array_equal(result.nums, expected.ids) and np.array_equal(result.distances, expected.distances)
    assert np.array_equal(result.sides == 1, np.isin(result.nums, snapshot.new.nums))


def test_in_every_snapshot_the_parts_are_disjoint_and_their_union_is_the_live_items(gallery: Gallery) -> None:
    begin(gallery)
    live = set(range(200))
    for step in range(7):
        snapshot = gallery.snapshot()
        old, new = set(snapshot.old.nums.tolist()), set(snapshot.new.nums.tolist())
        assert not old & new and old | new == live
        assert gallery.counts() == {OLD.fingerprint: len(old), NEW.fingerprint: len(new)}
        victim = sorted(live)[step * 7]
        gallery.delete([NAMES[victim]])
        live.discard(victim)
        work(gallery, tasks=1)


def test_results_depend_on_which_items_moved_and_not_on_the_order(tmp_path: Path) -> None:
    results = []
    for name, order in (("up", np.arange(200)), ("down", np.arange(200).reshape(2, 100)[:, ::-1].ravel())):
        with fresh(tmp_path / name, OLD, NAMES) as gallery:
            begin(gallery, order=order, task_items=50)
            work(gallery, tasks=2)
            results.append(gallery.search(BOTH, 20))
    assert same(*results)


def test_new_items_go_straight_to_the_new_space_and_old_space_items_are_queued(gallery: Gallery) -> None:
    begin(gallery)
    gallery.add(["fresh"], vectors(["fresh"], NEW), space=NEW.fingerprint)
    gallery.add(["late"], vectors(["late"], OLD), space=OLD.fingerprint)
    assert gallery.counts() == {OLD.fingerprint: 201, NEW.fingerprint: 1}
    assert work(gallery) == 8  # seven tasks of the plan, one for the late item
    assert gallery.counts() == {OLD.fingerprint: 0, NEW.fingerprint: 202}
    assert np.array_equal(gallery.vectors_of(["late"]), vectors(["late"], NEW))


def test_an_edit_puts_a_migrated_item_back_into_the_queue(gallery: Gallery) -> None:
    begin(gallery)
    work(gallery)
    gallery.add(["item-0003"], vectors(["edited"], OLD), content_hashes=["v2"], space=OLD.fingerprint, replace=True)
    assert gallery.counts() == {OLD.fingerprint: 1, NEW.fingerprint: 199}
    with pytest.raises(UpgradeError, match=r"1 items have no vector of the new space yet \('item-0003'"):
        gallery.store.finish_upgrade(verified=True)
    task = gallery.store.lease_task("worker")
    assert [(item.id, item.content_hash) for item in task.items] == [("item-0003", "v2")]
    gallery.store.commit_task(task, task.nums, encode(task.items, NEW))
    gallery.store.finish_upgrade(verified=True)


def test_an_edit_while_a_worker_encodes_is_not_overwritten_by_the_stale_vector(gallery: Gallery) -> None:
    begin(gallery, order=np.arange(200))
    task = gallery.store.lease_task("worker")
    gallery.add(["item-0000"], vectors(["edited"], NEW), space=NEW.fingerprint, replace=True)
    gallery.delete(["item-0001"])
    gallery.store.commit_task(task, task.nums, encode(task.items, NEW))
    assert np.array_equal(gallery.vectors_of(["item-0000"]), vectors(["edited"], NEW))
    assert "item-0001" not in gallery and gallery.verify().ok


def test_files_in_the_folder_of_a_gallery_are_found_there_after_it_moved(tmp_path: Path) -> None:
    inside, outside = tmp_path / "here" / "contents" / "a.png#xywh=1,2,3,4", tmp_path / "here-too" / "b.png"
    uris = [str(inside), str(outside), "emoji:styles?item=3", None]
    with Gallery.create(tmp_path / "here", OLD) as gallery:
        gallery.add(["a", "b", "c", "d"], vectors(["a", "b", "c", "d"], OLD), uris=uris)
        assert [gallery.get(name).uri for name in "abcd"] == uris
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    expected = [str(tmp_path / "there" / "contents" / "a.png#xywh=1,2,3,4"), *uris[1:]]
    for place in ("there", "link"):
        with Gallery.open(tmp_path / place) as gallery:
            assert [item.uri for item in gallery.items()] == expected
    with Gallery.open(tmp_path / "there") as gallery:
        gallery.store.begin_upgrade(NEW, strategy="core:full", order_name="core:random")
        task = gallery.store.lease_task("worker")
        assert task is not None and {item.id: item.uri for item in task.items} == dict(
            zip("abcd", expected, strict=True)
        )


def test_a_worker_that_lost_its_lease_is_refused_and_changes_nothing(gallery: Gallery) -> None:
    begin(gallery)
    slow = gallery.store.lease_task("slow", 10, now=0)
    quick = gallery.store.lease_task("quick", 10, now=11)
    assert quick.id == slow.id and quick.token > slow.token
    with pytest.raises(LeaseLostError, match="worker slow lost task"):
        gallery.store.commit_task(slow, slow.nums, encode(slow.items, NEW))
    with pytest.raises(LeaseLostError):
        gallery.store.renew(slow)
    assert gallery.counts()[NEW.fingerprint] == 0
    gallery.store.renew(quick, 100, now=11)
    assert gallery.store.lease_task("third", 10, now=50).id != quick.id
    gallery.store.commit_task(quick, quick.nums, encode(quick.items, NEW))
    assert gallery.counts()[NEW.fingerprint] == 30 and gallery.verify().ok


def test_two_workers_share_an_upgrade_with_a_segment_each(gallery: Gallery) -> None:
    begin(gallery)
    with Gallery.open(gallery.path) as other:
        for _ in range(3):
            for worker, name in ((gallery, "one"), (other, "two")):
                task = worker.store.lease_task(name)
                worker.store.commit_task(task, task.nums, encode(task.items, NEW))
        work(other)
        assert gallery.counts() == other.counts() == {OLD.fingerprint: 0, NEW.fingerprint: 200}
        segments = [segment for segment in gallery.snapshot().segments if segment.info.space == NEW.fingerprint]
        assert len(segments) == 2 and gallery.verify().ok


def test_threads_of_one_process_may_add_delete_search_and_migrate_at_once(gallery: Gallery) -> None:
    begin(gallery, task_items=10)
    errors: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    def ingest() -> None:
        for i in range(8):
            gallery.add([f"fresh-{i}"], vectors([f"fresh-{i}"], NEW), space=NEW.fingerprint)
            gallery.delete([NAMES[i]])

    def search() -> None:
        for _ in range(30):
            assert len(set(gallery.search(BOTH, 300).ids[0])) >= 200 - 8

    jobs = (ingest, search, lambda: work(gallery, owner="one"), lambda: work(gallery, owner="two"))
    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"
    assert errors == [] and gallery.counts() == {OLD.fingerprint: 0, NEW.fingerprint: 200}
    assert gallery.verify().ok


def test_a_commit_needs_a_vector_or_an_error_for_every_item_of_the_task(gallery: Gallery) -> None:
    begin(gallery)
    task = gallery.store.lease_task("worker")
    with pytest.raises(InputError, match=r"task .* has 30 items"):
        gallery.store.commit_task(task, task.nums[1:], encode(task.items[1:], NEW))
    with pytest.raises(SpaceError, match="width 12"):
        gallery.store.commit_task(task, task.nums, encode(task.items, OLD))
    assert gallery.counts()[NEW.fingerprint] == 0


def test_an_item_that_fails_three_times_stays_on_its_old_vector_and_is_listed(gallery: Gallery) -> None:
    begin(gallery)
    bad = gallery.get("item-0005").num
    while (task := gallery.store.lease_task("worker")) is not None:
        good = [item for item in task.items if item.num != bad]
        failures = {bad: "cannot be read"} if len(good) < len(task.items) else {}
        gallery.store.commit_task(
            task, [item.num for item in good], encode(good, NEW).reshape(-1, NEW.dim), failures=failures
        )
    progress = gallery.store.progress()
    assert progress.failures == [("item-0005", 3, "cannot be read")] and progress.complete
    assert gallery.counts() == {OLD.fingerprint: 1, NEW.fingerprint: 199}
    assert gallery.store.retry_failed() == 1
    assert work(gallery) == 1 and gallery.store.progress().failures == []


def test_a_task_that_fails_three_times_is_set_aside_until_it_is_retried(gallery: Gallery) -> None:
    begin(gallery, task_items=200)
    for _ in range(3):
        gallery.store.fail_task(gallery.store.lease_task("worker"), "no memory")
    assert gallery.store.lease_task("worker") is None and gallery.store.progress().tasks == {"failed": 1}
    assert gallery.store.retry_failed() == 200 and work(gallery) == 1


def test_a_released_task_is_free_again_and_a_paused_upgrade_gives_out_none(gallery: Gallery) -> None:
    begin(gallery)
    task = gallery.store.lease_task("worker")
    gallery.store.pause()
    assert gallery.store.lease_task("worker") is None and gallery.snapshot().upgrade.state == "paused"
    gallery.store.release_task(task)
    gallery.store.resume()
    assert gallery.store.lease_task("worker").id == task.id


def test_finish_needs_verification_and_removes_the_old_files(gallery: Gallery) -> None:
    begin(gallery)
    with pytest.raises(UpgradeError, match="verified=True"):
        gallery.store.finish_upgrade(verified=False)
    with pytest.raises(UpgradeError, match="200 items have no vector"):
        gallery.store.finish_upgrade(verified=True)
    work(gallery)
    gallery.store.finish_upgrade(verified=True)
    assert sum(file.stat().st_size for file in (gallery.path / "seg").glob("*.f32")) == 200 * NEW.dim * 4
    assert not list((gallery.path / "plan").iterdir())
    assert gallery.snapshot().serving == NEW.fingerprint and gallery.store.history()[0]["state"] == "finished"


def test_items_left_pending_by_finish_are_kept_unsearchable_until_filled(gallery: Gallery) -> None:
    begin(gallery)
    work(gallery, tasks=6)
    gallery.store.finish_upgrade(verified=True, leave_pending=True)
    left = [item.id for item in gallery.pending()]
    assert len(left) == 20 and len(gallery) == 200 and gallery.verify().ok
    gallery.fill(left, vectors(left, NEW))
    assert gallery.pending() == [] and gallery.counts() == {NEW.fingerprint: 200} and gallery.verify().ok


def test_rollback_restores_the_exact_old_state(gallery: Gallery) -> None:
    before = gallery.search(BOTH[OLD.fingerprint], 20)
    begin(gallery)
    work(gallery, tasks=4)
    leased = gallery.store.lease_task("worker")
    assert gallery.store.rollback() == 0
    assert same(gallery.search(BOTH[OLD.fingerprint], 20), before) and gallery.verify().ok
    with pytest.raises(LeaseLostError, match="the upgrade is over"):
        gallery.store.commit_task(leased, leased.nums, encode(leased.items, NEW))
    begin(gallery)  # and it can be begun again
    work(gallery)
    gallery.store.finish_upgrade(verified=True)


def test_rollback_asks_for_the_old_encoder_where_items_came_during_the_upgrade(gallery: Gallery) -> None:
    begin(gallery)
    work(gallery, tasks=2)
    gallery.add(["fresh", "item-0009"], vectors(["fresh", "item-0009"], NEW), space=NEW.fingerprint, replace=True)
    gallery.delete(["item-0010"])
    with pytest.raises(UpgradeError, match="2 items were added or edited"):
        gallery.store.rollback()
    assert gallery.store.rollback(encode_old=lambda items: encode(items, OLD)) == 0
    assert gallery.counts() == {OLD.fingerprint: 200}
    assert np.array_equal(gallery.vectors_of(["fresh"]), vectors(["fresh"], OLD)) and gallery.verify().ok


def test_or_rollback_leaves_them_pending_when_told_so(gallery: Gallery) -> None:
    begin(gallery)
    gallery.add(["fresh"], vectors(["fresh"], NEW), space=NEW.fingerprint)
    assert gallery.store.rollback(leave_pending=True) == 1
    assert [item.id for item in gallery.pending()] == ["fresh"] and len(gallery) == 201 and gallery.verify().ok
    begin(gallery)  # a pending item is queued by the next upgrade
    work(gallery)
    assert gallery.pending() == [] and gallery.counts()[NEW.fingerprint] == 201


def test_one_upgrade_at_a_time_and_never_to_the_same_space(gallery: Gallery) -> None:
    with pytest.raises(UpgradeError, match="already serves"):
        gallery.store.begin_upgrade(OLD, strategy="test", order_name="core:random")
    begin(gallery)
    with pytest.raises(UpgradeError, match="is running; finish it or roll it back"):
        begin(gallery)


@pytest.mark.parametrize("order", [[0, 0, 1], [5, 700], [-1]])
def test_an_order_that_is_no_permutation_is_refused(gallery: Gallery, order: list[int]) -> None:
    with pytest.raises(InputError, match="backfill order"):
        begin(gallery, order=np.array(order))


def test_items_are_leased_in_the_order_of_the_plan_with_missing_ones_at_the_end(gallery: Gallery) -> None:
    gallery.delete(["item-0007"])
    begin(gallery, order=np.array([150, 7, 3, 9]), task_items=4)
    assert gallery.store.lease_task("worker").nums.tolist() == [150, 3, 9, 0]
    assert gallery.store.lease_task("worker").nums.tolist() == [1, 2, 4, 5]


def test_during_an_upgrade_queries_must_name_their_space(gallery: Gallery) -> None:
    begin(gallery)
    work(gallery, tasks=1)
    with pytest.raises(SpaceError, match="say which space the queries are of"):
        gallery.search(BOTH[OLD.fingerprint])
    with pytest.raises(SpaceError, match=r"170 items are in space oldoldoldold"):
        gallery.search({NEW.fingerprint: BOTH[NEW.fingerprint]})
    with pytest.raises(InputError, match="one row per query"):
        gallery.search({NEW.fingerprint: BOTH[NEW.fingerprint], OLD.fingerprint: BOTH[OLD.fingerprint][:2]})
