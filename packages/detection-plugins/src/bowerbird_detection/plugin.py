"""The records of ``bowerbird-detection``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="detection:canvases",
        target="bowerbird_detection.canvases:Canvases",
        config="bowerbird_detection.canvases:CanvasesConfig",
        summary="Pictures of several objects composed of the items of other data sets: boxes, masks, keypoints, a tail.",
        presets={
            "emoji": "bowerbird_detection.canvases:emoji",
            "fashion": "bowerbird_detection.canvases:fashion",
            "mixed": "bowerbird_detection.canvases:mixed",
        },
        provides=("image", "boxes", "box_labels", "masks", "keypoints", "crowd", "item_id"),
    )
