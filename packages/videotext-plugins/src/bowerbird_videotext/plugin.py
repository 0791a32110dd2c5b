"""The records of ``bowerbird-videotext``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield from ()


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield from ()


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
