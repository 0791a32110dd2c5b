"""The records of ``bowerbird-detection``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord

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
        name="detection:mimdet",
        target="bowerbird_detection.mimdet_detector:MIMDetDetector",
        config="bowerbird_detection.mimdet_config:MIMDetConfig",
        summary="Mask R-CNN on a plain ViT, pre-trained by masking, that sees half of the picture in training.",
        presets={size: f"bowerbird_detection.mimdet_config:{size}" for size in ("tiny", "small", "base", "large")},
        paper="Unleashing Vanilla Vision Transformer with Masked Image Modeling for Object Detection, ICCV 2023, "
        "arXiv:2204.02964",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="detection:obj2seq",
        target="bowerbird_detection.obj2seq_detector:Obj2SeqDetector",
        config="bowerbird_detection.obj2seq_config:Obj2SeqConfig",
        summary="Looks for the classes that it is asked for and writes each object as a sequence: box and keypoints.",
        presets={name: f"bowerbird_detection.obj2seq_config:{name}" for name in ("pose", "small")},
        paper="Obj2Seq: Formatting Objects as Sequences with Class Prompt for Visual Tasks, NeurIPS 2022, "
        "arXiv:2209.13948",
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
        name="detection:acsl",
        target="bowerbird_detection.acsl_objective:ACSLObjective",
        config="bowerbird_detection.configs:ACSLConfig",
        summary="Second stage for long tails: a detector's classifier learns again, suppressing confused classes only.",
        paper="Adaptive Class Suppression Loss for Long-Tail Object Detection, CVPR 2021, arXiv:2104.00885",
        needs=("image", "boxes", "box_labels"),
        encoder_needs=(),
    )
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
        config="bowerbird_detection.data_configs:CanvasesConfig",
        summary="Pictures of several objects composed of the items of other data sets; boxes, masks, keypoints, tail.",
        presets={
            "emoji": "bowerbird_detection.data_configs:emoji",
            "fashion": "bowerbird_detection.data_configs:fashion",
            "mixed": "bowerbird_detection.data_configs:mixed",
        },
        provides=("image", "boxes", "box_labels", "masks", "keypoints", "crowd", "item_id"),
    )
    yield DatasetRecord(
        name="detection:coco",
        target="bowerbird_detection.coco:CocoSet",
        config="bowerbird_detection.data_configs:CocoConfig",
        summary="Your own copy of COCO or LVIS, or any set annotated in COCO's form: boxes, masks, keypoints, crowds.",
        presets={
            "lvis": "bowerbird_detection.data_configs:lvis",
            "person-keypoints": "bowerbird_detection.data_configs:person_keypoints",
        },
        paper="Microsoft COCO: Common Objects in Context, ECCV 2014, arXiv:1405.0312",
        provides=("image", "boxes", "box_labels", "crowd", "item_id"),
    )
    yield DatasetRecord(
        name="detection:voc",
        target="bowerbird_detection.voc:VocSet",
        config="bowerbird_detection.data_configs:VocConfig",
        summary="Your own copy of Pascal VOC, or any set in its layout: boxes, masks, difficult objects.",
        paper="The Pascal Visual Object Classes Challenge: A Retrospective, IJCV 2015, doi:10.1007/s11263-014-0733-5",
        provides=("image", "boxes", "box_labels", "crowd", "item_id"),
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield EvaluatorRecord(
        name="detection:coco-ap",
        target="bowerbird_detection.evaluators:CocoAP",
        config="bowerbird_detection.data_configs:CocoAPConfig",
        summary="Average precision of boxes, masks and keypoints as in COCO and LVIS; by how frequent classes are.",
        needs=("image", "boxes", "box_labels"),
    )
    yield EvaluatorRecord(
        name="detection:multi-label",
        target="bowerbird_detection.evaluators:MultiLabel",
        config="bowerbird_detection.data_configs:MultiLabelConfig",
        summary="Mean average precision of telling which classes a picture has.",
        needs=("image", "boxes", "box_labels"),
    )
