"""docs/claims.md says what the committed results say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "claims" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("claims_table", ROOT / "benchmarks" / "claims" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_claims_is_what_the_results_give(table: ModuleType) -> None:
    results = [json.loads(file.read_text()) for file in RESULTS]
    assert results
    assert (ROOT / "docs" / "claims.md").read_text() == table.page(results)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_belong_to_the_committed_plan_and_have_at_least_five_seeds(file: Path) -> None:
    result = json.loads(file.read_text())
    plan = (ROOT / "benchmarks" / "claims" / f"{file.stem}.toml").read_bytes()
    assert result["plan_sha256"] == hashlib.sha256(plan).hexdigest(), "the plan was changed after the run"
    assert len(set(result["seeds"])) >= 5
    assert all(len(values) == len(result["seeds"]) for values in result["values"].values())
