"""The arms of adapters, orders and mergers: one old and one new model per world, served in many ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from arms import Values

from bowerbird.benchmark.cell import Cell
from bowerbird.benchmark.scenarios import PROFILES
from bowerbird.benchmark.worlds import make_world
from bowerbird.gallery.space import Space
from bowerbird.registry import get_registry
from bowerbird.upgrade.forecast import ForecastCurve
from bowerbird_compat.adapters import fit_adapter

Array = np.ndarray
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
    raise NotImplementedError
