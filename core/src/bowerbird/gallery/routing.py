"""Which query vectors reach which part of a gallery, and along which registered relations.

A part is searched with queries of its own space; where there are none, with queries of another space that registered
relations lead to it: a transform, which maps them, or ``compatible(new -> old)``, which compares them as they are.
Several relations in a row are one route (v3 -transform-> v2 -compatible-> v1). Without a route nothing is searched:
vectors of unrelated encoders give noise, also where their widths agree.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bowerbird.gallery.space import Relation, Space
from bowerbird.gallery.transform import VectorTransform

TransformOf = Callable[[Relation], VectorTransform]


@dataclass(frozen=True)
class Route:
    """A way from the query vectors of one space to the vectors of another.

    Attributes:
        source, target: Fingerprints.
        hops: Relations in the order in which they are applied; none where source and target are one space.
    """

    source: str
    target: str
    hops: tuple[Relation, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """``("transform", "compatible")`` and the like; ``()`` = the same space."""
        return tuple(hop.kind for hop in self.hops)

    def apply(
        self, queries: NDArray[np.float32], spaces: Mapping[str, Space], transform_of: TransformOf
    ) -> NDArray[np.float32]:
        """float32 ``(Q, D of the target)`` unit rows from unit rows of the source space."""
        for hop in self.hops:
            if hop.kind == "transform":
                queries = transform_of(hop)(queries)
            else:
                queries = match_width(queries, spaces[hop.old].dim)
        return queries

    def describe(self, spaces: Mapping[str, Space]) -> str:
        """For people: ``b (new) -transform-> a (old)``."""
        text = _short(spaces, self.source)
        for hop in self.hops:
            text += f" -{hop.kind}-> {_short(spaces, hop.old)}"
        return text


def find_route(
    available: Iterable[str], target: str, relations: Sequence[Relation], spaces: Mapping[str, Space]
) -> Route | None:
    """The cheapest route from one of the ``available`` spaces to ``target``; ``None`` where there is none.

    Its own space comes first; then the fewest relations, for each adds its error; among as many, transforms rather than
    ``compatible``, since they were measured on this gallery's own vectors. A lifted space stands for the space it was
    lifted to: queries of that one, though only ``compatible``, are preferred to all others.
    """
    into: dict[str, list[Relation]] = {}
    for relation in relations:
        if relation.kind in ("transform", "compatible"):
            into.setdefault(relation.old, []).append(relation)
    sources = set(available)
    turn = itertools.count()  # of equal routes the one that was found first: relations have no order
    queue: list[tuple[int, int, str, int, tuple[Relation, ...]]] = [(0, 0, target, next(turn), ())]
    done = set()
    while queue:  # backwards from the target
        count, dearness, here, _, hops = heapq.heappop(queue)
        if here in sources:
            return Route(here, target, hops)
        if here in done:
            continue
        done.add(here)
        for relation in into.get(here, ()):
            if relation.new not in done:
                step = _dearness(relation, spaces)
                heapq.heappush(queue, (count + 1, dearness + step, relation.new, next(turn), (relation, *hops)))
    return None


def _dearness(relation: Relation, spaces: Mapping[str, Space]) -> int:
    if relation.kind == "transform":
        return 1
    lifted = relation.old in spaces and spaces[relation.old].lifted
    return 0 if lifted else 2


def match_width(vectors: NDArray, width: int) -> NDArray[np.float32]:
    """float32 ``(Q, width)`` unit rows: ``vectors`` cut or padded with zeros, then normalised again.

    That is how the codes of compatible training compare embeddings of two widths.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape[1] == width:
        return vectors
    if vectors.shape[1] > width:
        matched = vectors[:, :width]
    else:
        matched = np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))
    norms = np.linalg.norm(matched, axis=1, keepdims=True)
    return (matched / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def what_is_missing(available: Iterable[str], target: str, count: int, spaces: Mapping[str, Space]) -> str:
    """The sentence of a search that cannot reach a part of ``count`` items."""
    given = ", ".join(_short(spaces, name) for name in available) or "none"
    return (
        f"{count} items are in space {spaces[target]}, the query vectors are of: {given}, and no registered relation "
        "leads from those to it. Give queries of that space too, register a transform or a compatible relation, or "
        "search with images through `bowerbird upgrade serve`"
    )


def _short(spaces: Mapping[str, Space], fingerprint: str) -> str:
    space = spaces.get(fingerprint)
    return fingerprint[:12] if space is None else f"{fingerprint[:12]} ({space.encoder})"
