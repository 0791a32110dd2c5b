"""Bowerbird: train representations, search a durable gallery with them, upgrade the model while the gallery serves.

Importing this package imports nothing heavy; the names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bowerbird.records import API_VERSION

if TYPE_CHECKING:
    from bowerbird.encoders import LoadedEncoder, load_encoder
    from bowerbird.gallery import Gallery
    from bowerbird.upgrade import Upgrade

__version__ = "0.1.0"

_LAZY = {
    "Gallery": "bowerbird.gallery",
    "Upgrade": "bowerbird.upgrade",
    "LoadedEncoder": "bowerbird.encoders",
    "load_encoder": "bowerbird.encoders",
}

__all__ = ["API_VERSION", "Gallery", "LoadedEncoder", "Upgrade", "__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bowerbird' has no attribute {name!r}")
