"""Sparse training: the authors' traces, exact budgets, gradients, schedules, patterns, costs and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from bowerbird.errors import InputError, RecipeError
from bowerbird_sparsity.allocation import erk_densities
from bowerbird_sparsity.costs import FlopsCost, LatencyCost, ParameterCost
from bowerbird_sparsity.patterns import block_values, mask_blocks
from bowerbird_sparsity.schedule import Schedule
from bowerbird_sparsity.spartan import Sparsifier, SparsityConfig

Golden = Callable[[str], dict[str, Any]]
MODES = ("spartan", "magnitude", "dual_averaging")


class TwoLayers(nn.Module):
    def __init__(self, inputs: int = 12, hidden: int = 16, outputs: int = 8) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class SmallConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.down(torch.relu(self.conv(x)))).mean(dim=(2, 3)))


def dense(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original  # type: ignore[union-attr, return-value]


def masked(layer: nn.Module) -> Any:
    return layer.parametrizations.weight[0]  # type: ignore[union-attr, index]


def train(model: nn.Module, sparsifier: Sparsifier, steps: int, lr: float = 0.05, inputs: Any = (8, 12)) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    kind = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(inputs, generator=generator).to(kind)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        sparsifier.step()


def nonzeros(model: nn.Module) -> int:
    return sum(int((p != 0).sum()) for name, p in model.named_parameters() if name.endswith("weight"))


# ------------------------------------------------------------------------------------------------ golden numbers


@pytest.mark.parametrize("name", ["unstructured", "block", "magnitude", "dual_averaging"])
def test_forty_steps_are_those_of_the_authors(name: str, golden: Golden) -> None:
    g = golden(f"spartan/train_trace_{name}")
    renamed = {
        "cfg_cost_frac_target": "target_density", "cfg_sinkhorn_beta_target": "beta_final", "cfg_sinkhorn_tol": "tol",
        "cfg_sinkhorn_max_iters": "max_iters",
    }  # fmt: skip
    settings = {new: g[old] for old, new in renamed.items() if old in g}
    if "cfg_block_dims" in g:
        settings |= {"block_size": tuple(g["cfg_block_dims"].tolist()), "adjust": bool(g["cfg_adjust_cost_frac"])}
    settings["mode"] = {"standard": "magnitude"}.get(g["sparsity_mode"], g["sparsity_mode"])
    (hidden, inputs), outputs = g["init/fc1.weight"].shape, len(g["init/fc2.bias"])
    model = TwoLayers(inputs, hidden, outputs).double()
    model.load_state_dict({key.removeprefix("init/"): v for key, v in g.items() if key.startswith("init/")})
    sparsifier = Sparsifier(model, SparsityConfig(**settings), g["total_iters"])
    optimizer = torch.optim.SGD(model.parameters(), lr=g["lr"], momentum=g["momentum"])
    close = {"rtol": 0, "atol": 1e-9}
    for t in range(g["total_iters"]):
        loss = F.mse_loss(model(g["inputs"][t]), g["targets"][t])
        assert loss.item() == pytest.approx(float(g["loss"][t]), abs=1e-9)
        optimizer.zero_grad()
        loss.backward()
        if f"grad_t{t}/fc1.weight" in g:
            for layer, of in ((model.fc1, "fc1"), (model.fc2, "fc2")):
                torch.testing.assert_close(dense(layer).grad, g[f"grad_t{t}/{of}.weight"], **close)
                assert layer.bias is not None
                torch.testing.assert_close(layer.bias.grad, g[f"grad_t{t}/{of}.bias"], **close)
        optimizer.step()
        state = sparsifier.step()
        assert state.step == t + 1
        assert state.density == pytest.approx(float(g["cost_frac"][t]), abs=1e-12)
        assert state.beta == pytest.approx(float(g["beta"][t]), abs=1e-12)
        assert max(0, state.solver_iterations - 1) == int(g["last_loop_index"][t])
        if f"mask_t{t}/fc1" in g:
            for layer, of in ((model.fc1, "fc1"), (model.fc2, "fc2")):
                torch.testing.assert_close(masked(layer).mask, g[f"mask_t{t}/{of}"].double(), **close)
                torch.testing.assert_close(dense(layer).detach(), g[f"weight_t{t}/{of}"], **close)
                torch.testing.assert_close(layer.weight.detach(), g[f"forward_weight_t{t}/{of}"], **close)
            if settings["mode"] == "spartan":
                least = min(float(masked(m).mask[masked(m).kept].min()) for m in (model.fc1, model.fc2))
                assert least == pytest.approx(g[f"hard_threshold_t{t}/fc1"], abs=1e-9)
    final = sparsifier.finalize().state_dict()
    torch.testing.assert_close(final, {key: g[f"final/{key}"] for key in final}, **close)
    assert sum(int((tensor != 0).sum()) for tensor in final.values()) == g["final_nonzeros"]


def test_schedules_are_those_of_the_authors(golden: Golden) -> None:
    g = golden("spartan/schedules")
    for case in range(g["n_cases"]):
        config = SparsityConfig(
            annealing=g[f"mode_{case}"],
            warmup_fraction=g[f"warmup_frac_{case}"],
            finetune_fraction=g[f"finetune_frac_{case}"],
            initial_density=g[f"cost_init_{case}"],
            target_density=g[f"cost_target_{case}"],
            beta_init=g[f"beta_init_{case}"],
            beta_final=g[f"beta_target_{case}"],
        )
        schedule = Schedule(config, g["total_iters"], float(g[f"block_dims_{case}"].prod()))
        assert schedule.warmup_end == g[f"warmup_iters_{case}"]
        assert schedule.finetune_start == g[f"finetune_start_{case}"]
        steps = range(g["total_iters"] + 1)
        assert [schedule.density(s) for s in steps] == pytest.approx(g[f"cost_frac_{case}"].tolist(), abs=1e-12)
        assert [schedule.beta(s) for s in steps] == pytest.approx(g[f"beta_{case}"].tolist(), abs=1e-12)


def test_block_values_and_masked_blocks_are_those_of_the_authors(golden: Golden) -> None:
    g = golden("spartan/block_ops")
    blocks = tuple(g["block_dims"].tolist())
    torch.testing.assert_close(block_values(g["weight"], blocks), g["block_l1_sum"], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        block_values(g["weight"], blocks) / math.prod(blocks), g["block_l1_mean"], rtol=0, atol=1e-12
    )
    torch.testing.assert_close(mask_blocks(g["weight"], g["block_mask"], blocks), g["masked_weight"], rtol=0, atol=0)


def test_erk_densities_are_those_of_the_authors(golden: Golden) -> None:
    g = golden("spartan/erk_density")
    shapes = [(o, i, k, k) if k else (o, i) for o, i, k in g["out_in_kernel"].tolist()]
    assert erk_densities(shapes, g["target_density"]) == pytest.approx(g["densities"].tolist(), abs=1e-12)


# ------------------------------------------------------------------------------------------------ exact budgets


@settings(deadline=None, max_examples=25)
@given(density=st.floats(0.02, 0.9), mode=st.sampled_from(MODES), seed=st.integers(0, 1000))
def test_the_number_of_kept_weights_is_the_budget(density: float, mode: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = TwoLayers()
    count = 12 * 16 + 16 * 8
    config = SparsityConfig(mode=mode, target_density=density, adjust=False, warmup_fraction=0.5)
    sparsifier = Sparsifier(model, config, 8)
    train(model, sparsifier, 8)
    kept = math.ceil(density * count * (1 - 1e-11))
    assert nonzeros(sparsifier.finalize()) == (kept if mode == "spartan" else kept - 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("density", "blocks"), [(0.05, 1), (0.15, 3), (0.3, 6), (0.55, 11)])
def test_a_share_that_is_a_whole_number_of_blocks_is_that_number_however_it_is_rounded(
    density: float, blocks: int, mode: Any
) -> None:
    model = nn.Sequential(nn.Linear(20, 16, bias=False))
    sparsifier = Sparsifier(model, SparsityConfig(mode=mode, target_density=density, block_size=(4, 4)), 2)
    state = [sparsifier.step() for _ in range(2)][-1]
    assert state.density == density
    assert sparsifier.report()[0].kept == 16 * (blocks if mode == "spartan" else blocks - 1)


def test_by_default_the_density_is_that_of_the_whole_model_biases_included() -> None:
    model = TwoLayers(40, 50, 30)
    parameters = sum(p.numel() for p in model.parameters())
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.3), 5)
    train(model, sparsifier, 5, inputs=(4, 40))
    left = sum(int((p != 0).sum()) for p in sparsifier.finalize().parameters())
    assert left == pytest.approx(0.3 * parameters, abs=1)


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_layers_get_the_densities_of_the_allocation(allocation: Any) -> None:
    model = TwoLayers(40, 50, 30)
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.2, allocation=allocation, adjust=False), 5)
    train(model, sparsifier, 5, inputs=(4, 40))
    shapes = [(50, 40), (30, 50)]
    due = [0.2, 0.2] if allocation == "uniform" else erk_densities(shapes, 0.2)
    for row, density in zip(sparsifier.report(), due, strict=True):
        assert row.kept == pytest.approx(density * row.weights, abs=1)


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8),
    density=st.floats(0.0, 1.0),
)
def test_erk_meets_the_total_within_zero_and_one_in_any_order(shapes: list[tuple[int, int]], density: float) -> None:
    found = erk_densities(shapes, density)
    assert all(0 <= d <= 1 for d in found)
    total = sum(a * b for a, b in shapes)
    assert sum(d * a * b for d, (a, b) in zip(found, shapes, strict=True)) == pytest.approx(density * total, abs=1e-6)
    assert erk_densities(shapes[::-1], density) == pytest.approx(found[::-1], abs=1e-9)


def test_equal_weights_at_the_threshold_are_all_kept_by_spartan_and_all_dropped_by_magnitude() -> None:
    weight = torch.tensor([[4.0, 3, 2, 2], [2, 1, 1, 1]])
    for mode, kept in (("spartan", 5), ("magnitude", 2)):
        layer = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weight)
        sparsifier = Sparsifier(layer, SparsityConfig(mode=mode, target_density=0.5, warmup_fraction=0), 2)
        sparsifier.step()
        assert sparsifier.report()[0].kept == kept


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("mode", MODES)
def test_dropped_weights_get_the_gradient_of_their_mode_and_none_after_the_freezing(mode: Any) -> None:
    model = TwoLayers()
    config = SparsityConfig(mode=mode, target_density=0.4, adjust=False, warmup_fraction=0, finetune_fraction=0.5)
    sparsifier = Sparsifier(model, config, 4)
    train(model, sparsifier, 1)

    def gradients() -> tuple[Tensor, Tensor, Tensor]:
        """Of the dense weight, of the weight in use, and what is kept."""
        seen: list[Tensor] = []
        hidden = torch.randn(5, 12)
        weight = model.fc1.weight
        weight.register_hook(seen.append)
        model.zero_grad()
        model.fc2(torch.relu(F.linear(hidden, weight, model.fc1.bias))).square().sum().backward()
        grad = dense(model.fc1).grad
        assert grad is not None
        return grad, seen[0], masked(model.fc1).kept

    grad, of_output, kept = gradients()
    if mode == "magnitude":
        assert torch.equal(grad, of_output * kept)
    elif mode == "dual_averaging":
        assert torch.equal(grad, of_output) and grad[~kept].any()
    else:
        assert grad[~kept].any()
    sparsifier.step()
    assert sparsifier.frozen_at(2)
    grad, of_output, kept = gradients()
    torch.testing.assert_close(grad, of_output * masked(model.fc1).factor())
    assert not grad[~kept].any()


@pytest.mark.parametrize("block", [(1, 1), (4, 2)])
def test_the_spartan_gradient_is_that_of_the_soft_weights(block: tuple[int, int]) -> None:
    """Finite differences of weight times soft mask, with the masks solved again: all layers share the budget."""
    model = TwoLayers(6, 8, 12).double()
    config = SparsityConfig(
        target_density=0.5, adjust=False, warmup_fraction=0, block_size=block, solver="root", beta_init=3, beta_final=3
    )
    sparsifier = Sparsifier(model, config, 4)
    sparsifier.step()
    beta = sparsifier.beta(1)
    upstream = [torch.randn_like(dense(layer)) for layer in (model.fc1, model.fc2)]

    from bowerbird_sparsity.soft_topk import soft_topk

    def objective(first: Tensor, second: Tensor) -> Tensor:
        weights = (first, second)
        values = torch.cat([block_values(w, block).reshape(-1) for w in weights])
        costs = torch.tensor(float(math.prod(block)), dtype=torch.float64)
        masks = soft_topk(values, 0.5 * 144, beta=beta, costs=costs, solver="root")
        parts = masks.split([w.numel() // math.prod(block) for w in weights])
        shaped = [
            part.view(w.shape[0] // block[0], w.shape[1] // block[1]) for part, w in zip(parts, weights, strict=True)
        ]
        spread = [mask_blocks(w, mask, block) for w, mask in zip(weights, shaped, strict=True)]
        return sum(((u * s).sum() for u, s in zip(upstream, spread, strict=True)), torch.zeros(()))

    reference = [dense(layer).detach().clone().requires_grad_() for layer in (model.fc1, model.fc2)]
    torch.autograd.gradcheck(objective, reference)
    objective(*reference).backward()
    sum((u * layer.weight).sum() for u, layer in zip(upstream, (model.fc1, model.fc2), strict=True)).backward()
    for layer, leaf in zip((model.fc1, model.fc2), reference, strict=True):
        torch.testing.assert_close(dense(layer).grad, leaf.grad, rtol=1e-9, atol=1e-9)


def test_several_forward_passes_and_accumulated_gradients_add_up() -> None:
    model = TwoLayers().double()
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.5, warmup_fraction=0), 10)
    train(model, sparsifier, 2)
    x, y = torch.randn(4, 12).double(), torch.randn(4, 12).double()

    def gradient(*batches: Tensor, together: bool) -> Tensor:
        model.zero_grad()
        losses = [model(batch).square().sum() for batch in batches]
        if together:
            sum(losses).backward()  # type: ignore[union-attr]
        else:
            for loss in losses:
                loss.backward()
        grad = dense(model.fc1).grad
        assert grad is not None
        return grad.clone()

    parts = gradient(x, together=True) + gradient(y, together=True)
    torch.testing.assert_close(gradient(x, y, together=True), parts)
    torch.testing.assert_close(gradient(x, y, together=False), parts)


@pytest.mark.parametrize("mode", MODES)
def test_while_everything_is_kept_the_model_is_the_dense_one_bit_for_bit(mode: Any) -> None:
    model = TwoLayers()
    x = torch.randn(3, 12)
    before = model(x)
    grad = torch.autograd.grad(before.sum(), model.fc1.weight)[0]
    sparsifier = Sparsifier(model, SparsityConfig(mode=mode, target_density=1.0), 5)
    assert torch.equal(model(x), before)
    sparsifier.step()
    assert torch.equal(model(x), before)
    assert torch.equal(torch.autograd.grad(model(x).sum(), dense(model.fc1))[0], grad)
    assert torch.equal(sparsifier.finalize()(x), before)


# ------------------------------------------------------------------------------------------------ patterns


def test_blocks_are_kept_or_dropped_whole_also_in_convolutions() -> None:
    model = SmallConvolution()
    config = SparsityConfig(
        target_density=0.3, block_size=(4, 2), adjust=False, warmup_fraction=0.5, allocation="uniform"
    )
    sparsifier = Sparsifier(model, config, 6)
    train(model, sparsifier, 6, inputs=(2, 4, 8, 8))
    sparsifier.finalize()
    for weight in (model.conv.weight, model.down.weight, model.head.weight):
        alive = (weight != 0).double()
        blocks = alive.reshape(weight.shape[0] // 4, 4, weight.shape[1] // 2, 2, -1).mean(dim=(1, 3))
        assert ((blocks == 0) | (blocks == 1)).all() and 0 < blocks.mean() < 1


def test_minus_one_is_a_whole_dimension_and_four_sizes_name_whole_filters() -> None:
    model = TwoLayers()
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.5, block_size=(1, -1), warmup_fraction=0), 4)
    train(model, sparsifier, 4)
    sparsifier.finalize()
    rows = [(layer.weight != 0).double().mean(dim=1) for layer in (model.fc1, model.fc2)]
    assert all(((row == 0) | (row == 1)).all() for row in rows) and 0 < float(torch.cat(rows).mean()) < 1
    filters = SmallConvolution()
    config = SparsityConfig(
        target_density=0.5, block_size=(1, -1, -1, -1), layers=("conv", "down"), adjust=False, warmup_fraction=0
    )
    sparsifier = Sparsifier(filters, config, 4)
    train(filters, sparsifier, 4, inputs=(2, 4, 8, 8))
    sparsifier.finalize()
    alive = torch.cat([(c.weight != 0).double().mean(dim=(1, 2, 3)) for c in (filters.conv, filters.down)])
    assert set(alive.tolist()) == {0.0, 1.0} and float(alive.sum()) >= 5


def test_blocks_of_one_weight_are_single_weights() -> None:
    states = []
    for block in ((1, 1), (1, 1, 1, 1)):
        torch.manual_seed(0)
        model = SmallConvolution()
        sparsifier = Sparsifier(model, SparsityConfig(target_density=0.3, block_size=block), 4)
        train(model, sparsifier, 4, inputs=(2, 4, 8, 8))
        states.append(sparsifier.finalize().state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("pattern", "density"), [("2:4", 0.5), ("1:4", 0.25)])
def test_groups_keep_exactly_n_of_m_inputs_also_of_equal_weights(mode: Any, pattern: str, density: float) -> None:
    model = SmallConvolution()
    with torch.no_grad():
        model.head.weight.fill_(0.5)
    config = SparsityConfig(mode=mode, pattern=pattern, target_density=density, warmup_fraction=0.5)
    sparsifier = Sparsifier(model, config, 6)
    train(model, sparsifier, 6, lr=0.0, inputs=(2, 4, 8, 8))
    sparsifier.finalize()
    for weight in (model.conv.weight, model.down.weight, model.head.weight):
        groups = (weight != 0).movedim(1, -1).reshape(-1, 4).sum(dim=1)
        assert (groups == int(4 * density)).all()


def test_the_density_of_a_third_may_be_rounded_as_the_message_writes_it() -> None:
    with pytest.raises(ValidationError, match=r"set target_density = 0\.666667"):
        SparsityConfig(pattern="2:3")
    model = TwoLayers()
    sparsifier = Sparsifier(model, SparsityConfig(pattern="2:3", target_density=0.666667, layers=("fc1",)), 2)
    for _ in range(2):
        sparsifier.step()
    assert ((model.fc1.weight != 0).view(16, -1, 3).sum(dim=2) == 2).all()


def test_attention_is_masked_through_its_own_parameters() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.3, adjust=False, warmup_fraction=0), 5)
    names = [row.name for row in sparsifier.report()]
    assert names == ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
    train(model, sparsifier, 5, inputs=(2, 3, 8))
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)
        after = sparsifier.finalize()(x)
    torch.testing.assert_close(after, before)
    assert 0 < int((model.self_attn.in_proj_weight != 0).sum()) < 8 * 24
    assert type(model.self_attn) is nn.MultiheadAttention and type(model.linear1) is nn.Linear


# ------------------------------------------------------------------------------------------------ costs


def test_flops_count_the_pixels_and_tokens_at_which_a_weight_is_used() -> None:
    model = SmallConvolution()
    costs = FlopsCost(torch.randn(1, 4, 8, 8))
    names = ["conv", "down", "head"]
    assert float(costs.cost("conv", model.conv, model.conv.weight, (1, 1, 1, 1))) == 1
    model.conv.eval()
    costs.prepare(model, names)
    assert model.down.training and not model.conv.training
    assert float(costs.cost("conv", model.conv, model.conv.weight, (1, 1, 1, 1))) == 64
    assert float(costs.cost("down", model.down, model.down.weight, (2, 2, 1, 1))) == 4 * 16
    assert float(costs.cost("head", model.head, model.head.weight, (1, 1))) == 1
    tokens = TwoLayers()
    costs = FlopsCost(torch.randn(2, 5, 12))
    costs.prepare(tokens, ["fc1", "fc2"])
    assert float(costs.cost("fc1", tokens.fc1, tokens.fc1.weight, (1, 1))) == 5


class Attends(nn.Module):
    """Attention to 3 other tokens by every token."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **how)
        self.others = nn.Parameter(torch.randn(1, 3, how.get("kdim", 8)))

    def forward(self, x: Tensor) -> Tensor:
        others = self.others.expand(len(x), -1, -1)
        attended: Tensor = self.attention(x, key=others, value=others)[0]
        return attended


def test_flops_of_attention_count_queries_and_keys() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    config = SparsityConfig(target_density=0.5, cost_model=FlopsCost(torch.randn(1, 5, 8)))
    costs = {row.name: row.cost for row in Sparsifier(layer, config, 3).report()}
    weights = {"self_attn.in_proj_weight": 192, "self_attn.out_proj": 64, "linear1": 128, "linear2": 128}
    assert costs == {name: 5 * count for name, count in weights.items()}

    crossed = Attends()
    config = SparsityConfig(target_density=0.5, cost_model=FlopsCost(torch.randn(1, 5, 8)), block_size=(4, 2))
    sparsifier = Sparsifier(crossed, config, 3)
    assert [row.cost for row in sparsifier.report()] == [64 * (5 + 3 + 3), 64 * 5]
    assert sparsifier.layers[0].costs[:, 0].tolist() == [40.0, 40.0, 24.0, 24.0, 24.0, 24.0]
    sparsifier.step()

    apart = Attends(kdim=6, vdim=6)
    config = SparsityConfig(target_density=0.5, cost_model=FlopsCost(torch.randn(1, 5, 8)))
    assert [row.cost for row in Sparsifier(apart, config, 3).report()] == [64 * 5, 48 * 3, 48 * 3, 64 * 5]


def test_a_flops_budget_is_met_and_drops_more_where_weights_are_expensive() -> None:
    model = SmallConvolution()
    config = SparsityConfig(target_density=0.4, cost_model=FlopsCost(torch.randn(1, 4, 8, 8)), warmup_fraction=0)
    sparsifier = Sparsifier(model, config, 5)
    train(model, sparsifier, 5, inputs=(2, 4, 8, 8))
    rows = {row.name: row for row in sparsifier.report()}
    total, kept = sum(r.cost for r in rows.values()), sum(r.kept_cost for r in rows.values())
    assert total == 64 * 4 * 8 * 9 + 16 * 8 * 8 * 9 + 32
    assert 0.4 * total <= kept <= 0.4 * total + 64
    assert rows["conv"].density < rows["down"].density <= rows["head"].density


def test_flops_of_a_model_without_places_are_parameters() -> None:
    states = []
    for cost_model in (ParameterCost(), FlopsCost(torch.randn(1, 12))):
        torch.manual_seed(0)
        model = TwoLayers()
        config = SparsityConfig(target_density=0.3, cost_model=cost_model, adjust=False)
        sparsifier = Sparsifier(model, config, 5)
        train(model, sparsifier, 5)
        states.append(sparsifier.finalize().state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_latency_is_shared_by_the_weights_of_a_layer_and_scaled_to_one() -> None:
    model = TwoLayers()
    config = SparsityConfig(target_density=0.3, cost_model=LatencyCost({"fc1": 3.0, "fc2": 1.0}), warmup_fraction=0)
    sparsifier = Sparsifier(model, config, 5)
    sparsifier.step()
    rows = {row.name: row for row in sparsifier.report()}
    assert rows["fc1"].cost == pytest.approx(3 * rows["fc2"].cost, rel=1e-5)
    assert rows["fc1"].cost + rows["fc2"].cost == pytest.approx(12 * 16 + 16 * 8, rel=1e-5)
    kept = rows["fc1"].kept_cost + rows["fc2"].kept_cost
    assert kept == pytest.approx(0.3 * 320, abs=2)
    times = LatencyCost({"attention.in_proj_weight": 3.0, "attention.out_proj": 1.0})
    attention = Sparsifier(Attends(), SparsityConfig(target_density=0.5, cost_model=times), 5)
    assert [row.cost for row in attention.report()] == pytest.approx([192.0, 64.0])


# ------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [3, 9])
def test_a_state_continues_to_the_same_bits(mode: Any, at: int) -> None:
    def make() -> tuple[TwoLayers, Sparsifier]:
        torch.manual_seed(0)
        model = TwoLayers()
        return model, Sparsifier(model, SparsityConfig(mode=mode, target_density=0.4), 10)

    def go(model: nn.Module, sparsifier: Sparsifier, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
            sparsifier.step()

    model, sparsifier = make()
    go(model, sparsifier, 0, at)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole, masks = copy.deepcopy(model.state_dict()), sparsifier.state_dict()
    assert int(masks["step"]) == at and bool(masks["frozen"]) == (at >= 8)
    go(model, sparsifier, at, 10)
    expected = sparsifier.finalize().state_dict()
    for by_model in (True, False):  # the model's own state holds everything, too
        model, sparsifier = make()
        if by_model:
            model.load_state_dict(whole)
        else:
            model.load_state_dict(weights, strict=False)
            sparsifier.load_state_dict(masks)
        go(model, sparsifier, at, 10)
        torch.testing.assert_close(dict(sparsifier.finalize().state_dict()), dict(expected), rtol=0, atol=0)


def test_a_copy_of_a_masked_model_is_independent() -> None:
    model = TwoLayers()
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.4, warmup_fraction=0), 10)
    train(model, sparsifier, 2)
    model(torch.randn(2, 12)).sum().backward()
    twin = copy.deepcopy(model)
    x = torch.randn(2, 12)
    assert torch.equal(twin(x), model(x))
    twin(x).square().sum().backward()
    before = twin(x).detach()
    train(model, sparsifier, 1)
    assert torch.equal(twin(x), before) and not torch.equal(model(x), before)


def test_another_model_of_the_same_architecture_gets_the_same_zeros() -> None:
    model, average = TwoLayers(), TwoLayers()
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.4), 5)
    train(model, sparsifier, 5)
    weight = average.fc1.weight.detach().clone()
    sparsifier.prune_like(average)
    sparsifier.finalize()
    assert torch.equal(average.fc1.weight != 0, model.fc1.weight != 0)
    kept = average.fc1.weight != 0
    assert torch.equal(average.fc1.weight[kept], weight[kept])
    with pytest.raises(InputError, match=r"'fc1'.*no such layer"):
        sparsifier.prune_like(nn.Sequential(nn.Linear(12, 16)))


# ------------------------------------------------------------------------------------------------ refusals


def test_a_step_after_finalize_is_refused() -> None:
    model = TwoLayers()
    sparsifier = Sparsifier(model, SparsityConfig(), 5)
    assert sparsifier.finalize() is sparsifier.finalize()
    with pytest.raises(InputError, match=r"after finalize\(\)"):
        sparsifier.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layers": ("fc3",)},
            r"'fc3' matches no layer. Did you mean 'fc[12]'\?.*There are: fc1, fc2",
        ),
        ({"layers": ("blocks.*",)}, r"'blocks.\*' matches no layer.*There are: fc1, fc2"),
        ({"block_size": (16, 16)}, r"layer 'fc1': blocks of 16 do not divide dimension 1.*accepts 1, 2, 3, 4, 6, 12"),
        ({"pattern": "1:5", "target_density": 0.2}, r"layer 'fc1': 1:5 needs a number of inputs that 5 divides"),
        ({"target_density": 0.05}, r"0.05 cannot be met.*344 parameters only 320"),
        ({"cost_model": LatencyCost({"fc1": 1.0})}, r"no time for layer 'fc2'. Did you mean 'fc1'"),
        ({"cost_model": FlopsCost()}, "needs a sample_input"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_the_model_stays_as_it_was(
    settings: dict[str, Any], message: str
) -> None:
    model = TwoLayers()
    with pytest.raises(InputError, match=message):
        Sparsifier(model, SparsityConfig(**settings), 10)
    assert list(model.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_density": 0.0}, "greater than 0"),
        ({"target_density": 1.5}, "less than or equal to 1"),
        ({"target_density": -0.1}, "greater than 0"),
        ({"mode": "random"}, "spartan"),
        ({"block_size": (0, 4)}, r"block_size = \[0, 4\]"),
        ({"block_size": (4,)}, "two numbers"),
        ({"warmup_fraction": 0.7, "finetune_fraction": 0.5}, r"1.2: the masks would be frozen"),
        ({"pattern": "4:2"}, "n < m"),
        ({"pattern": "2:4", "target_density": 0.1}, "set target_density = 0.5"),
        ({"pattern": "2:4", "target_density": 0.5, "block_size": (4, 4)}, "has no meaning"),
        ({"cost_model": "time"}, "FlopsCost"),
        ({"beta_final": 0.0}, "greater than 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SparsityConfig(**settings)


def test_without_strict_layers_that_do_not_fit_fall_back_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="'fc1': blocks of 8 do not divide dimension 0"):
        mixed = Sparsifier(TwoLayers(12, 15, 8), SparsityConfig(block_size=(8, 5), strict=False, adjust=False), 4)
    assert [row.block_size for row in mixed.report()] == [(1, 1), (8, 5)]
    mixed.step()
    with pytest.warns(UserWarning, match="2:4"):
        dense_first = Sparsifier(
            TwoLayers(10, 16, 8), SparsityConfig(pattern="2:4", target_density=0.5, strict=False), 4
        )
    assert [row.name for row in dense_first.report()] == ["fc2"]


def test_frozen_layers_stay_dense_and_a_model_without_layers_is_refused() -> None:
    model = TwoLayers()
    model.fc1.weight.requires_grad_(False)
    sparsifier = Sparsifier(model, SparsityConfig(target_density=0.7), 4)
    assert [row.name for row in sparsifier.report()] == ["fc2"]
    with pytest.raises(RecipeError, match="parametrised already"):
        Sparsifier(model, SparsityConfig(), 4)
    with pytest.raises(RecipeError, match="no layer to make sparse"):
        Sparsifier(nn.LayerNorm(4), SparsityConfig(), 4)
    tied = TwoLayers(8, 8, 8)
    tied.fc2.weight = tied.fc1.weight
    with pytest.raises(RecipeError, match="'fc1' and 'fc2' share one weight"):
        Sparsifier(tied, SparsityConfig(), 4)


def test_the_state_of_another_model_or_schedule_is_refused() -> None:
    sparsifier = Sparsifier(TwoLayers(), SparsityConfig(), 10)
    with pytest.raises(InputError, match="other layers"):
        sparsifier.load_state_dict({})
    for _ in range(9):
        sparsifier.step()
    with pytest.raises(InputError, match="frozen from step 80"):
        Sparsifier(TwoLayers(), SparsityConfig(), 100).load_state_dict(sparsifier.state_dict())
    with pytest.raises(InputError, match="mask of"):
        Sparsifier(TwoLayers(12, 20, 8), SparsityConfig(), 10).load_state_dict(sparsifier.state_dict())
