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
    yield from ()


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield from ()


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    yield from ()
