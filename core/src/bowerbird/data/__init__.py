"""Data sets, and everything between a file on disk and the ``image`` key of a batch. Nothing here imports torch."""

from __future__ import annotations

from bowerbird.data.views import images_of, subset

__all__ = ["images_of", "subset"]
