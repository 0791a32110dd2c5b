"""Golden numbers: see the README beside each folder in data/."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests

DATA = Path(__file__).parent / "data"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    """``golden("mae/patchify")``: arrays as tensors, of texts as lists, values without dimensions as Python's."""

    def load(name: str) -> dict[str, Any]:
        with np.load(DATA / f"{name}.npz") as arrays:
            return {key: plain(arrays[key]) for key in arrays.files}

    def plain(array: np.ndarray) -> Any:
        if array.ndim == 0:
            return array.item()
        return array.tolist() if array.dtype.kind == "U" else torch.from_numpy(array)

    return load


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
