"""What comes in: vectors, ids and metadata, checked before anything is written. The error names the row or the id."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import DataError, InputError, SpaceError

MAX_ID_CHARACTERS = 1024
UNIT_TOLERANCE = 1e-5  # rows this near to length 1 are stored bit for bit
HALF_TOLERANCE = 5e-4  # the same for rows that come in half precision and are stored in it, as rounding leaves them


def unit_vectors(
    vectors: Any,
    dim: int,
    *,
    count: int | None = None,
    what: str = "vectors",
    first_row: int = 0,
    stored_as: str = "float32",
) -> NDArray[np.float32]:
    """float32 ``(N, dim)`` rows of length 1.

    Args:
        vectors: ``(N, dim)`` numbers.
        count: N, where it is known.
        first_row: Added to row numbers in messages.
        stored_as: ``float16``: rows of that type are kept as they are where only its rounding is missing to length 1.

    Raises:
        SpaceError: If the width is not ``dim``.
        InputError: If the shape is wrong.
        DataError: If a row is not finite or has length zero; names the row.
    """
    try:
        rows = np.asarray(vectors)
        tolerance = HALF_TOLERANCE if rows.dtype == np.float16 and stored_as == "float16" else UNIT_TOLERANCE
        if rows.dtype != np.float32:
            rows = rows.astype(np.float32)
    except (TypeError, ValueError) as exc:
        raise InputError(f"{what} must be an array of numbers of shape (N, {dim}): {exc}") from exc
    if rows.ndim != 2:
        raise InputError(f"{what} must have shape (N, {dim}), got {rows.shape}")
    if rows.shape[1] != dim:
        raise SpaceError(f"{what} have width {rows.shape[1]}; the space has width {dim}")
    if count is not None and len(rows) != count:
        raise InputError(f"{len(rows)} {what} were given for {count} items; it must be one each")
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.einsum("nd,nd->n", rows, rows)
    off = ~(np.abs(square - 1.0) <= 2 * tolerance)  # true for NaN too
    if not off.any():
        return rows
    chosen = np.flatnonzero(off)
    wide = rows[chosen].astype(np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    finite = np.isfinite(norms)
    if not finite.all():
        row = int(chosen[np.argmin(finite)]) + first_row
        raise DataError(
            f"{what}: row {row} has NaN or infinity ({int((~finite).sum())} such rows); encode it again or leave it out"
        )
    if (norms == 0).any():
        row = int(chosen[np.argmin(norms)]) + first_row
        raise DataError(f"{what}: row {row} is a zero vector, which has no direction; encode it again or leave it out")
    rows = rows.copy()
    rows[chosen] = wide / norms[:, None]
    return rows


def checked_ids(ids: Any, *, what: str = "ids") -> list[str]:
    """A list of distinct texts of 1 to ``MAX_ID_CHARACTERS`` characters.

    Raises:
        InputError: Naming the first id that is not.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence | np.ndarray):
        raise InputError(f"{what} must be a list of texts, got {type(ids).__name__}")
    names = list(ids)
    if not all(type(name) is str for name in names):
        for row, name in enumerate(names):
            if not isinstance(name, str):
                raise InputError(f"{what}: row {row} is {name!r} ({type(name).__name__}); an id is text. Use str(...).")
        names = [str(name) for name in names]  # numpy.str_
    lengths = list(map(len, names))
    if names and (max(lengths) > MAX_ID_CHARACTERS or min(lengths) == 0):
        row = next(i for i, length in enumerate(lengths) if not 1 <= length <= MAX_ID_CHARACTERS)
        raise InputError(
            f"{what}: row {row} has {lengths[row]} characters ({names[row][:40]!r}...); accepted: 1 to "
            f"{MAX_ID_CHARACTERS}"
        )
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"{what}: {twice!r} is given twice in one call; every id must be there once")
    joined = "".join(names)
    if "\0" in joined:
        raise InputError(f"{what}: row {next(i for i, n in enumerate(names) if chr(0) in n)} has a NUL character")
    if not is_utf8(joined):
        row = next(i for i, name in enumerate(names) if not is_utf8(name))
        raise InputError(f"{what}: row {row} is {names[row]!r}, which cannot be written as UTF-8; give it another name")
    return names


def checked_column(values: Any, count: int, what: str) -> Sequence[str | None] | None:
    """A column of texts or ``None``, as long as the ids."""
    if values is None:
        return None
    column = list(values)
    if len(column) != count:
        raise InputError(f"{len(column)} {what} were given for {count} ids; it must be one each")
    for row, value in enumerate(column):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{what}: row {row} is {value!r} ({type(value).__name__}); it must be text or None")
        if value and "\0" in value:
            raise InputError(f"{what}: row {row} has a NUL character")
        if value and not is_utf8(value):  # as the name of a file can be that is not in the encoding of the system
            raise InputError(f"{what}: row {row} is {value!r}, which cannot be written as UTF-8")
    return column


def is_utf8(text: str) -> bool:
    """Whether a text can be stored: Python's may have halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def metadata_json(metadata: Any, count: int) -> Sequence[str | None] | None:
    """JSON texts of a list of objects (or ``None``), as long as the ids."""
    if metadata is None:
        return None
    rows = list(metadata)
    if len(rows) != count:
        raise InputError(f"{len(rows)} metadata were given for {count} ids; it must be one each")
    return [None if not row else _json_object(row, position) for position, row in enumerate(rows)]


Columns = tuple[Sequence[str | None] | None, Sequence[str | None] | None, Sequence[str | None] | None]


def checked_items(
    ids: Any, vectors: Any, uris: Any, content_hashes: Any, metadata: Any
) -> tuple[list[str], NDArray, Columns]:
    """What was given to ``Gallery.add``: ``(ids, vectors (N, D), (uris, content hashes, metadata as JSON))``.

    Raises:
        InputError: If an id or a column cannot be used, or the numbers of rows differ.
    """
    names = checked_ids(ids)
    columns = (
        checked_column(uris, len(names), "uris"),
        checked_column(content_hashes, len(names), "content_hashes"),
        metadata_json(metadata, len(names)),
    )
    if not isinstance(vectors, np.ndarray):
        vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise InputError(f"{len(names)} ids need vectors of shape ({len(names)}, D), got {vectors.shape}")
    return names, vectors, columns


def _json_object(row: Any, position: int) -> str:
    if not isinstance(row, Mapping):
        raise InputError(f"metadata: row {position} is {row!r}; it must be an object {{key: value}}")
    for key in row:
        check_key(key)
    try:
        text = json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as exc:
        raise InputError(f"metadata: row {position} cannot be written as JSON: {exc}") from exc


def check_key(key: Any) -> str:
    if not isinstance(key, str) or not key or '"' in key or "\\" in key or "\0" in key:
        raise InputError(f'metadata key {key!r} cannot be used: a key is text without ", \\ and NUL')
    return key


def checked_filter(where: Any) -> dict[str, list[Any]]:
    """Of each key the values that it may have, from ``{"key": value}`` and ``{"key": [values]}``.

    Raises:
        InputError: If it is no such thing; names the key.
    """
    if not isinstance(where, Mapping):
        raise InputError(f"a filter is {{key: value}} or {{key: [values]}}, got {where!r}")
    found = {}
    for key, wanted in where.items():
        found[check_key(key)] = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
        for value in found[key]:
            if not (value is None or isinstance(value, str | int | float)):
                raise InputError(
                    f"filter {key!r}: {value!r} is not text, a number, true, false or null, nor a list of these"
                )
            if not (math.isfinite(value) if isinstance(value, float) else is_utf8(str(value))):
                raise InputError(f"filter {key!r}: {value!r} cannot be the value of any item")
    return found


def filter_clause(where: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """SQL for ``{"key": value}`` (equal) and ``{"key": [values]}`` (any of them); all keys must hold. A missing key
    is null."""
    clauses, parameters = [], []
    for key, values in checked_filter(where).items():
        path = f'$."{key}"'
        parts = ["json_extract(metadata, ?) IS NULL"] if None in values else []
        parameters.extend([path] if parts else [])
        scalars = [value for value in values if value is not None]
        for value in scalars:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise InputError(
                    f"filter {key!r}: {value} has more than 64 bits, and SQLite does not compare such numbers exactly; "
                    "keep them as text"
                )
        if scalars:
            parts.append(f"json_extract(metadata, ?) IN ({', '.join('?' * len(scalars))})")
            parameters.extend([path, *scalars])
        clauses.append(f"({' OR '.join(parts)})" if parts else "0")
    return " AND ".join(clauses) if clauses else "1", parameters
