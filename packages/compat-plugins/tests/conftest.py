"""Golden numbers: see the README beside each folder in data/. ``small_upgrade`` can be imported by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    def load(name: str) -> dict[str, Tensor]:
        with np.load(DATA / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
