"""The arms of mimdet.toml: recipes of ``bowerbird train`` on canvases, measured by COCO's AP at several test ratios."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pretraining_arms import Values, register

from bowerbird.data.dataset import Dataset
from bowerbird.encoders import load_encoder
from bowerbird.hookspecs import hookimpl
from bowerbird.recipe import resolve_recipe
from bowerbird.records import DatasetRecord
from bowerbird.train.loop import train
from bowerbird_detection.canvases import Canvases
from bowerbird_detection.data_configs import CanvasesConfig
from bowerbird_detection.detection_set import DetectionSet
from bowerbird_detection.evaluators import average_precisions, detections, results
from bowerbird_detection.mimdet_detector import MIMDetDetector

BOWERBIRD_API = "1.0"
PLUGIN = "mimdet-claims"


class KeptCanvases(Canvases):
    """Canvases that are composed once: over epochs that would take longer than to learn from them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        kept = self.__dict__.setdefault("kept", {})
        if index not in kept:
            kept[index] = super().__getitem__(index)
            del kept[index]["masks"]  # the detectors here learn boxes
        return dict(kept[index])


class SingleObjects(Dataset):
    """Canvases of one object each with its class as their label, for pre-training."""

    def __init__(self, canvases: KeptCanvases) -> None:
        self.canvases, self.classes = canvases, canvases.classes

    @classmethod
    def build(cls, config: CanvasesConfig | None = None, split: str | None = None) -> Self:
        return cls(KeptCanvases.build(config, split))

    def __len__(self) -> int:
        return len(self.canvases)

    @property
    def item_ids(self) -> Any:
        return self.canvases.item_ids

    def labels(self) -> list[int]:
        return [self.canvases.object_labels(i)[0] for i in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.canvases[index]
        return {"image": item["image"], "item_id": item["item_id"], "label": item["box_labels"][0]}


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    settings = "bowerbird_detection.data_configs:CanvasesConfig"
    yield DatasetRecord(
        name=f"{PLUGIN}:canvases",
        target=f"{__name__}:KeptCanvases",
        config=settings,
        summary="detection:canvases, composed once.",
        provides=("image", "boxes", "box_labels", "item_id"),
    )
    yield DatasetRecord(
        name=f"{PLUGIN}:single",
        target=f"{__name__}:SingleObjects",
        config=settings,
        summary="Canvases of one object with its class.",
        provides=("image", "label", "item_id"),
    )


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<metric>@<percent>``: AP50, AP and APs (small objects) on the test canvases at a test ratio.

    The seed sets the canvases (training and test), the first weights, the order of batches and what is sampled.
    """
    register(PLUGIN, sys.modules[__name__])
    values: Values = {}
    settings = {key: value for key, value in plan["recipe"]["dataset"].items() if key not in ("use", "split")}
    test = Canvases.build(CanvasesConfig(**{**settings, "count": plan["test"], "seed": seed}), "test")
    with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as folder:
        for name in sorted({arm["start"] for arm in plan["arms"] if "start" in arm}):
            _train(_pretraining(plan["pretrain"], name), Path(folder, name), seed)
        for arm in plan["arms"]:
            overrides = dict(arm.get("set", {}))
            if "start" in arm:
                overrides["encoder.init"] = str(Path(folder, arm["start"]))
            run_dir = Path(folder, f"arm-{arm['name']}")
            _train(plan["recipe"], run_dir, seed, overrides)
            detector: Any = load_encoder(run_dir, device="cpu").module
            ratios = plan["test_ratios"] if arm.get("curve") else [1.0]
            for ratio in ratios:
                for metric, value in precisions(detector, test, ratio, seed, plan["area_sides"]).items():
                    values[f"{arm['name']}.{metric}@{round(100 * ratio)}"] = value
    return values


def _pretraining(plan: Mapping[str, Any], name: str) -> dict[str, Any]:
    recipe = {key: copy.deepcopy(plan[key]) for key in ("dataset", "encoder", "train")}
    recipe["train"]["epochs"] = plan[name]["epochs"]
    return {**recipe, "name": name, "objective": dict(plan[name]["objective"])}


def _train(recipe: Mapping[str, Any], run_dir: Path, seed: int, overrides: Mapping[str, Any] | None = None) -> None:
    settings = {"dataset.seed": seed, "train.seed": seed, **(overrides or {})}
    texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    train(resolve_recipe(copy.deepcopy(dict(recipe)), "plan", texts), run_dir)


def precisions(detector: MIMDetDetector, test: DetectionSet, ratio: float, seed: int, sides: Any) -> Values:
    """AP, AP50 and APs with the share ``ratio`` of the tokens encoded."""
    detector.backbone.test_ratio = ratio
    torch.manual_seed(seed)  # below 1 it is random which
    found = []
    for index, objects in detections(detector, test, range(len(test)), batch_size=16):
        found += [entry for kind, entry in results(objects, index + 1) if kind == "box"]
    summary = average_precisions(test.coco(), found, area_sides=tuple(sides)).summary()
    return {name: summary[name] for name in ("AP", "AP50", "APs")}
