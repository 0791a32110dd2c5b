"""Watching an upgrade: measurements on frozen queries, and the rule that pauses it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from upgrade_world import FakeEncoder, by_item, label_of, make_gallery, new_encoder, old_encoder, query_vectors

from bowerbird.errors import InputError, UpgradeError
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision, cmc
from bowerbird.upgrade import Upgrade, WatchSet, begin, resume, rollback, status
from bowerbird.upgrade.run import run
from bowerbird.upgrade.watch import history, watch

STRATEGY = "world:two-queries"
QUERIES = range(10_000, 10_040)


@pytest.fixture(autouse=True)
def world():
    get_registry().register_module("world", sys.modules["upgrade_world"])
    yield
    get_registry().unregister("world")


@pytest.fixture
def gallery(tmp_path):
    with make_gallery(tmp_path / "g", 240) as gallery:
        yield gallery


def watched(new: FakeEncoder | None = None, *, labels: bool = True) -> WatchSet:
    old, new = old_encoder(), new or new_encoder()
    names = [label_of(n) for n in QUERIES] if labels else None
    return WatchSet(old.vectors(QUERIES), new.vectors(QUERIES), names, "label" if labels else None)


def test_at_the_start_nothing_differs_from_the_frozen_results(gallery):
    begin(gallery, new_encoder().space(), strategy=STRATEGY, watch_set=watched())
    entry = watch(gallery)
    assert (entry.share, entry.nfr, entry.pfr, entry.churn) == (0, 0, 0, 0)
    assert len(entry.old_distances) == 3
    assert entry.new_distances == ()


def test_measures_what_serving_gives(gallery):
    begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=60, watch_set=watched())
    labels = [label_of(n) for n in range(240)]
    relevance = Relevance.from_labels([label_of(n) for n in QUERIES], labels)
    old = RankedList.from_scores(old_encoder().vectors(QUERIES) @ old_encoder().vectors(range(240)).T)
    new = RankedList.from_scores(new_encoder().vectors(QUERIES) @ new_encoder().vectors(range(240)).T)
    run(gallery, by_item(new_encoder()))
    entry = watch(gallery)
    assert entry.quality == pytest.approx(average_precision(new, relevance, "at_k", 100).mean())
    before, after = cmc(old, relevance, 1).values, cmc(new, relevance, 1).values
    assert entry.r1 == pytest.approx(after.mean())
    assert entry.nfr == pytest.approx(np.mean((before == 1) & (after == 0)))
    assert entry.pfr == pytest.approx(np.mean((before == 0) & (after == 1)))
    same = [len(set(a[:10]) & set(b[:10])) / 10 for a, b in zip(old.ids.tolist(), new.ids.tolist(), strict=True)]
    assert entry.churn == pytest.approx(1 - np.mean(same))
    assert entry.old_distances == ()


def test_an_item_that_is_a_query_is_not_its_own_result(gallery):
    own = range(24)
    ids = [f"item-{n:05d}" for n in own]
    queries = WatchSet(old_encoder().vectors(own), new_encoder().vectors(own), [label_of(n) for n in own], "label", ids)
    begin(gallery, new_encoder().space(), strategy=STRATEGY, watch_set=queries)
    relevance = Relevance.from_labels(
        [label_of(n) for n in own], [label_of(n) for n in range(240)], query_ids=list(own), gallery_ids=list(range(240))
    )
    ranked = RankedList.from_scores(old_encoder().vectors(own) @ old_encoder().vectors(range(240)).T)
    assert watch(gallery).r1 == pytest.approx(cmc(ranked, relevance, 1).mean()) != 1


def test_the_stop_rule_pauses_the_run_that_watches(gallery):
    worse = FakeEncoder("worse", 24, 8.0)
    report = run(gallery, by_item(worse), strategy=STRATEGY, task_items=24, watch_set=watched(worse),
                 watch_every=0.1, max_nfr=0.02)  # fmt: skip
    assert report.reason == "stop-rule"
    assert report.share < 1
    assert report.watched[-1].nfr > 0.02
    assert all(entry.nfr <= 0.02 for entry in report.watched[:-1])
    assert status(gallery).state == "paused"
    with pytest.raises(UpgradeError, match="paused"):
        run(gallery, by_item(worse))
    resume(gallery)
    assert run(gallery, by_item(worse)).reason == "complete"


def test_the_stop_rule_works_from_another_process_while_a_run_goes_on(gallery):
    worse = FakeEncoder("worse", 24, 8.0)
    begin(gallery, worse.space(), strategy=STRATEGY, task_items=24, watch_set=watched(worse))

    def another_process(count, now):
        if count == 0 and now.share >= 0.5 and now.state == "running":
            with Gallery.open(gallery.path) as other:
                assert watch(other, max_nfr=0.0).stopped

    report = run(gallery, by_item(worse), progress=another_process)
    assert report.reason == "paused"
    assert 0.5 <= report.share < 1


def test_a_run_within_the_rule_ends_and_its_history_is_kept(gallery):
    report = run(gallery, by_item(new_encoder()), strategy=STRATEGY, task_items=24, watch_set=watched(),
                 watch_every=0.25, max_nfr=1.0)  # fmt: skip
    assert report.reason == "complete"
    shares = [entry.share for entry in report.watched]
    assert shares == sorted(set(shares))
    assert len(shares) == 4
    assert shares[-1] == 1
    assert [entry["share"] for entry in history(gallery)] == shares
    rollback(gallery)
    assert len(history(gallery)) == len(shares), "the measurements outlive the upgrade"


def test_a_torn_line_of_a_killed_process_is_dropped(gallery):
    upgrade = begin(gallery, new_encoder().space(), strategy=STRATEGY, watch_set=watched())
    watch(gallery)
    path = gallery.path / "watch" / f"{upgrade.id}.jsonl"
    path.write_bytes(path.read_bytes() + b'{"share": 0.')
    assert len(history(gallery)) == 1
    watch(gallery)
    assert len(history(gallery)) == 2


def test_without_labels_changes_of_the_first_result_count_as_flips(gallery):
    begin(gallery, new_encoder().space(), strategy=STRATEGY, watch_set=watched(labels=False))
    assert watch(gallery).nfr == 0
    run(gallery, by_item(new_encoder()))
    entry = watch(gallery)
    old, new = ((e.vectors(QUERIES) @ e.vectors(range(240)).T).argmax(axis=1) for e in (old_encoder(), new_encoder()))
    assert entry.nfr == pytest.approx(np.mean(old != new))
    assert np.isnan(entry.quality)
    assert entry.to_dict()["quality"] is None


def test_the_object_freezes_items_of_the_gallery_as_queries(gallery):
    upgrade = Upgrade(gallery, by_item(new_encoder()))
    report = upgrade.run(strategy=STRATEGY, label_key="label", task_items=60, watch_every=0.5)
    assert report.watched[-1].r1 > report.watched[-1].pfr > 0
    assert upgrade.history()[-1]["share"] == 1


def test_an_upgrade_whose_queries_cannot_be_written_down_does_not_begin(gallery, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("bowerbird.gallery.storage.write_atomically", full)
        with pytest.raises(OSError, match="No space left"):
            begin(gallery, new_encoder().space(), strategy=STRATEGY, watch_set=watched())
    assert gallery.store.upgrade_state() is None and gallery.verify().ok
    begin(gallery, new_encoder().space(), strategy=STRATEGY, watch_set=watched())
    assert watch(gallery).share == 0


def test_what_cannot_be_watched_is_refused(gallery):
    with pytest.raises(UpgradeError, match="no upgrade is under way"):
        watch(gallery)
    begin(gallery, new_encoder().space(), strategy=STRATEGY)
    with pytest.raises(UpgradeError, match="without queries to watch"):
        watch(gallery)
    with pytest.raises(InputError, match="max_nfr"):
        watch(gallery, max_nfr=2)
    rollback(gallery)
    queries = query_vectors(count=3)
    old, new = queries[old_encoder().fingerprint], queries[new_encoder().fingerprint]
    for bad, message in (
        (WatchSet(old, new[:2]), "2 new"),
        (WatchSet(old, new, ["a"], "label"), "1 labels"),
        (WatchSet(old, new, ["a", "b", "c"]), "label_key"),
        (WatchSet(old[:0], new[:0]), "at least one"),
    ):
        with pytest.raises(InputError, match=message):
            begin(gallery, new_encoder().space(), strategy=STRATEGY, watch_set=bad)
    assert gallery.store.upgrade_state() is None
