"""The IDX format of the MNIST family: two zero bytes, type, number of dimensions, dimensions, values; big-endian."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import DataError

_UNSIGNED_BYTE = 0x08
_MAX_BYTES = 2**31


def read_idx(path: str | Path, *, ndim: int | None = None) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes; gzip is recognised by its first two bytes, not by the name.

    Raises ``DataError``, naming the file, where it is missing, is no IDX file, has another type or number of dimensions
    than asked, or holds fewer or more values than its header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as probe:
            gzipped = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path) if gzipped else path.open("rb") as file:
            return _parse(file, path, ndim)
    except FileNotFoundError as error:
        raise DataError(f"IDX file {path} does not exist.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read IDX file {path}: {error}. The file is truncated or damaged.") from error


def _parse(file: IO[bytes] | gzip.GzipFile | io.BufferedReader, path: Path, ndim: int | None) -> NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{path} is no IDX file: it begins with {magic.hex(' ') or 'nothing'}, expected 00 00 08 and a count."
        )
    if magic[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path}: values of type 0x{magic[2]:02x}; only unsigned bytes (0x08) are read.")
    found = magic[3]
    if found == 0 or (ndim is not None and found != ndim):
        raise DataError(
            f"{path} has {found} dimensions, expected {ndim or 'at least 1'}. Is it another file of the set?"
        )
    header = file.read(4 * found)
    if len(header) < 4 * found:
        raise DataError(f"{path} ends inside its header: {4 + len(header)} bytes, expected {4 + 4 * found}.")
    shape = struct.unpack(f">{found}I", header)
    size = math.prod(shape)
    if size > _MAX_BYTES:
        raise DataError(f"{path} claims {' x '.join(map(str, shape))} = {size:,} values; the limit is {_MAX_BYTES:,}.")
    values = file.read(size + 1)
    if len(values) != size:
        more = "more" if len(values) > size else f"{len(values):,}"
        raise DataError(f"{path} claims {' x '.join(map(str, shape))} = {size:,} values and holds {more}.")
    return np.frombuffer(values, np.uint8).reshape(shape)
