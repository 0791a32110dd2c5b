"""``bowerbird gallery``: what the commands print, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gallery_world import OLD, vectors

from bowerbird.cli import main
from bowerbird.errors import SpaceError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.images import add_images, search_images

NAMES = [f"item-{i}" for i in range(30)]


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["gallery", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", vectors(NAMES, OLD))
    (tmp_path / "ids.txt").write_text("\n".join(NAMES) + "\n")
    rows = "".join(f"{name},{2000 + i % 3},t{i % 2}\n" for i, name in enumerate(NAMES))
    (tmp_path / "meta.csv").write_text("id,year,tag\n" + rows)
    path = tmp_path / "gallery"
    run("create", path, "--dim", OLD.dim, "--name", "hosted")
    run(
        "add",
        path,
        "--vectors",
        tmp_path / "vectors.npy",
        "--ids",
        tmp_path / "ids.txt",
        "--metadata",
        tmp_path / "meta.csv",
    )
    return path


def test_a_filter_finds_metadata_whose_text_looks_like_a_number(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", vectors(NAMES, OLD))
    (tmp_path / "ids.txt").write_text("\n".join(NAMES) + "\n")
    labels = [{"id": name, "label": str(i % 3)} for i, name in enumerate(NAMES)]  # as a detector of digits has them
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    path, given = tmp_path / "gallery", ("--ids", tmp_path / "ids.txt", "--metadata", tmp_path / "meta.jsonl")
    run("create", path, "--dim", OLD.dim, "--name", "hosted")
    run("add", path, "--vectors", tmp_path / "vectors.npy", *given)
    found = json.loads(run("search", path, "--id", "item-3", "-k", 4, "--where", "label=0", "--json").output)
    assert [int(hit["id"].split("-")[1]) % 3 for hit in found["results"][0]["hits"]] == [0, 0, 0, 0]


def test_vectors_from_files_are_added_searched_and_filtered(filled: Path, tmp_path: Path) -> None:
    found = json.loads(run("search", filled, "--id", "item-3", "-k", 4, "--where", "year=2000", "--json").output)
    hits = found["results"][0]["hits"]
    assert hits[0] == {"id": "item-3", "distance": pytest.approx(0, abs=1e-6), "uri": None}
    assert all(int(hit["id"].split("-")[1]) % 3 == 0 for hit in hits) and len(hits) == 4
    np.save(tmp_path / "query.npy", vectors(["item-7"], OLD)[0])
    assert "0.0000  item-7" in run("search", filled, "--vector", tmp_path / "query.npy", "-k", 1).output


def test_jsonl_metadata_and_skipping_what_is_there(filled: Path, tmp_path: Path) -> None:
    (tmp_path / "meta.jsonl").write_text('{"id": "item-1", "year": 1999}\n')
    arguments = (
        "--vectors",
        tmp_path / "vectors.npy",
        "--ids",
        tmp_path / "ids.txt",
        "--metadata",
        tmp_path / "meta.jsonl",
    )
    assert "in the gallery already" in run("add", filled, *arguments, code=2).output
    added = json.loads(run("add", filled, *arguments, "--existing", "skip", "--json").output)
    assert (added["added"], added["unchanged"], added["items"]) == (0, 30, 30)
    updated = json.loads(run("add", filled, *arguments, "--existing", "update", "--json").output)
    assert updated["replaced"] == 30
    assert json.loads(run("info", filled, "item-1", "--json").output)["metadata"] == {"year": 1999}


def test_delete_stats_info_and_verify(filled: Path) -> None:
    assert "deleted 2; 28 items" in run("delete", filled, "item-0", "item-1").output
    stats = json.loads(run("stats", filled, "--json").output)
    assert stats["items"] == 28 and stats["dead_rows"] == 2 and stats["spaces"][0]["encoder"] == "black-box:hosted"
    assert "28 items" in run("stats", filled).output
    assert json.loads(run("info", filled, "--json").output)["spaces"][0]["dim"] == OLD.dim
    assert json.loads(run("verify", filled, "--json").output)["ok"] is True


def test_verify_of_a_damaged_gallery_names_the_damage_and_exits_with_one(filled: Path) -> None:
    (file,) = (filled / "seg").glob("*.f32")
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    assert f"rows 0 to 29 of segment {file.name}" in run("verify", filled, code=1).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{path}"], "say what to search with"),
        (["search", "{path}", "--id", "nobody"], "has no item 'nobody'"),
        (["search", "{path}", "--id", "item-1", "-k", "0"], "k is 0"),
        (["search", "{path}", "--id", "item-1", "--where", "year"], "expected KEY=VALUE"),
        (["search", "{path}", "--image", "{path}/catalog.db"], "black-box:hosted, which cannot be loaded"),
        (["add", "{path}"], "say what to add"),
        (["add", "{path}", "x.png"], "black-box:hosted, which cannot be loaded"),
        (["create", "{path}", "--dim", "4"], "something is there already"),
        (["create", "{path}-2"], "either --encoder, or --dim"),
        (["delete", "{path}"], "say which items"),
        (["delete", "{path}", "item-999"], "1 of 1 ids are not in the gallery"),
        (["stats", "{path}/nowhere"], "is not a gallery"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_two(filled: Path, arguments: list[str], message: str) -> None:
    output = run(*[argument.format(path=filled) for argument in arguments], code=2).output
    assert message in output and "Traceback" not in output


@pytest.mark.parametrize("name", ["create", "add", "delete", "search", "index", "verify", "stats", "info", "relate"])
def test_every_command_has_examples(name: str) -> None:
    assert "Examples:" in run(name, "--help").output


# ------------------------------------------------------------------------------------------------------------ images


class ColourEncoder:
    """Encodes a picture as its mean colour; stands in for a network. Same methods as ``LoadedEncoder``."""

    fingerprint = "colour" * 8
    name = "tests:colour"
    frames = None

    def encode_batches(self, items, *, batch_size: int = 64, on_error="raise"):
        from bowerbird.data.images import open_image
        from bowerbird.errors import DataError

        for position, source in enumerate(items):
            try:
                mean = np.asarray(open_image(source), np.float32).mean(axis=(0, 1)) + 1
            except DataError as error:
                if on_error == "raise":
                    raise
                on_error(position, error)
                continue
            yield np.array([position]), (mean / np.linalg.norm(mean))[None]

    def encode(self, items):
        return np.concatenate([rows for _, rows in self.encode_batches(items)])


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    from PIL import Image

    colours = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}
    for name, colour in colours.items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return [tmp_path / f"{name}.png" for name in (*colours, "broken")]


def test_images_are_encoded_kept_with_uri_and_hash_and_found_by_an_image(tmp_path: Path, pictures: list[Path]) -> None:
    encoder = ColourEncoder()
    ids = [picture.name for picture in pictures]
    with Gallery.create(tmp_path / "g", Space(encoder.fingerprint, encoder.name, 3)) as gallery:
        result = add_images(gallery, encoder, pictures, ids=ids, on_error="skip")
        assert result.added == 3 and list(result.skipped) == ["broken.png"]
        item = gallery.get("red.png")
        assert item.uri == str(pictures[0]) and len(item.content_hash) == 64
        assert search_images(gallery, encoder, [pictures[2]], 1).ids == [["blue.png"]]
        again = add_images(gallery, encoder, pictures[:3], ids=ids[:3], existing="update")
        assert (again.unchanged, again.replaced) == (3, 0)
        pictures[0].write_bytes(pictures[1].read_bytes())  # the red picture was edited
        edited = add_images(gallery, encoder, pictures[:3], ids=ids[:3], existing="update")
        assert (edited.unchanged, edited.replaced) == (2, 1)
        assert sorted(search_images(gallery, encoder, [pictures[1]], 2).ids[0]) == ["green.png", "red.png"]


def test_an_encoder_that_changed_behind_its_fingerprint_is_caught_at_the_first_use(
    tmp_path: Path, pictures: list[Path]
) -> None:
    from bowerbird.errors import SpaceError

    encoder = ColourEncoder()
    with Gallery.create(tmp_path / "g", Space(encoder.fingerprint, encoder.name, 3)) as gallery:
        add_images(gallery, encoder, pictures[:3], ids=["red", "green", "blue"])

        class Swapped(ColourEncoder):
            def encode_batches(self, items, **options):
                for positions, rows in super().encode_batches(items, **options):
                    yield positions, rows[:, ::-1] * [1, -1, 1]

        with pytest.raises(SpaceError, match="not the one that filled"):
            search_images(gallery, Swapped(), [pictures[0]])
        foreign = ColourEncoder()
        foreign.fingerprint = "other" * 8
        with pytest.raises(SpaceError, match="is not the one of this gallery"):
            add_images(gallery, foreign, pictures[:1], ids=["again"])


def vector_files(folder: Path) -> dict[str, str]:
    """Two encoders of the items, by their vectors: one whose vectors are near the stored ones, and a foreign one."""
    rng, stored = np.random.default_rng(0), vectors(NAMES, OLD)
    made = {"near": stored + 0.2 * rng.standard_normal(stored.shape), "foreign": rng.standard_normal(stored.shape)}
    for name, rows in made.items():
        np.save(folder / f"{name}.npy", rows.astype(np.float32))
        (folder / f"{name}.ids.txt").write_text("\n".join(NAMES) + "\n")
    return {name: f"vectors:{folder / name}.npy" for name in made}


def relations(path: Path) -> list[dict]:
    return json.loads(run("info", path, "--json").output)["relations"]


def test_a_relation_is_measured_on_the_items_that_both_encoders_have(filled: Path, tmp_path: Path) -> None:
    refs = vector_files(tmp_path)
    shown = run("relate", filled, "--new", refs["near"]).output
    (relation,) = relations(filled)
    measured = relation["evidence"]["measured"]
    stored, new = vectors(NAMES, OLD), np.load(tmp_path / "near.npy")
    cosines = (new / np.linalg.norm(new, axis=1, keepdims=True)) @ stored.T
    assert measured["items"] == 30 and "measured on 30 items" in shown
    assert measured["cosine_same_item"] == pytest.approx(np.diag(cosines).mean(), abs=1e-3)
    assert measured["cosine_other_items"] == pytest.approx(cosines[~np.eye(30, dtype=bool)].mean(), abs=1e-3)


def test_a_relation_that_the_vectors_deny_is_refused(filled: Path, tmp_path: Path) -> None:
    refused = run("relate", filled, "--new", vector_files(tmp_path)["foreign"], code=2)
    assert "is not compatible with the stored vectors" in refused.stderr
    assert relations(filled) == []


def test_a_relation_that_cannot_be_measured_is_called_declared_and_keeps_the_evidence_that_is_given(
    filled: Path, tmp_path: Path
) -> None:
    ref = vector_files(tmp_path)["near"]
    (tmp_path / "near.ids.txt").write_text("".join(f"another-{n}\n" for n in range(len(NAMES))))
    (tmp_path / "evidence.json").write_text('{"map": 0.4}')
    shown = run("relate", filled, "--new", ref, "--evidence", tmp_path / "evidence.json")
    assert "declared, not measured" in shown.stderr
    assert relations(filled)[0]["evidence"] == {"map": 0.4}


@pytest.mark.parametrize("called", ["ref", "fingerprint"])
def test_a_relation_can_be_taken_back_also_when_its_encoder_is_gone(filled: Path, tmp_path: Path, called: str) -> None:
    ref = vector_files(tmp_path)["near"]
    run("relate", filled, "--new", ref)
    fingerprint = relations(filled)[0]["new"]
    (tmp_path / "near.npy").unlink()
    assert "removed" in run("relate", filled, "--new", ref if called == "ref" else fingerprint[:8], "--remove").output
    assert relations(filled) == []
    with Gallery.open(filled, readonly=True) as gallery, pytest.raises(SpaceError, match="no registered relation"):
        gallery.search({fingerprint: vectors(["x"], OLD)}, 3)


def test_a_relation_that_an_upgrade_searches_by_stays_until_it_has_ended(filled: Path, tmp_path: Path) -> None:
    ref = vector_files(tmp_path)["near"]
    begin = ["upgrade", "run", str(filled), "--to", ref, "--strategy", "compatible", "--compatible"]
    assert CliRunner().invoke(main, [*begin, "--task-items", "8", "--stop-after", "8"]).exit_code == 0
    assert "finish it or roll it back" in run("relate", filled, "--new", ref, "--remove", code=2).stderr
    assert len(relations(filled)) == 1
    assert CliRunner().invoke(main, ["upgrade", "rollback", str(filled)]).exit_code == 0
    run("relate", filled, "--new", ref, "--remove")
    assert relations(filled) == []
    assert "registered: none" in run("relate", filled, "--new", ref, "--remove", code=2).stderr
