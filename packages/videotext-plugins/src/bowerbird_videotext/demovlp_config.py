"""Settings of ``videotext:demovlp``, encoder and objective. Imports pydantic only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bowerbird_videotext.data_configs import ClipAugmentation
from bowerbird_videotext.dual_encoder_config import TextConfig

if TYPE_CHECKING:
    from bowerbird.data.images import Preprocessing


class ExtractorConfig(BaseModel):
    """Where regions are in a frame, and what describes them. The default needs no weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    boxes: Literal["grid", "given", "detector"] = Field(
        default="grid",
        description="grid: cells of a grid; given: boxes of the data set (for training from a region cache); detector: "
        "what detector or torchvision finds.",
    )
    grid: Annotated[tuple[int, int], Field(strict=False)] = Field(
        default=(4, 4), description="With boxes = 'grid': rows and columns."
    )
    detector: str | dict[str, Any] | None = Field(
        default=None, description="With boxes = 'detector': a run or an exported folder of a detector."
    )
    torchvision: str | None = Field(
        default=None, description="With boxes = 'detector': name of a model of torchvision, as fasterrcnn_resnet50_fpn."
    )
    weights: str | None = Field(default=None, description="File of the weights of torchvision's model.")
    num_classes: int | None = Field(default=None, ge=2, description="Of torchvision's model; only exports have it.")
    threshold: float = Field(default=0.05, ge=0, le=1, description="Least score of a detected region.")
    most: int = Field(default=100, ge=1, description="Most detected regions of a frame.")
    encoder: str | dict[str, Any] | None = Field(
        default=None,
        description="With boxes = 'grid' or 'given': encoder whose tokens describe a region; none: its pixels.",
    )
    cell: int = Field(default=8, ge=1, le=256, description="Without an encoder: side of a region's resized pixels.")

    @model_validator(mode="after")
    def _settings_of_the_kind(self) -> Self:
        detectors = [name for name in ("detector", "torchvision") if getattr(self, name) is not None]
        if self.boxes == "detector" and len(detectors) != 1:
            raise ValueError("boxes = 'detector' needs one of detector and torchvision")
        if self.boxes != "detector" and detectors:
            raise ValueError(f"{detectors[0]} is for boxes = 'detector'; boxes is {self.boxes!r}")
        if self.boxes == "detector" and self.encoder is not None:
            raise ValueError("a detector describes its regions itself: leave out encoder")
        if self.weights is not None and self.torchvision is None:
            raise ValueError("weights is for torchvision's model: set torchvision to its name")
        if min(self.grid) < 1:
            raise ValueError(f"grid = {list(self.grid)}: expected rows and columns of 1 or more")
        return self


class DemoVLPConfig(TextConfig):
    """Settings of the encoder ``videotext:demovlp``; the defaults are those of the paper but for the extractor."""

    image_size: int = Field(default=224, ge=1, le=2048, description="Side to which frames are scaled, in pixels.")
    frames: int = Field(default=8, ge=1, le=1024, description="Most frames of a video.")
    regions_per_frame: int = Field(default=30, ge=1, description="The surest regions of a frame that are kept.")
    extractor: ExtractorConfig = Field(default_factory=ExtractorConfig, description="What finds and describes regions.")
    embed_dim: int = Field(default=768, ge=1, description="Width of the region encoder.")
    depth: int = Field(default=12, ge=1, description="Number of its blocks.")
    num_heads: int = Field(default=12, ge=1, description="Its attention heads; a divisor of embed_dim.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of a block's perceptron, over embed_dim.")
    temporal_attention: bool = Field(default=False, description="Attention between regions of the same rank over time.")
    projection_dim: int = Field(default=256, ge=1, description="Width of the space of videos, regions and words.")
    scale: float = Field(default=20.0, ge=0, description="Of the attention between regions and words.")
    focal: bool = Field(default=True, description="Drop what gets no more attention than the mean.")
    ignore_padding: bool = Field(
        default=True,
        description="Padded regions and words do not ask; false, as released: a score depends on the padding.",
    )
    weights: str | None = Field(
        default=None,
        description="First weights: folder of a trained videotext:demovlp or its run, or a timm ViT's file for the "
        "blocks (.safetensors, or .pth with tensors only).",
    )
    inflate: Literal["zeros", "interp", "bilinear"] = Field(
        default="zeros", description="What frames get that the encoder of weights did not have."
    )
    answers: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Vocabulary of answers; training with task = 'qa' makes it of the data."
    )
    qa_hidden: int = Field(default=256, ge=1, description="Width of the answer head.")
    qa_dropout: float = Field(default=0.2, ge=0, lt=1, description="Dropout in its attention.")

    @model_validator(mode="after")
    def _sizes_divide_each_other(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is no multiple of num_heads = {self.num_heads}")
        return self

    def preprocessing(self) -> Preprocessing:
        """Pixels stay in 0..1, and frames are scaled as a whole: so boxes of the data set stay right."""
        from bowerbird.data.images import Preprocessing

        return Preprocessing(size=self.image_size, mean=(0.0,) * 3, std=(1.0,) * 3, resize="squash")


class DemoVLPObjectiveConfig(BaseModel):
    """Settings of the objective ``videotext:demovlp``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    task: Literal["retrieval", "qa"] = Field(
        default="retrieval", description="Align videos and captions, or answer the questions of the data set."
    )
    temperature: float = Field(default=0.05, gt=0, description="Of the loss of whole videos and captions.")
    alignment_weight: float = Field(default=1.0, ge=0, description="Of the loss of regions and words; 0 leaves it out.")
    alignment_scale: float = Field(default=20.0, gt=0, description="Of the softmax in that loss.")
    clips: ClipAugmentation = Field(
        default_factory=ClipAugmentation, description="How clips are drawn from videos. With a cache: sampling only."
    )
    region_cache: str | None = Field(
        default=None,
        description="Folder. Regions of every training video are extracted into it once, before the first step; no "
        "video is decoded afterwards. None: regions are extracted in every step.",
    )
    stored_frames: int = Field(default=8, ge=1, le=1024, description="With a cache: frames of a video that it holds.")
    skip_unreadable: bool = Field(
        default=False, description="With a cache: leave videos that cannot be read out of it, and list them."
    )
    max_answers: int = Field(default=1500, ge=2, description="With task = 'qa': the most frequent answers are learned.")
