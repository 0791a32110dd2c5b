"""``bowerbird upgrade``: the verbs on the command line, in the order in which an operator types them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from upgrade_world import FakeEncoder, item_id, make_gallery, new_encoder, old_encoder, write_image

from bowerbird.cli import main
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry

ENCODERS = {
    "fake:old": old_encoder,
    "fake:new": new_encoder,
    "fake:trained": lambda: FakeEncoder("trained", 16, 0.8, flavour="old"),
    "fake:other": lambda: FakeEncoder("other", 24, 1.0),
    "fake:swapped": lambda: FakeEncoder("new", 24, 1.0, flavour="swapped"),
}


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
    make_gallery(tmp_path / "g", 120, images=images).close()
    return tmp_path / "g"


def invoke(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, ["upgrade", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_whole_way_from_plan_to_finish(path, tmp_path):
    query = write_image(tmp_path, 20_000)
    planned = json.loads(
        invoke(
            "plan",
            path,
            "--to",
            "fake:new",
            "--label-key",
            "label",
            "--price-per-hour",
            2,
            "--json",
            "--strategy",
            "two-queries",
        ).stdout
    )
    assert planned["recommendation"]["decision"] == "upgrade"
    assert planned["old"]["canary"] == pytest.approx(1, abs=1e-4)
    assert json.loads((path / "plan" / "latest.json").read_text()) == planned

    def results():
        return json.loads(invoke("serve", path, "--image", query, "--k", 5, "--json").stdout)[0]

    before = results()
    assert {hit["side"] for hit in before["results"]} == {"new"}, "outside upgrades there is one side"
    part = json.loads(
        invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--order", "uncertainty", "--set",
               "strategy=margin", "--label-key", "label", "--task-items", 30, "--stop-after", 30, "--json").stdout
    )  # fmt: skip
    assert (part["reason"], part["encoded"]) == ("stop-after", 30)
    now = json.loads(invoke("status", path, "--json").stdout)
    assert (now["new_items"], now["order"], now["strategy"]) == (30, "core:uncertainty", "world:two-queries")
    assert results()["share"] == 0.25
    assert json.loads(invoke("watch", path, "--max-nfr", 1, "--json").stdout)["share"] == 0.25
    invoke("pause", path)
    assert "is paused" in invoke("run", path, code=2).stderr
    invoke("resume", path)
    assert "200.0%" not in invoke("run", path).stdout
    assert len(json.loads(invoke("watch", path, "--history", "--json").stdout)) == 1
    assert "fake:new" in invoke("finish", path).stdout
    with Gallery.open(path, readonly=True) as gallery:
        assert np.array_equal(gallery.vectors_of([item_id(5)]), new_encoder().vectors([5]))
    assert "no upgrade is under way" in invoke("status", path, code=2).stderr


def test_a_filter_key_that_is_given_twice_accepts_either_value_and_finding_nothing_is_said(path, tmp_path):
    query = write_image(tmp_path, 20_000)

    def labels(*wanted):
        where = [argument for value in wanted for argument in ("--where", f"label={value}")]
        return invoke("serve", path, "--image", query, "--k", 120, *where).stdout

    assert labels("class-1").count("  item-") == labels("class-2").count("  item-") == 10
    assert labels("class-1", "class-2").count("  item-") == 20
    assert "nothing found" in labels("class-99")


def test_rollback_and_its_old_results(path, tmp_path):
    query = write_image(tmp_path, 20_000)
    before = invoke("serve", path, "--image", query, "--json").stdout
    invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--task-items", 30, "--stop-after", 60)
    assert invoke("serve", path, "--image", query, "--json").stdout != before
    assert json.loads(invoke("rollback", path, "--json").stdout) == {"items": 120, "pending": 0}
    assert invoke("serve", path, "--image", query, "--json").stdout == before


def test_people_get_tables(path, tmp_path):
    text = invoke("plan", path, "--to", "fake:new", "--label-key", "label", "--price-per-hour", 2).stdout
    for expected in (
        "old/old",
        "new/new",
        "two-queries",
        "switch-now",
        "full",
        "items/s",
        "Recommendation: upgrade",
    ):
        assert expected in text
    text = invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--label-key", "label", "--watch-every",
                  0.5).stdout  # fmt: skip
    assert re.search(r"complete: moved 120 items in .* 100.0% of the gallery is new", text)
    assert "negative flips" in text
    assert "moved" in invoke("status", path).stdout
    shown = invoke("serve", path, "--image", write_image(tmp_path, 20_000), "--where", "label=class-3").stdout
    assert re.search(r"1  0\.\d{4}  new  item-", shown)


def test_labelled_images_in_folders_are_queries(path, tmp_path):
    for number in range(30_000, 30_048):
        folder = tmp_path / "queries" / f"class-{number % 12}"
        folder.mkdir(parents=True, exist_ok=True)
        write_image(folder, number)
    made = json.loads(
        invoke(
            "plan", path, "--to", "fake:new", "--label-key", "label", "--queries", tmp_path / "queries", "--json"
        ).stdout
    )
    assert made["queries"] == 48
    assert made["recommendation"]["decision"] == "upgrade"


def test_compatible_needs_its_relation(path):
    refused = invoke("run", path, "--to", "fake:new", "--strategy", "compatible", code=2)
    assert "needs a relation" in refused.stderr
    invoke("run", path, "--to", "fake:trained", "--strategy", "compatible", "--compatible")


def test_an_encoder_that_is_not_compatible_is_not_declared_to_be(path):
    refused = invoke("run", path, "--to", "fake:new", "--strategy", "compatible", "--compatible", code=2)
    assert "is not compatible with the stored vectors" in refused.stderr and "mean cosine" in refused.stderr
    assert "needs a relation" in invoke("run", path, "--to", "fake:new", "--strategy", "compatible", code=2).stderr
    assert "no upgrade is under way" in invoke("status", path, code=2).stderr


def test_failed_items_are_listed_and_accepted_only_explicitly(path):
    with Gallery.open(path, readonly=True) as gallery:
        image = Path(gallery.get(item_id(3)).uri)
    image.unlink()
    ran = invoke("run", path, "--to", "fake:new", "--strategy", "two-queries")
    assert "item-00003" in ran.stderr
    assert "item-00003" in invoke("status", path).stdout
    assert "--accept-failed" in invoke("finish", path, code=2).stderr
    ended = json.loads(invoke("finish", path, "--accept-failed", "--json").stdout)
    assert ended["pending"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name the new encoder"),
        (["run", "--to", "fake:old", "--strategy", "two-queries"], "already serves"),
        (
            ["run", "--to", "fake:new", "--strategy", "rank-mergee"],
            "no retriever with role 'upgrade' named 'rank-mergee'",
        ),
        (["run", "--to", "fake:new", "--strategy", "two-queries", "--order", "randon"], "Did you mean"),
        (["run", "--to", "fake:new", "--old", "fake:other", "--strategy", "two-queries"], "foreign encoder"),
        (["plan", "--to", "fake:new", "--label-key", "nothing"], "keys found: even, label"),
        (["plan", "--to", "fake:new", "--queries", "nowhere"], "there is no such folder"),
        (["plan", "--to", "fake:new", "--strategy", "two-querys"], "Did you mean 'world:two-queries'"),
        (["plan", "--to", "fake:new", "--order", "uncertanty"], "Did you mean 'core:uncertainty'"),
        (["serve", "--image", "nowhere.png"], "nowhere.png"),
        (["finish"], "no upgrade is under way"),
        (["rollback"], "no upgrade is under way"),
        (["watch"], "no upgrade is under way"),
        (["pause"], "no upgrade is under way"),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(path, arguments, message):
    result = invoke(arguments[0], path, *arguments[1:], code=2)
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_foreign_encoder_is_refused_in_the_middle(path):
    invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--task-items", 64, "--stop-after", 64)
    assert "fake:other" in invoke("run", path, "--to", "fake:other", code=2).stderr
    assert "not the one" in invoke("run", path, "--to", "fake:swapped", code=2).stderr
    invoke("run", path)
    assert "not the one" in invoke("finish", path, "--to", "fake:swapped", code=2).stderr


@pytest.mark.parametrize("verb", ["plan", "serve", "run", "watch", "finish", "rollback", "status", "pause", "resume"])
def test_every_verb_has_examples(verb):
    assert f"bowerbird upgrade {verb} photos" in invoke(verb, "--help").stdout


def test_a_path_that_is_no_gallery(tmp_path):
    assert "is not a gallery" in invoke("status", tmp_path, code=2).stderr
