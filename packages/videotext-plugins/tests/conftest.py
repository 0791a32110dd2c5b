"""Golden numbers: see the README beside each folder in data/."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bowerbird.testing import load_golden

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests

DATA = Path(__file__).parent / "data"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    """``golden("mcq/mcq_loss")``: arrays as tensors, values without dimensions as Python's."""

    return lambda name: load_golden(DATA / f"{name}.npz", tensors=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
