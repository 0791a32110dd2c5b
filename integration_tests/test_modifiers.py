"""Every modifier with an objective of every package: it trains, resumes to the same bits, and is gone afterwards."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bowerbird.data import subset
from bowerbird.data.digits import Digits
from bowerbird.encoders import load_encoder
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Dataset
from bowerbird.recipe import resolve_recipe
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry
from bowerbird.train.checkpoint import latest_checkpoint
from bowerbird.train.loop import RunResult, train

STEPS = 6
VIT = {
    "use": "mim:vit", "image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0
}  # fmt: skip
FCN = {"use": "domain:fcn", "widths": [8, 8, 8], "dilations": [1, 1, 1]}
DETECTOR = {
    "use": "detection:torchvision", "detector": "faster-rcnn", "backbone": "test_resnet", "fpn_width": 16,
    "head_width": 16, "proposals_train": 20, "proposals_test": 10, "rois": 8, "shorter_side": 32, "longer_side": 32,
}  # fmt: skip
PICTURES = {"use": "detection:canvases", "split": "train", "count": 24, "canvas_size": 32, "item_size": [10, 14]}
CLIPS = {
    "use": "videotext:dual-encoder", "image_size": 16, "patch_size": 8, "frames": 2, "embed_dim": 16, "depth": 2,
    "num_heads": 2, "text_dim": 16, "text_depth": 1, "text_heads": 2, "projection_dim": 16,
}  # fmt: skip
MOVING = {
    "use": "videotext:moving", "split": "train", "counts": {"train": 24, "val": 1, "test": 1}, "frames": 2, "size": 16,
    "sprite_size": [8, 10], "sprites": {"source": "core:digits", "split": "train"},
}  # fmt: skip
DIGITS = {"use": "few:digits"}
CANVASES = {"use": "domain:canvases", "split": "train", "count": 24}
HEADS = {"out_dim": 12, "head_hidden": 16, "head_bottleneck": 8, "local_size": 8, "local_crops": 2}

# objective -> encoder, settings, data set, settings of the training; one of every package at least
OBJECTIVES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "core:softmax": (VIT, {}, DIGITS, {"batch_size": 32}),
    "compat:bct": (VIT, {"old_run": "old", "old_classifier": "prototypes"}, DIGITS, {"batch_size": 32}),
    "mim:mae": (VIT, {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}, DIGITS, {"batch_size": 32}),
    "mim:dino": (VIT | {"position": "learned", "pooling": "class"}, HEADS, DIGITS, {"batch_size": 32}),
    "detection:detector": (DETECTOR, {}, PICTURES, {"batch_size": 8}),
    "domain:cdcl": (FCN, {}, CANVASES, {"batch_size": 8, "alternate": True}),
    "videotext:frozen": (CLIPS, {}, MOVING, {"batch_size": 8}),
}
SPARSE = {"target_density": 0.25, "warmup_fraction": 0.5, "adjust": False}
MODIFIERS: dict[str, dict[str, Any]] = {
    "sparsity:spartan": SPARSE,
    "sparsity:magnitude": SPARSE,
    "sparsity:top-k": SPARSE,
    "domain:dsu": {},
    "domain:mixstyle": {},
}
CASES = [(modifier, objective) for objective in OBJECTIVES for modifier in MODIFIERS]


@cache
def few_digits() -> Dataset:
    return subset(Digits.build(None, "test"), range(96))


class FewDigits:
    """96 digits: three steps per epoch."""

    @classmethod
    def build(cls, config: None, split: str | None) -> Dataset:
        return few_digits()


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="few:digits", target=f"{__name__}:FewDigits", summary="96 digits.", provides=("image", "label")
    )


class Interruption:
    """A plugin that stops the process's training in the middle, between two checkpoints."""

    BOWERBIRD_API = "1.0"

    @hookimpl
    def bowerbird_step_logged(self, step: int) -> None:
        if step == STEPS - 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", autouse=True)
def _few_digits() -> Iterator[None]:
    plugin = types.ModuleType("few")
    plugin.BOWERBIRD_API = "1.0"  # type: ignore[attr-defined]
    plugin.bowerbird_datasets = bowerbird_datasets  # type: ignore[attr-defined]
    sys.modules.setdefault(__name__, sys.modules[FewDigits.__module__])
    get_registry().register_module("few", plugin)
    torch.set_num_threads(1)
    yield
    get_registry().unregister("few")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the run of the old model that compat:bct needs."""
    path = tmp_path_factory.mktemp("modifiers")
    assert run("core:softmax", None, path, path / "old").finished
    return path


def run(objective: str, modifier: str | None, folder: Path, out: Path, *, resume: bool = False) -> RunResult:
    """Two epochs of three steps."""
    encoder, settings, dataset, training = OBJECTIVES[objective]
    if "old_run" in settings:
        settings = {**settings, "old_run": str(folder / settings["old_run"])}
    of_domain = modifier is not None and modifier.startswith("domain:")
    places = {"domain:cdcl": "network.2", "detection:detector": "model.backbone.body.model.layer1"}
    places["videotext:frozen"] = "video_encoder.blocks.0"
    more: dict[str, Any] = {"layers": [places.get(objective, "vit")]} if of_domain else {}
    if (encoder is DETECTOR or encoder is CLIPS) and not of_domain:
        more = {"allocation": "uniform"}  # by size of the weights whole heads would be left without any
    if dataset is MOVING:
        dataset = {**MOVING, "root": str(folder / "moving")}
    recipe = {
        "name": "small",
        "encoder": encoder,
        "objective": {"use": objective, **settings},
        "dataset": dataset,
        "modifier": [{"use": modifier, **MODIFIERS[modifier], **more}] if modifier else [],
        "train": {"epochs": 2, "lr": 1e-3, "log_every": 1, "checkpoint_every": 3, "device": "cpu", **training},
    }
    return train(resolve_recipe(recipe), out, resume=resume)


def checkpoint(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    return load_file(path / "objective.safetensors")


def due_is_of_all(objective: str) -> bool:
    """Whether the share is one of all weights together, not of every layer (rounded there)."""
    return objective not in ("detection:detector", "videotext:frozen")


def test_every_modifier_and_every_package_with_objectives_is_crossed() -> None:
    registry = get_registry()
    assert {record.name for record in registry.records("modifier")} == set(MODIFIERS)
    packages = {record.name.partition(":")[0] for record in registry.records("objective")}
    assert packages == {name.partition(":")[0] for name in OBJECTIVES}


@pytest.mark.parametrize(("modifier", "objective"), CASES)
def test_a_modified_run_resumes_to_the_same_bits_and_exports_a_plain_encoder(
    modifier: str, objective: str, folder: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = run(objective, modifier, folder, whole)
    assert result.finished and result.steps == STEPS
    registry = get_registry()
    registry.register_module("interruption", Interruption())  # type: ignore[arg-type]
    try:
        with pytest.raises(KeyboardInterrupt):
            run(objective, modifier, folder, broken)
    finally:
        registry.unregister("interruption")
    assert run(objective, modifier, folder, broken, resume=True).finished
    first, second = checkpoint(whole), checkpoint(broken)
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]

    encoder = load_encoder(whole, device="cpu")
    assert encoder.fingerprint == load_encoder(broken, device="cpu").fingerprint
    plain = resolve_recipe({
        "name": "plain", "encoder": OBJECTIVES[objective][0], "objective": {"use": "core:softmax"}, "dataset": DIGITS
    }) if objective not in ("domain:cdcl", "videotext:frozen") else None  # fmt: skip
    if plain is not None:
        from bowerbird.train.loop import build

        assert encoder.module.state_dict().keys() == build(plain.encoder, "encoder").state_dict().keys()
    assert not any("parametrizations" in key for key in encoder.module.state_dict())
    if modifier.startswith("sparsity:"):
        names = {key.partition(".parametrizations.")[0] for key in first if key.endswith("weight.0.signed")}
        assert names
        sparse = {
            f"{name}.{kind}": module.weight
            for name, module in encoder.module.named_modules()
            for kind in ("weight",)
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        }
        kept = sum(int((weight != 0).sum()) for weight in sparse.values())
        due = sum(weight.numel() for weight in sparse.values()) / 4
        assert abs(kept - due) <= (2 if due_is_of_all(objective) else len(sparse))
