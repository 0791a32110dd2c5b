"""One search call: the queries that waited together, on one snapshot.

Those with the same ``k``, filter and spaces are searched at once. Each has its own answer, or its own error.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import BowerbirdError, DataError, SnapshotGoneError, SpaceError
from bowerbird.gallery.gallery import Gallery, SearchResult
from bowerbird.gallery.space import Item
from bowerbird.serve.encoders import Encoders
from bowerbird.serve.metrics import Metrics
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import MOST_RESULTS, Hit, Search, SearchResponse

if TYPE_CHECKING:
    from bowerbird.gallery.protocol import Snapshot

Vectors = dict[str, Any]  # fingerprint -> (D,)

SERVING = ""  # in the place of a fingerprint: of the space that serves when the search is made
ATTEMPTS = 4  # an upgrade that begins and one that ends between encoding and searching are two


@dataclass(frozen=True)
class Query:
    """``without``: number of an item that is left out of its own results, -1 for none."""

    kind: str
    vectors: Vectors
    search: Search
    began: float
    without: int = -1

    @property
    def top(self) -> int:
        return self.search.offset + self.search.k + (self.without >= 0)


class MissingVectorsError(ProblemError):
    """A search needs vectors of spaces that were not given, and no relation leads to them."""

    def __init__(self, needs: Sequence[str]) -> None:
        names = ", ".join(needs)
        super().__init__(
            409,
            f"searching now needs query vectors of {names}; none that lead there were given. Give them, by the "
            "fingerprint of their space, or search by a picture",
            needs=list(needs),
        )


def answer(
    gallery: Gallery, encoders: Encoders, metrics: Metrics, queries: Sequence[Query]
) -> list[SearchResponse | Exception]:
    """Answers in the order of the queries. Blocks. Raises what keeps all of them from being answered."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(SnapshotGoneError):  # an upgrade was begun, finished or rolled back just now
            return _answer_at(gallery.snapshot(), gallery, encoders, metrics, queries)
    return _answer_at(gallery.snapshot(), gallery, encoders, metrics, queries)


def _answer_at(
    snapshot: Snapshot, gallery: Gallery, encoders: Encoders, metrics: Metrics, queries: Sequence[Query]
) -> list[SearchResponse | Exception]:
    service = encoders.service
    answers: dict[int, SearchResponse | Exception] = {}
    together: dict[Any, list[tuple[int, Vectors]]] = defaultdict(list)
    for position, query in enumerate(queries):
        try:
            rows = _checked(query.vectors, snapshot)
        except (BowerbirdError, ProblemError) as error:  # of this one; the others are answered
            answers[position] = error
            continue
        where = query.search.where
        key = (query.kind, query.top, json.dumps(where, sort_keys=True) if where else None, tuple(rows))
        together[key].append((position, rows))
    state = encoders.state(snapshot)
    for (kind, top, _, names), members in together.items():
        where = queries[members[0][0]].search.where
        start = time.perf_counter()
        try:
            vectors = {name: np.stack([rows[name] for _, rows in members]) for name in names}
            found = service.search(vectors=vectors, k=top, where=where, snapshot=snapshot)
            nums = set(found.nums[found.nums >= 0].tolist())
            items = gallery.storage.items(nums)
        except SnapshotGoneError:
            raise
        except Exception as error:  # of this group; the others are answered
            if isinstance(error, SpaceError):
                enough = set(names).issuperset(state.needs)
                error = ProblemError(409, str(error)) if enough else MissingVectorsError(state.needs)
            for position, _ in members:
                answers[position] = error
            continue
        if len(items) < len(nums):
            raise SnapshotGoneError(f"{gallery.path} was compacted: what was found was deleted since")
        metrics.searched(kind, time.perf_counter() - start, len(members))
        for row, (position, _) in enumerate(members):
            answers[position] = _response(queries[position], found, row, items, state.share)
    return [answers[position] for position in range(len(queries))]


def _checked(vectors: Mapping[str, Any], snapshot: Snapshot) -> Vectors:
    """float32 ``(D,)`` rows of the spaces that the gallery knows; a client may send more, before and after an upgrade.

    Raises:
        SpaceError: A wrong width.
        DataError: NaN, infinity or a zero vector.
    """
    rows: Vectors = {}
    for name, values in vectors.items():
        space = snapshot.spaces.get(name or snapshot.serving)
        if space is None:
            continue
        row: NDArray[Any] = np.asarray(values, np.float64)
        if row.shape != (space.dim,):
            raise SpaceError(
                f"the vector has width {row.size}; those of space {space.fingerprint[:12]} have width {space.dim}"
            )
        largest = np.abs(row).max()
        if not np.isfinite(largest):
            raise DataError("the vector holds NaN or infinity; encode the query again")
        if largest == 0:
            raise DataError("the vector is zero, which has no direction; encode the query again")
        if not 1e-15 < largest < 1e15:  # its square would leave the range of float32
            row = row / largest
        rows[space.fingerprint] = row.astype(np.float32)
    if not rows:
        raise MissingVectorsError([snapshot.stack[-1]])
    return rows


def _response(query: Query, found: SearchResult, row: int, items: Mapping[int, Item], share: float) -> SearchResponse:
    search = query.search
    columns = (found.nums[row], found.distances[row], found.sides[row], found.parts[row])
    listed = [
        hit for hit in zip(*(column.tolist() for column in columns), strict=True) if hit[0] not in (-1, query.without)
    ]
    last = search.offset + search.k
    return SearchResponse(
        hits=[
            Hit(
                rank=rank,
                id=items[num].id,
                distance=distance,
                score=1.0 - distance,
                side="new" if side == 1 else "old",
                space=found.spaces[part],
                metadata=dict(items[num].metadata),
                has_picture=items[num].uri is not None,
            )
            for rank, (num, distance, side, part) in enumerate(listed[search.offset : last], search.offset + 1)
        ],
        more=len(listed) >= last and last < MOST_RESULTS,
        epoch=found.epoch,
        share=share,
        milliseconds=1e3 * (time.perf_counter() - query.began),
    )
