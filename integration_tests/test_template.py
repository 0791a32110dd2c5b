"""What ``bowerbird new-plugin`` writes is a third-party plugin that is built, installed, tested and used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bowerbird.cli.new_plugin import KINDS, create_plugin


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin of each kind: scaffolded, built as a wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("template")
    for kind in KINDS:
        project = create_plugin(f"acme-{kind}", kind=kind, output=folder / "projects")
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "wheels"), cwd=project)
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    installer = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    wheels = [str(path) for path in sorted((folder / "wheels").glob("*.whl"))]
    assert len(wheels) == len(KINDS)
    run(*installer, "install", "--quiet", "--no-deps", "--target", str(folder / "site"), *wheels)
    return folder


def bowerbird(site: Path, *arguments: str) -> str:
    code = "from bowerbird.cli import main; main(prog_name='bowerbird')"
    return run(sys.executable, "-c", code, *arguments, PYTHONPATH=str(site / "site")).stdout


def test_the_tests_of_every_kind_are_green(site: Path) -> None:
    projects = [str(site / "projects" / f"bowerbird-acme-{kind}" / "tests") for kind in KINDS]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error"]
    result = run(sys.executable, "-m", "pytest", *options, *projects, cwd=site, PYTHONPATH=str(site / "site"))
    assert "passed" in result.stdout and "failed" not in result.stdout and "skipped" not in result.stdout


def test_the_installed_plugins_are_listed_shown_and_sound(site: Path) -> None:
    data = json.loads(bowerbird(site, "list", "--json"))
    plugins = {plugin["name"]: plugin for plugin in data["plugins"]}
    names = {record["name"] for record in data["records"]}
    for kind, (method, *_) in KINDS.items():
        assert plugins[f"acme-{kind}"]["state"] == "ok" and plugins[f"acme-{kind}"]["detail"] == ""
        assert f"acme-{kind}:{method}" in names
    assert "embed_dim" in bowerbird(site, "show", "acme-encoder:tiny")
    assert "bowerbird-acme-objective 0.1.0" in bowerbird(site, "show", "acme-objective:tiny")


def test_a_recipe_trains_the_scaffolded_encoder_with_the_scaffolded_objective_and_data(site: Path) -> None:
    (site / "recipe.toml").write_text(
        'name = "acme"\n'
        '[encoder]\nuse = "acme-encoder:tiny"\nembed_dim = 16\nimage_size = 16\n'
        '[objective]\nuse = "acme-objective:tiny"\n'
        '[dataset]\nuse = "acme-dataset:shapes"\nitems = 60\nsize = 16\nsplit = "train"\n'
        "[train]\nepochs = 1\nbatch_size = 20\nseed = 0\n"
    )
    bowerbird(site, "train", str(site / "recipe.toml"), "--out", str(site / "run"))
    assert list((site / "run").rglob("*.safetensors"))


def test_the_scaffold_passes_its_own_lint(site: Path) -> None:
    ruff = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if ruff is None:
        pytest.skip("ruff is not installed")
    for kind in KINDS:
        project = site / "projects" / f"bowerbird-acme-{kind}"
        run(ruff, "check", "--no-cache", ".", cwd=project)
        run(ruff, "format", "--no-cache", "--check", ".", cwd=project)
