"""The arms of mac.toml: contrastive training on parts of the patches, at equal steps and at about equal time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moving_arms import Values, measured_arms


def run(plan: Mapping[str, Any], seed: int) -> Values:
    values = measured_arms(plan, seed)
    lower = {f"{name} less 5": value - 5 for name, value in values.items() if name.endswith(".R@1")}
    return values | lower
