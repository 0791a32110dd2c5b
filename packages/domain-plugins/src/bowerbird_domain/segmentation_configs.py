"""Settings of the segmentation networks, objectives and evaluator. Apart from them: shown and checked without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Statistics = Literal["shared", "private"]
Counts = Annotated[tuple[int, ...], Field(strict=False, min_length=1)]


class NetworkConfig(BaseModel):
    """What every segmentation network has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    datasets: dict[str, int] = Field(
        default={}, description="Data set -> number of its classes. Filled in by the objective; leave it out."
    )
    statistics: Statistics = Field(
        default="shared", description="Batch normalisation for all, or one per data set. Filled in by the objective."
    )

    @model_validator(mode="after")
    def _classes_and_branches(self) -> Self:
        if any(count < 2 for count in self.datasets.values()):
            raise ValueError(f"datasets = {self.datasets}: a data set needs at least two classes")
        if self.statistics == "private" and not self.datasets:
            raise ValueError("statistics = 'private' needs the names of the data sets (datasets)")
        return self


class FCNConfig(NetworkConfig):
    """Settings of ``domain:fcn``."""

    widths: Counts = Field(default=(16, 24, 24, 24), description="Channels of every 3 x 3 convolution.")
    dilations: Counts = Field(default=(1, 1, 2, 2), description="Distance of the taps of every convolution.")
    strides: Counts | None = Field(default=None, description="Step of every convolution; by default 1.")
    image_size: int = Field(default=16, ge=4, le=8192, description="Side of a picture when it is embedded.")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        for name in ("dilations", "strides"):
            found = getattr(self, name)
            if found is not None and len(found) != len(self.widths):
                raise ValueError(f"{name} = {list(found)}: expected one for each of the {len(self.widths)} widths")
        if min(*self.widths, *self.dilations, *(self.strides or (1,))) < 1:
            raise ValueError("widths, dilations and strides must be at least 1")
        return self


class PSPNetConfig(NetworkConfig):
    """Settings of ``domain:pspnet``."""

    backbone: str = Field(default="resnet18", description="timm model of convolutions, for example resnet18.")
    output_stride: Literal[8, 16, 32] = Field(default=8, description="Pixels of the picture per pixel of the maps.")
    weights: str | None = Field(default=None, description="File of first weights of the backbone (.safetensors, .pth).")
    pretrained: bool = Field(default=False, description="Let timm fetch its weights of the backbone.")
    bins: Counts = Field(default=(1, 2, 3, 6), description="Sides of the grids that the pyramid pools to.")
    width: int = Field(default=128, ge=1, description="Channels of every level of the pyramid, and of the result.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Share of the result's channels left out in training.")
    image_size: int = Field(default=512, ge=8, le=8192, description="Side of a picture when it is embedded.")

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained are two sources of the first weights; give one of them")
        if min(self.bins) < 1:
            raise ValueError(f"bins = {list(self.bins)}: expected sides of at least 1")
        return self


class PixelConfig(BaseModel):
    """What the objectives of segmentation have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={}, description="Data set -> weight of its loss in the sum; 1 for those left out."
    )
    crop_size: int | None = Field(
        default=None, ge=4, le=8192, description="Side of a random crop in pixels; by default the whole picture."
    )
    scale: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(1.0, 1.0), description="Smallest and largest factor that a picture is resized with before the crop."
    )
    flip: bool = Field(default=False, description="Mirror every other picture left to right.")

    @model_validator(mode="after")
    def _factors_in_order(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale = {list(self.scale)}: expected two factors above 0, smallest first")
        if self.scale != (1.0, 1.0) and self.crop_size is None:
            raise ValueError("scale changes the sizes of pictures, and a batch needs equal ones: set crop_size")
        return self


class SegmentationConfig(PixelConfig):
    """Settings of ``domain:segmentation``."""

    statistics: Statistics = Field(
        default="shared",
        description="shared: one batch normalisation for all data sets (naive joint training, or a single data set); "
        "private: one for each, as domain:cdcl.",
    )


class CDCLConfig(PixelConfig):
    """Settings of ``domain:cdcl``."""

    @property
    def statistics(self) -> Statistics:
        return "private"


class MIoUConfig(BaseModel):
    """Settings of ``domain:miou``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: str = Field(description="Segmentation sets to measure on.")
    split: str | None = Field(default=None, description="Which part of them.")
    settings: dict[str, Any] = Field(default={}, description="Of the data set.")
    branch: Literal["own", "nearest"] = Field(
        default="own",
        description="Whose batch normalisation a set gets: its own, or (as if it were unknown) that of the data set "
        "with the nearest statistics. The classes are its own in both cases.",
    )
    batch_size: int = Field(default=64, ge=1, description="Pictures of one size at once.")
