"""What would ruin a gallery without an error anywhere: tried through the public ways in, and refused by each."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import upgrade_world
from click.testing import CliRunner
from upgrade_world import FakeEncoder, by_item, item_id, make_gallery, new_encoder, old_encoder, stored

from bowerbird.cli import main
from bowerbird.errors import InputError, SpaceError, UnknownNameError, UpgradeError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.tasks import LeaseLostError
from bowerbird.gallery.transform import VectorTransform
from bowerbird.hookspecs import hookimpl
from bowerbird.records import RetrieverRecord
from bowerbird.registry import get_registry
from bowerbird.upgrade import Upgrade, begin
from bowerbird.upgrade.lift import begin_lift
from bowerbird.upgrade.run import run
from bowerbird.upgrade.state import finish, rollback

STRATEGY = "world:two-queries"
TWIN = FakeEncoder("twin", 16, 1.0)  # a new encoder of the old one's width: nothing but its identity tells them apart


class MappedQueries:
    needs_old_encoder = False
    merger = "core:distance"
    transform_direction = "query"

    def check(self, gallery, old, new):
        return None

    def fit(self, pairs, *, seed=0):
        raise AssertionError("a map is given")

    def old_part_queries(self, queries, old, new, transform):
        return transform(queries[new.fingerprint])


@pytest.fixture(autouse=True)
def world():
    module = ModuleType("refusals_plugin")
    module.BOWERBIRD_API = "1.0"

    @hookimpl
    def bowerbird_retrievers():
        yield RetrieverRecord(
            name="refusals:mapped", role="upgrade", target="test_upgrade_refusals:MappedQueries", summary="For tests."
        )

    module.bowerbird_retrievers = bowerbird_retrievers
    get_registry().register_module("refusals", module)
    get_registry().register_module("world", sys.modules[upgrade_world.__name__])
    yield
    get_registry().unregister("refusals")
    get_registry().unregister("world")


@pytest.fixture
def gallery(tmp_path):
    with make_gallery(tmp_path / "g", 120) as opened:
        yield opened


def ridge(source: FakeEncoder, target: FakeEncoder, *, named: tuple[str, str] | None = None) -> VectorTransform:
    """The map from one encoder to another; ``named``: what it claims to be."""
    numbers = range(50_000, 50_300)
    x, y = source.vectors(numbers), target.vectors(numbers)
    weight = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y).T
    one, other = named or (source.fingerprint, target.fingerprint)
    return VectorTransform.linear(one, other, weight)


def untouched(gallery: Gallery, before: dict) -> bool:
    return gallery.store.upgrade_state() is None and stored(gallery) == before and gallery.verify().ok


class TestVectorsOfAnotherEncoder:
    """All of one width: no shape is wrong anywhere."""

    def test_an_ingest_that_has_not_heard_of_the_upgrade_must_say_whose_vectors_it_brings(self, gallery):
        gallery.add([item_id(900)], old_encoder().vectors([900]))
        begin(gallery, TWIN.space(), strategy=STRATEGY)
        with pytest.raises(SpaceError, match="say which space the vectors are of"):
            gallery.add([item_id(901)], old_encoder().vectors([901]))
        gallery.add([item_id(901)], old_encoder().vectors([901]), space=old_encoder().fingerprint)
        run(gallery, by_item(TWIN))
        finish(gallery)
        with pytest.raises(SpaceError, match="cannot be added in space"):
            gallery.add([item_id(902)], old_encoder().vectors([902]), space=old_encoder().fingerprint)

    def test_on_the_command_line_too(self, gallery, tmp_path):
        np.save(tmp_path / "late.npy", old_encoder().vectors([901]))
        (tmp_path / "ids.txt").write_text("late\n")
        begin(gallery, TWIN.space(), strategy=STRATEGY)
        command = ["gallery", "add", str(gallery.path), "--vectors", str(tmp_path / "late.npy"), "--ids",
                   str(tmp_path / "ids.txt")]  # fmt: skip
        refused = CliRunner().invoke(main, command)
        assert refused.exit_code == 2 and "--space" in refused.output and "late" not in gallery
        wrong = CliRunner().invoke(main, [*command, "--space", "no-such"])
        assert wrong.exit_code == 2 and "names 0 spaces" in wrong.output
        done = CliRunner().invoke(main, [*command, "--space", old_encoder().fingerprint[:10], "--json"])
        assert done.exit_code == 0 and json.loads(done.output)["added"] == 1
        assert np.allclose(gallery.vectors_of(["late"], old_encoder().fingerprint), old_encoder().vectors([901]))

    def test_queries_without_a_name_are_refused_while_two_spaces_serve(self, gallery):
        begin(gallery, TWIN.space(), strategy=STRATEGY)
        run(gallery, by_item(TWIN), stop_after=30)
        with pytest.raises(SpaceError, match="say which space the queries are of"):
            gallery.search(TWIN.vectors([1]))
        with pytest.raises(SpaceError, match="no registered relation"):
            gallery.search({TWIN.fingerprint: TWIN.vectors([1])})

    def test_a_swapped_model_that_has_the_name_of_the_right_one_is_caught_at_every_verb(self, gallery):
        liar = FakeEncoder("twin", 16, 1.0, flavour="another")
        begin(gallery, TWIN.space(), strategy=STRATEGY, old_encoder=by_item(old_encoder()))
        run(gallery, by_item(TWIN), stop_after=40)
        with pytest.raises(SpaceError, match="is not the one that filled"):
            run(gallery, by_item(liar))
        run(gallery, by_item(TWIN))
        with pytest.raises(SpaceError, match="is not the one that filled"):
            finish(gallery, encoder=by_item(liar))
        swapped = FakeEncoder("old", 16, 2.0, flavour="another")
        with make_gallery(gallery.path.parent / "other", 60) as other:
            before = stored(other)
            with pytest.raises(SpaceError, match="is not the one that filled"):
                begin(other, TWIN.space(), strategy=STRATEGY, old_encoder=by_item(swapped))
            assert untouched(other, before)


class TestMapsThatGoAnotherWay:
    @pytest.mark.parametrize("given", ["in the call", "registered before"])
    def test_a_map_of_queries_whose_file_names_the_wrong_direction_is_caught_by_measuring(self, gallery, given):
        turned = ridge(old_encoder(), TWIN, named=(TWIN.fingerprint, old_encoder().fingerprint))
        right = ridge(TWIN, old_encoder())
        before = stored(gallery)
        settings = {"strategy": "refusals:mapped", "task_items": 20}
        if given == "in the call":
            settings["transform"] = turned
        else:
            gallery.register_space(TWIN.space())
            gallery.register_transform(turned, accept_unmeasured=True)
        for attempt in (Upgrade(gallery, by_item(TWIN)).begin, Upgrade(gallery, by_item(TWIN)).run):
            with pytest.raises(SpaceError, match="fits the reverse direction"):
                attempt(**settings)
            assert untouched(gallery, before)
        Upgrade(gallery, by_item(TWIN)).run(strategy="refusals:mapped", transform=right, stop_after=40)
        assert gallery.transform(TWIN.fingerprint, old_encoder().fingerprint).fingerprint == right.fingerprint

    def test_a_map_of_an_unrelated_pair_of_models_does_not_fit_and_is_refused(self, gallery):
        strange = FakeEncoder("stranger", 16, 30.0)
        foreign = ridge(strange, old_encoder(), named=(TWIN.fingerprint, old_encoder().fingerprint))
        with pytest.raises(SpaceError, match=r"does not fit|reverse direction"):
            Upgrade(gallery, by_item(TWIN)).begin(strategy="refusals:mapped", transform=foreign)

    def test_a_map_that_nothing_shows_to_go_the_right_way_is_taken_only_where_that_is_said(self, gallery):
        """The files were mixed up when it was fitted: same widths, same names, the other direction, and no pictures."""
        old = old_encoder()
        renamed = ridge(TWIN, old, named=(old.fingerprint, TWIN.fingerprint))
        turned = ridge(old, TWIN, named=(TWIN.fingerprint, old.fingerprint))
        before = stored(gallery)
        with pytest.raises(SpaceError, match=r"nothing shows .*--accept-poor-transform, accept_poor=True"):
            begin_lift(gallery, renamed, TWIN.space(), strategy=STRATEGY)
        with pytest.raises(SpaceError, match=r"nothing shows .*--accept-poor-transform, accept_poor_transform=True"):
            begin(gallery, TWIN.space(), strategy="refusals:mapped", transform=turned)
        assert untouched(gallery, before) and gallery.spaces() == [old.space()]
        gallery.register_space(TWIN.space())
        with pytest.raises(SpaceError, match=r"nothing shows .*accept_unmeasured=True"):
            gallery.register_transform(turned)
        numbers = range(60_000, 60_100)
        pairs = TWIN.vectors(numbers), old.vectors(numbers)
        with pytest.raises(SpaceError, match="fits the reverse direction"):
            gallery.register_transform(turned, pairs=pairs, accept_unmeasured=True)
        assert gallery.relations() == []
        gallery.register_transform(ridge(TWIN, old), pairs=pairs)
        checked = gallery.relations()[0].evidence["checked"]
        assert checked["pairs"] == 100 and checked["forward"] > checked["reverse"]
        begin(gallery, TWIN.space(), strategy="refusals:mapped")  # it was measured when it was registered
        rollback(gallery)
        begin_lift(gallery, renamed, TWIN.space(), strategy=STRATEGY, accept_poor=True)
        accepted = [r.evidence.get("accepted") for r in gallery.relations() if r.old != old.fingerprint]
        assert accepted == ["without a measurement"] * 2
        rollback(gallery)

    def test_a_verdict_on_held_out_pairs_is_evidence_enough(self, gallery):
        judged = replace(ridge(old_encoder(), TWIN), evidence={"usable": True, "verdict": "good"})
        begin_lift(gallery, judged, TWIN.space(), strategy=STRATEGY)
        assert "accepted" not in gallery.transforms()[0].evidence

    def test_a_lift_by_a_map_of_the_other_direction_is_refused_under_either_name(self, gallery):
        before = stored(gallery)
        backwards = ridge(TWIN, old_encoder())
        renamed = ridge(TWIN, old_encoder(), named=(old_encoder().fingerprint, TWIN.fingerprint))
        with pytest.raises(SpaceError, match="goes the other way"):
            begin_lift(gallery, backwards, TWIN.space(), strategy=STRATEGY)
        with pytest.raises(SpaceError, match="fits the reverse direction"):
            begin_lift(gallery, renamed, by_item(TWIN), strategy=STRATEGY)
        assert untouched(gallery, before)


class TestVectorsThatWouldBeThereTwice:
    def test_a_pending_item_gets_one_vector_whoever_brings_it(self, gallery):
        begin(gallery, new_encoder().space(), strategy=STRATEGY)
        gallery.add(["late", "later"], new_encoder().vectors([901, 902]), space=new_encoder().fingerprint)
        assert rollback(gallery, leave_pending=True) == 2
        rows = old_encoder().vectors([901, 901])
        with pytest.raises(InputError, match="given twice"):
            gallery.fill(["late", "late"], rows)
        with Gallery.open(gallery.path) as other:
            number = gallery.pending()[0].num
            other.fill(["late"], rows[:1])
            with pytest.raises(UnknownNameError, match=r"not pending any more: 'late'"):
                gallery.store.fill(np.array([number]), rows[:1])
        assert gallery.verify().ok and [item.id for item in gallery.pending()] == ["later"]

    def test_a_worker_of_another_upgrade_commits_nothing(self, gallery):
        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=20)
        task = gallery.store.lease_task("late")
        rollback(gallery)
        begin(gallery, TWIN.space(), strategy=STRATEGY, task_items=20)
        with pytest.raises(LeaseLostError, match="lost task"):
            gallery.store.commit_task(task, task.nums, new_encoder().vectors(range(len(task.items))))
        assert gallery.counts() == {old_encoder().fingerprint: 120, TWIN.fingerprint: 0}


def test_an_item_is_known_by_its_number_not_by_its_name(gallery):
    """An edit that comes while a worker has the item in hand is not overwritten by what the worker saw."""
    begin(gallery, Space("x" * 64, "tests:x", 16), strategy=STRATEGY, task_items=200)
    task = gallery.store.lease_task("slow")
    gallery.add([item_id(3)], old_encoder().vectors([950]), space=old_encoder().fingerprint, replace=True)
    gallery.store.commit_task(task, task.nums, TWIN.vectors(range(len(task.items))))
    old_part = gallery.vectors_of([item_id(3)], old_encoder().fingerprint)
    assert np.allclose(old_part, old_encoder().vectors([950]))
    assert gallery.store.progress().queued == 1 and gallery.verify().ok


def test_an_upgrade_is_not_begun_from_another_space_than_the_one_it_was_checked_for(gallery, monkeypatch):
    """What another process does between the checks and the beginning is seen, and nothing is left behind."""
    before = stored(gallery)
    begin(gallery, TWIN.space(), strategy=STRATEGY)

    def meanwhile(*args, **settings):
        with Gallery.open(gallery.path) as other:
            rollback(other)

    monkeypatch.setattr("bowerbird.upgrade.start.use_transform", meanwhile)
    with pytest.raises(UpgradeError, match="was changed while this upgrade was begun"):
        begin(gallery, new_encoder().space(), strategy=STRATEGY, on_top=True)
    assert untouched(gallery, before)


def test_an_upgrade_on_top_of_a_half_done_one_cannot_be_watched_and_says_so(gallery):
    begin(gallery, TWIN.space(), strategy=STRATEGY, task_items=10)
    run(gallery, by_item(TWIN), stop_after=40)
    third = Upgrade(gallery, by_item(new_encoder()))
    settings = {"strategy": STRATEGY, "on_top": True, "label_key": "label", "watch_every": 0.5}
    with pytest.raises(UpgradeError, match="are in 2 spaces: run the upgrade under way to its end"):
        third.run(**settings)
    assert len(gallery.snapshot().upgrades) == 1
    run(gallery, by_item(TWIN))
    assert third.run(**settings).watched


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_a_seed_is_a_whole_number_of_at_least_0(gallery, seed):
    with pytest.raises(InputError, match="seed is"):
        begin(gallery, TWIN.space(), strategy=STRATEGY, seed=seed)
