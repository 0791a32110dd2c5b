"""Damage, full disks, other writers, foreign folders: named, refused or survived, never half-written."""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from gallery_world import NEW, OLD, encode, queries, vectors

from bowerbird.errors import CorruptionError, GalleryError, GalleryLockedError, UpgradeError
from bowerbird.gallery import Gallery
from bowerbird.gallery.catalog import FORMAT, file_system_type, refuse_network_file_system
from bowerbird.gallery.snapshot import CorruptionWarning

NAMES = [f"item-{i:04d}" for i in range(120)]
QUERIES = queries()[OLD.fingerprint]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A gallery of three batches of 40 items, closed."""
    with Gallery.create(tmp_path / "gallery", OLD) as gallery:
        for start in (0, 40, 80):
            gallery.add(NAMES[start : start + 40], vectors(NAMES[start : start + 40], OLD))
    return tmp_path / "gallery"


def only(path: Path, suffix: str) -> Path:
    (file,) = (path / "seg").glob(f"*{suffix}")
    return file


# ------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("suffix", [".f32", ".ids"])
def test_a_flipped_bit_is_named_by_verify_and_the_rest_stays_readable(path: Path, suffix: str) -> None:
    file = only(path, suffix)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10  # in the second batch
    file.write_bytes(data)
    with Gallery.open(path) as gallery:
        report = gallery.verify()
        assert not report.ok and report.damaged_ids == NAMES[40:80]
        assert any(f"rows 40 to 79 of segment {file.name}" in problem.message for problem in report.problems)
        with pytest.warns(CorruptionWarning, match="rows 40 to 79"):
            found = gallery.search(QUERIES, 120)
        assert sorted(found.ids[0]) == NAMES[:40] + NAMES[80:]
        with pytest.raises(CorruptionError, match=r"40 items have no readable vector \(rows 40 to 79"):
            gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random")
        gallery.add(NAMES[40:80], vectors(NAMES[40:80], OLD), replace=True)  # the repair
        with pytest.warns(CorruptionWarning):
            assert sorted(gallery.search(QUERIES, 120).ids[0]) == NAMES
        gallery.compact()
        assert gallery.verify().ok


@pytest.mark.parametrize("suffix", [".f32", ".ids"])
def test_a_truncated_segment_is_found_at_open_and_named(path: Path, suffix: str) -> None:
    file = only(path, suffix)
    os.truncate(file, file.stat().st_size * 2 // 3 + 1)  # inside the third batch
    with Gallery.open(path) as gallery:
        assert f"{file} is truncated" in gallery.snapshot().problems[0]
        report = gallery.verify()
        assert [problem.kind for problem in report.problems] == ["truncated", "missing"]
        assert report.damaged_ids == NAMES[80:]
        with pytest.warns(CorruptionWarning, match="truncated"):
            assert sorted(gallery.search(QUERIES, 120).ids[0]) == NAMES[:80]
        gallery.add(["more"], vectors(["more"], OLD))  # goes to a segment of its own
        assert "more" in gallery


def test_a_missing_segment_is_named(path: Path) -> None:
    file = only(path, ".f32")
    file.unlink()
    with Gallery.open(path) as gallery:
        report = gallery.verify()
        assert f"{file} is truncated: the file is missing" in str(report) and len(report.damaged_ids) == 120


def test_a_damaged_catalogue_is_an_error_that_names_it(path: Path) -> None:
    (path / "catalog.db").write_bytes(b"this is no database" * 1000)
    for file in path.glob("catalog.db-*"):
        file.unlink()
    with pytest.raises(CorruptionError, match=r"catalog\.db"):
        Gallery.open(path)


def test_bytes_past_the_committed_tail_are_never_read(path: Path) -> None:
    for suffix in (".f32", ".ids"):
        with only(path, suffix).open("ab") as file:
            file.write(os.urandom(1000))
    with Gallery.open(path) as gallery:
        assert gallery.verify().ok
        gallery.add(["more"], vectors(["more"], OLD))
        assert gallery.verify().ok and len(gallery.search(QUERIES, 200).ids[0]) == 121


def test_files_that_a_killed_process_left_are_noted_and_removed_by_the_next_upgrade(path: Path) -> None:
    (path / "seg" / "0123456789ab.ids").write_bytes(b"left over")
    (path / "seg" / "0123456789ab.f32").write_bytes(b"left over")
    with Gallery.open(path) as gallery:
        report = gallery.verify()
        assert report.ok and any("0123456789ab.f32 belongs to no segment" in note for note in report.notes)
        gallery.compact()
        assert gallery.verify().notes == []


def test_a_damaged_plan_is_named_when_its_task_is_leased(path: Path) -> None:
    with Gallery.open(path) as gallery:
        gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random", task_items=50)
        (plan,) = (path / "plan").iterdir()
        data = bytearray(plan.read_bytes())
        data[3] ^= 1
        plan.write_bytes(data)
        with pytest.raises(UpgradeError, match=r"rows 0 to 49 of the plan .* are damaged"):
            gallery.store.lease_task("worker")
        assert [problem.kind for problem in gallery.verify().problems] == ["plan"]
        gallery.store.rollback()
        assert gallery.verify().ok


# ------------------------------------------------------------------------------------------------------ full disk


def test_a_full_disk_leaves_the_gallery_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    with Gallery.open(path) as gallery:
        before = gallery.search(QUERIES, 10)

        def full(descriptor: int, data, offset: int) -> int:
            if len(data) > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(GalleryError, match=r"disk of .* is full.*as it was"):
            gallery.add([f"more-{i}" for i in range(100)], np.ones((100, OLD.dim)))
        monkeypatch.undo()
        assert gallery.search(QUERIES, 10).ids == before.ids and len(gallery) == 120 and gallery.verify().ok
        gallery.add([f"more-{i}" for i in range(100)], np.ones((100, OLD.dim)))
        assert len(gallery) == 220 and gallery.verify().ok


def test_a_disk_that_fills_at_the_flush_or_in_sqlite_leaves_the_gallery_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gallery.open(path) as gallery:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", full)
            with pytest.raises(GalleryError, match="is full"):
                gallery.add(["more"], vectors(["more"], OLD))
        with gallery.storage.catalog.writing() as db:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to have a full disk
        with pytest.raises(GalleryError, match="is full"):
            names = [f"more-{i}" for i in range(5000)]
            gallery.add(names, np.ones((5000, OLD.dim)))
        db.execute("PRAGMA max_page_count = 1073741823")
        assert len(gallery) == 120 and gallery.verify().ok
        gallery.add(["more"], vectors(["more"], OLD))
        assert len(gallery) == 121 and gallery.verify().ok


def test_a_limit_on_file_size_is_reported_like_a_full_disk(path: Path) -> None:
    with Gallery.open(path) as gallery:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        names = [f"more-{i}" for i in range(20_000)]
        rows = np.ones((20_000, OLD.dim), np.float32)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        try:
            with pytest.raises(GalleryError, match="full or a limit was reached"):
                gallery.add(names, rows)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(gallery) == 120 and gallery.verify().ok
        gallery.add(names, rows)
        assert len(gallery) == 20_120 and gallery.verify().ok


def test_a_full_disk_while_an_upgrade_begins_leaves_no_upgrade(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gallery.open(path) as gallery:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(GalleryError, match="is full"):
                gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random")
        assert gallery.store.upgrade_state() is None and gallery.verify().ok
        gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random")


# -------------------------------------------------------------------------------------------------- other writers

HOLD = """
import sys, time
from bowerbird.gallery import Gallery
with Gallery.open(sys.argv[1]) as gallery, gallery.storage.catalog.exclusive("import the archive"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_with_the_owner_named_and_readers_go_on(path: Path) -> None:
    process = hold(path, 60)
    try:
        with Gallery.open(path, lock_timeout=0.1) as gallery:
            with pytest.raises(
                GalleryLockedError, match=rf"cannot add items.*process {process.pid} on .*import the archive"
            ):
                gallery.add(["more"], vectors(["more"], OLD))
            with pytest.raises(GalleryLockedError, match="cannot delete items"):
                gallery.delete(["item-0000"])
            assert len(gallery.search(QUERIES, 5).ids[0]) == 5
            process.kill()  # the kernel frees the lock of a dead owner
            process.wait()
            gallery.add(["more"], vectors(["more"], OLD))
            assert gallery.verify().ok
    finally:
        process.kill()
        process.communicate()


def test_a_second_writer_waits_for_the_first(path: Path) -> None:
    process = hold(path, 0.5)
    with Gallery.open(path, lock_timeout=30) as gallery:
        gallery.add(["more"], vectors(["more"], OLD))
        assert "more" in gallery
    process.communicate()


def test_two_open_galleries_write_in_turns_and_see_each_other(path: Path) -> None:
    with Gallery.open(path) as one, Gallery.open(path) as two:
        for i in range(5):
            one.add([f"one-{i}"], vectors([f"one-{i}"], OLD))
            two.add([f"two-{i}"], vectors([f"two-{i}"], OLD))
        assert len(one) == len(two) == 130 and one.verify().ok
        assert one.search(QUERIES, 130).ids == two.search(QUERIES, 130).ids


def test_a_reader_beside_writers_always_sees_a_whole_epoch(path: Path) -> None:
    """Items are added and deleted in groups of ten: a reader must never see a part of a group."""
    stop = threading.Event()
    failures: list[str] = []

    def read() -> None:
        with Gallery.open(path, readonly=True) as gallery:
            while not stop.is_set():
                found = gallery.search({s: q for s, q in queries().items() if s in gallery.snapshot().spaces}, 500)
                groups = [name.split("-")[0] for name in found.ids[0] if name.startswith("group")]
                if any(groups.count(group) != 10 for group in groups) or len(set(found.ids[0])) != len(found.ids[0]):
                    failures.append(f"epoch {found.epoch}: {groups}")

    reader = threading.Thread(target=read)
    reader.start()
    with Gallery.open(path) as gallery:
        for i in range(6):
            group = [f"group{i}-{j}" for j in range(10)]
            gallery.add(group, vectors(group, OLD))
            if i % 2:
                gallery.delete(group)
        gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random", task_items=25)
        while (task := gallery.store.lease_task("worker")) is not None:
            gallery.store.commit_task(task, task.nums, encode(task.items, NEW))
        time.sleep(0.05)
    stop.set()
    reader.join()
    assert failures == []


def test_an_open_snapshot_survives_the_removal_of_its_files(path: Path) -> None:
    with Gallery.open(path) as reader, Gallery.open(path) as writer:
        snapshot = reader.snapshot()
        before = reader.search(QUERIES, 10, snapshot=snapshot)
        writer.store.begin_upgrade(NEW, strategy="test", order_name="core:random")
        task = writer.store.lease_task("worker")
        writer.store.commit_task(task, task.nums, encode(task.items, NEW))
        writer.store.finish_upgrade(verified=True)
        assert not (path / "seg" / f"{snapshot.segments[0].info.sid}.f32").exists()
        assert reader.search(QUERIES, 10, snapshot=snapshot).ids == before.ids
        assert reader.counts() == {NEW.fingerprint: 120}


# ------------------------------------------------------------------------------------------------ foreign folders


def test_a_gallery_of_a_newer_format_is_refused(path: Path) -> None:
    db = sqlite3.connect(path / "catalog.db")
    db.execute(f"PRAGMA user_version = {FORMAT + 1}")
    db.close()
    with pytest.raises(GalleryError, match=rf"has format {FORMAT + 1}; this bowerbird reads formats up to {FORMAT}"):
        Gallery.open(path)


def test_folders_that_are_no_galleries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="there is no such folder"):
        Gallery.open(tmp_path / "nowhere")
    with pytest.raises(GalleryError, match="is not a gallery"):
        Gallery.open(tmp_path)
    sqlite3.connect(tmp_path / "catalog.db").close()
    with pytest.raises(GalleryError, match="is not a gallery"):
        Gallery.open(tmp_path)


def test_create_refuses_a_folder_with_something_in_it_and_takes_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    Gallery.create(tmp_path / "empty", OLD).close()
    with pytest.raises(GalleryError, match="something is there already"):
        Gallery.create(tmp_path / "empty", OLD)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty"]


def test_of_two_that_create_one_gallery_at_once_the_second_is_told_that_something_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        with Gallery.create(target, OLD) as first:
            first.add(["x"], vectors(["x"], OLD))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    with pytest.raises(GalleryError, match="something is there already"):
        Gallery.create(tmp_path / "g", NEW)
    assert [file.name for file in tmp_path.iterdir()] == ["g"]
    with Gallery.open(tmp_path / "g") as gallery:
        assert len(gallery) == 1


def test_network_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"/dev/vda / ext4 rw 0 0\nserver:/export {tmp_path}/share nfs4 rw 0 0\n"
    assert file_system_type(tmp_path / "share" / "gallery", mounts) == "nfs4"
    assert file_system_type(tmp_path / "share-not", mounts) == "ext4"
    monkeypatch.setattr("bowerbird.gallery.catalog.file_system_type", lambda path: "nfs4")
    with pytest.raises(GalleryError, match=r"network file system \(nfs4\).*local disk"):
        refuse_network_file_system(tmp_path)
    with pytest.raises(GalleryError, match="network file system"):
        Gallery.create(tmp_path / "g", OLD)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_gallery_imports_no_torch_and_no_faiss() -> None:
    code = (
        "import sys, bowerbird.gallery; print([m for m in ('torch', 'faiss', 'pydantic', 'timm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_healthy_gallery_warns_of_nothing(path: Path) -> None:
    with warnings.catch_warnings(), Gallery.open(path) as gallery:
        warnings.simplefilter("error")
        gallery.search(QUERIES)
