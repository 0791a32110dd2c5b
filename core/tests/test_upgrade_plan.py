"""Orders, forecasts and the recommendation: what is known before an upgrade begins."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from upgrade_world import (
    FakeEncoder,
    by_item,
    item_id,
    label_of,
    make_gallery,
    new_encoder,
    old_encoder,
    query_vectors,
    write_image,
)

from bowerbird.errors import DataError, InputError, PluginError, SpaceError, UnknownNameError, UpgradeError
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.retrieval.intervals import Interval
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision
from bowerbird.upgrade import ItemEncoder, PairedVectors, QuerySet, backfill_order, begin
from bowerbird.upgrade.backfill import backfill_plan
from bowerbird.upgrade.forecast import Forecaster
from bowerbird.upgrade.orders import (
    class_means,
    class_probabilities,
    random_order,
    spherical_kmeans,
    uncertainty_order,
    uncertainty_scores,
)
from bowerbird.upgrade.plan import plan
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import serve
from bowerbird.upgrade.tables import plan_table
from bowerbird.upgrade.verdict import queries_for_precision, queries_needed

STRATEGY = "world:two-queries"


def _text(made):
    console = Console(file=io.StringIO(), width=200)
    console.print(plan_table(made))
    return console.file.getvalue()


with np.load(Path(__file__).parent / "data" / "ract" / "backfill_order.npz") as _file:
    GOLDEN = dict(_file)


@pytest.fixture(autouse=True)
def world():
    get_registry().register_module("world", sys.modules["upgrade_world"])
    yield
    get_registry().unregister("world")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    with make_gallery(tmp_path_factory.mktemp("plan") / "g", 240) as gallery:
        yield gallery


class TestOrders:
    @pytest.mark.parametrize(
        ("strategy", "scores", "order"),
        [
            ("entropy", "entropy", "order_entropy"),
            ("least_confidence", "least_confidence", "order_least_confidence"),
            ("margin", "margin_of_confidence", "order_margin"),
        ],
    )
    def test_reproduce_the_reference_numbers(self, strategy, scores, order):
        old, centers, temperature = GOLDEN["gallery_old"], GOLDEN["class_centers"], float(GOLDEN["temperature"])
        probabilities = class_probabilities(old, centers, temperature)
        np.testing.assert_allclose(probabilities, GOLDEN["probabilities"], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(uncertainty_scores(probabilities, strategy), GOLDEN[scores], rtol=1e-9, atol=1e-10)
        np.testing.assert_array_equal(backfill_order(old, centers, strategy, temperature), GOLDEN[order])

    @given(n=st.integers(1, 60), c=st.integers(1, 6), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_are_permutations_that_do_not_depend_on_the_scale_of_vectors(self, n, c, seed):
        rng = np.random.default_rng(seed)
        old, centers = rng.normal(size=(n, 5)), rng.normal(size=(c, 5))
        for strategy in ("entropy", "least_confidence", "margin", "random"):
            order = backfill_order(old, centers, strategy, 0.2, seed)
            assert sorted(order.tolist()) == list(range(n))
            if strategy != "random":
                scaled = backfill_order(4 * old, 0.5 * centers, strategy, 0.2)
                np.testing.assert_array_equal(order, scaled)
        for order in (random_order(range(n), seed=seed), uncertainty_order(range(n), old, seed=seed)):
            assert sorted(order.tolist()) == list(range(n))

    def test_extremes_of_uncertainty(self):
        uniform, one_hot = np.full((1, 4), 0.25), np.eye(4)[:1]
        for strategy, most in (("entropy", np.log(4)), ("least_confidence", 0.75), ("margin", 1.0)):
            assert uncertainty_scores(uniform, strategy)[0] == pytest.approx(most)
            assert uncertainty_scores(one_hot, strategy)[0] == pytest.approx(0)

    def test_ties_stay_in_order_of_position(self):
        np.testing.assert_array_equal(backfill_order(np.ones((5, 3)), np.eye(3)), np.arange(5))

    def test_items_between_two_classes_come_before_those_near_one(self):
        centers = np.eye(2)
        old = np.array([[1.0, 0.05], [1.0, 1.0], [0.0, 1.0], [1.0, 0.9]])
        np.testing.assert_array_equal(backfill_order(old, centers)[:2], [1, 3])

    def test_kmeans_finds_separated_clusters_and_is_the_same_for_the_same_seed(self):
        rng = np.random.default_rng(0)
        centers = np.eye(6)[:4] * 5
        points = np.repeat(centers, 30, axis=0) + rng.normal(size=(120, 6)) * 0.3
        found = spherical_kmeans(points, 4, seed=3)
        np.testing.assert_array_equal(found, spherical_kmeans(points, 4, seed=3))
        assert (found @ (centers / 5).T).max(axis=1).min() > 0.98
        assert len(set((found @ centers.T).argmax(axis=1))) == 4

    def test_class_means_leave_items_without_a_label_out(self):
        means = class_means(np.array([[1.0, 0], [0, 2.0], [3.0, 0]]), ["b", "a", None])
        np.testing.assert_allclose(means, [[0, 1], [1, 0]])

    def test_refuse_what_they_cannot_use(self):
        with pytest.raises(UnknownNameError, match="entropy"):
            backfill_order(np.ones((2, 2)), np.ones((1, 2)), "entropi")
        with pytest.raises(InputError, match="temperature"):
            backfill_order(np.ones((2, 2)), np.ones((1, 2)), temperature=0)
        with pytest.raises(InputError, match="width 3"):
            backfill_order(np.ones((2, 2)), np.ones((1, 3)))
        with pytest.raises(DataError, match="row 1"):
            backfill_order(np.array([[1.0, 2], [np.nan, 1]]), np.ones((1, 2)))

    def test_of_a_gallery_use_its_labels_and_its_settings_are_checked(self, tmp_path):
        with make_gallery(tmp_path / "g", 120) as gallery:
            by_label = backfill_plan(gallery, "uncertainty", label_key="label", settings={"strategy": "margin"})
            vectors = old_encoder().vectors(range(120))
            centers = class_means(vectors, [label_of(n) for n in range(120)])
            np.testing.assert_array_equal(by_label, backfill_order(vectors, centers, "margin", 0.1))
            assert sorted(backfill_plan(gallery, "core:random", seed=5)) == list(range(120))
            with pytest.raises(InputError, match="temperatur"):
                backfill_plan(gallery, "uncertainty", settings={"temperatur": 1})
            with pytest.raises(InputError, match="no settings"):
                backfill_plan(gallery, "random", settings={"seed": 1})
            with pytest.raises(InputError, match="metadata key 'lable'"):
                backfill_plan(gallery, "uncertainty", label_key="lable")

    def test_a_plugin_order_that_is_no_permutation_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("bowerbird.upgrade.orders.random_order", lambda ids, old, **_: np.zeros(len(ids), int))
        get_registry()._targets.pop("bowerbird.upgrade.orders:random_order", None)
        with make_gallery(tmp_path / "g", 10) as gallery, pytest.raises(PluginError, match="no permutation"):
            backfill_plan(gallery, "random")
        get_registry()._targets.pop("bowerbird.upgrade.orders:random_order", None)


def paired(items: int = 300, queries: int = 80, new: FakeEncoder | None = None) -> PairedVectors:
    old, new = old_encoder(), new or new_encoder()
    g, q = range(items), range(10_000, 10_000 + queries)
    return PairedVectors(
        old.vectors(g),
        new.vectors(g),
        old.vectors(q),
        new.vectors(q),
        [label_of(n) for n in g],
        [label_of(n) for n in q],
    )


class TestForecast:
    def test_of_rank_merge_starts_at_the_old_and_ends_at_the_new_level(self):
        sample = paired()
        forecaster = Forecaster(sample)
        curve = forecaster.curve("x", sample.query_old, random_order(range(300)))
        assert curve.quality[0] == pytest.approx(forecaster.old_old.mean())
        assert curve.quality[-1] == pytest.approx(forecaster.new_new.mean())
        assert curve.nfr[0] == 0
        assert forecaster.full().quality[0] == forecaster.full().area == forecaster.old_old.mean()
        assert forecaster.switch_now(random_order(range(300))).quality[0] == pytest.approx(forecaster.new_old.mean())

    def test_of_identical_encoders_is_flat(self):
        sample = paired(new=old_encoder())
        curve = Forecaster(sample).curve("x", sample.query_old, random_order(range(300)))
        assert max(curve.quality) == pytest.approx(min(curve.quality))
        assert curve.max_nfr == 0

    def test_a_query_is_not_its_own_answer(self):
        sample = paired(60, 10)
        ids = [item_id(n) for n in range(60)]
        own = PairedVectors(
            sample.gallery_old, sample.gallery_new, sample.gallery_old[:10], sample.gallery_new[:10],
            sample.gallery_labels, sample.gallery_labels[:10], ids, ids[:10],
        )  # fmt: skip
        without = PairedVectors(**{**own.__dict__, "gallery_ids": None, "query_ids": None})
        assert Forecaster(own, "r1").old_old.mean() < Forecaster(without, "r1").old_old.mean() == 1

    def test_equals_what_is_measured_on_the_gallery(self, tmp_path):
        """The forecast from a sample of a quarter of the items, against the true curve on other queries."""
        count, labels = 400, [label_of(n) for n in range(400)]
        queries = query_vectors(50_000, 150)
        relevance = Relevance.from_labels([label_of(n) for n in range(50_000, 50_150)], labels)
        with make_gallery(tmp_path / "g", count) as gallery:
            made = plan(gallery, by_item(new_encoder()), label_key="label", sample=300, seed=1, strategies=[STRATEGY])
            begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=40, seed=9)
            service, measured = serve(gallery), []

            def measure(count=0, now=None):
                if count == 0:
                    found = service.search(vectors=queries, k=400)
                    measured.append(average_precision(RankedList(found.nums), relevance).mean())

            measure()
            run(gallery, by_item(new_encoder()), progress=measure)
        area = float(np.mean((np.array(measured[1:]) + measured[:-1]) / 2))
        assert len(measured) == 11
        assert made.curve(STRATEGY).area == pytest.approx(area, abs=0.03)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"gallery_new": np.ones((3, 24))}, "gallery_new has 3 rows"),
            ({"query_labels": ["a"]}, "query_labels has 1 rows"),
            ({"query_old": np.ones((10, 5))}, "width 16.*5"),
        ],
    )
    def test_vectors_that_do_not_pair_are_refused(self, change, message):
        with pytest.raises(DataError, match=message):
            PairedVectors(**{**paired(60, 10).__dict__, **change})

    def test_bad_rows_are_named(self):
        sample = paired(60, 10)
        bad = sample.gallery_new.copy()
        bad[4, 2] = np.nan
        with pytest.raises(InputError, match="gallery_new: row 4"):
            PairedVectors(**{**sample.__dict__, "gallery_new": bad})


class TestPlan:
    def test_recommends_the_strategy_with_the_largest_area_that_keeps_the_old_level(self, gallery):
        made = plan(gallery, by_item(new_encoder()), old_encoder=by_item(old_encoder()), label_key="label",
                    strategies=[STRATEGY, "core:compatible"], price_per_hour=3600.0)  # fmt: skip
        assert (made.recommendation.decision, made.recommendation.strategy) == ("upgrade", STRATEGY)
        assert made.gain.low > 0
        assert made.old_old.low < made.old_old.mean < made.old_old.high
        assert made.old["canary"] == pytest.approx(1, abs=1e-5)
        assert "relation" in made.curve("compatible").unavailable
        assert made.vector_bytes == 240 * 24 * 4
        assert made.hours == pytest.approx(240 / made.items_per_second / 3600)
        assert made.price == pytest.approx(240 / made.items_per_second)
        assert gallery.store.upgrade_state() is None

    def test_advises_against_an_encoder_that_is_worse(self, gallery):
        worse = FakeEncoder("worse", 24, 6.0)
        made = plan(gallery, by_item(worse), label_key="label", strategies=[STRATEGY])
        assert (made.recommendation.decision, made.recommendation.strategy) == ("do-not-upgrade", None)
        assert "worse" in made.recommendation.reason

    def test_advises_against_an_encoder_without_a_shown_gain_and_says_how_many_queries_would_settle_it(self, gallery):
        twin = FakeEncoder("twin-b", 16, 2.0)
        made = plan(gallery, by_item(twin), label_key="label", strategies=[STRATEGY], num_queries=60)
        assert made.recommendation.decision == "do-not-upgrade"
        assert made.recommendation.queries_needed > 60

    def test_a_sample_too_small_for_a_verdict_says_how_many_are_needed(self, gallery):
        made = plan(
            gallery, by_item(new_encoder()), label_key="label", sample=100, num_queries=20, strategies=[STRATEGY]
        )
        assert made.recommendation.decision == "no-verdict"
        assert str(made.recommendation.queries_needed) in made.recommendation.reason
        assert made.recommendation.queries_needed >= 30

    def test_says_how_far_the_areas_can_be_off_and_how_many_queries_would_bring_them_within_the_promise(self, gallery):
        few = plan(gallery, by_item(new_encoder()), label_key="label", num_queries=40, strategies=[STRATEGY])
        shown = re.search(r"(\d+) queries tell an area to \+-(\S+); about (\d+) would tell it to \+-0.03", _text(few))
        assert shown is not None
        queries, half, needed = int(shown[1]), float(shown[2]), int(shown[3])
        assert queries == few.queries and half > 0.03
        assert needed == pytest.approx(queries * (half / 0.03) ** 2, rel=0.05)

    def test_without_labels_it_still_says_what_it_costs(self, gallery):
        made = plan(gallery, by_item(new_encoder()), sample=50)
        assert made.recommendation.decision == "no-verdict"
        assert made.curves == ()
        assert made.items_per_second > 0

    def test_of_an_encoder_that_is_known_by_its_vectors_only(self, gallery):
        made = plan(gallery, paired=paired(), strategies=[STRATEGY])
        assert made.recommendation.strategy == STRATEGY
        assert made.hours is None

    def test_with_labelled_images_as_queries(self, tmp_path):
        images = tmp_path / "images"
        images.mkdir()
        with make_gallery(tmp_path / "g", 120, images=images) as gallery:
            Path(gallery.get(item_id(3)).uri).unlink()
            numbers = range(10_000, 10_040)
            queries = QuerySet([label_of(n) for n in numbers], images=[write_image(images, n) for n in numbers])
            with pytest.raises(InputError, match="old encoder"):
                plan(gallery, ItemEncoder(new_encoder()), label_key="label", queries=queries)
            made = plan(gallery, ItemEncoder(new_encoder()), old_encoder=ItemEncoder(old_encoder()), label_key="label",
                        queries=queries, strategies=[STRATEGY])  # fmt: skip
            assert (made.queries, made.sample, made.sample_failed) == (40, 119, 1)

    def test_is_plain_json(self, gallery, tmp_path):
        made = plan(
            gallery, by_item(new_encoder()), label_key="label", sample=100, strategies=[STRATEGY, "core:compatible"]
        )
        made.save(tmp_path / "plan.json")
        saved = json.loads((tmp_path / "plan.json").read_text())
        assert saved["recommendation"]["reason"] == made.recommendation.reason
        assert {curve["name"] for curve in saved["curves"]} >= {STRATEGY, "core:compatible", "full", "switch-now"}

    def test_refuses_what_cannot_be_planned(self, gallery, tmp_path):
        with pytest.raises(UpgradeError, match="already serves"):
            plan(gallery, by_item(old_encoder()), label_key="label")
        with pytest.raises(SpaceError, match="not the one"):
            liar = FakeEncoder("old", 16, 2.0, flavour="swapped")
            plan(gallery, by_item(new_encoder()), old_encoder=by_item(liar))
        with pytest.raises(InputError, match=r"'lable'.*even, label"):
            plan(gallery, by_item(new_encoder()), label_key="lable", sample=20)
        with pytest.raises(UnknownNameError, match="world:two-queries"):
            plan(gallery, by_item(new_encoder()), label_key="label", sample=60, strategies=["world:two-querys"])
        empty = Gallery.create(tmp_path / "empty", old_encoder().space())
        with pytest.raises(UpgradeError, match="empty"):
            plan(empty, by_item(new_encoder()))
        empty.close()


def test_an_interval_that_is_narrow_enough_needs_no_more_queries():
    assert queries_for_precision(Interval(0.5, 0.475, 0.525, 0.95), 200) is None
    assert queries_for_precision(Interval(0.5, 0.44, 0.56, 0.95), 200) == pytest.approx(800, abs=1)


def test_more_spread_needs_more_queries_and_more_gain_needs_fewer():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=400)
    assert queries_needed(noise * 0.2) > queries_needed(noise * 0.1) > 30
    assert queries_needed(noise * 0.2 + 0.3) == 30
