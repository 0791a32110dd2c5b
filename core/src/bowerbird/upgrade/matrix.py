"""The compatibility matrix of a gallery: queries of which space reach the vectors of which other, by which relations,
and how well.

How well is measured where it can be: on items that have vectors in both spaces, which is so while an upgrade is under
way. Otherwise the numbers are those that were registered with the relations.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import InputError
from bowerbird.files import write_atomically
from bowerbird.gallery.routing import Route, find_route
from bowerbird.gallery.space import LIFTED
from bowerbird.retrieval.intervals import bootstrap_interval

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.protocol import Snapshot
    from bowerbird.gallery.space import Space

QUERIES = 200
MIN_QUERIES = 10  # below, a measured share says nothing
# Light, so that text is read on them; what they say is written in the cell as well.
COLOURS = {"same": "#b9dcf2", "transform": "#a5e0cb", "compatible": "#fbdc9b", "several": "#e3c3d8", "none": "#f3f4f6"}
METRICS = {"r1": "R@1", "self": "finds itself"}
EXPLAINED = {
    "r1": "R@1: share of the queries whose nearest other item has their label",
    "self": "share of the queries that find themselves, seen by the other space",
}


@dataclass(frozen=True)
class Measured:
    """A share of queries with its 95 % bootstrap interval.

    Attributes:
        metric: ``r1``: the nearest other item has the query's label. ``self``: the nearest item is the query itself,
            seen by the other space.
    """

    metric: str
    value: float
    low: float
    high: float
    queries: int


@dataclass(frozen=True)
class Cell:
    """Queries of ``source`` on vectors of ``target`` (fingerprints).

    Attributes:
        route: Kinds of the relations in order; ``()`` = one space; ``None`` = not comparable.
        through: Fingerprints from the source to the target.
        measured: On stored items; ``None`` where too few have vectors in both spaces.
        evidence: What was registered with each relation of the route.
    """

    source: str
    target: str
    route: tuple[str, ...] | None
    through: tuple[str, ...]
    measured: Measured | None
    evidence: tuple[dict[str, Any], ...]

    @property
    def kind(self) -> str:
        """``same``, ``transform``, ``compatible``, ``several`` or ``none``."""
        if self.route is None:
            return "none"
        return "same" if not self.route else self.route[0] if len(self.route) == 1 else "several"


@dataclass(frozen=True)
class Matrix:
    """Every pair of the spaces of a gallery.

    Attributes:
        spaces: Fingerprint, encoder, dim, and ``items`` that are searched in it; those of ``snapshot.stack`` first, the
            oldest first.
        cells: Row by row: all targets for the first source, and so on.
    """

    spaces: tuple[dict[str, Any], ...]
    cells: tuple[Cell, ...]

    def cell(self, source: str, target: str) -> Cell:
        return next(cell for cell in self.cells if (cell.source, cell.target) == (source, target))

    def to_dict(self) -> dict[str, Any]:
        return {"spaces": list(self.spaces), "cells": [{**asdict(cell), "kind": cell.kind} for cell in self.cells]}

    def names(self) -> list[str]:
        """A short name for each space: its encoder without what all have in common, and with digits of the fingerprint
        where that is not enough."""
        encoders = [str(space["encoder"]).removeprefix(LIFTED) for space in self.spaces]
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*encoders, strict=False))
        common = "".join(letters[0] for letters in alike) if len(set(encoders)) > 1 else ""
        cut = max((common.rfind(mark) for mark in "/?&:"), default=-1) + 1
        names = [
            ("lifted " if space["encoder"].startswith(LIFTED) else "") + (encoder[cut:] or encoder)
            for encoder, space in zip(encoders, self.spaces, strict=True)
        ]
        return [
            f"{name} {space['fingerprint'][:6]}" if names.count(name) > 1 else name
            for name, space in zip(names, self.spaces, strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """As a picture, ``.svg`` or ``.png``. Needs matplotlib, extra ``[report]``."""
        file = Path(path)
        if file.suffix not in (".svg", ".png"):
            raise InputError(f"a matrix is drawn as .svg or .png, and {file.name!r} was asked for")
        write_atomically(file, _draw(self, file.suffix[1:]))


def matrix(gallery: Gallery, *, label_key: str | None = None, queries: int = QUERIES, seed: int = 0) -> Matrix:
    """The matrix of a gallery. Reads only; what can be measured is searched exactly.

    Args:
        label_key: Metadata key with an item's label; with it ``r1`` is measured, without it ``self``.
        queries: Items that serve as queries, at most, drawn with ``seed``.

    Raises:
        InputError: If no item has the metadata key.
    """
    snapshot = gallery.snapshot()
    stack = list(snapshot.stack)
    order = [*stack, *sorted(name for name in snapshot.spaces if name not in stack)]
    counts = {part.space.fingerprint: part.count for part in snapshot.parts}
    spaces = [snapshot.spaces[name] for name in order]
    labels = None if label_key is None else _labels(gallery, snapshot, label_key)
    bench = _Bench(gallery, snapshot, labels, queries, seed)
    cells = [_cell(bench, source, target) for source in spaces for target in spaces]
    described = tuple(
        {"fingerprint": s.fingerprint, "encoder": s.encoder, "dim": s.dim, "items": counts.get(s.fingerprint, 0)}
        for s in spaces
    )
    return Matrix(described, tuple(cells))


def _cell(bench: _Bench, source: Space, target: Space) -> Cell:
    snapshot = bench.snapshot
    route = find_route([source.fingerprint], target.fingerprint, snapshot.relations, snapshot.spaces)
    if route is None:
        return Cell(source.fingerprint, target.fingerprint, None, (), None, ())
    through = (route.source, *(hop.old for hop in route.hops))
    evidence = tuple(dict(hop.evidence) for hop in route.hops)
    return Cell(source.fingerprint, target.fingerprint, route.kinds, through, bench.measure(route), evidence)


class _Bench:
    """Stored items as queries of one space on the vectors of another."""

    def __init__(
        self, gallery: Gallery, snapshot: Snapshot, labels: np.ndarray | None, queries: int, seed: int
    ) -> None:
        self.gallery, self.snapshot, self.labels, self.seed = gallery, snapshot, labels, seed
        self.queries = queries
        self._rows: dict[str, Any] = {}

    def rows(self, fingerprint: str) -> Any:
        if fingerprint not in self._rows:
            self._rows[fingerprint] = self.snapshot.rows_of(fingerprint)
        return self._rows[fingerprint]

    def measure(self, route: Route) -> Measured | None:
        if self.labels is None and not route.hops:
            return None  # an item finds itself in its own space
        asked, searched = self.rows(route.source), self.rows(route.target)
        nums = np.sort(asked.nums)
        if self.labels is None:
            nums = nums[searched.contains(nums)]
        else:
            nums = nums[self.labels[nums] >= 0]
            known = searched.nums
            many = np.bincount(
                self.labels[known][self.labels[known] >= 0], minlength=int(self.labels.max(initial=0)) + 1
            )
            others = many[self.labels[nums]] - searched.contains(nums)
            nums = nums[others > 0]  # nobody could answer the others
        if len(nums) < MIN_QUERIES:
            return None
        chosen = np.sort(np.random.default_rng(self.seed).permutation(nums)[: self.queries])
        vectors = self.gallery.apply_route(route, asked.vectors_of(chosen), self.snapshot)
        found = searched.search(vectors, 2).ids
        if self.labels is None:
            right = found[:, 0] == chosen
        else:
            first = np.where(found[:, 0] == chosen, found[:, 1], found[:, 0])
            right = self.labels[first] == self.labels[chosen]
        interval = bootstrap_interval(right.astype(np.float64), seed=self.seed)
        metric = "self" if self.labels is None else "r1"
        return Measured(metric, interval.mean, interval.low, interval.high, len(chosen))


def _labels(gallery: Gallery, snapshot: Snapshot, key: str) -> np.ndarray:
    """int64 by item number: which label, -1 without one."""
    out = np.full(snapshot.num_limit, -1, np.int64)
    seen: dict[str, int] = {}
    for item in gallery.items():
        value = item.metadata.get(key)
        if value is not None and item.num < snapshot.num_limit:
            out[item.num] = seen.setdefault(str(value), len(seen))
    if not seen:
        raise InputError(f"no item of {gallery.path} has the metadata key {key!r}, which was to hold its label")
    return out


def cell_text(cell: Cell) -> str:
    """For a table: how the pair is compared; the measured share with its interval, and of how many queries."""
    if cell.route is None:
        return "-"
    text = " > ".join(cell.route) or "same space"
    if cell.measured is None:
        return text + "\nnot measured"
    one = cell.measured
    return f"{text}\n{METRICS[one.metric]} {one.value:.3f}\n[{one.low:.3f}, {one.high:.3f}]\n{one.queries} queries"


def _draw(made: Matrix, kind: str) -> bytes:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    count, names = len(made.spaces), made.names()
    figure = Figure(figsize=(2.6 + 1.75 * count, 2.2 + 0.95 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, cell in enumerate(made.cells):
        row, column = divmod(number, count)
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=COLOURS[cell.kind], edgecolor="white", linewidth=2))
        axes.text(
            column + 0.5, row + 0.5, cell_text(cell).replace(" > ", " >\n"), ha="center", va="center", fontsize=8,
            color="#4b5563" if cell.route is None else "#111827",
        )  # fmt: skip
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    places = np.arange(count) + 0.5
    axes.set_xticks(places, [f"{n}\n{s['dim']}-d, {s['items']} items" for n, s in zip(names, made.spaces, strict=True)])
    axes.set_yticks(places, names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("stored vectors of")
    axes.set_ylabel("queries of")
    metrics = {cell.measured.metric for cell in made.cells if cell.measured is not None}
    for metric in metrics:
        axes.set_title(EXPLAINED[metric] + ", with its 95 % interval", loc="left", fontsize=8, color="#4b5563")
    axes.tick_params(length=0, labelsize=8)
    for side in axes.spines.values():
        side.set_visible(False)
    used = [kind for kind in COLOURS if any(cell.kind == kind for cell in made.cells)]
    words = {
        "same": "the same space", "transform": "by a transform", "compatible": "registered as compatible",
        "several": "by several relations", "none": "- not comparable",
    }  # fmt: skip
    figure.legend(
        handles=[Patch(facecolor=COLOURS[kind], label=words[kind]) for kind in used],
        loc="outside lower center", ncols=len(used), frameon=False, fontsize=8,
    )  # fmt: skip
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "matrix", "svg.fonttype": "none"}):
        metadata = {"Date": None, "Creator": None} if kind == "svg" else None
        figure.savefig(out, format=kind, dpi=150, metadata=metadata)
    return out.getvalue()
