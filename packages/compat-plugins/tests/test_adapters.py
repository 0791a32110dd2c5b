"""Adapters: maps with known answers, what is reported about them, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import DataError, InputError, SpaceError
from bowerbird.gallery.space import Space
from bowerbird.gallery.transform import VectorTransform
from bowerbird_compat.adapter_maps import low_rank, moments, procrustes, ridge, unit
from bowerbird_compat.adapters import check_direction, fit_adapter, judge_transform

ENDS = {"source_space": "new", "target_space": "old"}


def orthogonal(size: int, *, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def noisy_pair(count: int = 600, *, noise: float = 0.1, seed: int = 0, di: int = 12, do: int = 12):
    """Source and target: the target is a rotation (or a part of one) of the source, with noise."""
    rng = np.random.default_rng(seed)
    x = unit(rng.normal(size=(count, di)))
    turned = x @ orthogonal(max(di, do))[:di, :do]
    return x, unit(turned + noise * rng.normal(size=turned.shape) / np.sqrt(do))


# ------------------------------------------------------------------------------------------------------ the maps


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_procrustes_is_semi_orthogonal_and_no_orthogonal_map_aligns_better(di, do, seed):
    rng = np.random.default_rng(seed)
    x, y = unit(rng.normal(size=(60, di))), unit(rng.normal(size=(60, do)))
    weight = procrustes(moments(x, y, np.arange(60))).weight
    gram = weight.T @ weight if do >= di else weight @ weight.T
    assert np.allclose(gram, np.eye(min(di, do)), atol=1e-6)
    other = orthogonal(max(di, do), seed=seed)[:do, :di]
    assert np.sum((x @ weight.T) * y) >= np.sum((x @ other.T) * y) - 1e-4


@pytest.mark.parametrize(("di", "do"), [(12, 12), (8, 12)])
def test_procrustes_recovers_a_rotation_exactly(di, do):
    x, y = noisy_pair(noise=0, di=di, do=do)
    made = fit_adapter(x, y, kind="procrustes", **ENDS)
    assert made.evidence["cosine"] == pytest.approx(1, abs=1e-5)
    assert made.evidence["overlap"][0] > 0.999
    assert np.allclose(made(x[:5]), y[:5], atol=1e-5)


def test_ridge_equals_the_normal_equations():
    rng = np.random.default_rng(1)
    x, y = unit(rng.normal(size=(80, 6))), unit(rng.normal(size=(80, 4)))
    strength = 0.3
    made = ridge(moments(x, y, np.arange(80)), strength)
    centred_x, centred_y = (np.asarray(v, np.float64) - v.mean(0, np.float64) for v in (x, y))
    covariance = centred_x.T @ centred_x / 80
    penalty = strength * np.trace(covariance) / 6
    expected = np.linalg.solve(covariance + penalty * np.eye(6), centred_x.T @ centred_y / 80).T
    assert np.allclose(made.weight, expected, atol=1e-5)
    assert np.allclose(made.bias, y.mean(0) - expected @ x.mean(0), atol=1e-5)


def test_cross_validation_takes_a_weak_ridge_for_a_clean_relation_and_a_strong_one_for_noise():
    rng = np.random.default_rng(2)
    x = unit(rng.normal(size=(300, 40)))
    clean = moments(x, unit(x @ orthogonal(40)), np.arange(300))
    noise = moments(x, unit(rng.normal(size=(300, 40))), np.arange(300))
    assert ridge(clean).settings["ridge"] < 1e-3
    assert ridge(noise).settings["ridge"] > 1


def test_low_rank_finds_the_rank_of_the_relation_and_full_rank_equals_ridge():
    rng = np.random.default_rng(3)
    x = unit(rng.normal(size=(800, 16)))
    through = rng.normal(size=(16, 4)) @ rng.normal(size=(4, 20))
    parts = moments(x, unit(x @ through + 0.3 * rng.normal(size=(800, 20))), np.arange(800))
    made = low_rank(parts)
    assert made.settings["rank"] == 4
    assert np.linalg.matrix_rank(made.weight, tol=1e-6) == 4
    full = low_rank(parts, 0.1, rank=16)
    assert np.allclose(full.weight, ridge(parts, 0.1).weight, atol=1e-8)


def test_the_mlp_bends_where_no_linear_map_can():
    rng = np.random.default_rng(4)
    x = unit(rng.normal(size=(3000, 6)))
    y = unit(np.abs(x @ rng.normal(size=(6, 8))) - 0.4)
    fitted = {kind: fit_adapter(x, y, kind=kind, steps=300, **ENDS).evidence for kind in ("ridge", "mlp", "auto")}
    assert fitted["mlp"]["cosine"] > fitted["ridge"]["cosine"] + 0.03
    assert fitted["auto"]["kind"] == "mlp"
    assert set(fitted["auto"]["tried"]) == {"procrustes", "low-rank", "ridge", "mlp"}


def test_auto_takes_the_simplest_kind_where_none_is_better():
    assert fit_adapter(*noisy_pair(noise=0.3), **ENDS).evidence["kind"] == "procrustes"


# ------------------------------------------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("kind", ["procrustes", "ridge", "low-rank", "mlp", "auto"])
def test_equal_inputs_and_settings_give_equal_bits(kind):
    x, y = noisy_pair(200, noise=0.5)
    first, second = (fit_adapter(x, y, kind=kind, seed=7, steps=60, **ENDS) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.evidence == second.evidence
    assert json.loads(json.dumps(first.evidence)) == first.evidence


@pytest.mark.parametrize("kind", ["procrustes", "ridge", "low-rank"])
def test_lengths_of_the_given_vectors_do_not_matter(kind):
    x, y = noisy_pair(200, noise=0.5)
    scale = np.random.default_rng(0).uniform(0.1, 9, (200, 1))
    plain = fit_adapter(x, y, kind=kind, **ENDS)
    scaled = fit_adapter((x * scale).astype(np.float64), y * scale[::-1], kind=kind, **ENDS)
    assert np.allclose(plain(x), scaled(x), atol=1e-4)


def test_a_saved_adapter_keeps_direction_and_evidence(tmp_path):
    made = fit_adapter(*noisy_pair(), kind="ridge", **ENDS)
    made.save(tmp_path / "adapter.safetensors")
    loaded = VectorTransform.load(tmp_path / "adapter.safetensors")
    assert (loaded.source, loaded.target, loaded.evidence) == ("new", "old", made.evidence)


# ------------------------------------------------------------------------------------------------------ the verdict


def test_a_good_a_lossy_and_a_useless_map_are_told_apart_in_words():
    levels = {}
    for noise in (0.1, 0.6, 30.0):
        evidence = fit_adapter(*noisy_pair(2000, noise=noise), kind="procrustes", **ENDS).evidence
        levels[noise] = evidence["verdict"]
        assert evidence["usable"] == (evidence["verdict"] in ("good", "usable with loss"))
        mean, low, high = evidence["kept"]
        assert low <= mean <= high
        assert f"{mean:.2f} of the old system's first 10 results" in evidence["sentence"]
    assert levels == {0.1: "good", 0.6: "usable with loss", 30.0: "not usable"}


def test_rows_that_do_not_pair_are_called_unrelated():
    x, y = noisy_pair(1000)
    evidence = fit_adapter(x, np.roll(y, 1, axis=0), **ENDS).evidence
    assert evidence["verdict"] == "not usable"
    assert "do the rows pair?" in evidence["sentence"]


def test_with_labels_the_share_is_of_the_old_systems_quality():
    rng = np.random.default_rng(5)
    labels = rng.integers(6, size=900)
    centres = rng.normal(size=(6, 10))
    x = unit(centres[labels] + rng.normal(size=(900, 10)))
    y = unit(x @ orthogonal(10) + 0.5 * rng.normal(size=(900, 10)))
    query = fit_adapter(x, y, kind="ridge", labels=labels, **ENDS).evidence
    assert query["quality"]["new"] > query["quality"]["old"]
    assert query["kept"][0] == pytest.approx(query["quality"]["mapped"] / query["quality"]["old"], abs=1e-3)
    lifted = fit_adapter(
        y, x, kind="ridge", labels=labels, direction="gallery", source_space="old", target_space="new"
    ).evidence
    assert lifted["quality"]["old"] == pytest.approx(query["quality"]["old"])  # the same held-out pairs
    assert lifted["kept"][0] == pytest.approx(lifted["quality"]["mapped"] / lifted["quality"]["old"], abs=1e-3)
    assert "New queries on lifted vectors keep" in lifted["sentence"]


def test_the_identity_keeps_everything_in_both_directions():
    x, _ = noisy_pair(300)
    same = VectorTransform.linear("new", "old", np.eye(12))
    for direction in ("query", "gallery"):
        verdict = judge_transform(same, x, x, direction=direction, labels=np.arange(300) // 3)
        assert verdict.level == "good"
        assert verdict.overlap == (1, 1, 1)
        assert verdict.kept == (1, 1, 1)
        assert verdict.recall_at_1 == 1
        assert verdict.cosine == pytest.approx(1)


def test_overlap_equals_a_count_by_hand():
    x, y = noisy_pair(40, noise=1.5)
    made = VectorTransform.linear("new", "old", orthogonal(12).T)
    verdict = judge_transform(made, x, y, k=5)
    mapped = made(x)
    shares = []
    for i in range(40):
        others = [j for j in range(40) if j != i]
        found = sorted(others, key=lambda j: -float(mapped[i] @ y[j]))[:5]
        due = sorted(others, key=lambda j: -float(y[i] @ y[j]))[:5]
        shares.append(len(set(found) & set(due)) / 5)
    assert verdict.overlap[0] == pytest.approx(np.mean(shares))


def test_too_few_pairs_for_a_verdict_are_said_with_the_number_that_is_needed():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    x, y = noisy_pair(60, noise=2.5)
    evidence = fit_adapter(x, y, kind="procrustes", labels=labels, **ENDS).evidence
    assert evidence["pairs_needed"] > 15
    small = fit_adapter(*noisy_pair(60, noise=1.2, di=64, do=64), kind="ridge", **ENDS).evidence
    assert "for 64 to 64 dimensions 256 or more are better" in small["sentence"]


@pytest.mark.parametrize("kind", ["procrustes", "ridge", "auto"])
@pytest.mark.parametrize("labels", [None, [0] * 50])
def test_the_fewest_pairs_show_a_rotation_and_never_make_unrelated_vectors_usable(kind, labels):
    """Twelve held-out pairs: long lists overlap by chance, and with one label all over everything is right."""
    x, y = noisy_pair(50, noise=0, di=6, do=6)
    assert fit_adapter(x, y, kind=kind, labels=labels, **ENDS).evidence["verdict"] == "good"
    for seed in (1, 2):
        other = np.random.default_rng(seed).normal(size=(50, 6))
        assert not fit_adapter(x, other, kind=kind, labels=labels, seed=seed, **ENDS).evidence["usable"]


def test_an_old_encoder_that_gives_one_vector_to_all_is_not_worth_mapping_to():
    x, _ = noisy_pair(200)
    assert not fit_adapter(x, np.ones((200, 4)), kind="ridge", **ENDS).evidence["usable"]


def test_copies_do_not_make_a_memorised_map_look_good():
    rng = np.random.default_rng(0)
    x, y = (np.tile(unit(rng.normal(size=(60, 80))), (5, 1)) for _ in range(2))
    evidence = fit_adapter(x, y, kind="ridge", **ENDS).evidence
    assert (evidence["pairs"], evidence["fitted_on"]) == (15, 45)
    assert not evidence["usable"]


def test_an_item_without_a_label_is_right_for_nothing():
    x, y = noisy_pair(100)
    made = VectorTransform.linear("new", "old", orthogonal(12).T)
    labels = [i % 4 if i < 80 else None for i in range(100)]
    verdict = judge_transform(made, x, y, labels=labels)
    assert verdict.quality is not None
    assert judge_transform(made, x, y, labels=[None] * 100).quality is None


# ------------------------------------------------------------------------------------------------------ direction


def test_a_map_of_the_other_direction_is_refused_with_both_numbers():
    x, y = noisy_pair()
    made = fit_adapter(x, y, kind="procrustes", **ENDS)
    found = check_direction(made, x, y)
    assert found.forward > 0.9 > found.reverse
    with pytest.raises(SpaceError, match=rf"reverse direction.*{found.reverse:.3f}.*{found.forward:.3f}"):
        check_direction(made, y, x)


def test_swapped_arguments_of_other_widths_are_refused_with_both_widths():
    x, y = noisy_pair(di=8, do=12)
    new, old = Space("n", "new", 8), Space("o", "old", 12)
    with pytest.raises(SpaceError, match=r"source vectors have width 12, and the source space n \(new, 8-d\) has 8"):
        fit_adapter(y, x, source_space=new, target_space=old)
    made = fit_adapter(x, y, kind="ridge", source_space=new, target_space=old)
    assert check_direction(made, x, y).forward > 0.5
    with pytest.raises(SpaceError, match="width 8 to width 12, and the pairs have widths 12 and 8"):
        check_direction(made, y, x)
    with pytest.raises(SpaceError, match="from width 8 to 12, and these pairs go from 12 to 8"):
        judge_transform(made, y, x)


def test_a_map_that_relates_nothing_is_refused():
    x, y = noisy_pair()
    with pytest.raises(SpaceError, match="does not fit"):
        check_direction(VectorTransform.linear("new", "old", orthogonal(12).T), x, np.roll(y, 7, axis=0))


# ------------------------------------------------------------------------------------------------------ bad input


def broken(rows: np.ndarray, value: float) -> np.ndarray:
    rows = rows.copy()
    rows[17] = value
    return rows


X, Y = noisy_pair(100)


@pytest.mark.parametrize(
    ("arguments", "more", "error", "message"),
    [
        ((X[:40], Y[:40]), {}, InputError, "40 pairs are too few.*at least 50 are needed, and 50 or more"),
        ((X, Y[:99]), {}, InputError, "100 source and 99 target vectors do not pair"),
        ((broken(X, np.nan), Y), {}, DataError, "source vectors: row 17 is zero or not finite"),
        ((X, broken(Y, 0)), {}, DataError, "target vectors: row 17 is zero"),
        ((X[0], Y), {}, InputError, r"shape \(12,\)"),
        ((X, Y), {"kind": "procrustis"}, InputError, "Did you mean 'procrustes'"),
        ((X, Y), {"held_out": 1}, InputError, "held_out is 1"),
        ((X, Y), {"ridge": 0}, InputError, "ridge is 0"),
        ((X, Y), {"rank": 0}, InputError, "rank is 0"),
        ((X, Y), {"labels": [1, 2]}, InputError, "2 labels for 100 pairs"),
        ((X, Y), {"direction": "back"}, InputError, "direction is 'back'"),
        ((X, Y), {"held_out": 0.05}, InputError, "100 pairs are too few.*at least 200 are needed"),
        ((X, Y), {"held_out": 0.75}, InputError, "100 pairs are too few.*at least 120 are needed, and 120 or more"),
        ((X[[i % 40 for i in range(100)]], Y), {}, InputError, r"100 pairs are too few \(40 different ones\)"),
    ],
)
def test_what_cannot_be_fitted_or_judged_is_named(arguments, more, error, message):
    with pytest.raises(error, match=message):
        fit_adapter(*arguments, **{"kind": "ridge", **ENDS, **more})
