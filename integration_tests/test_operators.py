"""The operator's tutorial is executed, block by block."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"


@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a POSIX shell")
def test_every_block_of_the_tutorial_runs_and_going_back_gives_the_first_results(
    tmp_path: Path, run_page: Callable[[Path], list[str]]
) -> None:
    outputs = run_page(PAGE)
    first = outputs[0].partition("noto/angry-face-with-horns\n")[2]
    assert first and first in outputs[7], "after the rollback the search prints what it printed at the beginning"
    assert "Recommendation:" in outputs[1] and (tmp_path / "plan.svg").is_file()
    assert "complete: moved 448 items" in outputs[8] and "finished: 448 items" in outputs[8]
    assert "lifted" in outputs[9] and (tmp_path / "matrix.svg").is_file()
    assert "448 in " in outputs[10]
