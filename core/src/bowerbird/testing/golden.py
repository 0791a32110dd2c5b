"""Golden numbers: results computed elsewhere (a slow reference, the paper's code), in ``.npz`` or ``.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.errors import DataError


def load_golden(path: str | Path, *, tensors: bool = False) -> dict[str, Any]:
    """Names and values of a golden file. Nothing in it is executed.

    Args:
        path: ``.npz`` (arrays; those without dimensions come back as Python numbers or text) or ``.json`` (an object).
        tensors: Arrays as torch's tensors, those of text as lists.

    Raises:
        DataError: Missing, unreadable, or of another type.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            plain = {name: value.item() if value.ndim == 0 else value for name, value in arrays.items()}
            return {name: _tensor(value) for name, value in plain.items()} if tensors else plain
        if path.suffix == ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
            raise ValueError("the top level is no object")
    except (OSError, ValueError, KeyError) as exc:
        raise DataError(f"golden file {str(path)!r} cannot be read: {exc}") from exc
    raise DataError(f"golden file {str(path)!r} has type {path.suffix!r}; accepted: .npz, .json")


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind == "U":
        return value.tolist()
    import torch

    return torch.from_numpy(value)


def assert_close(actual: Any, golden: Any, *, rtol: float = 1e-9, atol: float = 1e-10, where: str = "value") -> None:
    """Compare tensors, arrays, numbers, text and nested mappings or lists of them, in float64.

    Shapes must be equal, NaN equals NaN, whole numbers and text must be exactly equal.

    Args:
        actual: What this code computes.
        golden: What it must be.
        rtol: Relative tolerance, of ``|golden|``. The default asks for float64 arithmetic.
        atol: Absolute tolerance.
        where: Name in the message.

    Raises:
        AssertionError: Naming the entry, its worst element and both values.
    """
    if isinstance(golden, Mapping):
        if not isinstance(actual, Mapping):
            raise AssertionError(f"{where}: expected a mapping with {sorted(golden)}, got {type(actual).__name__}")
        missing, extra = sorted(golden.keys() - actual.keys()), sorted(actual.keys() - golden.keys())
        if missing or extra:
            raise AssertionError(f"{where}: missing {missing}, not expected {extra}")
        for name, value in golden.items():
            assert_close(actual[name], value, rtol=rtol, atol=atol, where=f"{where}[{name!r}]")
        return
    got, wanted = _array(actual), _array(golden)
    if got.shape != wanted.shape:
        raise AssertionError(f"{where}: shape {got.shape}, golden {wanted.shape}")
    if wanted.dtype.kind in "fc" or got.dtype.kind in "fc":
        number = np.complex128 if "c" in (wanted.dtype.kind, got.dtype.kind) else np.float64
        got, wanted = got.astype(number), wanted.astype(number)
        wrong = ~np.isclose(got, wanted, rtol=rtol, atol=atol, equal_nan=True)
    else:
        wrong = got != wanted
    if wrong.any():
        worst = np.unravel_index(_worst(got, wanted, wrong), wrong.shape)
        place = f" at {tuple(int(i) for i in worst)}" if wrong.ndim else ""
        raise AssertionError(
            f"{where}: {int(wrong.sum())} of {wrong.size} differ (rtol {rtol:g}, atol {atol:g}); the worst{place} is "
            f"{got[worst]!r}, golden {wanted[worst]!r}"
        )


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a tensor; bfloat16 has no numpy type
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    return np.asarray(value)


def _worst(got: np.ndarray, wanted: np.ndarray, wrong: np.ndarray) -> int:
    if got.dtype.kind in "fc":
        gap = np.abs(got - wanted)
        return int(np.where(wrong, np.where(np.isnan(gap), np.inf, gap), -1).argmax())
    return int(wrong.argmax())
