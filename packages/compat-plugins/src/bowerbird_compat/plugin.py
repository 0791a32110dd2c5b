"""The records of ``bowerbird-compat``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="compat:bct",
        target="bowerbird_compat.bct:BCTObjective",
        config="bowerbird_compat.bct:BCTConfig",
        summary="Backward-compatible training: new queries can search the old gallery (influence loss).",
        presets={"openbct": "bowerbird_compat.bct:openbct", "prototypes": "bowerbird_compat.bct:prototypes"},
        paper="Towards Backward-Compatible Representation Learning, CVPR 2020, arXiv:2003.11942",
        needs=("image", "label"),
    )


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    yield RetrieverRecord(
        name="compat:rank-merge",
        target="bowerbird_compat.rank_merge:RankMerge",
        role="upgrade",
        summary="Each part searched in its own space, merged by distance: no training, exact at both ends.",
        paper="Online Backfilling with No Regret for Large-Scale Image Retrieval, WACV 2025, arXiv:2301.03767",
    )
