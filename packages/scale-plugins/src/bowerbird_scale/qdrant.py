"""The store ``scale:qdrant``: the catalogue in PostgreSQL, the vectors of each space in a collection of Qdrant.

    qdrant+postgresql://user@database-host/images?gallery=photos&qdrant=http://qdrant-host:6333
    qdrant+postgresql://user@database-host/images?gallery=photos&qdrant=/data/folder       one process, for trials

PostgreSQL decides what is there; a point of Qdrant (its id is the item's number) counts only where the catalogue has a
row for it. Points are written, and confirmed, before the transaction that makes them count is committed; what a killed
worker leaves behind is never seen, and is overwritten by the next one.

N items, D width, W candidates.
"""

from __future__ import annotations

import atexit
import os
import secrets
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException

from bowerbird.errors import InputError, SnapshotGoneError, SpaceError, StoreUnavailableError, without_passwords
from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.space import Space
from bowerbird_scale.postgres.connection import Address, Connection
from bowerbird_scale.postgres.snapshot import PostgresPart
from bowerbird_scale.postgres.storage import PostgresStorage
from bowerbird_scale.postgres.store import PostgresStore
from bowerbird_scale.postgres.vectors import LENGTH_TOLERANCE, Filter

MAX_DIM = 65_536  # of Qdrant
BATCH_POINTS = 512
FEW = 1024  # so many items of a part are fetched and ranked here, whatever else the collection holds
TIMEOUT_SECONDS = 60

_folders: dict[str, QdrantClient] = {}  # a folder can be opened once per process
_folders_lock = threading.Lock()


class Collections:
    """The vectors of one gallery in Qdrant; the methods are those of ``bowerbird_scale.postgres.vectors.Tables``."""

    features = frozenset({"index", "many-hosts", "many-workers", "rollback", "sequences", "where"})
    streams_from = None  # each query is searched by Qdrant
    index_settings: Mapping[str, Mapping[str, int]] = {"hnsw": {}}

    def __init__(self, client: QdrantClient, schema: str, *, one_process: bool = False) -> None:
        self.client, self.schema = client, schema
        if one_process:
            self.features = self.features - {"many-hosts", "many-workers"}
        self._prefix: str | None = None

    def check(self, space: Space) -> None:
        if space.dim > MAX_DIM:
            raise SpaceError(f"space {space} has width {space.dim}; Qdrant keeps at most {MAX_DIM}")

    def create(self, db: Connection, number: int, dim: int, dtype: str) -> None:
        half = dtype == "float16"
        # Stored as they come: the metric of Qdrant's own "cosine" would normalise, and change, them.
        vectors = models.VectorParams(
            size=dim,
            distance=models.Distance.DOT,
            datatype=models.Datatype.FLOAT16 if half else models.Datatype.FLOAT32,
        )
        name = self._name(db, number)
        with self._answers():
            # PostgreSQL may give a number again whose transaction never came to its end. Nothing that is there counts.
            self.client.delete_collection(name)
            self.client.create_collection(name, vectors_config=vectors)

    def forget(self, db: Connection, number: int) -> None:
        """Only noted: if the transaction does not come to its end, the vectors still count."""
        db.execute("INSERT INTO setting VALUES (%s, %s)", (f"dropped:{number}", self._name(db, number)))

    def sweep(self, db: Connection) -> None:
        dropped = db.execute("DELETE FROM setting WHERE starts_with(name, 'dropped:') RETURNING value").fetchall()
        with self._answers():
            for (name,) in dropped:
                self.client.delete_collection(name)

    def delete(self, db: Connection, number: int, nums: Sequence[int]) -> None:
        with self._answers():
            for block in _blocks(nums):
                self.client.delete(self._name(db, number), models.PointIdsList(points=list(block)), wait=True)

    def tidy(self, db: Connection, number: int) -> None:
        """Qdrant does that itself."""

    def analyze(self, db: Connection, number: int) -> None:
        """Tell the planner how large the tables are; outside transactions."""
        db.execute("ANALYZE member, item")

    def write(
        self, db: Connection, number: int, nums: NDArray[np.int64], rows: NDArray[np.float32], dtype: str
    ) -> None:
        stored = rows.astype(np.float16).astype(np.float32) if dtype == "float16" else rows
        with self._answers():
            for start in range(0, len(nums), BATCH_POINTS):
                part = slice(start, start + BATCH_POINTS)
                points = models.Batch(ids=nums[part].tolist(), vectors=stored[part].tolist())
                self.client.upsert(self._name(db, number), points, wait=True)

    def read(
        self, db: Connection, part: PostgresPart, nums: Sequence[int] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        chosen = "" if nums is None else "AND m.num = ANY(%s)"
        rows = db.execute(
            f"SELECT m.num FROM member m WHERE {part.condition} {chosen} ORDER BY m.num",
            () if nums is None else (list(nums),),
        ).fetchall()
        return self._fetch(db, part, [row[0] for row in rows])

    def nearest(
        self, db: Connection, part: PostgresPart, query: NDArray[np.float32], count: int, allowed: Filter | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]:
        """The nearest points that count: more and more of the collection, until enough of them do.

        A collection also holds vectors of items that have moved on or were deleted. Where few are left of the part (or
        match the filter), these are fetched by their numbers instead.
        """
        condition, parameters = part.condition, ()
        if allowed is not None:
            condition += f" AND m.num IN (SELECT num FROM item WHERE {allowed.clause})"
            parameters = allowed.parameters
        few = db.execute(f"SELECT num FROM member m WHERE {condition} LIMIT {FEW + 1}", parameters).fetchall()
        if len(few) <= FEW:
            nums, rows = self._fetch(db, part, sorted(row[0] for row in few))
            order = np.argsort(1 - rows.astype(np.float64) @ query, kind="stable")[:count]
            return nums[order], 1 - rows[order].astype(np.float64) @ query, rows[order]
        index = part.index if allowed is None else None
        effort = None if index is None else int(index.effort["hnsw_ef"])
        limit = 2 * count
        while True:
            with self._answers(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Local mode performs exact")
                found = self.client.query_points(
                    self._name(db, part.number),
                    query=query.tolist(),
                    limit=limit,
                    with_vectors=True,
                    search_params=models.SearchParams(exact=index is None, hnsw_ef=effort),
                ).points
            ids = [point.id for point in found]
            live = db.execute(
                f"SELECT num FROM member m WHERE m.num = ANY(%s) AND {condition}", (ids, *parameters)
            ).fetchall()
            counts = {row[0] for row in live}
            kept = [point for point in found if point.id in counts][:count]
            if len(kept) == count or len(found) < limit:
                nums = np.array([point.id for point in kept], np.int64)
                rows = np.array([point.vector for point in kept], np.float32).reshape(len(kept), part.space.dim)
                return nums, np.array([1 - point.score for point in kept], np.float64), rows
            limit *= 4

    def make_index(
        self, db: Connection, part: PostgresPart, kind: str, options: Mapping[str, int]
    ) -> tuple[str, list[dict[str, str]]]:
        """Qdrant builds its HNSW graphs by itself; what is chosen is how much of them a search looks at."""
        return self._name(db, part.number), [{"hnsw_ef": str(value)} for value in (64, 128, 256, 512, 1024)]

    def drop_index(self, db: Connection, name: str) -> None:
        """There is none: searches are exact again."""

    def problems(self, db: Connection, number: int, dim: int, dtype: str) -> tuple[int, list[int], list[int]]:
        there: set[int] = set()
        bad: list[int] = []
        offset: Any = None
        with self._answers():
            while True:
                points, offset = self.client.scroll(
                    self._name(db, number), limit=BATCH_POINTS, offset=offset, with_payload=False, with_vectors=True
                )
                ids = np.array([point.id for point in points], np.int64)
                rows = np.array([point.vector for point in points], np.float64).reshape(len(points), dim)
                bad += ids[~(np.abs(1 - (rows * rows).sum(axis=1)) <= LENGTH_TOLERANCE[dtype])].tolist()
                there.update(ids.tolist())
                if offset is None:
                    break
        known = [row[0] for row in db.execute("SELECT num FROM member WHERE space = %s", (number,)).fetchall()]
        counted = set(known)
        return len(there & counted), sorted(counted - there), sorted(set(bad) & counted)

    def _fetch(
        self, db: Connection, part: PostgresPart, nums: list[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """``(numbers (N,), vectors (N, D))`` in the order of ``nums``.

        Raises:
            StoreUnavailableError: If points are missing that the catalogue has.
        """
        vectors: dict[int, Any] = {}
        with self._answers():
            for block in _blocks(nums):
                points = self.client.retrieve(
                    self._name(db, part.number), ids=list(block), with_payload=False, with_vectors=True
                )
                vectors.update((int(point.id), point.vector) for point in points)
        lost = [num for num in nums if num not in vectors]
        if lost:
            raise StoreUnavailableError(
                f"Qdrant has lost {len(lost)} vectors of space {part.space}, or has not recovered them yet; `bowerbird "
                "gallery verify` names the items"
            )
        rows = np.array([vectors[num] for num in nums], np.float32)
        return np.array(nums, np.int64), rows.reshape(len(nums), part.space.dim)

    def _name(self, db: Connection, number: int) -> str:
        """Of the collection of a space. Each gallery has its own names, also where several databases share a Qdrant."""
        if self._prefix is None:
            row = db.execute("SELECT value FROM setting WHERE name = 'collections'").fetchone()
            if row is None:  # the gallery is being created
                prefix = f"{self.schema}_{secrets.token_hex(6)}"
                db.execute("INSERT INTO setting VALUES ('collections', %s)", (prefix,))
                row = (prefix,)
            self._prefix = row[0]
        return f"{self._prefix}_{number}"

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """What Qdrant says, as errors that say what to do."""
        try:
            yield
        except (ApiException, OSError, ValueError) as exc:  # the local mode raises ValueError
            text = " ".join(str(exc).split())[:300]
            if "not found" in text or "doesn't exist" in text:
                raise SnapshotGoneError(f"vectors were dropped meanwhile ({text}); look again") from exc
            if isinstance(exc, ValueError):
                raise
            raise StoreUnavailableError(f"Qdrant does not answer: {text}. What was committed is safe.") from exc


def _blocks(nums: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(nums), BATCH_POINTS):
        yield nums[start : start + BATCH_POINTS]


def collections_at(address: Address) -> Collections:
    """The collections of the gallery whose URL has ``qdrant=``: an address with ``http``, or a folder.

    Raises:
        InputError: If it is missing, or cannot be used.
    """
    place = address.options.get("qdrant")
    if not place:
        raise InputError(
            f"{address.name} does not say where Qdrant is: add &qdrant=http://HOST:6333, or &qdrant=FOLDER for a trial"
        )
    key = address.options.get("qdrant_api_key") or os.environ.get("QDRANT_API_KEY")
    try:
        served = "://" in place
        if served:
            client = QdrantClient(url=place, api_key=key, timeout=TIMEOUT_SECONDS, check_compatibility=False)
        else:
            client = _client_of_folder(place)
    except (OSError, ValueError, RuntimeError) as exc:  # RuntimeError: another process has the folder
        raise InputError(f"{address.name}: Qdrant cannot be used there: {without_passwords(str(exc))}") from exc
    return Collections(client, address.schema, one_process=not served)


def _client_of_folder(place: str) -> QdrantClient:
    with _folders_lock:
        if place not in _folders:
            _folders[place] = QdrantClient(path=place)
            atexit.register(_folders[place].close)
        return _folders[place]


class QdrantGalleries:
    """``qdrant+postgresql://...?gallery=NAME&qdrant=URL``: galleries whose vectors are in Qdrant."""

    features = Collections.features

    @classmethod
    def open(cls, url: str, *, readonly: bool = False, lock_timeout: float = 10.0) -> Gallery:
        """
        Raises:
            GalleryError: If there is no such gallery.
            StoreUnavailableError: If a server does not answer.
        """
        address = Address.parse(url)
        storage = PostgresStorage(address, collections_at(address), readonly=readonly, lock_timeout=lock_timeout)
        return Gallery(storage, PostgresStore(storage))

    @classmethod
    def create(cls, url: str, space: Space, *, dtype: str = "float32", lock_timeout: float = 10.0) -> Gallery:
        """
        Raises:
            GalleryError: If there is one already.
        """
        address = Address.parse(url)
        PostgresStorage.create(address, collections_at(address), space, dtype=dtype)
        return cls.open(url, lock_timeout=lock_timeout)
