"""The modifiers in recipes: what is exported, what is resumed, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bowerbird.encoders import load_encoder
from bowerbird.encoders.configs import PerceptronConfig
from bowerbird.encoders.perceptron import Perceptron
from bowerbird.errors import BowerbirdError, RecipeError
from bowerbird.recipe import resolve_recipe
from bowerbird.testing import PluginTester
from bowerbird.train.loop import build, train
from bowerbird_sparsity.modifier import SparsityModifier

NAMES = ("sparsity:spartan", "sparsity:magnitude", "sparsity:top-k")


def recipe(modifier: dict[str, Any], **settings: Any) -> Any:
    return resolve_recipe({
        "name": "sparse",
        "encoder": {"use": "core:perceptron", "image_size": 8, "width": 32, "embed_dim": 8},
        "objective": {"use": "core:softmax"},
        "dataset": {"use": "core:digits", "split": "test"},
        "modifier": [modifier],
        "train": {"epochs": 2, "batch_size": 64, "lr": 2e-3, "optimizer": "adam", "device": "cpu", **settings},
    })  # fmt: skip


def modifier_of(**settings: Any) -> SparsityModifier:
    return build(recipe({"use": "sparsity:spartan", **settings}).modifier[0], "modifier")


def encoder() -> Perceptron:
    return Perceptron(PerceptronConfig(image_size=8, width=32, embed_dim=8))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_exports_an_encoder_with_the_number_of_zeros_that_it_asks_for(name: str, tmp_path: Path) -> None:
    asked = {"use": name, "target_density": 0.25, "warmup_fraction": 0.5}
    assert train(recipe(asked), tmp_path / "run").finished
    module = load_encoder(tmp_path / "run", device="cpu").module
    parameters = list(module.parameters())
    kept = sum(int((p != 0).sum()) for p in parameters)
    assert kept == pytest.approx(sum(p.numel() for p in parameters) / 4, abs=1)


def test_a_teacher_is_exported_with_the_zeros_of_the_student() -> None:
    student = encoder()
    teacher = copy.deepcopy(student)
    modifier = modifier_of(target_density=0.25, adjust=False, warmup_fraction=0.0)
    modifier.attach(student, 4)
    for step in range(4):
        modifier.after_step(step)
    assert modifier.finalize(teacher) is teacher
    zeros = [bool((layer.weight == 0).any()) for layer in teacher.layers if isinstance(layer, nn.Linear)]
    assert all(zeros)
    report = modifier.report()
    assert report["sparse_layers_density"] == pytest.approx(0.25, abs=0.01) and 0 < report["mask_softness"] <= 0.25


def test_layers_without_any_weight_left_are_named() -> None:
    network = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4))
    with torch.no_grad():
        network[1].weight.mul_(1e-3)
    modifier = modifier_of(target_density=0.1, warmup_fraction=0.1, adjust=False)
    modifier.attach(network, total_steps=4)
    for step in range(4):
        modifier.after_step(step)
    with pytest.warns(UserWarning, match=r"no weight is left in 1 layer\(s\): 1\..*erk"):
        modifier.finalize(network)


def test_an_encoder_inside_of_what_is_exported_loses_its_masks() -> None:
    inner = encoder()
    modifier = modifier_of(target_density=0.5)
    modifier.attach(inner, 4)
    outer = nn.ModuleDict({"encoder": inner})
    modifier.finalize(outer)
    assert not [key for key in outer.state_dict() if "parametrizations" in key]


def test_a_flops_budget_looks_at_a_picture_of_the_encoders_size() -> None:
    modifier = modifier_of(target_density=0.5, cost_model="flops")
    modifier.attach(encoder(), 4)
    rows = modifier.sparsifier.report()
    assert [row.cost for row in rows] == [64 * 32, 32 * 32, 32 * 8]
    with pytest.raises(RecipeError, match="does not say how large its pictures are"):
        modifier_of(cost_model="flops").attach(nn.Sequential(nn.Linear(3, 4)), 4)


def test_a_latency_table_is_given_by_layer() -> None:
    table = {"layers.0": 2.0, "layers.2": 1.0, "layers.4": 1.0}
    modifier = modifier_of(target_density=0.5, cost_model="latency", latency_table=table)
    modifier.attach(encoder(), 4)
    assert modifier.sparsifier.report()[0].cost == pytest.approx((2048 + 1024 + 256) / 2)
    del table["layers.4"]
    with pytest.raises(BowerbirdError, match=r"no time for layer 'layers.4'"):
        modifier_of(cost_model="latency", latency_table=table).attach(encoder(), 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_density": 0.0}, "target_density = 0.0 is not accepted"),
        ({"target_density": 1.1}, "target_density = 1.1 is not accepted"),
        ({"layer": ["fc"]}, "Did you mean 'layers'"),
        ({"layers": []}, "layers"),
        ({"cost_model": "latency"}, "needs latency_table"),
        ({"latency_table": {"a": 1.0}}, "no use for it"),
        ({"mode": "magnitude"}, "unknown key"),
    ],
)
def test_settings_that_are_not_accepted_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe({"use": "sparsity:spartan", **settings})


def test_layers_that_match_nothing_are_listed_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'layer.0' matches no layer. Did you mean 'layers.0'.*There are: layers.0"):
        train(recipe({"use": "sparsity:spartan", "layers": ["layer.0"]}), tmp_path / "run")


def test_the_plugin_keeps_the_rules_of_plugins() -> None:
    PluginTester("sparsity").assert_sound()


def test_a_masked_encoder_runs_in_half_precision() -> None:
    model = encoder()
    modifier = modifier_of(target_density=0.5, warmup_fraction=0.0)
    modifier.attach(model, 10)
    modifier.after_step(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model({"image": torch.rand(2, 3, 8, 8)}).pooled.float().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32
