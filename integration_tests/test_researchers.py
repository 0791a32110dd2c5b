"""The researcher's page is executed, block by block; the standing comparison is what the committed results say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "researchers.md"


@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a POSIX shell")
def test_every_block_of_the_page_runs_and_the_own_objective_stands_in_the_table(
    tmp_path: Path, run_page: Callable[[Path], list[str]]
) -> None:
    outputs = run_page(PAGE)
    assert re.search(r"\| mine:pull / core:compatible \| 0\.\d", "\n".join(outputs))
    table = (tmp_path / "bench-mine" / "results.md").read_text()
    assert "pull-10 / core:compatible" in table and "bct-1 / core:compatible" in table
    whole = (tmp_path / "bench" / "results.md").read_text()
    for method in ("bct", "ract", "unibct", "bict", "bt2"):
        assert re.search(rf"\| {method} / core:compatible \| 0\.\d", whole), f"{method} has no numbers:\n{whole}"
    for strategy in ("compat:rank-merge", "compat:adapter", "compat:lift", "compat:reverse-transform", "core:full"):
        assert re.search(rf"\| free / {strategy} \| 0\.\d", whole), f"{strategy} has no numbers:\n{whole}"


def test_the_standing_comparison_is_what_the_committed_results_give() -> None:
    script = ROOT / "benchmarks" / "upgrade" / "table.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_results_of_the_benchmark_have_at_least_five_seeds_of_every_scenario() -> None:
    files = sorted((ROOT / "benchmarks" / "upgrade" / "results").glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        assert not result["quick"]
        for scenario in result["scenarios"]:
            seeds = {cell["seed"] for cell in result["cells"] if cell["scenario"] == scenario}
            assert len(seeds) >= 5, f"{file.name}: {scenario} has seeds {sorted(seeds)}"
