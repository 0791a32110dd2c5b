"""Pages of the documentation whose blocks are executed. Helpers beside the tests can be imported by their names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

BLOCK = re.compile(r'^```(python|bash|toml)(?: title="([^"]+)")?\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.fixture
def run_page(tmp_path: Path) -> Callable[[Path], list[str]]:
    """Executes the blocks of a page in order in ``tmp_path``; blocks with a title are written as files.

    Returns what each block printed. `bowerbird` and `python` are those of this environment.
    """
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, arguments in (("bowerbird", "-m bowerbird "), ("python", "")):
        (binaries / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        (binaries / name).chmod(0o755)
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}

    def run(page: Path) -> list[str]:
        outputs = []
        for language, title, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if title:
                (tmp_path / title).write_text(text)
                continue
            line = ["sh", "-e", "-c", text] if language == "bash" else [sys.executable, "-c", text]
            result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
            assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
            outputs.append(result.stdout)
        return outputs

    return run
