"""Data sets, and everything between a file on disk and the ``image`` key of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bowerbird.data.views import images_of, subset

__all__ = ["images_of", "subset"]


def __getattr__(name: str) -> Any:
    # On first use only: the views are data sets, whose contract imports torch, and opening an image must not.
    if name in __all__:
        from bowerbird.data import views

        return getattr(views, name)
    raise AttributeError(f"module 'bowerbird.data' has no attribute {name!r}")
