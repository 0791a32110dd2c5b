"""How the part of a gallery that still holds old vectors is searched while the other part is already new.

A strategy is a ``RetrieverRecord`` of role ``upgrade``. Its target is a class with

    needs_old_encoder: bool     whether a query must also be encoded by the old encoder while an old part exists
    merger: str                 the merger record that joins the two lists of hits
    check(gallery, old, new)    raises ``UpgradeError`` where the strategy cannot serve this pair of spaces
    old_part_queries(queries, old, new) -> (Q, old.dim)     the vectors with which the old part is searched

A strategy that fits a map between the two spaces has more:

    transform_direction: "query" | "gallery"    which vectors the map is for. "query": queries, from the new space to
                                the old one, so that one encoder pass serves both parts. "gallery": stored vectors,
                                from the old space to the new one, without their images (see ``bowerbird.upgrade.lift``)
    fit(pairs, *, seed=0, **settings) -> VectorTransform        on a paired sample; needs both encoders' vectors only
    old_part_queries(queries, old, new, transform)      a fourth argument, where the direction is "query"

    uses_trained_transform: bool                optional: where the new encoder was trained together with a map into the
                                old space, that one serves and nothing is fitted

and one that shows no new vector before every item has one says ``switches_at_end = True``.

The new part is always searched with new-space queries, so every strategy ends exactly at the new system.
Shapes: N pairs, Q queries, D width of a space (Do of the old one, Dn of the new one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from bowerbird.errors import DataError, MissingExtraError, PluginError, SpaceError, UnknownNameError, UpgradeError
from bowerbird.gallery.routing import match_width
from bowerbird.registry import get_registry
from bowerbird.retrieval.index import unit_rows

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Space
    from bowerbird.gallery.transform import VectorTransform

DIRECTIONS = ("query", "gallery")


class Strategy(Protocol):
    """What every strategy has. See the module for what some have besides."""

    needs_old_encoder: bool
    merger: str

    def check(self, gallery: Gallery, old: Space, new: Space) -> None: ...

    def old_part_queries(
        self, queries: Mapping[str, np.ndarray], old: Space, new: Space, *transform: VectorTransform
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class TrainingPairs:
    """Items that both encoders have encoded: what a strategy with ``fit`` learns from.

    Attributes:
        old: float32 ``(N, Do)``, made unit rows.
        new: float32 ``(N, Dn)``; row i is the same item as row i of ``old``.
        labels: N labels of any kind, or ``None`` where no item has one.
        old_space, new_space: Whose fingerprints the fitted transform carries as its direction.

    Raises:
        DataError: If the rows do not pair, are not finite, are zero, or have another width than their space.
    """

    old: np.ndarray
    new: np.ndarray
    labels: Sequence[Any] | None
    old_space: Space
    new_space: Space

    def __post_init__(self) -> None:
        for name, space in (("old", self.old_space), ("new", self.new_space)):
            array = np.asarray(getattr(self, name), np.float32)
            if array.ndim != 2 or not len(array) or array.shape[1] != space.dim:
                raise DataError(f"the {name} vectors of the pairs have shape {array.shape}; space {space} needs "
                                f"(rows, {space.dim})")  # fmt: skip
            object.__setattr__(self, name, unit_rows(array, what=f"the {name} vectors of the pairs"))
        if len(self.old) != len(self.new):
            raise DataError(f"{len(self.old)} old and {len(self.new)} new vectors do not pair")
        if self.labels is not None and len(self.labels) != len(self.old):
            raise DataError(f"{len(self.labels)} labels for {len(self.old)} pairs")

    def __len__(self) -> int:
        return len(self.old)

    def take(self, rows: Any) -> Self:
        """The pairs at positions ``rows``."""
        rows = np.asarray(rows, np.int64)
        labels = None if self.labels is None else [self.labels[row] for row in rows.tolist()]
        return type(self)(self.old[rows], self.new[rows], labels, self.old_space, self.new_space)


class Full:
    """Encode everything again, then switch: what every vector database offers, and the baseline of every plan.

    Users keep the old quality until the last item is done. Both encoders serve: the old one until then, the new one for
    items that were uploaded meanwhile, which have no old vector.
    """

    needs_old_encoder = True
    merger = "core:distance"
    switches_at_end = True

    def check(self, gallery: Gallery, old: Space, new: Space) -> None:
        """Any two encoders will do: the old and the new system are never mixed, but for new uploads."""

    def old_part_queries(self, queries: Mapping[str, np.ndarray], old: Space, new: Space) -> np.ndarray:
        if old.fingerprint not in queries:
            raise SpaceError(f"strategy 'core:full' serves the old system and needs queries of its space {old}")
        return queries[old.fingerprint]


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
    direction = transform_direction(strategy)
    if direction not in (None, *DIRECTIONS) or (direction is not None and not hasattr(strategy, "fit")):
        raise PluginError(
            f"strategy {record.name!r} ({record.target}) has the transform_direction {direction!r}"
            f"{'' if hasattr(strategy, 'fit') else ' and no fit'}; accepted: {', '.join(DIRECTIONS)}, with fit"
        )
    return record.name, strategy


def transform_direction(strategy: Strategy) -> str | None:
    """``query``, ``gallery``, or ``None`` for a strategy that fits nothing."""
    return getattr(strategy, "transform_direction", None)


def uses_trained_transform(strategy: Strategy) -> bool:
    """Whether a map that was trained together with the new encoder takes the place of one that is fitted."""
    return bool(getattr(strategy, "uses_trained_transform", False))


def switches_at_end(strategy: Strategy) -> bool:
    """Whether the old system serves until every item is new."""
    return bool(getattr(strategy, "switches_at_end", False))


def strategy_names() -> list[str]:
    return [record.name for record in get_registry().records(kind="retriever", role="upgrade")]
