"""Ranks, recall, dual softmax, zero-shot classification and questions: official numbers, and what always holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird.testing import assert_close
from bowerbird_videotext.video_retrieval import (
    class_ranks,
    dual_softmax,
    dual_softmax_loss,
    multiple_choice_accuracy,
    open_ended_accuracy,
    recall_by_id,
    recall_summary,
    retrieval_ranks,
    topk_accuracy,
    zero_shot_classify,
)

Golden = Callable[[str], dict[str, Any]]
KS = (1, 5, 10, 50)
few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def scores(seed: int, texts: int, videos: int, *, levels: int | None = None) -> Tensor:
    """Random similarities; with ``levels`` only so many different ones, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (texts, videos), generator=generator).double()
    return torch.randn(texts, videos, generator=generator, dtype=torch.float64)


def owners(seed: int, texts: int, videos: int) -> Tensor:
    return torch.randint(videos, (texts,), generator=torch.Generator().manual_seed(seed + 1))


# ---------------------------------------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("name", ["one_caption", "many_captions", "missing_captions", "ties"])
@pytest.mark.parametrize("direction", ["t2v", "v2t"])
def test_recall_and_ranks_are_those_of_the_official_code(golden: Golden, name: str, direction: str) -> None:
    g = golden(f"video-retrieval-evaluation/recall_{name}")
    ranks = retrieval_ranks(g["sims"], direction=direction, present=g.get("caption_present"))
    found = recall_summary(ranks, KS)
    official = {"GMeanR": "geometric_mean_R1-R5-R10"} | {f"R@{k}": f"R{k}" for k in KS}
    for key, value in found.items():
        assert value == pytest.approx(g[f"{direction}_{official.get(key, key)}"], rel=1e-12), key


def test_recall_by_id_is_that_of_all_in_one(golden: Golden) -> None:
    g = golden("video-retrieval-evaluation/recall_by_id")
    found = recall_by_id(g["scores_video_by_text"].T, g["text_video_ids"], g["video_ids"])
    for key, value in found.items():
        assert value == pytest.approx(g[key.replace(" R@", "_R")], rel=1e-6), key


def test_dual_softmax_and_its_loss_are_those_of_camoe(golden: Golden) -> None:
    g = golden("video-retrieval-evaluation/dual_softmax")
    similarity = g["sims"].clone().requires_grad_()
    assert_close(dual_softmax(similarity, g["temperature"]), g["reranked"])
    loss = dual_softmax_loss(similarity, g["temperature"])
    assert_close(loss, g["per_row_loss"])
    (gradient,) = torch.autograd.grad(loss.mean(), similarity)
    assert_close(gradient, g["grad_sims_of_mean_loss"])
    for when, matrix in (("before", g["sims"]), ("after", g["reranked"])):
        summary = recall_summary(retrieval_ranks(matrix))
        assert summary["R@1"] == pytest.approx(g[f"t2v_R1_{when}"], rel=1e-12)
        assert summary["MeanR"] == pytest.approx(g[f"t2v_MeanR_{when}"], rel=1e-12)


def test_zero_shot_accuracy_and_label_ranks_are_the_official_ones(golden: Golden) -> None:
    g = golden("video-retrieval-evaluation/zero_shot_classification")
    rows, labels = g["sims_label_by_video"].T, g["label_matrix"].T
    assert topk_accuracy(rows, labels) == {"top1": pytest.approx(g["top1"]), "top5": pytest.approx(g["top5"])}
    summary = recall_summary(class_ranks(rows, labels), KS)
    for key, name in {"GMeanR": "geometric_mean_R1-R5-R10", "MedR": "MedR", "MeanR": "MeanR", "R@5": "R5"}.items():
        assert summary[key] == pytest.approx(g[f"rank_{name}"], rel=1e-12), key


def test_multiple_choice_is_that_of_demovlp(golden: Golden) -> None:
    g = golden("video-retrieval-evaluation/multiple_choice")
    found = multiple_choice_accuracy(g["option_scores"], g["answer"])
    assert round(found, 2) == g["accuracy_percent"]


def test_answers_outside_the_vocabulary_are_wrong_as_in_the_official_code(golden: Golden) -> None:
    g = golden("video-retrieval-evaluation/open_ended_qa")
    predicted = [str(g["answer_vocabulary"][i]) for i in g["predicted_index"]]
    found = open_ended_accuracy(predicted, list(g["ground_truth"]), list(g["answer_type"]))
    assert len(found) == 6
    for key, value in found.items():
        assert value == pytest.approx(g[key], rel=1e-12), key


# ------------------------------------------------------------------------------------------------------- invariants


def by_sorting(similarity: Tensor, owner: Tensor, direction: str, ties: str) -> list[float]:
    """The definition, one query after the other, by sorted lists."""
    picks: dict[str, Callable[[list[int]], float]]
    picks = {"optimistic": min, "pessimistic": max, "average": lambda block: sum(block) / len(block)}
    pick = picks[ties]

    def rank(values: list[float], value: float) -> float:
        ordered = sorted(values, reverse=True)
        return float(pick([i for i, other in enumerate(ordered) if other == value]))

    if direction == "t2v":
        return [rank(row, row[o]) for row, o in zip(similarity.tolist(), owner.tolist(), strict=True)]
    columns = similarity.T.tolist()
    texts = {v: [q for q, o in enumerate(owner.tolist()) if o == v] for v in sorted(set(owner.tolist()))}
    return [min(rank(columns[v], columns[v][q]) for q in own) for v, own in texts.items()]


@given(
    seed=seeds, texts=st.integers(1, 12), videos=st.integers(1, 6), direction=st.sampled_from(["t2v", "v2t"]),
    ties=st.sampled_from(["optimistic", "average", "pessimistic"]), levels=st.sampled_from([2, 4, None]),
)  # fmt: skip
@few
def test_ranks_are_places_in_the_sorted_list(
    seed: int, texts: int, videos: int, direction: str, ties: str, levels: int | None
) -> None:
    similarity, owner = scores(seed, texts, videos, levels=levels), owners(seed, texts, videos)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few texts may all be equally near
        found = retrieval_ranks(similarity, owner, direction, ties)
    assert found.tolist() == by_sorting(similarity, owner, direction, ties)


@given(seed=seeds, texts=st.integers(2, 12), videos=st.integers(2, 6), direction=st.sampled_from(["t2v", "v2t"]))
@few
def test_ranks_ignore_increasing_maps_constants_per_query_and_the_order_of_the_gallery(
    seed: int, texts: int, videos: int, direction: str
) -> None:
    similarity, owner = scores(seed, texts, videos), owners(seed, texts, videos)
    ranks = retrieval_ranks(similarity, owner, direction)
    assert torch.equal(retrieval_ranks(torch.exp(similarity), owner, direction), ranks)
    shift = scores(seed + 2, *((texts, 1) if direction == "t2v" else (1, videos)))
    assert torch.equal(retrieval_ranks(similarity + shift, owner, direction), ranks)
    generator = torch.Generator().manual_seed(seed)
    if direction == "t2v":
        order = torch.randperm(videos, generator=generator)
        assert torch.equal(retrieval_ranks(similarity[:, order], order.argsort()[owner], direction), ranks)
    else:
        order = torch.randperm(texts, generator=generator)
        assert torch.equal(retrieval_ranks(similarity[order], owner[order], direction), ranks)


@given(count=st.integers(2, 12), direction=st.sampled_from(["t2v", "v2t"]))
@few
def test_a_perfect_model_has_rank_1_and_its_opposite_the_last(count: int, direction: str) -> None:
    perfect = recall_summary(retrieval_ranks(torch.eye(count), direction=direction))
    assert perfect["R@1"] == 100 and perfect["MedR"] == perfect["MeanR"] == 1
    assert recall_summary(retrieval_ranks(-torch.eye(count), direction=direction))["MedR"] == count


@given(seed=seeds, count=st.integers(1, 60))
@few
def test_recall_grows_with_k(seed: int, count: int) -> None:
    summary = recall_summary(retrieval_ranks(scores(seed, count, count)))
    assert summary["R@1"] <= summary["R@5"] <= summary["R@10"] <= 100 and summary["MeanR"] >= 1


def test_random_similarities_find_k_in_n() -> None:
    summary = recall_summary(retrieval_ranks(scores(0, 4000, 40), torch.arange(4000) % 40))
    for k in (1, 5, 10):
        share = k / 40
        assert summary[f"R@{k}"] == pytest.approx(100 * share, abs=500 * (share * (1 - share) / 4000) ** 0.5)


@given(seed=seeds, count=st.integers(2, 15))
@few
def test_with_one_text_per_video_both_directions_are_the_same_task(seed: int, count: int) -> None:
    similarity = scores(seed, count, count)
    assert torch.equal(retrieval_ranks(similarity, direction="v2t"), retrieval_ranks(similarity.T))


@given(seed=seeds, fill=st.sampled_from([-1e9, 0.0, 1e9, float("inf"), float("nan")]))
@few
def test_what_absent_captions_hold_changes_nothing(seed: int, fill: float) -> None:
    similarity, present = scores(seed, 12, 4), torch.rand(4, 3, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[0, 0] = True
    filled = similarity.masked_fill(~present.flatten()[:, None], fill)
    owner = torch.arange(12) // 3
    for direction in ("t2v", "v2t"):
        ranks = retrieval_ranks(filled, direction=direction, present=present)
        kept = present.flatten()
        assert torch.equal(ranks, retrieval_ranks(similarity[kept], owner[kept], direction))
        assert len(ranks) == (kept.sum() if direction == "t2v" else present.any(dim=1).sum())


@given(seed=seeds, captions=st.integers(1, 3))
@few
def test_recall_by_id_is_recall_by_rank_where_nothing_is_tied(seed: int, captions: int) -> None:
    similarity, order = scores(seed, 8 * captions, 8), torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    owner = torch.arange(8 * captions) // captions
    by_id = recall_by_id(similarity, 100 + order[owner], 100 + order, ks=(1, 3, 50))
    for direction in ("t2v", "v2t"):
        summary = recall_summary(retrieval_ranks(similarity, owner, direction), (1, 3, 50))
        for k in (1, 3, 50):
            assert 100 * by_id[f"{direction} R@{k}"] == pytest.approx(summary[f"R@{k}"])


def test_a_collapsed_model_is_told_from_a_perfect_one() -> None:
    with pytest.warns(UserWarning, match="collapsed"):
        assert (retrieval_ranks(torch.ones(6, 6)) == 0).all()
    assert (retrieval_ranks(torch.ones(6, 6), ties="average") == 2.5).all()
    assert (retrieval_ranks(torch.ones(6, 6), ties="pessimistic") == 5).all()
    assert (retrieval_ranks(torch.ones(6, 6), direction="v2t") == 2.5).all()


@given(seed=seeds, texts=st.integers(1, 10), videos=st.integers(1, 6))
@few
def test_dual_softmax_at_a_high_temperature_and_of_one_query_keeps_the_order(
    seed: int, texts: int, videos: int
) -> None:
    similarity = scores(seed, texts, videos)
    assert torch.equal(dual_softmax(similarity, 1e9).argsort(dim=1), similarity.argsort(dim=1))
    assert_close(dual_softmax(similarity[:1], 0.05), similarity[:1])
    assert_close(dual_softmax(similarity, 0.1, "v2t"), dual_softmax(similarity.T, 0.1).T)


def test_dual_softmax_takes_the_advantage_from_a_video_that_is_near_to_every_text() -> None:
    similarity = 0.5 * torch.eye(8, dtype=torch.float64) + 0.1 * torch.rand(8, 8, dtype=torch.float64)
    similarity[:, 3] += 2
    assert recall_summary(retrieval_ranks(similarity))["R@1"] == 12.5
    assert recall_summary(retrieval_ranks(dual_softmax(similarity, 0.01)))["R@1"] == 100


def test_constant_option_scores_choose_the_first_option() -> None:
    answer = torch.tensor([0, 1, 2, 0, 4])
    assert multiple_choice_accuracy(torch.zeros(5, 5), answer) == pytest.approx(40)


@given(seed=seeds, classes=st.integers(1, 5), prompts=st.integers(1, 4))
@few
def test_a_class_is_the_mean_of_its_unit_prompts(seed: int, classes: int, prompts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    videos = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    texts = torch.randn(classes, prompts, 8, generator=generator, dtype=torch.float64)
    found = zero_shot_classify(videos, texts)
    # neither the length of a prompt nor that of a video counts
    assert_close(zero_shot_classify(3 * videos, texts * torch.rand(classes, prompts, 1, dtype=torch.float64)), found)
    mean = (texts / texts.norm(dim=2, keepdim=True)).sum(dim=1)
    assert_close(found, torch.cosine_similarity(videos[:, None], mean[None], dim=2))


def test_the_rank_of_a_class_forgives_true_classes_before_it() -> None:
    rows = torch.tensor([[0.9, 0.8, 0.1, 0.5], [0.2, 0.2, 0.2, 0.9]])
    labels = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]])
    assert class_ranks(rows, labels).tolist() == [0, 0, 0, 2]
    assert class_ranks(rows[1:], torch.tensor([2])).tolist() == [2]
    assert topk_accuracy(rows, labels, ks=(1, 3)) == {"top1": 50, "top3": 50}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_precision_is_ranked(dtype: torch.dtype) -> None:
    similarity = torch.eye(5, dtype=dtype)
    assert recall_summary(retrieval_ranks(similarity))["R@1"] == 100
    assert dual_softmax(similarity, 0.1).dtype == dtype


# -------------------------------------------------------------------------------------------------------- bad input

EYE = torch.eye(4)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "a vector": (lambda: retrieval_ranks(EYE[0]), "matrix"),
    "an empty gallery": (lambda: retrieval_ranks(torch.empty(3, 0)), "at least one row and column"),
    "NaN": (lambda: retrieval_ranks(EYE * float("nan")), "NaN"),
    "an owner out of range": (lambda: retrieval_ranks(EYE, torch.tensor([0, 1, 4, 2])), r"query_owner\[2\] = 4"),
    "a negative owner": (lambda: retrieval_ranks(EYE, torch.tensor([0, -1, 1, 2])), r"query_owner\[1\] = -1"),
    "owners of other texts": (lambda: retrieval_ranks(EYE, torch.tensor([0, 1])), "for 4 texts"),
    "uneven captions": (lambda: retrieval_ranks(EYE[:3]), "give query_owner"),
    "an unknown direction": (lambda: retrieval_ranks(EYE, direction="i2t"), "t2v"),
    "an unknown rule": (lambda: retrieval_ranks(EYE, ties="stable"), "pessimistic"),
    "no caption present": (lambda: retrieval_ranks(EYE, present=torch.zeros(4)), "no text is present"),
    "another mask": (lambda: retrieval_ranks(EYE, present=torch.ones(3)), "3 entries for 4"),
    "no ranks": (lambda: recall_summary(torch.empty(0)), "at least one"),
    "k = 0": (lambda: recall_summary(torch.zeros(3), (0,)), "at least 1"),
    "temperature 0": (lambda: dual_softmax(EYE, 0.0), "above 0"),
    "a negative temperature": (lambda: dual_softmax(EYE, -1.0), "above 0"),
    "an infinite similarity": (lambda: dual_softmax(EYE / 0, 0.1), "NaN|infinite"),
    "a loss of no pairs": (lambda: dual_softmax_loss(EYE[:2], 0.1), "as many texts as videos"),
    "prompts of another width": (lambda: zero_shot_classify(EYE, torch.ones(2, 3)), "prompts"),
    "a label out of range": (lambda: topk_accuracy(EYE, torch.tensor([0, 1, 2, 4])), r"expected 0\.\.3"),
    "labels of other items": (lambda: topk_accuracy(EYE, torch.tensor([0])), "one per row"),
    "an answer out of range": (lambda: multiple_choice_accuracy(EYE, torch.tensor([0, 1, 2, 7])), "expected"),
    "no questions": (lambda: open_ended_accuracy([], []), "at least 1"),
    "answers to other questions": (lambda: open_ended_accuracy(["a"], ["a", "b"]), "equal"),
    "ids of other texts": (lambda: recall_by_id(EYE, torch.arange(3), torch.arange(4)), "ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(InputError, match=message):
        call()
    assert issubclass(InputError, ValueError)
