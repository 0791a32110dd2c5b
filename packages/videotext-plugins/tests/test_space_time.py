"""The encoder of clips: golden numbers of the released code, and what must be true of every such encoder."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from golden_encoder import golden_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird_videotext.space_time import (
    SpaceTimeBlock,
    SpaceTimeTransformer,
    divided_attention,
    inflate_temporal_embedding,
)

GOLDENS = ["space_time_encoder_rand", "space_time_encoder_rand_fewer_frames", "space_time_encoder_zeros"]


def make(**changes: Any) -> SpaceTimeTransformer:
    """A small encoder in float64 whose time attention and frame positions are not zero."""
    values = {"image_size": 12, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "max_frames": 4}
    encoder = SpaceTimeTransformer(**{**values, "time_init": "normal", **changes}).double()
    if encoder.temporal_embed is not None and changes.get("temporal_embedding", True):
        torch.nn.init.normal_(encoder.temporal_embed)
    return encoder


def clip(*, batch: int = 2, frames: int = 3, side: int = 12) -> Tensor:
    return torch.randn(batch, frames, 3, side, side, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the released code


@pytest.mark.parametrize("name", GOLDENS)
def test_tokens_output_and_gradients_are_those_of_the_released_code(golden: Any, name: str) -> None:
    values = golden(f"frozen-dual-encoder/{name}")
    encoder = golden_encoder(values)
    video = values["video"].requires_grad_()
    states = encoder.hidden_states(video)
    torch.testing.assert_close(states[0], values["tokens_in"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(states[-1], values["tokens_last_block"], rtol=1e-9, atol=1e-12)
    output = encoder(video)
    torch.testing.assert_close(output, values["cls_out"], rtol=1e-9, atol=1e-12)
    (output * values["cotangent"]).sum().backward()
    torch.testing.assert_close(video.grad, values["grad_video"], rtol=1e-9, atol=1e-12)
    parameters = dict(encoder.named_parameters())
    for key, gradient in values.items():
        if key.startswith("grad."):
            found = parameters[key.removeprefix("grad.")].grad
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12, msg=f"{key} differs")


@pytest.mark.parametrize("mode", ["frame", "tube"])
def test_kept_patches_alone_give_the_composition_of_released_pieces(golden: Any, mode: str) -> None:
    values = golden(f"mac/masked_video_encoder_{mode}")
    encoder = golden_encoder(values)
    video = values["video"].requires_grad_()
    output = encoder(video, keep=values["kept_patch_ids"])
    torch.testing.assert_close(output, values["cls_out"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(encoder(video), values["cls_out_unmasked"], rtol=1e-9, atol=1e-12)
    (output * values["cotangent"]).sum().backward()
    torch.testing.assert_close(video.grad, values["grad_video"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["inflate_temporal_2_to_5", "inflate_temporal_5_to_3"])
@pytest.mark.parametrize("mode", ["zeros", "interp", "bilinear"])
def test_frame_positions_for_more_or_fewer_frames_are_those_of_the_released_code(
    golden: Any, name: str, mode: Any
) -> None:
    values = golden(f"frozen-dual-encoder/{name}")
    found = inflate_temporal_embedding(values["temporal_embed"], values["num_frames_new"], mode)
    torch.testing.assert_close(found, values[f"out_{mode}"], rtol=1e-6, atol=1e-6)


def test_frame_positions_in_half_precision_are_those_of_full_precision_rounded() -> None:
    table = torch.randn(1, 300, 2).bfloat16()  # bfloat16 cannot count to 300
    found = inflate_temporal_embedding(table, 1000, "bilinear")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), inflate_temporal_embedding(table.float(), 1000, "bilinear"), rtol=0.02, atol=0.02
    )


# ------------------------------------------------------------------------------------------------ attention


def by_a_full_mask(
    query: Tensor, key: Tensor, value: Tensor, *, frames: int, axis: str, key_mask: Tensor | None
) -> Tensor:
    """Ordinary attention over all tokens with -infinity where a token may not look."""
    length = query.shape[1]
    count = (length - 1) // frames
    frame = torch.arange(length - 1) // count
    place = torch.arange(length - 1) % count
    group = frame if axis == "space" else place
    allowed = torch.ones(length, length, dtype=torch.bool)
    if axis != "joint":
        allowed[1:, 1:] = group[:, None] == group[None, :]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    logits = logits.masked_fill(~allowed, -torch.inf)
    if key_mask is not None:
        logits = logits + key_mask[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


@settings(max_examples=25, deadline=None)
@given(
    frames=st.integers(1, 4),
    count=st.integers(1, 4),
    heads=st.integers(1, 3),
    axis=st.sampled_from(["space", "time", "joint"]),
    padded=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_divided_attention_is_ordinary_attention_with_a_mask(
    frames: int, count: int, heads: int, axis: Any, padded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 1 + frames * count, heads, 4)
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    key_mask = None
    if padded:
        key_mask = torch.where(torch.rand(shape[:2], generator=generator) < 0.4, -100.0, 0.0).double()
        key_mask[:, 0] = 0
    found = divided_attention(query, key, value, frames=frames, axis=axis, key_mask=key_mask)
    expected = by_a_full_mask(query, key, value, frames=frames, axis=axis, key_mask=key_mask)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("axis", ["space", "time"])
def test_a_padded_token_has_no_influence_on_the_others(axis: Any) -> None:
    block = SpaceTimeBlock(8, 2, temporal=axis == "time", time_init="normal").double()
    tokens = torch.randn(2, 1 + 3 * 4, 8, dtype=torch.float64)
    mask = torch.zeros(2, 13, dtype=torch.float64)
    mask[:, 6] = -1e4
    changed = tokens.clone()
    changed[:, 6] += 1
    others = [i for i in range(13) if i != 6]
    first, second = block(tokens, 3, mask), block(changed, 3, mask)
    assert torch.equal(first[:, others], second[:, others])
    assert not torch.equal(block(tokens, 3)[:, 0], first[:, 0])


def test_tokens_that_fill_no_frames_and_masks_of_another_shape_are_refused() -> None:
    block = SpaceTimeBlock(8, 2)
    with pytest.raises(InputError, match="6 tokens besides the class token are no whole number of 4 frames"):
        block(torch.zeros(1, 7, 8), 4)
    with pytest.raises(InputError, match=r"key_mask has shape \(1, 6\)"):
        block(torch.zeros(1, 7, 8), 3, torch.zeros(1, 6))
    with pytest.raises(InputError, match="no multiple of 3 heads"):
        SpaceTimeBlock(8, 3)
    with pytest.raises(InputError, match="time_init = 'ones'"):
        SpaceTimeBlock(8, 2, time_init="ones")


# ------------------------------------------------------------------------------------------------ invariants


@pytest.mark.parametrize("time_init", ["zeros", "official_zeros"])
def test_a_fresh_encoder_of_one_frame_is_the_image_transformer_with_its_weights(time_init: Any) -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=12, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=0
    )
    vit = vit.double().eval()
    encoder = make(embed_dim=12, num_heads=3, time_init=time_init, temporal_embedding=True)
    torch.nn.init.zeros_(encoder.temporal_embed)
    missing = encoder.load_state_dict(vit.state_dict(), strict=False)
    assert not missing.unexpected_keys
    video = clip(frames=1)
    torch.testing.assert_close(encoder(video), vit(video[:, 0]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("time_init", ["zeros", "normal"])
def test_without_frame_positions_the_order_of_frames_is_invisible(time_init: Any) -> None:
    encoder = make(time_init=time_init)
    video = clip(frames=4)
    order = torch.tensor([2, 0, 3, 1])
    with_positions = (encoder(video) - encoder(video[:, order])).abs().max()
    torch.nn.init.zeros_(encoder.temporal_embed)
    torch.testing.assert_close(encoder(video), encoder(video[:, order]), rtol=1e-10, atol=1e-10)
    assert with_positions > 1e-4


def test_fewer_frames_are_encoded_as_by_an_encoder_made_for_fewer() -> None:
    encoder = make(max_frames=4)
    short = make(max_frames=2)
    state = encoder.state_dict()
    state["temporal_embed"] = inflate_temporal_embedding(state["temporal_embed"], 2)
    short.load_state_dict(state)
    video = clip(frames=2)
    assert torch.equal(encoder(video), short(video))


def test_time_attention_that_starts_at_zero_output_learns_and_that_of_the_released_code_does_not() -> None:
    video = clip()
    gradients = {}
    for time_init in ("zeros", "official_zeros"):
        torch.manual_seed(1)
        encoder = make(time_init=time_init)
        (encoder(video) * torch.linspace(-1, 1, 8)).sum().backward()
        attention = encoder.blocks[0].timeattn
        gradients[time_init] = {
            "qkv": attention.qkv.weight.grad.abs().max(),
            "proj": attention.proj.weight.grad.abs().max(),
            "bias": attention.proj.bias.grad.abs().max(),
        }
    assert gradients["official_zeros"]["qkv"] < 1e-12 and gradients["official_zeros"]["proj"] < 1e-12
    assert gradients["official_zeros"]["bias"] > 1e-6
    assert gradients["zeros"]["proj"] > 1e-6


def test_pixels_of_patches_that_are_not_kept_have_no_gradient_and_no_influence() -> None:
    encoder = make(max_frames=2)
    keep = torch.tensor([[[0, 4, 8], [1, 2, 5]]])
    video = clip(batch=1, frames=2).requires_grad_()
    (encoder(video, keep=keep) * torch.linspace(-1, 1, 8)).sum().backward()
    assert video.grad is not None
    cells = video.grad.abs().sum(2).unfold(2, 4, 4).unfold(3, 4, 4).sum((-2, -1)).flatten(2)  # (1, 2, 9)
    kept = torch.zeros(1, 2, 9, dtype=torch.bool).scatter(2, keep, True)
    assert (cells[~kept] == 0).all() and (cells[kept] > 0).all()


def test_kept_places_in_another_order_change_nothing_in_a_tube_or_without_time_attention() -> None:
    video, order = clip(), torch.tensor([2, 0, 3, 1])
    tube = torch.tensor([1, 3, 4, 8]).expand(2, 3, 4)
    encoder = make()
    torch.testing.assert_close(encoder(video, keep=tube), encoder(video, keep=tube[..., order]))
    keep = torch.rand(2, 3, 9).argsort(-1)[..., :4]
    space_only = make(temporal_attention=False)
    torch.testing.assert_close(space_only(video, keep=keep), space_only(video, keep=keep[..., order]))
    joint = make(temporal_attention=False, attention="joint")
    torch.testing.assert_close(joint(video, keep=keep), joint(video, keep=keep[..., order]))


def test_keeping_all_patches_is_the_whole_clip_and_returns_as_many_tokens_as_were_kept() -> None:
    encoder, video = make(), clip()
    everything = torch.arange(9).expand(2, 3, 9)
    torch.testing.assert_close(encoder(video, keep=everything), encoder(video))
    whole, patches = encoder(video, return_tokens=True, keep=everything[..., :4])
    assert whole.shape == (2, 8) and patches.shape == (2, 3, 4, 8)
    assert len(encoder.hidden_states(video)) == 3
    assert [state.shape for state in encoder.block_inputs(video)] == [(2, 28, 8), (2, 28, 8)]


def test_masked_patches_are_the_mask_token_whatever_they_show() -> None:
    encoder, video = make(), clip()
    mask = torch.rand(2, 3, 9) < 0.5
    with pytest.raises(InputError, match="has no mask token"):
        encoder(video, mask=mask)
    assert "mask_token" not in encoder.state_dict()
    assert encoder.create_mask_token() is encoder.create_mask_token()
    cells = mask.reshape(2, 3, 1, 3, 3).repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert torch.equal(encoder(video, mask=mask), encoder(torch.where(cells, torch.tensor(7.0), video), mask=mask))
    assert torch.equal(encoder(video, mask=torch.zeros_like(mask)), encoder(video))
    with pytest.raises(InputError, match=r"expected bool of \(2, 3, 9\)"):
        encoder(video, mask=mask[:, :2])


def test_bfloat16_agrees_with_float32_as_far_as_it_can() -> None:
    encoder, video = make().float(), clip().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = encoder(video)
    torch.testing.assert_close(coarse.float(), encoder(video), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 3, 12, 12), "clips of 5 frames; this encoder takes 1 to 4"),
        ((2, 0, 3, 12, 12), "clips of 0 frames"),
        ((2, 3, 3, 12, 16), r"needs \(B, T, 3, 12, 12\)"),
        ((2, 3, 1, 12, 12), r"needs \(B, T, 3, 12, 12\)"),
        ((2, 3, 12, 12), r"needs \(B, T, 3, 12, 12\)"),
    ],
)
def test_clips_of_another_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(shape, dtype=torch.float64))


def test_pixels_that_are_whole_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"video is torch\.uint8"):
        make()(torch.zeros(2, 3, 3, 12, 12, dtype=torch.uint8))


@pytest.mark.parametrize("attention", ["divided", "joint"])
def test_a_batch_of_no_clips_gives_no_vectors(attention: Any) -> None:
    encoder, video = make(attention=attention), clip(batch=0)
    whole, patches = encoder(video, return_tokens=True)
    assert whole.shape == (0, 8) and patches.shape == (0, 3, 9, 8)
    assert encoder(video, keep=torch.zeros(0, 3, 2, dtype=torch.int64)).shape == (0, 8)


def test_patches_that_do_not_exist_cannot_be_kept() -> None:
    with pytest.raises(InputError, match="keep holds patch 9; there are 0 to 8"):
        make()(clip(), keep=torch.full((2, 3, 2), 9))
    with pytest.raises(InputError, match="expected int64 of"):
        make()(clip(), keep=torch.zeros(2, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes",
    [{"patch_size": 5}, {"num_heads": 3}, {"max_frames": 0}, {"mlp_ratio": 0.0}, {"attention": "windowed"}],
)
def test_sizes_that_do_not_fit_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        make(**changes)


def test_frame_positions_refuse_other_forms() -> None:
    for weight, frames, mode in ((torch.zeros(2, 3), 2, "zeros"), (torch.zeros(1, 2, 3), 0, "zeros")):
        with pytest.raises(ValueError):
            inflate_temporal_embedding(weight, frames, mode)
    with pytest.raises(ValueError, match="mode = 'cubic'"):
        inflate_temporal_embedding(torch.zeros(1, 2, 3), 4, "cubic")
