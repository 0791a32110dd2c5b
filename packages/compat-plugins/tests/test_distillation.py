"""The two baselines that imitate the old model: golden numbers of OpenCompatible, written-out formulas, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bowerbird.errors import InputError
from bowerbird_compat.ract import DistillationLoss, FocalDistillationLoss

TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_both_losses_and_their_gradients_are_those_of_opencompatible(golden):
    g = golden("ract/distillation_baselines")
    for name in ("lwf", "fd"):
        new = g["feat_new"].clone().requires_grad_()
        if name == "lwf":
            loss = DistillationLoss(g["W_old"], float(g["temperature"]), float(g["distillation_temp"]))
            value = loss(new, g["feat_old"])
        else:
            loss = FocalDistillationLoss(float(g["focal_alpha"]), float(g["focal_beta"]))
            value = loss(new, g["feat_old"], g["labels_fd"], F.linear(new, g["W_new"]))
        value.backward()
        assert_close(value.detach(), g[f"{name}__loss"], **TIGHT)
        assert_close(new.grad, g[f"{name}__grad_feat"], **TIGHT)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 6), st.floats(0.01, 5), st.floats(0.01, 5))
def test_distillation_is_the_cross_entropy_of_two_softmaxes(seed, batch, classes, temperature, old_temperature):
    rows, new, old = random(classes, 4, seed=seed), random(batch, 4, seed=seed + 1), random(batch, 4, seed=seed + 2)
    said = (old @ rows.T / old_temperature).softmax(1)
    expected = -(said * (new @ rows.T / temperature).log_softmax(1)).sum(1).mean()
    assert_close(DistillationLoss(rows, temperature, old_temperature, weight=2.0)(new, old), 2 * expected)


def test_only_the_new_side_is_trained():
    rows = random(3, 4)
    new, old = random(5, 4, seed=1).requires_grad_(), random(5, 4, seed=2).requires_grad_()
    logits = random(5, 3, seed=3).requires_grad_()
    loss = DistillationLoss(rows)
    (loss(new, old) + FocalDistillationLoss()(new, old, torch.zeros(5, dtype=torch.int64), logits)).backward()
    assert old.grad is None
    assert logits.grad is None
    assert new.grad.abs().sum() > 0
    assert not list(loss.parameters())


def test_focal_distillation_without_focus_is_the_mean_squared_error():
    new, old = random(5, 4), random(5, 4, seed=1)
    value = FocalDistillationLoss(alpha=1, beta=0)(new, old, torch.arange(5) % 2, random(5, 2))
    assert_close(value, F.mse_loss(new, old))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_stay_finite_in_every_precision(dtype):
    new, old = 30 * random(1, 4).to(dtype), 30 * random(1, 4, seed=1).to(dtype)
    assert torch.isfinite(DistillationLoss(random(3, 4))(new, old))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"\(C, D\)"):
        DistillationLoss(torch.zeros(3))
    with pytest.raises(InputError, match="old_temperature is 0"):
        DistillationLoss(torch.eye(3), 1.0, 0.0)
    with pytest.raises(InputError, match="must both be"):
        DistillationLoss(torch.eye(3))(random(2, 3), random(3, 3))
    with pytest.raises(InputError, match="size 2, the old classifier 3"):
        DistillationLoss(torch.eye(3))(random(2, 2), random(2, 2))
    with pytest.raises(InputError, match="beta is -1"):
        FocalDistillationLoss(beta=-1)
    with pytest.raises(TypeError, match="integers"):
        FocalDistillationLoss()(random(2, 2), random(2, 2), torch.ones(2), random(2, 2))
