"""Settings of modifiers, data sets and evaluators. Apart from them, so that they are read without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bowerbird.retrieval.configs import Intervals

# ------------------------------------------------------------------------------------------------------ modifiers

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


# ------------------------------------------------------------------------------------------------------ data sets

Look = Literal["plain", "tint", "blur", "low-contrast", "bright-background", "noise"]
LOOKS: tuple[Look, ...] = get_args(Look)


class _LeftOut(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    unseen: tuple[str, ...] = ()
    """Domains that are left out of the splits train and validation; they are the split test."""


class _Divided(_LeftOut):
    validation_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the seen domains' items that are the split validation, chosen by a hash of the id."""


class FoldersConfig(_Divided):
    """``domain:folders``."""

    root: Path
    """The folder; an image is at DOMAIN/CLASS/FILE below it."""
    classes: Literal["equal", "common"] = "equal"
    """equal: every domain must have the same classes; common: use those that all domains have."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Images with more pixels are refused."""


class LeftOutConfig(_Divided):
    """``domain:left-out``."""

    source: str
    """Data set whose items have a domain, NAME or NAME?key=value, for example emoji:styles."""
    source_split: str | None = None
    """Part of it; by default everything."""
    label: str | None = None
    """Take the classes from this key of the items' metadata, for example category; by default those of the source."""


class LooksConfig(BaseModel):
    """``domain:looks``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str = "core:digits"
    """Data set whose pictures are rendered, NAME or NAME?key=value."""
    train_split: str = "train"
    """Items of the split train."""
    test_split: str = "test"
    """Items of the splits validation and test."""
    looks: tuple[Look, ...] = Field(default=LOOKS, min_length=1)
    """Looks in which every item is rendered, in this order."""
    unseen: tuple[Look, ...] = ("low-contrast", "bright-background", "noise")
    """Looks that are left out of the splits train and validation; they are the split test."""
    size: int | None = Field(default=16, ge=4, le=512)
    """Side of the pictures in pixels; none: that of the source."""
    seed: int = Field(default=0, ge=0)
    """Of colours and noise."""

    @field_validator("looks")
    @classmethod
    def _each_once(cls, looks: tuple[Look, ...]) -> tuple[Look, ...]:
        if len(set(looks)) < len(looks):
            raise ValueError(f"name each look once; there are {', '.join(LOOKS)}")
        return looks


# ------------------------------------------------------------------------------------------------------ evaluators


class _OnDomains(Intervals):
    dataset: str
    """Name of a data set whose items have a domain, for example domain:folders."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the data set."""


class LeaveOneOutConfig(_OnDomains):
    """``domain:leave-one-out``."""

    train_split: str | None = "train"
    """Items that vote; those of a test item's own domain do not."""
    test_split: str | None = "test"
    """Items that are classified."""
    seen_split: str | None = None
    """Other items of the voters' domains, classified by all voters: what unseen domains are compared with."""
    k: int = Field(20, ge=1)
    """Neighbours that vote."""
    temperature: float = Field(0.07, gt=0)
    """A neighbour's vote weighs exp(cosine / temperature)."""


class DomainRetrievalConfig(_OnDomains):
    """``domain:retrieval``."""

    query_split: str | None = "test"
    """Items that are searched for."""
    gallery_split: str | None = "train"
    """Items that are searched; those of a query's own domain are left out."""
    ks: tuple[int, ...] = (1, 5, 10)
    """Ranks of R@k."""
