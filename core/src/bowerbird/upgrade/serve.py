"""``serve``: a search object that is right at every moment of an upgrade, and before and after it.

It follows the gallery by snapshots (a commit of any process is seen at the next search) and encodes each query with the
encoders that the present state needs, never more: the old one is left alone once nothing old is left, or where the
strategy searches the old part with new queries.

Q queries, k results, D width of a space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError, SpaceError
from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.strategies import Strategy, load_strategy

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery, SearchResult
    from bowerbird.gallery.protocol import Snapshot
    from bowerbird.gallery.space import Space

EncoderLoader = Callable[["Space"], ItemEncoder]


@dataclass(frozen=True)
class ServingState:
    """What a search would do now.

    Attributes:
        epoch: Number of the last commit.
        share: Share of the searchable items in the new space, 0 to 1; 1 outside upgrades.
        strategy: Of the upgrade; ``None`` outside upgrades.
        needs: Fingerprints of the spaces in which a query must be given, or for which it is encoded.
    """

    epoch: int
    share: float
    strategy: str | None
    needs: tuple[str, ...]


class SearchService:
    """Searches a gallery by images or by vectors. Thread-safe as far as the encoders are.

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

    def state(self) -> ServingState:
        snapshot = self.gallery.snapshot()
        old, new = snapshot.old.count, snapshot.new.count
        share = new / (old + new) if old + new else 1.0
        strategy = snapshot.upgrade.strategy if snapshot.upgrade else None
        return ServingState(snapshot.epoch, share, strategy, self._needs(snapshot))

    def search(
        self,
        images: Sequence[Any] | None = None,
        *,
        vectors: Mapping[str, Any] | None = None,
        k: int = 10,
        where: Mapping[str, Any] | None = None,
    ) -> SearchResult:
        """The ``k`` nearest items of each query.

        Args:
            images: Q paths, bytes or ``PIL.Image``; encoded here.
            vectors: ``{fingerprint: (Q, D)}``, instead of images or for the encoders that are not at hand.
            where: Filter on the metadata, applied to both parts.

        Raises:
            SpaceError: If a space is needed for which there are neither vectors nor an encoder; names it.
            DataError: If an image cannot be read.
        """
        if images is None and not vectors:
            raise InputError("search needs images, or vectors by the fingerprint of their space")
        snapshot = self.gallery.snapshot()
        # Vectors of a space that is not needed now are left out: a client may send both, before and after the upgrade.
        given = vectors or {}
        queries = {
            fingerprint: np.atleast_2d(np.asarray(given[fingerprint], np.float32))
            if fingerprint in given
            else self._encode(snapshot, fingerprint, images, given)
            for fingerprint in self._needs(snapshot)
        }
        return self.gallery.search(self._routed(snapshot, queries), k, where=where, snapshot=snapshot)

    def _needs(self, snapshot: Snapshot) -> tuple[str, ...]:
        if snapshot.upgrade is None:
            return (snapshot.serving,)
        needs = []
        if snapshot.old.count and self._strategy(snapshot).needs_old_encoder:
            needs.append(snapshot.upgrade.old)
        if snapshot.new.count or not needs:
            needs.append(snapshot.upgrade.new)
        return tuple(needs)

    def _routed(self, snapshot: Snapshot, queries: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Queries by the space of the part that they search."""
        upgrade = snapshot.upgrade
        routed = dict(queries)
        if upgrade is not None and snapshot.old.count:
            old, new = snapshot.spaces[upgrade.old], snapshot.spaces[upgrade.new]
            routed[upgrade.old] = self._strategy(snapshot).old_part_queries(queries, old, new)
        return routed

    def _strategy(self, snapshot: Snapshot) -> Strategy:
        assert snapshot.upgrade is not None
        name = snapshot.upgrade.strategy
        if name not in self._strategies:
            self._strategies[name] = load_strategy(name)[1]
        return self._strategies[name]

    def _encode(
        self, snapshot: Snapshot, fingerprint: str, images: Sequence[Any] | None, given: Mapping[str, Any]
    ) -> np.ndarray:
        space = snapshot.spaces[fingerprint]
        if images is None:
            raise SpaceError(
                f"searching now needs query vectors of space {space}; those of {', '.join(f[:12] for f in given)} were "
                "given. Give vectors of the needed space, or images"
            )
        if fingerprint not in self._encoders:
            if self._loader is None:
                raise SpaceError(f"searching now needs the encoder of space {space}; it was not given to this service")
            self._encoders[fingerprint] = self._loader(space)
        return self._encoders[fingerprint].images(images)


def serve(gallery: Gallery, encoders: Sequence[Any] = (), *, loader: EncoderLoader | None = None) -> SearchService:
    """A search object valid at every moment; see ``SearchService``."""
    return SearchService(gallery, encoders, loader=loader)
