"""Nearest-neighbour search, exact, with numpy. FAISS is in ``bowerbird.retrieval.faiss_index``.

All vectors are unit vectors and ``distance = 1 - cosine``, so searching means the largest inner products. Q queries,
N stored vectors, D width, k results.

``exact_search`` needs no index: it reads an array (or a memory-mapped file) block by block. The product
``block @ queries.T`` costs about what ``IndexFlatIP`` costs for one query and less for a batch, so FAISS earns its
place with IVF and HNSW, and on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.errors import InputError
from bowerbird.retrieval.index_files import HEADER_BYTES, bytes_of, index_file, read_index

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PAD_ID = -1
UNIT_TOLERANCE = 1e-4  # rows whose norm is nearer to 1 than this are used as they are


@dataclass(frozen=True)
class Hits:
    """The nearest items of each query, nearest first; equal distances by lower id.

    Attributes:
        ids: int64 ``(Q, k)``, or ``(k,)`` for a single query; lists and tensors are converted. ``-1`` where there are
            fewer than k items.
        distances: float64 of the same shape, ``1 - cosine`` in 0..2 (rounding can give -1e-7), ascending; ``inf``
            beside ``-1``.
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.floating]

    def __post_init__(self) -> None:
        ids, distances = np.asarray(self.ids), np.asarray(self.distances)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"ids of Hits must be integers; got {ids.dtype}.")
        object.__setattr__(self, "ids", ids.astype(np.int64, copy=False))
        object.__setattr__(self, "distances", distances)
        if self.ids.shape != self.distances.shape or self.ids.ndim not in (1, 2):
            raise InputError(f"Hits needs two arrays (k,) or (Q, k); got {self.ids.shape} and {self.distances.shape}.")

    def __getitem__(self, query: int | slice | NDArray[Any]) -> Hits:
        return Hits(self.ids[query], self.distances[query])

    def __len__(self) -> int:
        return len(self.ids)


def in_order(order: NDArray[np.int64], *values: NDArray[Any]) -> list[NDArray[Any]]:
    """``np.take_along_axis(value, order, axis=1)`` of each; that costs a lone query more than its sort does."""
    row = np.arange(len(order))[:, None]
    return [value[row, order] for value in values]


# ------------------------------------------------------------------------------------------------------ checks


def unit_rows(vectors: ArrayLike, *, dim: int | None = None, what: str = "vectors") -> NDArray[np.float32]:
    """float32 ``(N, D)`` with rows of norm 1; no copy is made where the input already is that.

    Raises:
        InputError: Not two-dimensional, another width than ``dim``, or a row with NaN, infinity or norm 0 (row named).
    """
    array = _without_gradient(vectors)
    if array.dtype != np.float32:
        array = array.astype(np.float32)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InputError(f"{what} must have shape (N, D); got {array.shape}.")
    if dim is not None and array.shape[1] != dim:
        raise InputError(f"{what} have {array.shape[1]} dimensions; this index holds vectors of {dim}.")
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", array, array))
    off = np.abs(norms - 1) > UNIT_TOLERANCE
    off |= np.isnan(norms)
    if off.any():
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if bad.size:
            found = "has norm 0" if norms[bad[0]] == 0 else "holds NaN or infinity"
            raise InputError(
                f"{what}: row {bad[0]} {found} ({bad.size} such rows of {len(array)}); it has no direction."
            )
        array = array.copy()
        array[off] /= norms[off, None]
    return array


def _without_gradient(values: Any) -> NDArray[Any]:
    """An array; also of a torch tensor that still wants gradients, as a transform gives it."""
    return np.asarray(values.detach() if hasattr(values, "detach") else values)


def checked_ids(ids: ArrayLike, n: int) -> NDArray[np.int64]:
    array = np.asarray(ids)
    if array.shape != (n,) or not (np.issubdtype(array.dtype, np.integer) or n == 0):
        raise InputError(f"ids must be {n} integers, one per vector; got shape {array.shape} of {array.dtype}.")
    array = array.astype(np.int64)
    if n and array.min() < 0:
        raise InputError(f"ids must be 0 or more; got {array.min()}.")
    return array


def refuse_duplicates(stored: NDArray[np.int64], new: NDArray[np.int64]) -> None:
    values, counts = np.unique(new, return_counts=True)
    repeated = values[(counts > 1) | np.isin(values, stored)]
    if repeated.size:
        raise InputError(f"ids must be unique; {repeated[:5].tolist()} would be stored twice. Remove them first.")


def checked_k(k: int) -> int:
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"k must be an integer of at least 1; got {k!r}.")
    return int(k)


def as_batch(queries: ArrayLike, dim: int | None) -> tuple[NDArray[np.float32], bool]:
    array = _without_gradient(queries)
    single = array.ndim == 1
    return unit_rows(array[None] if single else array, dim=dim, what="queries"), single


# ------------------------------------------------------------------------------------------------ exact search


def exact_search(
    vectors: NDArray[Any],
    queries: ArrayLike,
    k: int = 10,
    *,
    ids: NDArray[np.int64] | None = None,
    valid: NDArray[np.bool_] | None = None,
) -> Hits:
    """The k nearest of ``vectors`` by inner product, exact, without building an index and without copying ``vectors``.

    Meant for memory-mapped segments: rows are read once per call (per 1,024 queries), in order.

    Args:
        vectors: ``(N, D)`` unit rows, float32 or float16 (float16 is widened block by block). They are trusted: neither
            checked nor normalised.
        queries: ``(Q, D)`` or ``(D,)``; normalised here where they are not.
        k: Results per query; may exceed N.
        ids: int64 ``(N,)`` ids to return; default: the row numbers.
        valid: bool ``(N,)``; rows with ``False`` (deleted, filtered out) are never returned.

    Returns:
        ``Hits``, ``(Q, k)`` or ``(k,)``. Rows of exactly equal score come in order of id, also at the cut after k.

    Raises:
        InputError: Wrong shapes, NaN or zero queries, k < 1.
    """
    k = checked_k(k)
    if vectors.ndim != 2:
        raise InputError(f"vectors must have shape (N, D); got {vectors.shape}.")
    batch, single = as_batch(queries, vectors.shape[1])
    n = len(vectors)
    for name, array in (("ids", ids), ("valid", valid)):
        if array is not None and array.shape != (n,):
            raise InputError(f"{name} must have shape ({n},), one entry per vector; got {array.shape}.")
    all_ids = np.full((len(batch), k), PAD_ID, np.int64)
    distances = np.full((len(batch), k), np.inf)
    chunk = 1024 if 4 * k < n else max(1, min(1024, 2**24 // max(n, 1)))  # a wide k keeps whole rows of scores
    for start in range(0, len(batch), chunk):
        part = slice(start, start + chunk)
        _scan(vectors, batch[part], ids, valid, all_ids[part], distances[part])
    return Hits(all_ids[0], distances[0]) if single else Hits(all_ids, distances)


def _scan(
    vectors: NDArray[Any],
    queries: NDArray[np.float32],
    ids: NDArray[np.int64] | None,
    valid: NDArray[np.bool_] | None,
    out_ids: NDArray[np.int64],
    out_distances: NDArray[np.floating],
) -> None:
    """One pass over ``vectors`` in growing blocks; only scores at or above the k-th best so far are looked at."""
    (num_queries, k), n = out_ids.shape, len(vectors)
    largest = max(4096, min(2**17, 2**21 // num_queries), k)
    buffer = np.empty((min(largest, n), num_queries), np.float32)
    columns = np.ascontiguousarray(queries.T)
    start, size = 0, max(2048, 4 * k)
    while start < n:
        stop = min(n, start + min(size, largest))
        block = vectors[start:stop]
        if block.dtype != np.float32:
            block = block.astype(np.float32)
        scores = np.matmul(block, columns, out=buffer[: stop - start])
        if valid is not None:
            scores[~valid[start:stop]] = -np.inf
        # A query that has k results is only interested in what reaches its worst one (one step down, because that level
        # went through 1 - distance); the first block finds the level itself.
        floor = (
            np.nextafter((1 - out_distances[:, -1]).astype(np.float32), -np.inf) if start else _kth_largest(scores, k)
        )
        row, query = np.nonzero(scores >= floor)
        if row.size:
            score = scores[row, query]
            if (floor == -np.inf).any():
                kept = score > -np.inf
                row, query, score = row[kept], query[kept], score[kept]
            found = row + start if ids is None else ids[row + start]
            _merge(out_ids, out_distances, query, found, 1 - score.astype(np.float64))
        start, size = stop, size * 8


def _kth_largest(scores: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    n, num_queries = scores.shape
    if n <= k:
        return np.full(num_queries, -np.inf, np.float32)
    return np.partition(scores.T, n - k, axis=1)[:, n - k]


def _merge(
    ids: NDArray[np.int64],
    distances: NDArray[np.floating],
    query: NDArray[np.intp],
    new_ids: NDArray[np.int64],
    new_distances: NDArray[np.floating],
) -> None:
    """Merge candidates, given as a flat list with their query, into the sorted ``(Q, k)`` results, in place."""
    num_queries, k = ids.shape
    order = np.argsort(query, kind="stable")
    query = query[order]
    counts = np.bincount(query, minlength=num_queries)
    column = k + np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = k + int(counts.max(initial=0))
    wide_ids = np.full((num_queries, width), PAD_ID, np.int64)
    wide_distances = np.full((num_queries, width), np.inf)
    wide_ids[:, :k], wide_distances[:, :k] = ids, distances
    wide_ids[query, column], wide_distances[query, column] = new_ids[order], new_distances[order]
    best = np.lexsort((wide_ids, wide_distances), axis=1)[:, :k]
    ids[:] = np.take_along_axis(wide_ids, best, axis=1)
    distances[:] = np.take_along_axis(wide_distances, best, axis=1)


class ExactIndex:
    """Exact search over vectors held in memory (or memory-mapped after ``load``). Needs numpy only. ``core:exact``."""

    kind = "exact"

    def __init__(self) -> None:
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)
        self._vectors: NDArray[np.float32] | None = None
        self._pending: list[NDArray[np.float32]] = []  # added, not yet joined: adding in batches stays linear

    @classmethod
    def build(cls, config: Any = None) -> Self:
        """An empty index; it has no settings."""
        return cls()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 (N,) ids of the stored items, in no particular order. Not a copy: leave it as it is."""
        return self._ids

    @property
    def dim(self) -> int | None:
        """D; ``None`` while nothing was added."""
        arrays = self._pending or ([] if self._vectors is None else [self._vectors])
        return arrays[0].shape[1] if arrays else None

    def add(self, ids: ArrayLike, vectors: ArrayLike) -> None:
        """Append ``vectors`` (N, D) under int64 ``ids`` (N,).

        Raises:
            InputError: Bad vectors or repeated ids.
        """
        rows = unit_rows(vectors, dim=self.dim)
        new = checked_ids(ids, len(rows))
        refuse_duplicates(self._ids, new)
        self._ids = np.concatenate([self._ids, new])
        self._pending.append(rows)

    def remove(self, ids: ArrayLike) -> int:
        """Remove items; ids that are not stored are ignored. Returns how many were removed."""
        gone = np.isin(self._ids, np.asarray(ids, np.int64))
        if gone.any():
            self._vectors = self._rows()[~gone]
            self._ids = self._ids[~gone]
        return int(gone.sum())

    def search(self, queries: ArrayLike, k: int = 10) -> Hits:
        """The k nearest items of ``queries`` (Q, D) or (D,)."""
        if self.dim is None:
            return no_hits(queries, k)
        return exact_search(self._rows(), queries, k, ids=self._ids)

    def save(self, path: str | Path) -> None:
        """Write the index to the file ``path``, atomically."""
        rows = self._rows() if self.dim is not None else np.empty((0, 0), np.float32)
        with index_file(path, {"kind": self.kind, "count": len(self), "dim": rows.shape[1]}) as write:
            write(bytes_of(self._ids))
            write(bytes_of(rows))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a saved index; the vectors stay on disk (memory-mapped). Raises ``CorruptionError`` naming the file."""
        with read_index(path, (cls.kind,)) as (header, _):
            n, dim = header["count"], header["dim"]
            index = cls()
            if dim:
                index._ids = np.fromfile(path, np.int64, count=n, offset=HEADER_BYTES)
                offset = HEADER_BYTES + 8 * n
                index._vectors = (
                    np.memmap(path, np.float32, "r", offset=offset, shape=(n, dim))
                    if n
                    else np.empty((0, dim), np.float32)
                )
            return index

    def _rows(self) -> NDArray[np.float32]:
        if self._pending:
            parts = self._pending if self._vectors is None else [self._vectors, *self._pending]
            self._vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self._pending = []
        assert self._vectors is not None
        return self._vectors


def no_hits(queries: ArrayLike, k: int) -> Hits:
    shape = (*np.shape(queries)[:-1], checked_k(k))
    as_batch(queries, None)
    return Hits(np.full(shape, PAD_ID, np.int64), np.full(shape, np.inf))
