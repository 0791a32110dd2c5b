"""Settings of the built-in objectives. Apart from them, so that they are shown and checked without torch."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SoftmaxConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Share of the target spread over all classes.")
    cosine: bool = Field(default=False, description="Compare directions: unit features and unit class vectors.")
    scale: float | None = Field(default=None, gt=0, description="With cosine: factor of the cosine, by default 16.")

    @model_validator(mode="after")
    def _scale_has_an_effect(self) -> Self:
        if self.scale is not None and not self.cosine:
            raise ValueError("scale is a setting of cosine = true")
        return self


class MarginConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["arcface", "cosface"] = Field(default="arcface", description="Margin on the angle, or on the cosine.")
    margin: float | None = Field(
        default=None,
        ge=0,
        description="Radians below pi/2 for arcface (default 0.5), cosine for cosface (default 0.35).",
    )
    scale: float = Field(default=64.0, gt=0, description="Factor of all logits.")

    @model_validator(mode="after")
    def _margin_in_range(self) -> Self:
        limit = math.pi / 2 if self.kind == "arcface" else 2.0
        if self.margin is not None and self.margin >= limit:
            raise ValueError(f"margin = {self.margin} of {self.kind} must be below {limit:.4f}")
        return self


class SupConConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    temperature: float = Field(default=0.1, gt=0, description="Divisor of the cosine.")
