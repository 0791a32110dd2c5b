"""Transforms of strategies when an upgrade begins: fitted, checked, registered; and settings that are fixed then."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from upgrade_world import by_item, make_gallery, new_encoder, old_encoder, query_vectors

from bowerbird.errors import SpaceError, UnknownNameError, UpgradeError
from bowerbird.gallery.transform import VectorTransform
from bowerbird.hookspecs import hookimpl
from bowerbird.records import RetrieverRecord
from bowerbird.registry import get_registry
from bowerbird.upgrade import Upgrade, begin
from bowerbird.upgrade.fitting import fit_transform
from bowerbird.upgrade.serve import serve


class Fitted:
    needs_old_encoder = False
    merger = "core:distance"
    transform_direction = "query"

    def check(self, gallery, old, new):
        return None

    def fit(self, pairs, *, seed=0):
        weight = np.linalg.lstsq(pairs.new, pairs.old, rcond=None)[0].T
        return VectorTransform.linear(
            pairs.new_space.fingerprint, pairs.old_space.fingerprint, weight, evidence={"fitted_on": len(pairs)}
        )

    def old_part_queries(self, queries, old, new, transform):
        return transform(queries[new.fingerprint])


@pytest.fixture(autouse=True)
def world():
    module = ModuleType("fitting_plugin")
    module.BOWERBIRD_API = "1.0"

    @hookimpl
    def bowerbird_retrievers():
        yield RetrieverRecord(
            name="fitting:map", role="upgrade", target="test_upgrade_fitting:Fitted", summary="For tests."
        )

    module.bowerbird_retrievers = bowerbird_retrievers
    get_registry().register_module("fitting", module)
    get_registry().register_module("world", sys.modules["upgrade_world"])
    yield
    get_registry().unregister("fitting")
    get_registry().unregister("world")


@pytest.fixture
def gallery(tmp_path):
    with make_gallery(tmp_path / "g", 200) as gallery:
        yield gallery


def test_a_map_is_fitted_registered_and_serves_queries_of_the_new_encoder_alone(gallery):
    new = new_encoder()
    upgrade = Upgrade(gallery, by_item(new))
    upgrade.begin(strategy="fitting:map", task_items=50)
    made = gallery.transform(new.fingerprint, old_encoder().fingerprint)
    assert made is not None and made.evidence["fitted_on"] == 200
    queries = {new.fingerprint: query_vectors()[new.fingerprint]}
    found = serve(gallery).search(vectors=queries, k=5)
    expected = gallery.search({old_encoder().fingerprint: made(queries[new.fingerprint])}, 5)
    assert found.ids == expected.ids
    upgrade.run()
    upgrade.finish()
    assert serve(gallery).search(vectors=queries, k=5).ids == gallery.search(queries[new.fingerprint], 5).ids


def test_a_given_map_is_checked_for_direction_spaces_and_its_own_verdict(gallery):
    new = by_item(new_encoder())
    good = fit_transform(gallery, new, "fitting:map")
    turned = VectorTransform.linear(good.target, good.source, np.eye(24, 16))
    foreign = replace(good, source="f" * 64)
    poor = replace(good, evidence={"usable": False, "verdict": "not usable", "sentence": "It finds nothing."})
    for transform, kind, message in (
        (turned, SpaceError, "goes the other way"),
        (foreign, SpaceError, "other spaces"),
        (poor, UpgradeError, r"It finds nothing\..*--accept-poor-transform"),
        (None, UpgradeError, "--transform FILE"),
    ):
        with pytest.raises(kind, match=message):
            begin(gallery, new.space, strategy="fitting:map", transform=transform)
        assert gallery.store.upgrade_state() is None
    with pytest.raises(UpgradeError, match="uses no transform"):
        begin(gallery, new.space, strategy="world:two-queries", transform=good)
    begin(gallery, new.space, strategy="fitting:map", transform=poor, accept_poor_transform=True)


def test_settings_that_an_upgrade_was_begun_with_agree_or_are_refused(gallery):
    upgrade = Upgrade(gallery, by_item(new_encoder()))
    with pytest.raises(UnknownNameError, match="core:zscore"):
        upgrade.begin(strategy="world:two-queries", merger="zscor")
    upgrade.begin(strategy="world:two-queries", merger="proportional", seed=3, task_items=50)
    assert gallery.snapshot().upgrade.merger == "core:proportional"
    for setting in ({"order": "uncertainty"}, {"merger": "core:distance"}, {"seed": 4}, {"task_items": 7},
                    {"strategy": "core:full"}, {"label_key": "label"}):  # fmt: skip
        with pytest.raises(UpgradeError, match=f"has {next(iter(setting))} .* cannot replace it"):
            upgrade.run(**setting)
    report = upgrade.run(order="random", merger="proportional", seed=3, strategy="two-queries")
    assert report.reason == "complete"
