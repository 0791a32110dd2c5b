"""BridgeFormer: the numbers of the authors' code, and what follows from its equations."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird_videotext.bridge import BridgeFormer, QuestionAttention
from bowerbird_videotext.space_time import SpaceTimeTransformer

Golden = Callable[[str], dict[str, Any]]
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
BRIDGE_PARTS = ("crossattn", "bridgeattn", "bridge_mlp", "norm4", "norm5", "norm6", "norm7")


def parts_of(values: dict[str, Any], prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Entries of the released model's state: those of the video encoder and those of the bridge, under our names."""
    video, bridge = {}, {}
    for key, tensor in values.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        if name.startswith("norm2."):
            bridge[name.replace("norm2", "norm", 1)] = tensor
        elif any(part in name for part in BRIDGE_PARTS):
            bridge[name] = tensor
        else:
            video[re.sub("^norm1", "norm", name)] = tensor
    return video, bridge


def models(values: dict[str, Any]) -> tuple[SpaceTimeTransformer, BridgeFormer]:
    size = {"embed_dim": values["embed_dim"], "depth": values["depth"], "num_heads": values["num_heads"]}
    video = SpaceTimeTransformer(
        image_size=values["img_size"],
        patch_size=values["patch_size"],
        mlp_ratio=values["mlp_ratio"],
        max_frames=values["num_frames_max"],
        temporal_attention=False,
        temporal_embedding=False,
        **size,
    ).double()
    bridge = BridgeFormer(mlp_ratio=values["mlp_ratio"], **size).double()
    video_state, bridge_state = parts_of(values, "param.")
    video.load_state_dict(video_state)
    bridge.load_state_dict(bridge_state)
    return video, bridge


def states_of(values: dict[str, Any]) -> list[Tensor]:
    found = sorted(key for key in values if re.fullmatch(r"question_hidden_\d+", key))
    return [values[key].requires_grad_() for key in found]


def test_the_cross_attention_and_its_gradients_are_the_authors(golden: Golden) -> None:
    values = golden("mcq/bridge_cross_attention")
    attention = QuestionAttention(8, values["num_heads"]).double()
    attention.load_state_dict({k.removeprefix("param."): v for k, v in values.items() if k.startswith("param.")})
    patches, question = values["video_tokens"].requires_grad_(), values["question"].requires_grad_()
    out = attention(patches, question, values["num_frames"])
    torch.testing.assert_close(out, values["out"], **CLOSE)
    (out * values["cotangent"]).sum().backward()
    torch.testing.assert_close(patches.grad, values["grad_video_tokens"], **CLOSE)
    torch.testing.assert_close(question.grad, values["grad_question"], **CLOSE)


@pytest.mark.parametrize("name", ["bridge_former", "bridge_former_fewer_frames"])
def test_both_outputs_and_their_gradients_are_the_authors(golden: Golden, name: str) -> None:
    values = golden(f"mcq/{name}")
    video_former, bridge = models(values)
    video, questions = values["video"].requires_grad_(), states_of(values)
    states = video_former.hidden_states(video)
    answer = bridge(states, questions, values["question_mask"], values["num_frames_run"])
    clip = video_former.norm(states[-1][:, 0])
    torch.testing.assert_close(answer, values["bridge_out"], **CLOSE)
    torch.testing.assert_close(clip, values["video_out"], **CLOSE)
    assert torch.equal(clip, video_former(video)), "the bridge changes the video encoder's output"
    torch.testing.assert_close(clip, values["video_former_out"], **CLOSE)

    ((answer * values["cotangent_bridge"]).sum() + (clip * values["cotangent_video"]).sum()).backward()
    torch.testing.assert_close(video.grad, values["grad_video_pixels"], **CLOSE)
    for i, state in enumerate(questions):
        wanted = values[f"grad_question_hidden_{i}"]
        torch.testing.assert_close(torch.zeros_like(state) if state.grad is None else state.grad, wanted, **CLOSE)
    video_grads, bridge_grads = parts_of(values, "grad.")
    for model, grads in ((video_former, video_grads), (bridge, bridge_grads)):
        assert grads
        for parameter, wanted in grads.items():
            torch.testing.assert_close(model.get_parameter(parameter).grad, wanted, **CLOSE)


# ------------------------------------------------------------------------------------------------ invariants


def made(frames: int = 3, patches: int = 4, pieces: int = 5, depth: int = 4) -> tuple[Any, ...]:
    """A bridge, and random states of two clips and their questions; the second question has one piece less."""
    bridge = BridgeFormer(8, depth, 2).double()
    videos = [torch.randn(2, 1 + frames * patches, 8, dtype=torch.double) for _ in range(depth)]
    questions = [torch.randn(2, pieces, 8, dtype=torch.double) for _ in range((depth + 1) // 2)]
    mask = torch.ones(2, pieces, dtype=torch.bool)
    mask[1, -1] = False
    return bridge, videos, questions, mask, frames


def test_padded_pieces_of_the_question_never_count() -> None:
    bridge, videos, questions, mask, frames = made()
    before = bridge(videos, questions, mask, frames)
    changed = [state.clone() for state in questions]
    for state in changed:
        state[1, -1] += 100
    assert torch.equal(bridge(videos, changed, mask, frames), before)
    # And they are no more than absent.
    alone = bridge([v[1:] for v in videos], [q[1:, :-1] for q in questions], mask[1:, :-1], frames)
    torch.testing.assert_close(alone, before[1:], **CLOSE)


def test_a_mask_of_numbers_is_the_mask_of_truth_values() -> None:
    bridge, videos, questions, mask, frames = made()
    assert torch.equal(bridge(videos, questions, mask, frames), bridge(videos, questions, mask.long(), frames))


@given(order=st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_the_order_of_the_frames_is_invisible_to_clip_and_answer(order: list[int]) -> None:
    torch.manual_seed(3)
    video_former = SpaceTimeTransformer(
        8, 4, 8, 2, 2, max_frames=3, temporal_attention=False, temporal_embedding=False
    ).double()
    bridge, video = BridgeFormer(8, 2, 2).double(), torch.randn(2, 3, 3, 8, 8, dtype=torch.double)
    question, mask = torch.randn(2, 4, 8, dtype=torch.double), torch.ones(2, 4)
    outputs = []
    for clip in (video, video[:, list(order)]):
        states = video_former.hidden_states(clip)
        outputs.append((video_former(clip), bridge(states, [question], mask, 3)))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_with_one_frame_the_cross_attention_is_the_ordinary_one() -> None:
    attention = QuestionAttention(8, 2).double()
    patches, question = torch.randn(2, 6, 8).double(), torch.randn(2, 5, 8).double()
    ordinary = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        ordinary.in_proj_weight.copy_(torch.cat([attention.q_question.weight, attention.kv_video.weight]))
        ordinary.in_proj_bias.copy_(torch.cat([attention.q_question.bias, attention.kv_video.bias]))
        ordinary.out_proj.load_state_dict(attention.proj.state_dict())
    wanted, _ = ordinary(question, patches, patches)
    torch.testing.assert_close(attention(patches, question, 1), wanted, **CLOSE)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_states_of_the_question_behind_half_the_depth_get_no_gradient(depth: int) -> None:
    bridge, videos, _, mask, frames = made(depth=depth)
    questions = [torch.randn(2, 5, 8, dtype=torch.double, requires_grad=True) for _ in range(depth + 1)]
    bridge(videos, questions, mask, frames).square().sum().backward()
    for i, state in enumerate(questions):
        used = i <= (depth - 1) // 2
        assert (state.grad is not None and bool(state.grad.any())) == used, f"state {i} of a bridge of {depth} blocks"


def test_the_class_token_of_the_clip_is_not_looked_at_but_that_of_the_question_is() -> None:
    bridge, videos, questions, mask, frames = made()
    before = bridge(videos, questions, mask, frames)
    other = [torch.cat([state[:, :1] + 1, state[:, 1:]], dim=1) for state in videos]
    assert torch.equal(bridge(other, questions, mask, frames), before)
    asked = [torch.cat([state[:, :1].flip(-1), state[:, 1:]], dim=1) for state in questions]
    assert not torch.allclose(bridge(videos, asked, mask, frames), before)


def test_a_question_of_its_class_piece_alone_and_a_batch_of_no_questions_are_answered() -> None:
    bridge, videos, questions, mask, frames = made()
    alone = bridge(videos, [state[:, :1] for state in questions], mask[:, :1], frames)
    padded = bridge(videos, questions, torch.zeros_like(mask).index_fill_(1, torch.tensor(0), 1), frames)
    torch.testing.assert_close(alone, padded, **CLOSE)
    nothing = bridge([state[:0] for state in videos], [state[:0] for state in questions], mask[:0], frames)
    assert nothing.shape == (0, 8)


def test_what_does_not_fit_is_refused() -> None:
    bridge, videos, questions, mask, frames = made()
    bridge([*videos, videos[0]], questions, mask, frames)  # hidden_states has one more
    wrong: list[tuple[str, Any]] = [
        ("patches are no whole number of 5 frames", (videos, questions, mask, 5)),
        ("0 frames", (videos, questions, mask, 0)),
        ("needs 4 and 2", (videos, questions[:1], mask, frames)),
        ("needs 4 and 2", (videos[:3], questions, mask, frames)),
        ("2 clips, 1 questions", (videos, [state[:1] for state in questions], mask[:1], frames)),
        ("question_mask of shape", (videos, questions, mask[:, :-1], frames)),
        ("for all", ([*videos[:-1], videos[-1][:, :-1]], questions, mask, frames)),
        ("expected", (videos, [state[..., :4] for state in questions], mask, frames)),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            bridge(*arguments)
    for size in ((8, 0, 2), (8, 2, 3), (0, 2, 1)):
        with pytest.raises(ValueError, match=r"expected 1 or more|is no multiple"):
            BridgeFormer(*size)
