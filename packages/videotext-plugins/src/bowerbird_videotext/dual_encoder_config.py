"""Settings of ``videotext:dual-encoder``. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from bowerbird.data.images import Preprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Triple = Annotated[tuple[float, float, float], Field(strict=False)]


class FramesConfig(BaseModel):
    """How the frames of a clip are prepared."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: int = Field(default=224, ge=1, le=2048, description="Side of the square frames in pixels.")
    frames: int = Field(default=4, ge=1, le=1024, description="Most frames of a clip.")
    resize: Literal["squash", "crop"] = Field(
        default="crop", description="squash: the whole frame; crop: shorter side, then the centre."
    )
    crop_pct: float = Field(
        default=1.0, gt=0, le=1, description="With resize = 'crop': share of the side that is kept."
    )
    mean: Triple = Field(default=IMAGENET_MEAN, description="Of red, green, blue.")
    std: Triple = Field(default=IMAGENET_STD, description="Of red, green, blue.")

    def preprocessing(self) -> Preprocessing:
        from bowerbird.data.images import Preprocessing

        return Preprocessing(
            size=self.image_size, mean=self.mean, std=self.std, resize=self.resize, crop_pct=self.crop_pct
        )


class TextConfig(BaseModel):
    """Settings of a text encoder: a small one of our own, or a model of the transformers library."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text_model: str | None = Field(
        default=None,
        description="Local folder of a DistilBERT or BERT model with its tokenizer; its weights are taken.",
    )
    text_architecture: dict[str, Any] | None = Field(
        default=None,
        description="Settings of a transformers model with model_type, for fresh weights; exports have it.",
    )
    text_dim: int = Field(default=256, ge=1, description="Width of the small text encoder.")
    text_depth: int = Field(default=4, ge=0, description="Number of its blocks.")
    text_heads: int = Field(default=4, ge=1, description="Its attention heads; a divisor of text_dim.")
    text_dropout: float = Field(default=0.0, ge=0, lt=1, description="Its dropout.")
    max_tokens: int = Field(default=77, ge=3, description="Longest caption in word pieces; longer ones are cut.")
    tokenizer: str | None = Field(
        default=None, description="Folder of a tokenizer; by default that of text_model, else one made of the captions."
    )
    vocab_size: int = Field(default=8192, ge=6, description="Most word pieces of a tokenizer made of the captions.")
    vocabulary: int | None = Field(
        default=None, ge=6, description="Number of word pieces of the trained text encoder; only exports have it."
    )

    @model_validator(mode="after")
    def _one_text_encoder(self) -> Self:
        if self.text_model is not None and self.text_architecture is not None:
            raise ValueError("text_model and text_architecture both describe the text encoder: give one of them")
        if self.text_dim % self.text_heads:
            raise ValueError(f"text_dim = {self.text_dim} is no multiple of text_heads = {self.text_heads}")
        return self


class DualEncoderConfig(FramesConfig, TextConfig):
    """Settings of ``videotext:dual-encoder``; the defaults are those of the paper, ViT-B/16 on 4 frames."""

    patch_size: int = Field(default=16, ge=1, description="Side of a patch; divides image_size.")
    embed_dim: int = Field(default=768, ge=1, description="Width of the video encoder.")
    depth: int = Field(default=12, ge=0, description="Number of its blocks.")
    num_heads: int = Field(default=12, ge=1, description="Its attention heads; a divisor of embed_dim.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of a block's perceptron, over embed_dim.")
    attention: Literal["divided", "joint"] = Field(
        default="divided",
        description="divided: a patch sees its frame, and its place in all frames; joint: it sees all patches.",
    )
    temporal_attention: bool = Field(
        default=True, description="Attention over time. With attention = 'joint' there is no separate one."
    )
    temporal_embedding: bool = Field(default=True, description="Learned positions of frames.")
    time_init: Literal["zeros", "official_zeros", "normal"] = Field(
        default="zeros",
        description="Start of time attention. zeros: as if it were not there; official_zeros: the same in the way of "
        "the released code, which hardly learns; normal: like other layers.",
    )
    projection_dim: int = Field(default=256, ge=1, description="Width of the space of videos and texts.")
    weights: str | None = Field(
        default=None,
        description="First weights: folder of a trained dual encoder or its run, or a timm ViT's file for the video "
        "encoder (.safetensors, or .pth with tensors only).",
    )
    inflate: Literal["zeros", "interp", "bilinear"] = Field(
        default="zeros", description="What frames get that the dual encoder of weights did not have."
    )

    @model_validator(mode="after")
    def _sizes_divide_each_other(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} is no multiple of patch_size = {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is no multiple of num_heads = {self.num_heads}")
        return self
