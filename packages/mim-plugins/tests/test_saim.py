"""Stochastic autoregression: the official numbers, and what holds for every order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError
from bowerbird.testing import ObjectiveContract, assert_close
from bowerbird_mim.patches import patchify, unpatchify
from bowerbird_mim.saim import (
    SAIMConfig,
    StochasticAutoregressiveModel,
    TwoStreamBlock,
    gaussian_blur,
    gaussian_kernel,
    permutation_attention_masks,
)
from bowerbird_mim.timm_weights import fuse_projections
from bowerbird_mim.vit import ViTConfig, ViTEncoder

SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


class TestContract(ObjectiveContract):
    name = "mim:saim"
    config = {"blur_size": 3}
    image_size = 16

    def make_encoder(self) -> ViTEncoder:
        return ViTEncoder.build(ViTConfig(**SMALL))


class TestContractOfOneSharedQueryBlock(TestContract):
    config = {"query_depth": 1, "share_weights": True, "head": "linear", "blur_size": 0, "loss": "l1"}


# ------------------------------------------------------------------------------------------------ official numbers


def test_masks(golden) -> None:
    values = golden("saim/attention_masks")
    content, query = permutation_attention_masks(values["noise"])
    assert torch.equal(content, values["content_mask"])
    assert torch.equal(query, values["query_mask"])


def test_a_block_of_one_and_of_two_streams(golden) -> None:
    values = golden("saim/block")
    block = TwoStreamBlock(
        values["embed_dim"], values["num_heads"], values["mlp_ratio"], eps=values["layernorm_eps"]
    ).double()
    block.load_state_dict({key[3:]: value for key, value in values.items() if key.startswith("sd.")})
    q, k = values["q"].requires_grad_(), values["k"].requires_grad_()
    y_self, y_cross = block(q, mask=values["mask"]), block(q, k, values["mask"])
    assert_close(y_self, values["y_self"])
    assert_close(y_cross, values["y_cross"])
    ((y_self + 2 * y_cross) * values["upstream"]).sum().backward()
    assert_close(q.grad, values["grad_q"])
    assert_close(k.grad, values["grad_k"])
    gradients = {key[5:]: value for key, value in values.items() if key.startswith("grad.")}
    fuse_projections(gradients)
    for name, parameter in block.named_parameters():
        assert_close(parameter.grad, gradients[name], where=name)


@pytest.mark.parametrize("case", ["k9_s1", "k5_s2"])
def test_blurred_pictures(golden, case: str) -> None:
    values = golden(f"saim/gaussian_{case}")
    size, sigma = values["kernel_size"], values["sigma"]
    kernel = gaussian_kernel(size, sigma)
    assert_close(kernel.expand_as(values["kernel"]), values["kernel"], rtol=0, atol=1e-6)
    assert_close(gaussian_blur(values["image"], size, sigma), values["blurred"], rtol=0, atol=1e-6)


def from_golden(values: dict) -> StochasticAutoregressiveModel:
    encoder = ViTEncoder(
        image_size=values["img_size"],
        patch_size=values["patch_size"],
        in_channels=values["images"].shape[1],
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        layer_norm_eps=values["layernorm_eps"],
    )
    model = StochasticAutoregressiveModel(
        encoder,
        values["query_depth"],
        head=values["prediction_head"].lower(),
        blur=(values["gaussian_kernel_size"], float(values["gaussian_sigma"])),
        norm_pix_loss=bool(values["norm_pix_loss"]),
        loss=values["loss_type"].lower(),
    ).double()
    model.load_state_dict(named(values, "sd."))
    return model


def named(values: dict, prefix: str) -> dict:
    """Official names to those of the model."""
    state = {}
    for key, value in values.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            own = name.startswith(("query_blocks", "prediction_head", "gaussian_blur"))
            state[name if own else f"encoder.{name}"] = value
    fuse_projections(state)
    return state


def test_a_whole_step(golden) -> None:
    values = golden("saim/model_step")
    model = from_golden(values)
    output = model(values["images"], values["noise"])
    output.loss.backward()
    assert_close(output.pred, values["pred"][:, 1:])
    assert_close(output.loss, values["loss"])
    gradients = named(values, "grad.")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, parameter in trained.items():
        assert_close(parameter.grad, gradients[name], where=name)
