"""Sparse exports of encoders are made and loaded by the distribution ``bowerbird-sparsity``. Here is the way to it."""

from __future__ import annotations

import importlib
from typing import Any

from bowerbird.errors import MissingExtraError


def sparsity(module: str, *, needed_by: str) -> Any:
    """The module ``bowerbird_sparsity.<module>``. Raises ``MissingExtraError`` where it is not installed."""
    try:
        return importlib.import_module(f"bowerbird_sparsity.{module}")
    except ModuleNotFoundError as error:
        if error.name != "bowerbird_sparsity":
            raise
        raise MissingExtraError(
            f"{needed_by} needs the package bowerbird-sparsity, which is not installed. Install with: "
            "pip install bowerbird-sparsity"
        ) from error
