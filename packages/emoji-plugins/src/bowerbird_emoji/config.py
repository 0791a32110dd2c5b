"""Settings of ``emoji:styles``. Imports pydantic only."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Style = Literal["noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji"]
STYLES: tuple[Style, ...] = ("noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji", "twemoji")
OLD_STYLES: tuple[Style, ...] = ("noto", "noto-v1", "fluent-emoji-flat")


class EmojiStylesConfig(BaseModel):
    """Which styles, in which order, and how large."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    styles: tuple[Style, ...] | None = Field(
        default=None,
        description="Styles of the items, in this order. By default noto, noto-v1 and fluent-emoji-flat in the split "
        "old-train and all five elsewhere. The *-gallery splits leave out query_style; the *-query splits ignore this.",
    )
    query_style: Style = Field(default="twemoji", description="Style of the *-query splits.")
    size: int = Field(default=64, ge=8, le=512, description="Side of the images in pixels; the sheets have 64.")

    @field_validator("styles")
    @classmethod
    def _some_and_once(cls, styles: tuple[Style, ...] | None) -> tuple[Style, ...] | None:
        if styles is not None and (not styles or len(set(styles)) < len(styles)):
            raise ValueError(f"name at least one style and each once; there are {', '.join(STYLES)}")
        return styles
