"""Pickles of plain data, read without running what they ask for.

Some benchmarks ship their ground truth as a pickle, and a pickle may call any function. This reader knows lists, dicts,
tuples, sets, text, bytes, numbers and numpy arrays of numbers; a file that names anything else is refused before
anything is called. Arrays are rebuilt from their bytes here, since numpy's own way trusts the types in the file.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bowerbird.errors import DataError

MAX_BYTES = 2**30


class _Allowed:
    """A function that a pickle may call. Nothing can be set on it, so that a file cannot leave a trace."""

    __slots__ = ("_call",)
    _call: Any

    def __init__(self, call: Any) -> None:
        object.__setattr__(self, "_call", call)  # past the refusal below

    def __call__(self, *values: Any) -> Any:
        return self._call(*values)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("sets an attribute of a function")

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("sets the state of a function")


class _DType:
    """A dtype of numbers: its code such as ``i8`` and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"holds an array of type {code!r}; accepted are bool, int and float")
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("holds a damaged array type")
        self.order = state[1]

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(("" if self.order == "|" else self.order) + self.code)


class _Array(np.ndarray):
    """An array of numbers, empty until its state arrives and is checked."""

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, data = state[-4:] if isinstance(state, tuple) and len(state) >= 4 else (None,) * 4
        raw = _bytes(data)
        sizes = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
        if not sizes or not isinstance(dtype, _DType) or len(raw) != dtype.numpy.itemsize * math.prod(shape):
            raise pickle.UnpicklingError("holds a damaged array")
        super().__setstate__((1, shape, dtype.numpy, bool(fortran), raw))  # type: ignore[arg-type]  # a plain bool does


def _bytes(data: Any) -> bytes:
    if isinstance(data, str):  # bytes of Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("holds a damaged array")
    return data


def _reconstruct(*_: Any) -> np.ndarray[Any, Any]:
    return _Array((0,), np.uint8)


def _scalar(dtype: Any, data: Any) -> Any:
    raw = _bytes(data)
    if not isinstance(dtype, _DType) or len(raw) != dtype.numpy.itemsize:
        raise pickle.UnpicklingError("holds a damaged number")
    return np.frombuffer(raw, dtype.numpy)[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":  # how protocols below 3 write bytes
        raise pickle.UnpicklingError(f"encodes text as {encoding!r}")
    return text.encode("latin1")


def _made_of(kind: type) -> _Allowed:
    def make(values: Any = ()) -> Any:
        if not isinstance(values, list | tuple):  # bytes(10**9) would be a way to fill the memory
            raise pickle.UnpicklingError(f"makes {kind.__name__} of {type(values).__name__}")
        return kind(values)

    return _Allowed(make)


_BUILTINS = {kind.__name__: _made_of(kind) for kind in (set, frozenset, bytes)}
_NUMPY = {
    "ndarray": "ndarray",  # only ever an argument of _reconstruct
    "dtype": _Allowed(_DType),
    "_reconstruct": _Allowed(_reconstruct),
    "scalar": _Allowed(_scalar),
}
_GLOBALS: dict[tuple[str, str], Any] = {
    **{(module, name): call for module in ("builtins", "__builtin__") for name, call in _BUILTINS.items()},
    **{("numpy", name): _NUMPY[name] for name in ("ndarray", "dtype")},
    **{
        (f"numpy.{core}.multiarray", name): _NUMPY[name]
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
    ("_codecs", "encode"): _Allowed(_encode),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module}.{name}") from None


def load_plain_pickle(path: Path) -> Any:
    """The lists, dicts, texts, numbers and numpy arrays of the pickle ``path``; text of Python 2 as latin-1.

    Raises ``DataError``, naming the file and what was found, where the file is missing, is no pickle, is larger than
    ``MAX_BYTES``, or holds anything else. Nothing that it names is imported or called.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path} has {size:,} bytes; the limit is {MAX_BYTES:,}.")
        with path.open("rb") as stream:
            return _Reader(stream, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    except DataError:
        raise
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is refused: {error}. Accepted are pickles of lists, dicts, texts, numbers and numpy arrays of "
            "numbers; nothing else in a pickle is run."
        ) from error
    except Exception as error:  # damaged pickles raise a zoo of types
        raise DataError(f"{path} is no pickle of plain data: {type(error).__name__}: {error}.") from error
