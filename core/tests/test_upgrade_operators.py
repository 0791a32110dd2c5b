"""What an operator in a hurry does: limits out of range, two terminals at once, a file of another model."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_upgrade_vectors import COUNT, write
from upgrade_world import FakeEncoder, item_id, label_of, make_gallery, new_encoder, old_encoder

from bowerbird.cli import main
from bowerbird.errors import DataError, UpgradeError
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import begin
from bowerbird.upgrade.start import join
from bowerbird.upgrade.vectors_encoder import load_vectors_encoder, read_vectors

IDS = [item_id(n) for n in range(COUNT)]


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """A gallery ``g`` of ``old.npy``, and files of two more encoders, in the working directory."""
    monkeypatch.chdir(tmp_path)
    get_registry().register_module("world", sys.modules["upgrade_world"])
    for name, encoder in (("old", old_encoder()), ("new", new_encoder()), ("twin", FakeEncoder("twin", 16, 1.0))):
        write(tmp_path / f"{name}.npy", IDS, encoder.vectors(range(COUNT)), [label_of(n) for n in range(COUNT)])
        write(tmp_path / f"asked-{name}.npy", ["q-0", "q-1"], encoder.vectors([10_000, 10_001]), ["a", "b"])
    bowerbird("gallery", "create", "g", "--encoder", "vectors:old.npy")
    bowerbird("gallery", "add", "g", "--vectors", "old.npy")
    yield
    get_registry().unregister("world")


def bowerbird(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("max_nfr is 2.0", ["--max-nfr", 2]),
        ("max_nfr is nan", ["--max-nfr", "nan", "--workers", 2]),
        ("max_nfr is 2.0", ["--max-nfr", 2, "--workers", 2]),
        ("watch_every is 0.0", ["--watch-every", 0, "--workers", 2]),
        ("rate is 0.0", ["--rate", 0, "--workers", 2]),
        ("stop_at_share is 1.5", ["--stop-at-share", 1.5]),
    ],
)
def test_a_limit_out_of_range_is_refused_before_the_upgrade_begins(message, options):
    run = ("upgrade", "run", "g", "--to", "vectors:new.npy", "--strategy", "two-queries")
    assert message in bowerbird(*run, *options, code=2)
    assert "no upgrade is under way" in bowerbird("upgrade", "status", "g", code=2)


def test_a_limit_out_of_range_is_refused_before_a_lift_begins():
    said = bowerbird("upgrade", "lift", "g", "--to", "vectors:new.npy", "--stop-at-share", 2, code=2)
    assert "stop_at_share is 2.0" in said
    assert "no upgrade is under way" in bowerbird("upgrade", "status", "g", code=2)


def test_vectors_of_another_model_of_the_same_width_are_not_added_to_a_gallery_known_by_a_file():
    before = bowerbird("gallery", "search", "g", "--id", IDS[0])
    refused = bowerbird("gallery", "add", "g", "--vectors", "twin.npy", "--existing", "update", code=2)
    assert f"{COUNT} have other vectors there" in refused and "nothing was added" in refused
    assert bowerbird("gallery", "search", "g", "--id", IDS[0]) == before
    bowerbird("gallery", "add", "g", "--vectors", "old.npy", "--existing", "update")


def test_vectors_that_the_file_does_not_have_are_added_as_ever():
    np.save("more.npy", read_vectors("asked-old.npy").vectors)
    bowerbird("gallery", "add", "g", "--vectors", "more.npy", "--ids", "asked-old.ids.txt")
    with Gallery.open("g") as gallery:
        assert len(gallery) == COUNT + 2


@pytest.mark.parametrize("out", ["nowhere/plan.json", "plan.txt", "plan"])
def test_where_a_plan_cannot_be_saved_is_said_before_anything_is_encoded(out, monkeypatch):
    monkeypatch.setattr("bowerbird.upgrade.plan.plan", lambda *_, **__: pytest.fail("it was planned"))
    assert f"--out {out}" in bowerbird("upgrade", "plan", "g", "--to", "vectors:new.npy", "--out", out, code=2)


def test_a_picture_that_cannot_be_written_is_called_by_the_name_that_was_asked_for():
    pytest.importorskip("matplotlib")
    said = bowerbird("gallery", "matrix", "g", "--out", "nowhere/matrix.svg", code=2)
    assert "nowhere/matrix.svg" in said and "/.matrix.svg" not in said


def test_a_gain_to_stop_at_without_a_plan_says_how_to_make_one():
    said = bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", "--stop-at-gain", 0.9, code=2)
    assert "there is no such plan; `bowerbird upgrade plan" in said


def test_a_lift_amid_an_upgrade_is_refused_before_a_map_is_fitted(monkeypatch):
    monkeypatch.setattr("bowerbird.upgrade.fitting.fit_transform", lambda *_, **__: pytest.fail("it was fitted"))
    bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", "--strategy", "two-queries", "--stop-at-share", 0.5)
    assert "lift on top of it" in bowerbird("upgrade", "lift", "g", "--to", "vectors:twin.npy", code=2)


def test_an_encoder_that_the_gallery_names_by_a_path_of_another_folder_is_asked_for(tmp_path, monkeypatch):
    bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", "--strategy", "two-queries", "--stop-at-share", 0.5)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = bowerbird("upgrade", "run", "../g", code=2)
    assert "new.npy: there is no such file" in said and "--to ENCODER" in said
    assert "complete" in bowerbird("upgrade", "run", "../g", "--to", "vectors:../new.npy")


def test_sides_are_shown_only_while_there_are_two():
    assert "  new  " not in bowerbird("upgrade", "serve", "g", "--queries", "vectors:asked-old.npy")
    bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", "--strategy", "two-queries", "--stop-at-share", 0.5)
    assert "  new  " in bowerbird("upgrade", "serve", "g", "--queries", "vectors:asked-old.npy,asked-new.npy")


def test_a_rule_on_queries_without_labels_says_what_it_counts():
    said = bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", "--strategy", "two-queries",
                     "--watch-every", 0.5)  # fmt: skip
    assert "without labels" in said
    bowerbird("upgrade", "rollback", "g")
    said = bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", "--strategy", "two-queries",
                     "--label-key", "label", "--watch-every", 0.5)  # fmt: skip
    assert "without labels" not in said


def test_a_run_that_left_items_behind_does_not_send_the_operator_to_finish():
    write(Path("few.npy"), IDS[2:], read_vectors("new.npy").vectors[2:])
    said = bowerbird("upgrade", "run", "g", "--to", "vectors:few.npy", "--strategy", "two-queries")
    assert "--retry-failed" in said and "upgrade finish" not in said
    refused = bowerbird("upgrade", "finish", "g", code=2)
    assert f"it has ids such as '{IDS[2]}'. Repair them" in refused


def test_of_two_operators_who_begin_the_same_upgrade_at_once_one_begins_it_and_the_other_works_on_it(monkeypatch):
    """Both have seen that none is under way before either begins."""
    both = threading.Barrier(2, timeout=20)

    def at_once(gallery, encoder, **settings):
        both.wait()
        return begin(gallery, encoder, **settings)

    monkeypatch.setattr("bowerbird.upgrade.start.begin", at_once)
    states, errors = [], []

    def operator(strategy):
        with Gallery.open("g") as gallery:
            try:
                states.append(join(gallery, load_vectors_encoder("vectors:new.npy"), strategy=strategy))
            except UpgradeError as exc:
                errors.append(str(exc))

    def together(*strategies):
        threads = [threading.Thread(target=operator, args=(strategy,)) for strategy in strategies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together("two-queries", "two-queries")
    assert not errors and len({state.id for state in states}) == 1
    bowerbird("upgrade", "rollback", "g")
    together("two-queries", "core:full")
    assert len(errors) == 1 and "cannot replace it" in errors[0]


@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_vectors_beyond_single_precision_are_refused_by_file_and_id(tmp_path, factor):
    vectors = old_encoder().vectors(range(3))
    vectors[1] *= factor
    with pytest.raises(DataError, match=r"far\.npy: 1 vectors are too long or too short.*'b'"):
        read_vectors(write(tmp_path / "far.npy", "abc", vectors))


def test_ids_that_are_no_text_are_refused_by_file(tmp_path):
    write(tmp_path / "v.npy", "ab", old_encoder().vectors(range(2)))
    (tmp_path / "v.ids.txt").write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"v\.ids\.txt is no text in UTF-8: byte 0xff"):
        read_vectors(tmp_path / "v.npy")


def test_a_file_of_other_ids_is_refused_quickly(tmp_path):
    """Looking for a similar id among all, for each missing one, took minutes."""
    count = 4000
    write(tmp_path / "other.npy", [f"item-{n:06}-b" for n in range(count)], old_encoder().vectors(range(count)))
    make_gallery(tmp_path / "many", count).close()
    before = os.times().user
    said = bowerbird("upgrade", "plan", "many", "--to", "vectors:other.npy", "--label-key", "label", code=2)
    assert "it has ids such as 'item-000000-b'" in said
    assert os.times().user - before < 20
