"""The arms of obj2seq.toml: recipes of ``bowerbird train`` on canvases of five digits."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pretraining_arms import Values, dataset, register
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2 import functional as F

from bowerbird.data.digits import Digits
from bowerbird.data.views import Subset
from bowerbird.encoders import load_encoder
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Objects
from bowerbird.recipe import resolve_recipe
from bowerbird.records import DatasetRecord
from bowerbird.train.loop import train
from bowerbird_detection.canvases import Canvases

BOWERBIRD_API = "1.0"
PLUGIN = "obj2seq-claims"
CLASSES = 5
PROMPTS = ("1", "3")
SAME_PLACE = 0.5  # IoU


class FewDigits(Subset):
    """The digits 0 to 4 of ``core:digits``."""

    @classmethod
    def build(cls, config: None = None, split: str | None = None) -> Self:
        whole = Digits.build(None, split)
        few = cls(whole, [i for i, label in enumerate(whole.labels()) if label < CLASSES])
        few.classes = whole.classes[:CLASSES]
        return few


class KeptCanvases(Canvases):
    """Canvases that are composed once."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        kept = self.__dict__.setdefault("kept", {})
        if index not in kept:
            kept[index] = super().__getitem__(index)
        return dict(kept[index])


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name=f"{PLUGIN}:digits",
        target=f"{__name__}:FewDigits",
        summary="core:digits, 0 to 4.",
        provides=("image", "label", "item_id"),
        splits=("all", "train", "test"),
    )
    yield DatasetRecord(
        name=f"{PLUGIN}:canvases",
        target=f"{__name__}:KeptCanvases",
        config="bowerbird_detection.data_configs:CanvasesConfig",
        summary="detection:canvases, composed once.",
        provides=("image", "boxes", "box_labels", "masks", "keypoints", "crowd", "item_id"),
    )


def run(plan: Mapping[str, Any], seed: int) -> Values:
    register(PLUGIN, sys.modules[__name__])
    values: Values = {"nothing": 0.0}
    for arm in plan["arms"]:
        settings = {"dataset.seed": seed, "train.seed": seed, **arm.get("set", {})}
        texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        recipe = resolve_recipe(plan["recipe"], "plan [recipe]", texts)
        test = {**recipe.dataset.settings, "count": plan["test"]}
        where = {"dataset": f"{PLUGIN}:canvases", "split": "test", "settings": test}
        measures = [
            {"use": "detection:coco-ap", "kinds": ["box"], **where},
            {"use": "detection:multi-label", **where},
        ]
        recipe = resolve_recipe({**recipe.to_dict(), "evaluate": measures}, "plan [recipe]")
        with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as folder:
            found = train(recipe, Path(folder, "run")).metrics
            detector: Any = load_encoder(Path(folder, "run"), device="cpu").module
        canvases: Any = dataset(f"{PLUGIN}:canvases", "test", **test)
        measured = {
            "AP50": found["detection:coco-ap/AP50"],
            "presence": found["detection:multi-label/mAP"],
            **placed(detector, canvases),
        }
        if arm["name"] == "sequence":
            measured |= prompted(detector, canvases)
        values |= {f"{arm['name']}.{key}": float(value) for key, value in measured.items()}
    return values


def pictures(canvases: Canvases) -> list[Tensor]:
    return [F.to_dtype(F.pil_to_tensor(canvases.image(i)), torch.float32, scale=True) for i in range(len(canvases))]


def detected(detector: Any, images: Sequence[Tensor], **more: Any) -> list[Objects]:
    return [one for start in range(0, len(images), 50) for one in detector.detect(images[start : start + 50], **more)]


def placed(detector: Any, canvases: Canvases) -> Values:
    """``found``, and ``error`` in pixels, as the plan says."""
    distances, total = [], 0
    for index, found in enumerate(detected(detector, pictures(canvases))):
        true = canvases.objects(index)
        assert true.keypoints is not None and found.keypoints is not None
        total += len(true.boxes)
        for box, label, points in zip(true.boxes, true.labels, true.keypoints, strict=True):
            mine = (found.labels == label) & (box_iou(found.boxes, box[None])[:, 0] >= SAME_PLACE)
            if mine.any():  # objects are found best first
                distances.append((found.keypoints[mine][0, :, :2] - points[:, :2]).norm(dim=1).mean())
    return {"found": len(distances) / total, "error": float(torch.stack(distances).mean()) if distances else 48.0}


def prompted(detector: Any, canvases: Canvases) -> Values:
    """``subset`` and ``others``, as the plan says."""
    images = pictures(canvases)
    labels = torch.tensor([detector.classes.index(name) for name in PROMPTS])
    change, others = 0.0, 0
    pairs = zip(detected(detector, images), detected(detector, images, prompts=PROMPTS), strict=True)
    for whole, some in pairs:
        asked = torch.isin(some.labels, labels)
        others += int((~asked).sum())
        for label in labels:
            before, after = whole.labels == label, some.labels == label
            assert whole.scores is not None and some.scores is not None
            # Equal scores may come in another order; every object has its counterpart.
            first = torch.cat([whole.scores[before, None], whole.boxes[before]], dim=1)
            second = torch.cat([some.scores[after, None], some.boxes[after]], dim=1)
            assert len(first) == len(second)
            gaps = (first[:, None] - second).abs().amax(dim=2)
            change = max(change, float(gaps.amin(dim=1).max()), float(gaps.amin(dim=0).max()))
    return {"subset": change, "others": others}
