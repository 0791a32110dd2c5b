"""Stochastic autoregression: the official numbers, and what holds for every order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bowerbird.errors import InputError
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, assert_close
from bowerbird_mim.patches import patchify, unpatchify
from bowerbird_mim.saim import (
    SAIMConfig,
    SAIMObjective,
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


def test_a_blur_has_the_precision_of_its_pictures() -> None:
    point = torch.zeros(1, 2, 7, 9, dtype=torch.float64)
    point[:, :, 3, 4] = 1
    y, x = torch.meshgrid(torch.arange(-2.0, 3).double(), torch.arange(-2.0, 3).double(), indexing="ij")
    weights = torch.exp(-(x**2 + y**2) / (2 * 1.3**2))
    expected = torch.nn.functional.pad(weights / weights.sum(), (2, 2, 1, 1)).expand(1, 2, -1, -1)
    torch.testing.assert_close(gaussian_blur(point, 5, 1.3), expected, rtol=0, atol=1e-15)
    assert gaussian_blur(point.bfloat16(), 5, 1.3).dtype == torch.bfloat16


def test_a_very_narrow_blur_changes_nothing_and_a_very_wide_one_is_the_mean() -> None:
    assert torch.equal(gaussian_kernel(3, 1e-200), torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))
    torch.testing.assert_close(gaussian_kernel(3, 1e200), torch.full((3, 3), 1 / 9))
    assert torch.equal(gaussian_kernel(np.int64(5), 1.0), gaussian_kernel(5, 1.0))


def test_a_model_of_half_precision_blurs_its_target_in_float32() -> None:
    model = small_model().bfloat16()
    images = torch.randn(2, 3, 8, 12).bfloat16()
    assert model.target(images).dtype == torch.float32
    assert model(images).loss.isfinite()


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


# ------------------------------------------------------------------------------------------------ masks and blur


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 30), seed=st.integers(0, 1000))
def test_of_two_patches_exactly_one_sees_the_other(length: int, seed: int) -> None:
    noise = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)])
    content, query = (mask.squeeze(1) == 0 for mask in permutation_attention_masks(noise / length))
    assert content[:, :, 0].all() and query[:, :, 0].all()  # everything may attend the class token
    assert not content[:, 0, 1:].any() and not query[:, 0, 1:].any()  # which attends only itself
    a, b = content[:, 1:, 1:], query[:, 1:, 1:]
    itself = torch.eye(length, dtype=torch.bool).expand_as(a)
    assert torch.equal(a, b | itself)
    assert not (b & itself).any()
    assert torch.equal(a ^ a.transpose(1, 2), ~itself)
    assert a.sum() == 3 * length * (length + 1) // 2
    assert b.sum() == 3 * length * (length - 1) // 2


def test_an_order_by_position_is_ordinary_autoregression() -> None:
    content, query = permutation_attention_masks(torch.arange(6.0)[None])
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(content[0, 0, 1:, 1:] == 0, lower)
    assert torch.equal(query[0, 0, 1:, 1:] == 0, lower.tril(-1))


@settings(max_examples=20, deadline=None)
@given(half=st.integers(0, 6), sigma=st.floats(0.2, 5.0))
def test_a_blur_keeps_what_is_constant_away_from_the_border(half: int, sigma: float) -> None:
    size = 2 * half + 1
    kernel = gaussian_kernel(size, sigma)
    assert kernel.shape == (size, size)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(kernel, kernel.T) and torch.equal(kernel, kernel.flip(0))
    assert kernel.max() == kernel[half, half]
    blurred = gaussian_blur(torch.full((1, 2, size + 3, size + 4), 3.0), size, sigma)
    assert blurred.shape == (1, 2, size + 3, size + 4)
    torch.testing.assert_close(blurred[..., half : half + 4, half : half + 5], torch.full((1, 2, 4, 5), 3.0))
    if half:
        assert (blurred[..., 0, 0] < 3).all()  # zeros around the picture


def test_a_mask_of_truth_values_says_who_may_be_attended() -> None:
    block = TwoStreamBlock(12, 3).double()
    q, kv = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    additive, _ = permutation_attention_masks(torch.rand(2, 4))
    assert_close(block(q, kv, additive == 0), block(q, kv, additive))


# ------------------------------------------------------------------------------------------------ who depends on whom

SIZES = {**SMALL, "image_size": (8, 12)}  # 2 x 3 patches


def small_model(query_depth: int = 2, **options: object) -> StochasticAutoregressiveModel:
    torch.manual_seed(4)
    return StochasticAutoregressiveModel(ViTEncoder(**SIZES), query_depth, **options).double()


def dependence(model: StochasticAutoregressiveModel, noise: torch.Tensor, where: str) -> torch.Tensor:
    """Bool ``(L, L)``: whether the output at a patch (row) has a gradient at the pixels of a patch (column)."""
    images = torch.randn(1, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    content, query = permutation_attention_masks(noise)
    if where == "pred":
        output = model.predict(images, content, query)[0]
    else:
        tokens = model.encoder.embed(images)
        for block in model.encoder.blocks:
            tokens = block(tokens, attn_mask=content.double())
        output = tokens[0] if where == "tokens" else tokens[0, 1:]
    rows = []
    for row in output:
        (gradient,) = torch.autograd.grad(row.sin().sum(), images, retain_graph=True)
        rows.append((patchify(gradient, 4)[0] != 0).any(dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"share_weights": True}, {"query_depth": 1, "head": "linear"}])
def test_a_prediction_depends_on_the_patches_before_its_own_and_on_nothing_else(options: dict) -> None:
    noise = torch.rand(1, 6, dtype=torch.float64)
    before = noise[0][None, :] < noise[0][:, None]
    depends = dependence(small_model(**options), noise, "pred")
    assert torch.equal(depends, before)
    assert not depends[noise[0].argmin()].any()  # the first patch is predicted from no pixel at all


def test_the_content_of_a_patch_depends_on_itself_and_those_before() -> None:
    noise = torch.rand(1, 6, dtype=torch.float64)
    depends = dependence(small_model(), noise, "tokens")
    assert not depends[0].any()  # the class token does not see the picture
    assert torch.equal(depends[1:], noise[0][None, :] <= noise[0][:, None])


def test_patches_positions_and_order_may_be_permuted_together() -> None:
    model, noise = small_model(), torch.rand(2, 6, dtype=torch.float64)
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    pred = model.predict(images, *permutation_attention_masks(noise))
    order = torch.randperm(6)
    with torch.no_grad():
        model.encoder.pos_embed[:, 1:] = model.encoder.pos_embed[:, 1:][:, order].clone()
    moved = unpatchify(patchify(images, 4)[:, order], (2, 3), 4)
    torch.testing.assert_close(model.predict(moved, *permutation_attention_masks(noise[:, order])), pred[:, order])


def test_shared_weights_are_the_same_tensors() -> None:
    model = small_model(share_weights=True)
    assert [id(block) for block in model.query_blocks] == [id(block) for block in model.encoder.blocks]
    assert not any(name.startswith("query_blocks") for name in model.state_dict())
    one = small_model(1, share_weights=True)
    assert one.query_blocks[0] is one.encoder.blocks[1]  # the block that has just run


def test_keys_need_no_bias() -> None:
    model = small_model()
    model(torch.randn(2, 3, 8, 12, dtype=torch.float64)).loss.backward()
    for block in [*model.encoder.blocks, *model.query_blocks]:
        queries, keys, values = block.attn.qkv.bias.grad.chunk(3)
        assert keys.abs().max() < 1e-12 < min(queries.abs().max(), values.abs().max())


def test_the_loss_is_the_mean_over_all_patches() -> None:
    images, noise = torch.randn(2, 3, 8, 12, dtype=torch.float64), torch.rand(2, 6)
    for kind in ("l2", "l1"):
        model = small_model(loss=kind, blur=None, norm_pix_loss=False)
        output = model(images, noise)
        error = output.pred - patchify(images, 4)
        assert_close(output.loss, (error**2 if kind == "l2" else error.abs()).mean())


def test_to_encoder_gives_the_plain_network_with_full_attention() -> None:
    model = small_model()
    images = torch.randn(1, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    model.to_encoder()({"image": images}).tokens[0, 0].sin().sum().backward()
    assert (images.grad != 0).all()


def test_a_query_that_sees_its_own_patch_gives_the_answer_away() -> None:
    """With the content mask in the place of the query mask the loss falls far below that of the model."""
    final = {}
    for leak in (False, True):
        generator = torch.Generator().manual_seed(0)
        model = StochasticAutoregressiveModel(ViTEncoder(**{**SMALL, "embed_dim": 24, "depth": 1}), 1, blur=None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(100):
            coarse = torch.randn(16, 3, 3, 3, generator=generator)
            pictures = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
            content, query = permutation_attention_masks(torch.rand(16, 16, generator=generator))
            pred = model.predict(pictures, content, content if leak else query)
            loss = (pred - model.target(pictures)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        final[leak] = sum(losses[-5:]) / 5
    assert final[True] < 0.5 * final[False], final


# ------------------------------------------------------------------------------------------------ views and refusals


def test_a_view_has_an_order_of_its_own_or_that_of_the_raster() -> None:
    item = {"image": Image.new("RGB", (20, 20), "red")}
    for order in ("random", "raster"):
        encoder = ViTEncoder.build(ViTConfig(**SMALL))
        objective = SAIMObjective.build(SAIMConfig(order=order), encoder, SimpleBuildContext())
        assert len(objective.model.query_blocks) == encoder.depth
        view = objective.item_transform()
        first, second = (view(item, np.random.default_rng(seed))["noise"] for seed in (0, 1))
        assert first.shape == (16,) and first.dtype == np.float32
        assert (first == second).all() == (order == "raster")
        if order == "raster":
            assert (np.diff(first) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_depth": 3}, "query_depth = 3 must divide the depth of the encoder, 2"),
        ({"query_depth": 0}, "query_depth = 0 must divide"),
        ({"head": "MLP"}, "head = 'MLP' is unknown; accepted: mlp, linear"),
        ({"loss": "huber"}, "loss = 'huber' is unknown; accepted: l2, l1"),
        ({"blur": (4, 1.0)}, "size = 4: a blur needs an odd number"),
        ({"blur": (9, 0.0)}, "sigma = 0.0: a blur needs a standard deviation above 0"),
        ({"blur": 9}, r"blur = 9: expected \(size, sigma\)"),
    ],
)
def test_what_makes_no_model_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**options)


def test_what_does_not_fit_is_refused() -> None:
    model = small_model()
    with pytest.raises(InputError, match=r"noise has shape \(2, 5\); expected \(2, 6\)"):
        model(torch.zeros(2, 3, 8, 12, dtype=torch.float64), torch.zeros(2, 5))
    with pytest.raises(InputError, match="images are 8 x 8 pixels"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(InputError, match=r"expected floating point \(B, L\)"):
        permutation_attention_masks(torch.arange(4)[None])
    with pytest.raises(InputError, match=r"expected floating point \(B, L\)"):
        permutation_attention_masks(torch.rand(4))
    with pytest.raises(InputError, match=r"expected \(B, C, H, W\)"):
        gaussian_blur(torch.zeros(3, 8, 8), 3, 1.0)
    with pytest.raises(InputError, match=r"images are torch.uint8"):
        gaussian_blur(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 3, 1.0)
    with pytest.raises(InputError, match="needs the encoder mim:vit, not Linear"):
        StochasticAutoregressiveModel(torch.nn.Linear(2, 2), 1)
    with pytest.raises(InputError, match="dim = 10 is no multiple of heads = 3"):
        TwoStreamBlock(10, 3)
    with pytest.raises(ValueError, match="blur_size = 4: expected an odd number"):
        SAIMConfig(blur_size=4)
