"""Vectors in pgvector's tables, exact to the bit: read and written in PostgreSQL's binary COPY format.

A row of ``(num bigint, vec vector(D))`` has one size for all D, so that numpy packs and parses whole blocks.

N rows, D width.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from bowerbird.errors import InputError, SpaceError
from bowerbird.gallery.space import Space
from bowerbird_scale.postgres.connection import Connection

if TYPE_CHECKING:
    from bowerbird_scale.postgres.snapshot import PostgresPart

MAX_DIM = 16_000  # of pgvector's types
INLINE_BYTES = 7_000  # a longer row does not fit into a page and is kept beside the table
TYPES = {"float32": ("vector", ">f4"), "float16": ("halfvec", ">f2")}
LENGTH_TOLERANCE = {"float32": 1e-3, "float16": 1e-2}  # of 1 - |v|^2
MAX_INDEXED_DIM = {"float32": 2000, "float16": 4000}
# Kind -> pgvector's method, the setting of its effort, and what is tried, least first.
INDEXES = {
    "hnsw": ("hnsw", "hnsw.ef_search", (40, 80, 160, 320, 640, 1000)),
    "ivf": ("ivfflat", "ivfflat.probes", (1, 2, 4, 8, 16, 32, 64, 128)),
}
# Without these the planner, which does not know what a distance costs, may prefer to compute all of them.
_ORDERED = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "enable_sort": "off"}
BLOCK_ROWS = 16_384
_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"


@dataclass(frozen=True)
class Filter:
    """A condition on the metadata of an item, as SQL over the columns of ``item``."""

    clause: str
    parameters: tuple[Any, ...]


class Tables:
    """Where the vectors are: a table per space. ``bowerbird_scale.qdrant.Collections`` has the same methods.

    ``db`` is the transaction in which the catalogue is read or written.
    """

    features = frozenset({"index", "many-hosts", "many-workers", "rollback", "sequences", "where"})
    streams_from = 8  # so many queries are searched together, by reading all vectors once
    index_settings: Mapping[str, Mapping[str, int]] = {"hnsw": {"m": 16, "ef_construction": 64}, "ivf": {"lists": 0}}

    def check(self, space: Space) -> None:
        """Raise ``SpaceError`` for vectors that cannot be kept."""
        if space.dim > MAX_DIM:
            raise SpaceError(
                f"space {space} has width {space.dim}; PostgreSQL's pgvector keeps at most {MAX_DIM}. Use an embedded "
                "gallery"
            )

    def create(self, db: Connection, number: int, dim: int, dtype: str) -> None:
        """Room for the vectors of a new space."""
        kind, wire = TYPES[dtype]
        table = table_of(number)
        db.execute(f"CREATE TABLE {table}(num bigint PRIMARY KEY, vec {kind}({dim}) NOT NULL)")
        storage = "PLAIN" if dim * np.dtype(wire).itemsize <= INLINE_BYTES else "EXTERNAL"  # they do not compress
        db.execute(f"ALTER TABLE {table} ALTER COLUMN vec SET STORAGE {storage}")

    def forget(self, db: Connection, number: int) -> None:
        """Drop the vectors of a space, in the transaction in which the catalogue forgets them."""
        db.execute(f"DROP TABLE {table_of(number)}")

    def sweep(self, db: Connection) -> None:
        """In a later transaction: what ``forget`` could not do."""

    def delete(self, db: Connection, number: int, nums: Sequence[int]) -> None:
        db.execute(f"DELETE FROM {table_of(number)} WHERE num = ANY(%s)", (list(nums),))

    def tidy(self, db: Connection, number: int) -> None:
        """Outside transactions, after many were deleted."""
        db.execute(f"VACUUM (ANALYZE) {table_of(number)}")

    def write(
        self, db: Connection, number: int, nums: NDArray[np.int64], rows: NDArray[np.float32], dtype: str
    ) -> None:
        """Insert vectors ``(N, D)``."""
        if not len(nums):
            return
        with db.cursor().copy(f"COPY {table_of(number)}(num, vec) FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(_HEADER)
            for start in range(0, len(nums), BLOCK_ROWS):
                part = slice(start, start + BLOCK_ROWS)
                copy.write(_packed(nums[part], rows[part], dtype))
            copy.write(_TRAILER)

    def read(
        self, db: Connection, part: PostgresPart, nums: Sequence[int] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """``(numbers ascending, vectors)`` of the items of a part, or of those of them that are among ``nums``."""
        only = None if nums is None else Filter("num = ANY(%s)", (list(nums),))
        blocks = list(self.blocks(db, part, allowed=only, order="ORDER BY v.num"))
        return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])

    def analyze(self, db: Connection, number: int) -> None:
        """Tell the planner how large the tables are; outside transactions."""
        db.execute(f"ANALYZE {table_of(number)}, member, item")

    def blocks(
        self, db: Connection, part: PostgresPart, *, allowed: Filter | None = None, order: str = ""
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """``(numbers, vectors)`` of the items of a part, in blocks."""
        keep = "" if allowed is None else f"AND v.num IN (SELECT num FROM item WHERE {allowed.clause})"
        query = (
            f"SELECT v.num, v.vec FROM {table_of(part.number)} v JOIN member m ON m.num = v.num "
            f"WHERE {part.condition} {keep} {order}"
        )
        return read_rows(db, query, () if allowed is None else allowed.parameters, part.space.dim, part.dtype)

    def nearest(
        self, db: Connection, part: PostgresPart, query: NDArray[np.float32], count: int, allowed: Filter | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]:
        """Numbers ``(W,)``, rough distances and vectors ``(W, D)`` of the nearest, ascending; W at most ``count``.

        Through the approximate index of the part, if it has one and there is no filter.
        """
        kind, wire = TYPES[part.dtype]
        index = part.index if allowed is None else None
        if index is not None:
            calls = ", ".join(["set_config(%s, %s, true)"] * len(index.effort))
            db.execute(f"SELECT {calls}", [text for pair in index.effort.items() for text in pair])
        # Half precision is compared in full precision where it must be exact.
        stored = "v.vec" if kind == "vector" or index is not None else f"v.vec::vector({part.space.dim})"
        asked = kind if index is not None else "vector"
        exactly = "" if index is not None else " + 0"  # an expression that no index has, whatever indexes there are
        keep, parameters = "", ()
        if allowed is not None:
            keep, parameters = f"AND v.num IN (SELECT num FROM item WHERE {allowed.clause})", allowed.parameters
        rows = db.execute(
            f"SELECT num, product, {kind}_send(vec) FROM ("  # only the vectors of the nearest are sent
            f"SELECT v.num, ({stored} <#> %s::{asked}({part.space.dim})){exactly} AS product, v.vec "
            f"FROM {table_of(part.number)} v JOIN member m ON m.num = v.num "
            f"WHERE {part.condition} {keep} ORDER BY product LIMIT %s) nearest",
            (literal(query), *parameters, count),
            binary=True,
        ).fetchall()
        nums = np.array([row[0] for row in rows], np.int64)
        rough = np.array([1 + row[1] for row in rows], np.float64)
        vectors = np.array([np.frombuffer(row[2], wire, offset=4) for row in rows], np.float32)
        return nums, rough, vectors.reshape(len(rows), part.space.dim)

    def make_index(
        self, db: Connection, part: PostgresPart, kind: str, options: Mapping[str, int]
    ) -> tuple[str, list[dict[str, str]]]:
        """``(name of a new index, server settings of searches through it, the quickest first)``; outside transactions.

        Raises:
            InputError: If pgvector cannot index vectors of this width.
        """
        limit = MAX_INDEXED_DIM[part.dtype]
        if part.space.dim > limit:
            raise InputError(
                f"pgvector indexes at most {limit} dimensions of {part.dtype}, and {part.space} has {part.space.dim}; "
                "searches of it stay exact"
            )
        method, effort, values = INDEXES[kind]
        name = f"idx_{part.number}_{secrets.token_hex(4)}"
        if kind == "ivf":
            lists = options["lists"] or max(int(part.count**0.5) if part.count < 1_000_000 else part.count // 1000, 1)
            options = {"lists": min(lists, 32_768)}
            values = tuple(dict.fromkeys(min(value, options["lists"]) for value in values))
        db.execute("SET lock_timeout = 0")
        try:
            db.execute(
                sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} USING {} (vec {}) WITH ({})").format(
                    sql.Identifier(name),
                    sql.Identifier(table_of(part.number)),
                    sql.SQL(method),
                    sql.SQL(f"{TYPES[part.dtype][0]}_ip_ops"),
                    sql.SQL(", ".join(f"{option} = {value}" for option, value in options.items())),
                )
            )
        except BaseException:
            self.drop_index(db, name)
            raise
        return name, [{**_ORDERED, effort: str(v), f"{method}.iterative_scan": "relaxed_order"} for v in values]

    def drop_index(self, db: Connection, name: str) -> None:
        db.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(name)))

    def problems(self, db: Connection, number: int, dim: int, dtype: str) -> tuple[int, list[int], list[int]]:
        """``(vectors, items that have lost theirs, items whose vector has not length 1)``."""
        table = table_of(number)
        count = db.value(f"SELECT count(*) FROM {table}")
        lost = db.execute(
            f"SELECT m.num FROM member m LEFT JOIN {table} v USING (num) WHERE m.space = %s AND v.num IS NULL "
            "ORDER BY m.num",
            (number,),
        ).fetchall()
        whole = "v.vec" if TYPES[dtype][0] == "vector" else f"v.vec::vector({dim})"
        bad = db.execute(
            f"SELECT num FROM {table} v WHERE abs(({whole} <#> {whole}) + 1) > %s ORDER BY num",
            (LENGTH_TOLERANCE[dtype],),
        ).fetchall()
        return count, [row[0] for row in lost], [row[0] for row in bad]


def table_of(number: int) -> str:
    return f"vec_{int(number)}"


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
