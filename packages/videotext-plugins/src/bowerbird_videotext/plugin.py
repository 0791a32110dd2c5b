"""The records of ``bowerbird-videotext``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="videotext:dual-encoder",
        target="bowerbird_videotext.dual_encoder:DualEncoder",
        config="bowerbird_videotext.dual_encoder_config:DualEncoderConfig",
        summary="Clips and captions in one space: space-time transformer and text transformer, searched by cosine.",
        paper="Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval, ICCV 2021, arXiv:2104.00650",
        inputs=("video", "image", "text"),
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="videotext:frozen",
        target="bowerbird_videotext.frozen:FrozenObjective",
        config="bowerbird_videotext.frozen:FrozenConfig",
        summary="Contrastive training of a dual encoder on videos and captions; the baseline of MCQ, MILES and MAC.",
        paper="Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval, ICCV 2021, arXiv:2104.00650",
        needs=("video", "text"),
    )
    yield ObjectiveRecord(
        name="videotext:mac",
        target="bowerbird_videotext.mac:MACObjective",
        config="bowerbird_videotext.mac:MACConfig",
        summary="Contrastive training on a part of the patches and masked captions: less than half the work of a step.",
        paper="Masked Contrastive Pre-Training for Efficient Video-Text Retrieval, arXiv:2212.00986",
        needs=("video", "text"),
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="videotext:moving",
        target="bowerbird_videotext.moving:Moving",
        config="bowerbird_videotext.data_configs:MovingConfig",
        summary="Short videos of real pictures that move, with captions, questions and boxes; made by a program.",
        presets={
            name: f"bowerbird_videotext.data_configs:{name}" for name in ("digits", "emoji", "rich", "single", "still")
        },
        provides=("video", "text", "item_id"),
        splits=("train", "val", "test"),
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield from ()


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    yield from ()
