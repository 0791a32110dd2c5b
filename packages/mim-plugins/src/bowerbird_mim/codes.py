"""Choosing one of V codes: Gumbel-softmax, vector quantisation, and how evenly codes are used.

B batch, V codes, d width of a code, h x w cells. Logits have the codes on axis 1: ``(B, V, h, w)``.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird import dist
from bowerbird.errors import InputError
from bowerbird_mim.precision import at_least_float32

# ------------------------------------------------------------------------------------------------ noise and softmax


def gumbel_noise(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard Gumbel noise of ``shape``: -ln E with E ~ Exponential(1)."""
    draws = torch.empty(shape, device=device, dtype=dtype).exponential_(generator=generator)
    return -draws.clamp_min(torch.finfo(draws.dtype).tiny).log()  # an E of 0 would be infinite noise


@torch.compiler.disable  # a generator per item cannot be traced
def item_noise(seeds: Tensor, shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Tensor:
    """Gumbel noise ``(B, *shape)`` that depends on the seed of each item only, int64 ``(B,)``, on its device.

    So a batch gets the same noise however many processes share it, and no noise travels from the data workers.
    """
    draws = torch.empty((len(seeds), *shape), device=seeds.device, dtype=dtype)
    generator = torch.Generator(device=seeds.device)
    for row, seed in zip(draws, seeds.tolist(), strict=True):
        row.exponential_(generator=generator.manual_seed(seed))
    return draws.clamp_min_(torch.finfo(draws.dtype).tiny).log_().neg_()


def gumbel_softmax(
    logits: Tensor,
    noise: Tensor | None,
    temperature: float | Tensor = 1.0,
    *,
    straight_through: bool = False,
) -> Tensor:
    """y = softmax((logits + noise) / temperature) over axis 1 (arXiv 1611.01144), in float32 at least.

    Args:
        logits: ``(B, V, ...)``.
        noise: Standard Gumbel noise of the same shape; ``None`` for none.
        temperature: Above 0.
        straight_through: The value is exactly one-hot at the largest entry; the gradient stays that of the soft y.

    Raises:
        InputError: Logits that are not finite, a noise of another shape, or a temperature that is not above 0.
    """
    if noise is not None and noise.shape != logits.shape:
        raise InputError(f"gumbel_noise has shape {tuple(noise.shape)}; expected that of logits {tuple(logits.shape)}")
    if not torch.compiler.is_compiling() and not isinstance(temperature, Tensor) and not temperature > 0:
        raise InputError(f"temperature = {temperature}: expected a number above 0")
    logits = at_least_float32(check_finite(logits))
    soft = ((logits if noise is None else logits + noise) / temperature).softmax(dim=1)
    if not straight_through:
        return soft
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the bracket is exactly 0 in value


def code_mixture(weights: Tensor, codes: Tensor) -> Tensor:
    """z = sum over v of y_v e_v: ``(B, V, h, w)`` and ``(V, d)`` to ``(B, d, h, w)``, in the type of ``codes``."""
    return torch.einsum("bvhw,vd->bdhw", weights.to(codes.dtype), codes)


def check_finite(logits: Tensor) -> Tensor:
    """``logits``. Raises ``InputError`` where one of them is NaN or infinite."""
    if torch.compiler.is_compiling():
        return logits
    # One pass without an intermediate; only a sum that overflows needs the closer look.
    if not torch.isfinite(at_least_float32(logits.detach()).sum()):
        broken = ~torch.isfinite(logits)
        if broken.any():
            raise InputError(
                f"logits of shape {tuple(logits.shape)}: {int(broken.sum())} of {logits.numel()} are NaN or infinite; "
                "the pictures or the weights of the tokenizer are damaged"
            )
    return logits


# ------------------------------------------------------------------------------------------------ how codes are used


def code_kl(logits: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """KL(softmax(logits) || uniform), from 0 to ln V per cell: a scalar.

    ``mean`` over batch and cells; ``sum`` is the official reduction of BEiT's tokenizer: the sum over batch and cells,
    of q + 1e-10 as there.
    """
    if reduction == "sum":
        log_q = (logits.softmax(dim=1) + 1e-10).log()
        return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum()
    if reduction != "mean":
        raise InputError(f"kl_reduction = {reduction!r}: accepted are 'mean' and 'sum'")
    log_q = logits.log_softmax(dim=1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(dim=1).mean()


def usage_kl(probabilities: Tensor) -> Tensor:
    """KL(mean of q over batch and cells || uniform): 0 where all codes are used alike, ln V where only one is.

    Unlike ``code_kl`` it lets every cell be certain. Under data parallel training the mean is that of all processes.

    Args:
        probabilities: q, ``(B, V, ...)``.
    """
    mean = probabilities.transpose(0, 1).flatten(1).mean(dim=1)
    if dist.is_distributed():  # value of the joined batch; the averaged gradients add up to its gradient
        mean = mean + (dist.mean_over_processes(mean) - mean).detach()
    mean = mean.clamp_min(torch.finfo(mean.dtype).tiny)
    return (mean * mean.log()).sum() + math.log(len(mean))


def count_codes(ids: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs in ``ids``: float32 ``(V,)``."""
    ids = ids.flatten()
    return torch.zeros(vocab_size, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of codes: from 1 (one code, or none) to V (all alike). ``counts``: ``(V,)``."""
    share = counts / counts.sum().clamp_min(torch.finfo(counts.dtype).tiny)
    return torch.special.entr(share).sum().exp()


# ------------------------------------------------------------------------------------------------ quantisers


class Chosen(NamedTuple):
    """What ``GumbelQuantizer`` returns: ``quantized (B, d, h, w)``, ``ids`` int64 ``(B, h, w)``, ``logits``."""

    quantized: Tensor
    ids: Tensor
    logits: Tensor


class GumbelQuantizer(nn.Module):
    """Features to logits over codes by a 1 x 1 convolution, then a Gumbel-softmax mixture of codes (VQGAN's own).

    Noise is drawn while training only. (In the official class evaluation draws it, too.)

    Args:
        in_channels: Width of the features.
        dim: d.
        num_codes: V, at least 2.
        temperature: Of the softmax.
        straight_through: One code per cell in the forward pass.
    """

    def __init__(
        self, in_channels: int, dim: int, num_codes: int, *, temperature: float = 1.0, straight_through: bool = True
    ) -> None:
        super().__init__()
        check_sizes(2, num_codes=num_codes)
        check_sizes(1, in_channels=in_channels, dim=dim)
        self.temperature, self.straight_through = temperature, straight_through
        self.proj = nn.Conv2d(in_channels, num_codes, 1)
        self.embed = nn.Embedding(num_codes, dim)

    def forward(self, z: Tensor, gumbel_noise: Tensor | None = None) -> Chosen:
        """Features ``(B, in_channels, h, w)``; ``gumbel_noise`` ``(B, V, h, w)`` is drawn if it is not given."""
        logits = self.proj(z)
        if gumbel_noise is None and self.training:
            gumbel_noise = _gumbel_like(logits)
        weights = gumbel_softmax(logits, gumbel_noise, self.temperature, straight_through=self.straight_through)
        return Chosen(code_mixture(weights, self.embed.weight), weights.argmax(dim=1), logits)


def _gumbel_like(logits: Tensor) -> Tensor:
    return gumbel_noise(tuple(logits.shape), device=logits.device, dtype=at_least_float32(logits).dtype)


class Quantized(NamedTuple):
    """What ``VectorQuantizer`` returns: ``quantized`` of the shape of z, scalar ``loss``, ``ids`` int64 without d."""

    quantized: Tensor
    loss: Tensor
    ids: Tensor


class VectorQuantizer(nn.Module):
    """Every feature vector to the nearest code (VQ-VAE, arXiv 1711.00937).

    loss = |sg(z) - e|^2 + commitment * |z - sg(e)|^2, means over all numbers; the gradient of ``quantized`` goes to z
    unchanged. With ``ema_decay`` the first term is left out and codes follow the mean of their features instead: in
    every training pass n <- g n + (1 - g) #, s <- g s + (1 - g) sum(z), e = s / n~ with Laplace smoothing n~.

    Args:
        num_codes: V, at least 2.
        dim: d.
        commitment: Weight on the features' side.
        ema_decay: g in [0, 1); ``None``: codes are learned by gradient.
        eps: Of the Laplace smoothing, above 0.
        weight_on: ``codebook`` puts ``commitment`` on the codes' term instead, as the first release of VQGAN did.

    ``codebook``: ``(V, d)``, a parameter, or a buffer with ``ema_decay``.
    """

    codebook: Tensor
    cluster_size: Tensor
    embed_sum: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        commitment: float = 0.25,
        ema_decay: float | None = None,
        *,
        eps: float = 1e-5,
        weight_on: Literal["commitment", "codebook"] = "commitment",
    ) -> None:
        super().__init__()
        check_sizes(2, num_codes=num_codes)
        check_sizes(1, dim=dim)
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise InputError(f"ema_decay = {ema_decay}: expected a number from 0 to below 1, or None")
        if commitment < 0:
            raise InputError(f"commitment = {commitment}: expected 0 or more")
        if not eps > 0:  # with 0 a code that nothing has chosen for long would become 0 / 0
            raise InputError(f"eps = {eps}: expected a number above 0")
        if weight_on not in ("commitment", "codebook"):
            raise InputError(f"weight_on = {weight_on!r}: accepted are 'commitment' and 'codebook'")
        self.num_codes, self.dim, self.commitment, self.ema_decay = num_codes, dim, commitment, ema_decay
        self.eps, self.weight_on = eps, weight_on
        codes = torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes)
        if ema_decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            # A count of 1 with a sum of the code itself: a code that is not chosen stays where it is. (From a count of
            # 0, as released, it would be thrown 1 / eps away by the first update and never be chosen.)
            self.register_buffer("cluster_size", torch.ones(num_codes))
            self.register_buffer("embed_sum", codes.clone())

    def forward(self, z: Tensor) -> Quantized:
        """``(B, d)`` or ``(B, d, h, w)``; with ``ema_decay`` moves the codes if in training mode."""
        z = at_least_float32(z)
        ids = check_finite(self.distances(z)).argmin(dim=1)
        codes = self.lookup(ids).to(z.dtype)
        to_codes, to_features = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
        if self.ema_decay is not None:
            loss = self.commitment * to_features
            if self.training:
                self.update(z.detach(), ids)
        elif self.weight_on == "commitment":
            loss = to_codes + self.commitment * to_features
        else:
            loss = to_features + self.commitment * to_codes
        return Quantized(codes.detach() + (z - z.detach()), loss, ids)

    def distances(self, z: Tensor) -> Tensor:
        """Squared Euclidean distance of every feature to every code: ``(B, d, ...)`` to ``(B, V, ...)``."""
        if z.ndim < 2 or z.shape[1] != self.dim:
            raise InputError(f"features have shape {tuple(z.shape)}; expected (B, {self.dim}, ...)")
        rows = at_least_float32(z).movedim(1, -1)
        codes = self.codebook.to(rows.dtype)
        with torch.autocast(z.device.type, enabled=False):  # differences of large numbers
            # As one matrix: for more axes torch adds in another order where gradients are needed.
            products = (rows.reshape(-1, self.dim) @ codes.T).reshape(*rows.shape[:-1], len(codes))
            squared = rows.square().sum(dim=-1, keepdim=True) - 2 * products + codes.square().sum(dim=1)
        return squared.movedim(-1, 1)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes of ``ids (B, ...)``: ``(B, d, ...)``."""
        return F.embedding(ids, self.codebook).movedim(-1, 1)

    @torch.no_grad()
    def update(self, z: Tensor, ids: Tensor) -> None:
        """One step of the moving averages, over the features of all processes."""
        if self.ema_decay is None:
            raise InputError("this quantiser has ema_decay = None: its codes are learned by gradient")
        rows = z.movedim(1, -1).reshape(-1, self.dim).to(self.embed_sum.dtype)
        ids = ids.flatten()
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, rows.new_ones(len(ids)))
        sums = torch.zeros_like(self.embed_sum).index_add_(0, ids, rows)
        if dist.is_distributed():
            counts, sums = (dist.mean_over_processes(part) * dist.world_size() for part in (counts, sums))
        self.cluster_size.lerp_(counts, 1 - self.ema_decay)
        self.embed_sum.lerp_(sums, 1 - self.ema_decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.num_codes * self.eps) * total
        self.codebook.copy_(self.embed_sum / smoothed[:, None])


def check_sizes(least: int, **sizes: int) -> None:
    """Raise ``InputError`` naming the ``sizes`` below ``least``."""
    if too_small := [f"{name} = {size}" for name, size in sizes.items() if size < least]:
        raise InputError(f"{', '.join(too_small)}: expected at least {least}")
