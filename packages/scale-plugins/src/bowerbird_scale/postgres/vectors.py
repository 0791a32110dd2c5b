"""Vectors in pgvector's tables, exact to the bit: read and written in PostgreSQL's binary COPY format.

A row of ``(num bigint, vec vector(D))`` has one size for all D, so that numpy packs and parses whole blocks.

N rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import SpaceError
from bowerbird.gallery.space import Space
from bowerbird_scale.postgres.connection import Connection

MAX_DIM = 16_000  # of pgvector's types
INLINE_BYTES = 7_000  # a longer row does not fit into a page and is kept beside the table
TYPES = {"float32": ("vector", ">f4"), "float16": ("halfvec", ">f2")}
BLOCK_ROWS = 16_384
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"


def table_of(number: int) -> str:
    return f"vec_{int(number)}"


def create_table(db: Connection, number: int, dim: int, dtype: str) -> None:
    kind, wire = TYPES[dtype]
    table = table_of(number)
    db.execute(f"CREATE TABLE {table}(num bigint PRIMARY KEY, vec {kind}({dim}) NOT NULL)")
    storage = "PLAIN" if dim * np.dtype(wire).itemsize <= INLINE_BYTES else "EXTERNAL"  # random bits do not compress
    db.execute(f"ALTER TABLE {table} ALTER COLUMN vec SET STORAGE {storage}")


def check_dim(space: Space) -> None:
    """Raise ``SpaceError`` for vectors that pgvector cannot hold."""
    if space.dim > MAX_DIM:
        raise SpaceError(
            f"space {space} has width {space.dim}; PostgreSQL's pgvector keeps at most {MAX_DIM}. Use an embedded "
            "gallery"
        )


def write_rows(db: Connection, number: int, nums: NDArray[np.int64], rows: NDArray[np.float32], dtype: str) -> None:
    """Insert vectors ``(N, D)`` inside the transaction of ``db``."""
    if not len(nums):
        return
    with db.cursor().copy(f"COPY {table_of(number)}(num, vec) FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(_HEADER)
        for start in range(0, len(nums), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            copy.write(_packed(nums[part], rows[part], dtype))
        copy.write(_TRAILER)


def read_rows(
    db: Connection, query: str, parameters: Sequence[Any], dim: int, dtype: str
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """``(nums, vectors)`` in blocks of what ``query`` selects: a number and a vector of width ``dim``, never null."""
    layout = _layout(dim, dtype)
    pending = bytearray()
    header = len(_HEADER)
    with db.cursor().copy(f"COPY ({query}) TO STDOUT (FORMAT BINARY)", parameters) as copy:
        for data in copy:
            pending += data
            if header:
                if len(pending) < header:
                    continue
                del pending[:header]
                header = 0
            whole = len(pending) // layout.itemsize
            if whole >= BLOCK_ROWS:
                yield _parsed(bytes(pending[: whole * layout.itemsize]), layout)
                del pending[: whole * layout.itemsize]
    yield _parsed(bytes(pending[: len(pending) // layout.itemsize * layout.itemsize]), layout)


def vectors_of(
    db: Connection, number: int, nums: NDArray[np.int64], dim: int, dtype: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """``(nums that are there, ascending, their vectors)``."""
    query = f"SELECT num, vec FROM {table_of(number)} WHERE num = ANY(%s) ORDER BY num"
    blocks = list(read_rows(db, query, (np.unique(nums).tolist(),), dim, dtype))
    return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])


def literal(vector: NDArray[np.float32]) -> str:
    """pgvector's text form, which keeps every bit of a float32."""
    return "[" + ",".join(map(repr, vector.tolist())) + "]"


def _layout(dim: int, dtype: str) -> np.dtype:
    """One row on the wire: field count, then length and value of each field; pgvector's value begins with D and 0."""
    wire = TYPES[dtype][1]
    return np.dtype(
        [
            ("fields", ">i2"),
            ("num_bytes", ">i4"),
            ("num", ">i8"),
            ("vec_bytes", ">i4"),
            ("dim", ">i2"),
            ("zero", ">i2"),
            ("vec", wire, (dim,)),
        ]
    )


def _packed(nums: NDArray[np.int64], rows: NDArray[np.float32], dtype: str) -> bytes:
    dim = rows.shape[1]
    out = np.empty(len(nums), _layout(dim, dtype))
    out["fields"], out["num_bytes"], out["num"] = 2, 8, nums
    out["vec_bytes"], out["dim"], out["zero"] = 4 + dim * out["vec"].dtype.itemsize, dim, 0
    out["vec"] = rows
    return out.tobytes()


def _parsed(data: bytes, layout: np.dtype) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    rows = np.frombuffer(data, layout)
    return rows["num"].astype(np.int64), rows["vec"].astype(np.float32)
