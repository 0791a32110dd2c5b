"""Masks as parametrisations of weights: what a forward pass multiplies, and what flows back.

A masked layer keeps its type and its dense weight (``parametrizations.<weight>.original``); reading ``layer.weight``
gives the weight times its mask, so that attention and any other code that reads weights works unchanged.

The soft masks of one budget depend on all of their weights. They are found once per step, outside of autograd; for the
backward pass one node stands between all weights and all masks (``_Solved``). It holds no copies of tensors, so a step
may run forward and backward as often as it likes (accumulated gradients, several crops).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bowerbird_sparsity.config import Mode
from bowerbird_sparsity.patterns import Groups, Pattern
from bowerbird_sparsity.soft_topk import marginal_price, value_gradient


class MaskedWeight(nn.Module):
    """The parametrisation of one weight.

    Buffers: ``signed``, in the pattern's shape: the soft mask, negative where its entry is dropped (the gradient needs
    the value of a dropped entry, too); ``steps_done``, of the first layer of a model only.
    """

    signed: Tensor
    steps_done: Tensor

    def __init__(self, weight: Tensor, pattern: Pattern, shared: SharedMasks) -> None:
        super().__init__()
        self.pattern, self.shared = pattern, shared
        shape = pattern.mask_shape(weight.shape)
        dtype = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32
        self.register_buffer("signed", torch.ones(shape, dtype=dtype, device=weight.device))

    @property
    def mask(self) -> Tensor:
        """Soft values in [0, 1], of dropped entries, too."""
        return self.signed.abs()

    @property
    def kept(self) -> Tensor:
        """bool: entries that the forward pass uses."""
        return self.signed > 0

    def factor(self) -> Tensor:
        """What weights are multiplied with: the mask, and 0 where an entry is dropped."""
        return torch.relu(self.signed)

    def forward(self, weight: Tensor) -> Tensor:
        shared = self.shared
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return self.product(weight)
        if shared.mode == "dual_averaging" and not shared.plain():
            return _StraightThrough.apply(weight, self)
        soft = None if shared.plain() else shared.differentiable(self)
        if soft is None:  # a constant mask; also of a budget that keeps everything, or nothing
            return self.pattern.times(weight, self.factor().to(weight.dtype))
        return _SoftMasked.apply(weight, soft, self)

    def product(self, weight: Tensor) -> Tensor:
        """``W * E(factor)``, for where autograd does not look: in a new tensor, and no other one."""
        if self.pattern.single and weight.dtype == self.signed.dtype:
            return self.factor().mul_(weight)
        return self.pattern.times(weight, self.factor().to(weight.dtype))


@dataclass(frozen=True)
class Layer:
    """A masked weight: where it is, and its cost per entry of the mask (a single number, or of the mask's shape)."""

    name: str
    path: str  # of the module that owns it
    parameter: str
    module: nn.Module
    masked: MaskedWeight
    costs: Tensor
    shape: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        """The dense weight, a parameter."""
        return getattr(self.module.parametrizations, self.parameter).original

    @property
    def total_cost(self) -> float:
        count = self.masked.signed.numel() if self.costs.numel() == 1 else 1
        return float(self.costs.sum(dtype=torch.float64)) * count


@dataclass(frozen=True)
class Budget:
    """Layers whose masks share a budget; ``groups``: of one layer, each of whose groups has a budget of its own."""

    layers: tuple[Layer, ...]
    groups: Groups | None

    @property
    def rows(self) -> int:
        """Number of independent problems."""
        return 1 if self.groups is None else self.layers[0].masked.signed.numel() // self.groups.m

    def cost_of(self, layer: Layer) -> Tensor:
        """``(1, 1)`` or ``(rows, entries of the layer)``, on the device of its mask."""
        mask = layer.masked.signed
        return layer.costs.to(mask).reshape(1 if layer.costs.numel() == 1 else self.rows, -1)


class MaskSchedule(Protocol):
    """What masks are after ``step`` steps. A ``Sparsifier``."""

    def frozen_at(self, step: int) -> bool: ...

    def beta(self, step: int) -> float: ...

    def shares(self, step: int) -> list[float]:
        """Share of its cost that every budget keeps."""
        ...

    def amount(self, budget: Budget, share: float) -> Tensor:
        """What the kept entries of every problem of a budget may cost, ``(rows,)`` float64."""
        ...


class SharedMasks:
    """What the masked weights of one model share: mode, budgets, and where in the schedule they are."""

    def __init__(self, mode: Mode) -> None:
        self.mode: Mode = mode
        self._seen = -1
        self._plain = True
        self._soft: dict[int, Tensor] = {}

    def start(self, budgets: tuple[Budget, ...], schedule: MaskSchedule) -> None:
        """To be called once, when the layers are known and before the first of them is used."""
        self.budgets, self.schedule = budgets, schedule

    def __getstate__(self) -> dict[str, Any]:
        """For copies of a model: tensors of the graph cannot be copied, and are made again."""
        return {**self.__dict__, "_soft": {}, "_seen": -1}

    @property
    def counter(self) -> Tensor:
        """Steps done, int64; a buffer of the first layer."""
        return self.budgets[0].layers[0].masked.steps_done

    def plain(self) -> bool:
        """Whether masks are constants: before the first step and from the freezing on, and always by magnitude."""
        self._synchronise()
        return self._plain

    def differentiable(self, masked: MaskedWeight) -> Tensor | None:
        """The soft mask of a layer, attached to the weights of its budget; ``None`` where it is constant."""
        self._synchronise()
        soft = self._soft.get(id(masked))
        if soft is not None and soft.data_ptr() != masked.signed.data_ptr():  # the model was moved to another device
            self._seen = -1
            self._synchronise()
            soft = self._soft.get(id(masked))
        return soft

    def _synchronise(self) -> None:
        """Bring what is derived up to date with the counter, which a checkpoint may have changed."""
        if self._seen == self.counter._version:
            return
        self._soft = {}
        step = int(self.counter)
        self._plain = self.mode == "magnitude" or step == 0 or self.schedule.frozen_at(step)
        if self.mode == "spartan" and not self._plain:
            beta = self.schedule.beta(step)
            for budget, share in zip(self.budgets, self.schedule.shares(step), strict=True):
                if 0 < share < 1:
                    self._attach(budget, self.schedule.amount(budget, share), beta)
        self._seen = self.counter._version

    def _attach(self, budget: Budget, amount: Tensor, beta: float) -> None:
        with torch.enable_grad():
            soft = _Solved.apply(budget, amount, beta, *(layer.weight for layer in budget.layers))
        self._soft |= {id(layer.masked): mask for layer, mask in zip(budget.layers, soft, strict=True)}


class _Solved(torch.autograd.Function):
    """The solved masks of a budget as a function of its weights.

    Backward, with S the gradient of a mask: ``beta m (1 - m) (S / c - K)`` for the value of an entry, times
    ``sign(W)`` for its weights.
    """

    @staticmethod
    def forward(ctx: Any, budget: Budget, amount: Tensor, beta: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.budget, ctx.amount, ctx.beta = budget, amount, beta
        return tuple(layer.masked.signed.detach() for layer in budget.layers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        budget: Budget = ctx.budget
        pieces = []
        for layer, gradient in zip(budget.layers, upstream, strict=True):
            mask = layer.masked.signed.view(budget.rows, -1)
            # A layer that was not used has no gradient of its own, but its weights could take budget from others.
            slope = torch.zeros_like(mask) if gradient is None else gradient.reshape(mask.shape)
            pieces.append((mask, slope, budget.cost_of(layer)))
        price = marginal_price(pieces, ctx.amount)
        found: list[Tensor] = []
        for layer, piece in zip(budget.layers, pieces, strict=True):
            weight, pattern = layer.weight.detach(), layer.masked.pattern
            if pattern.single and weight.dtype == piece[0].dtype and weight.is_contiguous():
                # The gradient of a mask was made for this node alone: it is overwritten.
                signs = weight.view(piece[0].shape)
                found.append(value_gradient(*piece, price, ctx.beta, signs, out=piece[1]).view(weight.shape))
            else:
                of_values = value_gradient(*piece, price, ctx.beta).view(layer.masked.signed.shape)
                found.append(pattern.times(weight.sign(), of_values.to(weight.dtype)))
        return (None, None, None, *found)


class _SoftMasked(torch.autograd.Function):
    """``W * E(m) * E(kept)``; the gradient ignores the hard factor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, soft: Tensor, masked: MaskedWeight) -> Tensor:
        ctx.masked = masked
        ctx.save_for_backward(weight, soft)
        return masked.product(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight, signed = ctx.saved_tensors
        pattern: Pattern = ctx.masked.pattern
        of_mask = pattern.sums(upstream * weight).to(signed.dtype)
        if pattern.single and upstream.dtype == signed.dtype:
            return signed.abs().mul_(upstream), of_mask, None
        return pattern.times(upstream, signed.abs().to(upstream.dtype)), of_mask, None


class _StraightThrough(torch.autograd.Function):
    """``W * E(mask)`` with the gradient of W: dual averaging."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, masked: MaskedWeight) -> Tensor:
        return masked.product(weight)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream, None
