"""The plugin ``emoji``: one data set. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="emoji:styles",
        target="bowerbird_emoji.styles:EmojiStyles",
        config="bowerbird_emoji.config:EmojiStylesConfig",
        summary="896 emoji concepts, each drawn in five styles: open-set retrieval across styles, inside the wheel.",
        provides=("image", "label", "item_id", "domain"),
        splits=(
            "all",
            "seen",
            "unseen",
            "old-train",
            "new-train",
            "tune-train",
            "validation",
            "validation-query",
            "validation-gallery",
            "unseen-query",
            "unseen-gallery",
        ),
    )
