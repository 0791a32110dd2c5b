"""The objectives of core: classification, margins and supervised contrast."""

from __future__ import annotations
