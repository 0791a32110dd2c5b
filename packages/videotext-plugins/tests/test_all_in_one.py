"""The unified transformer, token rolling and the transport between words and patches: the official numbers, and what
holds for every input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird.testing import assert_close
from bowerbird_videotext.all_in_one import UnifiedVideoTextTransformer
from bowerbird_videotext.all_in_one_heads import (
    MaskedLanguageHead,
    MultipleChoiceScorer,
    OpenEndedQAHead,
    VideoTextMatchingHead,
)
from bowerbird_videotext.optimal_transport import ipot_transport, transport_distance, word_patch_alignment_loss
from bowerbird_videotext.token_roll import temporal_token_roll

SMALL: dict[str, Any] = {
    "vocab_size": 20, "image_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0,
    "num_frames": 4, "max_text_length": 8, "projection_dim": 4,
}  # fmt: skip


def small(**changes: Any) -> UnifiedVideoTextTransformer:
    """In float64, eval mode, with weights large enough that every part shows."""
    model = UnifiedVideoTextTransformer(**{**SMALL, **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def clips(frames: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, frames, 3, 16, 16, dtype=torch.float64)


def texts(length: int = 6, batch: int = 2) -> Tensor:
    return torch.randint(1, 20, (batch, length))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).abs().max() < tolerance)


# ------------------------------------------------------------------------------------------------ official numbers


@pytest.mark.parametrize("name", ["token_roll_T3_L17", "token_roll_T4_L50"])
def test_rolling_and_its_gradient(golden, name: str) -> None:
    values = golden(f"all-in-one/{name}")
    tokens = values["tokens"].unflatten(0, (-1, values["num_frames"])).requires_grad_()
    rolled = temporal_token_roll(tokens, values["divisor"])
    (rolled.flatten(0, 1) * values["cotangent"]).sum().backward()
    assert torch.equal(rolled.flatten(0, 1), values["out_token_roll"])
    assert torch.equal(tokens.grad, values["grad_token_roll"].view_as(tokens))


def from_golden(values: dict[str, Any]) -> tuple[UnifiedVideoTextTransformer, VideoTextMatchingHead]:
    model = UnifiedVideoTextTransformer(
        image_size=16,
        patch_size=4,
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        num_frames=values["num_frames"],
        roll_divisor=values["roll_divisor"],
        projection_dim=4,
    ).double()
    matching = VideoTextMatchingHead(values["embed_dim"]).double()
    state = {name.removeprefix("param."): value for name, value in values.items() if name.startswith("param.")}
    matching.load_state_dict({name: state.pop(f"itm.{name}") for name in ("fc.weight", "fc.bias")})
    renamed = {name.removeprefix("vit.").replace("pooler.dense", "pooler"): value for name, value in state.items()}
    assert not model.load_state_dict(renamed, strict=False).unexpected_keys
    return model.eval(), matching


def test_a_joint_pass_and_its_gradients(golden) -> None:
    values = golden("all-in-one/unified_forward_joint")
    model, matching = from_golden(values)
    words = values["word_embeddings"].requires_grad_()
    frames = values["image_embeddings"].requires_grad_()
    output = model.encode(words, values["text_mask"], frames.unflatten(0, (2, 3)), values["image_mask"].view(2, 3, -1))
    logits = matching(output.pooled)
    assert_close(output.text, values["out_text_feats"])
    assert_close(output.video, values["out_image_feats"])
    assert_close(output.pooled, values["out_cls_feats"])
    assert_close(output.first, values["out_raw_cls_feats"])
    assert_close(logits, values["out_itm_logits"])
    assert_close(matching.score(output.pooled), values["out_rank_score"])
    outputs = (output.text, output.video, output.pooled, output.first, logits)
    torch.stack([(out * values[f"cotangent_{i}"]).sum() for i, out in enumerate(outputs)]).sum().backward()
    assert_close(words.grad, values["grad_word_embeddings"])
    assert_close(frames.grad, values["grad_image_embeddings"])


@pytest.mark.parametrize("mode", ["text", "video"])
def test_a_pass_of_one_side_alone_and_its_gradients(golden, mode: str) -> None:
    values = golden(f"all-in-one/unified_forward_{mode}")
    model, _ = from_golden(values)
    words = values["word_embeddings"].requires_grad_()
    frames = values["image_embeddings"].requires_grad_()
    if mode == "text":
        output = model.encode(words, values["text_mask"])
        rows, leaf, gradient = output.text, words, values["grad_word_embeddings"]
        assert_close(rows, values["out_text_feats"])
        assert output.video is None
    else:
        output = model.encode(frames=frames.unflatten(0, (2, 3)))
        rows, leaf, gradient = output.video, frames, values["grad_image_embeddings"]
        assert_close(rows, values["out_image_feats"])
        assert output.text is None
    assert_close(output.pooled, values["out_cls_feats"])
    assert_close(output.first, values["out_raw_cls_feats"])
    outputs = (rows, output.pooled, output.first)
    torch.stack([(out * values[f"cotangent_{i}"]).sum() for i, out in enumerate(outputs)]).sum().backward()
    assert_close(leaf.grad, gradient)


def test_tokens_of_frames_in_both_orders(golden) -> None:
    values = golden("all-in-one/visual_embedding")
    model = UnifiedVideoTextTransformer(
        image_size=16, patch_size=4, embed_dim=8, depth=0, num_heads=2, num_frames=values["num_frames"]
    ).double()
    state = {name.removeprefix("param."): value for name, value in values.items() if name.startswith("param.")}
    model.load_state_dict(state, strict=False)
    assert_close(model.embed_video(values["video"]).flatten(0, 1), values["out_tokens_canonical_order"])
    order = values["official_patch_order"].unflatten(0, (2, 3))
    assert_close(model.embed_video(values["video"], order).flatten(0, 1), values["out_tokens_official_order"])


def test_transport_between_words_and_patches(golden) -> None:
    values = golden("all-in-one/word_patch_alignment")
    words, patches = values["words"].requires_grad_(), values["patches"].requires_grad_()
    pads, options = (
        (values["word_pad"], values["patch_pad"]),
        {"beta": values["beta"], "iterations": values["iterations"]},
    )
    distance = transport_distance(words, patches, *pads, **options)
    (distance * values["cotangent"]).sum().backward()
    cost = 1 - torch.cosine_similarity(words[:, :, None], patches[:, None], dim=-1)
    plan = ipot_transport(cost, *pads, **options)
    assert_close(plan, values["transport_plan"])
    for pad, axis in ((pads[0], 1), (pads[1], 2)):  # of words, of patches
        share = (~pad).double() / (~pad).sum(dim=1, keepdim=True)
        assert close(plan.sum(dim=axis), share, 1e-12 if axis == 1 else 1e-3)
    assert_close(distance, values["distance"])
    assert_close(words.grad, values["grad_words"])
    assert_close(patches.grad, values["grad_patches"])
    matched = torch.tensor([True, False, True])
    d = values["distance"]
    assert_close(word_patch_alignment_loss(words, patches, *pads, matched, **options), (d[0] - d[1] + d[2]) / 3)


# ------------------------------------------------------------------------------------------------ rolling


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 5), length=st.integers(1, 20), divisor=st.integers(2, 9), first=st.integers(0, 4))
def test_rolling_is_a_permutation_whose_transpose_is_its_inverse(
    frames: int, length: int, divisor: int, first: int
) -> None:
    cells = frames * (first + length)
    unit = torch.eye(cells, dtype=torch.float64).view(1, frames, first + length, cells).requires_grad_()
    rolled = temporal_token_roll(unit, divisor, first=first)
    matrix = rolled.detach().view(cells, cells)
    assert ((matrix == 1).sum(0) == 1).all() and ((matrix == 1).sum(1) == 1).all()
    assert torch.equal(rolled.sum(dim=1), unit.sum(dim=1))  # a token changes its frame, never its place
    assert torch.equal(rolled[:, :, : first + 1], unit[:, :, : first + 1])
    if length < divisor or frames == 1:
        assert torch.equal(rolled, unit)
    rolled.backward(rolled.detach())
    assert torch.equal(unit.grad, unit.detach())
    again = unit.detach()
    for _ in range(frames):
        again = temporal_token_roll(again, divisor, first=first)
    assert torch.equal(again, unit)


def test_which_tokens_come_from_which_frame() -> None:
    tokens = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 17, 1)
    rolled = temporal_token_roll(tokens)[0, :, :, 0]
    assert rolled[:, 0].tolist() == [0, 1, 2]
    assert rolled[:, 1].tolist() == rolled[:, 2].tolist() == [2, 0, 1]
    assert rolled[:, 3].tolist() == rolled[:, 14].tolist() == [0, 1, 2]
    assert rolled[:, 15].tolist() == rolled[:, 16].tolist() == [1, 2, 0]


def test_rolling_can_be_differentiated_twice() -> None:
    tokens = torch.randn(1, 3, 9, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: temporal_token_roll(x, 4) ** 2, tokens)


# ------------------------------------------------------------------------------------------------ the transformer


def test_with_one_frame_rolling_changes_nothing() -> None:
    model = small()
    video, ids = clips(frames=1), texts()
    rolled = model(video, ids)
    model.roll_divisor = None
    assert torch.equal(model(video, ids).pooled, rolled.pooled)


def test_without_frame_positions_turning_the_frames_around_a_circle_changes_nothing_and_reversing_them_does() -> None:
    model, video, ids = small(temporal_embedding=False), clips(frames=4), texts()
    output = model(video, ids)
    for shift in (1, 2, 3):
        assert close(model(video.roll(shift, dims=1), ids).text, output.text)
    assert not close(model(video.flip(1), ids).pooled, output.pooled, 1e-4)


def test_without_rolling_and_frame_positions_the_order_of_frames_is_invisible() -> None:
    video, ids = clips(frames=4), texts()
    order = torch.tensor([2, 0, 3, 1])
    still = small(temporal_embedding=False, roll_divisor=None)
    assert close(still(video[:, order], ids).text, still(video, ids).text)
    rolled = small(temporal_embedding=False)
    assert not close(rolled(video[:, order], ids).pooled, rolled(video, ids).pooled, 1e-4)
    placed = small(roll_divisor=None)
    assert not close(placed(video[:, order], ids).pooled, placed(video, ids).pooled, 1e-4)


def test_of_two_frames_rolling_does_not_see_the_order() -> None:
    model, video, ids = small(temporal_embedding=False), clips(frames=2), texts()
    assert close(model(video.flip(1), ids).text, model(video, ids).text)


def test_padding_of_a_text_changes_no_other_row() -> None:
    model, video, ids = small(), clips(), texts(length=8)
    mask = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
    others = torch.where(mask == 1, ids, (ids + 7) % 20)
    for first, second in (
        (model(video, ids, mask), model(video, others, mask)),
        (model(None, ids, mask), model(None, others, mask)),
    ):
        assert torch.equal(first.pooled, second.pooled)
        assert torch.equal(first.text[0, :5], second.text[0, :5])
        assert torch.equal(first.text[1], second.text[1])
    short = model(video[:1], ids[:1, :5])
    assert close(model(video, ids, mask).text[0, :5], short.text[0])
    assert close(model(video, ids, mask).video[0], short.video[0])


def test_one_copy_of_a_text_gives_what_a_copy_per_frame_gives() -> None:
    model, ids = small(), texts()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    words = (model.embed_text(ids) + model.token_type.weight[0]).repeat_interleave(3, dim=0)
    copies = model.norm(model._blocks(words, mask.repeat_interleave(3, dim=0))).unflatten(0, (2, 3)).mean(dim=1)
    output = model(text_ids=ids, text_mask=mask)
    assert close(output.text, model.txt_proj(copies))
    assert close(output.first, copies[:, 0])


def test_videos_alone_do_not_see_the_order_of_frames_without_their_positions() -> None:
    video, order = clips(frames=4), torch.tensor([2, 0, 3, 1])
    model = small(temporal_embedding=False)
    assert close(model(video[:, order]).video, model(video).video)
    model = small()
    assert not close(model(video[:, order]).video, model(video).video, 1e-4)


def test_frames_alone_are_a_plain_vision_transformer() -> None:
    """Our blocks are timm's: of one frame the class token is that of timm's model with the same weights."""
    from timm.models.vision_transformer import VisionTransformer

    model = small(temporal_embedding=False)
    with torch.no_grad():
        model.token_type.weight.zero_()
    plain = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=0, global_pool="token"
    )
    names = plain.state_dict().keys()
    plain.double().eval().load_state_dict({name: model.state_dict()[name] for name in names})
    video = clips(frames=1)
    assert close(model(video).first, plain(video[:, 0]))


def test_fewer_frames_are_as_in_a_model_made_for_them() -> None:
    model, video, ids = small(), clips(frames=2), texts()
    shorter = UnifiedVideoTextTransformer(**{**SMALL, "num_frames": 2}).double().eval()
    state = model.state_dict()
    shorter.load_state_dict({**state, "temporal_embed": state["temporal_embed"][:, :2]})
    assert torch.equal(shorter(video, ids).pooled, model(video, ids).pooled)


def test_shuffled_patches_roll_in_other_places_and_only_of_pairs() -> None:
    model, video, ids = small(shuffle_patches=True), clips(frames=3), texts()
    assert not close(model(video, ids).pooled, model(video, ids).pooled, 1e-4)
    assert torch.equal(model(video).video, model(video).video)
    model.roll_divisor = None  # then the order of patches is invisible
    assert close(model(video, ids).pooled, model(video, ids).pooled)


def test_frame_positions_start_at_zero() -> None:
    assert not UnifiedVideoTextTransformer(**SMALL).temporal_embed.any()


def test_rolling_has_no_parameters() -> None:
    def count(divisor: int | None) -> int:
        model = UnifiedVideoTextTransformer(**{**SMALL, "roll_divisor": divisor})
        return sum(p.numel() for p in model.parameters())

    assert count(8) == count(None)


@pytest.mark.parametrize("given", ["pair", "text", "video"])
def test_gradients_reach_what_a_pass_uses(given: str) -> None:
    model = UnifiedVideoTextTransformer(**SMALL)
    inputs = {"pair": {"video", "text_ids"}, "text": {"text_ids"}, "video": {"video"}}[given]
    batch = {"video": clips().float(), "text_ids": texts()}
    output = model(**{name: batch[name] for name in inputs})
    used = [part for part in (output.text, output.video, output.pooled) if part is not None]
    torch.stack([(part * torch.randn_like(part)).sum() for part in used]).sum().backward()
    others = {
        "pair": ("txt_proj", "vid_proj"),
        "text": ("patch", "cls", "pos_", "temporal", "vid_proj"),
        "video": ("text_", "txt_proj"),
    }
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached != name.startswith(others[given]), name


# ------------------------------------------------------------------------------------------------ transport


@settings(max_examples=25, deadline=None)
@given(words=st.integers(1, 7), patches=st.integers(1, 9), seed=st.integers(0, 1000))
def test_a_plan_has_the_marginals_of_words_exactly_and_of_patches_nearly(words: int, patches: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = 2 * torch.rand(3, words + 2, patches + 3, generator=generator, dtype=torch.float64)
    x_pad, y_pad = torch.zeros(3, words + 2, dtype=torch.bool), torch.zeros(3, patches + 3, dtype=torch.bool)
    x_pad[:, words:], y_pad[:, patches:] = True, True
    plan = ipot_transport(cost, x_pad, y_pad, iterations=200)
    assert (plan >= 0).all()
    assert (plan[:, patches:] == 0).all() and (plan[:, :, words:] == 0).all()
    assert close(plan.sum(1)[:, :words], torch.full((3, words), 1 / words, dtype=torch.float64))
    assert close(plan.sum(2)[:, :patches], torch.full((3, patches), 1 / patches, dtype=torch.float64), 2e-3)
    other = cost.masked_fill((x_pad[:, :, None] | y_pad[:, None]), 1.7)
    assert close(ipot_transport(other, x_pad, y_pad, iterations=200), plan)


def test_a_distance_is_never_negative_and_zero_between_equal_sets() -> None:
    vectors = torch.randn(4, 5, 6, dtype=torch.float64)
    pads = torch.zeros(4, 5, dtype=torch.bool)
    assert (transport_distance(vectors, torch.randn_like(vectors), pads, pads) >= 0).all()
    assert (transport_distance(vectors, vectors[:, [2, 0, 4, 1, 3]], pads, pads, iterations=200) < 0.05).all()


def test_the_distance_is_that_of_the_exact_transport() -> None:
    from scipy.optimize import linear_sum_assignment

    words, patches = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(1, 6, 4, dtype=torch.float64)
    pads = torch.zeros(1, 6, dtype=torch.bool)
    cost = 1 - torch.cosine_similarity(words[0, :, None], patches[0, None], dim=-1)
    rows, columns = linear_sum_assignment(cost.numpy())
    distance = transport_distance(words, patches, pads, pads, iterations=3000)
    assert abs(distance.item() - cost[rows, columns].mean().item()) < 1e-3


def test_a_text_without_words_is_no_distance_away() -> None:
    words, patches = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 4)
    word_pad = torch.tensor([[True, True, True], [False, True, True]])
    distance = transport_distance(words, patches, word_pad, torch.zeros(2, 5, dtype=torch.bool))
    distance.sum().backward()
    assert distance[0] == 0 and distance[1] > 0
    assert words.grad.isfinite().all() and not words.grad[0].any()


def test_half_precision_around_it_does_not_reach_the_transport() -> None:
    words, patches = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    pads = (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool))
    outside = transport_distance(words, patches, *pads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transport_distance(words, patches, *pads), outside)


def test_matched_pairs_are_drawn_together_and_others_apart() -> None:
    words, patches = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    pads = (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool))
    first = word_patch_alignment_loss(words, patches, *pads, torch.tensor([1, 0]))
    second = word_patch_alignment_loss(words, patches, *pads, torch.tensor([0, 1]))
    assert close(first, -second, 1e-6)


# ------------------------------------------------------------------------------------------------ heads


def test_a_scorer_starts_as_the_row_of_the_matching_head_that_means_yes() -> None:
    matching, pooled = VideoTextMatchingHead(8), torch.randn(3, 5, 8)
    scorer = MultipleChoiceScorer.from_matching(matching)
    assert close(scorer(pooled), matching(pooled)[..., 1], 1e-6)
    assert close(matching.score(pooled), matching(pooled)[..., 1], 1e-6)
    assert scorer(pooled).shape == (3, 5)
    with torch.no_grad():
        matching.fc.weight.zero_()
    assert scorer.fc.weight.any()  # a copy


def test_heads_are_made_of_the_stated_layers() -> None:
    kinds = [type(layer) for layer in OpenEndedQAHead(8, 5).layers]
    assert kinds == [nn.Dropout, nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear]
    assert OpenEndedQAHead(8, 5)(torch.randn(2, 8)).shape == (2, 5)
    head, words = MaskedLanguageHead(8, 20), torch.randn(2, 3, 8)
    hidden = nn.functional.layer_norm(nn.functional.gelu(head.dense(words)), (8,), eps=1e-12)
    assert close(head(words), head.decoder(hidden), 1e-5)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(), "neither video nor text"),
        (lambda m: m(clips(frames=5)), "clips of 5 frames; this encoder takes 1 to 4"),
        (lambda m: m(clips()[..., :8]), r"needs \(B, T, 3, 16, 16\)"),
        (lambda m: m(clips()[:, 0]), "video has shape"),
        (lambda m: m(None, texts(length=9)), "sequences of 9 pieces; this text encoder takes 1 to 8"),
        (lambda m: m(None, texts() + 20), "the tokenizer belongs to another one"),
        (lambda m: UnifiedVideoTextTransformer(**{**SMALL, "vocab_size": None})(None, texts()), "no table of words"),
        (lambda m: m(clips(), texts(batch=3)), "3 texts and 2 videos"),
        (lambda m: m(clips(), texts(), torch.ones(2, 5)), "text_mask"),
        (lambda m: temporal_token_roll(torch.zeros(2, 3, 4)), r"expected \(B, T, L, D\)"),
        (lambda m: temporal_token_roll(torch.zeros(2, 3, 4, 1), 1), "divisor = 1"),
        (lambda m: ipot_transport(torch.ones(1, 2, 3), torch.zeros(1, 2), torch.zeros(1, 3)), "expected .* bool"),
        (lambda m: ipot_transport(torch.ones(1, 1, 1), *[torch.zeros(1, 1).bool()] * 2, beta=0.0), "beta = 0.0"),
        (lambda m: UnifiedVideoTextTransformer(**{**SMALL, "patch_size": 5}), "no multiple of patch_size"),
        (lambda m: UnifiedVideoTextTransformer(**{**SMALL, "num_heads": 3}), "no multiple of num_heads"),
        (lambda m: UnifiedVideoTextTransformer(**{**SMALL, "roll_divisor": 1}), "roll_divisor = 1"),
        (lambda m: UnifiedVideoTextTransformer(**{**SMALL, "num_frames": 0}), "num_frames = 0"),
        (lambda m: OpenEndedQAHead(8, 0), "num_answers = 0"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(UnifiedVideoTextTransformer(**SMALL).double())
