"""The upgrade on a gallery: what serving gives at every moment, and what run, finish and rollback refuse."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import upgrade_world
from upgrade_world import (
    FakeEncoder,
    by_item,
    item_id,
    make_gallery,
    new_encoder,
    old_encoder,
    query_vectors,
    stored,
    write_image,
)

from bowerbird.errors import InputError, SpaceError, UnknownNameError, UpgradeError
from bowerbird.gallery import Gallery, Space
from bowerbird.registry import get_registry
from bowerbird.upgrade import ItemEncoder, Upgrade, begin, finish, pause, resume, rollback, status
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import serve

STRATEGY = "world:two-queries"


@pytest.fixture(autouse=True)
def world():
    get_registry().register_module("world", sys.modules["upgrade_world"])
    yield
    get_registry().unregister("world")


@pytest.fixture
def gallery(tmp_path):
    with make_gallery(tmp_path / "g") as gallery:
        yield gallery


def same(a, b) -> bool:
    return a.ids == b.ids and np.array_equal(a.distances, b.distances)


def new_gallery(path: Path, count: int = 300) -> Gallery:
    encoder = new_encoder()
    gallery = Gallery.create(path, encoder.space())
    gallery.add([item_id(n) for n in range(count)], encoder.vectors(range(count)))
    return gallery


class TestServing:
    def test_starts_bit_identical_to_the_old_system_and_ends_bit_identical_to_the_new_one(self, gallery, tmp_path):
        queries = query_vectors()
        old_results = gallery.search(queries[old_encoder().fingerprint], 10)
        service = serve(gallery)
        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=32)
        assert same(service.search(vectors=queries), old_results)

        assert run(gallery, by_item(new_encoder())).reason == "complete"
        with new_gallery(tmp_path / "new") as expected:
            new_results = expected.search(queries[new_encoder().fingerprint], 10)
        assert same(service.search(vectors=queries), new_results)
        finish(gallery)
        assert same(service.search(vectors=queries), new_results)

    def test_half_way_each_hit_is_scored_in_the_space_of_its_side(self, gallery):
        queries = query_vectors(count=5)
        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=50, seed=3)
        run(gallery, by_item(new_encoder()), stop_after=150)
        found = serve(gallery).search(vectors=queries, k=20)
        assert set(np.unique(found.sides)) == {0, 1}
        encoders = {0: old_encoder(), 1: new_encoder()}
        for query in range(5):
            for item, side, distance in zip(found.ids[query], found.sides[query], found.distances[query], strict=True):
                encoder = encoders[int(side)]
                vector = encoder.vectors([upgrade_world.number_of(item)])[0]
                assert distance == pytest.approx(1 - vector @ queries[encoder.fingerprint][query], abs=1e-5)

    def test_the_share_only_grows_and_no_item_is_ever_missing_or_doubled(self, gallery):
        shares = []

        def look(count, now):
            snapshot = gallery.snapshot()
            both = np.concatenate([snapshot.old.nums, snapshot.new.nums])
            assert np.array_equal(np.sort(both), np.arange(300))
            shares.append(now.share)

        run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=25, progress=look)
        assert shares == sorted(shares)
        assert shares[-1] == 1

    def test_a_filter_holds_on_both_sides(self, gallery):
        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=50)
        run(gallery, by_item(new_encoder()), stop_at_share=0.5)
        found = serve(gallery).search(vectors=query_vectors(count=4), k=40, where={"even": True})
        assert all(upgrade_world.number_of(item) % 2 == 0 for row in found.ids for item in row)
        assert {0, 1} <= set(np.unique(found.sides))

    def test_images_are_encoded_by_the_old_encoder_only_while_something_is_old(self, tmp_path):
        images = tmp_path / "images"
        images.mkdir()
        old, new = old_encoder(), new_encoder()
        with make_gallery(tmp_path / "g", 60, images=images) as gallery:
            query = write_image(images, 20_000)
            service = serve(gallery, [old, new])
            service.search([query])
            assert (old.calls, new.calls) == (1, 0)
            begin(gallery, new.space(), strategy=STRATEGY, task_items=30)
            service.search([query])
            assert (old.calls, new.calls) == (2, 0), "nothing is new yet, so that one pass is enough"
            worker = new_encoder()
            run(gallery, ItemEncoder(worker), stop_after=30)
            service.search([query])
            assert (old.calls, new.calls) == (3, 1)
            run(gallery, ItemEncoder(worker))
            service.search([query])
            assert (old.calls, new.calls) == (3, 2)

    def test_a_missing_encoder_is_named(self, gallery):
        with pytest.raises(SpaceError, match="fake:old"):
            serve(gallery).search(["query.png"])
        with pytest.raises(InputError, match="images, or texts, or vectors"):
            serve(gallery).search()

    def test_two_processes_of_a_gallery_agree_because_serving_follows_commits(self, gallery):
        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=50)
        with Gallery.open(gallery.path, readonly=True) as reader:
            service = serve(reader)
            before = service.state()
            run(gallery, by_item(new_encoder()), stop_after=100)
            after = service.state()
        assert (before.share, round(after.share, 3)) == (0, 0.333)
        assert after.needs == (old_encoder().fingerprint, new_encoder().fingerprint)


class TestCompatible:
    def test_is_refused_without_a_registered_relation(self, gallery):
        with pytest.raises(UpgradeError, match="needs a relation"):
            begin(gallery, new_encoder().space(), strategy="compatible")
        assert gallery.store.upgrade_state() is None

    def test_serves_both_parts_with_new_queries_matched_in_width(self, gallery):
        old, new = old_encoder(), new_encoder()
        gallery.register_space(new.space())
        gallery.relate(new.fingerprint, old.fingerprint)
        begin(gallery, new.space(), strategy="core:compatible", task_items=50)
        run(gallery, by_item(new), stop_after=100)
        queries = new.vectors(range(10_000, 10_004))
        found = serve(gallery).search(vectors={new.fingerprint: queries}, k=15)
        cut = queries[:, : old.dim] / np.linalg.norm(queries[:, : old.dim], axis=1, keepdims=True)
        for row in range(4):
            for item, side, distance in zip(found.ids[row], found.sides[row], found.distances[row], strict=True):
                number = [upgrade_world.number_of(item)]
                vector, query = (new.vectors(number)[0], queries[row]) if side else (old.vectors(number)[0], cut[row])
                assert distance == pytest.approx(1 - vector @ query, abs=1e-5)


class TestRun:
    def test_reads_images_by_uri(self, tmp_path):
        images = tmp_path / "images"
        images.mkdir()
        with make_gallery(tmp_path / "g", 40, images=images) as gallery:
            run(gallery, ItemEncoder(new_encoder(), batch_size=7), strategy=STRATEGY, task_items=16)
            assert np.array_equal(gallery.vectors_of([item_id(n) for n in range(40)]), new_encoder().vectors(range(40)))

    def test_items_that_cannot_be_read_stay_on_their_old_vectors_and_are_listed(self, tmp_path):
        images = tmp_path / "images"
        images.mkdir()
        queries = query_vectors()
        with make_gallery(tmp_path / "g", 60, images=images) as gallery:
            Path(gallery.get(item_id(7)).uri).unlink()
            Path(gallery.get(item_id(9)).uri).write_bytes(b"this is no image")
            report = run(gallery, ItemEncoder(new_encoder()), strategy=STRATEGY, task_items=16)
            assert report.reason == "complete"
            assert report.encoded == 58
            assert [(item, attempts) for item, attempts, _ in report.failures] == [(item_id(7), 3), (item_id(9), 3)]
            assert "item-00007.png" in report.failures[0][2]
            snapshot = gallery.snapshot()
            assert sorted(snapshot.old.nums.tolist()) == [7, 9]
            assert np.array_equal(snapshot.old.vectors_of(np.array([7, 9])), old_encoder().vectors([7, 9]))
            found = serve(gallery).search(vectors=queries, k=60)
            assert all(len(set(row)) == 60 for row in found.ids)

            with pytest.raises(UpgradeError, match=r"2 items could not be encoded.*item-00007"):
                finish(gallery)
            write_image(images, 7)
            gallery.store.retry_failed()
            assert run(gallery, ItemEncoder(new_encoder())).encoded == 1
            ended = finish(gallery, encoder=ItemEncoder(new_encoder()), accept_failed=True)
            assert (ended["items"], ended["pending"]) == (60, 1)
            assert [item.id for item in gallery.pending()] == [item_id(9)]
            assert gallery.verify().ok

    def test_a_vector_of_nan_fails_its_item_only(self, gallery):
        new = new_encoder()

        def encode(items):
            vectors = new(items)
            vectors[[item.num == 5 for item in items]] = np.nan
            return vectors

        report = run(gallery, ItemEncoder(encode, space=new.space()), strategy=STRATEGY, task_items=100)
        assert [failure[0] for failure in report.failures] == [item_id(5)]
        assert report.encoded == 299

    def test_stops_after_a_number_of_items_and_at_a_share_and_goes_on_later(self, gallery):
        first = run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=20, stop_after=50)
        assert (first.reason, first.encoded) == ("stop-after", 60)
        second = run(gallery, by_item(new_encoder()), stop_at_share=0.5)
        assert (second.reason, second.share) == ("stop-at-share", pytest.approx(160 / 300))
        third = run(gallery, by_item(new_encoder()))
        assert (third.reason, third.encoded, third.share) == ("complete", 140, 1)
        assert run(gallery, by_item(new_encoder())).encoded == 0

    def test_keeps_to_the_rate(self, gallery):
        report = run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=20, rate=400, stop_after=100)
        assert report.seconds >= 100 / 400
        assert report.rate <= 400

    def test_a_low_rate_commits_pieces_of_large_tasks(self, gallery, monkeypatch):
        monkeypatch.setattr("bowerbird.upgrade.run.TASK_SECONDS", 0.25)
        start = time.monotonic()
        seen = []
        report = run(
            gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=300, rate=40,
            progress=lambda count, now: seen.append(now.new_items) if not count else None,
            stop=lambda: time.monotonic() - start > 1.6,
        )  # fmt: skip
        assert report.reason == "stopped" and report.encoded >= 20
        assert seen == list(range(10, report.encoded + 1, 10))
        assert run(gallery, by_item(new_encoder())).share == 1 and gallery.verify().ok

    def test_hears_that_it_should_stop_while_it_waits_for_the_rate(self, gallery):
        start = time.monotonic()
        report = run(
            gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=20, rate=0.1,
            stop=lambda: time.monotonic() - start > 1,
        )  # fmt: skip
        assert (report.reason, report.encoded) == ("stopped", 0)
        assert time.monotonic() - start < 10

    def test_a_pause_stops_the_worker_and_a_paused_upgrade_is_not_run(self, gallery):
        def pause_at_half(count, now):
            if now.share >= 0.5 and now.state == "running":
                pause(gallery)

        report = run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=30, progress=pause_at_half)
        assert (report.reason, report.share) == ("paused", 0.5)
        with pytest.raises(UpgradeError, match="paused"):
            run(gallery, by_item(new_encoder()))
        resume(gallery)
        assert run(gallery, by_item(new_encoder())).reason == "complete"

    def test_an_interrupt_gives_the_task_back(self, gallery):
        calls = []

        def encode(items):
            calls.append(len(items))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return new_encoder()(items)

        with pytest.raises(KeyboardInterrupt):
            run(gallery, ItemEncoder(encode, space=new_encoder().space()), strategy=STRATEGY, task_items=50)
        assert status(gallery).tasks == {"done": 2, "free": 4}

    def test_uploads_during_the_upgrade_go_to_the_new_space_and_deletes_hold(self, gallery):
        new = new_encoder()

        def encode(items):
            if 1000 not in added:
                added.append(1000)
                gallery.add([item_id(1000)], new.vectors([1000]), space=new.fingerprint)
                gallery.delete([item_id(8)])
            return new(items)

        added: list[int] = []
        run(gallery, ItemEncoder(encode, space=new.space()), strategy=STRATEGY, task_items=50)
        finish(gallery)
        assert len(gallery) == 300
        assert item_id(1000) in gallery
        assert item_id(8) not in gallery

    def test_a_worker_stops_when_the_upgrade_ends_and_never_serves_the_next_one(self, gallery):
        other = FakeEncoder("other", 24, 1.0)

        def replace(count, now):
            if count == 0 and now.new_items == 100:
                rollback(gallery)
                begin(gallery, other.space(), strategy=STRATEGY, task_items=50)

        report = run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=50, progress=replace)
        assert (report.reason, report.encoded) == ("ended", 100)
        assert status(gallery).new_items == 0
        assert run(gallery, by_item(other)).share == 1

    def test_a_worker_stops_when_the_upgrade_is_rolled_back(self, gallery):
        def end(count, now):
            if count and now.new_items >= 100:
                rollback(gallery)

        report = run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=50, progress=end)
        assert (report.reason, report.encoded) == ("ended", 100)

    def test_a_dead_workers_task_is_taken_over_without_waiting_for_its_lease(self, gallery):
        import socket

        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=100)
        gallery.store.lease_task(f"{socket.gethostname()}:{2**22 + 1}:dead", 3600)
        assert run(gallery, by_item(new_encoder())).share == 1


class TestRefusals:
    def test_another_target_while_an_upgrade_is_under_way(self, gallery):
        begin(gallery, new_encoder().space(), strategy=STRATEGY)
        other = FakeEncoder("other", 24, 1.0)
        with pytest.raises(UpgradeError, match=r"fake:new.*running.*fake:other"):
            run(gallery, by_item(other))
        with pytest.raises(UpgradeError, match="finish it or roll it back"):
            begin(gallery, other.space(), strategy=STRATEGY)
        with pytest.raises(UpgradeError, match="cannot replace"):
            run(gallery, by_item(new_encoder()), strategy="compatible")

    def test_the_space_that_is_served_already(self, gallery):
        with pytest.raises(UpgradeError, match="already serves"):
            begin(gallery, old_encoder().space(), strategy=STRATEGY)

    def test_an_encoder_of_the_same_name_and_size_that_is_not_the_one(self, gallery):
        liar = FakeEncoder("old", 16, 2.0, flavour="swapped")
        with pytest.raises(SpaceError, match="not the one"):
            begin(gallery, new_encoder().space(), strategy=STRATEGY, old_encoder=by_item(liar))
        begin(gallery, new_encoder().space(), strategy=STRATEGY, old_encoder=by_item(old_encoder()), task_items=100)
        swapped = FakeEncoder("new", 24, 1.0, flavour="swapped")
        run(gallery, by_item(new_encoder()), stop_after=100)
        with pytest.raises(SpaceError, match="not the one"):
            run(gallery, by_item(swapped))
        assert status(gallery).new_items == 100, "nothing of the foreign encoder was written"
        run(gallery, by_item(new_encoder()))
        with pytest.raises(SpaceError, match="not the one"):
            finish(gallery, encoder=by_item(swapped))

    def test_a_foreign_encoder_for_a_space(self):
        with pytest.raises(SpaceError, match="foreign"):
            ItemEncoder(new_encoder(), space=old_encoder().space())
        with pytest.raises(InputError, match="no identity"):
            ItemEncoder(lambda items: items)
        with pytest.raises(InputError, match="must be loaded"):
            ItemEncoder("runs/new")

    def test_an_encoder_that_returns_another_width(self, gallery):
        space = Space("wide", "wide", 24)
        with pytest.raises(SpaceError, match=r"\((\d+), 16\).*\(\1, 24\)"):
            run(gallery, ItemEncoder(old_encoder().__call__, space=space), strategy=STRATEGY)
        assert set(status(gallery).tasks) == {"free"}

    def test_unknown_names_are_suggested(self, gallery):
        with pytest.raises(UnknownNameError, match="world:two-queries"):
            begin(gallery, new_encoder().space(), strategy="two-querys")
        with pytest.raises(UnknownNameError, match="core:uncertainty"):
            begin(gallery, new_encoder().space(), strategy=STRATEGY, order="uncertanty")

    def test_verbs_without_an_upgrade(self, gallery):
        for verb in (status, pause, resume, finish, rollback):
            with pytest.raises(UpgradeError, match="no upgrade is under way"):
                verb(gallery)

    @pytest.mark.parametrize("setting", [{"rate": 0}, {"stop_after": 0}, {"stop_at_share": 1.5}, {"watch_every": 0}])
    def test_limits_out_of_range(self, gallery, setting):
        with pytest.raises(InputError, match=next(iter(setting))):
            run(gallery, by_item(new_encoder()), strategy=STRATEGY, **setting)
        assert gallery.store.upgrade_state() is None


class TestEnds:
    def test_finish_waits_for_every_item(self, gallery):
        run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=50, stop_after=100)
        with pytest.raises(UpgradeError, match="200 of 300 items"):
            finish(gallery, accept_failed=True)

    def test_finish_refuses_a_gallery_that_does_not_verify(self, gallery):
        run(gallery, by_item(new_encoder()), strategy=STRATEGY)
        sid = gallery.snapshot().new.segments[0][0].info.sid
        path = gallery.path / "seg" / f"{sid}.f32"
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        with pytest.raises(UpgradeError, match="does not pass"):
            finish(gallery)
        assert status(gallery).state == "running"

    @pytest.mark.parametrize("moved", [0, 100, 300])
    def test_rollback_gives_the_exact_old_results_and_vectors(self, gallery, moved):
        queries = query_vectors()[old_encoder().fingerprint]
        before, vectors = gallery.search(queries, 25), stored(gallery)
        begin(gallery, new_encoder().space(), strategy=STRATEGY, order="core:uncertainty", task_items=50)
        if moved:
            run(gallery, by_item(new_encoder()), stop_after=moved)
        assert rollback(gallery) == 0
        assert same(gallery.search(queries, 25), before)
        assert stored(gallery) == vectors
        assert gallery.verify().ok
        assert run(gallery, by_item(new_encoder()), strategy=STRATEGY).share == 1, "and it can be begun again"

    def test_rollback_needs_the_old_encoder_for_what_came_meanwhile(self, gallery):
        begin(gallery, new_encoder().space(), strategy=STRATEGY)
        gallery.add([item_id(777)], new_encoder().vectors([777]), space=new_encoder().fingerprint)
        with pytest.raises(UpgradeError, match="added or edited"):
            rollback(gallery)
        with pytest.raises(UpgradeError, match="old space"):
            rollback(gallery, encode_old=by_item(new_encoder()))
        assert rollback(gallery, encode_old=by_item(old_encoder())) == 0
        assert np.array_equal(gallery.vectors_of([item_id(777)]), old_encoder().vectors([777]))


def test_the_five_verbs_on_one_object(tmp_path):
    make_gallery(tmp_path / "g", 240).close()
    old, new = old_encoder(), new_encoder()
    with Upgrade(tmp_path / "g", by_item(new), old=by_item(old)) as upgrade:
        plan = upgrade.plan(label_key="label", sample=240, strategies=[STRATEGY])
        assert plan.recommendation.decision == "upgrade"
        service = upgrade.serve()
        queries = query_vectors()
        before = service.search(vectors=queries)
        upgrade.begin(strategy=plan.recommendation.strategy, task_items=60)
        assert same(service.search(vectors=queries), before)
        report = upgrade.run()
        assert report.encoded == 240
        assert upgrade.status().complete
        assert upgrade.finish()["canary"] > 0.999
        assert upgrade.gallery.spaces()[0].fingerprint == new.fingerprint


def test_a_process_that_serves_imports_neither_torch_nor_pydantic_nor_faiss():
    code = (
        "import bowerbird.upgrade, sys; print([m for m in ('torch', 'pydantic', 'faiss', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
