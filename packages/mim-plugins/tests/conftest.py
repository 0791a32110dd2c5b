"""Golden numbers: see the README beside each folder in data/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    """``golden("mae/patchify")``: arrays as tensors, values without dimensions as Python numbers."""

    def load(name: str) -> dict[str, Any]:
        with np.load(DATA / f"{name}.npz") as arrays:
            return {
                key: torch.from_numpy(arrays[key]) if arrays[key].ndim else arrays[key].item() for key in arrays.files
            }

    return load


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
