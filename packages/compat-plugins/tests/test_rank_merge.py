"""``compat:rank-merge`` as a strategy of an upgrade."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bowerbird.errors import SpaceError, UpgradeError
from bowerbird.gallery.space import Space
from bowerbird.registry import get_registry
from bowerbird.testing import UpgradeContract
from bowerbird_compat.rank_merge import RankMerge

OLD = Space(fingerprint="a" * 64, encoder="old", dim=3)
NEW = Space(fingerprint="b" * 64, encoder="new", dim=5)


class TestContract(UpgradeContract):
    name = "compat:rank-merge"


def test_the_bare_name_is_enough():
    assert get_registry().get("retriever", "rank-merge", role="upgrade").name == "compat:rank-merge"


def test_the_old_part_is_searched_with_the_old_encoders_queries_as_they_are():
    queries = {OLD.fingerprint: np.eye(3, dtype=np.float32), NEW.fingerprint: np.eye(5, dtype=np.float32)[:3]}
    assert RankMerge().old_part_queries(queries, OLD, NEW) is queries[OLD.fingerprint]
    with pytest.raises(SpaceError, match=r"old encoder old \(space a{12}\); got spaces b{12}"):
        RankMerge().old_part_queries({NEW.fingerprint: queries[NEW.fingerprint]}, OLD, NEW)


def test_any_two_spaces_of_one_kind_of_distance_are_served_and_others_are_refused():
    RankMerge().check(None, OLD, NEW)
    other = replace(NEW)
    object.__setattr__(other, "metric", "l2")
    with pytest.raises(UpgradeError, match="old uses cosine and new uses l2"):
        RankMerge().check(None, OLD, other)


def test_a_process_that_serves_needs_no_torch():
    code = (
        "import sys, bowerbird_compat.rank_merge, bowerbird_compat.mixed_gallery, bowerbird_compat.plugin\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_forecast_on_one_scale_keeps_both_ends_and_loses_the_sag_of_plain_distances():
    """Both models see the same content, but all distances of the new one are larger."""
    from bowerbird.gallery.merge import merge_by_zscore
    from bowerbird.upgrade.forecast import Forecaster, PairedVectors

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 12))
    labels = np.arange(240) % 30
    items, queries = centres[labels] + rng.normal(size=(240, 12)), centres + rng.normal(size=(30, 12))

    def encode(rows, common, noise):
        rows = rows + noise * rng.normal(size=rows.shape)
        return np.concatenate([rows, np.full((len(rows), 1), common)], axis=1)

    paired = PairedVectors(
        encode(items, 9, 0.6),
        encode(items, 1, 0),
        encode(queries, 9, 0.6),
        encode(queries, 1, 0),
        labels,
        np.arange(30),
    )
    forecaster, order = Forecaster(paired), rng.permutation(240)
    plain = forecaster.curve("plain", paired.query_old, order)
    scaled = forecaster.curve("scaled", paired.query_old, order, merger=merge_by_zscore)
    for curve in (plain, scaled):
        assert curve.quality[0] == pytest.approx(forecaster.old_old.mean())
        assert curve.quality[-1] == pytest.approx(forecaster.new_new.mean())
    assert min(scaled.quality) > min(plain.quality)
    assert scaled.area > plain.area + 0.02
