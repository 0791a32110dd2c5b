"""The plugin that core itself is: its records ``core:*``. Light, like every plugin module: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    return ()


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    return ()


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    return ()


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    return ()


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    return ()
