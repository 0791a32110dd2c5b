"""Noise in the feature statistics of a batch, as wide as they differ within the batch: DSU.

Li, Dai, Ge, Liu, Shan, Duan: Uncertainty Modeling for Out-of-Distribution Generalization, ICLR 2022, arXiv:2202.03958.
A channel's mean and deviation carry the look of a picture. While training, each is moved by Gaussian noise whose width
is the deviation of that statistic over the batch. Nothing is learned, and at evaluation nothing happens.

B batch, C channels, n positions of a feature map (H * W pixels, N tokens).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bowerbird.errors import InputError
from bowerbird_domain.layers import insert_after

__all__ = ["FeatureStatisticsUncertainty", "insert_after", "perturb_feature_statistics"]


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and unbiased variance over the positions, ``(B, C, 1, ...)``, and memory of the size of ``x`` to write to.

    torch.var is 2 to 5 times slower on a CPU than this, and as exact: the mean is taken off before squaring.
    """
    dims = tuple(range(2, x.ndim))
    mean = x.mean(dims, keepdim=True)
    room = x - mean
    squares = room * room if room.requires_grad else room.square_()
    return mean, squares.sum(dims, keepdim=True) / (math.prod(x.shape[2:]) - 1), room


def moved_statistics(
    mean: Tensor, variance: Tensor, noise_mean: Tensor, noise_std: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor]:
    """The equations of DSU on statistics ``(B, C, 1, ...)``: ``gain`` and ``beta`` of ``y = gain * (x - mean) + beta``.

    ``beta = mean + scale * noise_mean * S(mean)`` and ``gain = gamma / std`` with
    ``gamma = std + scale * noise_std * S(std)``, where S is the deviation over the batch.
    """
    std = (variance + eps).sqrt()
    beta = mean + scale * noise_mean * (mean.var(dim=0, keepdim=True) + eps).sqrt()
    gamma = std + scale * noise_std * (std.var(dim=0, keepdim=True) + eps).sqrt()
    return gamma / std, beta


class _Perturb(torch.autograd.Function):
    """``moments`` and ``moved_statistics`` with a backward pass that goes over the features as seldom as possible.

    The statistics are small; their part of the gradient is left to autograd. The features' part is one affine map of
    the incoming gradient and the features, where autograd alone would make a dozen passes over them. Besides the
    result, neither direction needs an array of the features' size: to get fresh memory from the system takes longer
    than to compute what is written to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise_mean: Tensor, noise_std: Tensor, eps: float, scale: float) -> Tensor:
        mean, variance, room = moments(x)
        gain, beta = moved_statistics(mean, variance, noise_mean, noise_std, eps, scale)
        ctx.save_for_backward(x, mean, variance, noise_mean, noise_std)
        ctx.eps, ctx.scale = eps, scale
        return torch.addcmul(beta - mean * gain, x, gain, out=room)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, mean, variance, noise_mean, noise_std = ctx.saved_tensors
        dims, count = tuple(range(2, grad.ndim)), math.prod(grad.shape[2:])
        with torch.enable_grad():
            statistics = mean.detach().requires_grad_(), variance.detach().requires_grad_()
            moved = moved_statistics(*statistics, noise_mean, noise_std, ctx.eps, ctx.scale)
        room = (x - mean).mul_(grad)
        to_gain, to_beta = room.sum(dims, keepdim=True), grad.sum(dims, keepdim=True)
        to_mean, to_variance = torch.autograd.grad(moved, statistics, (to_gain, to_beta))
        # d mean / dx = 1 / n; d variance / dx = 2 (x - mean) / (n - 1); d (x - mean) / dx = 1 - 1 / n
        gain = moved[0].detach()
        shift, slope = (to_mean - gain * to_beta) / count, 2 * to_variance / (count - 1)
        return torch.addcmul(shift - mean * slope, x, slope, out=room).addcmul_(grad, gain), None, None, None, None


def perturb_feature_statistics(
    x: Tensor,
    noise_mean: Tensor,
    noise_std: Tensor,
    eps: float = 1e-6,
    scale: float = 1.0,
    *,
    channels_last: bool = False,
    strict: bool = False,
) -> Tensor:
    """The equations of DSU with given draws; variances are unbiased, as in the authors' code.

    With m and s the mean and deviation of a sample's channel, and S_m, S_s their deviations over the batch, the result
    has mean ``m + scale * noise_mean * S_m`` and deviation ``s + scale * noise_std * S_s``. Each variance is unbiased
    and gets ``eps`` added before the root, so the result differs from ``x`` even where all samples are the same.

    Args:
        x: ``(B, C, *spatial)`` with at least one spatial dimension, floating point. Half precision is computed in
            float32 and rounded once.
        noise_mean, noise_std: ``(B, C)``, standard normal draws for the mean and for the deviation.
        eps: Above 0; added to the three variances.
        scale: Of the noise, 0 or more; 1 in the paper.
        channels_last: ``x`` is ``(B, *spatial, C)``: tokens ``(B, N, C)`` of a transformer, statistics over N.
        strict: Raise where there are no statistics: one sample, or one position. By default ``x`` is returned.

    Returns:
        Shape, type and memory layout of ``x``. Differentiable once with respect to ``x``.

    Raises:
        InputError: Another shape or type, noise that does not fit, a value outside its range; with ``strict``, fewer
            than two samples or positions.
    """
    check_range(eps=eps, scale=scale)
    if not check_features(x, channels_last=channels_last, strict=strict):
        return x
    batch, channels = x.shape[0], x.shape[-1 if channels_last else 1]
    for name, noise in (("noise_mean", noise_mean), ("noise_std", noise_std)):
        if noise.shape != (batch, channels):
            raise InputError(f"{name} must have shape (B, C) = {(batch, channels)}; found {tuple(noise.shape)}")
    features = as_channels_first(x, channels_last)
    shape = (batch, channels, *[1] * (features.ndim - 2))
    noise_mean, noise_std = (noise.to(features).reshape(shape) for noise in (noise_mean, noise_std))
    if torch.compiler.is_compiling():  # the compiler joins the passes itself
        mean, variance, _ = moments(features)
        gain, beta = moved_statistics(mean, variance, noise_mean, noise_std, eps, scale)
        y = torch.addcmul(beta - mean * gain, features, gain)
    else:
        y = _Perturb.apply(features, noise_mean, noise_std, eps, scale)
    return as_given(y, x, channels_last)


class FeatureStatisticsUncertainty(nn.Module):
    """``perturb_feature_statistics`` with random draws in training mode, the identity in evaluation mode.

    One coin per call decides for the whole batch. Coin and noise come from ``generator``, or from torch's global
    generators, whose state the training loop keeps in its checkpoints: a resumed run draws what an uninterrupted one
    would. The noise of the mean is drawn first. There are no parameters and no buffers.

    Args:
        p: Probability of a call to change its input, in [0, 1].
        eps, scale, strict: As in ``perturb_feature_statistics``.
        generator: Source of the coin and of the noise.
        channels_last: As there; ``None`` takes three dimensions for tokens ``(B, N, C)`` and more for ``(B, C, ...)``.

    Raises:
        InputError: A value outside its range; in ``forward``, what ``perturb_feature_statistics`` refuses.
    """

    def __init__(
        self,
        p: float = 0.5,
        eps: float = 1e-6,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        *,
        channels_last: bool | None = False,
        strict: bool = False,
    ) -> None:
        super().__init__()
        check_range(p=p, eps=eps, scale=scale)
        self.p, self.eps, self.scale, self.generator = p, eps, scale, generator
        self.channels_last, self.strict = channels_last, strict

    def forward(self, x: Tensor) -> Tensor:  # (B, C, *spatial), or (B, *spatial, C), to the same
        last = x.ndim == 3 if self.channels_last is None else self.channels_last
        enough = check_features(x, channels_last=last, strict=self.strict and self.training)
        if not (self.training and enough and coin(self.p, self.generator)):
            return x
        shape = (x.shape[0], x.shape[-1 if last else 1])
        device = x.device if self.generator is None else self.generator.device
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        noise_mean = torch.randn(shape, generator=self.generator, device=device, dtype=dtype)
        noise_std = torch.randn(shape, generator=self.generator, device=device, dtype=dtype)
        return perturb_feature_statistics(x, noise_mean, noise_std, self.eps, self.scale, channels_last=last)

    def extra_repr(self) -> str:
        return f"p={self.p}, eps={self.eps}, scale={self.scale}"


# ------------------------------------------------------------------------------------- shared with mixstyle.py


def coin(p: float, generator: torch.Generator | None) -> bool:
    """True with probability ``p``; nothing is drawn where ``p`` is 0 or 1.

    Without a generator it is drawn on the CPU, so that no accelerator has to be waited for.
    """
    if p in (0, 1):
        return p == 1
    device = "cpu" if generator is None else generator.device
    return float(torch.rand((), generator=generator, device=device)) < p


def check_range(**values: float) -> None:
    """Raise ``InputError`` for ``p`` outside [0, 1], ``eps`` or ``alpha`` not above 0, ``scale`` below 0."""
    accepted = {"p": "0 to 1", "eps": "above 0", "alpha": "above 0", "scale": "0 or more"}
    for name, value in values.items():
        right = {"p": 0 <= value <= 1, "scale": value >= 0}.get(name, value > 0)
        if not right or value == float("inf"):
            raise InputError(f"{name} = {value}: expected a number {accepted[name]}")


def check_features(x: Tensor, *, channels_last: bool, strict: bool) -> bool:
    """Whether ``x`` has statistics: two samples and two positions at least. Raises ``InputError`` for another shape."""
    layout = "(B, *spatial, C)" if channels_last else "(B, C, *spatial)"
    if x.ndim < 3 or not x.is_floating_point():
        raise InputError(
            f"expected floating-point features {layout} with at least 3 dimensions; "
            f"found {tuple(x.shape)} of {str(x.dtype).removeprefix('torch.')}"
        )
    positions = math.prod(x.shape[1:-1] if channels_last else x.shape[2:])
    if x.shape[0] >= 2 and positions >= 2:
        return True
    if strict:
        raise InputError(
            f"features {tuple(x.shape)}, read as {layout}, have {x.shape[0]} sample(s) of {positions} position(s): "
            "the statistics need at least 2 of both. Take larger batches or pictures, or leave out this layer"
        )
    return False


def as_channels_first(x: Tensor, channels_last: bool) -> Tensor:
    """``(B, C, *spatial)`` of at least float32; nothing is copied but half precision."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return x.movedim(-1, 1) if channels_last else x


def as_given(y: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """``y`` in the layout and type of ``x``."""
    return (y.movedim(1, -1) if channels_last else y).to(x.dtype)
