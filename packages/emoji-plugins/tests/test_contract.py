"""``emoji:styles`` keeps the contract of data sets."""

from __future__ import annotations

from bowerbird.testing import DatasetContract


class TestEmojiStyles(DatasetContract):
    name = "emoji:styles"
    disjoint = (
        ("seen", "unseen"),
        ("new-train", "unseen"),
        ("old-train", "unseen"),
        ("tune-train", "validation"),
        ("old-train", "validation"),
        ("unseen-query", "unseen-gallery"),
        ("validation-query", "validation-gallery"),
    )
