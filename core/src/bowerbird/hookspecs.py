"""The hooks. A plugin is one light module with ``BOWERBIRD_API`` and some of these functions, named by an entry point:

    [project.entry-points.bowerbird]
    acme = "bowerbird_acme.plugin"

The catalogue hooks are called once per plugin at discovery. They must be pure and fast, import nothing heavy and
yield records; what a record's target imports is imported when somebody uses the method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from bowerbird.records import (
        DatasetRecord,
        EncoderRecord,
        EvaluatorRecord,
        ModifierRecord,
        ObjectiveRecord,
        RetrieverRecord,
    )

PROJECT = "bowerbird"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# ------------------------------------------------------------------------------------------------- catalogue


@hookspec
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    """Encoders: what turns an item into a vector.

    Called at discovery. Yield one ``EncoderRecord`` per encoder::

        @hookimpl
        def bowerbird_encoders():
            yield EncoderRecord(
                name="acme:tiny",
                target="bowerbird_acme.tiny:TinyEncoder",
                config="bowerbird_acme.tiny:TinyConfig",
                summary="A five-layer network for icons.",
            )
    """
    raise NotImplementedError


@hookspec
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    """Objectives: model, heads, teacher and loss of one training method. Called at discovery."""
    raise NotImplementedError


@hookspec
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    """Data sets with stable item ids. Called at discovery."""
    raise NotImplementedError


@hookspec
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    """What searches, stores, merges, maps between spaces, or plans and executes an upgrade. Called at discovery."""
    raise NotImplementedError


@hookspec
def bowerbird_modifiers() -> Iterable[ModifierRecord]:
    """What changes a model while it trains. Called at discovery."""
    raise NotImplementedError


@hookspec
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    """Evaluation protocols. Called at discovery."""
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------- events


@hookspec
def bowerbird_run_started(run_dir: str, recipe: Mapping[str, Any]) -> None:
    """A training run begins or resumes. ``recipe`` is the resolved recipe as plain data. The result is ignored."""


@hookspec
def bowerbird_step_logged(run_dir: str, step: int, values: Mapping[str, float]) -> None:
    """Scalars were logged at optimiser step ``step`` (counted from 1). The result is ignored."""


@hookspec
def bowerbird_run_finished(run_dir: str, metrics: Mapping[str, float]) -> None:
    """A training run ended normally. ``metrics`` is empty where no evaluator ran. The result is ignored."""


CATALOGUE_HOOKS = {
    "bowerbird_encoders": "encoder",
    "bowerbird_objectives": "objective",
    "bowerbird_datasets": "dataset",
    "bowerbird_retrievers": "retriever",
    "bowerbird_modifiers": "modifier",
    "bowerbird_evaluators": "evaluator",
}
