"""The commands of docs/upgrade-sequences.md, in the order in which an operator types them."""

from __future__ import annotations

import json
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import upgrade_world
from click.testing import CliRunner
from test_upgrade_lift import fitted
from upgrade_world import FakeEncoder, make_gallery, new_encoder, old_encoder, write_image

from bowerbird.cli import main
from bowerbird.errors import InputError
from bowerbird.gallery import Gallery
from bowerbird.gallery.transform import VectorTransform
from bowerbird.registry import get_registry
from bowerbird.upgrade.matrix import matrix

COUNT = 120
ENCODERS = {
    "fake:old": old_encoder,
    "fake:new": new_encoder,
    "fake:third": lambda: FakeEncoder("third", 20, 0.8),
}
V1, V2, V3 = (make().fingerprint for make in ENCODERS.values())


@pytest.fixture(autouse=True)
def world(monkeypatch):
    get_registry().register_module("world", sys.modules["upgrade_world"])
    monkeypatch.setattr("bowerbird.cli.upgrade_parts.load", lambda ref, device: ENCODERS[ref]())
    yield
    get_registry().unregister("world")


@pytest.fixture
def path(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    make_gallery(tmp_path / "g", COUNT, images=images).close()
    return tmp_path / "g"


def invoke(*arguments: object, group: str = "upgrade", code: int = 0):
    result = CliRunner().invoke(main, [group, *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: object, group: str = "upgrade"):
    return json.loads(invoke(*arguments, "--json", group=group).stdout)


def by_part(path):
    return [part["items"] for part in as_json("status", path)["parts"]]


def test_a_sequence_of_three_models_back_and_forth(path, tmp_path):
    query = write_image(tmp_path, 20_000)
    share = ("--strategy", "two-queries", "--task-items", 10, "--stop-at-share", 0.5)
    invoke("run", path, "--to", "fake:new", *share)
    before = as_json("serve", path, "--image", query, "--k", 9)
    assert "--on-top" in invoke("run", path, "--to", "fake:third", *share, code=2).stderr
    invoke("run", path, "--to", "fake:third", "--on-top", "--strategy", "two-queries", "--task-items", 10,
           "--stop-after", 20)  # fmt: skip
    assert by_part(path) == [40, 60, 20]
    assert "on top of" in invoke("status", path).stdout
    during = as_json("serve", path, "--image", query, "--k", 9)
    assert len(during[0]["results"]) == 9
    assert "as it was, paused" in invoke("rollback", path).stdout
    assert by_part(path) == [60, 60]
    after = as_json("serve", path, "--image", query, "--k", 9)
    assert [hit["id"] for hit in after[0]["results"]] == [hit["id"] for hit in before[0]["results"]]
    assert "is paused" in invoke("run", path, code=2).stderr
    invoke("run", path, "--to", "fake:third", "--on-top", "--strategy", "two-queries")
    assert "fake:third" in invoke("finish", path).stdout
    with Gallery.open(path, readonly=True) as gallery:
        assert [(part.space.fingerprint, part.count) for part in gallery.snapshot().parts] == [(V3, COUNT)]


def test_a_gallery_without_images_is_lifted_and_refuses_what_needs_them(tmp_path):
    make_gallery(tmp_path / "g", COUNT).close()
    path, file = tmp_path / "g", tmp_path / "forward.safetensors"
    fitted().save(file)
    assert "upgrade lift" in invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", code=2).stderr
    assert "--transform FILE" in invoke("lift", path, code=2).stderr
    command = ("lift", path, "--transform", file, "--strategy", "two-queries", "--task-items", 30, "--stop-after", 60)
    assert "nothing shows" in invoke(*command, code=2).stderr
    report = as_json(*command, "--accept-poor-transform")
    assert (report["reason"], report["encoded"]) == ("stop-after", 60)
    assert "upgrade lift" in invoke("run", path, code=2).stderr
    assert "upgrade finish" in invoke("lift", path).stdout
    assert "lifted:fake:new" in invoke("finish", path).stdout
    assert (
        "upgrade serve" in invoke("search", path, "--image", write_image(tmp_path, 3), group="gallery", code=2).stderr
    )
    assert len(as_json("serve", path, "--image", write_image(tmp_path, 3), "--k", 5)[0]["results"]) == 5
    tags = as_json("info", path, group="gallery")
    assert tags["upgrades"][0]["state"] == "finished"
    assert {(relation["kind"], relation["new"][:6]) for relation in tags["relations"]} == {
        ("transform", V1[:6]), ("compatible", V2[:6])}  # fmt: skip


def test_the_direction_of_a_lift_is_checked_on_given_pairs_and_with_the_new_encoder(path, tmp_path):
    file = tmp_path / "forward.safetensors"
    fitted().save(file)
    numbers = range(70_000, 70_040)
    np.save(tmp_path / "old.npy", old_encoder().vectors(numbers))
    np.save(tmp_path / "new.npy", -new_encoder().vectors(numbers))
    pairs = ("--old-pairs", tmp_path / "old.npy", "--new-pairs", tmp_path / "new.npy")
    assert "does not fit" in invoke("lift", path, "--transform", file, *pairs, code=2).stderr
    assert "go together" in invoke("lift", path, "--transform", file, *pairs[:2], code=2).stderr
    fitted(new_encoder(), old_encoder()).save(tmp_path / "backward.safetensors")
    assert "goes the other way" in invoke("lift", path, "--transform", tmp_path / "backward.safetensors", code=2).stderr
    invoke("lift", path, "--transform", file, "--to", "fake:new", "--strategy", "two-queries")
    assert by_part(path) == [0, COUNT]


def test_without_a_file_the_map_is_fitted_with_the_new_encoder(path, monkeypatch):
    class Fitting(upgrade_world.OldQueriesOnOldPart):
        transform_direction = "gallery"

        def fit(self, pairs, *, seed=0, **settings):
            assert len(pairs) > 32 and len(pairs.labels) == len(pairs)
            weight = np.linalg.lstsq(pairs.old, pairs.new, rcond=1e-3)[0].T
            return VectorTransform.linear(
                pairs.old_space.fingerprint, pairs.new_space.fingerprint, weight, evidence=said
            )

    monkeypatch.setattr(upgrade_world, "OldQueriesOnOldPart", Fitting)
    monkeypatch.setattr("bowerbird.upgrade.fitting.load_strategy", lambda name: ("world:lift", Fitting()))
    said = {"usable": False, "verdict": "not usable", "sentence": "It is worse than the old system."}
    arguments = ("lift", path, "--to", "fake:new", "--label-key", "label", "--pairs", 100, "--strategy", "two-queries")
    assert "It is worse than the old system" in invoke(*arguments, code=2).stderr
    invoke(*arguments, "--accept-poor-transform")
    assert by_part(path) == [0, COUNT]
    invoke("finish", path)


def test_the_matrix_says_how_each_pair_is_compared_and_what_was_measured(path, tmp_path):
    pytest.importorskip("matplotlib")
    invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--stop-at-share", 0.5)
    with Gallery.open(path) as gallery:
        numbers = range(70_000, 70_050)
        gallery.register_transform(
            fitted(new_encoder(), old_encoder()), pairs=(new_encoder().vectors(numbers), old_encoder().vectors(numbers))
        )
        made = matrix(gallery, label_key="label")
        assert [space["items"] for space in made.spaces] == [60, 60]
        kinds = {(s, t): made.cell(s, t).kind for s in (V1, V2) for t in (V1, V2)}
        assert kinds == {(V1, V1): "same", (V2, V2): "same", (V2, V1): "transform", (V1, V2): "none"}
        cell = made.cell(V2, V1)
        assert cell.measured is not None and cell.measured.low <= cell.measured.value <= cell.measured.high
        assert cell.measured.queries == 60 and cell.evidence[0]["method"] == "tests:ridge"
        # By brute force: each migrated item's mapped vector against every old vector but its own.
        asked = np.sort(gallery.snapshot().new.nums)
        mapped = fitted(new_encoder(), old_encoder())(new_encoder().vectors(asked.tolist()))
        cosine = mapped @ old_encoder().vectors(range(COUNT)).T
        cosine[np.arange(len(asked)), asked] = -9
        right = cosine.argmax(axis=1) % upgrade_world.CLASSES == asked % upgrade_world.CLASSES
        assert cell.measured.value == pytest.approx(right.mean())
        assert made.cell(V1, V2).measured is None
        unlabelled = matrix(gallery).cell(V2, V1).measured
        assert unlabelled is not None and unlabelled.metric == "self"
        with pytest.raises(InputError, match="has the metadata key"):
            matrix(gallery, label_key="nonsense")
    text = invoke("matrix", path, "--label-key", "label", "--out", tmp_path / "m.svg", group="gallery").stdout
    assert "transform" in text and "same space" in text and "R@1" in text and "60 queries" in text
    drawn = (tmp_path / "m.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg") and "transform" in drawn
    invoke("matrix", path, "--out", tmp_path / "m.png", group="gallery")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    listed = as_json("matrix", path, group="gallery")
    assert len(listed["cells"]) == 4 and {cell["kind"] for cell in listed["cells"]} == {"same", "transform", "none"}
    assert ".svg or .png" in invoke("matrix", path, "--out", tmp_path / "m.gif", group="gallery", code=2).stderr
