"""The encoder of clips: golden numbers of the released code, and what must be true of every such encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bowerbird_videotext.space_time import (
    SpaceTimeBlock,
    SpaceTimeTransformer,
    divided_attention,
    inflate_temporal_embedding,
)

GOLDENS = ["space_time_encoder_rand", "space_time_encoder_rand_fewer_frames", "space_time_encoder_zeros"]


def golden_encoder(values: dict[str, Any]) -> SpaceTimeTransformer:
    """The encoder of a golden file, with its parameters."""
    state = {name.removeprefix("param."): value for name, value in values.items() if name.startswith("param.")}
    encoder = SpaceTimeTransformer(
        values["img_size"],
        values["patch_size"],
        values["embed_dim"],
        values["depth"],
        values["num_heads"],
        values["mlp_ratio"],
        max_frames=values.get("num_frames_max", values.get("num_frames")),
    ).double()
    encoder.load_state_dict(state)
    return encoder


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
            torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")
