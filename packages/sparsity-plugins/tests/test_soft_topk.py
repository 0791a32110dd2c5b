"""The soft top-k: its solution, its gradient, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird_sparsity import soft_topk as module
from bowerbird_sparsity.soft_topk import hard_threshold, soft_topk, solve

Golden = Callable[[str], dict[str, Any]]
CONVERGED: dict[str, Any] = {"tol": 0.0, "max_iters": 20_000}
seeds = st.integers(0, 2**31)


def problem(seed: int, n: int = 40) -> tuple[Tensor, Tensor, float]:
    """Values, costs and a budget between a tenth and nine tenths of all costs."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator, dtype=torch.float64).abs()
    costs = 0.5 + 2 * torch.rand(n, generator=generator, dtype=torch.float64)
    share = 0.1 + 0.8 * float(torch.rand((), generator=generator))
    return values, costs, share * float(costs.sum())


# ------------------------------------------------------------------------------------------------ golden numbers


@pytest.mark.parametrize("name", ["converged", "cost_weighted", "no_threshold", "uniform"])
def test_sinkhorn_gives_the_authors_mask_dual_variable_and_gradient(name: str, golden: Golden) -> None:
    g = golden(f"spartan/sinkhorn_{name}")
    threshold = hard_threshold(g["values"], g["budget"], g["costs"])
    assert float(threshold) == pytest.approx(g["hard_threshold"], abs=1e-12)
    how = {
        "max_iters": g["max_iters"], "tol": g["tol"], "threshold": threshold if g["precentred"] else None
    }  # fmt: skip
    values = g["values"].clone().requires_grad_()
    mask = soft_topk(values, g["budget"], beta=g["beta"], costs=g["costs"], **how)
    (mask * g["upstream"]).sum().backward()
    torch.testing.assert_close(mask.detach(), g["mask"], rtol=0, atol=1e-9)
    assert values.grad is not None
    torch.testing.assert_close(values.grad, g["grad_values"], rtol=0, atol=1e-9)
    solution = solve(g["values"], g["budget"], g["beta"], g["costs"], **how)
    torch.testing.assert_close(solution.mu[None], g["mu"], rtol=0, atol=1e-9)
    if g["tol"]:
        assert solution.iterations == g["last_loop_index"] + 1


# ------------------------------------------------------------------------------------------------ the solution


@settings(deadline=None, max_examples=25)
@given(seed=seeds, beta=st.floats(0.1, 60))
def test_the_mask_spends_the_budget_and_both_solvers_agree(seed: int, beta: float) -> None:
    values, costs, budget = problem(seed)
    root = soft_topk(values, budget, beta=beta, costs=costs, solver="root")
    assert abs(float((root * costs).sum()) - budget) < 1e-9 * budget
    sinkhorn = soft_topk(values, budget, beta=beta, costs=costs, **CONVERGED)
    torch.testing.assert_close(sinkhorn, root, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_a_sharp_mask_is_hard_top_k_by_unit_value_and_a_flat_one_is_the_same_share_everywhere(seed: int) -> None:
    values, costs, _ = problem(seed)
    units = values / costs
    order = units.argsort(descending=True)
    budget = float(costs[order[:10]].sum() + costs[order[10]] / 2)  # between ten and eleven entries
    gap = float((units[order[:-1]] - units[order[1:]])[9:11].min())
    sharp = soft_topk(values, budget, beta=60 / gap, costs=costs, solver="root")
    assert (sharp[order[:10]] > 0.999).all() and (sharp[order[11:]] < 0.001).all()
    flat = soft_topk(values, budget, beta=1e-9, costs=costs, solver="root")
    torch.testing.assert_close(flat, torch.full_like(flat, budget / float(costs.sum())))


@settings(deadline=None, max_examples=25)
@given(seed=seeds, beta=st.floats(0.1, 30), shift=st.floats(-2, 2), scale=st.floats(0.1, 10))
def test_the_mask_is_monotone_and_knows_neither_shifts_nor_units_nor_order(
    seed: int, beta: float, shift: float, scale: float
) -> None:
    values, costs, budget = problem(seed)
    mask = soft_topk(values, budget, beta=beta, costs=costs, solver="root")
    order = (values / costs).argsort()
    rising, inside = mask[order].diff(), (mask[order][1:] > 1e-9) & (mask[order][1:] < 1 - 1e-9)
    assert (rising >= 0).all() and (rising[inside] > 0).all()
    shifted = soft_topk(values + shift * costs, budget, beta=beta, costs=costs, solver="root")
    torch.testing.assert_close(shifted, mask, rtol=0, atol=1e-9)
    scaled = soft_topk(values * scale, budget, beta=beta / scale, costs=costs, solver="root")
    torch.testing.assert_close(scaled, mask, rtol=0, atol=1e-9)
    shuffled = soft_topk(values[order], budget, beta=beta, costs=costs[order])
    torch.testing.assert_close(shuffled, soft_topk(values, budget, beta=beta, costs=costs)[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["sinkhorn", "root"])
@pytest.mark.parametrize("spread", [1e-30, 1e-3, 1.0, 1e4, 1e9, 4e37])
def test_values_of_any_size_are_solved_without_overflow(solver: Any, spread: float) -> None:
    values = (torch.randn(500) * spread).requires_grad_()
    near = hard_threshold(values, 50.0) if solver == "sinkhorn" else None
    mask = soft_topk(values, 50.0, beta=20.0, solver=solver, threshold=near)
    mask.square().sum().backward()
    assert values.grad is not None and mask.isfinite().all() and values.grad.isfinite().all()
    assert float(mask.detach().sum()) == pytest.approx(50, rel=0.1 if solver == "sinkhorn" else 1e-3)


def test_without_a_threshold_sinkhorn_stops_where_the_official_rule_stops_it() -> None:
    """Also where that is far from the budget: sharp masks, whose objective hardly changes between two iterations."""
    torch.manual_seed(3)
    values, budget, beta, tol = torch.randn(500, dtype=torch.float64), 50.0, 20.0, 0.01
    z = beta * (values - values.mean())
    mu = math.log(budget) - torch.logsumexp(z, 0)
    nu = -torch.nn.functional.softplus(z + mu)
    gained = (torch.exp(z + mu + nu) * values).sum()
    for _ in range(100):
        mu = math.log(budget) - torch.logsumexp(z + nu, 0)
        nu = -torch.nn.functional.softplus(z + mu)
        mask = torch.exp(z + mu + nu)
        before, gained = gained, (mask * values).sum()
        if (gained - before).abs() <= tol * before.abs():
            break
    torch.testing.assert_close(soft_topk(values, budget, beta=beta, tol=tol), mask, rtol=1e-12, atol=1e-12)
    assert abs(float(mask.sum()) - budget) > 0.25 * budget


def test_half_precision_is_solved_in_single_precision() -> None:
    values = torch.randn(300).to(torch.bfloat16)
    mask = soft_topk(values, 30.0, beta=5.0, solver="root")
    assert mask.dtype == torch.bfloat16
    torch.testing.assert_close(mask, soft_topk(values.float(), 30.0, beta=5.0, solver="root").to(torch.bfloat16))


def test_a_long_row_is_solved_in_parts_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    values, costs, budget = problem(0, n=1000)
    values.requires_grad_()
    upstream = torch.randn(1000, dtype=torch.float64)

    def both() -> tuple[Tensor, Tensor]:
        mask = soft_topk(values, budget, beta=6.0, costs=costs)
        return mask.detach(), torch.autograd.grad((mask * upstream).sum(), values)[0]

    whole = both()
    monkeypatch.setattr(module, "TILE", {"cpu": 64})
    for a, b in zip(both(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["sinkhorn", "root"])
def test_a_batch_gives_what_every_row_gives_alone(solver: Any) -> None:
    values = torch.randn(3, 2, 7, dtype=torch.float64) * torch.tensor([0.1, 1.0, 5.0])[:, None, None]
    budgets = torch.tensor([[1.5, 2.0], [3.0, 3.5], [6.0, 6.5]])
    costs = 0.5 + torch.rand(7, dtype=torch.float64)
    budgets = budgets / 7 * float(costs.sum())
    leaf = values.clone().requires_grad_()
    whole = soft_topk(leaf, budgets, beta=4.0, costs=costs, solver=solver)
    whole.square().sum().backward()
    assert leaf.grad is not None
    for i in range(3):
        for j in range(2):
            alone = values[i, j].clone().requires_grad_()
            mask = soft_topk(alone, float(budgets[i, j]), beta=4.0, costs=costs, solver=solver)
            mask.square().sum().backward()
            assert alone.grad is not None
            torch.testing.assert_close(whole[i, j], mask)
            torch.testing.assert_close(leaf.grad[i, j], alone.grad)


# ------------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("how", [{"solver": "root"}, CONVERGED])
def test_the_gradient_is_that_of_finite_differences(how: dict[str, Any]) -> None:
    values, costs, budget = problem(3, n=6)
    values.requires_grad_()
    torch.autograd.gradcheck(lambda v: soft_topk(v, budget, beta=1.5, costs=costs, **how), values)
    rows = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: soft_topk(v, 2.0, beta=1.5, **how), rows)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, beta=st.floats(0.1, 30))
def test_what_the_budget_holds_constant_has_no_gradient(seed: int, beta: float) -> None:
    values, costs, budget = problem(seed)
    values.requires_grad_()
    (soft_topk(values, budget, beta=beta, costs=costs, solver="root") * costs).sum().backward()
    assert values.grad is not None and float(values.grad.abs().max()) < 1e-9


def test_the_gradient_may_be_asked_twice() -> None:
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = soft_topk(values, 3.0, beta=2.0)
    first = torch.autograd.grad(mask.square().sum(), values, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(mask.square().sum(), values)[0])


# ------------------------------------------------------------------------------------------------ hard threshold


@settings(deadline=None, max_examples=25)
@given(seed=seeds, unit=st.booleans())
def test_above_the_threshold_costs_less_than_the_budget_and_with_it_at_least_that(seed: int, unit: bool) -> None:
    values, costs, budget = problem(seed)
    if unit:
        costs, budget = torch.full_like(costs, 1.5), budget / float(costs.sum()) * 1.5 * len(costs)
    units = values / costs
    threshold = hard_threshold(values, budget, torch.tensor(1.5) if unit else costs)
    assert float(costs[units > threshold].sum()) < budget <= float(costs[units >= threshold].sum()) + 1e-9


def test_a_budget_above_everything_has_a_threshold_below_everything() -> None:
    values = torch.tensor([3.0, 1.0, 2.0])
    assert float(hard_threshold(values, 4.0)) < 1
    assert float(hard_threshold(values, 4.0, torch.tensor([1.0, 1.0, 1.5]))) < 1 / 1
    assert float(hard_threshold(values, 3.0)) == 1


@pytest.mark.parametrize("costs", [None, torch.arange(10.0) * 0 + 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_share_that_is_a_whole_number_of_entries_is_that_number_however_it_is_rounded(
    costs: Tensor | None, rows: int
) -> None:
    share = 1 + (0.3 - 1)
    assert share * 10 > 3
    assert hard_threshold(torch.arange(10.0).repeat(rows, 1), share * 10, costs).tolist() == [7.0] * rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_threshold_is_a_number_of_the_type_of_the_values(dtype: torch.dtype) -> None:
    values = torch.tensor([3.0, 1.0, 2.0], dtype=dtype)
    assert torch.equal(hard_threshold(values, 2.0), torch.tensor(2.0, dtype=dtype))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("values", [torch.zeros(0), torch.tensor([1.0, math.nan]), torch.arange(3)])
def test_what_has_no_order_has_no_threshold(values: Tensor) -> None:
    with pytest.raises(InputError, match="soft top-k: values"):
        hard_threshold(values, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, r"budget of 0 cannot be met.*cost 5"),
        ({"budget": 5.1}, r"budget of 5.1 cannot be met.*cost 5"),
        ({"budget": math.nan}, "budget of nan"),
        ({"budget": torch.ones(3)}, r"shape \(3,\) does not fit"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"beta": math.inf}, "beta = inf"),
        ({"values": torch.rand(5) + 1e38, "beta": 1e300}, "overflow"),
        ({"costs": torch.tensor([1.0, 0.0, 1, 1, 1])}, "costs must be finite and positive; the smallest is 0"),
        ({"costs": torch.ones(4)}, r"costs of shape \(4,\)"),
        ({"values": torch.tensor([1.0, math.nan, 0, 0, 0])}, "NaN or infinite"),
        ({"values": torch.tensor([1.0, math.inf, 0, 0, 0])}, "NaN or infinite"),
        ({"values": torch.arange(5)}, "floating point"),
        ({"values": torch.zeros(3, 0)}, "hold no entries"),
        ({"solver": "newton"}, "sinkhorn, root"),
        ({"tol": -1.0}, "tol = -1.0"),
        ({"max_iters": 0}, "max_iters = 0"),
    ],
)
def test_what_has_no_solution_is_refused(arguments: dict[str, Any], message: str) -> None:
    given_ = {"values": torch.randn(5), "budget": 2.0, "beta": 1.0, **arguments}
    with pytest.raises(InputError, match=message):
        soft_topk(**given_)
