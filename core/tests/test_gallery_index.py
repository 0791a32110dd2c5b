"""The approximate index of a gallery: a cache that makes searches faster, and never decides what is in the gallery."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bowerbird.cli import main
from bowerbird.errors import GalleryError, GalleryLockedError, InputError, MissingExtraError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.ann import IndexUnusableWarning
from bowerbird.gallery.covered import LINKING, CoveredPart
from bowerbird.gallery.part import Part
from bowerbird.retrieval.faiss_index import FaissIndex

pytest.importorskip("faiss")

OLD = Space("old" * 8, "tests:old", 16)
NEW = Space("new" * 8, "tests:new", 24)
COUNT = 5000
NAMES = [f"item-{i:04d}" for i in range(COUNT)]


def clustered(space: Space, count: int = COUNT, seed: int = 0) -> np.ndarray:
    """Unit vectors around 100 centres; the first rows do not depend on ``count``."""
    centres = np.random.default_rng(1).standard_normal((100, space.dim))
    rng = np.random.default_rng([seed, 2])
    rows = centres[rng.integers(100, size=count)] + 0.4 * rng.standard_normal((count, space.dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


VECTORS = {space.fingerprint: clustered(space) for space in (OLD, NEW)}
QUERIES = {space.fingerprint: clustered(space, 60, seed=5) for space in (OLD, NEW)}
QUERY = QUERIES[OLD.fingerprint]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "gallery"
    with Gallery.create(path, OLD) as gallery:
        metadata = [{"year": 2000 + i % 3} for i in range(COUNT)]
        gallery.add(NAMES, VECTORS[OLD.fingerprint], metadata=metadata)
        gallery.set_index("ivf")
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    """A gallery of 5,000 items with an ``ivf`` index, closed."""
    shutil.copytree(template, tmp_path / "gallery")
    return tmp_path / "gallery"


@pytest.fixture
def gallery(path: Path) -> Iterator[Gallery]:
    with Gallery.open(path) as gallery:
        yield gallery


def file_of(path: Path) -> Path:
    (file,) = (path / "idx").glob("*.faiss")
    return file


def exact(vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> np.ndarray:
    """Row numbers of the k nearest, by the definition."""
    return np.argsort(1 - queries.astype(np.float64) @ vectors.T.astype(np.float64), axis=1, kind="stable")[:, :k]


def recall(found: list[list[str]], truth: np.ndarray, names: list[str] = NAMES) -> float:
    return float(
        np.mean([len({names[i] for i in row} & set(hits)) / len(row) for hits, row in zip(found, truth, strict=True)])
    )


def held(gallery: Gallery) -> np.ndarray:
    """Numbers of the items that the index of the serving space holds in memory."""
    snapshot = gallery.snapshot()
    searcher = snapshot.searcher(snapshot.new)
    assert isinstance(searcher, CoveredPart)
    return searcher.live.index.ids


def _names(gallery: Gallery) -> list[str]:
    names = [""] * gallery.snapshot().num_limit
    for item in gallery.items():
        names[item.num] = item.id
    return names


def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every search of a FAISS index."""
    calls: list[int] = []
    search = FaissIndex.candidates
    monkeypatch.setattr(
        FaissIndex, "candidates", lambda self, q, count: (calls.append(count), search(self, q, count))[1]
    )
    return calls


# ------------------------------------------------------------------------------------------------------ searching


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_reaches_its_target_and_reports_exact_distances(
    gallery: Gallery, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = gallery.set_index(kind, target_recall=0.9)
    assert entry.kind == kind and entry.items == COUNT and entry.recall is not None and entry.recall >= 0.9
    calls = used(monkeypatch)
    found = gallery.search(QUERY, 10)
    assert calls
    assert recall(found.ids, exact(VECTORS[OLD.fingerprint], QUERY)) >= 0.9
    rows = VECTORS[OLD.fingerprint].astype(np.float64)[found.nums]
    true = 1 - np.einsum("qkd,qd->qk", rows, QUERY.astype(np.float64) / np.linalg.norm(QUERY, axis=1)[:, None])
    np.testing.assert_allclose(found.distances, true, atol=1e-6)
    assert (np.diff(found.distances, axis=1) >= 0).all()


def test_the_distances_of_an_index_are_bit_for_bit_those_of_the_exact_search(gallery: Gallery) -> None:
    found = gallery.search(QUERY, 10)
    gallery.set_index("exact")
    everything = gallery.search(QUERY, COUNT)
    by_number = np.take_along_axis(everything.distances, np.argsort(everything.nums, axis=1), axis=1)
    np.testing.assert_array_equal(found.distances, np.take_along_axis(by_number, found.nums, axis=1))


def test_a_gallery_is_exact_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    with Gallery.create(tmp_path / "gallery", OLD) as gallery:
        gallery.add(NAMES, VECTORS[OLD.fingerprint])
        assert gallery.index() == {"kind": "exact", "config": {}, "files": []}
        np.testing.assert_array_equal(gallery.search(QUERY).nums, exact(VECTORS[OLD.fingerprint], QUERY))
    assert not calls and not (tmp_path / "gallery" / "idx").exists()


def test_items_that_come_after_the_index_are_found_at_once(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    fresh = [f"fresh-{i}" for i in range(len(QUERY))]
    gallery.add(fresh, QUERY)
    found = gallery.search(QUERY, 10)
    assert [row[0] for row in found.ids] == fresh and calls
    assert len({tuple(row) for row in found.ids}) == len(found.ids) and all(len(set(row)) == 10 for row in found.ids)


def test_deleted_and_replaced_items_are_never_found(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    nearest = sorted({name for row in gallery.search(QUERY[:20], 10).ids for name in row})
    gallery.delete(nearest[::2])
    gallery.add(nearest[1::2], -clustered(OLD, len(nearest[1::2])), replace=True)
    before = len(calls)
    found = gallery.search(QUERY[:20], 10)
    assert len(calls) > before
    assert not {name for row in found.ids for name in row} & set(nearest)
    assert all(len(row) == 10 for row in found.ids)


def test_where_some_are_gone_so_many_more_are_fetched_that_enough_remain(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.set_index("hnsw")  # nothing can be taken out of a graph
    gallery.delete(NAMES[::4])
    gallery.search(QUERY)
    calls = used(monkeypatch)
    search = Part.search
    by_itself: list[int] = []
    monkeypatch.setattr(Part, "search", lambda self, q, *a: (by_itself.append(len(q)), search(self, q, *a))[1])
    found = gallery.search(QUERY, 30)
    assert calls and calls[0] >= 30 * 4 / 3 and sum(by_itself) <= 0.05 * len(QUERY)
    kept = np.flatnonzero(np.arange(COUNT) % 4 > 0)
    assert recall(found.ids, kept[exact(VECTORS[OLD.fingerprint][kept], QUERY, 30)]) >= 0.9


def test_a_list_is_never_shorter_than_an_exact_one(gallery: Gallery) -> None:
    assert [len(row) for row in gallery.search(QUERY[:2], 4000).ids] == [4000, 4000]
    gallery.add(["fresh-1", "fresh-2"], QUERY[:2])
    for row in gallery.search(QUERY[:2], COUNT + 5).ids:
        assert sorted(row) == ["fresh-1", "fresh-2", *NAMES]


def test_equal_distances_come_in_the_order_of_adding(gallery: Gallery) -> None:
    gallery.add(["copy-b", "copy-a"], np.repeat(VECTORS[OLD.fingerprint][7:8], 2, axis=0))
    assert gallery.search(VECTORS[OLD.fingerprint][7], 3).ids[0] == ["item-0007", "copy-b", "copy-a"]


def test_a_filter_is_answered_exactly(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = used(monkeypatch)
    found = gallery.search(QUERY, 10, where={"year": 2001})
    np.testing.assert_array_equal(found.nums, exact(VECTORS[OLD.fingerprint][1::3], QUERY) * 3 + 1)
    assert not calls


def test_a_graph_of_which_almost_all_is_gone_is_not_used(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery.set_index("hnsw")
    gallery.delete(NAMES[:4200])
    calls = used(monkeypatch)
    found = gallery.search(QUERY, 10)
    np.testing.assert_array_equal(found.nums, exact(VECTORS[OLD.fingerprint][4200:], QUERY) + 4200)
    assert not calls
    gallery.build_index()
    gallery.search(QUERY, 10)
    assert calls and gallery.index()["files"][0]["items"] == 800


def test_inverted_lists_give_up_what_is_gone(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, before = gallery.snapshot(), gallery.search(QUERY, 10)
    gallery.delete(NAMES[:4200])
    calls = used(monkeypatch)
    found = gallery.search(QUERY, 10)
    assert calls and len(held(gallery)) == 800
    assert recall(found.ids, exact(VECTORS[OLD.fingerprint][4200:], QUERY) + 4200) >= 0.9
    # Who still looks at the earlier snapshot finds what is in it, and takes nothing back into the index.
    again = gallery.search(QUERY, 10, snapshot=snapshot)
    assert recall(again.ids, before.nums) >= 0.9 and len(held(gallery)) == 800


def test_what_was_added_is_taken_in_by_searches_and_not_before(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = clustered(OLD, 12_000, seed=9)
    gallery.add([f"more-{i}" for i in range(1000)], more[:1000])
    gallery.search(QUERY)
    assert len(held(gallery)) == COUNT
    snapshot = gallery.snapshot()
    gallery.add([f"more-{i}" for i in range(1000, 12_000)], more[1000:])
    sizes = []
    for _ in range(4):
        found = gallery.search(QUERY, 10)
        sizes.append(len(held(gallery)))
        everything = np.vstack([VECTORS[OLD.fingerprint], more])
        assert recall(found.ids, exact(everything, QUERY), NAMES + [f"more-{i}" for i in range(12_000)]) >= 0.9
        assert all(len(set(row)) == 10 for row in found.ids)
    assert sizes == [COUNT + 8192, COUNT + 12_000, COUNT + 12_000, COUNT + 12_000]
    for row in gallery.search(QUERY, 10, snapshot=snapshot).nums:
        assert row.max() < COUNT + 1000 and len(set(row)) == 10


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_searches_in_many_threads_stay_right_while_the_gallery_changes(gallery: Gallery, kind: str) -> None:
    gallery.set_index(kind)
    wrong: list[str] = []
    stop = threading.Event()

    def search() -> None:
        while not stop.is_set():
            snapshot = gallery.snapshot()
            nums = gallery.search(QUERY[:4], 10, snapshot=snapshot).nums
            inside = snapshot.new.contains(nums.ravel())
            if not inside.all() or any(len(set(row)) != 10 for row in nums.tolist()):
                wrong.append(str(nums))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(6):
        gallery.add([f"turn-{turn}-{i}" for i in range(1500)], clustered(OLD, 1500, seed=10 + turn))
        gallery.delete(NAMES[400 * turn : 400 * (turn + 1)])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_takes_new_items_in_by_a_thread_of_its_own_and_searches_go_on(gallery: Gallery) -> None:
    gallery.set_index("hnsw")
    new = clustered(OLD, 3000, seed=77)
    gallery.add([f"new-{i}" for i in range(3000)], new)
    assert [row[0] for row in gallery.search(new[:20], 10).ids] == [f"new-{i}" for i in range(20)]
    (thread,) = (thread for thread in threading.enumerate() if thread.name == LINKING)
    while thread.is_alive():
        assert [row[0] for row in gallery.search(new[-5:], 10).ids] == [f"new-{i}" for i in range(2995, 3000)]
    gallery.search(QUERY, 10)
    live = gallery.snapshot().new  # every item is in the index now: none is searched exactly
    scanned: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        search = Part.search
        patch.setattr(Part, "search", lambda self, *a, **k: (scanned.append(self.count), search(self, *a, **k))[1])
        found = gallery.search(new[:50], 10)
    assert not scanned and live.count == COUNT + 3000
    names = [*NAMES, *(f"new-{i}" for i in range(3000))]
    assert recall(found.ids, exact(np.vstack([VECTORS[OLD.fingerprint], new]), new[:50]), names) >= 0.8


# ------------------------------------------------------------------------------------------------- kept up to date


def test_tending_writes_what_a_quarter_has_changed_and_keeps_its_training(gallery: Gallery, path: Path) -> None:
    (before,) = gallery.index()["files"]
    assert gallery.tend_index(share=1) == []
    gallery.add([f"few-{i}" for i in range(1000)], clustered(OLD, 1000, seed=9))
    assert gallery.tend_index(share=1) == []
    gallery.add([f"more-{i}" for i in range(1000)], clustered(OLD, 1000, seed=10))
    gallery.delete(NAMES[:100])
    (entry,) = gallery.tend_index(share=1)
    assert entry.items == COUNT + 1900 and entry.file != before["file"] and file_of(path).name == entry.file
    assert entry.recall is not None and entry.recall >= 0.95
    assert entry.training in before["file"] and gallery.tend_index(share=1) == []
    with Gallery.open(path) as other:
        everything = np.vstack([VECTORS[OLD.fingerprint], clustered(OLD, 1000, seed=9), clustered(OLD, 1000, seed=10)])
        found = other.search(QUERY, 10)
        assert recall(found.ids, exact(everything[100:], QUERY) + 100, _names(other)) >= 0.9
        assert len(held(other)) == COUNT + 1900 and other.verify().notes == []


def test_an_index_that_has_outgrown_its_training_is_built_anew(gallery: Gallery) -> None:
    (before,) = gallery.index()["files"]
    gallery.add([f"more-{i}" for i in range(4 * COUNT)], clustered(OLD, 4 * COUNT, seed=9))
    (entry,) = gallery.tend_index(share=1)
    assert entry.items == 5 * COUNT and entry.training not in before["file"]


def test_tending_takes_no_more_than_its_share_of_the_time(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("bowerbird.gallery.ann.time.monotonic", lambda: clock[0])
    write = FaissIndex.save
    monkeypatch.setattr(FaissIndex, "save", lambda self, to: (clock.append(clock.pop() + 2), write(self, to))[1])
    for turn, (now, share, writes) in enumerate([(100.0, 0.1, 1), (119.9, 0.1, 0), (120.0, 0.1, 1), (121.0, 1, 1)]):
        clock[0] = now
        gallery.add([f"turn-{turn}-{i}" for i in range(6000)], clustered(OLD, 6000, seed=20 + turn))
        assert len(gallery.tend_index(share=share)) == writes


def test_an_exact_gallery_and_a_small_one_are_left_alone(gallery: Gallery, tmp_path: Path) -> None:
    gallery.set_index("exact")
    assert gallery.tend_index(share=1) == [] and gallery.index()["files"] == []
    with Gallery.create(tmp_path / "small", OLD) as small:
        small.set_index("ivf")
        small.add(NAMES[:4000], VECTORS[OLD.fingerprint][:4000])
        assert small.tend_index(share=1) == []
        small.add(NAMES[4000:], VECTORS[OLD.fingerprint][4000:])
        assert [entry.items for entry in small.tend_index(share=1)] == [COUNT]
    for share in (0, 1.5):
        with pytest.raises(InputError, match="share"):
            gallery.tend_index(share=share)


def test_an_upgrade_that_is_tended_searches_no_large_part_exactly(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.set_index("ivf", nlist=128)
    begin(gallery)
    scanned: list[int] = []
    search = Part.search
    monkeypatch.setattr(Part, "search", lambda self, *a: (scanned.append(self.count), search(self, *a))[1])
    for _ in range(10):
        migrate(gallery, 500)
        gallery.tend_index(share=1)
        gallery.search(QUERIES, 10)
        gallery.search(QUERIES, 10)
    # The new part is searched exactly until it has 4,096 items; then, and in the old part all along, only fresh rows.
    assert max(scanned) <= 4000 and gallery.snapshot().old.count == 0
    assert {entry["space"] for entry in gallery.index()["files"]} >= {NEW.fingerprint}


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_small_galleries_can_be_indexed_too(tmp_path: Path, kind: str, count: int) -> None:
    with Gallery.create(tmp_path / "gallery", OLD, dtype="float16") as gallery:
        assert gallery.set_index(kind) == []  # nothing to index, and remembered
        assert len(gallery.search(QUERY, 10).ids[0]) == 0
        gallery.add(NAMES[:count], VECTORS[OLD.fingerprint][:count])
        assert [entry.items for entry in gallery.build_index()] == [count]
        truth = exact(VECTORS[OLD.fingerprint][:count].astype(np.float16), QUERY)
        assert recall(gallery.search(QUERY, 10).ids, truth) >= 0.9
        assert gallery.verify().ok


# ------------------------------------------------------------------------------------------------------- upgrades


def migrate(gallery: Gallery, items: int) -> None:
    while items > 0:
        task = gallery.store.lease_task("tests")
        assert task is not None
        gallery.store.commit_task(task, task.nums, VECTORS[NEW.fingerprint][task.nums])
        items -= len(task.items)


def begin(gallery: Gallery) -> None:
    order = np.random.default_rng(0).permutation(COUNT)
    gallery.store.begin_upgrade(NEW, strategy="tests", order_name="core:random", order=order, task_items=500)


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.8])
def test_a_half_migrated_gallery_finds_every_item_on_its_own_side_only(
    gallery: Gallery, share: float, rebuilt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(gallery)
    migrate(gallery, int(share * COUNT))
    if rebuilt:
        gallery.build_index()
    calls = used(monkeypatch)
    found = gallery.search(QUERIES, 10)
    assert len(calls) == (rebuilt and share > 0) + 1  # indexes that were searched
    snapshot = gallery.snapshot()
    old, new = set(snapshot.old.nums.tolist()), set(snapshot.new.nums.tolist())
    assert not old & new and len(old | new) == COUNT and len(new) == share * COUNT
    assert all(len(set(row)) == 10 for row in found.ids)
    for nums, sides in zip(found.nums.tolist(), found.sides.tolist(), strict=True):
        assert all(num in (new if side else old) for num, side in zip(nums, sides, strict=True))
    distances = np.empty((len(QUERY), COUNT))
    for space, side in ((OLD, old), (NEW, new)):
        chosen = sorted(side)
        query = QUERIES[space.fingerprint].astype(np.float64)
        distances[:, chosen] = 1 - query @ VECTORS[space.fingerprint][chosen].T.astype(np.float64)
    assert recall(found.ids, np.argsort(distances, axis=1)[:, :10]) >= 0.9


def test_with_nothing_migrated_an_upgrade_changes_no_result_and_needs_no_new_index(gallery: Gallery) -> None:
    before, built = gallery.search(QUERY, 10), gallery.index()["files"]
    begin(gallery)
    after = gallery.search(QUERIES, 10)
    np.testing.assert_array_equal(after.nums, before.nums)
    np.testing.assert_array_equal(after.distances, before.distances)
    assert gallery.index()["files"] == built


def test_finish_and_rollback_remove_the_index_of_the_space_that_they_drop(path: Path) -> None:
    with Gallery.open(path) as gallery:
        begin(gallery)
        migrate(gallery, 2500)
        gallery.build_index()
        assert {file["space"] for file in gallery.index()["files"]} == {OLD.fingerprint, NEW.fingerprint}
        gallery.store.rollback()
        assert [file["space"] for file in gallery.index()["files"]] == [OLD.fingerprint]
        file_of(path)
        begin(gallery)
        migrate(gallery, COUNT)
        gallery.build_index()
        gallery.store.finish_upgrade(verified=True)
        assert [file["space"] for file in gallery.index()["files"]] == [NEW.fingerprint]
        file_of(path)
        truth = exact(VECTORS[NEW.fingerprint], QUERIES[NEW.fingerprint])
        assert recall(gallery.search(QUERIES[NEW.fingerprint], 10).ids, truth) >= 0.9
        assert gallery.verify().notes == []


def test_compacting_keeps_the_index_and_what_it_finds(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery.delete(NAMES[::10])
    before, built = gallery.search(QUERY, 10), gallery.index()
    gallery.compact()
    calls = used(monkeypatch)
    after = gallery.search(QUERY, 10)
    np.testing.assert_array_equal(after.nums, before.nums)
    np.testing.assert_array_equal(after.distances, before.distances)
    assert gallery.index() == built and calls


# ---------------------------------------------------------------------------------------------------------- files


def test_a_reopened_gallery_reads_the_saved_index_and_builds_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gallery.open(path) as gallery:
        before = gallery.search(QUERY, 10)
    written = file_of(path).stat().st_mtime_ns
    monkeypatch.setattr(FaissIndex, "add", lambda *a: pytest.fail("the index was built again"))
    monkeypatch.setattr(FaissIndex, "_choose_effort", lambda self: pytest.fail("the effort was measured again"))
    calls = used(monkeypatch)
    with Gallery.open(path, readonly=True) as gallery:
        after = gallery.search(QUERY, 10)
    np.testing.assert_array_equal(after.nums, before.nums)
    assert calls and file_of(path).stat().st_mtime_ns == written


def test_without_its_files_a_gallery_is_exact_and_says_so_when_verified(path: Path) -> None:
    shutil.rmtree(path / "idx")
    with Gallery.open(path) as gallery:
        np.testing.assert_array_equal(gallery.search(QUERY).nums, exact(VECTORS[OLD.fingerprint], QUERY))
        report = gallery.verify()
        assert report.ok and ".faiss cannot be read" in report.notes[0]
        gallery.build_index()
        assert gallery.verify().notes == []


@pytest.mark.parametrize("where", [20, 3000, 5000, 0.5, -1, "truncated", "swapped"])
def test_a_damaged_index_is_named_and_not_used(path: Path, where: float | str) -> None:
    file = file_of(path)
    data = bytearray(file.read_bytes())
    if where == "truncated":
        del data[len(data) // 2 :]
    elif where == "swapped":  # whole, and of another gallery
        with Gallery.create(path.parent / "other", OLD) as other:
            other.add(NAMES, -VECTORS[OLD.fingerprint])
            other.set_index("ivf")
        data = bytearray(file_of(path.parent / "other").read_bytes())
    else:
        assert not isinstance(where, str)
        data[int(where * len(data)) if isinstance(where, float) else where] ^= 4
    file.write_bytes(data)
    with Gallery.open(path) as gallery:
        with pytest.warns(IndexUnusableWarning, match=f"{file.name} is damaged.*gallery index"):
            found = gallery.search(QUERY)
        np.testing.assert_array_equal(found.nums, exact(VECTORS[OLD.fingerprint], QUERY))
        gallery.add(["more"], QUERY[:1])
        gallery.search(QUERY)  # warned once
        report = gallery.verify()
        assert report.ok and f"{file.name} is damaged" in report.notes[0]
        gallery.build_index()
        assert gallery.verify().notes == [] and file_of(path) != file


KILLED = """
import os, sys
from pathlib import Path
from bowerbird.gallery import Gallery

die = lambda *a: os._exit(9)  # as kill -9: nothing is cleaned up
with Gallery.open(sys.argv[1]) as gallery:
    if sys.argv[2] == "rename":
        Path.replace = die
    else:
        gallery.storage.catalog.writing = die
    gallery.set_index("hnsw")
"""


@pytest.mark.parametrize("call", ["rename", "commit"])
def test_a_kill_before_the_commit_leaves_the_earlier_index(
    path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, path, call], check=False).returncode == 9
    left = sorted(file.name for file in (path / "idx").iterdir() if file.suffix in (".tmp", ".faiss"))
    assert len(left) == 2
    calls = used(monkeypatch)
    with Gallery.open(path) as gallery:
        assert gallery.index()["kind"] == "ivf"
        assert recall(gallery.search(QUERY).ids, exact(VECTORS[OLD.fingerprint], QUERY)) >= 0.9 and calls
        report = gallery.verify()
        assert report.ok and "belongs to no index" in report.notes[0]
        gallery.compact()
        assert gallery.verify().notes == [] and file_of(path).name in left


def test_other_processes_and_older_snapshots_see_their_own_index(path: Path) -> None:
    with Gallery.open(path) as builder, Gallery.open(path, readonly=True) as reader:
        snapshot, before = reader.snapshot(), reader.search(QUERY)
        builder.add(["more"], QUERY[:1])
        builder.set_index("hnsw")
        assert [file["kind"] for file in reader.index()["files"]] == ["hnsw"]
        assert reader.search(QUERY).ids[0][0] == "more"
        np.testing.assert_array_equal(reader.search(QUERY, snapshot=snapshot).nums, before.nums)
        builder.set_index("exact")
        assert list((path / "idx").glob("*.faiss")) == []
        np.testing.assert_array_equal(reader.search(QUERY, 5).nums[1:], exact(VECTORS[OLD.fingerprint], QUERY[1:], 5))


def test_one_process_builds_at_a_time(path: Path) -> None:
    with Gallery.open(path) as first, Gallery.open(path) as second:
        refused = []

        def build_too(_: str) -> None:
            with pytest.raises(GalleryLockedError, match="being built already"):
                second.build_index()
            second.compact()  # collects what nobody needs, and leaves what is being built
            refused.append(True)

        first.set_index("ivf", progress=build_too)
        assert refused and first.verify().notes == []


# --------------------------------------------------------------------------------------------------------- refusals


def test_what_is_not_known_is_refused_and_nothing_changes(gallery: Gallery, path: Path) -> None:
    before = gallery.index()
    with pytest.raises(InputError, match=r"'ivff'; accepted: exact, ivf, hnsw\. Did you mean 'ivf'\?"):
        gallery.set_index("ivff")
    with pytest.raises(InputError, match="target_recal"):
        gallery.set_index("ivf", target_recal=0.9)
    with pytest.raises(InputError, match="target_recall"):
        gallery.set_index("ivf", target_recall=1.5)
    with pytest.raises(InputError, match="no index settings"):
        gallery.set_index("exact", nlist=3)
    with pytest.raises(InputError, match="nlist 9999"):
        gallery.set_index("ivf", nlist=9999)
    with Gallery.open(path, readonly=True) as reader, pytest.raises(GalleryError, match="readonly"):
        reader.set_index("ivf")
    assert gallery.index() == before


def test_without_faiss_building_is_refused_and_searches_are_exact_with_one_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingExtraError("pip install 'bowerbird-core[faiss-cpu]'")

    monkeypatch.setattr("bowerbird.retrieval.faiss_index.load_faiss", missing)
    monkeypatch.setattr("bowerbird.gallery.part.load_faiss", missing)
    with Gallery.open(path) as gallery:
        with pytest.warns(IndexUnusableWarning, match="faiss-cpu"):
            found = gallery.search(QUERY)
        np.testing.assert_array_equal(found.nums, exact(VECTORS[OLD.fingerprint], QUERY))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gallery.search(QUERY)
        monkeypatch.setitem(sys.modules, "faiss", None)
        before = gallery.index()
        with pytest.raises(MissingExtraError, match="faiss-cpu"):
            gallery.set_index("hnsw")
        assert gallery.index() == before


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_builds_reports_and_returns_to_exact(path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["gallery", "index", str(path), *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    text = run("--kind", "hnsw", "--target-recall", 0.9)
    assert f"hnsw of {COUNT} items" in text and "recall@10 0.9" in text and str(file_of(path)) in text
    found = json.loads(run("--json"))
    assert (found["kind"], found["config"], found["items"]) == ("hnsw", {"target_recall": 0.9}, COUNT)
    (file,) = found["files"]
    assert file["recall"] >= 0.9 and file["path"] == str(file_of(path)) and file["items"] == COUNT
    assert run("--kind", "exact").strip() == f"searches of {path} are exact"
    assert "exact" in run()
