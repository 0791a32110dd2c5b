"""Encoders that are known by their vectors alone: ``vectors:PATH`` wherever an encoder is named.

    vectors:new.parquet                 columns id and vector (a list of numbers per row); others are metadata
    vectors:new.npy                     (N, D) numbers, with the ids in new.ids.txt (one a line) beside it
    vectors:new.safetensors             a tensor "vectors" (N, D) and the ids in the header, or in new.ids.txt
    vectors:new.parquet?space=clip-v2   the vectors may grow: see below

A hosted model, or one that nobody here can run, upgrades a gallery like any other: its vectors are looked up by item
id, and those of queries by query id (``--queries vectors:PATH``, with a column or line of labels).

**Identity.** By default the space is the content of the file: another file is another encoder. A file that grows while
items come in would then be another encoder every day, so ``?space=NAME`` names the space: the identity is the name and
the width, and what keeps a foreign file out is the canary, which compares 64 stored vectors whenever the encoder is
used. Reads ``.parquet`` through pyarrow (extra ``[tables]``).

N items, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import numpy as np

from bowerbird.errors import DataError, InputError, MissingExtraError, SpaceError
from bowerbird.gallery.space import Space
from bowerbird.retrieval.index import unit_rows

if TYPE_CHECKING:
    from bowerbird.gallery.space import Item
    from bowerbird.upgrade.encoding import ItemEncoder

SCHEME = "vectors:"
SUFFIXES = (".parquet", ".npy", ".safetensors")
ID_COLUMNS = ("id", "item_id")
VECTOR_COLUMNS = ("vector", "embedding")
LABEL_COLUMNS = ("label", "class")


@dataclass(frozen=True)
class VectorTable:
    """Vectors by id.

    Attributes:
        source: Where they were read from, for messages.
        ids: N distinct texts.
        vectors: float32 ``(N, D)`` unit rows.
        labels: N labels, or ``None``.

    Raises:
        DataError: For ids that are missing or given twice, and rows that have no direction; names the first of them.
    """

    source: str
    ids: Sequence[str]
    vectors: np.ndarray
    labels: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        vectors = np.asarray(self.vectors)
        if vectors.ndim != 2 or not len(vectors) or vectors.dtype.kind not in "fiu":
            raise DataError(f"{self.source}: vectors have shape {vectors.shape} and type {vectors.dtype}; numbers of "
                            "shape (N, D) are needed")  # fmt: skip
        for what, value in (("ids", self.ids), ("labels", self.labels)):
            if value is not None and len(value) != len(vectors):
                raise DataError(f"{self.source}: {len(value)} {what} for {len(vectors)} vectors; they do not pair")
        with np.errstate(over="ignore"):
            vectors = vectors.astype(np.float32)
            lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))
        if len(broken):
            names = ", ".join(repr(str(self.ids[row])) for row in broken[:5].tolist())
            raise DataError(
                f"{self.source}: {len(broken)} vectors have NaN, infinity or length zero; the first: {names}"
            )
        beyond = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
        if len(beyond):
            names = ", ".join(repr(str(self.ids[row])) for row in beyond[:5].tolist())
            raise DataError(
                f"{self.source}: {len(beyond)} vectors are too long or too short for single precision; divide each by "
                f"its length. The first: {names}"
            )
        ids = [str(name) for name in self.ids]
        if len(set(ids)) < len(ids):
            seen: set[str] = set()
            twice = [name for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
            raise DataError(f"{self.source}: {len(twice)} ids are given twice; the first: {', '.join(twice[:5])}")
        if any(not name for name in ids):
            raise DataError(f"{self.source}: row {ids.index('')} has no id")
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "vectors", unit_rows(vectors))

    @cached_property
    def rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    @cached_property
    def digest(self) -> str:
        """Of ids and vectors, whatever the file's format and the order of its rows."""
        digest = hashlib.sha256()
        for name in sorted(self.ids):
            digest.update(json.dumps(name).encode() + self.vectors[self.rows[name]].tobytes())
        return digest.hexdigest()


class VectorsEncoder:
    """A function of items that looks their vectors up. An item without a vector fails, and says so.

    Args:
        table: The vectors.
        ref: As it was named; becomes the name of the space's encoder.
        name: Of the space, where the vectors may grow.
    """

    def __init__(self, table: VectorTable, ref: str, *, name: str | None = None) -> None:
        self.table, self.ref, self.name = table, ref, name

    def space(self) -> Space:
        dim = self.table.vectors.shape[1]
        identity = f"named {self.name}" if self.name is not None else self.table.digest
        digest = hashlib.sha256(f"vectors {identity} {dim}".encode()).hexdigest()
        return Space(digest, self.ref, dim)

    def __call__(self, items: Sequence[Item] | Sequence[str]) -> np.ndarray:
        """float32 ``(N, D)`` of gallery items, or of query ids."""
        names = [item if isinstance(item, str) else item.id for item in items]
        missing = [name for name in names if name not in self.table.rows]
        if missing:
            raise DataError(
                f"{self.table.source} has no vector for {len(missing)} of {len(names)} items; the first: "
                f"{', '.join(map(repr, missing[:5]))}; it has ids such as {self.table.ids[0]!r}"
            )
        return self.table.vectors[[self.table.rows[name] for name in names]]


def is_vectors_ref(ref: object) -> bool:
    return isinstance(ref, str) and ref.startswith(SCHEME)


def check_vectors_ref(ref: str) -> None:
    """That a ``vectors:`` ref names a file that is there; nothing of it is read. Raises as ``load_vectors_encoder``."""
    _file_of(_parsed(ref)[0])


def load_vectors_encoder(ref: str, *, space: Space | None = None, batch_size: int = 64) -> ItemEncoder:
    """The encoder of a ``vectors:`` ref.

    Raises:
        InputError: For a ref that cannot be read.
        DataError: For a file that cannot be used; names it and the first offenders.
        SpaceError: If ``space`` is another one.
    """
    from bowerbird.upgrade.encoding import ItemEncoder

    path, options = _parsed(ref)
    encoder = VectorsEncoder(read_vectors(path), ref, name=options.get("space"))
    own = encoder.space()
    if space is not None and space.fingerprint != own.fingerprint:
        by_content = is_vectors_ref(space.encoder) and "space" not in _parsed(space.encoder)[1]
        if by_content or space.dim != own.dim:
            raise SpaceError(
                f"{path} is not what made space {space}: its vectors are of space {own}. A file that changed is "
                "another encoder; where it may grow, name its space when the upgrade begins (vectors:PATH?space=NAME)"
            )
        own = space  # made elsewhere, and known by its vectors: the canary compares them with the stored ones
    return ItemEncoder(encoder, space=own, batch_size=batch_size)


def query_vectors(ref: str) -> tuple[VectorTable, VectorTable]:
    """``(old, new)`` vectors of the same queries, of ``vectors:OLD_FILE,NEW_FILE``.

    Raises:
        InputError: If there are not two files.
        DataError: If their ids are not the same; names the first that differ.
    """
    tables = query_tables(ref)
    if len(tables) != 2:
        raise InputError(f"{ref!r}: query vectors are two files of the same ids, vectors:OLD_FILE,NEW_FILE")
    return tables[0], tables[1]


def query_tables(ref: str) -> list[VectorTable]:
    """Vectors of the same queries in one space or several, of ``vectors:OLDEST_FILE,...,NEWEST_FILE``.

    All have the ids of the first, in its order.

    Raises:
        InputError: If the ref names no file.
        DataError: If the ids are not the same; names the first that differ.
    """
    files = ref.removeprefix(SCHEME).split(",")
    if not is_vectors_ref(ref) or not all(files):
        raise InputError(f"{ref!r}: query vectors are files of the same ids, vectors:OLD_FILE,NEW_FILE")
    first, *others = (read_vectors(file) for file in files)
    tables = [first]
    for table in others:
        for one, other in ((first, table), (table, first)):
            missing = [name for name in one.ids if name not in other.rows]
            if missing:
                raise DataError(
                    f"{other.source} lacks {len(missing)} queries of {one.source}; the first: {', '.join(missing[:5])}"
                )
        rows = [table.rows[name] for name in first.ids]
        labels = None if table.labels is None else [table.labels[row] for row in rows]
        tables.append(VectorTable(table.source, first.ids, table.vectors[rows], labels))
    return tables


def read_vectors(path: str | Path) -> VectorTable:
    """Vectors of a file, by its ending."""
    path = _file_of(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    labels = None
    try:
        if path.suffix == ".npy":
            vectors, ids = np.load(path, allow_pickle=False), None
        else:
            from safetensors import safe_open

            with safe_open(str(path), "numpy") as file:
                vectors = file.get_tensor("vectors")
                header = file.metadata() or {}
            ids = json.loads(header["ids"]) if "ids" in header else None
            labels = json.loads(header["labels"]) if "labels" in header else None
    except Exception as exc:  # both libraries raise errors of their own kinds
        raise DataError(f"{path} cannot be read: {exc}") from exc
    beside = path.with_suffix(".ids.txt")
    if ids is None:
        if not beside.is_file():
            raise DataError(f"{path} has no ids: write them, one a line in the order of the rows, into {beside}")
        ids = _lines(beside)
    if labels is None and path.with_suffix(".labels.txt").is_file():
        labels = _lines(path.with_suffix(".labels.txt"))
    return VectorTable(str(path), ids, vectors, labels)


def _read_parquet(path: Path) -> VectorTable:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as exc:
        raise MissingExtraError(f"{path} needs pyarrow. Install it: pip install 'bowerbird-core[tables]'") from exc
    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as exc:
        raise DataError(f"{path} cannot be read: {exc}") from exc

    def column(names: Sequence[str]) -> Any:
        return next((table.column(name) for name in names if name in table.column_names), None)

    ids, vectors, labels = column(ID_COLUMNS), column(VECTOR_COLUMNS), column(LABEL_COLUMNS)
    if ids is None or vectors is None:
        raise DataError(f"{path} needs a column {' or '.join(ID_COLUMNS)} and a column {' or '.join(VECTOR_COLUMNS)}; "
                        f"it has {', '.join(table.column_names)}")  # fmt: skip
    rows = vectors.to_pylist()
    widths = {None if row is None else len(row) for row in rows}
    names = [None if name is None else str(name) for name in ids.to_pylist()]
    if None in names:
        raise DataError(f"{path}: row {names.index(None)} has no id")
    if len(widths) != 1 or None in widths:
        usual = max(widths - {None}, key=lambda width: sum(len(row or ()) == width for row in rows), default=0)
        odd = [names[row] for row, value in enumerate(rows) if value is None or len(value) != usual]
        raise DataError(
            f"{path}: {len(odd)} vectors have another width than {usual}; the first: {', '.join(map(str, odd[:5]))}"
        )
    try:
        array = np.asarray(rows, np.float32)
    except (TypeError, ValueError) as exc:
        raise DataError(f"{path}: vectors are not numbers: {exc}") from exc
    return VectorTable(str(path), [str(name) for name in names], array, None if labels is None else labels.to_pylist())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is no text in UTF-8: byte {exc.object[exc.start]:#04x} at {exc.start}") from exc


def _file_of(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: vectors are read from {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    return path


def _parsed(ref: str) -> tuple[str, dict[str, str]]:
    path, _, query = ref.removeprefix(SCHEME).partition("?")
    options = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    unknown = [name for name in options if name != "space"]
    if unknown or options.get("space") == "":
        raise InputError(f"{ref!r}: the only setting is space=NAME, a name for vectors that may grow")
    if not path:
        raise InputError(f"{ref!r}: name a file, for example vectors:new.parquet")
    return path, options
