"""Numbers of published evaluation scripts, through our functions. Sources: data/upgrade-evaluation/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bowerbird import retrieval as R
from bowerbird.testing.golden import assert_close, load_golden

DATA = Path(__file__).parent / "data" / "upgrade-evaluation"


def golden(name: str) -> dict:
    return load_golden(DATA / f"{name}.npz")


def unpadded(rows: np.ndarray) -> list[list[int]]:
    return [[int(i) for i in row if i >= 0] for row in rows]


@pytest.mark.parametrize("name", ["cmc_map_disjoint", "cmc_map_self_gallery", "cmc_map_ties", "cmc_map_ties_self"])
def test_cmc_and_tie_grouped_map_are_those_of_the_bct_evaluation(name):
    g = golden(name)
    ranked = R.RankedList.from_distances(g["distance"])
    rel = R.Relevance.from_labels(g["query_ids"], g["gallery_ids"], exclude_self=g["self_excluded"])
    ks = range(1, len(g["cmc_first_match"]) + 1)
    first = R.cmc(ranked, rel, ks)
    assert first.num_valid == g["num_valid_queries"]
    assert_close(first.mean(), g["cmc_first_match"])
    assert_close(R.cmc(ranked, rel, ks, form="all").mean(), g["cmc_all_matches"])
    assert_close(R.average_precision(ranked, rel, "ties").mean(), g["mean_ap"])


def test_map_at_k_is_that_of_the_landmarks_evaluation():
    g = golden("map_at_k")
    ap = R.average_precision(
        R.RankedList(g["ranked_indices"]), R.Relevance(g["ground_truth_padded"]), kind="at_k", k=g["topk"]
    )
    assert_close(ap.values, g["ap_per_query"])
    assert_close(ap.mean(), g["map_at_k"])


def test_revisited_oxford_set_ups_are_those_of_the_published_protocol():
    g = golden("revisited_oxford")
    result = R.revisited_protocol(
        R.RankedList(g["ranks_db_by_query"].T),
        unpadded(g["easy_padded"]),
        g["hard_padded"],
        g["junk_padded"],
        ks=[1, 5, 10],
    )
    for name in ("easy", "medium", "hard"):
        assert_close(result[name].ap.values, g[f"aps_{name}"])
        assert_close(result[name].ap.mean(), g[f"map_{name}"])
        assert_close(result[name].precision.mean(), g[f"mp_at_1_5_10_{name}"])


def test_market_1501_drops_the_same_identity_from_the_same_camera():
    g = golden("market1501")
    ranked = R.RankedList.from_distances(g["distance"])
    rel = R.Relevance.from_labels(
        g["query_pids"], g["gallery_pids"], query_cams=g["query_camids"], gallery_cams=g["gallery_camids"]
    )
    assert_close(R.cmc(ranked, rel, range(1, len(g["cmc"]) + 1)).mean(), g["cmc"])
    assert_close(R.average_precision(ranked, rel).mean(), g["mean_ap"])


def test_average_compatibility_with_and_without_equality():
    g = golden("compat_matrix")
    assert_close(R.average_compatibility(g["compat_matrix"], strict=True), g["ac_strict"])
    assert_close(R.average_compatibility(g["compat_matrix"], strict=False), g["ac_nonstrict"])
    assert_close(R.average_multimodel_accuracy(g["compat_matrix"]), g["am"])
    assert_close(100 * R.average_multimodel_accuracy(g["compat_matrix"]), g["am_percent"])


def test_gains_flips_curve_and_forgetting():
    g = golden("gains_and_flips")
    flips = R.flips(g["correct_old"], g["correct_new"])
    assert_close(
        [flips.nfr, flips.pfr, flips.relative, flips.conditional],
        [g["nfr"], g["pfr"], g["relative_nfr"], g["conditional_nfr"]],
    )
    assert_close(R.update_gain(g["m_new_old"], g["m_old_old"], g["m_star_star"]), g["update_gain"])
    assert_close(R.new_model_loss(g["m_new_new"], g["m_star_star"]), g["new_model_loss"])
    scores = R.advbct_scores(g["m_new_old"], g["m_old_old"], g["m_new_new"], g["m_star_star"])
    assert_close([scores.p_comp, scores.p_up, scores.p_1], [g["p_comp"], g["p_up"], g["p1_score"]])
    curve = R.Curve(g["betas"], g["curve"])
    assert_close(curve.area(), g["backfill_area"])
    assert_close(curve.relative_gain(g["curve_m_old_old"]), g["backfill_relative_gain"])
    assert_close(curve.drawdown(), g["max_drawdown"])
    assert curve.negative_steps() == g["negative_steps"]
    assert_close(R.forgetting(g["compat_matrix"]), g["forgetting_per_gallery"])
    assert_close(R.forgetting(g["compat_matrix"]).mean(), g["forgetting_mean"])
    assert_close(R.backward_transfer(g["compat_matrix"]), g["backward_transfer"])


def test_backfill_curve_of_new_queries_over_a_mixed_gallery():
    g = golden("backfill_curve")
    state = R.BackfillState.from_vectors(g["query_new"], g["gallery_old"], g["gallery_new"])
    rel = R.Relevance.from_labels(g["query_labels"], g["gallery_labels"])
    curve = R.backfill_curve(state, g["order"], g["betas"], lambda ranked: R.average_precision(ranked, rel))
    assert_close(curve.values, g["map_curve"])
    assert_close(curve.area(), g["area_trapezoid"])
    assert_close(curve.values.mean(), g["area_mean_of_points"])
    old = R.Embeddings(g["query_old"], g["gallery_old"])
    assert_close(R.self_test(old, rel), g["map_old_old"])
    assert_close(curve.relative_gain(g["map_old_old"]), g["relative_gain"])

    start = R.measure(old, old, rel, lambda ranked, rel: R.cmc(ranked, rel, 1))
    assert_close(start.mean(), g["recall1_old_old"])
    first = R.backfill_curve(state, g["order"], g["betas"], lambda ranked: R.cmc(ranked, rel, 1))
    assert_close(first.values, g["recall1_curve"])
    assert_close([f.nfr for f in first.flips(start)], g["nfr_curve"])
    assert_close([f.pfr for f in first.flips(start)], g["pfr_curve"])


@pytest.mark.parametrize("test", ["self", "cross"])
def test_ijb_verification_and_identification(test):
    g = golden("ijb_protocol")
    features = {}
    for model in ("new", "old"):
        features[model], ids = R.template_features(
            g[f"embeddings_{model}"],
            g["template_ids"],
            g["media_ids"],
            flipped=g[f"embeddings_{model}_flip"],
            detector_score=g["detector_score"],
        )
        assert_close(features[model], g[f"template_features_{model}"])
    row = {int(t): i for i, t in enumerate(ids)}
    other = features["new" if test == "self" else "old"]

    scores = R.pair_scores(other, features["new"], [row[t] for t in g["pair_a"]], [row[t] for t in g["pair_b"]])
    assert_close(scores, g[f"score_{test}"])
    for kind in ("at_most", "nearest"):
        found = R.verification_at_fpr(scores, g["pair_label"], g["far_1to1"], kind)
        assert_close(found.tpr, g[f"tpr_{kind}_{test}"])

    probes = [row[t] for t in g["probe_template_ids"]]
    gallery = [row[t] for t in g["gallery_template_ids"]]
    found = R.identification_at_fpir(
        features["new"][probes] @ other[gallery].T,
        g["template_subject"][probes],
        g["gallery_subjects"],
        g["far_1toN"],
        ks=[1, 5],
    )
    assert found.hits == {1: g[f"top1_{test}"], 5: g[f"top5_{test}"]}
    assert_close(found.thresholds, g[f"threshold_{test}"])
    assert_close(found.tpir, g[f"tpir_{test}"])
