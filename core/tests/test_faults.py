"""Bad input and faults as a person meets them on the command line: one message, an exit code, nothing half-written.

What the library itself does about damage, full disks and other writers is in ``test_gallery_faults``.
"""

from __future__ import annotations

import json
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gallery_world import OLD, vectors
from PIL import Image
from test_data_images import bomb
from test_gallery_cli import ColourEncoder
from upgrade_world import FakeEncoder, make_gallery, new_encoder

from bowerbird.cli import main
from bowerbird.errors import GalleryError
from bowerbird.files import atomic_folder, new_rows, write_atomically
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.catalog import FORMAT
from bowerbird.registry import get_registry

NAMES = [f"item-{i}" for i in range(30)]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def items(path: Path) -> list[str]:
    with Gallery.open(path, readonly=True) as gallery:
        assert gallery.verify().ok
        return sorted(item.id for item in gallery.items())


# --------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gallery of a small encoder, and a folder with three pictures, a bomb, a torn picture and a text."""
    Gallery.create(tmp_path / "gallery", Space(ColourEncoder.fingerprint, ColourEncoder.name, 3)).close()
    monkeypatch.setattr("bowerbird.cli.gallery._encoder_of", lambda gallery, device: ColourEncoder())
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in {"a": (250, 10, 10), "b": (10, 250, 10), "c": (10, 10, 250)}.items():
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
    (folder / "bomb.png").write_bytes(bomb(100_000, 100_000))
    (folder / "text.jpg").write_text("no picture")
    (folder / "torn.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    return folder


def test_an_unreadable_image_is_named_with_the_way_out_and_nothing_is_added(photos: Path) -> None:
    gallery = photos.parent / "gallery"
    message = run("gallery", "add", gallery, "--folder", photos, code=2).stderr
    assert "bomb.png" in message and "64,000,000" in message and "--on-error skip" in message
    for name in ("text.jpg", "torn.png", "missing.png"):
        message = run("gallery", "add", gallery, photos / name, code=2).stderr
        assert name in message and "--on-error skip" in message
    assert items(gallery) == []


def test_unreadable_images_can_be_skipped_and_each_is_listed_with_its_reason(photos: Path) -> None:
    gallery = photos.parent / "gallery"
    done = run("gallery", "add", gallery, "--folder", photos, "--on-error", "skip")
    assert "added 3" in done.stdout
    assert sorted(line.split(":")[0] for line in done.stderr.splitlines()) == [
        "skipped bomb.png", "skipped text.jpg", "skipped torn.png",
    ]  # fmt: skip
    assert items(gallery) == ["a.png", "b.png", "c.png"]
    assert "bomb.png" in run("gallery", "search", gallery, "--image", photos / "bomb.png", code=2).stderr


def test_ctrl_c_while_images_are_added_keeps_what_was_written_and_the_same_call_goes_on(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(ColourEncoder):
        def encode_batches(self, images, **options):
            for position, _ in enumerate(images):
                if Path(images[position]).name == "c.png":
                    raise KeyboardInterrupt
            yield from super().encode_batches(images, **options)

    gallery, pictures = photos.parent / "gallery", [photos / f"{name}.png" for name in "abc"]
    monkeypatch.setattr("bowerbird.gallery.images.COMMIT_ITEMS", 2)
    with monkeypatch.context() as patch:
        patch.setattr("bowerbird.cli.gallery._encoder_of", lambda gallery, device: Interrupted())
        assert run("gallery", "add", gallery, *pictures, code=130).stderr == "stopped\n"
    assert len(items(gallery)) == 2
    assert "added 1, replaced 0, unchanged 2" in run("gallery", "add", gallery, *pictures).stdout


# -------------------------------------------------------------------------------------------------- ready vectors


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gallery for ready vectors, ``vectors.npy`` and ``ids.txt``; files are read in pieces of ten rows."""
    monkeypatch.setattr("bowerbird.cli.gallery.CALL_ITEMS", 10)
    run("gallery", "create", tmp_path / "gallery", "--dim", OLD.dim)
    np.save(tmp_path / "vectors.npy", vectors(NAMES, OLD))
    (tmp_path / "ids.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


def add(folder: Path, *arguments: object, code: int = 0) -> Result:
    files = ("--vectors", folder / "vectors.npy", "--ids", folder / "ids.txt")
    return run("gallery", "add", folder / "gallery", *files, *arguments, code=code)


@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN or infinity"), (np.inf, "NaN or infinity"), (0, "zero")])
def test_a_bad_vector_is_named_by_its_row_of_the_file_and_nothing_is_added(
    value: float, words: str, ready: Path
) -> None:
    rows = vectors(NAMES, OLD)
    rows[25] = value
    np.save(ready / "vectors.npy", rows)
    message = add(ready, code=2).stderr
    assert "vectors.npy: row 25" in message and words in message
    assert items(ready / "gallery") == []


def test_a_wrong_width_names_both(ready: Path) -> None:
    np.save(ready / "vectors.npy", np.ones((30, OLD.dim + 1), np.float32))
    assert f"have width {OLD.dim + 1}; the space has width {OLD.dim}" in add(ready, code=2).stderr


def test_an_id_that_is_there_or_twice_in_the_file_is_named_and_nothing_is_added(ready: Path) -> None:
    (ready / "ids.txt").write_text("\n".join([*NAMES[:-1], NAMES[0]]))
    assert "'item-0' is given twice" in add(ready, code=2).stderr
    assert items(ready / "gallery") == []
    (ready / "ids.txt").write_text("\n".join([f"other-{i}" for i in range(30)]))
    add(ready)
    (ready / "ids.txt").write_text("\n".join([*NAMES[:-1], "other-7"]))
    message = add(ready, code=2).stderr
    assert "1 of 30 ids are in the gallery already ('other-7')" in message and "--existing skip" in message
    assert not set(NAMES) & set(items(ready / "gallery"))


def test_files_that_are_no_array_are_named(ready: Path) -> None:
    np.savez(ready / "vectors.npz", a=np.ones(3), b=np.ones(3))
    (ready / "vectors.npz").rename(ready / "vectors.npy")
    assert "it is an archive" in add(ready, code=2).stderr
    for content in (b"PK\x03\x04torn", b"", b"\x93NUMPY\x01\x00torn", b"text"):
        (ready / "vectors.npy").write_bytes(content)
        assert "cannot be read as a .npy file" in add(ready, code=2).stderr


def test_metadata_of_a_spreadsheet_is_read_and_its_mistakes_are_named(ready: Path) -> None:
    table = ready / "meta.csv"
    table.write_text("\ufeffid,year\nitem-1,2024\n", encoding="utf-8")  # a byte order mark, as spreadsheets write it
    add(ready, "--metadata", table)
    assert json.loads(run("gallery", "info", ready / "gallery", "item-1", "--json").stdout)["metadata"] == {
        "year": 2024
    }
    table.write_text("id,year\nitem-1,2024,red\n")
    assert "row 1 ('item-1') has more columns" in add(ready, "--metadata", table, code=2).stderr
    message = add(ready, "--metadata", ready / "vectors.npy", code=2).stderr
    assert message == f"error: metadata {ready / 'vectors.npy'}: accepted are .csv and .jsonl\n"
    table.write_text("id,year\nitem-1,2024\nitem-1,2025\n")
    assert "row 2 has the id 'item-1' of an earlier row" in add(ready, "--metadata", table, code=2).stderr


def test_ids_may_hold_every_character_but_a_line_break(ready: Path) -> None:
    names = [f"caf\u00e9\u2028{i}\x85" for i in range(30)]
    (ready / "ids.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    add(ready)
    assert items(ready / "gallery") == sorted(names)


def test_an_unknown_item_is_named_with_a_close_one(ready: Path) -> None:
    add(ready)
    for command in (["info", ready / "gallery", "itm-7"], ["search", ready / "gallery", "--id", "itm-7"]):
        assert "has no item 'itm-7'. Did you mean 'item-" in run("gallery", *command, code=2).stderr
    assert "no item matches --where" in run(
        "gallery", "search", ready / "gallery", "--id", "item-7", "--where", "year=1900"
    ).stdout  # fmt: skip


# -------------------------------------------------------------------------------------------- formats, disks, Ctrl-C


def test_a_gallery_of_a_newer_format_is_refused_by_every_command(ready: Path) -> None:
    with sqlite3.connect(ready / "gallery" / "catalog.db") as db:
        db.execute(f"PRAGMA user_version = {FORMAT + 1}")
    db.close()
    path = ready / "gallery"
    for arguments in (
        ["gallery", "stats", path],
        ["gallery", "search", path, "--id", "x"],
        ["upgrade", "status", path],
    ):
        assert f"has format {FORMAT + 1}" in run(*arguments, code=2).stderr


def test_a_disk_that_is_full_while_a_gallery_is_created_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(db: sqlite3.Connection, space: Space, *, parent: str | None) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("bowerbird.gallery.storage.insert_space", full)
    with pytest.raises(GalleryError, match=r"cannot create a gallery at .*the disk is full"):
        Gallery.create(tmp_path / "gallery", OLD)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_the_disk_are_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            new_rows(tmp_path / "rows.npy", (1000, 100))
        with pytest.raises(OSError) as other:
            write_atomically(tmp_path / "text", b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "rows.npy") and other.value.filename == str(tmp_path / "text")
    assert list(tmp_path.iterdir()) == []
    rows = new_rows(tmp_path / "rows.npy", (1000, 100))
    assert rows.shape == (1000, 100) and not rows.any()
    assert (tmp_path / "rows.npy").stat().st_blocks * 512 >= 400_000, "the space is reserved"


def test_weights_that_do_not_fit_the_disk_are_an_error_of_the_system_and_leave_nothing(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    with pytest.raises(OSError, match="No space left") as caught, atomic_folder(tmp_path / "encoder") as folder:
        (folder / "half").write_text("written")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.filename == str(tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []


def test_a_gallery_that_sqlite_cannot_open_is_not_called_damaged(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(sqlite3.Connection):
        def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
            if "application_id" in statement:
                raise sqlite3.OperationalError("disk I/O error")  # no room for the shared memory of the WAL
            return super().execute(statement, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Full))
    message = run("gallery", "stats", ready / "gallery", code=2).stderr
    assert "cannot be opened: disk I/O error" in message and "room on the disk" in message


def test_a_warning_is_one_line_without_source_code(ready: Path) -> None:
    add(ready)
    (segment,) = (ready / "gallery" / "seg").glob("*.f32")
    segment.write_bytes(segment.read_bytes()[:-1])
    command = [sys.executable, "-m", "bowerbird", "gallery", "search", str(ready / "gallery"), "--id", "item-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "item-1" in done.stdout
    assert done.stderr.startswith("warning: damaged rows are left out") and done.stderr.count("\n") == 1


def test_ctrl_c_in_an_upgrade_gives_the_task_back_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(FakeEncoder):
        def encode(self, images, **options):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().encode(images, **options)

    get_registry().register_module("world", sys.modules["upgrade_world"])
    try:
        (tmp_path / "images").mkdir()
        make_gallery(tmp_path / "g", 100, images=tmp_path / "images").close()
        encoders = {"fake:new": Interrupted("new", 24, 1.0), "fake:old": FakeEncoder("old", 16, 2.0)}
        monkeypatch.setattr("bowerbird.cli.upgrade_parts.load", lambda ref, device: encoders[ref])
        begin = ("--to", "fake:new", "--strategy", "two-queries", "--task-items", 20)
        assert run("upgrade", "run", tmp_path / "g", *begin, code=130).stderr == "stopped\n"
        tasks = json.loads(run("upgrade", "status", tmp_path / "g", "--json").stdout)["tasks"]
        assert tasks == {"done": 2, "free": 3}
        encoders["fake:new"] = new_encoder()  # type: ignore[assignment]
        assert "moved 60 items" in run("upgrade", "run", tmp_path / "g").stdout
    finally:
        get_registry().unregister("world")
