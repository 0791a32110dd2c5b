"""The pre-training tutorial is executed, block by block."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "pretraining.md"


@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a POSIX shell")
def test_every_block_of_the_tutorial_runs_and_pre_training_beats_the_first_weights(
    tmp_path: Path, run_page: Callable[[Path], list[str]]
) -> None:
    folders, training, comparison, gallery = run_page(PAGE)
    assert folders.split() == [str(digit) for digit in range(10)]
    assert "runs/mae" in training and "runs/saim" in training
    found = [json.loads(text) for text in re.findall(r"\{.*?\n\}", comparison, re.DOTALL)]
    first_weights, *runs = found
    assert len(runs) == 2, comparison
    assert max(run["mim:knn/top1@5"] for run in runs) > first_weights["mim:knn/top1@5"] + 0.03
    assert all(0.3 < run["mim:linear-probe/top1"] <= 1 for run in runs)
    hits = re.findall(r"(\d)/digits-\d+|(\d)/\S+\.png", gallery)
    assert hits and "".join(hits[0]) == "3", gallery  # the picture itself
    timing = json.loads((tmp_path / "runs" / "mae" / "timing.json").read_text())
    assert timing["steps"] > 250 and 0 <= timing["data_wait_share"] < 1
