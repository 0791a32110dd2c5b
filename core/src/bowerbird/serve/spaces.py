"""The compatibility matrix for clients: made in a process of its own, kept as long as it says what is so."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Literal

from bowerbird.errors import InputError
from bowerbird.serve.aside import aside
from bowerbird.serve.describe import encoder_name, spaces_of
from bowerbird.serve.schemas import MatrixCell, RelationInfo, SpacesView

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.protocol import Snapshot
    from bowerbird.serve.settings import ServeSettings
    from bowerbird.upgrade.matrix import Cell

SECONDS = 120.0
FRESH = 30.0  # seconds for which measured shares stand while items move; what relates to what is always of now
KIND: dict[str, Literal["own", "compatible", "transform", "both", "none"]] = {
    "same": "own",
    "compatible": "compatible",
    "transform": "transform",
    "several": "both",
    "none": "none",
}


class Spaces:
    """Makes the matrix, one at a time."""

    def __init__(self, settings: ServeSettings, gallery: Gallery) -> None:
        self.settings, self.gallery = settings, gallery
        self._turn = asyncio.Lock()
        self._cells: list[MatrixCell] = []
        self._made_of: object = None
        self._made_at = (-1, 0.0)  # epoch, time

    async def view(self) -> SpacesView:
        async with self._turn:
            snapshot = self.gallery.snapshot()
            structure = (tuple(sorted(snapshot.spaces)), snapshot.stack, repr(snapshot.relations))
            epoch, made_at = self._made_at
            old = epoch != snapshot.epoch and time.monotonic() - made_at > FRESH
            if structure != self._made_of or old:
                made = await aside(
                    "matrix", seconds=SECONDS, gallery=self.settings.gallery, label_key=self.settings.label_key
                )
                self._cells = [MatrixCell(**cell) for cell in made]
                self._made_of, self._made_at = structure, (snapshot.epoch, time.monotonic())
        spaces = await asyncio.to_thread(spaces_of, snapshot)
        return SpacesView(spaces=spaces, relations=relations_of(snapshot), cells=self._cells)


def relations_of(snapshot: Snapshot) -> list[RelationInfo]:
    return [
        RelationInfo(kind=r.kind, new=r.new, old=r.old, evidence=_without_folders(dict(r.evidence)))  # type: ignore[arg-type]
        for r in snapshot.relations
        if r.kind in ("compatible", "transform")
    ]


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    return encoder_name(value) if isinstance(value, str) else value


def make_matrix(*, gallery: str, label_key: str | None) -> list[dict[str, Any]]:
    """The cells as plain data, in a process of its own."""
    from bowerbird.gallery.open import open_gallery
    from bowerbird.upgrade.matrix import matrix

    with open_gallery(gallery, readonly=True) as opened:
        try:
            made = matrix(opened, label_key=label_key)
        except InputError:  # no item has the key
            made = matrix(opened)
    return [
        {
            "source": cell.source,
            "target": cell.target,
            "kind": KIND[cell.kind],
            "quality": cell.measured.value if cell.measured is not None and cell.measured.metric == "r1" else None,
            "note": note_of(cell),
        }
        for cell in made.cells
    ]


def note_of(cell: Cell) -> str:
    """How the pair is compared and what was measured, in words."""
    if cell.route is None:
        return "No registered relation leads there: such queries and vectors are never compared."
    if not cell.route:
        text = "The same space."
    elif len(cell.route) > 1:
        text = f"Over {len(cell.route)} relations: {', then '.join(cell.route)}."
    elif cell.route[0] == "transform":
        text = "Queries are mapped by a registered transform."
    else:
        text = "Vectors are compared as they are."
    if cell.measured is None:
        return text if not cell.route else f"{text} Not measured here: too few items have vectors in both spaces."
    found = cell.measured
    what = "first results with the query's label" if found.metric == "r1" else "items that find themselves"
    return (
        f"{text} Measured on {found.queries} stored items: {found.value:.1%} {what} "
        f"(95% interval {found.low:.1%} to {found.high:.1%})."
    )
