"""Settings of core's data sets. Imports pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ImageFolderConfig(BaseModel):
    """Where the images are and what their folders mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path = Field(description="The folder.")
    layout: Literal["auto", "classes", "splits", "flat"] = Field(
        default="auto",
        description="classes: root/CLASS/...; splits: root/SPLIT/CLASS/... with SPLIT in train, val, test; flat: any "
        "folders, no labels; auto: splits where root has no other folders than those three, else classes.",
    )
    test_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="With layout classes or flat: share of the split test, chosen by a hash of the id.",
    )
    max_pixels: int = Field(default=64_000_000, ge=1, description="Images with more pixels are refused.")


class FashionMnistConfig(BaseModel):
    """Where the four IDX files are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path | None = Field(
        default=None,
        description="Folder of the IDX files, gzipped or not. By default that of the Debian package "
        "dataset-fashion-mnist, /usr/share/datasets/fashion-mnist.",
    )
    download: bool = Field(
        default=False, description="Let torchvision download the files into root where they are missing."
    )
