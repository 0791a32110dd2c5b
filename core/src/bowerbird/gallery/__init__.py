"""The gallery: items, their vectors in one or two spaces, and search over them. Imports neither torch nor FAISS."""

from __future__ import annotations

from bowerbird.gallery.gallery import Gallery, SearchResult
from bowerbird.gallery.open import create_gallery, open_gallery
from bowerbird.gallery.space import Item, Relation, Space

__all__ = ["Gallery", "Item", "Relation", "SearchResult", "Space", "create_gallery", "open_gallery"]
