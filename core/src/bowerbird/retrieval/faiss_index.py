"""Nearest-neighbour search with FAISS: exact, or approximate by inverted lists or a graph.

FAISS is imported when a ``FaissIndex`` is used. Q queries, N stored vectors, D width, k results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bowerbird.errors import InputError, MissingExtraError, PluginError, did_you_mean
from bowerbird.retrieval.index import (
    PAD_ID,
    Hits,
    as_batch,
    checked_ids,
    checked_k,
    exact_search,
    no_hits,
    refuse_duplicates,
    unit_rows,
)
from bowerbird.retrieval.index_files import bytes_of, index_file, read_index

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

KINDS = ("flat", "ivf", "hnsw")
MAX_GRAPH_EFFORT = 2048  # an item that a graph does not find with it is one that nothing leads to
# Vectors with which the recall of an approximate index is measured. Of a graph's effort, a recall that is known to
# 0.01 leaves a fourth open, so it is measured with more; inverted lists would spend that on finding the truth.
SAMPLE = {"ivf": 200, "hnsw": 1000}


@functools.cache
def load_faiss() -> Any:
    """The ``faiss`` module.

    Raises:
        MissingExtraError: Neither wheel is installed.
        PluginError: Both wheels are installed. They write the same files, so what is imported is a mixture of the two.
    """
    wheels = [name for name in ("faiss-cpu", "faiss-gpu") if _installed(name)]
    if len(wheels) > 1:
        raise PluginError(
            "faiss-cpu and faiss-gpu are both installed and overwrite each other's files. "
            "Keep one: pip uninstall -y faiss-cpu faiss-gpu, then pip install faiss-cpu (or faiss-gpu)."
        )
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "the index core:faiss needs FAISS, which is not installed: pip install 'bowerbird-core[faiss-cpu]' "
            "(or [faiss-gpu]). The index core:exact works without it."
        ) from error
    return faiss


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _threshold_counts_queries() -> bool:
    """Whether this FAISS compares ``distance_compute_blas_threshold`` with Q (older: default 20) or with Q * D."""
    return int(load_faiss().cvar.distance_compute_blas_threshold) <= 1024


@contextlib.contextmanager
def _tuned(dim: int, threads: int) -> Iterator[Any]:
    """FAISS with our thread count and with matrix products from 4 queries on (its default can be 10 times slower)."""
    faiss = load_faiss()
    faiss.cvar.distance_compute_blas_threshold = 4 if _threshold_counts_queries() else 4 * dim
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


class FaissIndex:
    """A FAISS index: ``flat`` (exact), ``ivf`` (inverted lists) or ``hnsw`` (graph). ``core:faiss``.

    ``ivf`` is trained on a sample of the first vectors added. How much of it is searched (``nprobe``; ``ef_search`` for
    ``hnsw``) is chosen by measured recall unless given: the least effort with which the 10 nearest neighbours of sample
    queries are found with ``target_recall``. A sample query is a stored item moved in a random direction by 1.5
    times the distance to its tenth neighbour: stored items themselves would be too easy, since a graph links them. It
    is measured at the first search and again when the index has doubled; ``measured_recall`` keeps the result.

    Args:
        kind: ``flat``, ``ivf`` or ``hnsw``.
        nlist: Number of inverted lists; default: the power of two nearest to the square root of N, 39 items per list at
            least.
        nprobe: Lists searched per query; default: measured.
        m: Links per node of the graph.
        ef_construction: Candidates looked at when a node is linked.
        ef_search: Candidates kept while searching the graph; default: measured.
        target_recall: Recall@10 to reach, in 0..1.
        threads: OpenMP threads of a search. One per request serves best under load.
        device: ``cpu``; ``auto`` = a GPU where FAISS sees one; ``gpu`` = refuse to work without. ``hnsw`` ignores it.
        seed: Of the samples.
    """

    def __init__(
        self,
        kind: str = "flat",
        *,
        nlist: int | None = None,
        nprobe: int | None = None,
        m: int = 16,
        ef_construction: int = 80,
        ef_search: int | None = None,
        target_recall: float = 0.95,
        threads: int = 1,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise InputError(
                f"no FAISS index of kind {kind!r}; accepted: {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
            )
        if device not in ("cpu", "gpu", "auto"):
            raise InputError(f"device must be cpu, gpu or auto; got {device!r}.")
        if not 0 < target_recall <= 1:
            raise InputError(f"target_recall must be in (0, 1]; got {target_recall}.")
        for name, value in (
            ("nlist", nlist),
            ("nprobe", nprobe),
            ("m", m),
            ("ef_search", ef_search),
            ("threads", threads),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}.")
        self.kind, self.nlist, self.nprobe, self.m = kind, nlist, nprobe, m
        self.ef_construction, self.ef_search, self.target_recall = ef_construction, ef_search, target_recall
        self.threads, self.device, self.seed = threads, device, seed
        self.measured_recall: float | None = None
        self._ids: NDArray[np.int64] = np.empty(0, np.int64)  # of row i of the FAISS index; -1: removed (ivf)
        self._sample: NDArray[np.float32] | None = None  # some of the vectors, to measure recall with
        self._index: Any = None
        self._on_gpu: Any = None
        self._measured_at = 0
        self._trained_for = 0
        self._effort_held = False

    @classmethod
    def build(cls, config: Any = None) -> Self:
        """An empty index with the settings of ``FaissConfig``."""
        return cls(**config.model_dump()) if config is not None else cls()

    def __len__(self) -> int:
        return 0 if self._index is None else int(self._index.ntotal)

    @property
    def ids(self) -> NDArray[np.int64]:
        """int64 (N,) ids of the stored items, in no particular order. Not to be written to."""
        return self._ids if len(self._ids) == len(self) else self._ids[self._ids != PAD_ID]

    @property
    def dim(self) -> int | None:
        """D; ``None`` while nothing was added."""
        return None if self._index is None else int(self._index.d)

    @property
    def trained_for(self) -> int:
        """For how many items the index was created; 0 before that."""
        return self._trained_for

    def train(self, sample: ArrayLike, count: int, *, expected: int | None = None) -> None:
        """Create the index for ``count`` vectors that will be added in pieces, of which ``sample`` (S, D) is typical.

        Not needed where the first ``add`` brings enough vectors to be typical of the rest.

        Args:
            expected: How many it will have grown to one day; it gets the lists for that, as far as ``count`` allows.

        Raises:
            InputError: Bad vectors, an index that has been created already, or fewer sample vectors than lists.
        """
        if self._index is not None:
            raise InputError("this index has been trained already")
        rows = np.ascontiguousarray(unit_rows(sample, what="sample"))
        with _tuned(rows.shape[1], self.threads):
            self._index = self._create(rows, count, expected or count)

    def sample_size(self, count: int, expected: int | None = None) -> int:
        """How many vectors ``train`` makes use of, for ``count`` to be added."""
        return min(count, max(64 * self._lists_for(count, expected or count), 4096))

    def add(self, ids: ArrayLike, vectors: ArrayLike, *, distinct: bool = False) -> None:
        """Append ``vectors`` (N, D) under int64 ``ids`` (N,). The first call creates and trains the index.

        Args:
            distinct: The caller vouches that no id is given or stored twice; looking for that costs a sort of all ids.

        Raises:
            InputError: Bad vectors or repeated ids.
        """
        rows = np.ascontiguousarray(unit_rows(vectors, dim=self.dim))
        new = checked_ids(ids, len(rows))
        if not distinct:
            refuse_duplicates(self._ids, new)
        if not len(rows):
            return
        with _tuned(rows.shape[1], self.threads):
            if self._index is None:
                self._index = self._create(rows, len(rows), len(rows))
            self._keep_sample(rows)
            if self.kind == "ivf":  # rows keep their numbers when others are removed
                self._index.add_with_ids(rows, np.arange(len(self._ids), len(self._ids) + len(rows)))
            else:
                self._index.add(rows)
        self._ids = np.concatenate([self._ids, new])
        self._on_gpu = None

    def remove(self, ids: ArrayLike) -> int:
        """Remove items; ids that are not stored are ignored. Returns how many were removed.

        Removing from ``flat`` and ``ivf`` costs one pass over the index. ``hnsw`` is built again from the vectors that
        remain: nothing can be taken out of a graph.
        """
        gone = np.isin(self._ids, np.asarray(ids, np.int64)) & (self._ids != PAD_ID)
        count = int(gone.sum())
        if not count:
            return 0
        self._on_gpu = None
        if self.kind == "hnsw":
            kept, rows = self._ids[~gone], self._flat_rows()[~gone]
            self._ids, self._index, self._measured_at = np.empty(0, np.int64), None, 0
            self.add(kept, rows)
            return count
        bits = np.packbits(gone, bitorder="little")
        faiss = load_faiss()
        self._index.remove_ids(faiss.IDSelectorBitmap(len(gone), faiss.swig_ptr(bits)))
        self._ids = self._ids[~gone] if self.kind == "flat" else np.where(gone, PAD_ID, self._ids)
        return count

    def measure(self, neighbours: int = 10) -> None:
        """Choose the effort for the items of now, and measure the recall, instead of at the next search.

        Args:
            neighbours: How many nearest neighbours are to be found. An index of a share of a gallery gives only that
                share of a merged list.
        """
        self._choose_effort(neighbours)

    @property
    def effort(self) -> int | None:
        """``nprobe`` or ``ef_search`` as it is now; ``None`` for ``flat``, and before anything was added."""
        if self.kind == "flat" or self._index is None:
            return None
        return int(self._index.nprobe if self.kind == "ivf" else self._index.hnsw.efSearch)

    def hold_effort(self, effort: int | None = None) -> None:
        """From now on search with this effort (default: the present one), however the index grows."""
        self._effort_held = True
        if effort is not None:
            self._set_effort(effort)

    def search(self, queries: ArrayLike, k: int = 10) -> Hits:
        """The k nearest items of ``queries`` (Q, D) or (D,); approximate for ``ivf`` and ``hnsw``."""
        k = checked_k(k)
        if self._index is None:
            return no_hits(queries, k)
        batch, single = as_batch(queries, self.dim)
        if not self._effort_held and self._measured_at * 2 <= len(self) and len(self):
            self._choose_effort()
        scores, rows = self._raw_search(np.ascontiguousarray(batch), min(k + 1, max(len(self), 1)))
        ids = np.where(rows >= 0, self._ids[rows], PAD_ID) if len(self) else np.full_like(rows, PAD_ID)
        distances = np.where(rows >= 0, 1 - scores.astype(np.float64), np.inf)
        if rows.shape[1] < k:
            pad = ((0, 0), (0, k - rows.shape[1]))
            ids, distances = np.pad(ids, pad, constant_values=PAD_ID), np.pad(distances, pad, constant_values=np.inf)
        tied = (distances[:, 1:] == distances[:, :-1]) & (ids[:, 1:] >= 0)
        if tied.any():
            order = np.lexsort((ids, distances), axis=1)
            ids, distances = np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)
            cut = np.flatnonzero(tied[:, k - 1]) if tied.shape[1] >= k else ()
            if self.kind == "flat" and len(cut):  # a tie across the cut: which of the equals FAISS kept is its secret
                exact = exact_search(self._flat_rows(), batch[cut], k, ids=self._ids)
                ids[cut, :k], distances[cut, :k] = exact.ids, exact.distances
        ids, distances = ids[:, :k], distances[:, :k]
        return Hits(ids[0], distances[0]) if single else Hits(ids, distances)

    def candidates(self, queries: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """int64 ``(Q, count)`` ids of likely neighbours, -1 where there are fewer: a search for who ranks by himself.

        Args:
            queries: float32 ``(Q, D)`` unit rows, contiguous; trusted.
            count: At least 1.
        """
        if not self._effort_held and self._measured_at * 2 <= len(self):
            self._choose_effort()
        rows = self._raw_search(queries, count)[1]
        ids = self._ids[rows]  # -1 reads the last id
        ids[rows < 0] = PAD_ID
        return ids

    def save(self, path: str | Path) -> None:
        """Write the index to the file ``path``, atomically."""
        settings = {
            name: getattr(self, name)
            for name in (
                "nlist",
                "nprobe",
                "m",
                "ef_construction",
                "ef_search",
                "target_recall",
                "threads",
                "device",
                "seed",
            )
        }
        header = {
            "kind": self.kind,
            "count": len(self),
            "dim": self.dim or 0,
            "settings": settings,
            "measured": [self._measured_at, self.measured_recall],
            "effort": self.effort,
            "trained_for": self._trained_for,
            "rows": len(self._ids),
            "sample": 0 if self._sample is None else len(self._sample),
        }
        with index_file(path, header) as write:
            write(bytes_of(self._ids))
            if self._sample is not None:
                write(bytes_of(self._sample))
            if self._index is not None:
                faiss = load_faiss()
                faiss.write_index(self._index, faiss.PyCallbackIOWriter(write))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved index. Raises ``CorruptionError`` naming the file where its bytes are not those saved."""
        with read_index(path, KINDS) as (header, stream):
            index = cls(header["kind"], **header["settings"])
            if header["dim"]:
                index._ids = np.frombuffer(stream.read(8 * header["rows"]), np.int64).copy()
                sample = np.frombuffer(stream.read(4 * header["sample"] * header["dim"]), np.float32)
                index._sample = sample.reshape(-1, header["dim"])
                faiss = load_faiss()
                index._index = faiss.read_index(faiss.PyCallbackIOReader(stream.read))
                index._measured_at, index.measured_recall = header["measured"]
                index._trained_for = header.get("trained_for", index._measured_at)
            return index

    # -------------------------------------------------------------------------------------------- inside

    def _lists_for(self, count: int, expected: int) -> int:
        if self.kind != "ivf" or not count:
            return 1
        return self.nlist or min(2 ** round(np.log2(np.sqrt(max(count, expected)))), max(1, count // 39))

    def _create(self, rows: NDArray[np.float32], count: int, expected: int) -> Any:
        """An empty index for ``count`` vectors, trained on (some of) ``rows``."""
        faiss, (n, dim) = load_faiss(), rows.shape
        self._trained_for = count
        if self.kind == "flat":
            return faiss.IndexFlatIP(dim)
        if self.kind == "hnsw":
            graph = faiss.IndexHNSWFlat(dim, self.m, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = self.ef_construction
            return graph
        nlist = self._lists_for(count, expected)
        if nlist > n:
            raise InputError(f"nlist {nlist} needs at least as many vectors in the first add; got {n}.")
        lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, nlist, faiss.METRIC_INNER_PRODUCT)
        lists.cp.min_points_per_centroid = (
            1  # the default nlist keeps to FAISS' 39; a chosen one is the user's business
        )
        lists.cp.seed = self.seed + 1
        sample = np.random.default_rng(self.seed).permutation(n)[: self.sample_size(count, expected)]
        lists.train(rows[np.sort(sample)])
        return lists

    def _raw_search(
        self, batch: NDArray[np.float32], k: int, index: Any = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        with _tuned(batch.shape[1], self.threads):
            return (index or self._searched()).search(batch, k)

    def _searched(self) -> Any:
        """The index that is searched: on the GPU where that was asked for and is there."""
        if self.device == "cpu" or self.kind == "hnsw":
            return self._index
        if self._on_gpu is None:
            faiss = load_faiss()
            if faiss.get_num_gpus() == 0:
                if self.device == "gpu":
                    raise InputError("device gpu was asked for, but FAISS sees no GPU; use device cpu or auto.")
                return self._index
            self._on_gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self._index)
        return self._on_gpu

    def _flat_rows(self) -> NDArray[np.float32]:
        """The vectors inside a flat index or a graph, not copied."""
        faiss = load_faiss()
        store = faiss.downcast_index(self._index.storage) if self.kind == "hnsw" else self._index
        return faiss.rev_swig_ptr(store.get_xb(), len(self) * store.d).reshape(len(self), -1)

    def _keep_sample(self, rows: NDArray[np.float32]) -> None:
        """Mix the new rows into the sample by their share of the index."""
        if self.kind == "flat":
            return
        held = np.empty((0, rows.shape[1]), np.float32) if self._sample is None else self._sample
        total = len(self) + len(rows)
        size = min(SAMPLE[self.kind], total)
        rng = np.random.default_rng(self.seed + total)
        fresh = max(size - len(held), min(int(rng.binomial(size, len(rows) / total)), len(rows)))
        kept = held[rng.permutation(len(held))[: size - fresh]]
        self._sample = np.concatenate([kept, rows[rng.permutation(len(rows))[:fresh]]])

    def _set_effort(self, effort: int) -> None:
        if self.kind == "ivf":
            self._index.nprobe = effort
            if self._on_gpu is not None:
                self._on_gpu.nprobe = effort
        else:
            self._index.hnsw.efSearch = effort

    def _choose_effort(self, wanted: int = 10) -> None:
        """Set nprobe or ef_search: as given, else the least that reaches the target recall on a sample."""
        self._measured_at = len(self)
        if self.kind == "flat":
            return
        given = self.nprobe if self.kind == "ivf" else self.ef_search
        most = int(self._index.nlist) if self.kind == "ivf" else max(16, len(self))
        if given is not None:
            self._set_effort(min(given, most))
            return
        if self.kind == "hnsw":
            most = min(most, MAX_GRAPH_EFFORT)
        assert self._sample is not None
        neighbours, wanted = min(10, len(self)), min(wanted, len(self))

        def nearest(queries: NDArray[np.float32], lists: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            if self.kind == "ivf":
                self._set_effort(lists)
                return self._raw_search(queries, neighbours)
            hits = exact_search(self._flat_rows(), queries, neighbours)
            return (1 - hits.distances).astype(np.float32), hits.ids

        # Of about the neighbour wanted, but never a very near one: that would make the queries too easy.
        column = min(max(wanted - 1, 4), neighbours - 1)
        cosines = nearest(self._sample, -(-most // 8))[0][:, column, None]
        radius = 1.5 * np.sqrt(np.clip(2 - 2 * cosines, 0, 4))  # |a - b|^2 = 2 - 2 cosine
        direction = np.random.default_rng(self.seed).standard_normal(self._sample.shape)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        queries = unit_rows(self._sample + radius * direction)
        truth = nearest(queries, most)[1]

        def recall(effort: int) -> float:
            self._set_effort(effort)
            _, found = self._raw_search(queries, neighbours)
            return float((found[:, :, None] == truth[:, None, :wanted]).any(axis=1).mean())

        least = effort = 1 if self.kind == "ivf" else 16
        while (reached := recall(effort)) < self.target_recall and effort < most:
            effort = min(effort * 2, most)
        # The target is missed at low and reached at high. A graph may have items that no effort finds: then what comes
        # near its best is enough.
        goal, low, high = self.target_recall, max(effort // 2, least - 1), effort
        if reached < goal:
            goal, low = reached - 0.002, least - 1
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            value = recall(middle)
            if value >= goal:
                high, reached = middle, value
            else:
                low = middle
        self._set_effort(high)
        self.measured_recall = reached
