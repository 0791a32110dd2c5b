"""The arms of adapters, orders and mergers: one old and one new model per world, served in many ways."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from arms import Values

from bowerbird.benchmark.cell import Cell
from bowerbird.benchmark.methods import select
from bowerbird.benchmark.scenarios import PROFILES
from bowerbird.benchmark.worlds import make_world
from bowerbird.gallery.space import Space
from bowerbird.registry import get_registry
from bowerbird.retrieval.curves import Curve
from bowerbird.upgrade.forecast import ForecastCurve
from bowerbird.upgrade.orders import class_means
from bowerbird_compat.adapters import fit_adapter

Array = np.ndarray
BCT = select(["bct"]).methods[0]
SCENARIO = {"digits": "extended-data", "fashion-mnist": "extended-data", "emoji": "extended-classes"}


class Upgrade:
    """The free old and new model of a world, their vectors and the forecasts of serving them."""

    def __init__(self, name: str, seed: int) -> None:
        profile = PROFILES[name]
        trunk = profile.trunks[0]
        world = make_world(name, seed, trunk=trunk, **profile.sizes)
        views = {trunk: (world.train, world.queries, world.gallery)}
        self.world, self.seed = world, seed
        self.cell = Cell(world, views, SCENARIO[name], profile, seed)
        self.old, self.new = self.cell.free(0), self.cell.free(1)
        (self.q_old, self.g_old), (self.q_new, self.g_new) = (self.cell.vectors(m) for m in (self.old, self.new))
        self.forecast = self.cell.forecaster(self.old, self.new)
        self.order = self.cell.order

    def curve(self, old_part: Array, **more: Any) -> ForecastCurve:
        return self.forecast.curve("", old_part, more.pop("order", self.order), **more)


def _levels(curve: ForecastCurve) -> Values:
    return {"start": curve.start, "end": curve.end, "area": curve.area, "nfr": curve.max_nfr}


# ------------------------------------------------------------------------------------------------------- adapters


def adapters(plan: Mapping[str, Any], seed: int) -> Values:
    values: Values = {}
    for name in plan["worlds"]["names"]:
        up = Upgrade(name, seed)
        old_space, new_space = (Space(v, v, m.encoder.embed_dim) for v, m in (("old", up.old), ("new", up.new)))
        pairs = up.cell.pairs(up.old, up.new, old_space, new_space)
        to_old = {"source_space": "new", "target_space": "old", "seed": seed}
        to_new = {"source_space": "old", "target_space": "new", "seed": seed, "direction": "gallery", "kind": "ridge"}
        lift = fit_adapter(pairs.old, pairs.new, **to_new)
        made = {
            "naive": up.forecast.switch_now(up.order),
            **{
                kind: up.curve(fit_adapter(pairs.new, pairs.old, kind=kind, **to_old)(up.q_new))
                for kind in ("procrustes", "ridge", "low-rank", "mlp")
            },
            "wrong-way": up.curve(lift(up.q_new)),  # sizes are equal, so nothing but its direction could refuse it
            "lift": up.curve(up.q_new, old_part_vectors=lift(up.g_old)),
            "rank-merge": up.curve(up.q_old),
            "full": up.forecast.full(),
        }
        full = up.forecast.new_new.mean()
        for arm, curve in made.items():
            found = _levels(curve) | {"kept": curve.start / full}
            values |= {f"{name}.{arm}.{key}": value for key, value in found.items()}
    return values


# -------------------------------------------------------------------------------------------------------- mergers


def mergers(plan: Mapping[str, Any], seed: int) -> Values:
    registry = get_registry()
    values: Values = {}
    for name in plan["worlds"]["names"]:
        up = Upgrade(name, seed)
        values |= {f"{name}.old.start": up.forecast.old_old.mean(), f"{name}.old.end": up.forecast.new_new.mean()}
        for arm in ("distance", "zscore", "proportional"):
            merger = registry.load(registry.get("retriever", f"core:{arm}", role="merger"))
            curve = up.curve(up.q_old, merger=merger)
            quality = np.array(curve.quality)
            dip = float((np.maximum.accumulate(quality) - quality).max())
            values |= {f"{name}.{arm}.{key}": value for key, value in (_levels(curve) | {"dip": dip}).items()}
    return values


# --------------------------------------------------------------------------------------------------------- orders


def orders(plan: Mapping[str, Any], seed: int) -> Values:
    registry = get_registry()
    function = {
        name: registry.load(registry.get("retriever", f"core:{name}", role="order"))
        for name in ("uncertainty", "class-distance", "traffic")
    }
    values: Values = {}
    for name in plan["worlds"]["names"]:
        up = Upgrade(name, seed)
        items, names = np.arange(len(up.g_old)), [f"item-{i}" for i in range(len(up.g_old))]
        weights, log = _requests(up, plan["traffic"]["log"], names)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "log.json"
            file.write_text(json.dumps(log))
            made = {
                "random": up.order,
                "uncertainty": function["uncertainty"](items, up.g_old, seed=seed),
                "uncertainty-classes": function["uncertainty"](items, up.g_old, centers=_old_means(up)),
                "class-distance": function["class-distance"](items, up.g_old, seed=seed),
                "traffic": function["traffic"](items, up.g_old, seed=seed, names=names, log=str(file)),
            }
        bct = up.cell.compatible(BCT)[-1] if name == "digits" else None
        for arm, order in made.items():
            curve = up.curve(up.q_old, order=order)
            seen = np.asarray(curve.values) @ weights  # (S,), as users see it
            values |= {f"{name}.{arm}.area": curve.area, f"{name}.{arm}.traffic.area": Curve(curve.shares, seen).area()}
            if bct is not None:
                queries = up.cell.vectors(bct)[0]
                served = up.cell.forecaster(up.old, bct).curve("", queries, order)
                values[f"{name}.{arm}.compatible.area"] = served.area
    return values


def _requests(up: Upgrade, size: int, names: list[str]) -> tuple[Array, dict[str, int]]:
    """Weights of the queries ``(Q,)`` by the popularity of their class, and a log: item -> how often it was shown."""
    rng = np.random.default_rng([up.seed, 4])
    classes, of_query = np.unique(up.world.query_labels, return_inverse=True)
    popularity = 1 / (1 + rng.permutation(len(classes)))
    weights = popularity[of_query] / np.bincount(of_query)[of_query]
    weights /= weights.sum()
    shown = np.argsort(-(up.q_old @ up.g_old.T), axis=1, kind="stable")[:, :10]
    log: dict[str, int] = {}
    for item in shown[rng.choice(len(weights), size, p=weights)].ravel():
        log[names[item]] = log.get(names[item], 0) + 1
    return weights, log


def _old_means(up: Upgrade) -> Array:
    """Class means of the old model's own training items in its space."""
    rows = up.cell.plans[0].rows
    views = {trunk: parts[0][rows] for trunk, parts in up.cell.views.items()}
    return class_means(up.old.embed(views), up.world.train_labels[rows].tolist())
