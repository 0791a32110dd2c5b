"""Settings of the modifiers. Apart from them, so that they are shown and checked without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class _Inserted(BaseModel):
    """Where something is inserted, and how often it acts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    p: float = Field(0.5, ge=0, le=1)
    """How often a point acts on a batch; every point has its own coin."""
    eps: float = Field(1e-6, gt=0)
    """Added to variances before their roots."""
    layout: Literal["auto", "channels-first", "channels-last"] = "auto"
    """Of the layers' outputs: auto takes three dimensions for tokens (B, N, C), more for (B, C, H, W); channels-last is
    (B, ..., C), for networks such as Swin."""
    strict: bool = True
    """Refuse batches of one and maps of one position, which have no statistics; else they pass unchanged."""


class DSUConfig(_Inserted):
    """``domain:dsu``."""

    layers: Names = ("resnet",)
    """Layers behind which noise is added: names, their endings, patterns (layer?, blocks.*), or resnet (conv1, maxpool,
    layer1 to layer4: the authors' six points) or vit (every block)."""
    scale: float = Field(1.0, ge=0)
    """Of the noise; 1: as wide as the statistics differ within the batch."""


class MixStyleConfig(_Inserted):
    """``domain:mixstyle``."""

    layers: Names = ("layer1", "layer2")
    """Layers behind which statistics are mixed; by default those of the paper: the first two stages of a ResNet."""
    alpha: float = Field(0.1, gt=0)
    """The weights of the mixture are drawn from Beta(alpha, alpha)."""
