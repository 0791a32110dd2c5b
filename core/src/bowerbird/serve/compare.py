"""Three lists for one query during an upgrade: the old system's, the new one's so far, and the one that is served.

The old system is the gallery as it was before the topmost upgrade, and as a rollback would leave it: every item with a
vector in an older space, found by those vectors. The new one is what has been moved so far, found by new vectors. Both
are views of the snapshot that is served, so that the three lists belong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bowerbird.errors import SnapshotGoneError
from bowerbird.gallery.gallery import Gallery, SearchResult
from bowerbird.gallery.snapshot import SpaceStack
from bowerbird.gallery.space import Item, Space
from bowerbird.serve.describe import encoder_name
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import ComparedHit, CompareResponse, Search
from bowerbird.upgrade.serve import SearchService

if TYPE_CHECKING:
    from bowerbird.gallery.protocol import Snapshot


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        vectors: Fingerprint -> ``(D,)`` of the query, in the spaces that ``compared_spaces`` names.
        item: The query, where it is one of the gallery: it is left out of its own results.
        label_key: Metadata key of the label, for right and wrong.
    """

    vectors: Mapping[str, Any]
    search: Search
    item: Item | None
    label_key: str | None


class View(SpaceStack):
    """A snapshot of which only some parts are seen, as if the gallery had no others."""

    def __init__(self, snapshot: Any, serving: str, upgrades: Sequence[Any], parts: Sequence[Any]) -> None:
        self._snapshot = snapshot
        self.serving, self.upgrades, self.spaces = serving, tuple(upgrades), snapshot.spaces
        self.parts = self.served_parts = tuple(parts)

    @property
    def new(self) -> Any:
        return self.parts[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._snapshot, name)


def views(snapshot: Snapshot) -> tuple[Any, Any]:
    """The old system and the new one so far. Raises ``ProblemError`` 409 outside upgrades: there is one system then."""
    if snapshot.upgrade is None:
        raise ProblemError(
            409, "no upgrade is under way, so that there is one system and nothing to compare it with; search instead"
        )
    old = View(snapshot, snapshot.serving, snapshot.upgrades[:-1], snapshot.parts_below)
    new = View(snapshot, snapshot.stack[-1], (), (snapshot.new,))
    return old, new


def compared_spaces(service: SearchService, snapshot: Snapshot) -> list[Space]:
    """The spaces in which a query must be given to be compared. Raises as ``views``."""
    names = [name for view in (snapshot, *views(snapshot)) for name in service.state(view).needs]
    return [snapshot.spaces[name] for name in dict.fromkeys(names)]


def compare(gallery: Gallery, service: SearchService, snapshot: Snapshot, asked: Comparison) -> CompareResponse:
    """Search three times.

    Raises:
        SpaceError: A space is needed for which there is no vector.
        SnapshotGoneError: The upgrade has ended meanwhile.
    """
    old, new = views(snapshot)
    top = asked.search.offset + asked.search.k + (asked.item is not None)
    found: list[SearchResult] = []
    for view in (old, new, snapshot):
        # Each system is asked with its own vectors: others might reach it by a relation, and that is not that system.
        own = {*service.state(view).needs, *view.stack}
        vectors = {name: np.asarray(asked.vectors[name])[None] for name in own if name in asked.vectors}
        found.append(service.search(vectors=vectors, k=top, where=asked.search.where, snapshot=view))
    without = -1 if asked.item is None else asked.item.num
    nums = [[num for num in result.nums[0].tolist() if num >= 0 and num != without] for result in found]
    shown_nums = {num for listed in nums for num in listed}
    items = gallery.storage.items(shown_nums)
    if len(items) < len(shown_nums):
        raise SnapshotGoneError(f"{gallery.path} was compacted: what was found was deleted since")
    places = {num: rank for rank, num in enumerate(nums[0], 1)}
    moved = _moved(snapshot, items)
    label = _label(asked.item, asked.label_key)
    lists = [
        [
            hit
            for hit in _hits(result, listed, items, snapshot, places, moved, label, asked.label_key)
            if asked.search.offset < hit.rank <= asked.search.offset + asked.search.k
        ]
        for result, listed in zip(found, nums, strict=True)
    ]
    shown = {hit.id for hit in lists[2]}
    return CompareResponse(
        old=lists[0],
        new=lists[1],
        merged=lists[2],
        label=label,
        flip=_flip(label, *(_first_is_right(nums[i], items, label, asked.label_key) for i in (0, 2))),
        kept=sum(hit.id in shown for hit in lists[0]),
        old_name=encoder_name(snapshot.spaces[snapshot.stack[-2]].encoder),
        new_name=encoder_name(snapshot.spaces[snapshot.stack[-1]].encoder),
        epoch=snapshot.epoch,
        share=service.state(snapshot).share,
    )


def _moved(snapshot: Snapshot, items: Mapping[int, Item]) -> set[int]:
    nums = np.fromiter(items, np.int64, len(items))
    return set(nums[snapshot.new.contains(nums)].tolist()) if len(nums) else set()


def _hits(
    found: SearchResult,
    nums: Sequence[int],
    items: Mapping[int, Item],
    snapshot: Snapshot,
    places: Mapping[int, int],
    moved: set[int],
    label: str | None,
    label_key: str | None,
) -> list[ComparedHit]:
    newest = snapshot.stack[-1]
    column = {num: place for place, num in enumerate(found.nums[0].tolist())}
    hits = []
    for rank, num in enumerate(nums, 1):
        distance = float(found.distances[0, column[num]])
        space = found.spaces[found.parts[0, column[num]]]
        own = _label(items[num], label_key)
        hits.append(
            ComparedHit(
                rank=rank,
                id=items[num].id,
                distance=distance,
                score=1.0 - distance,
                side="new" if space == newest else "old",
                space=space,
                metadata=dict(items[num].metadata),
                has_picture=items[num].uri is not None,
                moved=num in moved,
                rank_before=places.get(num),
                right=None if label is None else own == label,
            )
        )
    return hits


def _label(item: Item | None, key: str | None) -> str | None:
    value = None if item is None or key is None else item.metadata.get(key)
    return None if value is None else str(value)


def _first_is_right(nums: Sequence[int], items: Mapping[int, Item], label: str | None, key: str | None) -> bool:
    return bool(nums) and label is not None and _label(items[nums[0]], key) == label


def _flip(label: str | None, before: bool, now: bool) -> Literal["positive", "negative", "none"] | None:
    if label is None:
        return None
    return "none" if before == now else "positive" if now else "negative"
