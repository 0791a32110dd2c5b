"""The methods of compatible training in the worlds of ``bowerbird benchmark upgrade``, beyond digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bowerbird.benchmark.cell import Cell
from bowerbird.benchmark.methods import COMPATIBLE, NAIVE, select
from bowerbird.benchmark.scenarios import PROFILES
from bowerbird.benchmark.worlds import make_world


def run(plan: Mapping[str, Any], seed: int) -> dict[str, float]:
    """``world.scenario.arm.metric``: mAP and shares of one seed."""
    methods = {method.name: method for method in select(["bct", "contra", "ract", "unibct", "bict", "bt2"]).methods}
    values: dict[str, float] = {}
    for name, scenarios in plan["worlds"].items():
        profile = PROFILES[scenarios["dataset"]]
        trunk = profile.trunks[0]
        world = make_world(scenarios["dataset"], seed, trunk=trunk, **profile.sizes)
        views = {trunk: (world.train, world.queries, world.gallery)}
        for scenario in ("extended", "open"):
            cell = Cell(world, views, scenarios[scenario], profile, seed)
            made = {"star": ([cell.free(0), cell.free(1)], NAIVE)}
            made |= {arm: (cell.compatible(method), COMPATIBLE) for arm, method in methods.items()}
            made["bict-lift"] = (made["bict"][0], "compat:lift")
            values[f"{name}.{scenario}.old.self"] = cell.levels()["old_old"][0]
            for arm, (models, strategy) in made.items():
                row = cell.measure(models, strategy)
                found = {"cross": row["start"][0], "self": row["end"][0], "nfr": row["max_nfr"]}
                values |= {f"{name}.{scenario}.{arm}.{key}": value for key, value in found.items()}
    return values
