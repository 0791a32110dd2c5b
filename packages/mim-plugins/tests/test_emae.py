"""EMAE: complementary parts, predictions that must agree, and the guard against agreeing on nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, assert_close
from bowerbird_mim.emae import (
    CollapseGuard,
    EfficientMaskedAutoencoder,
    EMAEConfig,
    EMAEObjective,
    partition_patches,
    prediction_inconsistency,
    self_consistency_loss,
)
from bowerbird_mim.mae import MaskedAutoencoder, masked_reconstruction_loss, patchify
from bowerbird_mim.vit import ViTConfig, ViTEncoder

SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
DECODER = {"decoder_dim": 8, "decoder_depth": 2, "decoder_heads": 2}


class TestContract(ObjectiveContract):
    name = "mim:emae"
    config = {**DECODER, "consistency_ramp": 0.0, "collapse_guard": False}
    image_size = 16
    learning_steps = 20

    def make_encoder(self) -> ViTEncoder:
        return ViTEncoder.build(ViTConfig(**SMALL))


class TestContractWithGuard(TestContract):
    config = {**DECODER, "collapse_margin": 0.01}


def small_mae(dtype: torch.dtype = torch.float64, **decoder: int) -> MaskedAutoencoder:
    return MaskedAutoencoder(ViTEncoder(**SMALL), **{**DECODER, **decoder}).to(dtype)


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ given numbers


def test_the_parts_of_a_given_noise(golden) -> None:
    values = golden("emae/partition")
    partition = partition_patches(values["noise"], values["num_parts"])
    assert torch.equal(partition.ids_visible, values["ids_visible"])
    assert_close(partition.mask, values["mask"])


@pytest.mark.parametrize("reduction", ["overlap_mean", "all_mean"])
def test_the_consistency_loss_and_its_gradient(golden, reduction: str) -> None:
    values = golden("emae/consistency_loss")
    pred = values["pred"].clone().requires_grad_()
    loss = self_consistency_loss(pred, values["mask"], reduction)
    loss.backward()
    assert_close(loss, values[f"loss_{reduction}"])
    assert_close(pred.grad, values[f"grad_{reduction}"])


def test_a_whole_step(golden) -> None:
    values = golden("emae/model_step_card_defined")
    encoder = ViTEncoder(
        image_size=values["img_size"],
        patch_size=values["patch_size"],
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        layer_norm_eps=values["layernorm_eps"],
    )
    mae = MaskedAutoencoder(
        encoder,
        decoder_dim=values["decoder_embed_dim"],
        decoder_depth=values["decoder_depth"],
        decoder_heads=values["decoder_num_heads"],
        norm_pix_loss=bool(values["norm_pix_loss"]),
    )
    parameters = [name.removeprefix("sd.") for name in values if name.startswith("sd.")]
    of = {name: "decoder" if name.startswith(("decoder", "mask_token")) else "encoder" for name in parameters}
    mae.double().load_state_dict({f"{of[name]}.{name}": values[f"sd.{name}"] for name in parameters})
    model = EfficientMaskedAutoencoder(mae, values["num_parts"], values["consistency_weight"])

    for with_pred in (True, False):
        model.zero_grad()
        output = model(values["images"], values["noise"], with_pred=with_pred)
        output.loss.backward()
        if with_pred:
            assert_close(output.pred, values["pred"])
        assert_close(output.mask, values["mask"])
        assert_close(output.loss_reconstruction, values["loss_reconstruction"])
        assert_close(output.loss_consistency, values["loss_consistency_overlap_mean"])
        assert_close(output.loss, values["loss"])
        found = gradients(mae)
        for name in parameters:
            if f"grad.{name}" in values:
                assert_close(found[f"{of[name]}.{name}"], values[f"grad.{name}"], atol=1e-9, where=name)


# ------------------------------------------------------------------------------------------------ parts


@settings(max_examples=20, deadline=None)
@given(parts=st.integers(2, 6), size=st.integers(1, 5), seed=st.integers(0, 1000))
def test_parts_are_disjoint_equal_and_cover_the_picture(parts: int, size: int, seed: int) -> None:
    length = parts * size
    noise = torch.rand(3, length, generator=torch.Generator().manual_seed(seed))
    partition = partition_patches(noise, parts)
    assert partition.ids_visible.shape == (3, parts, size)
    assert torch.equal(partition.ids_visible.flatten(1).sort(dim=1).values, torch.arange(length).expand(3, -1))
    assert (partition.mask.sum(dim=1) == parts - 1).all()  # every patch is hidden in all parts but one
    assert (partition.mask.gather(2, partition.ids_visible) == 0).all()
    overlaps = sum(partition.mask[:, i] * partition.mask[:, j] for i in range(parts) for j in range(i))
    assert (overlaps == (parts - 1) * (parts - 2) / 2).all()


def test_parts_that_do_not_divide_the_patches_are_refused_with_those_that_do() -> None:
    for parts in (0, 1, 3, 17):
        with pytest.raises(InputError, match=f"num_parts = {parts} does not divide 16 patches; accepted: 2, 4, 8, 16"):
            partition_patches(torch.rand(2, 16), parts)
    with pytest.raises(InputError, match="num_parts = 5"):
        EfficientMaskedAutoencoder(small_mae(), num_parts=5)
    with pytest.raises(InputError, match="num_parts = 7"):
        config = EMAEConfig(**DECODER, num_parts=7)
        EMAEObjective.build(config, ViTEncoder(**SMALL), SimpleBuildContext())


# ------------------------------------------------------------------------------------------------ consistency


def test_predictions_that_agree_cost_nothing_and_a_common_shift_changes_nothing() -> None:
    mask = partition_patches(torch.rand(2, 12), 4).mask.double()
    same = torch.randn(2, 1, 12, 5, dtype=torch.float64).expand(-1, 4, -1, -1)
    assert self_consistency_loss(same, mask) == 0
    pred, shift = torch.randn(2, 4, 12, 5, dtype=torch.float64), torch.randn(2, 1, 12, 5, dtype=torch.float64)
    assert_close(self_consistency_loss(pred + shift, mask), self_consistency_loss(pred, mask))


def test_each_prediction_is_pulled_to_the_others_where_both_parts_are_blind() -> None:
    mask = partition_patches(torch.rand(2, 12), 4).mask.double()
    pred = torch.randn(2, 4, 12, 5, dtype=torch.float64, requires_grad=True)
    loss = self_consistency_loss(pred, mask)
    loss.backward()
    overlap = mask[:, :, None] * mask[:, None, :] * (1 - torch.eye(4))[None, :, :, None]  # (N, K, K, L)
    signs = (pred[:, :, None] - pred[:, None]).sign()  # (N, K, K, L, P)
    expected = (signs * overlap[..., None]).sum(dim=2) / (5 * overlap.sum() / 2)
    assert_close(pred.grad, expected.detach())
    assert (pred.grad[mask == 0] == 0).all()
    assert loss <= 2 * (pred[:, :, None] - pred[:, None]).abs().max()


def test_the_names_of_the_parts_do_not_matter() -> None:
    mask = partition_patches(torch.rand(2, 12), 4).mask.double()
    pred = torch.randn(2, 4, 12, 5, dtype=torch.float64)
    order = torch.randperm(4)
    assert_close(self_consistency_loss(pred[:, order], mask[:, order]), self_consistency_loss(pred, mask))


def test_two_parts_have_nothing_in_common() -> None:
    model = EfficientMaskedAutoencoder(small_mae(), num_parts=2)
    output = model(pictures())
    output.loss.backward()
    assert output.loss_consistency == 0
    assert output.loss == output.loss_reconstruction
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    model.zero_grad()
    model(pictures()).loss_consistency.backward()
    assert all((gradient == 0).all() for gradient in gradients(model).values())
    assert prediction_inconsistency(model, pictures(), 2) == 0
    pred = torch.randn(1, 2, 4, 3, requires_grad=True)
    self_consistency_loss(pred, partition_patches(torch.rand(1, 4), 2).mask).backward()
    assert (pred.grad == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    pred, mask = torch.zeros(2, 4, 12, 5), torch.ones(2, 4, 12)
    with pytest.raises(InputError, match=r"num_parts = 4.0 does not divide 12 patches; accepted: 2, 3, 4, 6, 12"):
        partition_patches(torch.rand(1, 12), 1 / (1 - 0.75))
    with pytest.raises(InputError, match="expected at least one picture"):
        prediction_inconsistency(small_mae(), pictures(0))
    with pytest.raises(InputError, match=r"pred \(2, 4, 12, 5\) and mask \(2, 4, 11\) do not fit"):
        self_consistency_loss(pred, mask[..., 1:])
    with pytest.raises(InputError, match="at least two parts"):
        self_consistency_loss(pred[:, :1], mask[:, :1])
    with pytest.raises(InputError, match="reduction = 'sum'; accepted: overlap_mean, all_mean"):
        self_consistency_loss(pred, mask, "sum")
    with pytest.raises(InputError, match="consistency_weight = -1"):
        EfficientMaskedAutoencoder(small_mae(), consistency_weight=-1)
    with pytest.raises(InputError, match=r"noise has shape \(3, 15\)"):
        EfficientMaskedAutoencoder(small_mae())(pictures(), torch.rand(3, 15))


# ------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_every_part_is_a_masked_autoencoder(depth: int, norm_pix: bool) -> None:
    mae, images, noise = small_mae(decoder_depth=depth), pictures(), torch.rand(3, 16, dtype=torch.float64)
    mae.norm_pix_loss = norm_pix
    output = EfficientMaskedAutoencoder(mae)(images, noise)
    alone = mae(images, 0.75, noise)  # the part of the smallest noise
    assert torch.equal(output.mask[:, 0], alone.mask)
    assert_close(output.pred[:, 0], alone.pred.detach())
    target = patchify(images, 4)
    first = masked_reconstruction_loss(output.pred[:, 0], target, output.mask[:, 0], norm_pix)
    assert_close(first, alone.loss.detach())
    first.backward()
    ours = gradients(mae)
    mae.zero_grad()
    alone.loss.backward()
    for name, gradient in gradients(mae).items():
        assert_close(ours[name], gradient, where=name)
    each = [masked_reconstruction_loss(output.pred[:, k], target, output.mask[:, k], norm_pix) for k in range(4)]
    assert_close(output.loss_reconstruction, sum(each) / 4)


@pytest.mark.parametrize("reduction", ["overlap_mean", "all_mean"])
def test_the_short_way_to_the_losses_gives_the_same_numbers(reduction: str) -> None:
    model, images, noise = EfficientMaskedAutoencoder(small_mae(), 8, 0.3, reduction), pictures(), torch.rand(3, 16)
    whole = model(images, noise)
    consistency = self_consistency_loss(whole.pred, whole.mask, reduction)
    assert_close(whole.loss_consistency, consistency.detach())
    assert_close(whole.loss, (whole.loss_reconstruction + 0.3 * consistency).detach())
    (whole.loss_reconstruction + 0.3 * consistency).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    short = model(images, noise, with_pred=False)
    short.loss.backward()
    assert short.pred is None
    assert_close(short.loss, whole.loss.detach())
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name], where=name)


def test_inconsistency_is_measured_without_changing_the_model() -> None:
    mae, images = small_mae(torch.float32).train(), pictures(8).float()
    measured = [
        prediction_inconsistency(model, images, 4, torch.Generator().manual_seed(3))
        for model in (mae, EfficientMaskedAutoencoder(mae, num_parts=2))
    ]
    noise = torch.rand(8, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = EfficientMaskedAutoencoder(mae)(images, noise)
    apart = [
        (output.pred[:, i] - output.pred[:, j]).abs()[(output.mask[:, i] * output.mask[:, j]) == 1]
        for i in range(4)
        for j in range(i)
    ]
    assert measured[0] == measured[1] == pytest.approx(float(torch.cat(apart).mean()), rel=1e-5)
    assert mae.training and not gradients(mae)


# ------------------------------------------------------------------------------------------------ weight and guard


def objective(total_steps: int = 10, **config: object) -> EMAEObjective:
    return EMAEObjective.build(
        EMAEConfig(**DECODER, **config), ViTEncoder(**SMALL), SimpleBuildContext(total_steps=total_steps)
    )


def weights(trained: EMAEObjective, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        trained.before_step(step)
        found.append(round(float(trained.consistency_weight), 6))
    return found


def test_the_weight_waits_and_then_grows_to_its_value() -> None:
    plan = {"consistency_weight": 0.6, "consistency_start": 0.2, "consistency_ramp": 0.3, "collapse_guard": False}
    assert weights(objective(**plan), 7) == [0, 0, 0.2, 0.4, 0.6, 0.6, 0.6]
    constant = {"consistency_weight": 0.6, "consistency_ramp": 0.0, "collapse_guard": False}
    assert weights(objective(**constant), 3) == [0.6, 0.6, 0.6]


def test_the_weight_falls_to_zero_when_the_guard_closes_and_grows_again() -> None:
    guarded = objective(consistency_weight=1.0, consistency_ramp=0.2)
    assert weights(guarded, 3) == [0, 0, 0]  # closed until something was observed
    guarded.guard.open.fill_(1)
    assert weights(guarded, 3) == [0.5, 1, 1]
    guarded.guard.open.fill_(0)
    assert weights(guarded, 1) == [0]
    guarded.guard.open.fill_(1)
    assert weights(guarded, 1) == [0.5]


def test_the_guard_compares_with_the_best_that_ignores_what_is_visible() -> None:
    guard = CollapseGuard((4, 3), margin=0.1).double()
    means = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(300):
        target = means + 0.5 * torch.randn(64, 4, 3, dtype=torch.float64)
        guard.observe(target, torch.tensor(0.25 * 0.92))
        guard.update()
    assert guard.errors[1].item() == pytest.approx(0.25, rel=0.03)  # the variance around the mean picture
    assert guard.open == 0  # better by 8 %, asked for 10 %
    for _ in range(60):
        guard.observe(means + 0.5 * torch.randn(64, 4, 3, dtype=torch.float64), torch.tensor(0.25 * 0.8))
        guard.update()
    assert guard.open == 1


def waves(count: int, seed: int) -> Tensor:
    """Pictures of one wave whose phase differs from picture to picture: nothing is known from the place alone."""
    phase = 2 * torch.pi * torch.rand(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return torch.sin(0.8 * torch.arange(16.0) + phase).expand(count, 1, 16, 16).contiguous()


def trained_error(*, guard: bool) -> tuple[float, float]:
    """Error of masked patches over that of the mean picture, and inconsistency, after training with lambda 1."""
    torch.manual_seed(0)
    steps = 150
    encoder = ViTEncoder(image_size=16, patch_size=4, in_channels=1, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0)
    config = EMAEConfig(
        decoder_dim=32, decoder_depth=1, decoder_heads=2,
        consistency_weight=1.0, consistency_ramp=0.0, collapse_guard=guard,
    )  # fmt: skip
    trained = EMAEObjective.build(config, encoder, SimpleBuildContext(total_steps=steps))
    optimizer = torch.optim.AdamW(trained.parameter_groups(), lr=1e-2)
    for step in range(steps):
        noise = torch.rand(32, 16, generator=torch.Generator().manual_seed(step))
        trained.before_step(step)
        optimizer.zero_grad()
        trained({"image": waves(32, step + 10), "noise": noise}).total.backward()
        optimizer.step()
        trained.after_step(step)
    images, noise = waves(256, 1), torch.rand(256, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        output = trained.model(images, noise, with_pred=False)
    mean_picture = output.target.mean(dim=0, keepdim=True)
    error = output.loss_reconstruction / (output.target - mean_picture).square().mean()
    return float(error), prediction_inconsistency(trained.model, images, 4, torch.Generator().manual_seed(3))


def test_full_weight_from_the_first_step_collapses_and_the_guard_prevents_it() -> None:
    error, inconsistency = trained_error(guard=False)
    assert error > 0.99  # no better than the mean picture,
    assert inconsistency < 0.01  # and all parts agree on it
    error, inconsistency = trained_error(guard=True)
    assert error < 0.95
    assert inconsistency > 0.01
