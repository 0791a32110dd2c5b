"""Settings of ``videotext:all-in-one``. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from bowerbird_videotext.dual_encoder_config import FramesConfig


class AllInOneConfig(FramesConfig):
    """Settings of the encoder ``videotext:all-in-one``; the defaults are those of the paper's model B."""

    frames: int = Field(default=3, ge=1, le=1024, description="Most frames of a clip.")
    patch_size: int = Field(default=16, ge=1, description="Side of a patch; divides image_size.")
    embed_dim: int = Field(default=768, ge=2, description="Width of the transformer.")
    depth: int = Field(default=12, ge=1, description="Number of its blocks.")
    num_heads: int = Field(default=12, ge=1, description="Its attention heads; a divisor of embed_dim.")
    mlp_ratio: float = Field(default=4.0, gt=0, description="Hidden width of a block's perceptron, over embed_dim.")
    roll_divisor: int = Field(default=8, ge=2, description="About 2/roll_divisor of a frame's tokens roll along time.")
    roll: bool = Field(default=True, description="Roll tokens along time; false for comparison.")
    temporal_embedding: bool = Field(default=True, description="Learned positions of frames.")
    shuffle_patches: bool = Field(
        default=False,
        description="Roll other patches in every forward pass of pairs, as the released code; scores become random.",
    )
    projection_dim: int = Field(default=512, ge=1, description="Width of the space of videos and texts alone.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Of embeddings, attention's output and perceptrons.")
    drop_path: float = Field(default=0.1, ge=0, lt=1, description="Largest rate of stochastic depth.")
    max_tokens: int = Field(default=40, ge=3, description="Longest text in word pieces; longer ones are cut.")
    tokenizer: str | None = Field(
        default=None, description="Folder of a tokenizer; by default that of text_weights, else one made of the texts."
    )
    vocab_size: int = Field(default=8192, ge=6, description="Most word pieces of a tokenizer made of the texts.")
    weights: str | None = Field(
        default=None,
        description="First weights: folder of a trained videotext:all-in-one or its run (its answers are left out), or "
        "a timm ViT's file for blocks and patches (.safetensors, or .pth with tensors only).",
    )
    text_weights: str | None = Field(
        default=None, description="Local folder of a BERT model, of which embeddings and tokenizer are taken."
    )
    vocabulary: int | None = Field(
        default=None, ge=6, description="Number of word pieces of the trained encoder; only exports have it."
    )
    answers: Annotated[tuple[str, ...], Field(strict=False)] | None = Field(
        default=None, description="Answers that the encoder can give, in order; only exports have them."
    )
    chooses: bool = Field(
        default=False, description="Whether pairs are scored by what was trained to choose; only exports have it."
    )

    @model_validator(mode="after")
    def _sizes_divide_each_other(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} is no multiple of patch_size = {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim = {self.embed_dim} is no multiple of num_heads = {self.num_heads}")
        return self


def tiny() -> dict[str, Any]:
    """ViT-Ti: about 12 M parameters with BERT's vocabulary."""
    return {"embed_dim": 192, "depth": 12, "num_heads": 3}


def small() -> dict[str, Any]:
    """ViT-S: about 33 M parameters with BERT's vocabulary."""
    return {"embed_dim": 384, "depth": 12, "num_heads": 6}


def base() -> dict[str, Any]:
    """ViT-B: about 110 M parameters with BERT's vocabulary."""
    return {"embed_dim": 768, "depth": 12, "num_heads": 12}
