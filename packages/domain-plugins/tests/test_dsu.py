"""DSU: the numbers of the authors' code, and what holds for every input (arXiv:2202.03958)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird_domain.dsu import FeatureStatisticsUncertainty, perturb_feature_statistics

EPS = 1e-6
PLACES = (2, 3)


def features(seed: int = 0, shape: tuple[int, ...] = (4, 3, 5, 6)) -> tuple[Tensor, Tensor, Tensor]:
    """Features with statistics that differ between samples and channels, and two draws of noise, float64."""
    generator = torch.Generator().manual_seed(seed)
    ones = [1] * (len(shape) - 2)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = normal(*shape) * normal(*shape[:2], *ones).exp() + 2 * normal(*shape[:2], *ones)
    return x, normal(*shape[:2]), normal(*shape[:2])


# ------------------------------------------------------------------------------------------------ official numbers


@pytest.mark.parametrize("file", ["module_float32", "module_forward_backward", "module_large_batch"])
def test_outputs_and_gradients_are_those_of_the_authors_code(golden: Any, file: str) -> None:
    g = golden(f"dsu/{file}")
    close: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-5} if g["x"].dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    )
    x = g["x"].requires_grad_()
    y = perturb_feature_statistics(x, g["noise_mean"], g["noise_std"], g["eps"], g["factor"])
    (y * g["upstream"]).sum().backward()
    torch.testing.assert_close(y, g["y"], **close)
    torch.testing.assert_close(x.grad, g["grad_x"], **close)
    torch.testing.assert_close(y.mean(PLACES), g["out_mean"], **close)
    torch.testing.assert_close(y.std(PLACES), g["out_std_unbiased"], **close)
    module = FeatureStatisticsUncertainty(1.0, g["eps"], g["factor"]).eval()
    assert torch.equal(module(g["x"]), g["eval_output"])


def test_the_gradient_is_that_of_the_function() -> None:
    x, e1, e2 = features(shape=(3, 2, 2, 3))
    assert torch.autograd.gradcheck(lambda x: perturb_feature_statistics(x, e1, e2), x.requires_grad_())


# ------------------------------------------------------------------------------------------------ what always holds

shapes = st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(2, 5), st.integers(1, 4))
seeds = st.integers(0, 2**31)


@settings(max_examples=25, deadline=None)
@given(seeds, shapes, st.floats(0, 3))
def test_the_output_has_the_drawn_mean_and_deviation(seed: int, shape: tuple[int, ...], scale: float) -> None:
    x, e1, e2 = features(seed, shape)
    y = perturb_feature_statistics(x, e1, e2, EPS, scale)
    mean, variance = x.mean(PLACES), x.var(PLACES)
    std = (variance + EPS).sqrt()
    beta = mean + scale * e1 * (mean.var(dim=0) + EPS).sqrt()
    gamma = std + scale * e2 * (std.var(dim=0) + EPS).sqrt()
    torch.testing.assert_close(y.mean(PLACES), beta, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y.std(PLACES), gamma.abs() * (variance / (variance + EPS)).sqrt(), rtol=1e-8, atol=1e-9)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(PLACES, keepdim=True)) / x.std(PLACES, keepdim=True)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_a_channel_of_a_sample_is_changed_by_one_affine_map(seed: int) -> None:
    x, e1, e2 = features(seed)
    y = perturb_feature_statistics(x, e1, 3 * e2)
    std = (x.var(PLACES) + EPS).sqrt()
    gamma = std + 3 * e2 * (std.var(dim=0) + EPS).sqrt()  # may be negative: it is not clamped
    sign = gamma.sign()[..., None, None]
    torch.testing.assert_close(standardised(y), sign * standardised(x), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seeds, st.permutations(range(4)))
def test_the_order_of_the_batch_does_not_matter(seed: int, order: list[int]) -> None:
    x, e1, e2 = features(seed)
    y = perturb_feature_statistics(x, e1, e2)
    torch.testing.assert_close(perturb_feature_statistics(x[order], e1[order], e2[order]), y[order])


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(0, 2))
def test_a_channel_does_not_see_the_others(seed: int, changed: int) -> None:
    x, e1, e2 = features(seed)
    other = x.clone()
    other[:, changed] = other[:, changed] ** 2 + 1
    kept = [c for c in range(3) if c != changed]
    before, after = (perturb_feature_statistics(v, e1, e2)[:, kept] for v in (x, other))
    torch.testing.assert_close(after, before)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(10, 1e4))
def test_larger_features_give_as_much_larger_outputs(seed: int, factor: float) -> None:
    x, e1, e2 = features(seed)
    y = perturb_feature_statistics(x, e1, e2, 1e-12)
    torch.testing.assert_close(perturb_feature_statistics(factor * x, e1, e2, 1e-12), factor * y, rtol=1e-5, atol=1e-5)


def test_without_noise_the_input_comes_back() -> None:
    x, e1, e2 = features()
    torch.testing.assert_close(perturb_feature_statistics(x, e1, e2, EPS, 0.0), x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(perturb_feature_statistics(x, 0 * e1, 0 * e2), x, rtol=1e-10, atol=1e-12)


def test_a_batch_of_equal_samples_moves_by_the_root_of_eps() -> None:
    x = features()[0][:1].expand(5, 3, 5, 6)
    one = torch.ones(5, 3, dtype=torch.float64)
    y = perturb_feature_statistics(x, one, 0 * one, 1e-4)
    torch.testing.assert_close(y, x + 1e-2)


def test_over_many_draws_the_mean_is_kept_and_spread_as_the_batch_is() -> None:
    x = features(shape=(4, 2, 3, 3))[0]
    module = FeatureStatisticsUncertainty(1.0, generator=torch.Generator().manual_seed(1))
    draws = 10_000
    many = x[None].expand(draws, *x.shape)
    betas = torch.stack([module(copy).mean(PLACES) for copy in many])
    mean, spread = x.mean(PLACES), (x.mean(PLACES).var(dim=0) + EPS).sqrt()
    error = (betas.mean(dim=0) - mean) / (spread / draws**0.5)
    assert error.abs().max() < 4.5  # of 8 standard normal values
    variance = betas.var(dim=0) / spread.square()
    assert ((variance - 1) / (2 / draws) ** 0.5).abs().max() < 4.5


def test_half_precision_is_computed_in_single_and_rounded_once() -> None:
    x, e1, e2 = (v.float() for v in features())
    for dtype in (torch.bfloat16, torch.float16):
        low = (x + 100).to(dtype)  # mean 100, deviation about 1: half precision has no digits left for the variance
        y = perturb_feature_statistics(low, e1, e2)
        assert y.dtype == dtype
        assert torch.equal(y, perturb_feature_statistics(low.float(), e1, e2).to(dtype))


@pytest.mark.parametrize("shape", [(4, 3, 7), (4, 3, 2, 5), (4, 3, 2, 2, 3)])
def test_any_number_of_spatial_dimensions_and_channels_at_the_end(shape: tuple[int, ...]) -> None:
    x, e1, e2 = features(shape=shape)
    y = perturb_feature_statistics(x, e1, e2)
    flat = perturb_feature_statistics(x.flatten(2), e1, e2).reshape(shape)
    torch.testing.assert_close(y, flat)
    last = perturb_feature_statistics(x.movedim(1, -1).contiguous(), e1, e2, channels_last=True)
    assert last.is_contiguous()
    torch.testing.assert_close(last.movedim(-1, 1), y)


def test_a_compiled_function_gives_the_same_outputs_and_gradients() -> None:
    found = []
    for function in (perturb_feature_statistics, torch.compile(perturb_feature_statistics, backend="aot_eager")):
        x, e1, e2 = features()
        x.requires_grad_()
        y = function(x, e1, e2)
        (y**2).sum().backward()
        found.append((y, x.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_the_memory_layout_is_kept() -> None:
    x, e1, e2 = features()
    x = x.contiguous(memory_format=torch.channels_last)
    assert perturb_feature_statistics(x, e1, e2).is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ the module


def test_there_is_nothing_to_store_and_gradients_are_finite() -> None:
    module = FeatureStatisticsUncertainty(1.0)
    assert not list(module.parameters()) and not module.state_dict()
    constant = torch.zeros(2, 3, 4, 4, requires_grad=True)  # no variance anywhere
    module(constant).sum().backward()
    assert constant.grad is not None and constant.grad.isfinite().all()


def test_it_does_nothing_at_evaluation_nor_with_probability_zero() -> None:
    x = features()[0]
    assert torch.equal(FeatureStatisticsUncertainty(1.0).eval()(x), x)
    assert torch.equal(FeatureStatisticsUncertainty(0.0)(x), x)


def test_the_mean_is_drawn_before_the_deviation() -> None:
    x = features()[0]
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    y = FeatureStatisticsUncertainty(1.0, generator=torch.Generator().manual_seed(5))(x)
    torch.testing.assert_close(y, perturb_feature_statistics(x, *noise))


def test_one_coin_decides_for_the_whole_batch_as_often_as_p_says() -> None:
    x = features()[0]
    module = FeatureStatisticsUncertainty(0.3, generator=torch.Generator().manual_seed(0))
    changed = torch.stack([(module(x) != x).flatten(1).any(dim=1) for _ in range(2000)])
    assert (changed.all(dim=1) | ~changed.any(dim=1)).all()
    assert abs(changed[:, 0].double().mean() - 0.3) < 3 * (0.3 * 0.7 / 2000) ** 0.5


def test_equal_generators_give_equal_outputs_and_the_global_one_is_used_by_default() -> None:
    x = features()[0]

    def several(generator: torch.Generator | None) -> Tensor:
        module = FeatureStatisticsUncertainty(0.5, generator=generator)
        return torch.stack([module(x) for _ in range(5)])

    runs = [several(torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*runs)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    first = several(None)
    torch.set_rng_state(before)
    assert torch.equal(several(None), first) and torch.equal(first, runs[0])


def test_tokens_are_recognised_by_three_dimensions_where_that_is_asked_for() -> None:
    x = features(shape=(4, 7, 3))[0]  # (B, N, C)
    auto, last = (
        FeatureStatisticsUncertainty(1.0, generator=torch.Generator().manual_seed(0), channels_last=value)(x)
        for value in (None, True)
    )
    assert torch.equal(auto, last)
    y = FeatureStatisticsUncertainty(1.0, channels_last=True)(x)
    normalised = [(v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True) for v in (x, y)]
    torch.testing.assert_close(normalised[1].abs(), normalised[0].abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 3, 1, 1), (0, 3, 4, 4)])
def test_too_few_samples_or_positions_pass_unchanged_or_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(FeatureStatisticsUncertainty(1.0)(x), x)
    noise = torch.randn(shape[:2])
    assert torch.equal(perturb_feature_statistics(x, noise, noise), x)
    with pytest.raises(InputError, match=r"need at least 2 of both"):
        FeatureStatisticsUncertainty(1.0, strict=True)(x)
    assert torch.equal(FeatureStatisticsUncertainty(1.0, strict=True).eval()(x), x)


@pytest.mark.parametrize(
    "values", [{"p": -0.1}, {"p": 1.1}, {"p": float("nan")}, {"eps": 0.0}, {"eps": -1.0}, {"scale": -1.0}]
)
def test_values_outside_their_range_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        FeatureStatisticsUncertainty(**values)


def test_features_and_noise_of_another_shape_are_refused() -> None:
    x, e1, e2 = features()
    for wrong in (x[:, :, 0, 0], x[0, 0], x.long()):
        with pytest.raises(ValueError, match="at least 3 dimensions"):
            FeatureStatisticsUncertainty(1.0)(wrong)
    with pytest.raises(ValueError, match="noise_mean"):
        perturb_feature_statistics(x, e1[:2], e2)
    with pytest.raises(ValueError, match="noise_std"):
        perturb_feature_statistics(x, e1, e2.T)
