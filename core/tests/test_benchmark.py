"""The benchmark of upgrades: what is compared, resumed and refused. Core alone, with an objective of this module."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict
from torch.nn import functional

from bowerbird.benchmark.methods import FREE, select
from bowerbird.benchmark.report import summarise
from bowerbird.benchmark.run import run_benchmark
from bowerbird.benchmark.scenarios import PROFILES, SCENARIOS, plans
from bowerbird.benchmark.worlds import make_world
from bowerbird.cli import main
from bowerbird.errors import InputError, RecipeError, UnknownNameError
from bowerbird.hookspecs import hookimpl
from bowerbird.objectives.configs import SoftmaxConfig
from bowerbird.objectives.softmax import Softmax
from bowerbird.protocols import LossOutput, freeze
from bowerbird.records import ObjectiveRecord
from bowerbird.registry import get_registry

BOWERBIRD_API = "1.0"


class CopyConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    old_run: str | None = None
    weight: float = 30.0
    fails: bool = False


class Copy(Softmax):
    """Softmax, and the new embedding follows the old one."""

    @classmethod
    def build(cls, config: Any, encoder: Any, context: Any) -> Any:
        if config.fails:
            raise RecipeError("test_benchmark:copy does not want to")
        self = super().build(SoftmaxConfig(), encoder, context)
        self.follow, self.weight = freeze(context.load_run(config.old_run).encoder), config.weight
        return self

    def forward(self, batch: Any) -> LossOutput:
        old, new = self.follow(batch).pooled, self.encoder(batch).pooled
        width = min(old.shape[1], new.shape[1])
        apart = 1 - functional.cosine_similarity(old[:, :width], new[:, :width]).mean()
        return LossOutput(super().forward(batch).total + self.weight * apart)


@hookimpl
def bowerbird_objectives() -> Iterator[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="test_benchmark:copy", target="test_benchmark:Copy", config="test_benchmark:CopyConfig", summary="A copy.",
        needs=("image", "label"),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    get_registry().register_module("test_benchmark", sys.modules[__name__])
    yield
    get_registry().unregister("test_benchmark")


def quick(out: Path, **more: Any) -> dict[str, Any]:
    settings = {"scenarios": ["extended-data"], "methods": ["copy", "core:full", "no-strategy"], "quick": True}
    return run_benchmark(out, **{**settings, **more})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    get_registry().register_module("test_benchmark", sys.modules[__name__])
    out = tmp_path_factory.mktemp("benchmark") / "out"
    try:
        return out, quick(out, seeds=[0, 1])
    finally:
        get_registry().unregister("test_benchmark")


def test_an_objective_with_old_run_takes_part_by_itself() -> None:
    names = [method.name for method in select().methods]
    assert "test_benchmark:copy" in names
    assert "core:softmax" not in names


def test_a_model_that_follows_the_old_one_is_compatible_and_a_free_one_is_not(finished: Any) -> None:
    rows = finished[1]["summary"]["digits"]["extended-data"]
    copy, free = rows["test_benchmark:copy / core:compatible"], rows[f"{FREE} / no-strategy"]
    apart = [abs(row["new/old"]["mean"] - row["old/old"]["mean"]) for row in (copy, free)]
    assert apart[0] < apart[1] / 2, "what follows the old model finds in its gallery what the old model finds"
    assert copy["P_comp"]["mean"] > free["P_comp"]["mean"]


def test_full_has_the_old_level_as_its_area_and_the_new_one_as_its_end(finished: Any) -> None:
    row = finished[1]["summary"]["digits"]["extended-data"][f"{FREE} / core:full"]
    assert row["area"]["mean"] == pytest.approx(row["old/old"]["mean"])
    assert row["gain"]["mean"] == pytest.approx(0)
    assert row["P_up"]["mean"] == pytest.approx(0.5), "the free new model is its own ceiling"


def test_the_area_of_a_row_is_the_trapezoid_of_its_curve(finished: Any) -> None:
    cell = finished[1]["cells"][0]
    for name, row in cell["rows"].items():
        if name.endswith("core:full"):
            continue  # it steps at the very end
        assert row["area"][0] == pytest.approx(np.trapezoid(row["quality"], row["shares"]), abs=1e-6)
        assert row["area"][1] <= row["area"][0] <= row["area"][2]
        assert row["max_nfr"] == max(row["nfr"])


def test_the_summary_is_the_mean_over_seeds_with_its_spread(finished: Any) -> None:
    result = finished[1]
    name = "test_benchmark:copy / core:compatible"
    areas = [cell["rows"][name]["area"][0] for cell in result["cells"]]
    area = summarise(result["cells"])["digits"]["extended-data"][name]["area"]
    assert area["seeds"] == 2
    assert area["mean"] == pytest.approx(np.mean(areas), abs=1e-5)
    assert area["spread"] == pytest.approx(np.std(areas, ddof=1), abs=1e-5)
    assert area["low"] < area["mean"] < area["high"]


def test_one_seed_without_room_for_a_gain_does_not_decide_the_mean_gain() -> None:
    def cells(*ends: float) -> list[dict[str, Any]]:
        """Cells of seeds whose curve is a straight line from 0.4 to ``end``."""
        return [
            {
                "dataset": "digits", "scenario": "extended-data",
                "levels": {"old_old": [0.4] * 3, "free_free": [0.7] * 3},
                "rows": {"a": {
                    "start": [0.4] * 3, "end": [end] * 3, "area": [(0.4 + end) / 2] * 3, "max_nfr": [0.1] * 3,
                }},
            }
            for end in ends
        ]  # fmt: skip

    def gain(*ends: float) -> dict[str, Any]:
        return summarise(cells(*ends))["digits"]["extended-data"]["a"]["gain"]

    bent = cells(0.60, 0.62, 0.64, 0.61, 0.63, 0.401)
    bent[-1]["rows"]["a"]["area"] = [0.39] * 3  # a ratio of -10
    straight, found = gain(0.60, 0.62, 0.64, 0.62), summarise(bent)["digits"]["extended-data"]["a"]["gain"]
    assert straight["low"] == straight["mean"] == straight["high"] == pytest.approx(0.5)
    assert 0.4 < found["mean"] < 0.5 and found["low"] > 0
    assert gain(0.45, 0.35, 0.38, 0.43)["mean"] is None, "no new model that is better, no share of its gain"


def test_the_folder_holds_tables_a_page_and_the_numbers(finished: Any) -> None:
    out, result = finished
    assert json.loads((out / "results.json").read_text())["summary"] == result["summary"]
    table = (out / "results.md").read_text()
    assert "| test_benchmark:copy / core:compatible | 0." in table and "Quick run" in table
    page = (out / "index.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "the upgrade begins (for rank merge that is" in page, "a paragraph is one, however it is wrapped"
    assert "<code>" in page and "`" not in page.partition("<figure>")[0]


def test_a_run_is_continued_and_only_what_is_missing_is_measured(finished: Any) -> None:
    out, _ = finished
    file = out / "cells" / "digits-extended-data-0.json"
    cell = json.loads(file.read_text())
    kept = cell["rows"].pop("test_benchmark:copy / core:compatible")
    cell["rows"][f"{FREE} / core:full"]["area"] = [0.5, 0.5, 0.5]  # a mark: it must not be measured again
    file.write_text(json.dumps(cell))
    again = quick(out, seeds=[0])["cells"][0]["rows"]
    assert again[f"{FREE} / core:full"]["area"] == [0.5, 0.5, 0.5]
    for key in ("start", "end", "area", "nfr"):
        assert again["test_benchmark:copy / core:compatible"][key] == kept[key], "the same seed gives the same numbers"


def test_other_settings_of_a_method_are_measured_again(tmp_path: Path, finished: Any) -> None:
    variants = tmp_path / "variants.toml"
    variants.write_text(
        '[[method]]\nname = "weak"\nobjective = "test_benchmark:copy"\nsettings = { weight = 0.0 }\n'
        '[[method]]\nname = "refuses"\nobjective = "test_benchmark:copy"\nsettings = { fails = true }\n'
    )
    rows = quick(finished[0], seeds=[1], methods=["weak", "refuses"], config=variants)["cells"][0]["rows"]
    assert set(rows) == {"weak / core:compatible", "refuses / core:compatible"}
    assert "does not want to" in rows["refuses / core:compatible"]["unavailable"]
    assert "not possible here" in (finished[0] / "results.md").read_text()


def test_folders_of_others_and_unknown_names_are_refused(tmp_path: Path, finished: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no benchmark"):
        quick(tmp_path)
    with pytest.raises(InputError, match="with --quick"):
        quick(finished[0], quick=False)
    with pytest.raises(UnknownNameError, match=r"no scenario 'open-class'.*open-classes"):
        quick(tmp_path / "out", scenarios=["open-class"])
    with pytest.raises(UnknownNameError, match="no method or strategy 'coppy'"):
        quick(tmp_path / "out", methods=["coppy"])
    with pytest.raises(UnknownNameError, match="core:fashion-mnist"):
        quick(tmp_path / "out", datasets=["core:fashion"])


def test_a_damaged_file_of_methods_is_refused_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "methods.toml"
    file.write_text('[[method]]\nname = "x"\nobjectiv = "y"\n')
    with pytest.raises(InputError, match=r"methods\.toml.*objective"):
        select(config=file)


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_every_scenario_is_what_its_name_says(scenario: str) -> None:
    world = make_world("digits", 3)
    made = plans(scenario, world, PROFILES["digits"], 3)
    old, new = made[0], made[-1]
    classes = [set(world.train_labels[plan.rows].tolist()) for plan in (old, new)]
    assert len(made) == (3 if scenario == "sequence" else 2)
    if scenario == "open-classes":
        assert not classes[0] & classes[1]
        assert classes[0] | classes[1] == set(range(10))
    else:
        assert set(old.rows.tolist()) < set(new.rows.tolist())
    if scenario == "extended-classes":
        assert len(classes[0]) == PROFILES["digits"].old_classes
        assert all((world.train_labels == c).sum() == (world.train_labels[old.rows] == c).sum() for c in classes[0])
    if scenario == "new-architecture":
        assert (new.width, new.embed_dim, new.depth) > (old.width, old.embed_dim, old.depth)
    if scenario == "new-loss":
        assert (old.objective, new.objective) == ("core:supcon", "core:softmax")


def test_a_world_is_drawn_by_its_seed_and_its_parts_are_disjoint() -> None:
    one, same, other = (make_world("core:digits", seed) for seed in (4, 4, 5))
    assert np.array_equal(one.train, same.train) and not np.array_equal(one.queries, other.queries)
    rows = [tuple(row) for part in (one.train, one.queries, one.gallery) for row in part]
    assert len(rows) == len(set(rows)) == 1797


def test_the_command_compares_and_says_where_the_tables_are(tmp_path: Path) -> None:
    arguments = ["benchmark", "upgrade", "--quick", "--scenario", "extended-data", "--method", "core:full,copy"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "test_benchmark:copy / core:compatible" in result.output
    assert str(tmp_path / "out" / "results.md") in result.output
