"""How the part of a gallery that still holds old vectors is searched while the other part is already new.

A strategy is a ``RetrieverRecord`` of role ``upgrade``. Its target is a class with

    needs_old_encoder: bool     whether a query must also be encoded by the old encoder while an old part exists
    merger: str                 the merger record that joins the two lists of hits
    check(gallery, old, new)    raises ``UpgradeError`` where the strategy cannot serve this pair of spaces
    old_part_queries(queries, old, new) -> (Q, old.dim)     the vectors with which the old part is searched

The new part is always searched with new-space queries, so every strategy ends exactly at the new system.
Shapes: Q queries, D width of a space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bowerbird.errors import MissingExtraError, PluginError, SpaceError, UnknownNameError, UpgradeError
from bowerbird.registry import get_registry

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Space


class Strategy(Protocol):
    needs_old_encoder: bool
    merger: str

    def check(self, gallery: Gallery, old: Space, new: Space) -> None: ...

    def old_part_queries(self, queries: Mapping[str, np.ndarray], old: Space, new: Space) -> np.ndarray: ...


class Compatible:
    """The new encoder was trained so that its queries can be compared with old vectors (BCT and its successors).

    One encoder pass per query. Refused without a registered relation ``compatible(new -> old)``: vectors of unrelated
    encoders give noise, also where their sizes agree. Where sizes differ the new query is cut or padded with zeros, as
    the codes of the field do for an old classifier of another width, and brought back to length 1.
    """

    needs_old_encoder = False
    merger = "core:distance"

    def check(self, gallery: Gallery, old: Space, new: Space) -> None:
        if not gallery.compatible(new.fingerprint, old.fingerprint):
            raise UpgradeError(
                f"strategy 'core:compatible' needs a relation compatible({new.encoder} -> {old.encoder}), and the "
                "gallery has none. If the new encoder was trained for the old one, register the relation with "
                "`bowerbird gallery relate`; otherwise use a strategy that keeps the old encoder, rank-merge"
            )

    def old_part_queries(self, queries: Mapping[str, np.ndarray], old: Space, new: Space) -> np.ndarray:
        if new.fingerprint not in queries:
            raise SpaceError(
                f"strategy 'core:compatible' needs queries of the new space {new.fingerprint[:12]}; got none"
            )
        return match_width(queries[new.fingerprint], old.dim)


def match_width(vectors: np.ndarray, width: int) -> np.ndarray:
    """float32 ``(Q, width)`` unit rows: ``vectors`` cut or padded with zeros, then normalised again."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.shape[1] >= width:
        matched = vectors[:, :width]
    else:
        matched = np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))
    norms = np.linalg.norm(matched, axis=1, keepdims=True)
    return matched / np.where(norms > 0, norms, 1.0).astype(np.float32)


def load_strategy(name: str) -> tuple[str, Strategy]:
    """``(full name, strategy)`` by name; ``rank-merge`` means the only record that ends in ``:rank-merge``.

    Raises:
        UnknownNameError: If there is none; suggests close names.
        PluginError: If the target lacks a part of the interface.
    """
    registry = get_registry()
    try:
        record = registry.get("retriever", name, role="upgrade")
    except UnknownNameError as exc:
        if name in ("rank-merge", "compat:rank-merge"):  # the default, and not in core
            raise MissingExtraError("strategy 'rank-merge' comes with: pip install bowerbird-compat") from exc
        raise
    strategy: Any = registry.load(record)()
    missing = [
        part for part in ("needs_old_encoder", "merger", "check", "old_part_queries") if not hasattr(strategy, part)
    ]
    if missing:
        raise PluginError(f"strategy {record.name!r} ({record.target}) lacks {', '.join(missing)}")
    return record.name, strategy


def strategy_names() -> list[str]:
    return [record.name for record in get_registry().records(kind="retriever", role="upgrade")]
