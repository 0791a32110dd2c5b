"""DemoVLP's encoder, scores, losses and answer head: the numbers of the released code, and what must hold for all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bowerbird.errors import InputError
from bowerbird_videotext.demovlp import (
    RegionEncoder,
    RegionQAHead,
    attention_weights,
    region_word_alignment_loss,
    region_word_scores,
    relevance,
)
from bowerbird_videotext.losses import cosine_similarity_matrix, symmetric_info_nce

Golden = Callable[[str], dict[str, Any]]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def parameters(numbers: dict[str, Any], prefix: str = "param.") -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def encoder_of(numbers: dict[str, Any], *, temporal: bool) -> RegionEncoder:
    encoder = RegionEncoder(
        numbers["feature_dim"],
        numbers["embed_dim"],
        numbers["depth"],
        numbers["num_heads"],
        numbers["num_frames"],
        numbers["out"].shape[-1],
        temporal,
        mlp_ratio=numbers["mlp_ratio"],
    ).double()
    encoder.load_released(parameters(numbers))
    return encoder


# -------------------------------------------------------------------------------------------- the released numbers


@pytest.mark.parametrize(("name", "temporal"), [("region_encoder", False), ("region_encoder_timeattn", True)])
def test_the_region_encoder_gives_the_released_numbers(golden: Golden, name: str, temporal: bool) -> None:
    numbers = golden(f"demovlp/{name}")
    encoder = encoder_of(numbers, temporal=temporal)
    given_regions = numbers["region_features"].requires_grad_()
    width = numbers["feature_dim"]
    out = encoder(given_regions[..., :width], given_regions[..., width:], numbers["region_valid"])
    assert_close(out, numbers["out"], **EXACT)
    (out * numbers["cotangent"]).sum().backward()
    assert_close(given_regions.grad, numbers["grad_region_features"], **EXACT)
    expected = parameters(numbers, "grad.")
    assert not expected.pop("norm.weight").any()  # the released encoder has a norm that it does not use
    positions = expected.pop("custom_pos_embed")
    assert not positions[:, 1:].any()
    assert_close(encoder.cls_position.grad, positions[:, :1], **EXACT)
    for parameter, gradient in expected.items():
        assert_close(encoder.get_parameter(parameter).grad, gradient, **EXACT)


@pytest.mark.parametrize("kind", ["equal", "prob"])
def test_scores_and_alignment_loss_are_the_released_ones(golden: Golden, kind: str) -> None:
    numbers = golden(f"demovlp/region_word_alignment_{kind}")
    regions, words = numbers["regions"].requires_grad_(), numbers["words"].requires_grad_()
    valid = [numbers["region_mask"] == 0, numbers["word_mask"] == 0]
    scores = region_word_scores(regions, words, *valid, scale=numbers["lambda_softmax"], focal=kind == "equal")
    assert_close(scores, numbers["score"], **EXACT)
    loss = region_word_alignment_loss(scores, numbers["lambda_softmax"])
    assert_close(float(loss.detach()), numbers["kl_loss"], **EXACT)
    loss.backward()
    assert_close(regions.grad, numbers["grad_regions"], **EXACT)
    assert_close(words.grad, numbers["grad_words"], **EXACT)


@pytest.mark.parametrize("kind", ["equal", "prob"])
def test_what_words_and_regions_attend_to_is_the_released_one(golden: Golden, kind: str) -> None:
    numbers = golden(f"demovlp/region_word_alignment_{kind}")
    regions, words = numbers["regions"], numbers["words"]
    regions_valid, words_valid = numbers["region_mask"] == 0, numbers["word_mask"] == 0
    pairs = relevance(regions, words)
    unit = torch.nn.functional.normalize
    by_words = attention_weights(pairs.transpose(2, 3), words_valid, regions_valid, focal=kind == "equal")
    found = torch.einsum("ijqx,ixp->ijqp", by_words, unit(regions, dim=-1))
    assert_close(found, numbers["attended_regions_per_word"], rtol=1e-6, atol=1e-7)
    by_regions = attention_weights(pairs.transpose(0, 1), regions_valid, words_valid, focal=kind == "equal")
    found = torch.einsum("ijqx,ixp->ijqp", by_regions, unit(words, dim=-1))
    assert_close(found, numbers["attended_words_per_region"], rtol=1e-6, atol=1e-7)


def test_the_whole_loss_is_the_released_one(golden: Golden) -> None:
    numbers = golden("demovlp/global_local_loss")
    names = ("text_global", "video_global", "regions", "words")
    text, video, regions, words = (numbers[name].requires_grad_() for name in names)
    contrast = symmetric_info_nce(cosine_similarity_matrix(text, video), numbers["temperature"])
    valid = [numbers["region_mask"] == 0, numbers["word_mask"] == 0]
    aligned = region_word_alignment_loss(region_word_scores(regions, words, *valid), numbers["lambda_softmax"])
    assert_close(float(contrast.detach()), float(numbers["global_loss"]), **EXACT)
    assert_close(float(aligned.detach()), float(numbers["local_loss"]), **EXACT)
    (contrast + aligned).backward()
    for name, tensor in zip(names, (text, video, regions, words), strict=True):
        assert_close(tensor.grad, numbers[f"grad_{name}"], **EXACT)


def test_the_answer_head_gives_the_released_numbers(golden: Golden) -> None:
    numbers = golden("demovlp/video_qa_head")
    state = {}
    places = {
        "v_att.v_proj.main.0": "attention_regions",
        "v_att.q_proj.main.0": "attention_text",
        "v_att.linear": "attention_out",
        "classifier.q_net.main.0": "text",
        "classifier.v_net.main.0": "regions",
        "classifier.main.0": "answer.0",
        "classifier.main.3": "out",
    }
    for name, value in parameters(numbers).items():
        place, _, kind = name.rpartition(".")
        kind = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}.get(
            kind, kind
        )
        state[f"{places[place]}.{kind}"] = torch.as_tensor(value, dtype=torch.float64)
    text, regions = numbers["text"].requires_grad_(), numbers["regions"].requires_grad_()
    head = RegionQAHead(regions.shape[2], text.shape[1], numbers["logits"].shape[1], hidden=8).double().eval()
    head.load_state_dict(state)
    valid = numbers["valid"]
    assert_close(head.attention(text, regions, valid), numbers["attention"][..., 0], **EXACT)
    logits = head(text, regions, valid)
    assert_close(logits, numbers["logits"], **EXACT)
    (logits * numbers["cotangent"]).sum().backward()
    assert_close(text.grad, numbers["grad_text"], **EXACT)
    assert_close(regions.grad, numbers["grad_regions"], **EXACT)


# ------------------------------------------------------------------------------------------------------- scores


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_the_order_of_regions_and_words_does_not_matter(seed: int, focal: bool, ignore_padding: bool) -> None:
    torch.manual_seed(seed)
    regions, words = rows(2, 7, 5), rows(3, 4, 5)
    valid, there = torch.rand(2, 7) < 0.7, torch.rand(3, 4) < 0.7
    valid[:, 0] = there[:, 0] = True
    options = {"focal": focal, "ignore_padding": ignore_padding}
    first, second = torch.randperm(7), torch.randperm(4)
    scores = region_word_scores(regions, words, valid, there, **options)
    moved = region_word_scores(regions[:, first], words[:, second], valid[:, first], there[:, second], **options)
    assert_close(moved, scores, rtol=1e-9, atol=1e-9)
    assert (scores.abs() <= 2 + 1e-9).all()


@pytest.mark.parametrize("focal", [True, False])
def test_padded_context_is_never_attended_to(focal: bool) -> None:
    valid = torch.tensor([[True, True, False, False]])
    pairs = relevance(rows(1, 4, 6), rows(1, 3, 6)).transpose(2, 3)
    weights = attention_weights(pairs, torch.ones(1, 3, dtype=torch.bool), valid, focal=focal)
    assert not weights[..., 2:].any()
    assert_close(weights.sum(-1), torch.ones(1, 1, 3, dtype=torch.float64))


def test_padding_asks_in_the_released_form_and_does_not_where_it_is_ignored() -> None:
    regions, words = rows(2, 5, 6), rows(2, 4, 6)
    valid = torch.tensor([[True] * 3 + [False] * 2] * 2)
    changed = regions.clone()
    changed[:, 3:] = rows(2, 2, 6)
    released = [region_word_scores(r, words, valid) for r in (regions, changed)]
    assert (released[0] - released[1]).abs().min() > 1e-4
    ignored = [region_word_scores(r, words, valid, ignore_padding=True) for r in (regions, changed)]
    assert torch.equal(*ignored)


@pytest.mark.parametrize("focal", [True, False])
def test_with_padding_ignored_a_score_is_that_of_the_rows_without_padding(focal: bool) -> None:
    regions, words = rows(2, 5, 6), rows(3, 6, 6)
    valid, there = torch.tensor([[True] * 3 + [False] * 2] * 2), torch.tensor([[True] * 4 + [False] * 2] * 3)
    padded = region_word_scores(regions, words, valid, there, focal=focal, ignore_padding=True)
    bare = region_word_scores(regions[:, :3], words[:, :4], focal=focal)
    assert_close(padded, bare, **EXACT)


def test_ignored_padding_gets_no_gradient() -> None:
    regions, words = rows(2, 5, 6).requires_grad_(), rows(3, 6, 6).requires_grad_()
    valid, there = torch.tensor([[True] * 3 + [False] * 2] * 2), torch.tensor([[True] * 4 + [False] * 2] * 3)
    region_word_scores(regions, words, valid, there, ignore_padding=True).sum().backward()
    assert not regions.grad[:, 3:].any()
    assert not words.grad[:, 4:].any()
    assert regions.grad[:, :3].any()


@pytest.mark.parametrize("focal", [True, False])
def test_one_region_that_is_its_one_word_scores_two(focal: bool) -> None:
    vector = rows(1, 1, 8).requires_grad_()
    score = region_word_scores(vector, vector, focal=focal)
    assert_close(score, torch.full((1, 1), 2.0, dtype=torch.float64), rtol=0, atol=1e-7)
    score.sum().backward()
    assert torch.isfinite(vector.grad).all()


def test_equal_weights_are_all_kept_by_the_focal_step() -> None:
    ones = torch.ones(1, 6, dtype=torch.bool)
    weights = attention_weights(torch.full((1, 1, 6, 6), 0.5), ones, ones)
    assert_close(weights, torch.full((1, 1, 6, 6), 1 / 6))


def test_the_focal_step_keeps_only_what_is_above_the_mean() -> None:
    ones = torch.ones(1, 5, dtype=torch.bool)
    pairs = relevance(rows(1, 5, 4), rows(1, 3, 4)).transpose(2, 3)
    soft = attention_weights(pairs, ones[:, :3], ones, focal=False)
    focal = attention_weights(pairs, ones[:, :3], ones, focal=True)
    kept = soft > 1 / 5
    assert torch.equal(focal > 0, kept)
    assert_close(focal, soft * kept / (soft * kept).sum(-1, keepdim=True))


def test_without_scale_every_query_attends_evenly_to_what_is_there() -> None:
    valid = torch.tensor([[True, True, True, False]])
    pairs = relevance(rows(1, 4, 6), rows(1, 2, 6)).transpose(2, 3)
    weights = attention_weights(pairs, torch.ones(1, 2, dtype=torch.bool), valid, scale=0.0, focal=False)
    assert_close(weights, (valid.double() / 3).expand(1, 1, 2, 4), rtol=1e-12, atol=0)


def test_a_video_without_any_region_scores_zero() -> None:
    regions, words = rows(2, 3, 4).requires_grad_(), rows(2, 3, 4).requires_grad_()
    valid = torch.tensor([[False] * 3, [True] * 3])
    score = region_word_scores(regions, words, valid, ignore_padding=True)
    score.sum().backward()
    assert not score[0].any()
    assert score[1].all()
    assert torch.isfinite(regions.grad).all() and torch.isfinite(words.grad).all()


def test_scores_are_computed_in_single_precision_at_least() -> None:
    regions, words = torch.randn(2, 5, 8), torch.randn(3, 4, 8)
    expected = region_word_scores(regions, words)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(region_word_scores(regions, words), expected)
    assert region_word_scores(regions.bfloat16(), words.bfloat16()).dtype == torch.float32


def test_scores_refuse_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="width 4, words 5"):
        region_word_scores(rows(1, 2, 4), rows(1, 2, 5))
    with pytest.raises(InputError, match="regions have shape"):
        region_word_scores(rows(2, 4), rows(1, 2, 4))
    with pytest.raises(InputError, match="validity of words"):
        region_word_scores(rows(1, 2, 4), rows(1, 2, 4), None, torch.ones(1, 3))


# --------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("count", [2, 6, 11])
def test_the_alignment_loss_has_the_known_values(count: int) -> None:
    even = region_word_alignment_loss(torch.zeros(count, count, dtype=torch.float64))
    expected = math.log(1 / count) + (count - 1) / count * math.log(1e6) - math.log1p(1e-6) / count
    assert_close(float(even), expected, rtol=1e-9, atol=1e-9)
    least = -math.log1p(count * 1e-6)
    right = region_word_alignment_loss(torch.eye(count, dtype=torch.float64) * 10)
    assert least <= float(right) < 1e-5
    for _ in range(5):
        assert float(region_word_alignment_loss(rows(count, count))) >= least


def test_the_alignment_loss_reads_rows_as_videos() -> None:
    scores = rows(4, 4)
    assert abs(float(region_word_alignment_loss(scores) - region_word_alignment_loss(scores.T))) > 1e-3
    # What is added to all sentences of a video changes nothing.
    assert_close(region_word_alignment_loss(scores + rows(4, 1)), region_word_alignment_loss(scores))


@pytest.mark.parametrize("arguments", [(torch.zeros(2, 3),), (torch.zeros(2, 2), 0.0), (torch.zeros(2, 2), 20.0, 0.0)])
def test_the_alignment_loss_refuses_what_does_not_fit(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        region_word_alignment_loss(*arguments)


# ------------------------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize("temporal", [False, True])
def test_moving_regions_within_a_frame_moves_their_rows(temporal: bool) -> None:
    encoder = RegionEncoder(5, 8, 2, 2, 3, 4, temporal).double().eval()
    torch.nn.init.normal_(encoder.temporal_embed)
    features, geometry = rows(2, 3, 4, 5), rows(2, 3, 4, 6)
    valid = torch.rand(2, 3, 4) < 0.8
    order = torch.randperm(4)
    out = encoder(features, geometry, valid)
    moved = encoder(features[:, :, order], geometry[:, :, order], valid[:, :, order])
    assert_close(moved[:, 0], out[:, 0])
    assert_close(moved[:, 1:], out[:, 1:].unflatten(1, (3, 4))[:, :, order].flatten(1, 2))


def test_frames_are_told_apart_only_by_their_positions() -> None:
    encoder = RegionEncoder(5, 8, 2, 2, 3, 4).double().eval()
    features, geometry = rows(1, 3, 4, 5), rows(1, 3, 4, 6)
    order = torch.tensor([2, 0, 1])

    def moved() -> tuple[Tensor, Tensor]:
        out = encoder(features, geometry)[:, 1:].unflatten(1, (3, 4))
        return out[:, order], encoder(features[:, order], geometry[:, order])[:, 1:].unflatten(1, (3, 4))

    assert_close(*moved())
    torch.nn.init.normal_(encoder.temporal_embed)
    first, second = moved()
    assert (first - second).abs().max() > 1e-3


def test_the_content_of_padding_does_not_reach_the_encoder() -> None:
    encoder = RegionEncoder(5, 8, 2, 2, 3, 4).double().eval()
    features, geometry, valid = rows(1, 2, 4, 5), rows(1, 2, 4, 6), torch.ones(1, 2, 4)
    valid[..., 3] = 0
    out = encoder(features, geometry, valid)
    features[..., 3, :] += 1
    seen = torch.cat([torch.ones(1, 1), valid.flatten(1)], 1).bool()
    assert_close(encoder(features, geometry, valid)[seen], out[seen], rtol=1e-12, atol=1e-12)


def test_the_encoder_refuses_what_does_not_fit() -> None:
    encoder = RegionEncoder(5, 8, 1, 2, 3, 4)
    with pytest.raises(InputError, match="1 to 3"):
        encoder(torch.zeros(1, 4, 2, 5), torch.zeros(1, 4, 2, 6))
    with pytest.raises(InputError, match=r"\(B, T, R, 5\)"):
        encoder(torch.zeros(1, 2, 2, 6), torch.zeros(1, 2, 2, 6))
    with pytest.raises(InputError, match="geometry"):
        encoder(torch.zeros(1, 2, 2, 5), torch.zeros(1, 2, 2, 4))


# -------------------------------------------------------------------------------------------------- answer head


def test_the_padded_regions_of_the_answer_head_have_logit_zero() -> None:
    head = RegionQAHead(4, 3, 5, hidden=8).eval()
    valid = torch.tensor([[1, 1, 0]])
    weights = head.attention(torch.randn(1, 3), torch.randn(1, 3, 4), valid)
    assert weights[0, 2] > 0
    assert_close(weights.sum(), torch.tensor(1.0))


def test_every_projection_of_the_answer_head_has_one_gain() -> None:
    head = RegionQAHead(4, 3, 5, hidden=8)
    gains = [value for name, value in head.named_parameters() if name.endswith("original0")]
    assert len(gains) == 5
    assert all(gain.numel() == 1 for gain in gains)
