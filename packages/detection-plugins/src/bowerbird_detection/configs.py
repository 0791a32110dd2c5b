"""Settings of torchvision's detectors and of the objectives. Apart from them: shown and checked without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bowerbird_detection.data_configs import AugmentationConfig

DetectorKind = Literal["faster-rcnn", "mask-rcnn", "keypoint-rcnn", "retinanet"]
ClassLoss = Literal["softmax", "sigmoid", "acsl"]


class HeadsConfig(BaseModel):
    """Everything of a torchvision detector but its backbone. Defaults are torchvision's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    classes: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Names of the classes. Filled in by training; leave it out."
    )
    detector: DetectorKind = Field(default="faster-rcnn", description="Which of torchvision's detectors.")
    num_keypoints: int | None = Field(default=None, ge=1, description="With keypoint-rcnn: points of an object.")
    class_loss: ClassLoss = Field(
        default="softmax",
        description="Of the box head: softmax: one class per box; sigmoid: every class by itself; acsl: sigmoid that "
        "suppresses only confused classes. RetinaNet has the sigmoid's focal loss.",
    )
    shorter_side: int = Field(
        default=800, ge=16, le=8192, description="Pictures are resized until this is their shorter side, in pixels."
    )
    longer_side: int = Field(default=1333, ge=16, le=8192, description="But no longer than this.")
    embed_size: int | None = Field(
        default=None, ge=8, le=8192, description="Side of a picture when it is embedded; by default the backbone's own."
    )
    fpn_width: int = Field(default=256, ge=1, description="Channels of the feature pyramid.")
    head_width: int = Field(default=1024, ge=1, description="Width of the box head (R-CNN).")
    mask_width: int = Field(default=256, ge=1, description="Channels of the mask head (mask-rcnn).")
    keypoint_width: int = Field(default=512, ge=1, description="Channels of the keypoint head (keypoint-rcnn).")
    anchor_scale: float | None = Field(
        default=None, gt=0, description="Side of an anchor over the stride of its map; by default 8, for retinanet 4."
    )
    anchor_ratios: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = Field(
        default=(0.5, 1.0, 2.0), description="Heights of the anchors over their widths."
    )
    proposals_train: int = Field(default=2000, ge=1, description="Proposals per picture in training (R-CNN).")
    proposals_test: int = Field(default=1000, ge=1, description="Proposals (retinanet: candidates per map) afterwards.")
    rois: int = Field(default=512, ge=1, description="Proposals per picture that the heads learn from (R-CNN).")
    score_threshold: float = Field(default=0.05, ge=0, lt=1, description="Objects with lower scores are left out.")
    nms_threshold: float = Field(default=0.5, gt=0, le=1, description="Overlap (IoU) of two boxes of one object.")
    max_detections: int = Field(default=100, ge=1, description="Objects of a picture that are kept.")

    @model_validator(mode="after")
    def _they_fit(self) -> Self:
        if (self.detector == "keypoint-rcnn") != (self.num_keypoints is not None):
            raise ValueError("num_keypoints belongs to detector = 'keypoint-rcnn', which needs it; leave both or none")
        if self.detector == "retinanet" and self.class_loss != "softmax":
            raise ValueError(
                f"class_loss = {self.class_loss!r} is for the box head of R-CNN; retinanet has its "
                "focal loss: leave it out"
            )
        if self.shorter_side > self.longer_side:
            raise ValueError(f"shorter_side = {self.shorter_side} is above longer_side = {self.longer_side}")
        if min(self.anchor_ratios) <= 0:
            raise ValueError(f"anchor_ratios = {list(self.anchor_ratios)}: expected ratios above 0")
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"classes: {', '.join(twice)} {'is' if len(twice) == 1 else 'are'} there twice")
        return self


class TorchvisionConfig(HeadsConfig):
    """Settings of ``detection:torchvision``."""

    backbone: str | dict[str, Any] = Field(
        default="resnet50",
        description="A timm model, the folder of an exported encoder or of a run, or a table with use and settings.",
    )
    weights: str | None = Field(
        default=None, description="File of first weights of a timm backbone (.safetensors, .pth)."
    )
    pretrained: bool = Field(default=False, description="Let timm fetch its weights of the backbone.")
    freeze_norm: bool = Field(
        default=False, description="Keep the statistics of the backbone's batch normalisation (for trained backbones)."
    )

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained are two sources of the first weights; give one of them")
        if isinstance(self.backbone, dict) and not isinstance(self.backbone.get("use"), str):
            raise ValueError(f"backbone = {self.backbone}: a table needs 'use', the name of an encoder")
        return self


class DetectionConfig(AugmentationConfig):
    """Settings of ``detection:detector``: how pictures are changed in training."""


class ACSLConfig(AugmentationConfig):
    """Settings of ``detection:acsl``."""

    run: str = Field(description="Folder of the run of the first stage: the same detector, trained with softmax.")
    class_loss: ClassLoss = Field(
        default="acsl",
        description="acsl, or its controls with the same start and length: sigmoid (all classes suppressed), softmax.",
    )
    score_threshold: float = Field(
        default=0.7, gt=0, lt=1, description="A box suppresses another class from this probability on."
    )
    background_fractions: Annotated[tuple[float, float, float], Field(strict=False)] = Field(
        default=(0.01, 0.1, 1.0),
        description="Share of the background boxes that suppress rare, common and frequent classes.",
    )
    rare_up_to: int = Field(default=10, ge=0, description="Most training pictures with a rare class (LVIS: 10).")
    common_up_to: int = Field(default=100, ge=0, description="Most training pictures with a common class (LVIS: 100).")

    @model_validator(mode="after")
    def _groups_and_shares(self) -> Self:
        if self.rare_up_to > self.common_up_to:
            raise ValueError(f"rare_up_to = {self.rare_up_to} is above common_up_to = {self.common_up_to}")
        if not all(0 <= share <= 1 for share in self.background_fractions):
            raise ValueError(f"background_fractions = {list(self.background_fractions)}: expected shares from 0 to 1")
        return self
