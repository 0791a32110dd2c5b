"""The gallery, as its users see it, whatever keeps it: a folder (``Gallery.open``) or another store (``open_gallery``).

    space = Space(fingerprint="...", encoder="core:efficientnet-lite?model=lite0", dim=1280)
    with Gallery.create("photos", space) as gallery:
        gallery.add(["cat.jpg", "dog.jpg"], vectors)
        result = gallery.search(query_vector, k=10, where={"year": [2024, 2025]})

N items, Q queries, D width, k results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import CorruptionError, InputError, SnapshotGoneError, SpaceError, UnknownNameError, UpgradeError
from bowerbird.gallery.merge import merge_by_distance, merge_many
from bowerbird.gallery.routing import Route, find_route, what_is_missing
from bowerbird.gallery.space import Item, Relation, Space
from bowerbird.gallery.storage import Storage
from bowerbird.gallery.store import Store
from bowerbird.gallery.transform import VectorTransform, with_evidence
from bowerbird.gallery.vectors import checked_ids, is_utf8, unit_vectors
from bowerbird.retrieval.index import Hits

if TYPE_CHECKING:
    from bowerbird.gallery.ann import IndexEntry
    from bowerbird.gallery.protocol import Part, Snapshot, StorageLike, StoreLike
    from bowerbird.gallery.verify import Report

CANARY_ITEMS = 64
PADDED = 65_536  # results that may be asked for, however few items there are
Merger = Callable[..., Hits]  # (old, new, k), and background=... where it has `background_items`


@dataclass(frozen=True)
class SearchResult:
    """Hits of Q queries, nearest first.

    Attributes:
        ids: Q lists of at most k item ids.
        distances: float32 ``(Q, k)``, ``1 - cosine``; ``inf`` beyond the end of a list.
        sides: int8 ``(Q, k)``: 1 where the hit was found in the newest space, 0 where in an older one, -1 beyond the
            end of a list. Outside upgrades every hit is on side 1.
        nums: int64 ``(Q, k)`` item numbers, -1 beyond the end of a list.
        epoch: Of the snapshot that was searched.
        parts: int8 ``(Q, k)``: position in ``spaces`` of the space in which the hit was found, -1 beyond the end.
        spaces: Fingerprints of the spaces that were searched, the oldest first.
    """

    ids: list[list[str]]
    distances: NDArray[np.float32]
    sides: NDArray[np.int8]
    nums: NDArray[np.int64]
    epoch: int
    parts: NDArray[np.int8]
    spaces: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Gallery:
    """An open gallery. Thread-safe. Use it in a ``with`` block, or call ``close``.

    Args:
        storage: What is kept and how it is read.
        store: What changes it: items in and out, and the low-level operations of an upgrade.

    ``bowerbird.gallery.protocol`` describes both. ``Gallery.open`` and ``Gallery.create`` make those of a folder.
    """

    def __init__(self, storage: StorageLike, store: StoreLike) -> None:
        self.storage = storage
        self.store = store
        self._mergers: dict[str, Merger] = {"core:distance": merge_by_distance}
        self._transforms: dict[str, VectorTransform] = {}

    @classmethod
    def create(cls, path: str | Path, space: Space, *, dtype: str = "float32", lock_timeout: float = 10.0) -> Self:
        """A new gallery whose vectors are of ``space``, stored as ``float32`` or ``float16``.

        Raises:
            GalleryError: If something is at ``path`` already, or it lies on a network file system.
        """
        Storage.create(path, space, dtype=dtype)
        return cls.open(path, lock_timeout=lock_timeout)

    @classmethod
    def open(cls, path: str | Path, *, readonly: bool = False, lock_timeout: float = 10.0) -> Self:
        """Open a gallery. Takes milliseconds: vectors are mapped, and read when they are searched.

        Args:
            lock_timeout: Seconds that a write waits for another writer before it is refused.

        Raises:
            GalleryError: If ``path`` is no gallery, or one of a newer format.
        """
        storage = Storage(path, readonly=readonly, lock_timeout=lock_timeout)
        try:
            storage.snapshot()
        except BaseException:
            storage.close()
            raise
        return cls(storage, Store(storage))

    def close(self) -> None:
        self.storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def path(self) -> Path | str:
        """Where it is: a folder, or the URL of another store (without its password)."""
        return self.storage.path

    @property
    def features(self) -> frozenset[str]:
        """What its store can do beyond the basics; see ``bowerbird.gallery.protocol.FEATURES``."""
        return self.storage.features

    # ------------------------------------------------------------------------------------------------- writing

    def add(
        self,
        ids: Sequence[str],
        vectors: Any,
        *,
        uris: Sequence[str | None] | None = None,
        metadata: Sequence[Mapping[str, Any] | None] | None = None,
        content_hashes: Sequence[str | None] | None = None,
        space: str | None = None,
        replace: bool = False,
    ) -> None:
        """Add items with their vectors, atomically and durably.

        Args:
            ids: N distinct texts of 1 to 1024 characters.
            vectors: ``(N, D)`` numbers; rows are stored with length 1.
            uris: Where the content is (a path). Needed to encode the items again in an upgrade.
            metadata: One JSON object per item, for ``search(where=...)``.
            content_hashes: Digest of the content per item.
            space: Fingerprint of the vectors' space. Default: the serving space; during an upgrade there is none,
                because vectors of the old encoder would pass for new ones wherever widths agree. Old-space vectors may
                be added during an upgrade; the upgrade then encodes these items as well. A lifted space takes vectors
                of the space that it was lifted from, and maps them; it has no default either.
            replace: Replace ids that exist already (their content was edited) instead of refusing them.

        Raises:
            InputError: For ids that are not text, too long, given twice, or in the gallery already.
            DataError: For a row with NaN, infinity or length zero; names it.
            SpaceError: For a wrong width, a space that is not written now, or none during an upgrade.
            GalleryLockedError: If another writer is busy for longer than ``lock_timeout``; names it.
            GalleryError: If the disk is full; the gallery is unchanged.
        """
        snapshot = self.snapshot()
        if snapshot.write_space.lifted and space not in snapshot.stack:
            vectors, space = self._lifted(snapshot, vectors, space), snapshot.write_space.fingerprint
        elif space is None and snapshot.upgrade is not None:
            raise SpaceError(
                f"{self.path} is being upgraded from {snapshot.spaces[snapshot.upgrade.old]} to "
                f"{snapshot.write_space}: say which space the vectors are of (space=FINGERPRINT; --space on the "
                "command line)"
            )
        self.store.add_items(
            ids,
            vectors,
            uris=uris,
            metadata=metadata,
            content_hashes=content_hashes,
            space=space or snapshot.serving,  # not what serves by the time that the writers' lock is free
            replace=replace,
        )

    def _lifted(self, snapshot: Snapshot, vectors: Any, space: str | None) -> NDArray[np.float32]:
        """Vectors of another space, mapped into the lifted one that is written now."""
        target = snapshot.write_space
        into = [r.new for r in snapshot.relations if (r.kind, r.old) == ("transform", target.fingerprint)]
        transforms = [relation for relation in snapshot.relations if relation.kind == "transform"]
        route = None if space is None else find_route([space], target.fingerprint, transforms, snapshot.spaces)
        if route is None:
            asked = "no space was named" if space is None else f"these are of space {space[:12]!r}"
            raise SpaceError(
                f"{self.path} is lifted: its vectors were made from those of {', '.join(i[:12] for i in into)} by a "
                f"transform, and {asked}. Name that space (its whole fingerprint) to have such vectors lifted; for "
                "vectors of the new encoder begin an upgrade to it, which takes new items at once"
            )
        return self.apply_route(route, unit_vectors(vectors, snapshot.spaces[route.source].dim), snapshot)

    def delete(self, ids: Sequence[str]) -> int:
        """Delete items, atomically; returns how many. Raises ``UnknownNameError`` if one is not there (nothing is
        deleted)."""
        return self.store.delete_items(ids)

    def compact(self) -> int:
        """Give the space of deleted items back. Returns how many rows were dropped."""
        return self.store.compact()

    def relate(
        self, new: str, old: str, *, kind: str = "compatible", evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Register that queries of space ``new`` may be compared with vectors of space ``old`` (fingerprints).

        ``evidence`` is what was measured (JSON). A space that the gallery does not know yet: ``register_space`` first.
        """
        if kind != "compatible":
            hint = "; a transform is registered with register_transform" if kind == "transform" else ""
            raise InputError(f"relation kind {kind!r} is not known; accepted: 'compatible'{hint}")
        self.storage.relate(Relation(kind, new, old, dict(evidence or {})))

    def unrelate(self, new: str, old: str) -> None:
        """Take back what ``relate`` registered: queries of ``new`` are no longer compared with vectors of ``old``.

        Raises:
            SpaceError: If it is not registered; names those that are.
            UpgradeError: If searches rely on it now: an upgrade by compatible vectors is under way, or ``old`` is
                lifted and ``new`` is the space that it was lifted to.
        """
        snapshot = self.snapshot()
        compatible = [relation for relation in snapshot.relations if relation.kind == "compatible"]
        found = next((relation for relation in compatible if (relation.new, relation.old) == (new, old)), None)
        if found is None:
            known = ", ".join(f"{r.new[:12]} with {r.old[:12]}" for r in compatible) or "none"
            raise SpaceError(f"{new[:12]} is not registered as compatible with {old[:12]}; registered: {known}")
        if snapshot.upgrade is not None and new in snapshot.stack and old in snapshot.stack:
            raise UpgradeError(
                f"the upgrade of {self.path} to {snapshot.spaces[new]} may search by this relation: finish it or roll "
                "it back first"
            )
        if snapshot.spaces[old].lifted:
            raise UpgradeError(
                f"the vectors of {self.path} in space {snapshot.spaces[old]} were lifted for queries of {new[:12]}, "
                "which find them by this relation: it stays as long as they do"
            )
        self.storage.unrelate(found)

    def register_space(self, space: Space) -> None:
        """Remember a space that relations or upgrades will name. Idempotent."""
        self.storage.register_space(space)

    def register_transform(
        self, transform: VectorTransform, *, pairs: tuple[Any, Any] | None = None, accept_unmeasured: bool = False
    ) -> None:
        """Keep a map between two spaces of this gallery: searches use it from now on. Replaces an earlier one.

        Args:
            pairs: ``(source vectors (N, Di), target vectors (N, Do))`` of the same items; where given, the direction is
                checked on them first (``bowerbird.gallery.transform.check_direction``).
            accept_unmeasured: Also a map that has no verdict on held-out pairs in its evidence, without ``pairs``. The
                evidence of the relation then says so.

        Raises:
            SpaceError: If the gallery does not know one of the two spaces (``register_space`` first), a width differs,
                nothing shows the map's direction, or the pairs show that it goes in the other direction or does not fit
                at all.
        """
        spaces = self.snapshot().spaces
        for name, width in ((transform.source, transform.dim_in), (transform.target, transform.dim_out)):
            if name not in spaces:
                raise SpaceError(
                    f"the transform {transform} names space {name[:12]!r}, which this gallery does not know; known: "
                    f"{', '.join(map(str, spaces.values()))}"
                )
            if spaces[name].dim != width:
                raise SpaceError(
                    f"the transform {transform} has width {width} where space {spaces[name]} has {spaces[name].dim}; "
                    "is it meant for the other direction?"
                )
        transform = with_evidence(
            transform,
            pairs,
            accept=accept_unmeasured,
            ask="Give pairs=(source vectors, target vectors) of the same items, or accept_unmeasured=True",
        )
        # The file is there before a relation names it. One that is replaced stays for a while: it may be in use.
        self.storage.write_file(_transform_file(transform.fingerprint), transform.to_bytes())
        evidence = {**transform.evidence, "transform": transform.fingerprint, "method": transform.method}
        self.storage.relate(Relation("transform", transform.source, transform.target, evidence))
        self._transforms[transform.fingerprint] = transform

    def transform(self, source: str, target: str) -> VectorTransform | None:
        """The registered map from one space to another (fingerprints), in this direction; ``None`` without one.

        Raises:
            CorruptionError: If its file is missing or damaged.
        """
        for relation in self.snapshot().relations:
            if (relation.kind, relation.new, relation.old) == ("transform", source, target):
                return self._transform(relation)
        return None

    def transforms(self) -> list[VectorTransform]:
        """Every registered transform."""
        return [self._transform(relation) for relation in self.relations() if relation.kind == "transform"]

    def _transform(self, relation: Relation) -> VectorTransform:
        name = str(relation.evidence.get("transform"))
        if name not in self._transforms:
            file = _transform_file(name)
            data = self.storage.read_file(file)
            if data is None:
                if relation not in self.storage.relations():
                    raise SnapshotGoneError(f"the transform {name[:12]} of {self.path} was replaced by another one")
                raise CorruptionError(f"gallery {self.path} has lost its file {file}; register the transform again")
            try:
                found = VectorTransform.from_bytes(data, f"{self.path}/{file}")
            except InputError as exc:
                raise CorruptionError(f"{exc}. Register the transform again") from exc
            if (found.fingerprint, found.source, found.target) != (name, relation.new, relation.old):
                raise CorruptionError(
                    f"{file} of {self.path} is not the transform that was registered; register it again"
                )
            self._transforms[name] = found
        return self._transforms[name]

    def fill(self, ids: Sequence[str], vectors: Any) -> None:
        """Give pending items (see ``pending``) their vectors of the serving space. All of them, or none."""
        ids = checked_ids(ids)
        waiting = {item.id: item.num for item in self.pending()}
        for name in ids:
            if name not in waiting:
                raise UnknownNameError(
                    f"item {name!r} is not pending; pending are {len(waiting)} items: {list(waiting)[:5]}"
                )
        nums = np.array([waiting[name] for name in ids], np.int64)
        self.store.fill(nums, vectors)

    # ------------------------------------------------------------------------------------------------- reading

    def snapshot(self) -> Snapshot:
        """The newest committed state, immutable. It stays valid and unchanged while others write."""
        return self.storage.snapshot()

    def __len__(self) -> int:
        return self.snapshot().live

    def __contains__(self, item_id: object) -> bool:
        return isinstance(item_id, str) and self.storage.find([item_id])[0] is not None

    def get(self, item_id: str) -> Item:
        """One item. Raises ``UnknownNameError`` if it is not in the gallery."""
        found = self.storage.find([item_id])[0]
        if found is None:
            raise self._unknown(item_id)
        return found

    def get_many(self, ids: Sequence[str]) -> list[Item | None]:
        """Items in the order of ``ids``; ``None`` for those that are not in the gallery."""
        return self.storage.find(list(ids))

    def _unknown(self, item_id: str) -> UnknownNameError:
        close = self.storage.close_id(item_id) if is_utf8(item_id) and "\0" not in item_id else ""
        return UnknownNameError(f"gallery {self.path} has no item {item_id!r}.{close}")

    def items(self, batch: int = 1000, *, snapshot: Snapshot | None = None) -> Iterator[Item]:
        """Every live item of one epoch (default: the newest), by number."""
        epoch, last = (snapshot or self.snapshot()).epoch, -1
        while items := self.storage.scan(epoch, last, batch):
            yield from items
            last = items[-1].num

    def vectors(self, fingerprint: str | None = None) -> tuple[NDArray[np.int64], NDArray]:
        """``(item numbers (N,), vectors (N, D))`` of the live items that are searched in a space; memory-mapped where
        possible.

        Default: the space that is written now.
        """
        snapshot = self.snapshot()
        part = self._part(snapshot, fingerprint or snapshot.write_space.fingerprint)
        return part.nums, part.vectors()

    def vectors_of(self, ids: Sequence[str], fingerprint: str | None = None) -> NDArray[np.float32]:
        """float32 ``(N, D)`` vectors of items in a space. Raises ``UnknownNameError`` for items that have none
        there."""
        snapshot = self.snapshot()
        part = self._part(snapshot, fingerprint or snapshot.write_space.fingerprint)
        found = self.storage.find(list(ids))
        nums = np.array(
            [-1 if item is None or item.num >= snapshot.num_limit else item.num for item in found], np.int64
        )
        absent = nums < 0
        absent[~absent] = ~part.contains(nums[~absent])
        if absent.any():
            name = list(ids)[int(np.argmax(absent))]
            if name not in self:
                raise self._unknown(name)
            raise UnknownNameError(
                f"item {name!r} has no vector in space {part.space} (it is not migrated, or damaged)"
            )
        return part.vectors_of(nums)

    def pending(self) -> list[Item]:
        """Items without a vector in the serving space: searches do not find them. Only a rollback can leave such
        items."""
        return self.storage.pending()

    def spaces(self) -> list[Space]:
        """Every space that the gallery knows, the serving one first."""
        snapshot = self.snapshot()
        return sorted(snapshot.spaces.values(), key=lambda space: space.fingerprint != snapshot.serving)

    def relations(self) -> list[Relation]:
        """Every registered relation, transforms included."""
        return self.storage.relations()

    def compatible(self, new: str, old: str) -> bool:
        """Whether queries of space ``new`` may be compared with vectors of space ``old``."""
        return new == old or any((r.kind, r.new, r.old) == ("compatible", new, old) for r in self.relations())

    # ------------------------------------------------------------------------------------------------- search

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        where: Mapping[str, Any] | None = None,
        merger: Merger | None = None,
        snapshot: Snapshot | None = None,
    ) -> SearchResult:
        """The ``k`` nearest items; exact unless ``set_index`` chose an approximate index.

        During an upgrade the gallery has two disjoint parts, more where upgrades stack; each is searched with queries
        of its space and the hits are merged. With no item migrated the result is bit for bit that of the old gallery,
        with all of them that of a gallery built from the new vectors.

        Args:
            queries: ``(Q, D)`` or ``(D,)`` vectors of the serving space; or ``{fingerprint: (Q, D)}``, which an
                upgrade needs.
                A part whose space is not given is searched with queries that registered relations lead to it
                (``bowerbird.gallery.routing``): mapped by transforms, or as they are where spaces are compatible.
            k: At least 1; at most the number of items, or ``PADDED`` where there are fewer.
            where: ``{"key": value}`` or ``{"key": [values]}`` on the metadata; all must hold. The ``k`` nearest among
                the items
                that match, in every part.
            merger: Joins the lists; default: the one that the upgrade was begun with.
            snapshot: Search this earlier snapshot instead of the newest state.

        Raises:
            SpaceError: If queries of a space are missing, foreign, or of a wrong width.
            DataError: If a query is not finite or has length zero.
            InputError: If ``k`` or ``where`` cannot be used.
        """
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise InputError(f"k is {k!r}; it must be a whole number of at least 1")
        k = int(k)
        if snapshot is None:
            try:
                return self.search(queries, k, where=where, merger=merger, snapshot=self.snapshot())
            except SnapshotGoneError:
                snapshot = self.snapshot()
        if k > max(PADDED, snapshot.live):  # rows have k places, whatever is found
            raise InputError(f"k is {k}, and {self.path} has {snapshot.live} items; ask for that many at most")
        given = self._queries(snapshot, queries)
        allowed = None if not where else self.storage.allowed(snapshot, where)
        count = len(next(iter(given.values())))
        parts = [part for part in snapshot.served_parts if part.count]
        # An empty part needs no queries, but what was given for it was checked all the same.
        queries_of = [self._queries_for(part, given, snapshot) for part in parts]
        hits = [snapshot.searcher(part).search(rows, k, allowed) for part, rows in zip(parts, queries_of, strict=True)]
        if not hits:
            merged = Hits(np.full((count, k), -1, np.int64), np.full((count, k), np.inf, np.float32))
        elif len(hits) == 1:
            merged = hits[0]
        else:
            assert snapshot.upgrade is not None
            merge = merger or self._merger(snapshot.upgrade.merger)
            wanted = getattr(merge, "background_items", 0)
            samples = (
                [part.background(rows, wanted) for part, rows in zip(parts, queries_of, strict=True)]
                if wanted
                else None
            )
            counts = None
            if getattr(merge, "needs_counts", False):
                counts = [part.count if allowed is None else part.matching(allowed) for part in parts]
            merged = merge_many(merge, hits, k, background=samples, counts=counts)
        return self._named(snapshot, merged, parts)

    def _queries(self, snapshot: Snapshot, queries: Any) -> dict[str, NDArray[np.float32]]:
        if not isinstance(queries, Mapping):
            if snapshot.upgrade is not None:
                raise SpaceError(
                    f"the gallery is being upgraded from {snapshot.spaces[snapshot.upgrade.old]} to "
                    f"{snapshot.write_space}: say "
                    "which space the queries are of, {fingerprint: vectors}, or search through `Upgrade.serve`"
                )
            queries = {snapshot.serving: queries}
        given = {}
        for fingerprint, rows in queries.items():
            space = snapshot.spaces.get(fingerprint)
            if space is None:
                raise SpaceError(
                    f"queries are of space {str(fingerprint)[:12]!r}, which this gallery does not know; it has "
                    f"{', '.join(map(str, snapshot.spaces.values()))}. Encode the query with the gallery's own encoder."
                )
            rows = np.asarray(rows)
            given[fingerprint] = unit_vectors(np.atleast_2d(rows), space.dim, what="queries")
        if len({len(rows) for rows in given.values()}) != 1:
            raise InputError(
                f"queries need one row per query in every space; got {[len(rows) for rows in given.values()]} rows"
            )
        return given

    def _queries_for(
        self, part: Part, given: Mapping[str, NDArray[np.float32]], snapshot: Snapshot
    ) -> NDArray[np.float32]:
        space = part.space.fingerprint
        if space in given:
            return given[space]
        routed = self.route_queries(given, space, snapshot)
        if routed is None:
            raise SpaceError(what_is_missing(given, space, part.count, snapshot.spaces))
        return routed

    def route_queries(
        self, queries: Mapping[str, Any], target: str, snapshot: Snapshot | None = None
    ) -> NDArray[np.float32] | None:
        """float32 ``(Q, D)`` query vectors with which the space ``target`` can be searched, made from those given.

        Args:
            queries: ``{fingerprint: (Q, D) unit rows}``; the cheapest route of registered relations is taken.

        Returns:
            ``None`` where no relation leads from a given space to ``target``.
        """
        snapshot = snapshot or self.snapshot()
        route = find_route(queries, target, snapshot.relations, snapshot.spaces)
        if route is None:
            return None
        return self.apply_route(route, np.asarray(queries[route.source], np.float32), snapshot)

    def apply_route(self, route: Route, vectors: NDArray[np.float32], snapshot: Snapshot) -> NDArray[np.float32]:
        """float32 ``(N, D of the target)`` unit rows from unit rows of the route's source."""
        return route.apply(vectors, snapshot.spaces, self._transform)

    def _merger(self, name: str) -> Merger:
        if name not in self._mergers:
            from bowerbird.registry import get_registry

            registry = get_registry()
            self._mergers[name] = registry.load(registry.get("retriever", name, role="merger"))
        return self._mergers[name]

    def _named(self, snapshot: Snapshot, hits: Hits, parts: Sequence[Part]) -> SearchResult:
        real = hits.ids >= 0
        names = self.storage.names(hits.ids[real].tolist())
        try:
            ids = [[names[num] for num in row[good].tolist()] for row, good in zip(hits.ids, real, strict=True)]
        except KeyError:
            raise SnapshotGoneError(f"{self.path} was compacted: what this snapshot found was deleted since") from None
        found_in = np.where(real, 0, -1).astype(np.int8)
        for number, part in enumerate(parts[1:], 1):
            found_in[part.contains(np.maximum(hits.ids, 0)) & real] = number
        spaces = tuple(part.space.fingerprint for part in parts)
        newest = len(parts) - 1 if spaces and spaces[-1] == snapshot.write_space.fingerprint else len(parts)
        sides = np.where(real, found_in == newest, -1).astype(np.int8)
        return SearchResult(ids, hits.distances, sides, hits.ids, snapshot.epoch, found_in, spaces)

    def _part(self, snapshot: Snapshot, fingerprint: str) -> Part:
        part = snapshot.part_of(fingerprint)
        if part is None:
            served = ", ".join(str(part.space) for part in snapshot.parts)
            raise SpaceError(
                f"space {fingerprint[:12]!r} has no vectors in this gallery; there are vectors of {served}"
            )
        return part

    # -------------------------------------------------------------------------------------------------- index

    def set_index(self, kind: str, *, progress: Callable[[str], None] | None = None, **config: Any) -> list[IndexEntry]:
        """Search this gallery exactly (the default), or through an approximate index, which is built now.

        With ``ivf`` or ``hnsw`` a search may miss items; the distances of those it finds are exact. The index of an
        open gallery takes in what comes later by itself, a piece with each search; until then such items are searched
        exactly, and so is a space that has no index yet (``tend_index`` builds it). A search with ``where`` is exact.

        Readers and writers go on while an index is built. Until it is complete the earlier state stays.

        Args:
            kind: ``exact``, ``ivf`` or ``hnsw``.
            progress: Called with a line of text at each step.
            config: Settings of ``bowerbird.retrieval.configs.FaissConfig``, for example ``target_recall=0.95``.

        Returns:
            One entry per indexed space, with the measured recall@10; none for ``exact`` and an empty gallery.

        Raises:
            InputError: For a kind or a setting that is not known.
            MissingExtraError: If FAISS is not installed.
            GalleryLockedError: If an index of this gallery is being built already.
        """
        return self.storage.build_index(kind, config, progress)

    def build_index(self, *, progress: Callable[[str], None] | None = None) -> list[IndexEntry]:
        """Build the index again, over every item of now, with the settings of the last ``set_index``."""
        return self.storage.build_index(None, {}, progress)

    def tend_index(self, *, share: float = 0.03, progress: Callable[[str], None] | None = None) -> list[IndexEntry]:
        """Bring the index files up to date where that is due: what a worker calls after each commit.

        Due is a space of some thousand items that has no index, or whose number of items is a quarter away from what
        its file holds. Files are updated, and built anew only where they have outgrown their training.

        Args:
            share: Share of this process' time, above 0 to 1, that may go into it: while the work of an earlier call was
                more than that, nothing is done. 1: what is due is done now.

        Returns:
            The entries that were written; mostly none.
        """
        tend = getattr(self.storage, "tend_index", None)  # other stores keep their indexes themselves
        return [] if tend is None else tend(share, progress)

    def index(self) -> dict[str, Any]:
        """Plain data: ``kind``, ``config``, and ``files`` with space, items, recall, epoch and path of each index."""
        return self.storage.index_status()

    # ------------------------------------------------------------------------------------------------- health

    def check_canary(
        self,
        encode: Callable[[list[Item]], Any],
        *,
        fingerprint: str | None = None,
        tolerance: float = 1e-3,
        items: int = CANARY_ITEMS,
    ) -> float | None:
        """Encode stored items again and compare with their stored vectors: is this encoder the one that filled the
        gallery?

        A model of the same size in the place of the right one gives no error anywhere else, only noise.

        Args:
            encode: List of items -> ``(N, D)``. A row of NaN stands for an item that cannot be read; it is left out.
            fingerprint: Space of the encoder; default: the space that is written now.
            tolerance: Largest ``1 - cosine`` between a vector and its repetition (other hardware, other library
                versions).
            items: How many items are encoded, spread over the gallery; those without a uri where others have one are
                left out.

        Returns:
            The median cosine, or ``None`` where the space has no items, or none that can be read.

        Raises:
            SpaceError: If the median item differs by more than ``tolerance``. Single edited files do not raise.
        """
        snapshot = self.snapshot()
        part = self._part(snapshot, fingerprint or snapshot.write_space.fingerprint)
        if not part.count:
            return None
        nums = np.sort(part.nums)
        chosen = nums[np.unique(np.linspace(0, len(nums) - 1, min(items, len(nums))).astype(np.int64))]
        found = self.storage.items(chosen)
        listed = [found[num] for num in chosen.tolist()]
        if any(item.uri for item in listed):
            listed = [item for item in listed if item.uri]
        encoded = np.asarray(encode(listed))
        if len(encoded) == len(listed) and encoded.dtype.kind == "f":
            readable = ~np.isnan(encoded).all(axis=-1)
            encoded, listed = encoded[readable], [item for item, good in zip(listed, readable, strict=True) if good]
        if not listed:
            return None
        again = unit_vectors(encoded, part.space.dim, count=len(listed), what="the encoder's vectors")
        stored = part.vectors_of(np.array([item.num for item in listed], np.int64))
        cosine = float(np.median((again.astype(np.float64) * stored).sum(axis=1)))
        if cosine < 1 - tolerance:
            raise SpaceError(
                f"this encoder is not the one that filled space {part.space}: {len(listed)} stored items encoded "
                "again have a median "
                f"cosine of {cosine:.4f} with their stored vectors; at least {1 - tolerance:g} was expected. Load "
                "the encoder that the "
                "space names, or upgrade the gallery to this one."
            )
        return cosine

    def verify(self) -> Report:
        """Check every checksum and invariant. Reads all files; changes nothing; never raises for damage, the report
        names it."""
        return self.storage.verify()

    def counts(self) -> dict[str, int]:
        """Fingerprint -> live items that are searched in that space."""
        return {part.space.fingerprint: part.count for part in self.snapshot().parts}

    def stats(self) -> dict[str, Any]:
        """Plain data: items, epoch, spaces with counts, rows, bytes on disk, the upgrade under way."""
        snapshot = self.snapshot()
        counts = self.counts()
        upgrade = snapshot.upgrade
        return {
            "path": str(self.path),
            "items": snapshot.live,
            "pending": len(self.pending()),
            "epoch": snapshot.epoch,
            "serving": snapshot.serving,
            "spaces": [
                {
                    "fingerprint": s.fingerprint,
                    "encoder": s.encoder,
                    "dim": s.dim,
                    "items": counts.get(s.fingerprint, 0),
                }
                for s in self.spaces()
            ],
            **self.storage.size(),
            "upgrade": None
            if upgrade is None
            else {
                "old": upgrade.old,
                "new": upgrade.new,
                "state": upgrade.state,
                "strategy": upgrade.strategy,
                "order": upgrade.order,
            },
            "index": self.index(),
            "problems": snapshot.problems,
        }


def _transform_file(fingerprint: str) -> str:
    return f"transforms/{fingerprint}.safetensors"
