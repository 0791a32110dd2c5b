"""Files of indexes: a header of ``HEADER_BYTES`` (magic, JSON with the checksum of the rest, padding), then the bytes.

A file is written whole or not at all, and what is read is what was written.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import CorruptionError, InputError

MAGIC = b"bowerbird-index "
FORMAT = 1
HEADER_BYTES = 4096


def bytes_of(array: NDArray[Any]) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def index_file(path: str | Path, header: dict[str, Any]) -> Iterator[Any]:
    """Yields ``write(bytes)``. The file appears under ``path`` complete and on disk, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    checksum, size = 0, 0

    try:
        with temporary.open("wb") as stream:
            stream.write(b"\0" * HEADER_BYTES)

            def write(data: Any) -> int:
                nonlocal checksum, size
                checksum, size = zlib.crc32(data, checksum), size + len(data)
                stream.write(data)
                return len(data)

            yield write
            text = json.dumps({"format": FORMAT, **header, "bytes": size, "crc32": checksum}).encode()
            stream.seek(0)
            stream.write((MAGIC + text).ljust(HEADER_BYTES - 1) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def saved_effort(path: str | Path) -> int | None:
    """``nprobe`` or ``ef_search`` of a saved index, from its header alone; ``None`` where it was not noted.

    Raises:
        InputError: There is no such file.
        CorruptionError: Its header is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no index file {path}.")
    with path.open("rb") as stream:
        return _header(path, stream).get("effort")


def _header(path: Path, stream: IO[bytes]) -> dict[str, Any]:
    start = stream.read(HEADER_BYTES)
    if not start.startswith(MAGIC) or len(start) < HEADER_BYTES:
        raise CorruptionError(f"{path} is not an index file of Bowerbird, or its beginning is damaged. Build it again.")
    try:
        header = json.loads(start[len(MAGIC) :])
    except ValueError as error:
        raise CorruptionError(f"the header of the index file {path} is damaged. Build it again.") from error
    if header["format"] > FORMAT:
        raise InputError(f"{path} has index format {header['format']}; this version reads up to {FORMAT}. Upgrade it.")
    return header


@contextlib.contextmanager
def read_index(path: str | Path, kinds: Sequence[str]) -> Iterator[tuple[dict[str, Any], IO[bytes]]]:
    """The header and the stream behind it, after the checksum was verified."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no index file {path}.")
    with path.open("rb") as stream:
        header = _header(path, stream)
        checksum, size = 0, 0
        while data := stream.read(2**22):
            checksum, size = zlib.crc32(data, checksum), size + len(data)
        if (size, checksum) != (header["bytes"], header["crc32"]):
            raise CorruptionError(
                f"the index file {path} is damaged: {size} bytes with checksum {checksum:08x}, "
                f"saved were {header['bytes']} with {header['crc32']:08x}. Build it again from the vectors."
            )
        if header["kind"] not in kinds:
            raise InputError(f"{path} holds an index of kind {header['kind']!r}; expected {' or '.join(kinds)}.")
        stream.seek(HEADER_BYTES)
        yield header, stream
