"""Settings of ``detection:obj2seq``. Apart from it: shown and checked without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sides = Annotated[tuple[int, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Obj2SeqConfig(BaseModel):
    """Settings of ``detection:obj2seq``. Defaults are the paper's for detection on COCO."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    classes: Names = Field(default=(), description="Names of the classes. Filled in by training; leave it out.")

    backbone: str | dict[str, Any] = Field(
        default="resnet50",
        description="A timm model, the folder of an exported encoder or of a run, or a table with use and settings.",
    )
    stages: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        default=(),
        description="Instead of a backbone: channels of stages of 3 x 3 convolutions, each of stride 2. For small "
        "pictures.",
    )
    levels: int = Field(default=3, ge=1, description="Maps of the backbone that are read, counted from the coarsest.")
    extra_levels: int = Field(default=1, ge=0, description="Coarser maps that are made of them.")
    weights: str | None = Field(
        default=None, description="File of first weights of a timm backbone (.safetensors, .pth)."
    )
    pretrained: bool = Field(default=False, description="Let timm fetch its weights of the backbone.")
    freeze_norm: bool = Field(
        default=True, description="Keep the statistics of the backbone's batch normalisation (for trained backbones)."
    )

    prompting: Literal["indicator", "every", "none"] = Field(
        default="indicator",
        description="indicator: the categories that the picture probably shows are looked for; every: all of them, "
        "without an indicator; none: no prompts, queries for objects of any category, for comparison.",
    )
    head: Literal["sequence", "parallel"] = Field(
        default="sequence", description="sequence: an object's numbers one by one; parallel: at once, for comparison."
    )
    combine: Literal["multiple", "none"] | None = Field(
        default=None,
        description="multiple: an object's score times the presence of its category; none: the object's alone. By "
        "default multiple where there is an indicator.",
    )
    refine: bool = Field(default=False, description="Every decoder layer corrects the boxes of the one before.")
    retained: int = Field(default=20, ge=1, description="Most categories of a picture that are looked for.")
    num_queries: int = Field(default=100, ge=1, description="Queries of every category of a picture.")
    num_keypoints: int = Field(default=0, ge=0, description="Keypoints of an object; 0: boxes only.")
    keypoint_classes: Names = Field(default=(), description="Classes with keypoints; by default all.")
    keypoint_sigmas: Annotated[tuple[float, ...], Field(strict=False)] = Field(
        default=(), description="How exactly each point is placed, for OKS; by default COCO's for 17 points, else 0.05."
    )
    oks_variant: Literal["official", "coco"] = Field(
        default="official", description="The keypoint loss of the authors' code, or with COCO's definition of OKS."
    )
    prompt_vectors: str | None = Field(
        default=None, description=".npy file with a first vector for every class, such as text features of the names."
    )
    prompt_width: int | None = Field(
        default=None, ge=1, description="Width of these vectors. Filled in by training; leave it out."
    )

    embed_dim: int = Field(default=256, ge=4, description="Width of features and queries.")
    num_heads: int = Field(default=8, ge=1, description="Heads of every attention.")
    num_points: int = Field(default=4, ge=1, description="Points of a head and level of the deformable attention.")
    ffn_dim: int = Field(default=1024, ge=1, description="Width inside feed-forward layers.")
    encoder_layers: int = Field(default=6, ge=0, description="Layers of attention between positions of the maps.")
    prompt_blocks: int = Field(default=2, ge=1, description="How often the indicator's prompts look at the picture.")
    decoder_layers: int = Field(default=4, ge=1, description="Layers of the object decoder; the paper's 6 for poses.")

    shorter_side: int = Field(
        default=800, ge=8, le=8192, description="Pictures are resized until this is their shorter side, in pixels."
    )
    longer_side: int = Field(default=1333, ge=8, le=8192, description="But no longer than this.")
    train_sides: Sides = Field(
        default=(), description="In training the shorter side is one of these, at random; by default shorter_side."
    )
    embed_size: int | None = Field(
        default=None, ge=8, le=8192, description="Side of a picture when it is embedded; by default the backbone's own."
    )
    backbone_lr: float = Field(default=0.1, gt=0, description="Factor of the learning rate of the backbone.")
    points_lr: float = Field(
        default=0.1, gt=0, description="Factor of the learning rate of reference points and sampling offsets."
    )
    score_threshold: float = Field(default=0.0, ge=0, lt=1, description="Objects with lower scores are left out.")
    max_detections: int = Field(default=100, ge=1, description="Objects of a picture that are kept.")

    @model_validator(mode="after")
    def _they_fit(self) -> Self:
        if self.embed_dim % 4 or self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim = {self.embed_dim}: expected a multiple of 4 and of num_heads = {self.num_heads}"
            )
        if self.stages and (self.weights or self.pretrained or self.backbone != "resnet50"):
            raise ValueError("stages take the place of a backbone: leave out backbone, weights and pretrained")
        if self.stages and (self.levels > len(self.stages) or min(self.stages) < 1):
            raise ValueError(f"stages = {list(self.stages)}: expected levels = {self.levels} or more, of widths >= 1")
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained are two sources of the first weights; give one of them")
        if self.prompting != "indicator" and self.combine == "multiple":
            raise ValueError(f"combine = 'multiple' needs prompting = 'indicator', not {self.prompting!r}")
        if self.keypoint_classes and not self.num_keypoints:
            raise ValueError("keypoint_classes needs num_keypoints")
        if self.prompting == "none" and self.keypoint_classes:
            raise ValueError("keypoint_classes: without prompts every class has the same task; leave it out")
        if self.keypoint_sigmas and len(self.keypoint_sigmas) != self.num_keypoints:
            raise ValueError(f"keypoint_sigmas: {len(self.keypoint_sigmas)} for num_keypoints = {self.num_keypoints}")
        if min(self.keypoint_sigmas, default=1) <= 0:
            raise ValueError(f"keypoint_sigmas = {list(self.keypoint_sigmas)}: expected numbers above 0")
        sides = (self.shorter_side, *self.train_sides)
        if min(sides) < 8 or max(sides) > self.longer_side:
            raise ValueError(f"shorter_side and train_sides {list(sides)}: expected 8 to longer_side")
        if len(set(self.classes)) != len(self.classes):
            twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
            raise ValueError(f"classes: {', '.join(twice)} {'is' if len(twice) == 1 else 'are'} there twice")
        return self


def pose() -> dict[str, Any]:
    """The paper's setting for people and their 17 keypoints: every class is looked for, 6 decoder layers."""
    return {"prompting": "every", "num_keypoints": 17, "decoder_layers": 6}


def small() -> dict[str, Any]:
    """For pictures of about 64 pixels, trained from nothing: three stages of convolutions, one decoder pair."""
    return {
        "stages": [24, 48, 64],
        "levels": 2,
        "extra_levels": 0,
        "embed_dim": 64,
        "num_heads": 4,
        "num_points": 2,
        "ffn_dim": 128,
        "encoder_layers": 0,
        "prompt_blocks": 1,
        "decoder_layers": 2,
        "num_queries": 10,
        "shorter_side": 64,
        "longer_side": 64,
        "backbone_lr": 1.0,
        "points_lr": 1.0,
    }
