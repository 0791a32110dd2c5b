"""The records of ``bowerbird-mim``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="mim:part-vit",
        target="bowerbird_mim.part_vit:PartViTEncoder",
        config="bowerbird_mim.part_vit:PartViTConfig",
        summary="A vision transformer with part tokens beside the class token, for upright, aligned objects.",
        presets={size: f"bowerbird_mim.vit:{size}" for size in ("tiny", "small", "base", "large")},
        paper="PASS: Part-Aware Self-Supervised Pre-Training for Person Re-Identification, ECCV 2022, arXiv:2203.03931",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="mim:vit",
        target="bowerbird_mim.vit:ViTEncoder",
        config="bowerbird_mim.vit:ViTConfig",
        summary="A plain vision transformer that can be shown a part of a picture; reads and writes timm weights.",
        presets={size: f"bowerbird_mim.vit:{size}" for size in ("tiny", "small", "base", "large")},
        paper="An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929",
        outputs=("pooled", "tokens"),
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="mim:mae",
        target="bowerbird_mim.mae:MAEObjective",
        config="bowerbird_mim.mae:MAEConfig",
        summary="Masked autoencoder: encode a quarter of the patches, restore the pixels of the rest. For fine-tuning.",
        paper="Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377",
        needs=("image",),
        encoder_needs=("tokens",),
        batch_additive=True,
    )
    yield ObjectiveRecord(
        name="mim:reid-finetune",
        target="bowerbird_mim.reid:FinetuneObjective",
        config="bowerbird_mim.reid:FinetuneConfig",
        summary="Fine-tune on identities: cross-entropy behind batch normalisation, batch-hard triplet before it.",
        paper="TransReID: Transformer-based Object Re-Identification, ICCV 2021, arXiv:2102.04378",
        needs=("image", "label"),
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="mim:canvases",
        target="bowerbird_mim.data.canvases:Canvases",
        config="bowerbird_mim.data.canvases:CanvasesConfig",
        summary="Items of another data set on textured canvases, with their boxes, masks and classes.",
        provides=("image", "label", "item_id", "boxes", "masks", "box_labels"),
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield EvaluatorRecord(
        name="mim:reid",
        target="bowerbird_mim.reid:ReidEvaluation",
        config="bowerbird_mim.reid:ReidConfig",
        summary="Re-identification: mAP and CMC without pictures of the same identity from the query's camera.",
        paper="Scalable Person Re-identification: A Benchmark, ICCV 2015",
    )
