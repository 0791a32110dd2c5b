"""`gallery copy`: the copy gives the same lists, goes on after an interruption, and is verified."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gallery_world import NEW, OLD, queries, vectors

from bowerbird.cli import main
from bowerbird.errors import GalleryError
from bowerbird.gallery import Gallery, open_gallery
from bowerbird.gallery.copy import copy_gallery
from bowerbird.gallery.open import folder_of, safe_url
from bowerbird.gallery.transform import VectorTransform

NAMES = [f"item-{number}" for number in range(60)]


@pytest.fixture
def source(tmp_path: Path):
    with Gallery.create(tmp_path / "source", OLD, dtype="float16") as gallery:
        gallery.add(
            NAMES, vectors(NAMES, OLD), uris=[f"{n}.jpg" for n in NAMES], metadata=[{"n": i} for i in range(60)]
        )
        gallery.delete(["item-7"])
        gallery.add(["item-3"], vectors(["other"], OLD), content_hashes=["edited"], replace=True)
        gallery.register_space(NEW)
        made = VectorTransform.linear(NEW.fingerprint, OLD.fingerprint, np.eye(12, 20))
        gallery.register_transform(made, accept_unmeasured=True)
        yield gallery


def same(one: Gallery, other: Gallery) -> None:
    for given in (queries()[OLD.fingerprint], {NEW.fingerprint: queries()[NEW.fingerprint]}):
        first, second = one.search(given, 20), other.search(given, 20)
        assert first.ids == second.ids
        assert np.array_equal(first.distances, second.distances)


def test_a_copy_has_everything_and_finds_the_same(source: Gallery, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    copied = copy_gallery(source, f"file:{tmp_path / 'copy'}", progress=lambda what, count: told.append((what, count)))
    assert (copied.items, copied.added, copied.unchanged) == (59, 59, 0)
    assert sum(count for what, count in told if what == "copying") == 59
    assert sum(count for what, count in told if what == "verifying") == 2 * 59
    with open_gallery(tmp_path / "copy") as copy:
        same(source, copy)
        plain = [(item.id, item.uri, item.content_hash, dict(item.metadata)) for item in source.items()]
        assert [(item.id, item.uri, item.content_hash, dict(item.metadata)) for item in copy.items()] == plain
        assert copy.storage.dtype == "float16"
        assert copy.verify().ok


def test_a_copy_that_was_interrupted_goes_on_and_a_finished_one_is_brought_up_to_date(
    source: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bowerbird.gallery.copy.BATCH_ITEMS", 10)

    def interrupted(what: str, count: int) -> None:
        told.append(what)
        if len(told) == 3:
            raise KeyboardInterrupt

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        copy_gallery(source, str(tmp_path / "copy"), progress=interrupted)
    copied = copy_gallery(source, str(tmp_path / "copy"))
    assert (copied.added, copied.unchanged) == (29, 30)
    source.delete(["item-0"])
    source.add(["item-1", "fresh"], vectors(["changed", "fresh"], OLD), replace=True)
    again = copy_gallery(source, str(tmp_path / "copy"))
    assert (again.added, again.replaced, again.deleted, again.unchanged) == (1, 1, 1, 57)
    with open_gallery(tmp_path / "copy") as copy:
        same(source, copy)


def test_a_copy_that_was_changed_by_others_is_found_out_and_repaired(source: Gallery, tmp_path: Path) -> None:
    copied = copy_gallery(source, str(tmp_path / "copy"))
    with open_gallery(tmp_path / "copy") as copy:
        copy.add(["item-5"], vectors(["foreign"], OLD), replace=True)
        copy.add(["stranger"], vectors(["stranger"], OLD))
    again = copy_gallery(source, str(tmp_path / "copy"))
    assert (again.replaced, again.deleted, again.digest) == (1, 1, copied.digest)


def test_what_cannot_be_copied_is_refused_with_what_to_do(source: Gallery, tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "other", OLD) as other:
        other.add(["x"], vectors(["x"], OLD))
    with pytest.raises(GalleryError, match="no copy: choose another place"):
        copy_gallery(source, str(tmp_path / "other"))
    source.store.begin_upgrade(NEW, strategy="test", order_name="core:random")
    with pytest.raises(GalleryError, match="finish it or roll it back first"):
        copy_gallery(source, str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
    source.add(["late"], vectors(["late"], NEW), space=NEW.fingerprint)
    source.store.rollback(leave_pending=True)
    with pytest.raises(GalleryError, match=r"1 items of .* have no readable vector"):
        copy_gallery(source, str(tmp_path / "copy"))


def test_an_empty_gallery_of_the_same_kind_is_filled_also_one_that_a_killed_copy_left_behind(
    source: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("bowerbird.gallery.copy._mark", killed)  # the gallery is there, and the note of whose copy not
        copy_gallery(source, str(tmp_path / "copy"))
    assert copy_gallery(source, str(tmp_path / "copy")).added == 59
    Gallery.create(tmp_path / "float32", OLD).close()
    with pytest.raises(GalleryError, match="no copy: choose another place"):
        copy_gallery(source, str(tmp_path / "float32"))
    with Gallery.create(tmp_path / "used", OLD, dtype="float16") as used:
        used.add(["x"], vectors(["x"], OLD))
        used.delete(["x"])
    with pytest.raises(GalleryError, match="no copy: choose another place"):
        copy_gallery(source, str(tmp_path / "used"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:se/cret@db/x",
        "postgresql://me:se@cret@db/x",
        "postgresql://me:se?cret@db/x",
        "postgresql://me:se#cret@db/x",
        "qdrant+postgresql://me@db/x?qdrant=http://me:secret@q:6333&gallery=g",
        "qdrant+postgresql://me@db/x?qdrant=http%3A%2F%2Fme%3Asecret%40q&gallery=g",
        "POSTGRESQL://me:secret@db/x",
    ],
)
def test_no_piece_of_a_password_is_left_in_a_url_however_it_is_written(url: str) -> None:
    shown = safe_url(url)
    assert "se" not in shown.replace("postgresql", "") and "cret" not in shown
    assert folder_of(url) is None  # and it never names a folder


def test_the_command_copies_and_says_so(source: Gallery, tmp_path: Path) -> None:
    arguments = ["gallery", "copy", str(source.path), "--to", str(tmp_path / "copy")]
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["items"] == 59
    result = CliRunner().invoke(main, arguments)
    assert "unchanged 59" in result.output
    result = CliRunner().invoke(main, ["gallery", "copy", str(source.path), "--to", "postgrsql://me:secret@host/db"])
    assert result.exit_code == 2
    assert "its scheme is 'postgrsql'" in result.output
    assert "secret" not in result.output


def test_a_copy_makes_no_folder_around_itself(source: Gallery, tmp_path: Path) -> None:
    place = tmp_path / "backpus" / "copy"
    for url in (str(place), f"file:{place}"):
        result = CliRunner().invoke(main, ["gallery", "copy", str(source.path), "--to", url])
        assert result.exit_code == 2
        assert f"there is no folder {place.parent}" in result.stderr
    assert not place.parent.exists()


def test_a_lock_note_names_the_command_without_the_passwords_in_it(
    source: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["bowerbird", "gallery", "copy", "postgresql://me:secret@db/x?password=hidden", "--to", "g"]
    monkeypatch.setattr("sys.argv", command)
    source.delete(["item-9"])
    note = (Path(source.path) / "writer.lock").read_text()
    assert "postgresql://me:***@db/x?password=***" in note
    assert "secret" not in note and "hidden" not in note
