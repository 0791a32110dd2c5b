"""``bowerbird new-plugin``: a whole distribution or none, with names that can be used."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from bowerbird.cli import main
from bowerbird.cli.new_plugin import KINDS, create_plugin
from bowerbird.errors import InputError
from bowerbird.records import API_VERSION


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_whole_distribution(kind: str, tmp_path: Path) -> None:
    folder = create_plugin("acme-3d", kind=kind, output=tmp_path)
    assert folder == tmp_path / "bowerbird-acme-3d"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "bowerbird-acme-3d"
    assert project["entry-points"]["bowerbird"] == {"acme-3d": "bowerbird_acme_3d.plugin"}
    assert all(
        d.startswith(("bowerbird-core", "torch", "pydantic", "numpy", "pillow")) for d in project["dependencies"]
    )
    for name in ("README.md", "LICENSE", "noxfile.py", ".gitignore", "tests/test_plugin.py"):
        assert (folder / name).stat().st_size > 0
    assert f'BOWERBIRD_API = "{API_VERSION}"' in (folder / "src/bowerbird_acme_3d/plugin.py").read_text()
    for path in folder.rglob("*"):
        assert path.suffix != ".tmpl"
        if path.is_file():
            assert "$" not in path.read_text() or path.name == "LICENSE", f"{path.name} has an unfilled placeholder"
        if path.suffix == ".py":
            ast.parse(path.read_text())


def test_the_plugin_module_imports_nothing_but_records_and_hooks(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = create_plugin(f"acme-{kind}", kind=kind, output=tmp_path)
        tree = ast.parse((folder / f"src/bowerbird_acme_{kind}/plugin.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert modules == {"__future__", "collections.abc", "bowerbird.hookspecs", "bowerbird.records"}


@pytest.mark.parametrize(
    "name", ["Acme", "acme_x", "-acme", "acme-", "a--b", "", "acme plugin", "../acme", "x" * 41, "ä"]
)
def test_a_name_that_cannot_be_used_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no plugin name"):
        create_plugin(name, output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_prefix_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bowerbird new-plugin acme"):
        create_plugin("bowerbird-acme", output=tmp_path)


def test_the_name_of_an_installed_plugin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'core' is taken by bowerbird-core"):
        create_plugin("core", output=tmp_path)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "bowerbird-acme"
    folder.mkdir()
    (folder / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists and is not empty"):
        create_plugin("acme", output=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["bowerbird-acme", "precious.txt"]
    (folder / "precious.txt").unlink()
    assert create_plugin("acme", output=tmp_path) == folder  # an empty folder is fine


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full_disk(self: Path, text: str, **kwargs: str) -> None:
        written.append(self)
        if len(written) == 4:
            raise OSError(28, "No space left on device", str(self))
        self.write_bytes(text.encode())

    monkeypatch.setattr(Path, "write_text", full_disk)
    result = CliRunner().invoke(main, ["new-plugin", "acme", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_to_do_next(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["new-plugin", "acme", "--kind", "dataset", "--output", str(tmp_path)])
    assert result.exit_code == 0
    assert str(tmp_path / "bowerbird-acme") in result.output and "bowerbird show acme:shapes" in result.output
