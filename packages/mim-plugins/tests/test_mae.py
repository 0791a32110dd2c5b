"""Masked autoencoders: the official numbers, and what holds for every input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError
from bowerbird.recipe import TrainSettings
from bowerbird.testing import ObjectiveContract, assert_close
from bowerbird.train.schedules import lr_factor
from bowerbird_mim.mae import (
    MaskedAutoencoder,
    masked_reconstruction_loss,
    patchify,
    random_mask,
    sincos_position_embedding,
    unpatchify,
)
from bowerbird_mim.vit import ViTConfig, ViTEncoder

SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


class TestContract(ObjectiveContract):
    name = "mim:mae"
    config = DECODER
    image_size = 16

    def make_encoder(self) -> ViTEncoder:
        return ViTEncoder.build(ViTConfig(**SMALL))


# ------------------------------------------------------------------------------------------------ official numbers


def from_golden(values: dict) -> MaskedAutoencoder:
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
    model = MaskedAutoencoder(
        encoder,
        decoder_dim=values["decoder_embed_dim"],
        decoder_depth=values["decoder_depth"],
        decoder_heads=values["decoder_num_heads"],
        norm_pix_loss=bool(values["norm_pix_loss"]),
    ).double()
    state = {}
    for name, value in values.items():
        if name.startswith("sd."):
            part = "decoder" if name.startswith(("sd.decoder", "sd.mask_token")) else "encoder"
            state[f"{part}.{name.removeprefix('sd.')}"] = value
    model.load_state_dict(state)
    return model


def test_a_whole_step(golden) -> None:
    values = golden("mae/model_step")
    model = from_golden(values)
    output = model(values["images"], values["mask_ratio"], values["noise"])
    output.loss.backward()
    assert_close(output.latent, values["latent"])
    assert_close(output.pred, values["pred"])
    assert_close(output.mask, values["mask"])
    assert_close(output.loss, values["loss"])
    checked = 0
    for name, parameter in model.named_parameters():
        golden_name = f"grad.{name.split('.', 1)[1]}"
        if golden_name in values:
            assert_close(parameter.grad, values[golden_name], atol=1e-9, where=name)
            checked += 1
    assert checked > 20


def test_loss_and_its_gradient(golden) -> None:
    values = golden("mae/forward_loss")
    target = patchify(values["images"], values["patch_size"])
    for norm_pix, kind in ((False, "raw"), (True, "normpix")):
        pred = values["pred"].clone().requires_grad_()
        loss = masked_reconstruction_loss(pred, target, values["mask"], norm_pix)
        loss.backward()
        assert_close(loss, values[f"loss_{kind}"])
        assert_close(pred.grad, values[f"grad_pred_{kind}"])


def test_patches(golden) -> None:
    values = golden("mae/patchify")
    patches = patchify(values["images"], values["patch_size"])
    assert_close(patches, values["patches"])
    grid = tuple(side // values["patch_size"] for side in values["images"].shape[2:])
    back = unpatchify(patches, grid, values["patch_size"], values["images"].shape[1])
    assert torch.equal(back, values["images"])


def test_masks(golden) -> None:
    values = golden("mae/random_masking")
    plan = random_mask(values["noise"], values["mask_ratio"])
    tokens = values["tokens"]
    visible = tokens.gather(1, plan.ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))
    assert_close(visible, values["tokens_visible"])
    assert_close(plan.mask, values["mask"])
    assert torch.equal(plan.ids_restore, values["ids_restore"])


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_position_codes(golden, case: str) -> None:
    values = golden("mae/sincos_pos_embed")
    side = values[f"{case}.grid_size"]
    grid = (side, side) if isinstance(side, int) else tuple(side.tolist())
    table = sincos_position_embedding(values[f"{case}.embed_dim"], grid, bool(values[f"{case}.cls_token"]))
    assert_close(table, values[f"{case}.pos_embed"], rtol=1e-6, atol=1e-7)


def test_the_learning_rate(golden) -> None:
    """The official schedule takes the epoch before the step. Ours agrees from the end of the warm-up on; while warming
    up it is one step ahead, so that the first step moves and the last reaches the peak."""
    values = golden("mae/schedule_and_optim")
    per_epoch, warmup = 2, values["warmup_epochs"]
    plan = TrainSettings(
        epochs=values["epochs"], warmup=warmup, lr=values["base_lr"], min_lr=values["min_lr"], schedule="cosine"
    )
    steps = values["epochs_t"] * per_epoch
    assert torch.equal(steps, steps.round())
    compared = 0
    for step, golden_lr in zip(steps.int().tolist(), values["lr"].tolist(), strict=True):
        ours = step - 1 if step < warmup * per_epoch else step
        if 0 <= ours < values["epochs"] * per_epoch:
            factor = lr_factor(ours, steps_per_epoch=per_epoch, settings=plan)
            assert_close(values["base_lr"] * factor, golden_lr, where=f"step {step}")
            compared += 1
    assert compared == 39


# ------------------------------------------------------------------------------------------------ invariants


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), patch=st.integers(1, 4), channels=st.integers(1, 4))
def test_cutting_into_patches_can_be_undone(rows: int, columns: int, patch: int, channels: int) -> None:
    images = torch.randn(2, channels, rows * patch, columns * patch)
    assert torch.equal(unpatchify(patchify(images, patch), (rows, columns), patch, channels), images)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(2, 40), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_a_mask_hides_the_stated_number_and_can_be_undone(length: int, ratio: float, seed: int) -> None:
    visible = int(length * (1 - ratio))
    noise = torch.rand(3, length, generator=torch.Generator().manual_seed(seed))
    if not 0 < visible < length:
        with pytest.raises(InputError, match="at least one must be kept"):
            random_mask(noise, ratio)
        return
    plan = random_mask(noise, ratio)
    assert plan.ids_keep.shape == (3, visible)
    assert ((plan.mask == 0).sum(dim=1) == visible).all()
    assert torch.equal(plan.ids_restore.sort(dim=1).values, torch.arange(length).expand(3, -1))
    # [visible, masked] put back in order is the order of the picture
    order = plan.ids_restore.argsort(dim=1)
    assert torch.equal(order[:, :visible], plan.ids_keep)
    assert torch.equal(order.gather(1, plan.ids_restore), torch.arange(length).expand(3, -1))


def small_model() -> MaskedAutoencoder:
    return MaskedAutoencoder(ViTEncoder(**SMALL), **DECODER).double()


def test_visible_patches_give_the_prediction_no_gradient() -> None:
    pred = torch.randn(2, 16, 48, dtype=torch.float64, requires_grad=True)
    mask = random_mask(torch.rand(2, 16), 0.75).mask
    masked_reconstruction_loss(pred, torch.randn(2, 16, 48, dtype=torch.float64), mask).backward()
    assert (pred.grad[mask == 0] == 0).all()
    assert (pred.grad[mask == 1] != 0).all()


def test_pixels_of_masked_patches_change_only_the_loss() -> None:
    model, noise = small_model(), torch.rand(2, 16, dtype=torch.float64)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    first = model(images, 0.75, noise)
    patches = patchify(images, 4)
    changed = torch.where(first.mask[..., None] == 1, torch.randn_like(patches), patches)
    second = model(unpatchify(changed, (4, 4), 4), 0.75, noise)
    assert torch.equal(first.latent, second.latent)
    assert torch.equal(first.pred, second.pred)
    assert first.loss != second.loss


def test_the_order_of_visible_patches_orders_their_tokens_and_nothing_else() -> None:
    encoder, images = small_model().encoder, torch.randn(2, 3, 16, 16, dtype=torch.float64)
    kept, order = torch.tensor([[3, 7, 12, 0], [1, 2, 15, 9]]), torch.tensor([2, 0, 3, 1])
    tokens, others = encoder.tokens(images, ids_keep=kept), encoder.tokens(images, ids_keep=kept[:, order])
    assert_close(others[:, 0], tokens[:, 0].detach())
    assert_close(others[:, 1:], tokens[:, 1:][:, order].detach())


def test_all_patches_in_any_order_give_what_the_exported_encoder_gives() -> None:
    encoder, images = small_model().encoder, torch.randn(2, 3, 16, 16, dtype=torch.float64)
    order = torch.rand(2, 16).argsort(dim=1)
    tokens = encoder.tokens(images, ids_keep=order)[:, 1:]
    back = tokens.gather(1, order.argsort(dim=1)[..., None].expand(-1, -1, 16))
    assert_close(back, encoder({"image": images}).tokens.detach())


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_decoder_predicts_the_same_by_less_work(depth: int) -> None:
    model = MaskedAutoencoder(ViTEncoder(**SMALL), decoder_dim=8, decoder_depth=depth, decoder_heads=2).double()
    plan = random_mask(torch.rand(3, 16), 0.7)
    latent = torch.randn(3, 1 + plan.ids_keep.shape[1], 16, dtype=torch.float64)
    whole = model.decoder(latent, plan.ids_restore)
    order = plan.ids_restore.argsort(dim=1)
    masked = order[:, plan.ids_keep.shape[1] :]
    for ids, few in ((masked, True), (order, False)):
        short = model.decoder.predict(latent, plan.ids_keep, masked, masked_only=few)
        assert_close(short, whole.gather(1, ids[..., None].expand(-1, -1, 48)).detach())


def test_the_contrast_of_a_target_patch_does_not_matter_when_pixels_are_normalised() -> None:
    pred, target = torch.randn(1, 16, 48, dtype=torch.float64), torch.randn(1, 16, 48, dtype=torch.float64)
    mask = torch.ones(1, 16)
    loss = masked_reconstruction_loss(pred, target, mask)
    other = masked_reconstruction_loss(pred, 3 * target + 5, mask)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)


def test_predicting_zero_costs_the_biased_variance() -> None:
    target = torch.randn(2, 16, 48, dtype=torch.float64)
    loss = masked_reconstruction_loss(torch.zeros_like(target), target, torch.ones(2, 16))
    assert math.isclose(float(loss), 47 / 48, rel_tol=1e-4)


def test_key_biases_get_no_gradient() -> None:
    model = small_model()
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).loss.backward()
    for block in model.encoder.blocks:
        assert block.attn.qkv.bias.grad[16:32].abs().max() < 1e-12


def test_the_loss_of_half_precision_counts_every_masked_patch() -> None:
    """600 x 200 masked patches are more than float16 can count, and an odd number is none of bfloat16."""
    for dtype, batch, length in ((torch.float16, 600, 200), (torch.bfloat16, 3, 333)):
        pred, target, mask = (
            torch.zeros(batch, length, 2, dtype=dtype),
            torch.ones(batch, length, 2),
            torch.ones(batch, length),
        )
        loss = masked_reconstruction_loss(pred, target, mask, norm_pix=False)
        assert loss.dtype == torch.float32
        assert loss == 1


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_heads": 0}, "decoder_heads = 0"),
        ({"decoder_dim": -4}, "decoder_dim = -4"),
        ({"decoder_depth": -1}, "decoder_depth = -1"),
        ({"encoder": torch.nn.Linear(2, 2)}, "needs the encoder mim:vit, not Linear"),
    ],
)
def test_what_makes_no_model_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskedAutoencoder(**{"encoder": ViTEncoder(**SMALL), **DECODER, **options})


def test_what_does_not_fit_is_refused() -> None:
    model = small_model()
    with pytest.raises(InputError, match="expected at least one picture"):
        model(torch.zeros(0, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(InputError, match="norm_pix_loss = false"):
        masked_reconstruction_loss(torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), torch.ones(1, 4))
    with pytest.raises(InputError, match=r"noise has shape \(2, 15\); expected \(2, 16\)"):
        model(torch.zeros(2, 3, 16, 16, dtype=torch.float64), noise=torch.zeros(2, 15))
    with pytest.raises(InputError, match="images are 8 x 8 pixels"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(InputError, match=r"mask_ratio = 1.0"):
        random_mask(torch.rand(1, 16), 1.0)
    with pytest.raises(InputError, match="no masked patch"):
        masked_reconstruction_loss(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(1, 4))
    with pytest.raises(InputError, match="multiple of 4"):
        sincos_position_embedding(6, (2, 2))
