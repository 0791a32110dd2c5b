"""The rows of the digits plans on Fashion-MNIST and emoji, and the rows that were on no set on digits.

Worlds, models and settings on the first two are those of ``bowerbird benchmark upgrade``; what is measured on them is
what the digits plans measure, by the same functions.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import arms
import numpy as np
import torch
import training_arms
from arms import Parts, Values, served
from digits import World, mean_ap
from serving_arms import Upgrade, _old_means
from training_arms import hot_refresh, lifted, prototype_values

from bowerbird.benchmark.cell import Cell
from bowerbird.benchmark.methods import Method, select
from bowerbird.benchmark.models import Model
from bowerbird_compat.ract import backfill_order
from bowerbird_compat.unibct import refine_prototypes

DIGITS = {"bct": arms.bct, "ract": training_arms.ract, "unibct": training_arms.unibct}
METHODS = {method.name: method for method in select(["bct", "ract", "contra", "unibct", "bict", "bt2"]).methods}


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``world.arm.metric`` of one seed."""
    values: Values = {}
    for name, options in plan["worlds"].items():
        measured = _world(plan, name, options, seed) if "dataset" in options else _digits(options, seed)
        values |= {f"{name}.{key}": value for key, value in measured.items()}
    return values


def _digits(options: Mapping[str, Any], seed: int) -> Values:
    """A part of the arms of a digits plan, with other data."""
    plan = tomllib.loads(Path(__file__).with_name(f"{options['plan']}.toml").read_text("utf-8"))
    plan["data"] |= options.get("data", {})
    other = options.get("set", {})
    plan["arms"] = [arm | other.get(arm["name"], {}) for arm in plan["arms"] if arm["name"] in options["arms"]]
    return DIGITS[options["plan"]](plan, seed)


def _world(plan: Mapping[str, Any], name: str, options: Mapping[str, Any], seed: int) -> Values:
    up = Upgrade(options["dataset"], seed)
    world, steps = _as_digits(up), plan["backfill"]["steps"]
    old, star = _parts(up.cell, up.old), _parts(up.cell, up.new)
    values = {"old.self": mean_ap(old[1], old[2], world)} | _tests("star", star, old, world)
    models: dict[str, Parts] = {}
    for arm in _of(plan, "train", name):
        model = up.cell.compatible(_method(arm, options))[-1]
        models[arm["name"]] = _parts(up.cell, model)
        values |= _tests(arm["name"], models[arm["name"]], old, world)
    for arm in _of(plan, "refresh", name):
        _, queries, gallery = models[arm["of"]]
        order = np.random.default_rng(seed).permutation(len(gallery))
        if "order" in arm:
            centers = torch.tensor(_old_means(up))
            order = backfill_order(torch.tensor(old[2]), centers, arm["order"]).numpy()
        found = hot_refresh(world, old[1], queries, old[2], gallery, order, steps)
        values |= {f"{arm['name']}.{key}": found[key] for key in ("area", "nfr", "nfr_max", "nfr_old", "falls")}
    backfill = {"backfill": {"batch_size": -(-len(old[2]) // steps)}, "transform": plan["reverse"]}
    serving = served(backfill, world, seed, old, star, models["bct-10"])
    values |= {f"served.{key}": value for key, value in serving.items()}
    for scenario, measure in (("sequence", _sequence), ("open-classes", _open), ("extended-classes", _more_classes)):
        if scenario in options["scenarios"]:
            cell = Cell(up.world, up.cell.views, scenario, up.cell.profile, seed)
            values |= measure(plan, name, cell, world)
    return values


def _of(plan: Mapping[str, Any], part: str, world: str) -> Iterable[Mapping[str, Any]]:
    return [arm for arm in plan["arms"] if arm.get("part") == part and world in arm.get("worlds", plan["worlds"])]


def _method(arm: Mapping[str, Any], options: Mapping[str, Any]) -> Method:
    """A method of the benchmark with the arm's settings, and those that the arm has in this world only."""
    base, here = METHODS[arm["of"]], options.get("set", {}).get(arm["name"], {})
    encoder = base.encoder and {**base.encoder, **arm.get("encoder", {})}
    return replace(base, name=arm["name"], settings={**base.settings, **arm.get("set", {}), **here}, encoder=encoder)


def _as_digits(up: Upgrade) -> World:
    """The world of the benchmark as the functions of the digits plans read it."""
    world, none = up.world, torch.zeros(len(up.world.gallery), dtype=torch.bool)
    pictures = [torch.from_numpy(part) for part in (world.train, world.queries, world.gallery)]
    train, queries, gallery = (
        torch.from_numpy(labels) for labels in (world.train_labels, world.query_labels, world.gallery_labels)
    )
    old = torch.from_numpy(np.isin(np.arange(len(world.train)), up.cell.plans[0].rows))
    return World(pictures[0], train, old, pictures[1], queries, pictures[2], gallery, none)


def _parts(cell: Cell, model: Model) -> Parts:
    return model.embed({trunk: views[0] for trunk, views in cell.views.items()}), *cell.vectors(model)


def _tests(name: str, new: Parts, old: Parts, world: World) -> Values:
    """mAP against the old gallery, where vectors are cut to the old size, and against the own one."""
    size = old[2].shape[1]
    return {
        f"{name}.cross": mean_ap(new[1][:, :size], old[2], world),
        f"{name}.self": mean_ap(new[1], new[2], world),
    }


def _sequence(plan: Mapping[str, Any], name: str, cell: Cell, world: World) -> Values:
    values: Values = {}
    for arm in _of(plan, "sequence", name):
        models = cell.compatible(_method(arm, {})) if "of" in arm else [cell.free(step) for step in range(3)]
        vectors = [_parts(cell, model) for model in models]
        found = lifted(plan["forward"], world, cell.seed, vectors, [model_plan.rows for model_plan in cell.plans])
        values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
        values["first.q1/g1"] = mean_ap(vectors[0][1], vectors[0][2], world)
    return values


def _more_classes(plan: Mapping[str, Any], name: str, cell: Cell, world: World) -> Values:
    old = _parts(cell, cell.free(0))
    values = {"classes.old.self": mean_ap(old[1], old[2], world)}
    values |= _tests("classes.star", _parts(cell, cell.free(1)), old, world)
    for arm in _of(plan, "classes", name):
        values |= _tests(arm["name"], _parts(cell, cell.compatible(_method(arm, {}))[-1]), old, world)
    return values


def _open(plan: Mapping[str, Any], name: str, cell: Cell, world: World) -> Values:
    """No class is shared, and a share of the new model's labels is shuffled: prototypes, and training towards them."""
    rows, clean = cell.plans[1].rows, cell.world.train_labels
    rng = np.random.default_rng([cell.seed, 5])
    moved = rows[rng.random(len(rows)) < plan["prototypes"]["shuffled"]]
    shuffled = clean.copy()
    shuffled[moved] = clean[rng.permutation(moved)]
    noisy = Cell(replace(cell.world, train_labels=shuffled), cell.views, cell.scenario, cell.profile, cell.seed)
    short = replace(cell.profile, epochs=cell.profile.epochs // 3)
    warmed = Cell(noisy.world, cell.views, cell.scenario, short, cell.seed).free(1)
    old = _parts(noisy, noisy.free(0))
    before, after = (torch.from_numpy(vectors[rows]) for vectors in (old[0], _parts(noisy, warmed)[0]))
    known, labels = np.unique(clean[rows], return_inverse=True)
    truth = refine_prototypes(before, after, torch.from_numpy(labels), lam=0.0).weight
    given = torch.from_numpy(np.searchsorted(known, shuffled[rows]))

    values = {"open.old.self": mean_ap(old[1], old[2], world)}
    values |= _tests("open.star", _parts(noisy, noisy.free(1)), old, world)
    for arm in _of(plan, "prototypes", name):
        refined = refine_prototypes(before, after, given, **arm["refine"])
        found = prototype_values(refined.weight, truth)
        values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
        if "of" in arm:
            values |= _tests(arm["name"], _parts(noisy, noisy.compatible(_method(arm, {}))[-1]), old, world)
    return values
