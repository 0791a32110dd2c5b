"""Training: the loop, its data, its checkpoints, and finished runs."""

from __future__ import annotations
