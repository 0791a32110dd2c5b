"""Settings of the orders. A module of its own, because computing an order needs no pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class UncertaintyConfig(BaseModel):
    """Settings of the order ``core:uncertainty`` (see ``bowerbird.upgrade.orders``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    strategy: Literal["entropy", "least_confidence", "margin"] = "entropy"
    """How uncertainty is measured."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over cosines with the class centres."""
    clusters: int | None = Field(default=None, ge=2)
    """Number of k-means centres where there are no labels; by default round(sqrt(items / 2)) between 2 and 1,000."""


class ClassDistanceConfig(BaseModel):
    """Settings of the order ``core:class-distance`` (see ``bowerbird.upgrade.orders``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    first: Literal["far", "near"] = "far"
    """Which end is moved first: items far from the mean of their class, or near it."""
    clusters: int | None = Field(default=None, ge=2)
    """Number of k-means centres where there are no labels; by default round(sqrt(items / 2)) between 2 and 1,000."""


class TrafficConfig(BaseModel):
    """Settings of the order ``core:traffic`` (see ``bowerbird.upgrade.orders``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    log: str | None = None
    """File of requests: .csv, .jsonl, .json or .parquet with a column id and, optionally, a column count."""
    first: Literal["most", "least"] = "most"
    """Which end is moved first."""
