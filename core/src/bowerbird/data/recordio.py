"""RecordIO, the packed files of MXNET, in which face data sets are shipped. Written from the public format.

A ``.rec`` file is a row of records: the magic number, a word whose upper 3 bits say whether the record is whole (0) or
the first (1), a middle (2) or the last (3) part of one, and whose lower 29 bits are the length, then the bytes, padded
to a multiple of 4. A record was cut where its bytes held the magic number, which is put back between the parts. An
image record begins with flag (uint32), label (float32), id and id2 (uint64); if flag is positive, that many float32
labels follow and replace ``label``. A ``.idx`` file has a line ``key<TAB>offset`` per record.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.data.files import need_file, whole_number
from bowerbird.errors import DataError

MAGIC = 0xCED7230A
_FRAME = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_MAX_LABELS = 1024


@dataclass(frozen=True)
class ImageHeader:
    """``labels``: one or more floats; ``ident``: the record's own number; ``size``: bytes before the image."""

    labels: tuple[float, ...]
    ident: int
    multiple: bool
    size: int


class RecordFile:
    """Records by key, read where they lie; several threads may read at once. Closed with the object.

    Attributes:
        keys: int64 ``(N,)``, ascending.

    Raises:
        DataError: Naming the file, and the line of the index or the offset of the record, for anything damaged.
    """

    def __init__(self, records: Path, index: Path, layout: str = "") -> None:
        self.path = need_file(records, layout)
        self._size = records.stat().st_size
        self.keys, self._offsets = _read_index(need_file(index, layout), self._size)
        self._file = os.open(self.path, os.O_RDONLY)

    def read(self, key: int) -> bytes:
        """The bytes of record ``key``, its parts joined."""
        offset = self._offset(key)
        kind, data, offset = self._part(offset)
        if kind == _WHOLE:
            return data
        if kind != _FIRST:
            raise self._damaged(offset, "begins in the middle of a record")
        parts = [data]
        while kind != _LAST:
            kind, data, offset = self._part(offset)
            if kind not in (_MIDDLE, _LAST):
                raise self._damaged(offset, "is a new record where a part of the one before is expected")
            parts.append(data)
        return struct.pack("<I", MAGIC).join(parts)

    def header(self, key: int) -> ImageHeader:
        """The header of image record ``key``, without reading the image."""
        offset = self._offset(key)
        self._frame(offset)
        start = self._bytes(offset + _FRAME.size, _HEADER.size)
        flag = int.from_bytes(start[:4], "little")
        more = self._bytes(offset + _FRAME.size + _HEADER.size, 4 * flag) if flag <= _MAX_LABELS else b""
        return parse_header(start + more, f"{self.path}, record {key}")

    def image(self, key: int) -> bytes:
        """The encoded image of record ``key``."""
        data = self.read(key)
        return data[parse_header(data, f"{self.path}, record {key}").size :]

    def _offset(self, key: int) -> int:
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise DataError(f"{self.path}: the index has no record {key}; it has {len(self.keys):,} others.")
        return int(self._offsets[place])

    def _frame(self, offset: int) -> tuple[int, int]:
        magic, word = _FRAME.unpack(self._bytes(offset, _FRAME.size))
        if magic != MAGIC:
            raise self._damaged(offset, f"begins with {magic:#010x}, expected {MAGIC:#010x}")
        if word >> 29 > _LAST:
            raise self._damaged(offset, f"is part {word >> 29} of a record, expected 0 to {_LAST}")
        return word >> 29, word & (2**29 - 1)

    def _part(self, offset: int) -> tuple[int, bytes, int]:
        kind, length = self._frame(offset)
        data = self._bytes(offset + _FRAME.size, length)
        return kind, data, offset + _FRAME.size + (length + 3) // 4 * 4

    def _bytes(self, offset: int, length: int) -> bytes:
        if offset + length > self._size:
            raise self._damaged(offset, f"needs {length:,} bytes, the file ends at byte {self._size:,}")
        return os.pread(self._file, length, offset)

    def _damaged(self, offset: int, what: str) -> DataError:
        return DataError(
            f"{self.path}: the record at byte {offset:,} {what}. The file is damaged, or the index is another file's."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:  # in a worker process
        self.__dict__.update(state)
        self._file = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def parse_header(data: bytes, where: str) -> ImageHeader:
    """The header at the beginning of an image record. Raises ``DataError``, beginning with ``where``, if it is cut."""
    if len(data) < _HEADER.size:
        raise DataError(f"{where} has {len(data)} bytes; the header of an image record alone has {_HEADER.size}.")
    flag, label, ident, _ = _HEADER.unpack_from(data)
    if flag == 0:
        return ImageHeader((label,), ident, False, _HEADER.size)
    if flag > _MAX_LABELS or len(data) < _HEADER.size + 4 * flag:
        raise DataError(f"{where} announces {flag:,} labels and has {len(data)} bytes; the record is damaged.")
    return ImageHeader(struct.unpack_from(f"<{flag}f", data, _HEADER.size), ident, True, _HEADER.size + 4 * flag)


def write_records(folder: Path, records: Sequence[tuple[int, bytes]], name: str = "train") -> None:
    """Write ``name.rec`` and ``name.idx`` of ``(key, bytes)``: to convert one's own faces."""
    magic = struct.pack("<I", MAGIC)
    lines = []
    with (folder / f"{name}.rec").open("wb") as file:
        for key, data in records:
            lines.append(f"{key}\t{file.tell()}\n")
            parts = _cut_at_magic(data, magic)
            for number, part in enumerate(parts):
                last = number == len(parts) - 1
                kind = _WHOLE if len(parts) == 1 else _FIRST if number == 0 else _LAST if last else _MIDDLE
                if len(part) >= 2**29:
                    raise DataError(f"record {key} has {len(part):,} bytes; the format holds less than 2^29.")
                file.write(magic + struct.pack("<I", kind << 29 | len(part)) + part + bytes(-len(part) % 4))
    (folder / f"{name}.idx").write_text("".join(lines))


def pack_image(labels: Sequence[float], ident: int, image: bytes) -> bytes:
    """An image record: one label in the header itself, several behind it."""
    if len(labels) == 1:
        return _HEADER.pack(0, labels[0], ident, 0) + image
    return _HEADER.pack(len(labels), 0.0, ident, 0) + struct.pack(f"<{len(labels)}f", *labels) + image


def _cut_at_magic(data: bytes, magic: bytes) -> list[bytes]:
    """Only at multiples of 4, where a reader that lost its place would look for the next record."""
    parts, start, at = [], 0, data.find(magic)
    while at >= 0:
        if at % 4 == 0:
            parts.append(data[start:at])
            start = at = at + 4
        else:
            at += 1
        at = data.find(magic, at)
    return [*parts, data[start:]]


def _read_index(path: Path, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    keys, offsets = [], []
    try:
        lines = path.read_text("ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no index of RecordIO: {error}.") from error
    for number, line in enumerate(lines, 1):
        words = line.split("\t")
        if len(words) != 2:
            raise DataError(f"{path}, line {number}: {line!r}; expected a key, a tab and an offset.")
        key, offset = (
            whole_number(word, path, number, name) for word, name in zip(words, ("key", "offset"), strict=True)
        )
        if not 0 <= offset < size:
            raise DataError(f"{path}, line {number}: offset {offset:,} lies outside the file of {size:,} bytes.")
        keys.append(key)
        offsets.append(offset)
    if len(set(keys)) != len(keys) or not keys:
        raise DataError(f"{path} has {len(keys)} records, {len(set(keys))} different keys.")
    order = np.argsort(keys)
    return np.array(keys, np.int64)[order], np.array(offsets, np.int64)[order]
