"""The records of ``bowerbird-detection``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, ObjectiveRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="detection:dpt",
        target="bowerbird_detection.dpt:DPT",
        config="bowerbird_detection.dpt:DPTConfig",
        summary="Pyramid transformer whose patches choose their place and size; image encoder and detector's backbone.",
        presets={size: f"bowerbird_detection.dpt:{size}" for size in ("tiny", "small", "medium")},
        paper="DPT: Deformable Patch-based Transformer for Visual Recognition, ACM MM 2021, arXiv:2107.14467",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="detection:torchvision",
        target="bowerbird_detection.detectors:TorchvisionDetector",
        config="bowerbird_detection.configs:TorchvisionConfig",
        summary="Faster, Mask, Keypoint R-CNN or RetinaNet of torchvision on a timm model or any encoder.",
        paper="Mask R-CNN, ICCV 2017, arXiv:1703.06870",
        outputs=("pooled", "tokens"),
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="detection:detector",
        target="bowerbird_detection.objective:DetectionObjective",
        config="bowerbird_detection.configs:DetectionConfig",
        summary="Trains any detector with its own losses on pictures with annotated objects.",
        needs=("image", "boxes", "box_labels"),
        encoder_needs=(),
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="detection:canvases",
        target="bowerbird_detection.canvases:Canvases",
        config="bowerbird_detection.canvases:CanvasesConfig",
        summary="Pictures of several objects composed of the items of other data sets; boxes, masks, keypoints, tail.",
        presets={
            "emoji": "bowerbird_detection.canvases:emoji",
            "fashion": "bowerbird_detection.canvases:fashion",
            "mixed": "bowerbird_detection.canvases:mixed",
        },
        provides=("image", "boxes", "box_labels", "masks", "keypoints", "crowd", "item_id"),
    )
