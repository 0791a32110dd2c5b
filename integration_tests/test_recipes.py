"""The committed recipes are valid, and those of the digits are trained, each as its header says."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from bowerbird.encoders import load_encoder
from bowerbird.recipe import load_recipe
from bowerbird.train.loop import train

RECIPES = Path(__file__).parents[1] / "recipes"
COMPATIBLE = ("bct", "ract", "unibct", "bict", "bt2")
FILES = sorted(RECIPES.glob("*.toml"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/digits-old`` and ``runs/digits-free``, a few epochs long."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("old", "free"):
        short(folder, f"digits-{name}")
    return folder


def short(folder: Path, name: str, *more: str) -> Path:
    """The recipe with few epochs, its evaluation left out."""
    recipe = load_recipe(RECIPES / f"{name}.toml", overrides=["train.epochs=3", "train.device=cpu", *more])
    recipe = recipe.model_copy(update={"evaluate": ()})
    assert train(recipe, folder / "runs" / name).finished
    return folder / "runs" / name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_is_named_like_its_file_and_its_header_names_the_command(file: Path) -> None:
    data = tomllib.loads(file.read_text())
    assert data["name"] == file.stem
    assert f"bowerbird train recipes/{file.name}" in file.read_text()
    load_recipe(file)


@pytest.mark.parametrize("method", COMPATIBLE)
def test_a_recipe_of_a_compatible_method_trains_and_registers_its_relation_with_the_old_space(
    method: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    settings = ["objective.refresh_epochs=[1, 2]"] if method == "unibct" else []
    run = short(runs, f"digits-{method}", *settings)
    (relation,) = json.loads((run / "encoder" / "encoder.json").read_text())["relations"]
    assert relation["kind"] == "compatible"
    assert relation["to"] == load_encoder(runs / "runs/digits-old", device="cpu").fingerprint
    assert relation["evidence"]["method"] == f"compat:{method}"
