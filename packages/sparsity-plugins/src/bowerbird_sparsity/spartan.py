"""Sparse training with an exact budget: Spartan, magnitude pruning and dual averaging under one interface.

Tai, Tian, Lim: Spartan: Differentiable Sparsity via Regularized Transportation, NeurIPS 2022 (arXiv 2205.14107).

    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.1), total_steps=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step(); optimizer.zero_grad()
        sparsifier.step()
    model = sparsifier.finalize()

Masks change in ``step``, after the optimiser has moved the dense weights, and are frozen for the last part of the
training. A soft mask keeps its values in (0, 1) when it is frozen; they become part of the weights at the end.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bowerbird.errors import InputError, RecipeError, did_you_mean
from bowerbird_sparsity.allocation import erk_densities
from bowerbird_sparsity.config import SparsityConfig
from bowerbird_sparsity.costs import CostModel, ParameterCost
from bowerbird_sparsity.masking import Budget, Layer, MaskedWeight, SharedMasks
from bowerbird_sparsity.patterns import Blocks, Groups, Pattern, parse_groups, pattern_of
from bowerbird_sparsity.schedule import Schedule
from bowerbird_sparsity.soft_topk import hard_threshold, solve

__all__ = ["LayerSparsity", "Sparsifier", "SparsityConfig", "SparsityState"]

ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class SparsityState:
    """After a step: steps done, share of the masked cost that is kept, sharpness, passes of the solver (0: none)."""

    step: int
    density: float
    beta: float
    solver_iterations: int


@dataclass(frozen=True)
class LayerSparsity:
    """What is kept of one layer.

    Attributes:
        name: Of the layer.
        shape: Of its weight.
        block_size: Weights of an entry of the mask, per dimension.
        weights, kept: How many there are, and how many are kept.
        density: ``kept / weights``.
        cost, kept_cost: By the cost model.
        softness: Mean of ``m (1 - m)`` over its mask: 0 for a hard mask, at most 1/4.
    """

    name: str
    shape: tuple[int, ...]
    block_size: tuple[int, ...]
    weights: int
    kept: int
    density: float
    cost: float
    kept_cost: float
    softness: float


class Sparsifier:
    """Masks the weights of ``model`` in place and moves them along a schedule.

    Args:
        model: Its linear layers, 2-d convolutions and attention projections are masked, those of ``config.layers`` if
            given. Biases, norms and frozen weights never are. Names and types of the modules stay; parameters of masked
            layers are found under ``parametrizations.weight.original``, so make the optimiser afterwards or before, but
            do not look parameters up by name.
        config: See ``SparsityConfig``.
        total_steps: T, number of calls of ``step``.

    Raises:
        RecipeError: ``config.layers`` names nothing, or the model has no layer to mask.
        InputError: Blocks or groups that do not divide a layer (``strict``), a cost model that does not know a layer, a
            target that cannot be met because dense parameters alone are more.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig, total_steps: int) -> None:
        if total_steps < 1:
            raise InputError(f"total_steps = {total_steps}; it must be at least 1")
        self.model, self.config = model, config
        self.finalized = False
        self._groups = parse_groups(config.pattern)
        self._shared = SharedMasks(config.mode)
        self.layers = self._layers(_chosen_weights(model, config))
        self._dense_factor = self._checked_dense_factor()
        sizes = [_typical_entry(layer, config) for layer in self.layers]
        self.schedule = Schedule(config, total_steps, math.exp(sum(map(math.log, sizes)) / len(sizes)))
        first = self.layers[0].masked
        first.register_buffer("steps_done", torch.zeros((), dtype=torch.int64, device=first.signed.device))
        self._shared.start(self._budgets(), self)
        for layer in self.layers:  # nothing can go wrong any more: the model is changed
            parametrize.register_parametrization(layer.module, layer.parameter, layer.masked)

    # ---------------------------------------------------------------------------------------------- construction

    def _layers(self, chosen: list[_Chosen]) -> list[Layer]:
        cost_model: CostModel = ParameterCost() if self.config.cost_model == "parameters" else self.config.cost_model
        prepare = getattr(cost_model, "prepare", None)
        if prepare is not None:
            prepare(self.model, [c.name for c in chosen])
        layers = []
        for c in chosen:
            weight = getattr(c.module, c.parameter)
            costs = cost_model.cost(c.name, c.module, weight.detach(), _entry_sizes(c.pattern, weight.shape))
            costs = torch.as_tensor(costs).detach()
            shape = c.pattern.mask_shape(weight.shape)
            if (costs.numel() != 1 and tuple(costs.shape) != shape) or not (costs.isfinite() & (costs > 0)).all():
                raise InputError(
                    f"the cost model gave layer {c.name!r} costs of shape {tuple(costs.shape)}; positive numbers are "
                    f"accepted, one, or one per entry of the mask: {shape}"
                )
            masked = MaskedWeight(weight, c.pattern, self._shared)
            layers.append(Layer(c.name, c.path, c.parameter, c.module, masked, costs, tuple(weight.shape)))
        return layers

    def _checked_dense_factor(self) -> float:
        """All parameters per masked one, where the density is that of the whole model; else 1."""
        by_weights = self.config.cost_model == "parameters" or isinstance(self.config.cost_model, ParameterCost)
        if not (self.config.adjust and by_weights and self._groups is None):
            return 1.0
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        masked = sum(math.prod(layer.shape) for layer in self.layers)
        if 1 - (1 - self.config.target_density) * parameters / masked < 0:
            raise InputError(
                f"target_density = {self.config.target_density:g} cannot be met: of {parameters:,} parameters only "
                f"{masked:,} are in sparse layers, and the dense rest is {1 - masked / parameters:.1%}. Make more "
                "layers sparse, give a larger target_density, or set adjust = false, which counts only sparse layers"
            )
        return parameters / masked

    def _budgets(self) -> tuple[Budget, ...]:
        if self._groups is not None:
            return tuple(Budget((layer,), self._groups) for layer in self.layers)
        if self.config.allocation == "global":
            return (Budget(tuple(self.layers), None),)
        return tuple(Budget((layer,), None) for layer in self.layers)

    # -------------------------------------------------------------------------------------------------- schedule

    def density(self, step: int) -> float:
        """Share of the cost of the masked layers that is kept after ``step`` steps."""
        density = self.schedule.density(step)
        return density if self._dense_factor == 1 else max(0.0, 1 - (1 - density) * self._dense_factor)

    def beta(self, step: int) -> float:
        """Sharpness of the soft masks after ``step`` steps."""
        return self.schedule.beta(step)

    def frozen_at(self, step: int) -> bool:
        """Whether masks no longer change after ``step`` steps."""
        return step >= self.schedule.finetune_start

    def shares(self, step: int) -> list[float]:
        """Share of its cost that every budget keeps after ``step`` steps."""
        density = self.density(step)
        if self.config.allocation != "erk" or self._groups is not None:
            return [density] * len(self._shared.budgets)
        sizes = [layer.total_cost for layer in self.layers]
        return erk_densities([layer.shape for layer in self.layers], density, sizes)

    def amount(self, budget: Budget, share: float) -> Tensor:
        """B of every problem of a budget, ``(rows,)`` float64."""
        device = budget.layers[0].masked.signed.device
        if budget.groups is None:
            amount = share * math.fsum(layer.total_cost for layer in budget.layers)
        else:
            n, m = budget.groups.n, budget.groups.m
            amount = float(n) if math.isclose(share * m, n, rel_tol=1e-5) else share * m
        return torch.full((budget.rows,), amount, dtype=torch.float64, device=device)

    # ------------------------------------------------------------------------------------------------------ steps

    @property
    def steps_done(self) -> int:
        return int(self._shared.counter)

    @torch.no_grad()
    def step(self) -> SparsityState:
        """New masks for the present weights; call it once after every step of the optimiser.

        Raises ``InputError`` after ``finalize``.
        """
        if self.finalized:
            raise InputError("step() after finalize(): the model holds plain weights now; make a new Sparsifier")
        step = self.steps_done + 1
        beta, iterations = self.beta(step), 0
        if step <= self.schedule.finetune_start:
            for budget, share in zip(self._shared.budgets, self.shares(step), strict=True):
                iterations = max(iterations, self._update(budget, share, beta))
            if self.frozen_at(step):
                for layer in self.layers:
                    layer.masked.signed.clamp_min_(0)
        self._shared.counter.fill_(step)
        return SparsityState(step, self.density(step), beta, iterations)

    def _update(self, budget: Budget, share: float, beta: float) -> int:
        """Masks of one budget; returns the passes of the solver."""
        if not 0 < share < 1:
            for layer in budget.layers:
                layer.masked.signed.fill_(float(share >= 1))
            return 0
        values = _values(budget)
        costs = _joined_costs(budget, values)
        amount = self.amount(budget, share)
        threshold = hard_threshold(values, amount, costs)
        solution = None
        if self.config.mode == "spartan":
            c = self.config
            solution = solve(
                values, amount, beta, costs, solver=c.solver, max_iters=c.max_iters, tol=c.tol, threshold=threshold
            )
        margin = (values if costs is None else values.div_(costs)).sub_(threshold[:, None])
        if budget.groups is not None and float(amount[0]) == budget.groups.n:
            budget.groups.keep_exactly(margin)
        # The entry at which the budget is spent: kept by a soft mask, dropped by a hard one; groups keep n exactly.
        if solution is not None:
            signed = torch.copysign(solution.mask, margin, out=margin)
        else:
            signed = margin >= 0 if budget.groups is not None else margin > 0
        start = 0
        for layer in budget.layers:
            end = start + layer.masked.signed.numel() // budget.rows
            layer.masked.signed.view(budget.rows, -1).copy_(signed[:, start:end])
            start = end
        return 0 if solution is None else solution.iterations

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """The model with plain weights, dropped ones exactly zero, and without parametrisations; changed in place."""
        if not self.finalized:
            for layer in self.layers:
                parametrize.remove_parametrizations(layer.module, layer.parameter, leave_parametrized=True)
            self.finalized = True
        return self.model

    @torch.no_grad()
    def prune_like(self, other: nn.Module) -> nn.Module:
        """Set to zero, in place, the weights of ``other`` that are dropped here; layers are found by name.

        For a moving average of the model: its weights follow masked ones and hold their soft factors already.
        Raises ``InputError`` where ``other`` has no such layer.
        """
        modules = dict(other.named_modules())
        for layer in self.layers:
            weight = getattr(modules.get(layer.path), layer.parameter, None)
            if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.shape:
                found = "no such layer" if weight is None else f"a weight of {tuple(weight.shape)}"
                raise InputError(
                    f"layer {layer.name!r} with a weight of {layer.shape} is sparse, and {type(other).__name__} has "
                    f"{found}: masks cannot be carried over to a model of another architecture"
                )
            weight.copy_(layer.masked.pattern.times(weight, layer.masked.kept.to(weight.dtype)))
        return other

    # ----------------------------------------------------------------------------------------------------- report

    @torch.no_grad()
    def report(self) -> list[LayerSparsity]:
        """What is kept at the moment, layer by layer."""
        rows = []
        for layer in self.layers:
            masked = layer.masked
            alive = masked.kept
            kept = int(alive.sum()) * masked.pattern.weights_per_entry
            kept_cost = (layer.costs.to(masked.signed) * alive).sum(dtype=torch.float64)
            count = math.prod(layer.shape)
            rows.append(
                LayerSparsity(
                    name=layer.name,
                    shape=layer.shape,
                    block_size=_entry_sizes(masked.pattern, layer.shape),
                    weights=count,
                    kept=kept,
                    density=kept / count,
                    cost=layer.total_cost,
                    kept_cost=float(kept_cost),
                    softness=float((masked.mask * (1 - masked.mask)).mean()),
                )
            )
        return rows

    def state_dict(self) -> dict[str, Tensor]:
        """Of the model's state only the masks (negative where dropped), the counter, and whether masks are frozen."""
        step = self.steps_done
        state = {"step": torch.tensor(step), "frozen": torch.tensor(self.frozen_at(step))}
        for layer in self.layers:
            state[f"{layer.name}.mask"] = layer.masked.signed.clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a ``state_dict``.

        Raises ``InputError`` for the state of other layers, or of a schedule that freezes at another step.
        """
        expected = {"step", "frozen"} | {f"{layer.name}.mask" for layer in self.layers}
        if expected != set(state):
            differing = sorted(expected ^ set(state))
            raise InputError(f"the state is of other layers; differing: {', '.join(differing[:5])}")
        step = int(state["step"])
        if bool(state["frozen"]) != self.frozen_at(step):
            raise InputError(
                f"the state of step {step} is {'' if state['frozen'] else 'not '}frozen, and by this schedule masks "
                f"are frozen from step {self.schedule.finetune_start} on; give total_steps, finetune_fraction as before"
            )
        for layer in self.layers:
            own, given = layer.masked.signed, state[f"{layer.name}.mask"]
            if own.shape != given.shape:
                raise InputError(
                    f"layer {layer.name!r}: the state has a mask of {tuple(given.shape)}; here it is {tuple(own.shape)}"
                )
            own.copy_(given)
        self._shared.counter.fill_(step)


# ------------------------------------------------------------------------------------------------------- helpers


@dataclass(frozen=True)
class _Chosen:
    """A weight that will be masked."""

    name: str
    path: str
    parameter: str
    module: nn.Module
    pattern: Pattern


def _candidates(model: nn.Module) -> dict[str, tuple[str, str, nn.Module]]:
    """Name of a layer -> path of its module, name of the parameter, module; in the order of the modules."""
    found: dict[str, tuple[str, str, nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found[path or "weight"] = (path, "weight", module)
        elif isinstance(module, nn.MultiheadAttention):
            for parameter in ATTENTION_WEIGHTS:
                if getattr(module, parameter, None) is not None:
                    found[f"{path}.{parameter}".lstrip(".")] = (path, parameter, module)
    return found


def _chosen_weights(model: nn.Module, config: SparsityConfig) -> list[_Chosen]:
    """The weights that ``config`` names, with their patterns. Raises as ``Sparsifier`` does."""
    candidates = _candidates(model)
    names = list(candidates)
    if config.layers is not None:
        for wanted in config.layers:
            if not any(fnmatchcase(name, wanted) for name in candidates):
                shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
                raise RecipeError(
                    f"layers: {wanted!r} matches no layer.{did_you_mean(wanted, names)} There are: {shown or 'none'}"
                )
        names = [name for name in names if any(fnmatchcase(name, wanted) for wanted in config.layers)]
    groups = parse_groups(config.pattern)
    chosen: list[_Chosen] = []
    owners: dict[int, str] = {}
    for name in names:
        path, parameter, module = candidates[name]
        if parametrize.is_parametrized(module, parameter):
            raise RecipeError(
                f"layer {name!r} is parametrised already (another sparsity modifier, or weight norm); name the layers "
                "to make sparse in `layers`, without it"
            )
        weight = getattr(module, parameter)
        if not weight.requires_grad:
            continue
        if id(weight) in owners:
            raise RecipeError(
                f"layers {owners[id(weight)]!r} and {name!r} share one weight; name only one of them in `layers`"
            )
        owners[id(weight)] = name
        pattern = _fitting_pattern(weight, groups, config, name)
        if pattern is not None:
            chosen.append(_Chosen(name, path, parameter, module, pattern))
    if not chosen:
        raise RecipeError(
            f"{type(model).__name__} has no layer to make sparse: linear layers, 2-d convolutions and attention "
            f"projections with trainable weights are. Matching layers: {', '.join(names[:12]) or 'none'}"
        )
    return chosen


def _fitting_pattern(weight: Tensor, groups: Groups | None, config: SparsityConfig, name: str) -> Pattern | None:
    try:
        return pattern_of(weight, groups=groups, block_size=config.block_size, name=name)
    except InputError as error:
        if config.strict:
            raise
        warnings.warn(f"{error}", stacklevel=4)
    return None if groups is not None else Blocks((1,) * weight.ndim)


def _entry_sizes(pattern: Pattern, shape: Sequence[int]) -> tuple[int, ...]:
    """Weights of an entry of the mask, per dimension of the weight."""
    return pattern.sizes if isinstance(pattern, Blocks) else (1,) * len(shape)


def _typical_entry(layer: Layer, config: SparsityConfig) -> float:
    """Weights of a block as configured: also of a layer that fell back to single weights."""
    given = [*config.block_size, *[1] * len(layer.shape)][: len(layer.shape)]
    return float(math.prod(s if b == -1 else b for b, s in zip(given, layer.shape, strict=True)))


def _joined_costs(budget: Budget, values: Tensor) -> Tensor | None:
    """Costs of the entries of a budget: ``None`` where all are 1, a single number where all are equal."""
    numbers = {float(layer.costs) if layer.costs.numel() == 1 else math.nan for layer in budget.layers}
    if numbers == {1.0}:
        return None
    if len(numbers) == 1 and not any(map(math.isnan, numbers)):
        return values.new_tensor(numbers.pop())
    spread = [
        budget.cost_of(layer).expand(budget.rows, layer.masked.signed.numel() // budget.rows) for layer in budget.layers
    ]
    return torch.cat(spread, dim=1)


def _values(budget: Budget) -> Tensor:
    """Values of the entries of a budget, layer after layer: a new tensor ``(rows, n)``."""
    masks = [layer.masked.signed for layer in budget.layers]
    values = masks[0].new_empty(sum(mask.numel() for mask in masks))
    start = 0
    for layer, mask in zip(budget.layers, masks, strict=True):
        part = values[start : start + mask.numel()].view(mask.shape)
        pattern, weight = layer.masked.pattern, layer.weight
        if isinstance(pattern, Blocks) and pattern.single and weight.dtype == values.dtype:
            torch.abs(weight, out=part)
        else:
            part.copy_(pattern.values(weight))
        start += mask.numel()
    return values.view(budget.rows, -1)
