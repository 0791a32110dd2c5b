"""What holds for every objective of the package: interruption, and two processes instead of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import every_objective
import numpy as np
import pytest
import torch
from every_objective import OBJECTIVES, recipe, run_folder
from safetensors.torch import load_file
from torch import Tensor

from bowerbird.encoders.bundle import load_encoder
from bowerbird.recipe import resolve_recipe
from bowerbird.records import ObjectiveRecord
from bowerbird.registry import get_registry
from bowerbird.testing.gloo import run_two_ranks
from bowerbird.train.checkpoint import latest_checkpoint
from bowerbird.train.loop import train


def additive() -> list[str]:
    found = []
    for record in get_registry().records("objective"):
        assert isinstance(record, ObjectiveRecord)
        if record.name.startswith("mim:") and record.batch_additive:
            found.append(record.name)
    return found


def weights(run: Path) -> dict[str, Tensor]:
    path = latest_checkpoint(run / "checkpoints")
    assert path is not None
    return load_file(path / "objective.safetensors")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_objective_of_the_package_is_here() -> None:
    names = {record.name for record in get_registry().records("objective") if record.name.startswith("mim:")}
    assert names == set(OBJECTIVES)


# ------------------------------------------------------------------------------------------------ interruption


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every objective trained undisturbed, killed, and resumed, by the command line."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(Path(every_objective.__file__)), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_killed_by_sigkill_resumes_to_the_same_bits(name: str, runs: Path) -> None:
    undisturbed, killed = (run_folder(name, kind, runs) for kind in ("undisturbed", "killed"))
    first, second = weights(undisturbed), weights(killed)
    assert first.keys() == second.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])]
    assert (undisturbed / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text()
    assert len(losses(undisturbed)) == 6
    assert load_encoder(undisturbed).fingerprint == load_encoder(killed).fingerprint


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_changes_the_weights_and_the_exported_encoder_encodes(name: str, runs: Path) -> None:
    run = run_folder(name, "undisturbed", runs)
    encoder = load_encoder(run)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    from PIL import Image

    vectors = encoder.encode([Image.fromarray(image) for image in images])
    assert vectors.shape == (3, encoder.dim)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-7)


# ------------------------------------------------------------------------------------------------ two processes

# Plain SGD: Adam divides by the size of the gradient, so that rounding would become a step of its own size.
SGD = {"optimizer": "sgd", "momentum": 0.0, "lr": 0.05, "epochs": 1, "weight_decay": 0.0}


def train_all(rank: int, folder: str, out: str, names: list[str]) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    from every_objective import register

    register()
    for name in names:
        train(resolve_recipe(recipe(name, Path(folder), **SGD)), Path(out) / name.removeprefix("mim:"))
    return 0


@pytest.fixture(scope="module")
def pairs(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    train_all(0, str(runs), str(one), additive())
    run_two_ranks(train_all, str(runs), str(two), additive(), timeout=400)
    return one, two


@pytest.mark.parametrize("name", additive())
def test_two_processes_give_what_one_gives_where_that_is_declared(name: str, pairs: tuple[Path, Path]) -> None:
    one, two = (folder / name.removeprefix("mim:") for folder in pairs)
    np.testing.assert_allclose(losses(one), losses(two), rtol=2e-4)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
