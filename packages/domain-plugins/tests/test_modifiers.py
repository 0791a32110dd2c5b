"""domain:dsu and domain:mixstyle as users meet them: by names of layers, in a recipe, stopped and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import Modifier
from bowerbird.recipe import build_config, resolve_recipe
from bowerbird.registry import get_registry
from bowerbird.train.loop import train
from bowerbird_domain.dsu import FeatureStatisticsUncertainty, insert_after
from bowerbird_domain.layers import RESNET, find_layers

RESNET_MODEL = "test_resnet"  # timm's: the names of a ResNet, 0.5 million parameters


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(RESNET_MODEL, num_classes=0)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0, img_size=32)


def modifier(name: str, **settings: Any) -> Modifier:
    record = get_registry().get("modifier", name)
    return get_registry().load(record).build(build_config(record, settings, where="test"))


# ------------------------------------------------------------------------------------------------ names of layers


def test_a_name_means_the_layer_nearest_to_the_root() -> None:
    model = nn.ModuleDict({"trunk": resnet()})
    assert find_layers(model, ["conv1"]) == ["trunk.conv1"]
    assert find_layers(model, ["layer1.0.conv1"]) == ["trunk.layer1.0.conv1"]
    assert find_layers(model, ["layer?"]) == [f"trunk.layer{i}" for i in range(1, 5)]
    assert find_layers(model, ["stage2", "layer2"]) == ["trunk.layer2"]
    assert find_layers(model, ["resnet"]) == [f"trunk.{point}" for point in RESNET]


def test_a_pattern_stays_within_one_part_of_a_name() -> None:
    blocks = find_layers(vit(), ["vit"])
    assert blocks == find_layers(vit(), ["blocks.*"])
    assert blocks and all(name.count(".") == 1 for name in blocks)


def test_a_name_without_a_layer_is_refused_with_close_ones_and_what_there_is() -> None:
    with pytest.raises(RecipeError, match=r"'layer9'.*Close: layer.*The network has conv1"):
        find_layers(resnet(), ["conv1", "layer9"])
    with pytest.raises(RecipeError, match=r"'resnet' \('conv1'\).*blocks"):
        find_layers(vit(), ["resnet"])
    with pytest.raises(RecipeError, match="at least one name"):
        find_layers(resnet(), [])


# ------------------------------------------------------------------------------------------------ insert_after


def test_what_is_inserted_follows_the_mode_of_its_layer_and_changes_no_name() -> None:
    model, x = resnet(), torch.randn(4, 3, 32, 32)
    names, plain = list(model.state_dict()), model.eval()(x)
    handle = insert_after(model, ["conv1", "layer1"], lambda: FeatureStatisticsUncertainty(1.0))
    assert list(handle.modules) == ["conv1", "layer1"]
    assert list(model.state_dict()) == names and len(list(model.modules())) == len(list(resnet().modules()))
    assert torch.equal(model(x), plain)
    model.train()
    assert not torch.allclose(model(x), model(x))
    handle.remove()
    state = copy.deepcopy(model.state_dict())
    first = model(x)
    model.load_state_dict(state)
    assert torch.equal(model(x), first)


def test_the_output_of_the_layer_is_what_is_changed() -> None:
    model, x = resnet().train(), torch.randn(4, 3, 32, 32)
    seen: list[torch.Tensor] = []

    class Tenfold(nn.Module):
        def forward(self, output: torch.Tensor) -> torch.Tensor:
            seen.append(output)
            return 10 * output

    inputs: list[torch.Tensor] = []
    model.bn1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with insert_after(model, ["conv1"], Tenfold):
        model(x)
    model(x)
    assert torch.equal(inputs[0], 10 * seen[0]) and torch.equal(inputs[1], seen[0])  # before the norm


def test_a_refused_output_names_its_layer() -> None:
    model = resnet().train()
    handle = insert_after(model, ["resnet"], lambda: FeatureStatisticsUncertainty(1.0, strict=True))
    with pytest.raises(InputError, match=r"behind layer 'conv1'.*1 sample\(s\)"):
        model(torch.randn(1, 3, 32, 32))
    handle.remove()

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    pair = nn.Sequential(Pair())
    insert_after(pair, ["0"], nn.Identity)
    with pytest.raises(InputError, match=r"layer '0' returns a tuple"):
        pair(torch.zeros(1))


# ------------------------------------------------------------------------------------------------ modifiers


@pytest.mark.parametrize("name", ["domain:dsu", "domain:mixstyle"])
@pytest.mark.parametrize("build, layers", [(resnet, ["layer1", "layer2"]), (vit, ["vit"])])
def test_a_modifier_acts_in_training_only_and_leaves_nothing_behind(name: str, build: Any, layers: list[str]) -> None:
    model, x = build(), torch.randn(4, 3, 32, 32)
    plain = model.eval()(x)
    made = modifier(name, p=1.0, layers=layers)
    made.attach(model.train(), 10)
    assert made.report()["layers"] == len(find_layers(model, layers))
    state = copy.deepcopy(model.state_dict())
    first = model(x)
    model.load_state_dict(state)
    assert not torch.allclose(model(x), first)
    model.load_state_dict(state)
    assert torch.equal(model.eval()(x), plain)
    assert made.finalize(model) is model
    assert not any(module._forward_hooks for module in model.modules())


def test_a_map_of_one_position_is_refused_unless_that_is_accepted() -> None:
    x = torch.randn(4, 3, 8, 8)
    for strict in (True, False):
        model = resnet().train()
        made = modifier("domain:dsu", p=1.0, layers=["layer4"], strict=strict)
        made.attach(model, 10)
        if strict:
            with pytest.raises(InputError, match=r"behind layer 'layer4'.*1 position\(s\)"):
                model(x)
        else:
            assert model(x).isfinite().all()


def test_maps_with_channels_at_the_end_are_read_so_where_the_recipe_says_so() -> None:
    x = torch.randn(4, 5, 6, 3)  # (B, H, W, C), as in Swin
    model = nn.Sequential(nn.Identity()).train()
    modifier("domain:dsu", p=1.0, layers=["0"], layout="channels-last").attach(model, 10)
    y = model(x)
    normalised = [(v - v.mean((1, 2), keepdim=True)) / v.std((1, 2), keepdim=True) for v in (x, y)]
    torch.testing.assert_close(normalised[1].abs(), normalised[0].abs(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(x, y)


def test_an_encoder_in_bf16_keeps_its_type() -> None:
    model = resnet().train()
    seen: list[torch.dtype] = []
    modifier("domain:dsu", p=1.0, layers=["conv1"]).attach(model, 10)
    model.bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(4, 3, 32, 32)).float().sum().backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_frozen_layer_is_refused() -> None:
    model = nn.ModuleDict({"trunk": resnet()}).train()
    model["trunk"].eval()
    with pytest.raises(RecipeError, match=r"'trunk.layer1' stays in evaluation mode"):
        modifier("domain:dsu", layers=["layer1"]).attach(model, 10)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "settings", [{"p": 2.0}, {"layers": []}, {"scale": -1.0}, {"layout": "nchw"}, {"probability": 1}]
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        modifier("domain:dsu", **settings)


def recipe(**changes: Any) -> Any:
    values = {
        "name": "test",
        "encoder": {"use": "core:timm", "model": RESNET_MODEL, "image_size": 16},
        "objective": {"use": "core:softmax"},
        "dataset": {"use": "core:digits", "split": "test"},
        "modifier": [{"use": "domain:dsu", "p": 0.5, "layers": ["conv1", "layer1"]}],
        "train": {"epochs": 1, "batch_size": 48, "lr": 1e-3, "seed": 3, "device": "cpu", "checkpoint_every": 3},
    }
    return resolve_recipe({**values, **changes}, "test", [])


def test_a_run_that_was_stopped_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(recipe(), tmp_path / "whole")
    original = FeatureStatisticsUncertainty.forward
    calls = iter(range(10**6))

    def fail_later(self: FeatureStatisticsUncertainty, x: torch.Tensor) -> torch.Tensor:
        if next(calls) == 9:  # two points per step: in step 5, after the checkpoint of step 3
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(FeatureStatisticsUncertainty, "forward", fail_later)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), tmp_path / "stopped")
    monkeypatch.undo()
    resumed = train(recipe(), tmp_path / "stopped", resume=True)
    assert resumed.steps == whole.steps == 7
    weights = [(run / "encoder" / "weights.safetensors").read_bytes() for run in (whole.run_dir, resumed.run_dir)]
    assert weights[0] == weights[1]
    plain = train(recipe(modifier=[]), tmp_path / "plain")
    assert (plain.run_dir / "encoder" / "weights.safetensors").read_bytes() != weights[0]


def test_a_name_without_a_layer_ends_the_recipe_before_it_starts(tmp_path: Path) -> None:
    wrong = recipe(modifier=[{"use": "domain:dsu", "layers": ["lager1"]}])
    with pytest.raises(RecipeError, match=r"'lager1'.*layer1"):
        train(wrong, tmp_path / "run")
