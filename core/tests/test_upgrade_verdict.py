"""The recommendation of a plan, on simulated queries whose truth is known."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.retrieval.intervals import bootstrap_interval
from bowerbird.retrieval.metrics import PerQuery
from bowerbird.upgrade.forecast import ForecastCurve
from bowerbird.upgrade.tables import unique_names
from bowerbird.upgrade.verdict import NO_REGRET, recommend

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def per_query(values) -> PerQuery:
    return PerQuery(values, np.ones(len(values), bool))


class World:
    """Q queries with a quality of their own in the old system; the others are that plus an effect plus noise."""

    def __init__(self, seed: int, queries: int = 400, noise: float = 0.1) -> None:
        self.rng, self.noise = np.random.default_rng(seed), noise
        self.old = self.rng.uniform(0.1, 0.6, queries)

    def system(self, effect: float) -> np.ndarray:
        return self.old + effect + self.noise * self.rng.normal(size=len(self.old))

    def curve(self, name: str, effects, *, flips: float = 0.05, merger: str = "core:distance") -> ForecastCurve:
        """``effects``: the truth at each share."""
        values = np.stack([self.system(effect) for effect in effects])
        areas = (values[1:] + values[:-1]).mean(axis=0) / 2
        worst = values.mean(axis=1).argmin()
        return ForecastCurve(
            name, SHARES, tuple(values.mean(axis=1)), (0.0, *([flips] * 4)), float(areas.mean()), merger=merger,
            gain=bootstrap_interval(areas - self.old), dip=bootstrap_interval(values[worst] - self.old),
        )  # fmt: skip

    def recommend(self, curves, gain: float = 0.2, order: str = "core:random"):
        return recommend(per_query(self.old), per_query(self.system(gain)), curves, order=order)[1]


RISING = (0.0, 0.05, 0.1, 0.15, 0.2)


def test_a_small_dip_that_the_queries_cannot_tell_from_none_does_not_cost_the_gain_of_the_way():
    world = World(0, queries=112)
    found = world.recommend([world.curve("compat:rank-merge", (0.0, -0.004, 0.05, 0.1, 0.15), merger="core:zscore")])
    assert (found.decision, found.strategy, found.merger) == ("upgrade", "compat:rank-merge", "core:zscore")


@pytest.mark.parametrize("seed", range(5))
def test_a_dip_that_the_queries_show_is_unsafe_whatever_the_area(seed):
    world = World(seed)
    deep, plain = (
        world.curve("x:deep", (0.0, -0.06, 0.3, 0.3, 0.3)),
        world.curve("x:plain", (0.0, 0.02, 0.04, 0.06, 0.2)),
    )
    assert deep.area > plain.area
    assert world.recommend([deep, plain]).strategy == "x:plain"
    alone = world.recommend([deep])
    assert alone.strategy == "full"
    assert "every strategy falls below the old level" in alone.reason
    assert "25% moved" in alone.reason


def test_a_large_dip_with_queries_too_few_to_show_it_is_not_trusted_either_and_the_reason_says_so():
    world = World(3, queries=40, noise=0.4)
    while True:  # the draw of such noise that looks like a large dip
        curve = world.curve("x:noisy", (0.0, -0.05, 0.1, 0.2, 0.2))
        if curve.dip.mean < -0.03 and curve.dip.high > -NO_REGRET:
            break
    found = world.recommend([curve], gain=0.5)
    assert found.strategy == "full"
    assert "which more queries might clear" in found.reason


def test_equal_areas_are_settled_by_flips_and_larger_ones_are_not():
    world = World(1, noise=0.0)
    calm = world.curve("x:calm", (0.0, 0.05, 0.098, 0.15, 0.2), flips=0.01)
    wild, best = world.curve("x:wild", RISING, flips=0.2), world.curve("x:best", (0.0, 0.1, 0.2, 0.2, 0.2), flips=0.3)
    assert world.recommend([wild, calm]).strategy == "x:calm"
    assert world.recommend([wild, calm, best]).strategy == "x:best"


def test_full_is_advised_where_nothing_is_better_on_the_way_than_waiting():
    world = World(2, noise=0.0)
    found = world.recommend([world.curve("x:late", (0.0, -0.009, -0.009, -0.009, 0.01))])
    assert (found.decision, found.strategy) == ("upgrade", "full")
    assert "waiting until the end" in found.reason


def test_the_reason_names_strategy_merger_order_and_numbers():
    world = World(4)
    reason = world.recommend([world.curve("compat:rank-merge", RISING, merger="core:zscore")]).reason
    assert "rank-merge merged by zscore, order random" in reason
    assert len(re.findall(r"[+-]0\.\d{4} \[[+-]0\.\d{4}, [+-]0\.\d{4}\]", reason)) == 3, reason


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-0.1, 0.1), st.floats(0.05, 0.3))
def test_what_is_recommended_is_not_shown_to_fall_below_the_old_level(seed, dip, noise):
    world = World(seed, queries=100, noise=noise)
    curve = world.curve("x:one", (0.0, dip, 0.1, 0.15, 0.2))
    if world.recommend([curve]).strategy == "x:one":
        assert curve.dip.high >= -NO_REGRET
        assert curve.gain.mean > 0


def test_over_many_draws_a_strategy_without_regret_is_rarely_refused_and_a_bad_one_rarely_taken():
    taken = dict.fromkeys((0.0, -0.06), 0)
    for effect in taken:
        for seed in range(60):
            world = World(seed, queries=150)
            taken[effect] += world.recommend([world.curve("x:one", (0.0, effect, 0.1, 0.15, 0.2))]).strategy == "x:one"
    assert taken[0.0] >= 57
    assert taken[-0.06] <= 3


def test_names_are_shortened_only_where_that_leaves_no_two_alike():
    assert unique_names(["compat:adapter", "core:full", "full", "x:a", "y:a"]) == {
        "compat:adapter": "adapter", "core:full": "core:full", "full": "full", "x:a": "x:a", "y:a": "y:a"
    }  # fmt: skip
