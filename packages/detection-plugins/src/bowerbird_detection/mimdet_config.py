"""Settings of ``detection:mimdet``. Apart from it: shown and checked without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from bowerbird_detection.configs import DetectorKind, HeadsConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Colour = Annotated[tuple[float, float, float], Field(strict=False)]
Sides = Annotated[
    int | tuple[int, int], BeforeValidator(lambda size: tuple(size) if isinstance(size, list) else size)
]  # of square pictures, or (height, width)


class MIMDetConfig(HeadsConfig):
    """Settings of ``detection:mimdet``."""

    detector: DetectorKind = Field(default="mask-rcnn", description="Heads: mask-rcnn, faster-rcnn or keypoint-rcnn.")
    init: str | None = Field(
        default=None,
        description="First weights: a run of mim:mae (with its decoder), an exported ViT, a file or folder of MAE's "
        "official weights, or the name of a timm ViT.",
    )
    image_size: Sides = Field(
        default=800,
        description="Side of square pictures, or [height, width], for whose grid the positions are made; those of "
        "other pictures are interpolated. Also the size in which a picture is embedded.",
    )
    embed_dim: int = Field(default=768, ge=8, description="Width of the encoder; a multiple of 8.")
    depth: int = Field(default=12, ge=1, description="Blocks of the encoder.")
    num_heads: int = Field(default=12, ge=1, description="Attention heads of the encoder.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of a block's perceptron, over its width.")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="Largest rate of stochastic depth in the encoder.")
    layer_norm_eps: float = Field(default=1e-5, gt=0, description="Of all layer norms of the blocks.")
    stem: Literal["conv", "patch"] = Field(
        default="conv", description="conv: overlapping convolutions; patch: ViT's patches, for comparison."
    )
    stem_depth: int = Field(
        default=4, ge=3, le=5, description="Stages of the stem; tokens have a stride of 2 to this power."
    )
    train_ratio: float = Field(default=0.5, gt=0, le=1, description="Share of the tokens encoded in training.")
    test_ratio: float = Field(
        default=1.0, gt=0, le=1, description="Share of the tokens encoded in detection; below 1 results are random."
    )
    fill: Literal["conv", "mask_token"] = Field(
        default="conv", description="What stands for the other tokens: the stem's features, or one learned vector."
    )
    decoder_dim: int = Field(default=512, ge=4, description="Width of the decoder.")
    decoder_depth: int = Field(default=4, ge=0, description="Blocks of the decoder.")
    decoder_heads: int = Field(default=16, ge=1, description="Attention heads of the decoder.")
    levels: int = Field(
        default=4,
        ge=2,
        le=4,
        description="Maps that objects are found in, counted from the coarsest; with 2 the stem's own are left out.",
    )
    norm: Literal["group", "batch"] = Field(
        default="group",
        description="Of pyramid and heads. batch (the paper's; joined over GPUs) needs batches of a dozen pictures.",
    )
    rpn_convs: int = Field(default=2, ge=1, description="Convolutions of the head that proposes regions.")
    box_convs: int = Field(default=4, ge=0, description="Convolutions of the box head.")
    checkpointing: bool = Field(
        default=False, description="Compute the blocks again in the backward pass: less memory, more time."
    )
    lr_multiplier: float = Field(
        default=2.0,
        gt=0,
        description="The stem learns at train.lr, the rest of the encoder at train.lr over this, decoder, pyramid and "
        "heads at train.lr times this.",
    )
    mean: Colour = Field(default=IMAGENET_MEAN, description="Of red, green, blue; as in pre-training.")
    std: Colour = Field(default=IMAGENET_STD, description="Of red, green, blue; as in pre-training.")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.detector == "retinanet":
            raise ValueError("detector = 'retinanet': MIMDet has mask-rcnn, faster-rcnn and keypoint-rcnn")
        if self.stem == "patch" and self.levels < 4:
            raise ValueError(f"levels = {self.levels}: stem = 'patch' makes the finer maps for nothing else; set 4")
        parts = 2 ** (self.stem_depth - 1)
        if self.embed_dim % parts or self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim = {self.embed_dim} must be a multiple of {parts} (stem_depth) and of num_heads = "
                f"{self.num_heads}"
            )
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim = {self.decoder_dim} must be a multiple of 4 and of decoder_heads = {self.decoder_heads}"
            )
        stride = 2**self.stem_depth
        sides = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        for name, values in (("image_size", sides), ("embed_size", (self.embed_size or stride,))):
            if any(side < stride or side % stride for side in values):
                raise ValueError(f"{name} = {list(values)}: expected multiples of the tokens' stride, {stride}")
        return self


def tiny() -> dict[str, Any]:
    """ViT-Tiny, with a decoder to match."""
    return {"embed_dim": 192, "depth": 12, "num_heads": 3, "decoder_dim": 192, "decoder_heads": 6}


def small() -> dict[str, Any]:
    """ViT-Small, with a decoder to match."""
    return {"embed_dim": 384, "depth": 12, "num_heads": 6, "decoder_dim": 256, "decoder_heads": 8}


def base() -> dict[str, Any]:
    """ViT-Base as published."""
    return {"embed_dim": 768, "depth": 12, "num_heads": 12, "drop_path": 0.1, "lr_multiplier": 2.0}


def large() -> dict[str, Any]:
    """ViT-Large as published."""
    return {"embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path": 0.4, "lr_multiplier": 3.5}
