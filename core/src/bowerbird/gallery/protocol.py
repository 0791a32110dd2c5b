"""What keeps a gallery: the protocols that a store implements so that ``Gallery`` and the five verbs work on it.

A store is a record of role ``store``; its target is a class as ``StoreDriver`` below. It makes a ``Gallery`` from two
objects: a ``StorageLike`` (what is kept, and how it is read) and a ``StoreLike`` (what changes it). Nothing else of a
store is called by ``bowerbird.upgrade``, the command line or the reports. ``bowerbird.testing.StoreContract`` says what
each operation promises.

Shapes: N items, Q queries, D width of a space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.gallery.space import Item, Relation, Space
    from bowerbird.gallery.tasks import Lease, Progress, Task
    from bowerbird.retrieval.index import Hits

# What a store may be able to do beyond the basics. A missing feature is refused when an upgrade is planned or begun.
FEATURES = {
    "index": "approximate indexes (`bowerbird gallery index`)",
    "rollback": "return to the exact old state until `finish`",
    "where": "searches that are filtered by metadata",
    "sequences": "an upgrade on top of one that is under way",
    "many-workers": "several processes at once",
    "many-hosts": "workers on other machines",
}


class Part(Protocol):
    """The live items that are searched in one space, as of one snapshot."""

    @property
    def space(self) -> Space: ...
    @property
    def count(self) -> int: ...
    @property
    def nums(self) -> NDArray[np.int64]:
        """``(count,)`` item numbers, in the order of ``vectors()``."""

    def contains(self, nums: NDArray[np.int64]) -> NDArray[np.bool_]: ...
    def matching(self, allowed: Any) -> int:
        """How many of its items a filter lets through."""

    def vectors(self) -> NDArray:
        """``(count, D)``, all in memory unless the store can map them."""

    def vectors_of(self, nums: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def background(self, queries: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """``(Q, B)`` distances of the queries to at most ``count`` items, evenly spaced over the part."""

    def search(self, queries: NDArray[np.float32], k: int, allowed: Any = None) -> Hits:
        """Distances computed in float64 from the vectors, equal ones by lower number. ``allowed``: of ``allowed``."""


class Snapshot(Protocol):
    """One epoch of a gallery, immutable. ``parts`` are disjoint, oldest space first, and together the live items.

    After `finish`, `rollback` and `compact` an older snapshot may raise ``SnapshotGoneError``; it never changes.
    """

    epoch: int
    live: int
    num_limit: int  # every item number is below
    serving: str
    spaces: Mapping[str, Space]
    upgrades: tuple[UpgradeState, ...]  # under way, each on top of the one before it
    relations: tuple[Relation, ...]
    problems: list[str]

    @property
    def upgrade(self) -> UpgradeState | None:
        """The topmost one."""

    @property
    def stack(self) -> tuple[str, ...]:
        """Fingerprints of the spaces of ``parts``; the serving one alone outside upgrades."""

    @property
    def write_space(self) -> Space: ...
    @property
    def old(self) -> Any: ...
    @property
    def new(self) -> Any: ...
    @property
    def olds(self) -> tuple[Any, ...]: ...
    @property
    def parts(self) -> tuple[Any, ...]: ...
    @property
    def served_parts(self) -> tuple[Any, ...]:
        """``parts``; where the upgrade has the setting ``switches_at_end``, new vectors are shown only at its end."""

    @property
    def parts_below(self) -> tuple[Any, ...]:
        """``parts`` as they would be without the topmost upgrade."""

    def part_of(self, fingerprint: str) -> Any: ...
    def rows_of(self, fingerprint: str) -> Any:
        """As a part: every live item with a vector in a space, also those that are searched in a newer one."""

    def searcher(self, part: Any) -> Any:
        """What searches ``part``: itself, or its approximate index."""


class StorageLike(Protocol):
    """What is kept, and how it is read."""

    @property
    def path(self) -> Any:
        """A folder, or a URL without its password: how messages call the gallery."""

    @property
    def features(self) -> frozenset[str]:
        """Of those of its store the ones that this gallery has."""

    @property
    def readonly(self) -> bool: ...
    @property
    def dtype(self) -> str:
        """Of the stored vectors: ``float32`` or ``float16``."""

    def snapshot(self) -> Any: ...
    def close(self) -> None: ...

    # Items.
    def find(self, ids: Sequence[str]) -> list[Item | None]: ...
    def items(self, nums: Iterable[int]) -> dict[int, Item]: ...
    def names(self, nums: Iterable[int]) -> dict[int, str]: ...
    def scan(self, epoch: int, after: int, limit: int) -> list[Item]: ...
    def pending(self) -> list[Item]: ...
    def close_id(self, name: str) -> str: ...
    def allowed(self, snapshot: Any, where: Mapping[str, Any]) -> Any:
        """The filter in the form that ``Part.search`` of this store takes."""

    # Spaces.
    def check_space(self, space: Space) -> None:
        """Raises ``SpaceError`` where vectors of this space cannot be kept; asked when an upgrade is planned."""

    def register_space(self, space: Space, *, parent: str | None = None) -> None: ...
    def relate(self, relation: Relation) -> None: ...
    def unrelate(self, relation: Relation) -> None:
        """Forget a relation, whatever its evidence. Nothing happens where it is not registered."""

    def relations(self) -> list[Relation]: ...
    def canary_passed(self, fingerprint: str) -> str | None: ...
    def remember_canary(self, fingerprint: str, passed: str) -> None: ...

    # Small files that belong to the gallery (what is watched, transforms), by a name such as `watch/1.npz`.
    def read_file(self, name: str) -> bytes | None: ...
    def write_file(self, name: str, content: bytes) -> None: ...
    def append_line(self, name: str, line: str) -> None: ...
    def files(self, folder: str) -> list[str]: ...

    # Health.
    def build_index(
        self, kind: str | None, config: Mapping[str, Any], progress: Callable[[str], None] | None
    ) -> list[Any]: ...
    def index_status(self) -> dict[str, Any]: ...
    def verify(self) -> Any: ...
    def size(self) -> dict[str, int]:
        """At least ``rows``, ``dead_rows``, ``segments`` and ``bytes``."""


class StoreLike(Protocol):
    """What changes a gallery. Every call is atomic: all of it is there after it returned, or nothing of it."""

    def snapshot(self) -> Any: ...
    def items(self, nums: Iterable[int]) -> dict[int, Item]: ...

    # Items in and out; see the methods of `Gallery`.
    def add_items(self, ids: Sequence[str], vectors: Any, **columns: Any) -> NDArray[np.int64]: ...
    def delete_items(self, ids: Sequence[str]) -> int: ...
    def compact(self) -> int: ...
    def fill(self, nums: NDArray[np.int64], vectors: Any) -> None: ...

    # An upgrade; see the methods of `bowerbird.gallery.store.Store`.
    def upgrade_state(self) -> UpgradeState | None: ...
    def history(self) -> list[dict[str, Any]]: ...
    def begin_upgrade(
        self,
        to: Space,
        *,
        strategy: str,
        order_name: str,
        order: NDArray[np.int64] | None = None,
        merger: str = "core:distance",
        task_items: int = 1000,
        settings: Mapping[str, Any] | None = None,
        on_top: bool = False,  # refused by a store without the feature "sequences"
    ) -> UpgradeState: ...
    def lease_task(self, owner: str, lease_s: float = 300.0, *, most: int | None = None) -> Task | None: ...
    def renew(self, task: Task, lease_s: float = 300.0) -> None: ...
    def release_task(self, task: Task) -> None: ...
    def commit_task(
        self,
        task: Task,
        nums: Sequence[int] | NDArray[np.int64],
        vectors: Any,
        *,
        failures: Mapping[int, str] | None = None,
    ) -> None: ...
    def fail_task(self, task: Task, error: str) -> None: ...
    def leases(self) -> list[Lease]: ...
    def free_lease(self, lease: Lease) -> bool: ...
    def retry_failed(self) -> int: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def progress(self) -> Progress: ...
    def finish_upgrade(self, *, verified: bool, leave_pending: bool = False) -> None: ...
    def rollback(
        self,
        *,
        encode_old: Callable[[list[Item]], Any] | None = None,
        leave_pending: bool = False,
        batch_items: int = 256,
    ) -> int: ...


class StoreDriver(Protocol):
    """The target of a record of role ``store``: a class with these; it is never instantiated by core.

    Attributes:
        features: What galleries of this store can do, of ``FEATURES``; known before one is opened. A single gallery may
            lack some of them.
    """

    features: frozenset[str]

    @classmethod
    def open(cls, url: str, *, readonly: bool = False, lock_timeout: float = 10.0) -> Gallery: ...

    @classmethod
    def create(cls, url: str, space: Space, *, dtype: str = "float32", lock_timeout: float = 10.0) -> Gallery:
        """Raises ``GalleryError`` where there is a gallery already."""
