"""Golden numbers: see the README beside each folder in data/. ``small_upgrade`` can be imported by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bowerbird.testing import load_golden

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def golden() -> Callable[[str], dict[str, Tensor]]:
    def load(name: str) -> dict[str, Tensor]:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in load_golden(DATA / f"{name}.npz").items()}

    return load


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
