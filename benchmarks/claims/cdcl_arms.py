"""The arms of cdcl.toml: recipes of ``bowerbird train`` on sets of canvases, measured by ``domain:miou``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pretraining_arms import Values, register

from bowerbird.hookspecs import hookimpl
from bowerbird.recipe import resolve_recipe
from bowerbird.records import DatasetRecord
from bowerbird.train.loop import train
from bowerbird_domain.canvases import Canvases

BOWERBIRD_API = "1.0"
PLUGIN = "cdcl-claims"


class KeptCanvases(Canvases):
    """Canvases that are composed once: over a hundred epochs that would take longer than to learn from them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        kept = self.__dict__.setdefault("kept", {})
        if index not in kept:
            kept[index] = super().__getitem__(index)
        return dict(kept[index])


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name=f"{PLUGIN}:canvases",
        target=f"{__name__}:KeptCanvases",
        config="bowerbird_domain.canvases:CanvasesConfig",
        summary="domain:canvases, composed once.",
        provides=("image", "label_map", "item_id", "domain"),
    )


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<set>``: mIoU on the test canvases; ``nearest.<set>``: that of arm cdcl with the nearest branch.

    The seed sets the canvases (training and test), the first weights and the order of batches.
    """
    register(PLUGIN, sys.modules[__name__])
    values: Values = {}
    for arm in plan["arms"]:
        settings = {"dataset.seed": seed, "train.seed": seed, **arm.get("set", {})}
        texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        recipe = resolve_recipe(plan["recipe"], "plan [recipe]", texts)
        test = {key: value for key, value in recipe.dataset.settings.items() if key in ("sets", "only")}
        measure = {
            "use": "domain:miou", "dataset": "domain:canvases", "split": "test",
            "settings": {**test, "sets": plan["recipe"]["dataset"]["sets"], "seed": seed, "count": plan["test"]},
        }  # fmt: skip
        measures = [measure]
        if arm["name"] == "cdcl":
            measures.append({**measure, "name": "nearest", "branch": "nearest"})
        recipe = resolve_recipe({**recipe.to_dict(), "evaluate": measures}, "plan [recipe]")
        with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as folder:
            found = train(recipe, Path(folder, "run")).metrics
        for name in recipe.dataset.settings["sets"]:
            key = f"{name}/mIoU"
            if f"domain:miou/{key}" in found:
                values[f"{arm['name']}.{name}"] = found[f"domain:miou/{key}"]
            if f"nearest/{key}" in found:
                values[f"nearest.{name}"] = found[f"nearest/{key}"]
    return values
