"""The tutorial for plugin authors is executed, block by block; the page of hooks is what the code says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs/plugin-authors/tutorial.md"
BLOCK = re.compile(r'^```(python|bash)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A folder in front of PATH whose `bowerbird` and `python` are those of this environment.

    ``pip install -e .`` is replaced by what leaves the environment that runs the tests as it is: the wheel is built and
    installed into a folder on PYTHONPATH.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    python = shlex.quote(sys.executable)
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    pip = f"{shlex.quote(uv)} pip" if uv else f"{python} -m pip"
    site = shlex.quote(str(tmp_path / "site"))
    scripts = {
        "bowerbird": f'exec {python} -c "from bowerbird.cli import main; main(prog_name=\'bowerbird\')" "$@"',
        "python": f'if [ "$1 $2 $3" = "-m pip install" ]; then\n'
        f"  {python} -m hatchling build -t wheel -d wheels > /dev/null 2>&1 &&\n"
        f"  exec {pip} install --quiet --no-deps --target {site} wheels/*.whl\n"
        f'fi\nexec {python} "$@"',
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a POSIX shell")
def test_every_block_of_the_tutorial_runs(tmp_path: Path, shell: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "PATH": f"{shell}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    blocks = BLOCK.findall(TUTORIAL.read_text(encoding="utf-8"))
    assert len(blocks) >= 6
    outputs = []
    for language, title, text in blocks:
        if title:
            (work / title).write_text(text)
            continue
        command = ["sh", "-e", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        env = environment if language == "bash" else {**environment, "BOWERBIRD_PLUGIN": str(work / "my_idea.py")}
        result = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
        outputs.append(result.stdout)
    everything = "\n".join(outputs)
    assert "my_idea:every-other" in everything
    assert "everything is fine" in everything
    assert "acme:tiny  (objective)" in everything
    assert everything.count(" passed") == 2 and "failed" not in everything


def test_the_page_of_hooks_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from hooks_page import hooks_page

    page = (ROOT / "docs/plugin-authors/hooks.md").read_text(encoding="utf-8")
    assert page == hooks_page(), "run: python docs/generate.py"


def test_every_hook_and_every_field_of_a_record_is_on_the_page_and_explained() -> None:
    import dataclasses

    from bowerbird import hookspecs, records

    page = (ROOT / "docs/plugin-authors/hooks.md").read_text(encoding="utf-8")
    for name in vars(hookspecs):
        if name.startswith("bowerbird_"):
            assert f"### `{name}`" in page
    for record_type in records.RECORD_TYPES:
        for field in dataclasses.fields(record_type):
            rows = [line for line in page.splitlines() if line.startswith(f"| `{field.name}` |")]
            assert rows and all(row.split(" | ")[3].strip(" |") for row in rows), f"{field.name} has no meaning: {rows}"
