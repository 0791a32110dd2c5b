"""The plugin that core itself is: its records ``core:*``. Light, like every plugin: standard library and records only."""

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
    yield RetrieverRecord(
        name="core:compatible",
        role="upgrade",
        target="bowerbird.upgrade.strategies:Compatible",
        summary="Search old vectors with new queries; for encoders trained to be compatible (BCT and successors).",
        paper="Towards Backward-Compatible Representation Learning, arXiv 2003.11942",
    )
    yield RetrieverRecord(
        name="core:random",
        role="order",
        target="bowerbird.upgrade.orders:random_order",
        summary="Backfill in a seeded random order.",
    )
    yield RetrieverRecord(
        name="core:uncertainty",
        role="order",
        target="bowerbird.upgrade.orders:uncertainty_order",
        config="bowerbird.upgrade.order_config:UncertaintyConfig",
        summary="Backfill first what the old encoder was least sure of (entropy, least confidence or margin).",
        paper="Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training, arXiv 2201.09724",
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    return ()
