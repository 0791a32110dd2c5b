"""The records of ``bowerbird-compat``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import EncoderRecord, ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="compat:basis-transform",
        target="bowerbird_compat.bt2_objective:BasisTransformEncoder",
        config="bowerbird_compat.bt2_objective:BasisTransformConfig",
        summary="Any encoder with the head of compat:bt2: old-compatible entries first, then the added ones.",
        paper="BT^2: Backward-compatible Training with Basis Transformation, ICCV 2023, arXiv:2211.03989",
    )


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
    yield ObjectiveRecord(
        name="compat:bt2",
        target="bowerbird_compat.bt2_objective:BT2Objective",
        config="bowerbird_compat.bt2_objective:BT2Config",
        summary="Compatible in a few added dimensions: orthonormal maps, a free teacher, no tax on the new model.",
        paper="BT^2: Backward-compatible Training with Basis Transformation, ICCV 2023, arXiv:2211.03989",
        needs=("image", "label", "index"),
    )
    yield ObjectiveRecord(
        name="compat:ract",
        target="bowerbird_compat.ract:RACTObjective",
        config="bowerbird_compat.ract:RACTConfig",
        summary="Compatible training for hot refreshes: wrong new items count, too, so that a backfill flips less.",
        presets={"opencompatible": "bowerbird_compat.ract:opencompatible", "contra": "bowerbird_compat.ract:contra"},
        paper="Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training in Image Retrieval, "
        "ICLR 2022, arXiv:2201.09724",
        needs=("image", "label"),
    )
    yield ObjectiveRecord(
        name="compat:bict",
        target="bowerbird_compat.bict_objective:BiCTObjective",
        config="bowerbird_compat.bict_objective:BiCTConfig",
        summary="Bidirectional: a backward-compatible encoder; stored vectors are then lifted without pictures.",
        paper="Privacy-Preserving Model Upgrades with Bidirectional Compatible Training in Image Retrieval, "
        "arXiv:2204.13919",
        needs=("image", "label", "index"),
    )
    yield ObjectiveRecord(
        name="compat:unibct",
        target="bowerbird_compat.unibct_objective:UniBCTObjective",
        config="bowerbird_compat.unibct_objective:UniBCTConfig",
        summary="Compatible training for classes the old model never saw: old-space prototypes, refined as it learns.",
        presets={
            "mixbct": "bowerbird_compat.unibct_objective:mixbct",
            "advbct": "bowerbird_compat.unibct_objective:advbct",
        },
        paper="Towards Universal Backward-Compatible Representation Learning, IJCAI 2022, arXiv:2203.01583",
        needs=("image", "label"),
    )
    yield ObjectiveRecord(
        name="compat:metric-compatible",
        target="bowerbird_compat.online_backfilling_objective:MetricCompatibleObjective",
        config="bowerbird_compat.online_backfilling_objective:MetricCompatibleConfig",
        summary="New embedding and reverse query transform together, on one scale of distances with the old system.",
        paper="Online Backfilling with No Regret for Large-Scale Image Retrieval, WACV 2025, arXiv:2301.03767",
        needs=("image", "label", "index"),
    )


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    yield RetrieverRecord(
        name="compat:rank-merge",
        target="bowerbird_compat.rank_merge:RankMerge",
        role="upgrade",
        summary="Each part searched in its own space, then merged: no training, exact at both ends.",
        paper="Online Backfilling with No Regret for Large-Scale Image Retrieval, WACV 2025, arXiv:2301.03767",
    )
    yield RetrieverRecord(
        name="compat:adapter",
        target="bowerbird_compat.transform_strategies:Adapter",
        role="upgrade",
        summary="New queries through a small map to the old space, fitted on a sample: one encoder pass, any encoders.",
        paper="Drift-Adapter, EMNLP 2025, arXiv:2509.23471",
    )
    yield RetrieverRecord(
        name="compat:reverse-transform",
        target="bowerbird_compat.transform_strategies:ReverseTransform",
        role="upgrade",
        summary="New queries through the reverse query transform; with labels made metric compatible.",
        paper="Online Backfilling with No Regret for Large-Scale Image Retrieval, WACV 2025, arXiv:2301.03767",
    )
    yield RetrieverRecord(
        name="compat:lift",
        target="bowerbird_compat.transform_strategies:Lift",
        role="upgrade",
        summary="Stored old vectors lifted into the new space by a forward transform: no image is read.",
        paper="Privacy-Preserving Model Upgrades with Bidirectional Compatible Training in Image Retrieval, "
        "arXiv:2204.13919",
    )
