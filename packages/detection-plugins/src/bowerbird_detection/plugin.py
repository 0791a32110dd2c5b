"""The records of ``bowerbird-detection``. Light: standard library and records only."""

from __future__ import annotations

BOWERBIRD_API = "1.0"
