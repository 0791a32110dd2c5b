"""The plan for a large gallery follows its formulas, and docs/scale.md says what the committed results say."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_plan", ROOT / "benchmarks" / "scale_plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale_plan"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def constants(scale: ModuleType) -> object:
    return scale.Constants(catalogue_bytes=70, index_bytes=9, join_s=1e-5, add_per_s=1e5, verify_per_s=5e5)


def test_a_plan_is_what_the_formulas_give_by_hand(scale: ModuleType, constants: object) -> None:
    scenario = scale.Scenario(
        items=25_000_000, old_dim=100, new_dim=200, number_bytes=2, indexed_bytes=4, share=0.2, workers=10,
        worker_rate=50.0, item_bytes=1e5, host_bits=1e9, task_items=500, k=10, flops=1e10, disk_bytes_per_s=1e8,
        machine_ram=8e9, machine_disk=1e10,
    )  # fmt: skip
    found = scale.plan(scenario, constants)
    assert found["shards"] == 3
    assert found["old_vector_bytes"] == 25e6 * 208 and found["new_vector_bytes"] == 25e6 * 408
    assert found["catalogue_bytes"] == 25e6 * 70
    index = 25e6 * (0.8 * 409 + 0.2 * 809)
    assert found["index_ram_bytes"] == pytest.approx(index + 1e7 * 809)
    assert found["index_ram_bytes_blue_green"] == 25e6 * (409 + 809)
    assert found["machines_by_ram"] == 3  # 20.3 GB over 8 GB
    assert found["disk_bytes_until_finish"] == pytest.approx(25e6 * (208 + 408 + 70) + index)
    assert found["machines_by_disk"] == 3
    assert found["encode_hours"] == pytest.approx(25e6 / 500 / 3600)
    assert found["network_host_hours"] == pytest.approx(25e6 * 8e5 / 1e9 / 3600)
    assert found["hosts_for_the_network"] == 1
    assert found["commits"] == 50_000 and found["commits_per_shard_and_s"] == pytest.approx(1 / 3)
    assert found["transform_core_hours"] == pytest.approx(2 * 25e6 * 100 * 200 / 1e10 / 3600)
    assert found["transform_disk_hours"] == pytest.approx(25e6 * 616 / 1e8 / 3600)
    assert found["verify_process_hours"] == pytest.approx(50 / 3600)
    assert found["fan_in_bytes_per_query"] == 3 * 2 * 10 * 12
    assert found["join_ms_per_query"] == pytest.approx(0.06)


def test_more_migrated_means_more_of_the_wider_index(scale: ModuleType, constants: object) -> None:
    scenario = scale.Scenario(items=10**8, old_dim=128, new_dim=512)
    needed = [
        scale.plan(dataclasses.replace(scenario, share=share), constants)["index_ram_bytes"] for share in (0, 0.5, 1)
    ]
    assert needed[0] < needed[1] < needed[2]
    both = scale.plan(scenario, constants)["index_ram_bytes_blue_green"]
    assert needed[1] < both


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"items": 0}, {"worker_rate": -1.0}])
def test_a_plan_of_impossible_numbers_is_refused(scale: ModuleType, constants: object, wrong: dict) -> None:
    scenario = dataclasses.replace(scale.Scenario(items=10**6, old_dim=8, new_dim=8), **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        scale.plan(scenario, constants)


def test_the_page_of_scale_is_what_the_results_give(scale: ModuleType) -> None:
    assert (ROOT / "docs" / "scale.md").read_text() == scale.page()
