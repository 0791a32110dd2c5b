"""Bowerbird: train representations, search a durable gallery with them, upgrade the model while the gallery serves.

Importing this package imports nothing at all: the names below are loaded on first use, and Ctrl-C while the program
starts finds ``bowerbird.__main__``, which ends quietly.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as of ``typing``, which takes 20 ms
if TYPE_CHECKING:
    from typing import Any

    from bowerbird.encoders import LoadedEncoder, load_encoder
    from bowerbird.gallery import Gallery
    from bowerbird.records import API_VERSION
    from bowerbird.upgrade import Upgrade

__version__ = "0.1.0"

_LAZY = {
    "API_VERSION": "bowerbird.records",
    "Gallery": "bowerbird.gallery",
    "Upgrade": "bowerbird.upgrade",
    "LoadedEncoder": "bowerbird.encoders",
    "load_encoder": "bowerbird.encoders",
}

__all__ = ["API_VERSION", "Gallery", "LoadedEncoder", "Upgrade", "__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bowerbird' has no attribute {name!r}")
