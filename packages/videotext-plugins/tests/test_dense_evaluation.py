"""The measures of frames against the authors' numbers (data/mv-former/README.md), and what must hold for any input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from bowerbird.errors import InputError
from bowerbird.testing import load_golden
from bowerbird_videotext.dense_evaluation import (
    frame_retrieval_ap,
    kendalls_tau,
    pair_taus,
    phase_classification,
    phase_progression,
    progression_targets,
)

DATA = Path(__file__).parent / "data" / "mv-former"


def videos(g: dict[str, Any], part: str, what: str) -> list[Any]:
    return [g[f"{part}_{what}_{i}"] for i in range(g[f"num_{part}"])]


def random_videos(count: int, seed: int = 0, phases: int = 3) -> tuple[list[Any], list[Any]]:
    generator = np.random.default_rng(seed)
    labels = [np.sort(np.r_[np.arange(phases), generator.integers(phases, size=n)]) for n in range(5, 5 + count)]
    return [generator.normal(size=(len(one), 4)) + one[:, None] for one in labels], labels


@pytest.mark.parametrize("stride", [1, 2])
def test_all_measures_are_the_authors(stride: int) -> None:
    g = load_golden(DATA / f"dense_evaluation_stride{stride}.npz")
    train = videos(g, "train", "emb"), videos(g, "train", "label")
    val = videos(g, "val", "emb"), videos(g, "val", "label")
    assert_allclose(kendalls_tau(val[0], stride=stride), g["kendalls_tau"], rtol=1e-9)
    ap = frame_retrieval_ap(*val, ks=g["ks"].tolist(), stride=stride)
    assert_allclose(list(ap.values()), g["ap_at_k"], rtol=1e-9)
    progression = phase_progression(*train, *val, phases=g["num_phases"])
    assert_allclose(progression.validation, g["progression_r2"], rtol=1e-9)
    assert_allclose(progression_targets(val[1][0], g["num_phases"]), g["progression_targets_val_0"], rtol=1e-12)
    accuracy = phase_classification(*train, *val)
    assert_allclose(accuracy.train, g["classification_train_accuracy"], rtol=1e-9)
    assert_allclose(accuracy.validation, g["classification_val_accuracy"], rtol=1e-9)


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(3, 12), min_size=2, max_size=4), stride=st.integers(1, 2))
def test_embeddings_that_rise_with_time_have_a_tau_of_1_and_reversed_ones_of_minus_1(
    lengths: list[int], stride: int
) -> None:
    line = np.arange(max(lengths))[:, None] * np.ones((1, 3))
    same = [line[: min(lengths)] for _ in lengths]
    assert kendalls_tau(same, stride=stride) == pytest.approx(1)
    assert kendalls_tau([same[0], same[0][::-1]], stride=1) == pytest.approx(-1)


def test_pairs_without_an_order_are_left_out_of_tau() -> None:
    line, point = np.arange(5)[:, None] * np.ones((1, 2)), np.zeros((4, 2))
    taus = pair_taus([line, line, point])
    assert np.isnan(taus[0, 2]) and np.isnan(np.diag(taus)).all()  # every neighbour is the first frame
    assert kendalls_tau([line, line, point]) == pytest.approx(1)
    assert np.isnan(kendalls_tau([point, point]))


@settings(max_examples=10, deadline=None)
@given(count=st.integers(2, 4), seed=st.integers(0, 30), stride=st.integers(1, 2))
def test_ap_is_a_share_and_1_where_phases_lie_apart(count: int, seed: int, stride: int) -> None:
    embeddings, labels = random_videos(count, seed)
    ap = frame_retrieval_ap(embeddings, labels, (1, 3), stride=stride)
    assert list(ap) == [1, 3] and all(0 <= value <= 1 for value in ap.values())
    apart = [np.eye(3)[one] for one in labels]
    assert frame_retrieval_ap(apart, labels, (1,))[1] == 1


def test_progression_is_1_where_the_targets_can_be_read_off() -> None:
    _, labels = random_videos(4)
    targets = [progression_targets(one, 3) for one in labels]
    mixed = [one @ np.array([[2.0, 1.0], [-1.0, 3.0]]) + 5 for one in targets]
    scores = phase_progression(mixed[:2], labels[:2], mixed[2:], labels[2:])
    assert scores.train == pytest.approx(1) and scores.validation == pytest.approx(1)
    noise = [np.random.default_rng(i).normal(size=(len(one), 8)) for i, one in enumerate(labels)]
    assert phase_progression(noise[:2], labels[:2], noise[2:], labels[2:]).validation < 0


def test_progression_counts_from_the_last_frame_of_a_phase() -> None:
    assert_allclose(progression_targets([0, 1, 0, 1, 2], 3).T, np.array([[-2, -1, 0, 1, 2], [-3, -2, -1, 0, 1]]) / 5)


def test_measures_refuse_what_does_not_fit() -> None:
    embeddings, labels = random_videos(3)
    with pytest.raises(ValueError, match="expected 2 or more, found 1"):
        kendalls_tau(embeddings[:1])
    with pytest.raises(ValueError, match="expected 2 or more, found 1"):
        frame_retrieval_ap(embeddings[:1], labels[:1])
    with pytest.raises(ValueError, match="AP@K for K of "):
        frame_retrieval_ap(embeddings, labels, (1, 400))
    with pytest.raises(InputError, match="none of phase 1"):
        phase_progression(embeddings, [np.where(one == 1, 0, one) for one in labels], embeddings, labels)
    with pytest.raises(InputError, match="2 phases or more; there are 1"):
        phase_progression(embeddings, [0 * one for one in labels], embeddings, [0 * one for one in labels])
    with pytest.raises(InputError, match="one phase only"):
        phase_classification(embeddings, [0 * one for one in labels], embeddings, labels)
    with pytest.raises(InputError, match="video 1 of the training videos"):
        phase_classification(embeddings, [labels[0], labels[1][:-1], labels[2]], embeddings, labels)
    with pytest.raises(InputError, match="no finite numbers"):
        phase_classification([one * np.nan for one in embeddings], labels, embeddings, labels)
    with pytest.raises(InputError, match="stride = 0"):
        kendalls_tau(embeddings, stride=0)
