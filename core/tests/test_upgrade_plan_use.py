"""What a plan is for: begin as it says, stop where it says, and refuse early what a store cannot do."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner
from upgrade_world import FakeEncoder, by_item, make_gallery, new_encoder, old_encoder

from bowerbird.cli import main
from bowerbird.errors import SpaceError, UpgradeError
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import begin
from bowerbird.upgrade.plan import plan
from bowerbird.upgrade.saved_plan import load_plan, measured_gain
from bowerbird.upgrade.watch import level_before, watch

ENCODERS = {"fake:old": old_encoder, "fake:new": new_encoder, "fake:other": lambda: FakeEncoder("other", 24, 1.0)}


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


def planned(path, *mergers):
    wanted = [part for merger in mergers for part in ("--merger", merger)]
    return json.loads(invoke("plan", path, "--to", "fake:new", "--label-key", "label", "--strategy", "two-queries",
                             *wanted, "--json").stdout)  # fmt: skip


def merger_of(path, *options):
    invoke("run", path, "--strategy", "two-queries", "--stop-after", 4, "--task-items", 4, *options)
    merger = json.loads(invoke("status", path, "--json").stdout)["merger"]
    invoke("rollback", path)
    return merger


def test_run_takes_the_merger_of_the_last_plan_for_the_same_encoders_and_no_other(path):
    assert merger_of(path, "--to", "fake:new") == "core:distance", "without a plan: the strategy's"
    planned(path)
    latest = path / "plan" / "latest.json"
    saved = json.loads(latest.read_text())
    saved["recommendation"]["merger"] = "core:zscore"
    latest.write_text(json.dumps(saved))
    assert merger_of(path, "--to", "fake:new") == "core:zscore"
    assert merger_of(path, "--to", "fake:new", "--merger", "proportional") == "core:proportional"
    assert merger_of(path, "--to", "fake:other") == "core:distance"
    latest.write_text("{")
    assert merger_of(path, "--to", "fake:new") == "core:distance"


def test_a_stop_at_a_share_of_the_gain_goes_on_until_the_watched_queries_show_it(path):
    planned(path)
    latest = path / "plan" / "latest.json"
    hopeful = json.loads(latest.read_text())
    for curve in hopeful["curves"]:  # a forecast that has it all at the start
        if curve["name"] == "world:two-queries":
            curve["quality"] = [curve["quality"][0], *([curve["quality"][-1]] * (len(curve["quality"]) - 1))]
    latest.write_text(json.dumps(hopeful))
    ended = invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--label-key", "label",
                   "--task-items", 4, "--stop-at-gain", 0.6)  # fmt: skip
    assert "60% of the gain are forecast at 6.0%" in ended.output
    with Gallery.open(path) as gallery:
        saved, now = load_plan(latest), watch(gallery)
        gain = (now.quality - level_before(gallery)) / (saved.new_level - saved.old_level)
        assert measured_gain(gallery, saved) == pytest.approx(gain)
        assert gain >= 0.6
        assert 0.1 < now.share < 1, "the forecast alone would have stopped at 6 %"


def test_without_watched_queries_the_forecast_counts_and_that_is_said(path):
    planned(path)
    ended = invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--task-items", 4,
                   "--stop-at-gain", 0.3)  # fmt: skip
    assert "the gain is not measured" in ended.output


@pytest.mark.parametrize("verb", ["plan", "begin"])
def test_what_a_store_lacks_is_refused_before_anything_is_encoded(path, monkeypatch, verb):
    with Gallery.open(path) as gallery:
        kept = type(gallery.storage).features - {"rollback"}
        monkeypatch.setattr(type(gallery.storage), "features", kept)
        encoder, encoded = by_item(new_encoder()), []
        monkeypatch.setattr(encoder, "items", lambda *given: encoded.append(given))
        with pytest.raises(UpgradeError, match=r"lacks 'rollback' \(return to the exact old state.*gallery copy"):
            if verb == "plan":
                plan(gallery, encoder, label_key="label")
            else:
                begin(gallery, encoder.space, strategy="two-queries")
        assert not encoded
        assert gallery.store.upgrade_state() is None


@pytest.mark.parametrize("verb", ["plan", "begin"])
def test_vectors_that_a_store_cannot_keep_are_refused_before_anything_is_encoded(path, monkeypatch, verb):
    def narrow(self, space):
        if space.dim > 20:
            raise SpaceError(f"{space} is too wide")

    with Gallery.open(path) as gallery:
        monkeypatch.setattr(type(gallery.storage), "check_space", narrow)
        encoder, encoded = by_item(new_encoder()), []
        monkeypatch.setattr(encoder, "items", lambda *given: encoded.append(given))
        with pytest.raises(SpaceError, match="too wide"):
            if verb == "plan":
                plan(gallery, encoder, label_key="label")
            else:
                begin(gallery, encoder.space, strategy="two-queries")
        assert not encoded and gallery.spaces() == [old_encoder().space()]


def test_several_workers_need_a_store_for_them_and_without_one_nothing_begins(path, monkeypatch):
    with Gallery.open(path) as gallery:
        kept = type(gallery.storage).features - {"many-workers"}
        monkeypatch.setattr(type(gallery.storage), "features", kept)
    said = invoke("run", path, "--to", "fake:new", "--strategy", "two-queries", "--workers", 2, code=2).stderr
    assert "lacks 'many-workers'" in said and "--workers 1" in said
    with Gallery.open(path) as gallery:
        assert gallery.store.upgrade_state() is None
    invoke("run", path, "--to", "fake:new", "--strategy", "two-queries")


def test_an_upgrade_on_top_needs_a_store_with_sequences(path, monkeypatch):
    with Gallery.open(path) as gallery:
        begin(gallery, new_encoder().space(), strategy="two-queries")
        monkeypatch.setattr(type(gallery.storage), "features", type(gallery.storage).features - {"sequences"})
        with pytest.raises(UpgradeError, match="'sequences'"):
            begin(gallery, ENCODERS["fake:other"]().space(), strategy="two-queries", on_top=True)
