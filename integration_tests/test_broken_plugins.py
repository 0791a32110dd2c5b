"""Distributions that are broken in different ways are installed together; the tool survives and names each of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

BROKEN = Path(__file__).parent / "broken_plugins"
NAMES = sorted(folder.name for folder in BROKEN.iterdir() if (folder / "pyproject.toml").exists())

# distribution -> (state of the plugin, words of its one line)
EXPECTED = {
    "bad-record": ("broken", "role 'indx' is not one of", "Did you mean 'index'"),
    "duplicate-one": ("broken", "claimed by", "broken-duplicate-one 0.1.0", "broken-duplicate-two 0.1.0"),
    "duplicate-two": ("broken", "claimed by", "broken-duplicate-one 0.1.0", "broken-duplicate-two 0.1.0"),
    "foreign-name": ("broken", "'core:timm'", "'foreign-name:<method>'"),
    "hook-raises": ("broken", "half way through the catalogue"),
    "import-error": ("broken", "a_library_that_nobody_has"),
    "misspelt-hook": ("broken", "no hook 'bowerbird_encoder'", "Did you mean 'bowerbird_encoders'"),
    "missing-api": ("broken", "declares no hook API"),
    "no-target": ("ok",),  # found when somebody asks for the method, or by `doctor`
    "other-major": ("incompatible", "needs hook API 2.0"),
    "returns-nothing": ("broken", "returned None; it must yield records"),
    "syntax-error": ("broken", "SyntaxError"),
    "system-exit": ("broken", "SystemExit", "goodbye"),
    "takes-core": ("broken", "belongs to bowerbird-core"),
    "wrong-api": ("incompatible", "needs hook API 1.7, core provides 1.0. Upgrade bowerbird-core"),
    "wrong-signature": ("broken", "device"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them on one path, laid out as an installer leaves them (their wheels hold one module and metadata)."""
    site = tmp_path_factory.mktemp("site")
    for folder in NAMES:
        project = tomllib.loads((BROKEN / folder / "pyproject.toml").read_text())
        for module in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
            shutil.copy(BROKEN / folder / module, site)
        metadata = project["project"]
        info = site / f"{metadata['name'].replace('-', '_')}-{metadata['version']}.dist-info"
        info.mkdir()
        name, version, description = (metadata[key] for key in ("name", "version", "description"))
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n\n{description}\n")
        lines = [f"{key} = {value}" for key, value in metadata["entry-points"]["bowerbird"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[bowerbird]", *lines]) + "\n")
    return site


def bowerbird(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from bowerbird.cli import main; main(prog_name='bowerbird')"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        timeout=120,
    )


@pytest.fixture(scope="module")
def listed(site: Path) -> dict[str, dict[str, str]]:
    """Distribution (without its prefix) -> the status that ``list --json`` gives."""
    result = bowerbird(site, "list", "--json")
    assert result.returncode == 0, result.stderr
    return {s["distribution"].removeprefix("broken-"): s for s in json.loads(result.stdout)["plugins"]}


def test_every_broken_plugin_here_is_expected() -> None:
    assert sorted(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_listed_with_its_distribution_and_the_reason(name: str, listed: dict[str, dict[str, str]]) -> None:
    state, *words = EXPECTED[name]
    assert listed[name]["state"] == state
    for word in words:
        assert word in listed[name]["detail"]
    assert bool(listed[name]["traceback"]) == (state != "ok")


def test_the_list_survives_with_one_line_per_bad_plugin(site: Path) -> None:
    result = bowerbird(site, "list")
    assert result.returncode == 0, result.stderr
    assert "core:exact" in result.stdout and "Traceback" not in result.stdout + result.stderr
    lines = result.stdout.splitlines()
    for name in NAMES:
        if EXPECTED[name][0] != "ok":
            (line,) = [line for line in lines if f"(broken-{name} 0.1.0)" in line]
            assert line in lines[-len(NAMES) :], "bad plugins stand at the end"


def test_doctor_shows_every_traceback_and_ends_with_exit_code_1(site: Path) -> None:
    result = bowerbird(site, "doctor")
    assert result.returncode == 1
    for words in (
        "half way through the catalogue",
        "SystemExit: goodbye",
        "No module named 'a_library_that_nobody_has'",
    ):
        assert f"    | {words}" in result.stdout or words in result.stdout
    assert result.stdout.count("Traceback (most recent call last)") >= 8
    assert "no-target:tiny (encoder) broken: target 'broken_no_target_missing.deep:Encoder'" in result.stdout
    assert "core (bowerbird-core" in result.stdout


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("import-error:tiny", ["broken-import-error 0.1.0", "a_library_that_nobody_has", "bowerbird doctor"]),
        ("system-exit:tiny", ["broken-system-exit 0.1.0", "goodbye"]),
        ("wrong-api:tiny", ["broken-wrong-api 0.1.0", "incompatible", "Upgrade bowerbird-core"]),
        ("duplicate:tiny", ["broken-duplicate-one", "broken-duplicate-two"]),
    ],
)
def test_asking_for_a_method_of_a_broken_plugin_says_whose_fault_it_is(
    site: Path, method: str, words: list[str]
) -> None:
    result = bowerbird(site, "show", method)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert "Traceback" in bowerbird(site, "--debug", "show", method).stderr


def test_a_target_that_does_not_exist_names_the_import_string_when_it_is_loaded(site: Path) -> None:
    code = (
        "from bowerbird.errors import PluginError\n"
        "from bowerbird.registry import get_registry\n"
        "registry = get_registry()\n"
        "try: registry.load(registry.get('encoder', 'no-target:tiny'))\n"
        "except PluginError as e: print(e, '|', type(e.__cause__).__name__)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert "(broken-no-target 0.1.0)" in result.stdout and "broken_no_target_missing.deep:Encoder" in result.stdout
    assert result.stdout.strip().endswith("| ModuleNotFoundError")


def test_core_is_not_harmed_by_any_of_them(site: Path) -> None:
    result = bowerbird(site, "show", "core:exact")
    assert result.returncode == 0 and "bowerbird-core" in result.stdout


def test_strict_mode_stops_at_the_first_and_disabling_skips_them(site: Path) -> None:
    strict = bowerbird(site, "list", BOWERBIRD_STRICT_PLUGINS="1")
    assert strict.returncode == 2 and "BOWERBIRD_STRICT_PLUGINS" in strict.stderr
    names = {key for name in NAMES for key in _entry_points(name)} - {"core"}
    result = bowerbird(site, "list", "--json", BOWERBIRD_DISABLE_PLUGINS=",".join(names))
    states = {s["name"]: s["state"] for s in json.loads(result.stdout)["plugins"]}
    assert {states[name] for name in names} == {"disabled"}


def _entry_points(name: str) -> list[str]:
    return list(tomllib.loads((BROKEN / name / "pyproject.toml").read_text())["project"]["entry-points"]["bowerbird"])
