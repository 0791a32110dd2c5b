"""Soft top-k by regularised optimal transport: the entries of largest value per cost, as a differentiable mask.

Tai, Tian, Lim: Spartan: Differentiable Sparsity via Regularized Transportation, NeurIPS 2022 (arXiv 2205.14107).

With values v, costs c, unit values u = v / c, a budget B and a sharpness beta, the mask m maximises
``sum(v m) + sum(c H(m)) / beta`` subject to ``sum(c m) = B``, where H is the binary entropy. It is
``m = sigmoid(beta (u - centre) + mu)``: one unknown number mu per problem. Sinkhorn's iteration on the two dual
variables of the transport problem, (mu, nu), is the fixed point ``mu <- mu + log(B / sum(c m))`` once nu, which is a
function of mu, is put in: a pass over the entries per iteration and no memory besides the mask.

Nothing is recorded for autograd while the problem is solved; the gradient is that of the solution, by implicit
differentiation of the constraint.

Shapes: n entries on the last axis, every other axis holds independent problems. Inside, R problems are rows ``(R, n)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bowerbird.errors import InputError

Solver = Literal["sinkhorn", "root"]
SOLVERS = ("sinkhorn", "root")
TILE = {"cpu": 2**17}  # entries that go through all operations of a pass together: half a megabyte stays in the cache
WHOLE = 2**26  # on devices where starting an operation costs more than reading memory again
NEWTON_STEPS = 200  # bisection alone needs about 60 in float64
EXACTLY = 1 - 1e-11  # a budget is a share of a sum, and rounded: 0.3 of 10 entries is a bit more than 3 of them


@dataclass(frozen=True)
class Solution:
    """``mask``: like the values, in [0, 1]; ``mu``: float64 ``(...)``, of every problem, for values around ``centre``.

    ``iterations``: passes after the first, the largest number of all problems.
    """

    mask: Tensor
    mu: Tensor
    centre: Tensor
    iterations: int


def soft_topk(
    values: Tensor,
    budget: float | Tensor,
    *,
    beta: float,
    costs: Tensor | None = None,
    solver: Solver = "sinkhorn",
    max_iters: int = 100,
    tol: float = 0.01,
    threshold: float | Tensor | None = None,
) -> Tensor:
    """The soft mask of the entries to keep, differentiable in ``values``.

    Args:
        values: ``(..., n)`` floating point; what is gained by keeping an entry.
        budget: B, a number or ``(...)``: what the kept entries may cost, in (0, sum of the costs].
        beta: Sharpness > 0, in 1 / units of ``values / costs``. Large: hard top-k; small: the same share of everything.
        costs: ``(n,)`` or ``(..., n)``, positive; default 1 each. A single number stands for all entries.
        solver: ``sinkhorn``, which stops where the objective ``sum(v m)`` changes by at most ``tol`` of itself (the
            constraint then holds nearly); ``root``: safeguarded Newton steps to the precision of the numbers.
        max_iters: Most iterations of ``sinkhorn``.
        tol: Of ``sinkhorn``; relative, >= 0. With 0 it goes on until nothing changes, and what is then missing of the
            budget is closed by ``root``.
        threshold: Unit value around which ``sinkhorn`` starts, a number or ``(...)``: with that of ``hard_threshold``
            it starts near the solution. By default, as in the official code, it starts at the mean, with mu that meets
            the budget if masks were exponentials. For sharp masks that is far off, and the stopping rule then ends the
            iteration with much of the budget missed, because the objective hardly changes from one to the next: give
            the hard threshold, as ``Sparsifier`` does, ``tol = 0``, or ``solver = "root"``.

    Returns:
        Mask like ``values``, in [0, 1]. Half precision is computed in float32.

    Raises:
        InputError: A budget that is not in (0, sum of costs], ``beta <= 0``, costs that are not positive, NaN or
            infinite values, shapes that do not fit.
    """
    _check(values, beta, solver, max_iters, tol)
    return _SoftTopK.apply(values, budget, beta, costs, solver, max_iters, tol, threshold)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, budget: float | Tensor, beta: float, costs: Tensor | None, *how: Any
    ) -> Tensor:
        solver, max_iters, tol, threshold = how
        solution = solve(values, budget, beta, costs, solver=solver, max_iters=max_iters, tol=tol, threshold=threshold)
        mask = solution.mask.to(values.dtype)
        ctx.save_for_backward(mask, costs, budget if isinstance(budget, Tensor) else None)
        ctx.budget, ctx.beta = budget, beta
        return mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        mask, costs, budget = ctx.saved_tensors
        rows = _as_rows(mask.float() if mask.dtype.itemsize < 4 else mask)
        cost = _costs_as_rows(costs, mask, rows)
        budgets = _per_row(ctx.budget if budget is None else budget, mask)
        pieces = [(rows, upstream.reshape(rows.shape).to(rows.dtype), cost)]
        price = marginal_price(pieces, budgets)
        gradient = value_gradient(*pieces[0], price, ctx.beta).view(mask.shape).to(mask.dtype)
        return gradient, None, None, None, None, None, None, None


@torch.no_grad()
def solve(
    values: Tensor,
    budget: float | Tensor,
    beta: float,
    costs: Tensor | None = None,
    *,
    solver: Solver = "sinkhorn",
    max_iters: int = 100,
    tol: float = 0.01,
    threshold: float | Tensor | None = None,
) -> Solution:
    """``soft_topk`` without gradient, with the dual variable. Half precision is solved, and returned, in float32."""
    _check(values, beta, solver, max_iters, tol)
    rows = _as_rows(values.detach())
    if rows.dtype.itemsize < 4:
        rows = rows.float()
    cost = _costs_as_rows(costs, values, rows)
    budgets = _per_row(budget, values)
    smallest, largest = torch.aminmax(rows, dim=1)
    if not (smallest.isfinite().all() and largest.isfinite().all()):
        raise InputError("soft top-k: values hold NaN or infinite numbers; only finite ones can be ranked")
    budgets = _checked_budgets(budgets, cost, rows)
    dtype, largest_value = rows.dtype, float(torch.maximum(smallest.abs(), largest.abs()).max())
    reach = 8 * largest_value * max(rows.shape[1], beta / float(cost.min()))  # of scores and sums
    if not math.isfinite(reach):
        raise InputError(f"soft top-k: values up to {largest_value:g} with beta = {beta:g} overflow; take smaller ones")
    if reach > torch.finfo(dtype).max:
        rows, cost = rows.double(), cost.double()
    problem = _Problem(rows, cost, budgets, beta)
    centre = problem.mean() if threshold is None else _per_row(threshold, values)
    if solver == "root":
        mu, iterations = _root(problem, centre)
    else:
        mu, iterations = _sinkhorn(problem, centre, max_iters, tol, start=threshold is None)
    batch = values.shape[:-1]
    return Solution(problem.mask.view(values.shape).to(dtype), mu.view(batch), centre.view(batch), iterations)


def hard_threshold(values: Tensor, budget: float | Tensor, costs: Tensor | None = None) -> Tensor:
    """The unit value at which the budget is spent, going down from the largest: of hard top-k.

    Args:
        values: ``(..., n)``.
        budget: B, a number or ``(...)``.
        costs: As in ``soft_topk``.

    Returns:
        ``(...)``: the unit value of the first entry, in decreasing order, at which the costs so far reach B. Entries
        above it cost less than B; with it they cost at least B. Where all entries together cost less than B: a number
        below the smallest unit value.

    Raises:
        InputError: No entries, no floating point numbers, NaN, shapes that do not fit.
    """
    _check_entries(values)
    rows = _as_rows(values.detach())
    if rows.dtype.itemsize < 4:
        rows = rows.float()
    if rows.amax().isnan():
        raise InputError("soft top-k: values hold NaN, which cannot be ranked")
    cost = _costs_as_rows(costs, values, rows)
    budgets = _per_row(budget, values) * EXACTLY
    count = rows.shape[1]
    if cost.numel() == 1:
        unit_cost = float(cost)
        if len(rows) == 1:
            return (
                _nth_largest(rows[0], math.ceil(float(budgets) / unit_cost) - 1)
                .div(unit_cost)
                .view(values.shape[:-1])
                .to(values.dtype)
            )
        units = rows / unit_cost
        ordered = units.sort(dim=1, descending=True).values
        position = (budgets / unit_cost).ceil().long() - 1
    else:
        units = rows / cost
        ordered, order = units.sort(dim=1, descending=True)
        spent = cost.expand_as(rows).gather(1, order).double().cumsum(dim=1)
        position = torch.searchsorted(spent, budgets[:, None]).squeeze(1)
    found = ordered.gather(1, position.clamp(0, count - 1)[:, None]).squeeze(1)
    return torch.where(position < count, found, ordered[:, -1] - 1).view(values.shape[:-1]).to(values.dtype)


def marginal_price(pieces: Sequence[tuple[Tensor, Tensor, Tensor]], budgets: Tensor) -> Tensor:
    """K of the backward: what a unit of cost is worth, for the gradient of masks that share a budget.

    Args:
        pieces: (mask ``(R, n_p)``, gradient of the mask, costs) of every part of the entries. The sign of a mask does
            not count: it may say which entries are kept.
        budgets: ``(R,)`` float64.

    Returns:
        ``K = sum(S m (1 - m)) / (B - sum(c m^2))``, ``(R,)`` float64. The denominator is ``sum(c m (1 - m))`` at the
        solution; that form is taken where the other one is not positive, because the iteration stopped early.
    """
    gained, squares, spent = (torch.zeros_like(budgets) for _ in range(3))
    for mask, upstream, cost in pieces:
        for tile in _tiles(mask):
            m, s = mask[tile].abs(), upstream[tile]
            square = m * m
            slope = m - square
            if cost.numel() == 1:
                squares[tile[0]] += square.sum(dim=1).double().mul_(float(cost))
                spent[tile[0]] += m.sum(dim=1).double().mul_(float(cost))
            else:
                squares[tile[0]] += _row_dot(square, cost[tile])
                spent[tile[0]] += _row_dot(m, cost[tile])
            gained[tile[0]] += _row_dot(slope, s)
    left = budgets - squares
    left = torch.where(left > 0, left, spent - squares)
    return torch.where(left > 0, gained / left, 0.0)  # a mask of zeros and ones does not move


def value_gradient(
    mask: Tensor,
    upstream: Tensor,
    cost: Tensor,
    price: Tensor,
    beta: float,
    signs: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``beta m (1 - m) (S / c - K)``: the gradient of the values, ``(R, n)`` like ``mask`` and its gradient S.

    ``signs``: numbers by whose sign it is multiplied, weights of which the values are absolute; ``out``: where to
    write, S itself may be overwritten. The sign of a mask does not count.
    """
    result = torch.empty_like(mask) if out is None else out
    ones = cost.numel() == 1 and float(cost) == 1.0
    for tile in _tiles(mask):
        m, s, part = mask[tile].abs(), upstream[tile], result[tile]
        torch.sub(s if ones else s / _cost_tile(cost, tile), price[tile[0], None].to(part.dtype), out=part)
        part.mul_(torch.addcmul(m, m, m, value=-1)).mul_(beta)
        if signs is not None:
            part.mul_(signs[tile].sign())
    return result


# ------------------------------------------------------------------------------------------------------- solvers


class _Problem:
    """R problems over values ``(R, n)`` and the mask that a pass over them fills."""

    def __init__(self, values: Tensor, cost: Tensor, budgets: Tensor, beta: float) -> None:
        self.values, self.cost, self.budgets, self.beta = values, cost, budgets, beta
        self.mask = torch.empty_like(values, memory_format=torch.contiguous_format)

    def mean(self) -> Tensor:
        """Mean unit value, ``(R,)`` float64."""
        total = torch.zeros_like(self.budgets)
        for tile in _tiles(self.values):
            total[tile[0]] += (self.values[tile] / _cost_tile(self.cost, tile)).sum(dim=1, dtype=torch.float64)
        return total / self.values.shape[1]

    def scores(self, centre: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Fills the mask with ``beta (u - centre)``, tile by tile."""
        one_cost = float(self.cost) if self.cost.numel() == 1 else None
        for tile in _tiles(self.values):
            out, middle = self.mask[tile], centre[tile[0], None].to(self.values.dtype)
            if one_cost == 1.0:
                torch.sub(self.values[tile], middle, out=out)
            else:
                torch.div(self.values[tile], _cost_tile(self.cost, tile), out=out).sub_(middle)
            yield tile, out.mul_(self.beta)

    def spend(self, centre: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        """Set the mask to that of mu; return ``sum(c m)`` and ``sum(v m)``, ``(R,)`` float64."""
        spent, gained = torch.zeros_like(self.budgets), torch.zeros_like(self.budgets)
        one_cost = float(self.cost) if self.cost.numel() == 1 else None
        for tile, out in self.scores(centre - mu / self.beta):  # one operation less than adding mu
            m = out.sigmoid_()
            gained[tile[0]] += _row_dot(m, self.values[tile])
            if one_cost is None:
                spent[tile[0]] += _row_dot(m, self.cost[tile].expand_as(m))
            else:
                spent[tile[0]] += m.sum(dim=1).double().mul_(one_cost)
        return spent, gained

    def curvature(self, spent: Tensor) -> Tensor:
        """``sum(c m (1 - m))`` of the present mask, ``(R,)`` float64."""
        squares = torch.zeros_like(spent)
        for tile in _tiles(self.mask):
            m = self.mask[tile]
            squares[tile[0]] += (m * m).mul_(_cost_tile(self.cost, tile)).sum(dim=1)
        return spent - squares

    def log_sum_exp(self, centre: Tensor, largest: Tensor) -> Tensor:
        """log of ``sum(exp(beta (u - centre)))``, ``(R,)`` float64; ``largest``: upper bound of the scores."""
        total = torch.zeros_like(self.budgets)
        for tile, out in self.scores(centre):
            total[tile[0]] += out.sub_(largest[tile[0], None].to(out.dtype)).exp_().sum(dim=1)
        return total.log() + largest


def _sinkhorn(problem: _Problem, centre: Tensor, max_iters: int, tol: float, *, start: bool) -> tuple[Tensor, int]:
    """mu ``(R,)`` and the number of iterations, by the official iteration and stopping rule.

    ``start``: begin with mu that meets the budget of exponentials.
    """
    mu = torch.zeros_like(problem.budgets)
    if start:
        highest = mu - math.inf
        for tile, out in problem.scores(centre):
            highest[tile[0]] = torch.maximum(highest[tile[0]], out.amax(dim=1).double())
        mu = problem.budgets.log() - problem.log_sum_exp(centre, highest)
    spent, gained = problem.spend(centre, mu)
    moving = torch.ones_like(mu, dtype=torch.bool)  # a problem that has stopped keeps its mu, whatever the others do
    iteration = 0
    while moving.any() and iteration < max_iters:
        iteration += 1
        mu = torch.where(moving, mu + (problem.budgets / spent).log(), mu)
        spent, now = problem.spend(centre, mu)
        moving &= (now - gained).abs() > tol * gained.abs()
        gained = now
    if tol == 0:
        # Where nothing moves in floating point, the constraint need not hold yet: each iteration is too small a step.
        missed = (spent - problem.budgets).abs() / problem.budgets
        left = ~moving & (missed > 4 * torch.finfo(problem.values.dtype).eps)
        if left.any():
            mu = torch.where(left, _root(problem, centre)[0], mu)
            problem.spend(centre, mu)
    return mu, iteration


def _root(problem: _Problem, centre: Tensor) -> tuple[Tensor, int]:
    """Newton's method on ``log sum(c m) = log B``, kept between bounds that shrink; bisection where it leaves them."""
    budgets = problem.budgets
    total = _total_cost(problem.cost, problem.values)
    everything = budgets >= total
    # If every entry had the largest score, mu would be ``low``; if every one had the smallest, ``high``.
    share = (budgets / total).clamp(max=1 - 1e-16).logit()
    low, high = torch.full_like(budgets, math.inf), torch.full_like(budgets, -math.inf)
    for tile, out in problem.scores(centre):
        least, most = torch.aminmax(out, dim=1)
        low[tile[0]] = torch.minimum(low[tile[0]], share[tile[0]] - most)
        high[tile[0]] = torch.maximum(high[tile[0]], share[tile[0]] - least)
    precision = torch.finfo(problem.values.dtype).eps
    mu = share.clamp(low, high)
    for iteration in range(1, NEWTON_STEPS + 1):  # noqa: B007
        spent, _ = problem.spend(centre, mu)
        curvature = problem.curvature(spent)
        done = everything | ((spent - budgets).abs() <= precision * budgets)
        done |= high - low <= precision * mu.abs().clamp(min=1)
        if done.all():
            break
        too_much = spent > budgets
        high, low = torch.where(too_much, mu, high), torch.where(too_much, low, mu)
        step = mu + (budgets / spent).log() * spent / curvature
        inside = (step > low) & (step < high)  # false for NaN, too
        mu = torch.where(done, mu, torch.where(inside, step, (low + high) / 2))
    problem.mask[everything] = 1.0
    return mu, iteration


def _nth_largest(values: Tensor, position: int) -> Tensor:
    """The value at ``position`` (from 0) in decreasing order, by selection; below all where there are not so many."""
    count = len(values)
    if position >= count:
        return values.min() - 1
    position = max(position, 0)
    if values.device.type == "cpu":
        import numpy as np

        at = count - 1 - position  # numpy selects several times faster than torch sorts
        return torch.as_tensor(np.partition(values.numpy(), at)[at], dtype=values.dtype)
    few_largest = position < count // 2
    chosen = torch.topk(values, position + 1 if few_largest else count - position, largest=few_largest, sorted=False)
    return chosen.values.min() if few_largest else chosen.values.max()


# -------------------------------------------------------------------------------------------------------- shapes


def _tiles(values: Tensor) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of parts of an ``(R, n)`` tensor."""
    rows, columns = values.shape
    limit = TILE.get(values.device.type, WHOLE)
    width = max(1, min(columns, limit))
    height = max(1, limit // width)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, top + height), slice(left, left + width)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """``(R,)`` inner products of the rows."""
    if len(a) == 1 and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))[None]
    return (a * b).sum(dim=1)


def _as_rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).contiguous()


def _per_row(value: float | Tensor, values: Tensor) -> Tensor:
    """A number per problem, ``(R,)`` float64. Raises ``InputError`` where it does not fit the batch."""
    batch = values.shape[:-1]
    given = torch.as_tensor(value, dtype=torch.float64, device=values.device).detach()
    try:
        return given.expand(batch).reshape(-1).contiguous()
    except RuntimeError:
        raise InputError(
            f"soft top-k: a budget or threshold of shape {tuple(given.shape)} does not fit values of shape "
            f"{tuple(values.shape)}; give a number, or one per problem: {tuple(batch)}"
        ) from None


def _costs_as_rows(costs: Tensor | None, values: Tensor, rows: Tensor) -> Tensor:
    """``(1, 1)`` where all entries cost the same, else ``(R, n)``, as the numbers of ``rows``."""
    if costs is None:
        return rows.new_ones(1, 1)
    costs = costs.detach().to(rows)
    if costs.numel() == 1:
        return costs.reshape(1, 1)
    try:
        return costs.expand(values.shape).reshape(rows.shape)
    except RuntimeError:
        raise InputError(
            f"soft top-k: costs of shape {tuple(costs.shape)} do not fit values of shape {tuple(values.shape)}; give "
            f"({values.shape[-1]},) or {tuple(values.shape)}"
        ) from None


def _cost_tile(cost: Tensor, tile: tuple[slice, slice]) -> Tensor:
    return cost if cost.numel() == 1 else cost[tile]


def _total_cost(cost: Tensor, rows: Tensor) -> Tensor:
    """``(R,)`` float64."""
    if cost.numel() == 1:
        return cost.double().reshape(1).expand(len(rows)) * rows.shape[1]
    return cost.sum(dim=1, dtype=torch.float64)


def _check_entries(values: Tensor) -> None:
    if not values.is_floating_point():
        raise InputError(f"soft top-k: values are {values.dtype}; floating point numbers are needed")
    if values.ndim == 0 or values.numel() == 0:
        raise InputError(f"soft top-k: values of shape {tuple(values.shape)} hold no entries; give (..., n), n >= 1")


def _check(values: Tensor, beta: float, solver: str, max_iters: int, tol: float) -> None:
    _check_entries(values)
    if not (math.isfinite(beta) and beta > 0):
        raise InputError(f"soft top-k: beta = {beta}; it must be a finite number above 0")
    if solver not in SOLVERS:
        raise InputError(f"soft top-k: solver {solver!r} is not one of {', '.join(SOLVERS)}")
    if max_iters < 1:
        raise InputError(f"soft top-k: max_iters = {max_iters}; it must be at least 1")
    if not tol >= 0:
        raise InputError(f"soft top-k: tol = {tol}; it must be at least 0")


def _checked_budgets(budgets: Tensor, cost: Tensor, rows: Tensor) -> Tensor:
    """Raises ``InputError`` for costs and budgets that are not accepted."""
    if not (torch.isfinite(cost).all() and (cost > 0).all()):
        raise InputError(f"soft top-k: costs must be finite and positive; the smallest is {float(cost.min()):g}")
    total = _total_cost(cost, rows)
    fits = (budgets > 0) & (budgets <= total * (1 + 1e-6))  # the sum of a share and its total is rounded
    if not fits.all():
        wrong = int((~fits).nonzero()[0])
        raise InputError(
            f"soft top-k: a budget of {float(budgets[wrong]):g} cannot be met; all entries together cost "
            f"{float(total[wrong]):g}, and it must be above 0 and at most that"
        )
    return torch.minimum(budgets, total)


def same_cost(costs: Iterable[Tensor]) -> bool:
    """Whether all of these are one number, the same one."""
    seen = list(costs)
    return all(cost.numel() == 1 for cost in seen) and len({float(cost) for cost in seen}) == 1
