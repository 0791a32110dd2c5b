"""Spaces: what makes two vectors comparable, and the relations between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bowerbird.errors import InputError

MAX_DIM = 65_536
DTYPES = ("float32", "float16")
LIFTED = "lifted:"  # what the encoder of a lifted space begins with; the encoder that it stands for follows


@dataclass(frozen=True)
class Space:
    """An embedding space. Vectors are compared only inside one space, or along a registered relation.

    Attributes:
        fingerprint: Identity: a digest of encoder, settings, weights and preprocessing. Two spaces are the same space
            exactly if their fingerprints are equal.
        encoder: Reference with which the encoder can be loaded again (``bowerbird.load_encoder``), or free text.
        dim: D, the width of its vectors.
        metric: ``cosine``; vectors are stored with length 1 and ``distance = 1 - cosine``.
    """

    fingerprint: str
    encoder: str
    dim: int
    metric: str = "cosine"

    def __post_init__(self) -> None:
        if not isinstance(self.fingerprint, str) or not 1 <= len(self.fingerprint) <= 200:
            raise InputError(f"a space's fingerprint must be text of 1 to 200 characters, got {self.fingerprint!r}")
        if not isinstance(self.dim, int) or isinstance(self.dim, bool) or not 1 <= self.dim <= MAX_DIM:
            raise InputError(f"a space's dim must be a whole number from 1 to {MAX_DIM}, got {self.dim!r}")
        if self.metric != "cosine":
            raise InputError(f"a space's metric is {self.metric!r}; accepted: 'cosine'")

    @property
    def lifted(self) -> bool:
        """Whether its vectors were made from those of another space, so that no encoder makes them from images."""
        return self.encoder.startswith(LIFTED)

    def __str__(self) -> str:
        return f"{self.fingerprint[:12]} ({self.encoder}, {self.dim}-d)"


@dataclass(frozen=True)
class Relation:
    """How queries of the space ``new`` reach vectors of the space ``old`` (fingerprints).

    Attributes:
        kind: ``compatible``: they may be compared as they are. ``transform``: they are mapped by a registered
            ``VectorTransform`` from ``new`` to ``old``.
        evidence: What was measured when the relation was registered (plain JSON data).
    """

    kind: str
    new: str
    old: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One item of a gallery.

    Attributes:
        id: The name its owner gave it; unique among the live items.
        num: Internal number. It names one *content* of the item: an edited item gets a new one.
        uri: Where its content is, or ``None`` for galleries of vectors only.
        content_hash: Digest of the content, or ``None``.
        metadata: JSON object.
    """

    id: str
    num: int
    uri: str | None = None
    content_hash: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
