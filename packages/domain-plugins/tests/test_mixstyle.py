"""MixStyle, the baseline: the paper's equations, and what differs from DSU (arXiv:2104.02008)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError
from bowerbird_domain.mixstyle import MixStyle, mix_feature_statistics

PLACES = (2, 3)


def features(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, 4, 6, generator=generator, dtype=torch.float64)
    return x * (1 + torch.arange(5.0)[:, None, None, None]) + torch.arange(3.0)[:, None, None]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(5)), st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_statistics_are_mixed_with_those_of_the_partner(seed: int, order: list[int], weights: list[float]) -> None:
    x, partner = features(seed), torch.tensor(order)
    weight = torch.tensor(weights, dtype=torch.float64)
    y = mix_feature_statistics(x, partner, weight, 1e-12)
    share = weight[:, None]
    for own, found in ((x.mean(PLACES), y.mean(PLACES)), (x.std(PLACES), y.std(PLACES))):
        torch.testing.assert_close(found, share * own + (1 - share) * own[partner], rtol=1e-8, atol=1e-8)


def test_statistics_carry_no_gradient() -> None:
    x = features().requires_grad_()
    partner, weight = torch.tensor([1, 2, 3, 4, 0]), torch.full((5,), 0.25, dtype=torch.float64)
    mix_feature_statistics(x, partner, weight).sum().backward()
    std = (x.detach().var(PLACES) + 1e-6).sqrt()
    factor = (0.25 * std + 0.75 * std[partner]) / std  # dy/dx of every position, the statistics held fixed
    torch.testing.assert_close(x.grad, factor[..., None, None].expand_as(x))


def test_a_sample_that_keeps_its_own_statistics_comes_back() -> None:
    x = features()
    order = torch.tensor([2, 0, 1, 4, 3])
    torch.testing.assert_close(mix_feature_statistics(x, order, torch.ones(5)), x)
    torch.testing.assert_close(mix_feature_statistics(x, torch.arange(5), torch.zeros(5)), x)


def test_tokens_and_half_precision() -> None:
    x, order, weight = features(), torch.tensor([1, 2, 3, 4, 0]), torch.rand(5)
    y = mix_feature_statistics(x, order, weight)
    last = mix_feature_statistics(x.movedim(1, -1), order, weight, channels_last=True)
    torch.testing.assert_close(last.movedim(-1, 1), y)
    low = x.bfloat16()
    assert torch.equal(
        mix_feature_statistics(low, order, weight), mix_feature_statistics(low.float(), order, weight).bfloat16()
    )


def test_draws_come_from_the_generator_or_from_the_global_one() -> None:
    x = features()
    first, second = (MixStyle(1.0, generator=torch.Generator().manual_seed(3))(x) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, x)
    torch.manual_seed(3)
    assert torch.equal(MixStyle(1.0)(x), first)


def test_small_alpha_gives_mostly_the_one_or_the_other() -> None:
    x = features().expand(5, 3, 4, 6)
    module = MixStyle(1.0, alpha=0.01, generator=torch.Generator().manual_seed(0))
    means = x.mean(PLACES)
    near = []
    for _ in range(100):
        distance = (module(x).mean(PLACES)[:, None] - means[None]).abs().amax(dim=2)  # to the means of every sample
        near.append(distance.min(dim=1).values < 1e-3 * means.abs().max())
    assert torch.cat(near).double().mean() > 0.8


def test_it_does_nothing_at_evaluation_nor_with_probability_zero() -> None:
    x = features()
    assert torch.equal(MixStyle(1.0).eval()(x), x)
    assert torch.equal(MixStyle(0.0)(x), x)


def test_what_cannot_be_mixed_is_refused_by_name() -> None:
    x = features()
    with pytest.raises(InputError, match="alpha"):
        MixStyle(alpha=0.0)
    with pytest.raises(InputError, match="partner"):
        mix_feature_statistics(x, torch.arange(3), torch.ones(5))
    with pytest.raises(InputError, match="weight"):
        mix_feature_statistics(x, torch.arange(5), torch.ones(3))
    with pytest.raises(InputError, match="partner has 1 to 5; expected 0 to 4"):
        mix_feature_statistics(x, torch.arange(1, 6), torch.ones(5))
    with pytest.raises(InputError, match=r"weight has 1\.5 to 1\.5; expected 0 to 1"):
        mix_feature_statistics(x, torch.arange(5), torch.full((5,), 1.5))
    with pytest.raises(InputError, match="at least 2 of both"):
        MixStyle(1.0, strict=True)(x[:1])
    assert torch.equal(MixStyle(1.0)(x[:1]), x[:1])
