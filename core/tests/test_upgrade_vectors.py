"""Encoders that are known by their vectors alone: the whole upgrade on the command line, and every way to be wrong."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from upgrade_world import FakeEncoder, item_id, label_of, make_gallery, new_encoder, old_encoder

from bowerbird.cli import main
from bowerbird.errors import DataError, InputError, SpaceError
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade.vectors_encoder import load_vectors_encoder, query_vectors, read_vectors

COUNT = 150


@pytest.fixture(autouse=True)
def world():
    get_registry().register_module("world", sys.modules["upgrade_world"])
    yield
    get_registry().unregister("world")


def write(path, ids, vectors, labels=None):
    if path.suffix == ".npy":
        np.save(path, vectors)
        path.with_suffix(".ids.txt").write_text("\n".join(ids) + "\n")
        if labels is not None:
            path.with_suffix(".labels.txt").write_text("\n".join(labels) + "\n")
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        header = {"ids": json.dumps(list(ids))} | ({} if labels is None else {"labels": json.dumps(list(labels))})
        save_file({"vectors": vectors}, path, header)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        columns = {"id": list(ids), "vector": vectors.tolist()} | ({} if labels is None else {"label": list(labels)})
        parquet.write_table(pyarrow.table(columns), path)
    return path


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, ["upgrade", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def files(tmp_path):
    make_gallery(tmp_path / "g", COUNT).close()
    items, asked = range(COUNT), range(10_000, 10_060)
    ids, labels = [item_id(n) for n in items], [label_of(n) for n in asked]
    write(tmp_path / "old.npy", ids, old_encoder().vectors(items))
    write(tmp_path / "new.safetensors", ids, new_encoder().vectors(items))
    names = [item_id(n) for n in asked]
    write(tmp_path / "asked-old.npy", names, old_encoder().vectors(asked), labels)
    write(tmp_path / "asked-new.npy", names[::-1], new_encoder().vectors(asked[::-1]))
    return tmp_path


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_every_format_gives_the_same_encoder(tmp_path, suffix):
    vectors = new_encoder().vectors(range(6))
    made = load_vectors_encoder(f"vectors:{write(tmp_path / f'v{suffix}', 'abcdef', vectors, 'xxyyzz')}")
    table = read_vectors(tmp_path / f"v{suffix}")
    assert list(table.ids) == list("abcdef") and list(table.labels) == list("xxyyzz")
    np.testing.assert_array_equal(made.images(["c", "a"]), vectors[[2, 0]])
    other = write(tmp_path / "shuffled.npy", "fedcba", vectors[::-1])
    assert load_vectors_encoder(f"vectors:{other}").space.fingerprint == made.space.fingerprint


def test_the_whole_upgrade_with_nothing_but_vectors(files):
    pytest.importorskip("matplotlib")  # of the page and the picture of the plan
    to, old = f"vectors:{files / 'new.safetensors'}", f"vectors:{files / 'old.npy'}"
    queries = f"vectors:{files / 'asked-old.npy'},{files / 'asked-new.npy'}"
    planned = json.loads(
        invoke("plan", files / "g", "--to", to, "--old", old, "--queries", queries, "--label-key", "label",
               "--strategy", "two-queries", "--out", files / "plan.json", "--out", files / "plan.html",
               "--out", files / "plan.svg", "--json").stdout
    )  # fmt: skip
    assert planned["recommendation"]["strategy"] == "world:two-queries"
    assert planned["old"]["canary"] == pytest.approx(1, abs=1e-4)
    assert "world:two-queries" in (files / "plan.html").read_text() and "<svg" in (files / "plan.svg").read_text()

    def first_results():
        found = json.loads(invoke("serve", files / "g", "--queries", queries, "--k", 3, "--json").stdout)
        return [[hit["id"] for hit in query["results"]] for query in found]

    with Gallery.open(files / "g", readonly=True) as gallery:
        before = gallery.search(old_encoder().vectors(range(10_000, 10_060)), 3).ids
    assert first_results() == before
    part = json.loads(
        invoke("run", files / "g", "--to", to, "--old", old, "--plan", files / "plan.json", "--task-items", 10,
               "--stop-at-gain", 0.5, "--json").stdout.splitlines()[-1]
    )  # fmt: skip
    curve = next(c for c in planned["curves"] if c["merger"] == planned["recommendation"]["merger"])
    level = planned["old_old"]["mean"]
    reached = np.interp(part["share"], curve["shares"], curve["quality"])
    assert 0.4 < (reached - level) / (curve["quality"][-1] - level) < 0.7
    assert part["reason"] == "stop-at-share"
    now = json.loads(invoke("status", files / "g", "--json").stdout)
    assert now["strategy"] == "world:two-queries" and 0 < now["share"] < 1
    first_results()
    assert "complete" in invoke("run", files / "g", "--to", to).stdout
    invoke("finish", files / "g")
    with Gallery.open(files / "g", readonly=True) as gallery:
        after = gallery.search(new_encoder().vectors(range(10_000, 10_060)), 3).ids
    assert first_results() == after


def test_rollback_of_items_that_came_meanwhile_takes_their_old_vectors_from_a_file(files):
    to = f"vectors:{files / 'new.safetensors'}"
    invoke("run", files / "g", "--to", to, "--strategy", "two-queries", "--task-items", 50, "--stop-after", 50)
    with Gallery.open(files / "g") as gallery:
        gallery.add([item_id(900)], new_encoder().vectors([900]), space=gallery.snapshot().write_space.fingerprint)
    ids = [*(item_id(n) for n in range(COUNT)), item_id(900)]
    write(files / "more.npy", ids, old_encoder().vectors([*range(COUNT), 900]))
    invoke("rollback", files / "g", "--old", f"vectors:{files / 'more.npy'}")
    with Gallery.open(files / "g") as gallery:
        np.testing.assert_allclose(gallery.vectors_of([item_id(900)]), old_encoder().vectors([900]), atol=1e-6)


def test_a_file_that_grew_goes_on_where_its_space_has_a_name_and_is_another_encoder_where_not(files):
    path = files / "new.safetensors"
    named, plain = f"vectors:{path}?space=clip-2", f"vectors:{path}"
    before = {ref: load_vectors_encoder(ref).space.fingerprint for ref in (named, plain)}
    invoke("run", files / "g", "--to", named, "--strategy", "two-queries", "--task-items", 50, "--stop-after", 50)
    everyone = [*range(COUNT), 900]
    write(path, [item_id(n) for n in everyone], new_encoder().vectors(everyone))
    assert load_vectors_encoder(named).space.fingerprint == before[named]
    assert load_vectors_encoder(plain).space.fingerprint != before[plain]
    assert "complete" in invoke("run", files / "g").stdout, "the space's name is enough to find the file again"
    write(path, [item_id(n) for n in everyone], np.roll(new_encoder().vectors(everyone), 1, axis=0))
    refused = invoke("finish", files / "g", code=2)
    assert "not the one that filled" in refused.stderr, "the canary sees foreign vectors under a known name"


def test_items_without_a_vector_are_failures_that_are_named(files):
    write(files / "few.npy", [item_id(n) for n in range(COUNT - 2)], new_encoder().vectors(range(COUNT - 2)))
    shown = invoke("run", files / "g", "--to", f"vectors:{files / 'few.npy'}", "--strategy", "two-queries")
    assert f"has no vector for 1 of 1 items; the first: '{item_id(COUNT - 2)}'" in shown.stderr


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a", "b", "a"], np.ones((3, 2)), "1 ids are given twice; the first: a"),
        (["a", "b"], np.ones((3, 2)), "2 ids for 3 vectors"),
        (["a", "b", "c"], np.array([[1, 1], [np.nan, 1], [0, 0]]), "2 vectors have NaN.*'b', 'c'"),
        (["a", "", "c"], np.ones((3, 2)), "row 1 has no id"),
        (["a"], np.ones(3), "shape"),
    ],
)
def test_bad_files_are_refused_with_the_first_offenders(tmp_path, ids, vectors, message):
    with pytest.raises(DataError, match=message):
        read_vectors(write(tmp_path / "bad.npy", ids, vectors))
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "bad.npy"))):
        read_vectors(tmp_path / "bad.npy")


def test_parquet_with_rows_of_different_widths_or_other_columns_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"id": ["a", "b"], "vector": [[1.0, 2.0], [1.0]]}), tmp_path / "odd.parquet")
    with pytest.raises(DataError, match="another width"):
        read_vectors(tmp_path / "odd.parquet")
    parquet.write_table(pyarrow.table({"key": ["a"], "vector": [[1.0]]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="it has key, vector"):
        read_vectors(tmp_path / "other.parquet")


def test_refs_and_queries_that_cannot_be_used_say_so(files):
    for ref, kind, message in (
        ("vectors:", InputError, "name a file"),
        (f"vectors:{files / 'new.safetensors'}?spice=x", InputError, "space=NAME"),
        (f"vectors:{files / 'nothing.npy'}", DataError, "no such file"),
        (f"vectors:{files / 'x.csv'}", InputError, "are read from"),
    ):
        with pytest.raises(kind, match=message):
            load_vectors_encoder(ref)
    np.save(files / "alone.npy", np.ones((2, 2)))
    with pytest.raises(DataError, match=r"alone\.ids\.txt"):
        read_vectors(files / "alone.npy")
    with pytest.raises(InputError, match="two files"):
        query_vectors(f"vectors:{files / 'asked-old.npy'}")
    with pytest.raises(DataError, match="lacks 60 queries"):
        query_vectors(f"vectors:{files / 'asked-old.npy'},{files / 'old.npy'}")
    with Gallery.open(files / "g", readonly=True) as gallery, pytest.raises(SpaceError, match="is not what made space"):
        load_vectors_encoder(f"vectors:{files / 'new.safetensors'}", space=gallery.spaces()[0])


def test_query_files_in_the_wrong_order_are_named_where_widths_or_stored_items_show_it(files):
    asked = f"vectors:{files / 'asked-new.npy'},{files / 'asked-old.npy'}"
    invoke("run", files / "g", "--to", f"vectors:{files / 'new.safetensors'}", "--strategy", "two-queries",
           "--stop-at-share", 0.5)  # fmt: skip
    said = re.sub(r"\s+", " ", invoke("serve", files / "g", "--queries", asked, code=2).stderr)
    assert "asked-new.npy has vectors of width 24" in said and "vectors:OLD_FILE,NEW_FILE" in said
    invoke("rollback", files / "g")

    # Of one width: nothing but the stored vectors of queries that are items tells them apart.
    twin = FakeEncoder("twin", 16, 1.0)
    items = [item_id(n) for n in range(COUNT)]
    write(files / "twin.npy", items, twin.vectors(range(COUNT)))
    invoke("run", files / "g", "--to", f"vectors:{files / 'twin.npy'}", "--strategy", "two-queries",
           "--stop-at-share", 0.5)  # fmt: skip
    right = f"vectors:{files / 'old.npy'},{files / 'twin.npy'}"
    invoke("serve", files / "g", "--queries", right, "--k", 3)
    for wrong, named in (
        (f"vectors:{files / 'twin.npy'},{files / 'old.npy'}", "twin.npy has vectors of space"),
        (f"vectors:{files / 'old.npy'}", "old.npy has vectors of space"),
    ):
        said = re.sub(r"\s+", " ", invoke("serve", files / "g", "--queries", wrong, code=2).stderr)
        assert named in said and "expected in its place" in said
