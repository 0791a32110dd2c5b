"""CDCL: a branch of batch normalisation per data set, one step over one pure batch of each, and what both must keep."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bowerbird.errors import InputError, UnknownNameError
from bowerbird.testing import assert_close
from bowerbird_domain.cdcl import (
    DatasetBatchNorm2d,
    DatasetHeads,
    active_dataset,
    alternation_step,
    convert_batchnorm,
    datasets_of,
    export_single,
    nearest_dataset,
    statistics_distances,
)
from bowerbird_domain.segmentation import pixel_cross_entropy

NAMES = ("day", "night")


class Block(nn.Module):
    """Dataset-aware block, under the names of the golden files."""

    def __init__(self, inputs: int, outputs: int, datasets: tuple[str, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = DatasetBatchNorm2d(outputs, datasets)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Net(nn.Module):
    """Two blocks and private 1 x 1 heads, under the names of the golden files."""

    def __init__(self, classes: dict[str, int]) -> None:
        super().__init__()
        self.b1, self.b2 = Block(3, 4, tuple(classes)), Block(4, 4, tuple(classes))
        self.heads = DatasetHeads({name: nn.Conv2d(4, count, 1) for name, count in classes.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.b2(self.b1(x)))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return pixel_cross_entropy(model(batch[0]), batch[1])


def net(classes: dict[str, int] | None = None) -> Net:
    torch.manual_seed(3)
    made = Net(classes or {"day": 3, "night": 5}).double()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return made


def batches(names: tuple[str, ...] = NAMES, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for position, name in enumerate(names):
        height, width = 5 + position, 7 - position
        image = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64) * (1 + position) + position
        target = torch.randint(0, 3, (2, height, width), generator=generator)
        target[:, 0] = 255
        found[name] = (image, target)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model: nn.Module, given_batches: dict[str, Any], **more: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of one step with learning rate 0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = alternation_step(model, given_batches, loss_fn, optimizer, **more)
    return losses, gradients(model)


# ------------------------------------------------------------------------------------------------------ golden numbers


def part(values: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): torch.as_tensor(v) for key, v in values.items() if key.startswith(prefix)}


def test_a_dataset_aware_block_gives_the_golden_numbers_on_each_data_set_in_turn(golden: Callable[[str], Any]) -> None:
    values = golden("cdcl/dataset_aware_block")
    block = Block(3, 4, NAMES).double()
    block.load_state_dict(part(values, "before/"))
    inputs = [values[f"x_{i}"].requires_grad_() for i in range(2)]
    with torch.no_grad():
        untouched = copy.deepcopy(block)
    total = torch.zeros((), dtype=torch.float64)
    for i, name in enumerate(NAMES):
        with active_dataset(block, name):
            output = block(inputs[i])
        assert_close(output, values[f"y_train_{i}"])
        block.zero_grad()
        own = (output * values[f"up_{i}"]).sum()
        own.backward()
        total = total + own.detach()
        assert_close(inputs[i].grad, values[f"grad_x_{i}"])
        assert_close(block.conv.weight.grad, values[f"grad_conv_{i}"])
        assert_close(block.bn.bns[i].weight.grad, values[f"grad_gamma_{i}"])
        assert_close(block.bn.bns[i].bias.grad, values[f"grad_beta_{i}"])
    assert_close(dict(block.state_dict()), part(values, "after/"))
    assert not torch.equal(untouched.bn.bns[0].running_mean, block.bn.bns[0].running_mean)
    block.eval()
    for i, name in enumerate(NAMES):
        with active_dataset(block, name), torch.no_grad():
            assert_close(block(values["x_0"]), values[f"y_eval_input0_as_dataset_{i}"])


@pytest.mark.parametrize("accumulate", [True, False])
def test_four_steps_of_alternation_training_give_the_golden_trace(
    golden: Callable[[str], Any], accumulate: bool
) -> None:
    values = golden("cdcl/alternation_training_trace")
    model = Net(dict(zip(NAMES, values["classes"].tolist(), strict=True))).double()
    model.load_state_dict(part(values, "init/"))
    weights = dict(zip(NAMES, values["loss_weights"].tolist(), strict=True))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=values["momentum"], weight_decay=values["weight_decay"]
    )
    for step in range(values["steps"]):
        optimizer.param_groups[0]["lr"] = float(values["learning_rates"][step])
        given_batches = {name: (values[f"x_t{step}_d{i}"], values[f"y_t{step}_d{i}"]) for i, name in enumerate(NAMES)}
        losses = alternation_step(model, given_batches, loss_fn, optimizer, weights, accumulate)
        assert_close(list(losses.values()), values["losses"][step], where=f"losses of step {step}")
        if step == 0:
            assert_close(gradients(model), part(values, "grad_t0/"))
    assert_close(dict(model.state_dict()), part(values, "final/"))


# ---------------------------------------------------------------------------------------------------------- invariants


def test_with_one_data_set_it_is_the_plain_network_in_outputs_gradients_and_statistics() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    made = convert_batchnorm(plain, ["only"])
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    for training in (True, False):
        plain.train(training)
        made.train(training)
        expected = plain(x)
        with active_dataset(made, "only"):
            found = made(x)
        assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), made.parameters(), strict=True))
    buffers = zip(plain.buffers(), made.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)


def test_a_batch_of_one_data_set_leaves_the_branches_of_others_alone() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses, found = stepped(model, {"day": batches()["day"]}, strict=False)
    assert losses.keys() == {"day"}
    after = model.state_dict()
    others = [name for name in before if ".bns.1." in name or name.startswith("heads.1")]
    assert others and all(torch.equal(before[name], after[name]) for name in others)
    assert not [name for name in found if name in others]
    assert not torch.equal(before["b1.bn.bns.0.running_mean"], after["b1.bn.bns.0.running_mean"])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), first=st.floats(0, 3), second=st.floats(0.1, 3))
def test_the_gradient_is_the_weighted_sum_of_those_of_single_data_sets_however_it_is_computed(
    seed: int, first: float, second: float
) -> None:
    model, given_batches = net(), batches(seed=seed)
    weights = {"day": first, "night": second}
    singles = [stepped(net(), {name: given_batches[name]}, strict=False)[1] for name in NAMES]
    _, accumulated = stepped(copy.deepcopy(model), given_batches, weights=weights)
    _, summed = stepped(copy.deepcopy(model), given_batches, weights=weights, accumulate=False)
    turned = dict(reversed(given_batches.items()))
    _, other_order = stepped(copy.deepcopy(model), turned, weights=weights)
    for name, gradient in accumulated.items():
        expected = sum(w * g[name] for w, g in zip(weights.values(), singles, strict=True) if name in g)
        for found in (gradient, summed[name], other_order[name]):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_weight_0_for_all_others_is_training_on_one_data_set_for_all_that_is_shared() -> None:
    alone, together = net(), net()
    for model, given_batches, weights in (
        (alone, {"day": batches()["day"]}, None),
        (together, batches(), {"night": 0.0}),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(2):
            alternation_step(model, given_batches, loss_fn, optimizer, weights, strict=False)
    ours, theirs = alone.state_dict(), together.state_dict()
    shared = [name for name in ours if "bns.1" not in name and not name.startswith("heads.1")]
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)


def test_equal_branches_give_equal_outputs_in_eval_mode() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain(torch.randn(4, 3, 6, 6))  # statistics of its own
    made = convert_batchnorm(plain, ["a", "b", "c"]).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = plain.eval()(x)
    for name in "abc":
        with active_dataset(made, name):
            assert torch.equal(made(x), expected)


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(0.2, 20), shift=st.floats(-10, 10))
def test_rescaled_pictures_of_a_data_set_give_the_same_training_output(scale: float, shift: float) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3, bias=False).double(), DatasetBatchNorm2d(4, NAMES, eps=1e-12).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    found, expected = norm(conv(scale * x + shift), dataset="night"), norm(conv(x), dataset="day")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(channels=st.lists(st.integers(1, 9), min_size=1, max_size=4), count=st.integers(1, 4))
def test_a_further_data_set_costs_two_parameters_and_two_buffer_entries_per_channel(
    channels: list[int], count: int
) -> None:
    plain = nn.Sequential(*(nn.BatchNorm2d(width) for width in channels))
    made = convert_batchnorm(plain, [f"set-{i}" for i in range(count)])
    extra = (count - 1) * 2 * sum(channels)

    def sizes(model: nn.Module) -> tuple[int, int]:
        floating = [b for b in model.buffers() if b.is_floating_point()]
        return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in floating)

    assert sizes(made) == tuple(size + extra for size in sizes(plain))
    single = export_single(made, "set-0")
    assert sizes(single) == sizes(plain)
    assert [type(module) for module in single.modules()] == [type(module) for module in plain.modules()]


# ------------------------------------------------------------------------------------------ choosing a data set


def test_running_variance_is_unbiased_and_normalisation_biased() -> None:
    norm, x = DatasetBatchNorm2d(1, ["a"], momentum=1.0), torch.tensor([0.0, 1.0, 2.0, 5.0]).view(4, 1, 1, 1)
    output = norm(x, "a")
    assert norm.bns[0].running_var.item() == pytest.approx(x.var(correction=1).item())
    assert output.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_without_a_data_set_nothing_is_computed(training: bool) -> None:
    model = net().train(training)
    with pytest.raises(InputError, match=r"no data set is active.*names: day, night"):
        model(torch.zeros(2, 3, 5, 5, dtype=torch.float64))
    with active_dataset(model, "day"):
        pass
    with pytest.raises(InputError, match="no data set is active"):
        model.heads(torch.zeros(1, 4, 2, 2, dtype=torch.float64))


def test_an_unknown_data_set_is_refused_with_close_names() -> None:
    with (
        pytest.raises(UnknownNameError, match=r"no data set 'nigth'; there are day, night\. Did you mean 'night'"),
        active_dataset(net(), "nigth"),
    ):
        pass
    with pytest.raises(UnknownNameError, match="there are day, night"):
        net().heads(torch.zeros(1, 4, 2, 2), dataset="dusk")
    with (
        pytest.raises(InputError, match="make them with convert_batchnorm"),
        active_dataset(nn.Conv2d(3, 3, 1), "day"),
    ):
        pass


def test_the_inner_choice_counts_and_the_outer_one_comes_back_even_after_an_error() -> None:
    model = net().eval()
    nn.init.constant_(model.b1.bn.bns[1].bias, 9.0)
    x = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    day, night = (model.b1.bn(model.b1.conv(x), dataset=name) for name in NAMES)
    with active_dataset(model, "day"):
        with pytest.raises(KeyError), active_dataset(model, "night"):
            assert torch.equal(model.b1.bn(model.b1.conv(x)), night)
            raise KeyError
        assert torch.equal(model.b1.bn(model.b1.conv(x)), day)
        assert torch.equal(model.b1.bn(model.b1.conv(x), dataset="night"), night)  # by name, whatever is active
        with active_dataset(net(), "night"):  # another model
            assert torch.equal(model.b1.bn(model.b1.conv(x)), day)


def test_threads_use_one_model_for_different_data_sets_at_the_same_time() -> None:
    norm = DatasetBatchNorm2d(1, NAMES).eval()
    nn.init.constant_(norm.bns[1].bias, 7.0)
    meeting, found = threading.Barrier(2, timeout=20), {}

    def work(name: str) -> None:
        with active_dataset(norm, name):
            meeting.wait()
            values = []
            for _ in range(20):
                values.append(norm(torch.zeros(1, 1, 1, 1)).item())
                meeting.wait()
            found[name] = set(values)

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"day": {0.0}, "night": {7.0}}


# ------------------------------------------------------------------------------------------ converting and exporting


class Activated(nn.BatchNorm2d):
    """Batch normalisation that also activates, as some libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(min=0)


def test_conversion_copies_class_statistics_mode_and_frozen_parameters_and_leaves_the_original_alone() -> None:
    torch.manual_seed(0)
    shared = Activated(3)
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Conv2d(3, 3, 1), shared, nn.BatchNorm1d(3)).double()
    nn.init.normal_(shared.running_mean)
    shared.weight.requires_grad_(False)
    plain[1].eval()
    before = copy.deepcopy(plain.state_dict())
    made = convert_batchnorm(plain, NAMES)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in before.items())
    layer = made[1]
    assert isinstance(layer, DatasetBatchNorm2d) and made[3] is layer and isinstance(made[4], DatasetBatchNorm2d)
    assert all(type(norm) is Activated and not norm.training for norm in layer.bns)
    assert all(torch.equal(norm.running_mean, shared.running_mean) for norm in layer.bns)
    assert [norm.weight.requires_grad for norm in layer.bns] == [False, False]
    assert layer.bns[0].weight is not layer.bns[1].weight
    assert datasets_of(made) == NAMES and datasets_of(plain) == ()
    assert isinstance(export_single(made, "night")[1], Activated)


def test_branches_become_synchronised_batch_normalisation_under_the_same_names() -> None:
    model = net()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    norms = [norm for module in synchronised.modules() if isinstance(module, DatasetBatchNorm2d) for norm in module.bns]
    assert len(norms) == 4 and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    ours, theirs = synchronised.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_compiled_network_follows_the_active_data_set() -> None:
    model = net().eval()
    compiled, x = torch.compile(model, backend="eager"), batches()["day"][0]
    for name in (*NAMES, *NAMES):
        with active_dataset(model, name):
            assert torch.equal(compiled(x), model(x))
    with pytest.raises(InputError, match="no data set is active"):
        compiled(x)


def test_a_folded_export_computes_the_same_with_the_modules_of_one_plain_network() -> None:
    model = net()
    for name, batch in batches().items():
        for _ in range(3):
            with active_dataset(model, name):
                model(batch[0])
    model.eval()
    for name, batch in batches().items():
        with active_dataset(model, name):
            expected = model(batch[0])
        for fold in (False, True):
            single = export_single(model, name, fold=fold).eval()
            torch.testing.assert_close(single(batch[0]), expected, rtol=1e-9, atol=1e-9)
            assert not any(isinstance(module, DatasetBatchNorm2d | DatasetHeads) for module in single.modules())
            norms = sum(isinstance(module, nn.BatchNorm2d) for module in single.modules())
            assert norms == (0 if fold else 2)
    convs = [module for module in single.modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(conv.weight.shape) for conv in convs] == [(4, 3, 3, 3), (4, 4, 3, 3), (5, 4, 1, 1)]


def test_only_what_a_batch_normalisation_alone_reads_is_folded() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
            self.second, self.last = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 100:  # cannot be followed without running it, so that the parts are looked at
                raise ValueError
            return x

    class Residual(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = x + self.bn(x)  # the result of conv is read twice
            return self.last(self.second(x))

    model = convert_batchnorm(nn.Sequential(Residual()), NAMES).eval()
    nn.init.normal_(model[0].bn.bns[0].bias)
    single, x = export_single(model, "day", fold=True), torch.randn(2, 2, 3, 3)
    assert isinstance(single[0].bn, nn.BatchNorm2d) and isinstance(single[0].last, nn.Identity)
    with active_dataset(model, "day"):
        torch.testing.assert_close(single(x), model(x))
    with pytest.raises(InputError, match="use fold=False"):
        export_single(convert_batchnorm(Skipping(), NAMES), "day", fold=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DatasetBatchNorm2d(3, []), "expected a list of different names"),
        (lambda: DatasetBatchNorm2d(3, "day"), "expected a list of different names"),
        (lambda: DatasetBatchNorm2d(3, ["day", "day"]), "expected a list of different names"),
        (lambda: DatasetHeads({}), "expected a list of different names"),
        (lambda: convert_batchnorm(nn.Conv2d(3, 3, 1), NAMES), "no batch normalisation"),
        (lambda: convert_batchnorm(net(), NAMES), "already"),
        (lambda: export_single(nn.Conv2d(3, 3, 1), "day"), "no branches"),
        (lambda: export_single(net(), "dusk"), "no data set 'dusk'; there are day, night"),
        (lambda: DatasetBatchNorm2d(3, NAMES)(torch.zeros(2, 4, 1, 1), "day"), r"expected \(batch, 3, ...\)"),
        (lambda: statistics_distances(nn.BatchNorm2d(3), torch.zeros(1, 3, 2, 2)), "no running statistics"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


def test_a_single_value_per_channel_is_refused_with_the_names_of_layer_and_data_set() -> None:
    model = convert_batchnorm(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)), NAMES)
    with active_dataset(model, "night"):
        with pytest.raises(InputError, match="layer '1', data set 'night': batch statistics need at least two values"):
            model(torch.randn(1, 3, 5, 5))
        model(torch.randn(2, 3, 5, 5))
        model.eval()(torch.randn(1, 3, 5, 5))


# --------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batches": {}}, "missing: day, night"),
        ({"batches": {"day": batches()["day"]}}, "missing: night"),
        ({"batches": {**batches(), "dusk": batches()["day"]}}, "batches: there is no data set 'dusk'"),
        ({"weights": {"dya": 1.0}}, "weights: there is no data set 'dya'.*Did you mean 'day'"),
        ({"weights": {"day": -1.0}}, "expected a number of at least 0"),
        ({"weights": {"day": float("nan")}}, "expected a number of at least 0"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, "must return a scalar tensor; of data set 'day'.*shape"),
        ({"loss_fn": lambda model, batch: 1.0}, "it returned float"),
        ({"loss_fn": lambda model, batch: loss_fn(model, batch) * float("nan")}, "loss of data set 'day' is nan"),
    ],
)
def test_a_step_that_cannot_be_right_does_not_move_the_optimiser(change: dict[str, Any], words: str) -> None:
    model = net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    arguments = {"batches": batches(), "loss_fn": loss_fn, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    with pytest.raises(InputError, match=words):
        alternation_step(model, **{**arguments, **change})
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_network_without_branches_is_trained_jointly() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).double()
    losses, found = stepped(model, batches())
    assert losses.keys() == set(NAMES) and len(found) == len(list(model.parameters()))
    assert model[1].num_batches_tracked == 2


def test_a_network_wrapped_for_several_processes_gets_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    _, expected = stepped(net(), batches())
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net(), find_unused_parameters=True)
        for _ in range(2):  # a second step fails where the first one left gradients that were not exchanged
            losses, found = stepped(wrapped, batches())
    finally:
        distributed.destroy_process_group()
    assert losses.keys() == set(NAMES)
    assert {name.removeprefix("module."): value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }


# -------------------------------------------------------------------------------------------------- unknown data sets


def test_a_batch_of_unknown_origin_is_given_to_the_data_set_with_the_nearest_statistics() -> None:
    model = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), NAMES)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        for position, name in enumerate(NAMES):
            with active_dataset(model, name):
                model(torch.randn(8, 3, 8, 8, generator=generator) * (1 + 2 * position) + position)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for position, name in enumerate(NAMES):
        x = torch.randn(8, 3, 8, 8, generator=generator) * (1 + 2 * position) + position
        distances = statistics_distances(model, x)
        assert nearest_dataset(model, x) == name == min(distances, key=distances.__getitem__)
        assert 0 <= distances[name] < 0.05 < max(distances.values())
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_equal_statistics_have_distance_0() -> None:
    norm, x = DatasetBatchNorm2d(2, ["a"]).double(), torch.randn(50, 2, 3, 3, dtype=torch.float64)
    flat = x.transpose(0, 1).flatten(1)
    norm.bns[0].running_mean.copy_(flat.mean(1))
    norm.bns[0].running_var.copy_(flat.var(1, correction=0))
    assert statistics_distances(norm, x)["a"] == pytest.approx(0.0, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------- the loss


def test_pixel_cross_entropy_is_the_mean_over_the_pixels_that_count() -> None:
    logits, target = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randint(0, 4, (2, 3, 5))
    target[0, 0], target[1, :, 2] = 255, 255
    chosen = -torch.log_softmax(logits, dim=1).gather(1, target.where(target < 4, 0)[:, None])[:, 0]
    torch.testing.assert_close(pixel_cross_entropy(logits, target), chosen[target != 255].mean())
    torch.testing.assert_close(
        pixel_cross_entropy(logits, target.where(target < 4, 9), ignore_index=9), chosen[target != 255].mean()
    )


def test_a_batch_without_a_pixel_that_counts_costs_0_and_has_gradient_0() -> None:
    logits = torch.randn(2, 4, 3, 5, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((2, 3, 5), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.full((2, 3, 5), 4), "has class 4; expected 0 to 3, or 255"),
        (torch.full((2, 3, 5), -1), "has class -1"),
        (torch.zeros(2, 3, 4, dtype=torch.long), "do not fit a target"),
    ],
)
def test_targets_that_are_no_classes_are_refused(target: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        pixel_cross_entropy(torch.zeros(2, 4, 3, 5), target)
