"""The records of ``bowerbird-domain``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ModifierRecord, ObjectiveRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_modifiers() -> Iterable[ModifierRecord]:
    yield ModifierRecord(
        name="domain:dsu",
        target="bowerbird_domain.modifiers:DSUModifier",
        config="bowerbird_domain.configs:DSUConfig",
        summary="Noise in the feature statistics of a batch while training, as wide as they differ within the batch.",
        paper="Uncertainty Modeling for Out-of-Distribution Generalization, ICLR 2022, arXiv:2202.03958",
    )
    yield ModifierRecord(
        name="domain:mixstyle",
        target="bowerbird_domain.modifiers:MixStyleModifier",
        config="bowerbird_domain.configs:MixStyleConfig",
        summary="Every sample takes a part of the feature statistics of another one while training; DSU's baseline.",
        paper="Domain Generalization with MixStyle, ICLR 2021, arXiv:2104.02008",
    )


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="domain:fcn",
        target="bowerbird_domain.segmentation:FCN",
        config="bowerbird_domain.segmentation_configs:FCNConfig",
        summary="Segmentation network of plain 3 x 3 convolutions, for small pictures; classes per data set.",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="domain:pspnet",
        target="bowerbird_domain.segmentation:PSPNet",
        config="bowerbird_domain.segmentation_configs:PSPNetConfig",
        summary="Segmentation network on a timm backbone with a pyramid of pooled maps; classes per data set.",
        paper="Pyramid Scene Parsing Network, CVPR 2017, arXiv:1612.01105",
        outputs=("pooled", "tokens"),
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="domain:cdcl",
        target="bowerbird_domain.segmentation:SegmentationObjective",
        config="bowerbird_domain.segmentation_configs:CDCLConfig",
        summary="Segmentation of several data sets at once: convolutions shared, batch normalisation for each its own.",
        paper="Cross-Dataset Collaborative Learning for Semantic Segmentation, AAAI 2022, arXiv:2103.11351",
        needs=("image", "label_map", "domain"),
        encoder_needs=("tokens",),
    )
    yield ObjectiveRecord(
        name="domain:segmentation",
        target="bowerbird_domain.segmentation:SegmentationObjective",
        config="bowerbird_domain.segmentation_configs:SegmentationConfig",
        summary="Segmentation of one data set, or of several with everything but the classes shared; CDCL's baselines.",
        needs=("image", "label_map", "domain"),
        encoder_needs=("tokens",),
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="domain:canvases",
        target="bowerbird_domain.canvases:Canvases",
        config="bowerbird_domain.canvases:CanvasesConfig",
        summary="Small segmentation sets of different looks and classes, composed of the items of other data sets.",
        presets={"three-sources": "bowerbird_domain.canvases:three_sources"},
        provides=("image", "label_map", "item_id", "domain"),
    )
    yield DatasetRecord(
        name="domain:folders",
        target="bowerbird_domain.folders:DomainFolders",
        config="bowerbird_domain.configs:FoldersConfig",
        summary="Your own pictures in folders DOMAIN/CLASS, as PACS or Office-Home; leave domains out of training.",
        provides=("image", "label", "item_id", "domain"),
        splits=("all", "train", "validation", "test"),
    )
    yield DatasetRecord(
        name="domain:left-out",
        target="bowerbird_domain.left_out:LeftOut",
        config="bowerbird_domain.configs:LeftOutConfig",
        summary="Any data set whose items have a domain, such as emoji:styles, with domains left out of training.",
        provides=("image", "label", "item_id", "domain"),
        splits=("all", "train", "validation", "test"),
    )
    yield DatasetRecord(
        name="domain:looks",
        target="bowerbird_domain.looks:Looks",
        config="bowerbird_domain.configs:LooksConfig",
        summary="Pictures of another data set in six looks (tint, blur, fog, noise, ...): domains without a download.",
        provides=("image", "label", "item_id", "domain"),
        splits=("all", "train", "validation", "test"),
    )
    yield DatasetRecord(
        name="domain:segmentation-folders",
        target="bowerbird_domain.segmentation_sets:SegmentationFolders",
        config="bowerbird_domain.segmentation_sets:FoldersConfig",
        summary="Your own segmentation sets: folders of pictures and label maps.",
        provides=("image", "label_map", "item_id", "domain"),
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield EvaluatorRecord(
        name="domain:leave-one-out",
        target="bowerbird_domain.evaluators:LeaveOneOut",
        config="bowerbird_domain.configs:LeaveOneOutConfig",
        summary="Accuracy in every domain with labels of the other domains only (k-NN).",
        needs=("image", "label", "domain"),
    )
    yield EvaluatorRecord(
        name="domain:miou",
        target="bowerbird_domain.miou:MIoU",
        config="bowerbird_domain.segmentation_configs:MIoUConfig",
        summary="Mean intersection over union of every segmentation set.",
        needs=("image", "label_map", "domain"),
    )
    yield EvaluatorRecord(
        name="domain:retrieval",
        target="bowerbird_domain.evaluators:DomainRetrieval",
        config="bowerbird_domain.configs:DomainRetrievalConfig",
        summary="Search across domains: mAP and R@k of queries whose gallery holds other domains only.",
        needs=("image", "label", "domain"),
    )
