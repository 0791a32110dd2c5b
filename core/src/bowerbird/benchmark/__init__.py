"""The benchmark of compatible training and of upgrades: ``bowerbird benchmark upgrade``. See docs/researchers.md."""

from __future__ import annotations
