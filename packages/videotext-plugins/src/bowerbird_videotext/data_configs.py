"""Settings of data sets of videos and of their augmentation. Imports pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ClipAugmentation(BaseModel):
    """How a clip of a few frames is drawn from a video for training. What is drawn holds for all its frames."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sampling: Literal["random", "uniform"] = Field(
        default="random", description="A random frame of every part of the video, or the middle one."
    )
    crop: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(1.0, 1.0),
        description="Smallest and largest share of a frame's area that a random crop keeps; the papers take 0.5 to 1. "
        "1 and 1: no crop.",
    )
    crop_ratio: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(3 / 4, 4 / 3), description="Smallest and largest ratio of the sides of a crop."
    )
    flip: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Probability of mirroring left to right. The papers take 0.5; captions that say left or right "
        "become wrong by it.",
    )

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        low, high = self.crop
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop = {[low, high]}: expected two shares, 0 < smaller <= larger <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = {[low, high]}: expected two ratios, 0 < smaller <= larger")
        return self
