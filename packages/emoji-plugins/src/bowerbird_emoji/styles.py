"""The data set ``emoji:styles``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird_emoji.config import OLD_STYLES, STYLES, EmojiStylesConfig, Style
from bowerbird_emoji.sheets import Concept, concepts, tiles

# split -> which concepts it holds
_SPLITS: dict[str, Callable[[Concept], bool]] = {
    "all": lambda c: True,
    "seen": lambda c: c.part == "seen",
    "unseen": lambda c: c.part == "unseen",
    "old-train": lambda c: c.role == "old",
    "new-train": lambda c: c.part == "seen",
    "tune-train": lambda c: c.part == "seen" and c.role != "validation",
    "validation": lambda c: c.role == "validation",
    "validation-query": lambda c: c.role == "validation",
    "validation-gallery": lambda c: c.role == "validation",
    "unseen-query": lambda c: c.part == "unseen",
    "unseen-gallery": lambda c: c.part == "unseen",
}


class EmojiStyles(Dataset):
    """Concepts x styles, style by style and by name within a style.

    Labels are positions in ``classes``, the names of the split's concepts, so that a query split and its gallery split
    have the same labels. Domains are positions in ``domains``, all five styles, whatever the split. An id is
    ``style/concept`` and never changes. No picture is decoded before the first item is read.
    """

    def __init__(self, chosen: Sequence[Concept], styles: Sequence[Style], size: int) -> None:
        self.concepts = tuple(chosen)
        self.styles = tuple(styles)
        self.size = size
        self.classes = tuple(c.name for c in chosen)
        self.domains = STYLES
        self._ids = [f"{style}/{name}" for style in styles for name in self.classes]

    @classmethod
    def build(cls, config: EmojiStylesConfig | None = None, split: str | None = None) -> Self:
        """The items of ``split`` (default ``all``).

        Raises ``UnknownNameError`` for a split that does not exist and ``InputError`` where a gallery would have no
        style left.
        """
        config = config or EmojiStylesConfig()
        split = split or "all"
        if split not in _SPLITS:
            raise UnknownNameError(
                f"emoji:styles has no split {split!r}; it has {', '.join(_SPLITS)}.{did_you_mean(split, _SPLITS)}"
            )
        styles = config.styles or (OLD_STYLES if split == "old-train" else STYLES)
        if split.endswith("-query"):
            styles = (config.query_style,)
        elif split.endswith("-gallery"):
            styles = tuple(style for style in styles if style != config.query_style)
            if not styles:
                raise InputError(
                    f"emoji:styles: the split {split!r} leaves out query_style={config.query_style!r} and styles="
                    f"{list(config.styles or ())} has no other. Name a second style."
                )
        return cls([c for c in concepts() if _SPLITS[split](c)], styles, config.size)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        style, concept, label = self._at(index)
        image = Image.fromarray(tiles(style)[concept.tile])
        if image.width != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return {"image": image, "label": label, "item_id": f"{style}/{concept.name}", "domain": STYLES.index(style)}

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        return [label for _ in self.styles for label in range(len(self.concepts))]

    def domain_indices(self) -> Sequence[int]:
        return [STYLES.index(style) for style in self.styles for _ in self.concepts]

    def metadata(self) -> list[dict[str, str]]:
        """``label`` (the concept), ``name``, ``category`` and ``style`` of every item, for a gallery to keep."""
        found = [self._at(index) for index in range(len(self))]
        return [
            {"label": c.name, "name": c.name.replace("-", " "), "category": c.category, "style": style}
            for style, c, _ in found
        ]

    def _at(self, index: int) -> tuple[Style, Concept, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        style, label = divmod(index % len(self), len(self.concepts))
        return self.styles[style], self.concepts[label], label
