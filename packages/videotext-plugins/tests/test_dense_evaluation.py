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
    labelled,
    linear_classification,
    linear_classifier,
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


def test_frames_without_a_phase_count_nowhere() -> None:
    embeddings, labels = random_videos(4)
    generator = np.random.default_rng(1)
    with_more: tuple[list[Any], list[Any]] = ([], [])
    for video, phases in zip(embeddings, labels, strict=True):
        places = np.sort(generator.integers(0, len(video) + 1, size=5))
        with_more[0].append(np.insert(video, places, 50 * generator.normal(size=(5, 4)), axis=0))
        with_more[1].append(np.insert(phases, places, generator.integers(-3, 0, size=5)))
    kept = labelled(*with_more)
    for found, wanted in zip((*kept[0], *kept[1]), (*embeddings, *labels), strict=True):
        assert np.array_equal(found, wanted)

    def halves(videos: Any) -> tuple[Any, ...]:
        return videos[0][:2], videos[1][:2], videos[0][2:], videos[1][2:]

    for measure in (phase_classification, phase_progression, linear_classification):
        assert measure(*halves(with_more)) == measure(*halves((embeddings, labels)))
    ap = frame_retrieval_ap(*with_more, (1, 3), stride=2)
    assert ap == frame_retrieval_ap(embeddings, labels, (1, 3), stride=2)
    assert kendalls_tau(kept[0]) == kendalls_tau(embeddings) != kendalls_tau(with_more[0])
    with pytest.raises(InputError, match="video 1 of the measured videos has no frame with a phase"):
        frame_retrieval_ap(embeddings, [labels[0], -1 - labels[1], *labels[2:]], (1,))


def test_the_linear_layer_is_trained_by_momentum_and_a_cosine_over_epochs() -> None:
    """Two steps by hand, of one batch each: all videos fit into it."""
    embeddings, labels = random_videos(3)
    x, y = np.concatenate(embeddings), np.eye(3)[np.concatenate(labels)]
    weight, bias = np.zeros((3, 4)), np.zeros(3)
    moved = [np.zeros_like(weight), np.zeros_like(bias)]
    for lr in (0.5, 0.25):  # half a cosine in two epochs: (1 + cos(pi / 2)) / 2
        powers = np.exp(x @ weight.T + bias)
        error = (powers / powers.sum(axis=1, keepdims=True) - y) / len(x)
        gradients = error.T @ x + 0.1 * weight, error.sum(axis=0) + 0.1 * bias
        moved = [0.9 * old + new for old, new in zip(moved, gradients, strict=True)]
        weight, bias = weight - lr * moved[0], bias - lr * moved[1]
    points = np.random.default_rng(5).normal(size=(200, 4)) * 3
    classify = linear_classifier(embeddings, labels, epochs=2, lr=0.5, weight_decay=0.1)
    assert np.array_equal(classify(points), (points @ weight.T + bias).argmax(axis=1))


def test_the_linear_layer_finds_phases_that_lie_apart_by_their_own_numbers() -> None:
    _, labels = random_videos(25)
    apart, numbers = [np.eye(3)[one] for one in labels], [7 * one + 2 for one in labels]  # 2, 9, 16
    scores = linear_classification(apart[:23], numbers[:23], apart[23:], numbers[23:])
    assert scores == (1, 1)
    again = linear_classifier(apart, numbers, epochs=1, batch_videos=4, seed=3)
    assert set(again(np.eye(3)).tolist()) <= {2, 9, 16}
    with pytest.raises(InputError, match="one phase only"):
        linear_classifier(apart, [0 * one for one in labels])
    with pytest.raises(InputError, match="epochs = 0"):
        linear_classifier(apart, labels, epochs=0)


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
    with pytest.raises(InputError, match="video 1 of the compared videos has embeddings that are no finite"):
        kendalls_tau([embeddings[0], embeddings[1] * np.nan])
    with pytest.raises(InputError, match="P the same in all"):
        kendalls_tau([embeddings[0], embeddings[1][:, :2]])
    with pytest.raises(InputError, match="stride = 0"):
        kendalls_tau(embeddings, stride=0)
