"""``serve``: a search object that is right at every moment of an upgrade, and before and after it.

It follows the gallery by snapshots (a commit of any process is seen at the next search) and encodes each query with the
encoders that the present state needs, never more: the old one is left alone once nothing old is left, or where the
strategy searches the old part with new queries.

Where upgrades stack, each part is searched as the upgrade that leads away from its space says, one step at a time: with
v1 -> v2 by a compatible encoder and v2 -> v3 by a transform of the queries, one pass of v3's encoder reaches all three.
Where that needs query vectors that cannot be had, registered relations lead to them from those that can.

Q queries, k results, D width of a space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError, SnapshotGoneError, SpaceError
from bowerbird.gallery.routing import find_route
from bowerbird.gallery.vectors import unit_vectors
from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.strategies import Strategy, load_strategy

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery, SearchResult
    from bowerbird.gallery.protocol import Snapshot
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.gallery.space import Space

EncoderLoader = Callable[["Space"], ItemEncoder]
Encode = Callable[[ItemEncoder], np.ndarray]  # the queries of one search by whatever encoder they are needed


@dataclass(frozen=True)
class ServingState:
    """What a search would do now.

    Attributes:
        epoch: Number of the last commit.
        share: Share of the searchable items in the newest space, 0 to 1; 1 outside upgrades.
        strategy: Of the upgrade, the topmost one; ``None`` outside upgrades.
        needs: Fingerprints of the spaces in which a query must be given, or for which it is encoded.
        parts: ``(fingerprint, items)`` of each space with items, the oldest first.
    """

    epoch: int
    share: float
    strategy: str | None
    needs: tuple[str, ...]
    parts: tuple[tuple[str, int], ...] = ()


class SearchService:
    """Searches a gallery by images (or videos), texts or vectors. Thread-safe as far as the encoders are.

    Args:
        gallery: Open; many services may share it.
        encoders: Encoders that may be needed, by any order: ``LoadedEncoder`` or ``ItemEncoder``.
        loader: Called for the space of an encoder that is needed and was not given, once.
    """

    def __init__(self, gallery: Gallery, encoders: Sequence[Any] = (), *, loader: EncoderLoader | None = None) -> None:
        self.gallery = gallery
        self._loader = loader
        self._strategies: dict[str, Strategy] = {}
        self._encoders: dict[str, ItemEncoder] = {}
        for encoder in encoders:
            wrapped = encoder if isinstance(encoder, ItemEncoder) else ItemEncoder(encoder)
            self._encoders[wrapped.space.fingerprint] = wrapped

    def state(self, snapshot: Snapshot | None = None) -> ServingState:
        """Of the newest snapshot, or of the one that is given (or a view of one)."""
        snapshot = snapshot or self.gallery.snapshot()
        parts = tuple((part.space.fingerprint, part.count) for part in snapshot.parts if part.count)
        total = sum(count for _, count in parts)
        share = snapshot.new.count / total if total else 1.0
        strategy = snapshot.upgrade.strategy if snapshot.upgrade else None
        return ServingState(snapshot.epoch, share, strategy, self._needs(snapshot), parts)

    def search(
        self,
        images: Sequence[Any] | None = None,
        *,
        texts: Sequence[str] | None = None,
        vectors: Mapping[str, Any] | None = None,
        k: int = 10,
        where: Mapping[str, Any] | None = None,
        snapshot: Snapshot | None = None,
    ) -> SearchResult:
        """The ``k`` nearest items of each query.

        Args:
            images: Q paths, bytes or ``PIL.Image``, or paths of videos where the encoders take these; encoded here.
            texts: Q sentences, instead of images.
            vectors: ``{fingerprint: (Q, D)}``, instead of images or texts, or for the encoders that are not at hand.
            where: Filter on the metadata, applied to every part.
            snapshot: Search this one, or a view of one, instead of the newest state.

        Raises:
            SpaceError: If a space is needed for which there are neither vectors nor an encoder; names it.
            DataError: If an image cannot be read.
            InputError: If there are texts, and an encoder that is needed takes none.
        """
        if (images is None and texts is None and not vectors) or (images is not None and texts is not None):
            raise InputError("search needs images, or texts, or vectors by the fingerprint of their space")

        def encode(encoder: ItemEncoder) -> np.ndarray:
            return encoder.texts(texts) if texts is not None else encoder.images(images or ())

        asked = None if images is None and texts is None else encode
        if snapshot is not None:
            return self._search(asked, vectors, k, where, snapshot)
        try:
            return self._search(asked, vectors, k, where, self.gallery.snapshot())
        except SnapshotGoneError:  # an upgrade was finished or rolled back between two steps of this search
            return self._search(asked, vectors, k, where, self.gallery.snapshot())

    def _search(
        self,
        encode: Encode | None,
        vectors: Mapping[str, Any] | None,
        k: int,
        where: Mapping[str, Any] | None,
        snapshot: Snapshot,
    ) -> SearchResult:
        # Vectors of a space that is not needed now are left out: a client may send both, before and after the upgrade.
        known = {name: rows for name, rows in (vectors or {}).items() if name in snapshot.spaces}
        queries: dict[str, np.ndarray] = {}
        routed: dict[str, np.ndarray] = {}
        for number in reversed(self._searched(snapshot)):  # the newest first: older ones may be made from it
            base = self._base(snapshot, number)
            fingerprint = snapshot.stack[base]
            if fingerprint not in queries:
                queries[fingerprint] = self._obtain(snapshot, fingerprint, encode, known)
            routed[snapshot.stack[number]] = self._stepped(snapshot, number, base, {**queries, **routed})
        return self.gallery.search(routed, k, where=where, snapshot=snapshot)

    def _searched(self, snapshot: Snapshot) -> list[int]:
        """Positions in ``snapshot.stack`` of the parts that have items; of an empty gallery the newest."""
        parts = snapshot.served_parts
        return [number for number, part in enumerate(parts) if part.count] or [len(parts) - 1]

    def _base(self, snapshot: Snapshot, number: int) -> int:
        """Position of the space whose own query vectors the part at ``number`` needs: its own, or a newer one where
        strategies make its queries from those."""
        while number < len(snapshot.upgrades) and not self._strategy(snapshot.upgrades[number]).needs_old_encoder:
            number += 1
        return number

    def _needs(self, snapshot: Snapshot) -> tuple[str, ...]:
        wanted = [snapshot.stack[self._base(snapshot, number)] for number in self._searched(snapshot)]
        return tuple(dict.fromkeys(self._encoded_space(snapshot, fingerprint) for fingerprint in wanted))

    def _encoded_space(self, snapshot: Snapshot, fingerprint: str) -> str:
        """The space in which queries of a space are encoded: no encoder makes vectors of a lifted one."""
        if not snapshot.spaces[fingerprint].lifted:
            return fingerprint
        encoders = [name for name, space in snapshot.spaces.items() if not space.lifted]
        at_hand = [name for name in encoders if name in self._encoders]
        for candidates in (at_hand, encoders if self._loader or not at_hand else []):
            route = find_route(candidates, fingerprint, snapshot.relations, snapshot.spaces)
            if route is not None:
                return route.source
        return fingerprint

    def _stepped(self, snapshot: Snapshot, number: int, base: int, queries: Mapping[str, np.ndarray]) -> np.ndarray:
        """Queries for the part at ``number``, from those of the space at ``base``, by the strategies between them."""
        found = dict(queries)
        for level in range(min(base, len(snapshot.upgrades) - 1), number - 1, -1):
            upgrade = snapshot.upgrades[level]
            old, new = snapshot.spaces[upgrade.old], snapshot.spaces[upgrade.new]
            strategy: Any = self._strategy(upgrade)
            extra: tuple[Any, ...] = ()
            if getattr(strategy, "transform_direction", None) == "query":
                transform = self.gallery.transform(new.fingerprint, old.fingerprint)
                if transform is None:
                    raise SpaceError(
                        f"strategy {upgrade.strategy!r} searches vectors of space {old} with mapped queries, and this "
                        f"gallery has no transform from {new} to it. Register it, or roll the upgrade back"
                    )
                extra = (transform,)
            found[old.fingerprint] = strategy.old_part_queries(found, old, new, *extra)
        return found[snapshot.stack[number]]

    def _strategy(self, upgrade: UpgradeState) -> Strategy:
        if upgrade.strategy not in self._strategies:
            self._strategies[upgrade.strategy] = load_strategy(upgrade.strategy)[1]
        return self._strategies[upgrade.strategy]

    def _obtain(
        self, snapshot: Snapshot, fingerprint: str, encode: Encode | None, given: Mapping[str, Any]
    ) -> np.ndarray:
        """``(Q, D)`` query vectors of a space: given, encoded, or made along registered relations."""
        if fingerprint in given:
            return _rows(given[fingerprint], snapshot.spaces[fingerprint])
        source = fingerprint if encode is None else self._encoded_space(snapshot, fingerprint)
        if encode is not None and not snapshot.spaces[source].lifted:
            known = {source: encode(self._encoder(snapshot.spaces[source]))}
            if source == fingerprint:
                return known[source]
        else:
            known = {name: _rows(rows, snapshot.spaces[name]) for name, rows in given.items()}
        routed = self.gallery.route_queries(known, fingerprint, snapshot)
        if routed is None:
            raise SpaceError(
                f"searching now needs query vectors of space {snapshot.spaces[fingerprint]}; those of "
                f"{', '.join(name[:12] for name in given) or 'no space'} were given, and no registered relation leads "
                "from those to it. Give vectors of the needed space, or images or texts"
            )
        return routed

    def _encoder(self, space: Space) -> ItemEncoder:
        if space.fingerprint not in self._encoders:
            if self._loader is None:
                raise SpaceError(f"searching now needs the encoder of space {space}; it was not given to this service")
            self._encoders[space.fingerprint] = self._loader(space)
        return self._encoders[space.fingerprint]


def _rows(rows: Any, space: Space) -> np.ndarray:
    return unit_vectors(np.atleast_2d(np.asarray(rows)), space.dim, what="queries")


def serve(gallery: Gallery, encoders: Sequence[Any] = (), *, loader: EncoderLoader | None = None) -> SearchService:
    """A search object valid at every moment; see ``SearchService``."""
    return SearchService(gallery, encoders, loader=loader)
