"""MixStyle, the baseline of DSU: every sample takes a part of the feature statistics of another one.

Zhou, Yang, Qiao, Xiang: Domain Generalization with MixStyle, ICLR 2021, arXiv:2104.02008. The other sample is drawn
from the whole batch (random shuffle), so domain labels are not needed. Unlike in DSU, no gradient flows through
statistics.

B batch, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird_domain.dsu import (
    as_channels_first,
    as_given,
    check_features,
    check_range,
    coin,
    moments,
)


def mix_feature_statistics(
    x: Tensor,
    partner: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    channels_last: bool = False,
    strict: bool = False,
) -> Tensor:
    """The equations of MixStyle: sample b gets ``weight[b]`` of its own mean and deviation and the rest of those of
    sample ``partner[b]``, per channel. Statistics carry no gradient; variances are unbiased, ``eps`` below the root.

    Args:
        x: ``(B, C, *spatial)``, floating point. Half precision is computed in float32 and rounded once.
        partner: int64 ``(B,)``, positions in the batch; a permutation in the paper.
        weight: ``(B,)``, in [0, 1].
        eps: Above 0.
        channels_last: ``x`` is ``(B, *spatial, C)``.
        strict: Raise where there are no statistics: one sample, or one position. By default ``x`` is returned.

    Raises:
        InputError: Another shape or type, a value outside its range; with ``strict``, fewer than two samples or
            positions.
    """
    check_range(eps=eps)
    for name, values in (("partner", partner), ("weight", weight)):
        if values.shape != x.shape[:1]:
            raise InputError(f"{name} must have one entry per sample ({len(x)}); found shape {tuple(values.shape)}")
    if not torch.compiler.is_compiling() and len(x):
        for name, values, most in (("partner", partner, len(x) - 1), ("weight", weight, 1)):
            low, high = (float(bound) for bound in values.aminmax())
            if not 0 <= low <= high <= most:
                raise InputError(f"{name} has {low:g} to {high:g}; expected 0 to {most}")
    if not check_features(x, channels_last=channels_last, strict=strict):
        return x
    features = as_channels_first(x, channels_last)
    with torch.no_grad():
        own_mean, variance, _ = moments(features.detach())
        own_std = (variance + eps).sqrt()
        share = weight.to(own_mean).reshape(-1, *[1] * (features.ndim - 1))
        mean, std = (torch.lerp(own[partner], own, share) for own in (own_mean, own_std))
        gain = std / own_std
    return as_given(torch.addcmul(mean - own_mean * gain, features, gain), x, channels_last)


class MixStyle(nn.Module):
    """``mix_feature_statistics`` with random partners and weights in training mode, else the identity.

    One coin per call decides for the whole batch; weights are drawn from Beta(alpha, alpha), one per sample. Coin and
    draws come from ``generator``, or from torch's global generator (see ``FeatureStatisticsUncertainty``).

    Args:
        p: Probability of a call to change its input, in [0, 1].
        alpha: Above 0; 0.1 in the paper: mostly nearly all of the one or of the other.
        eps, strict: As in ``mix_feature_statistics``.
        generator: Source of the coin, the partners and the weights.
        channels_last: As there; ``None`` takes three dimensions for tokens ``(B, N, C)`` and more for ``(B, C, ...)``.

    Raises:
        InputError: A value outside its range; in ``forward``, what ``mix_feature_statistics`` refuses.
    """

    def __init__(
        self,
        p: float = 0.5,
        alpha: float = 0.1,
        eps: float = 1e-6,
        generator: torch.Generator | None = None,
        *,
        channels_last: bool | None = False,
        strict: bool = False,
    ) -> None:
        super().__init__()
        check_range(p=p, alpha=alpha, eps=eps)
        self.p, self.alpha, self.eps, self.generator = p, alpha, eps, generator
        self.channels_last, self.strict = channels_last, strict

    def forward(self, x: Tensor) -> Tensor:
        last = x.ndim == 3 if self.channels_last is None else self.channels_last
        enough = check_features(x, channels_last=last, strict=self.strict and self.training)
        if not (self.training and enough and coin(self.p, self.generator)):
            return x
        # torch's own Beta takes no generator; numpy's is seeded by the one that the checkpoint keeps.
        device = "cpu" if self.generator is None else self.generator.device
        seed = int(torch.randint(2**62, (), generator=self.generator, device=device))
        draws = np.random.default_rng(seed)
        partner = torch.from_numpy(draws.permutation(len(x))).to(x.device)
        weight = torch.from_numpy(draws.beta(self.alpha, self.alpha, len(x))).to(x.device)
        return mix_feature_statistics(x, partner, weight, self.eps, channels_last=last)

    def extra_repr(self) -> str:
        return f"p={self.p}, alpha={self.alpha}, eps={self.eps}"
