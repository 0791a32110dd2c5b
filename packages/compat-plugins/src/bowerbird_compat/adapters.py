"""Adapters: a small map between two embedding spaces, fitted on items that both encoders have seen.

For encoders that nobody can train again. The map is fitted in seconds on stored vectors, and the result says what it is
worth: everything it reports is measured on pairs that it was not fitted on. See docs/methods/adapters.md; the maps are
in ``adapter_maps``, the measurements in ``adapter_verdict``.

N pairs, Di and Do widths of the source and of the target. No torch, but for ``kind="mlp"`` and ``"auto"``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bowerbird.errors import DataError, InputError, SpaceError, did_you_mean
from bowerbird.gallery.space import Space
from bowerbird.gallery.transform import Step, VectorTransform, check_direction
from bowerbird_compat import adapter_maps
from bowerbird_compat.adapter_verdict import MIN_HELD_OUT, Direction, Verdict, judge_transform

__all__ = ["Direction", "Kind", "Verdict", "check_direction", "fit_adapter", "judge_transform", "split_pairs"]

Kind = Literal["auto", "procrustes", "low-rank", "ridge", "mlp"]
KINDS: tuple[Kind, ...] = (
    "procrustes",
    "low-rank",
    "ridge",
    "mlp",
)  # the simpler first: it wins where the better one is not clearly so

MIN_PAIRS = 50
MIN_FITTED = 30  # of them to fit on
MAX_JUDGED = 10_000  # held-out pairs beyond that tell nothing more
MAX_CHOSEN = 5_000


def fit_adapter(
    source: ArrayLike,
    target: ArrayLike,
    *,
    kind: Kind = "auto",
    source_space: Space | str,
    target_space: Space | str,
    direction: Direction = "query",
    labels: Sequence[Any] | NDArray[Any] | None = None,
    held_out: float = 0.25,
    ridge: float | None = None,
    rank: int | None = None,
    hidden: int | None = None,
    steps: int = 1000,
    k: int = 10,
    seed: int = 0,
) -> VectorTransform:
    """Fit a map from the source space to the target space, and measure it on held-out pairs.

    Args:
        source: ``(N, Di)`` vectors, in any scale; at least 50 pairs. Of equal vectors only the first counts: a copy
            that is held out would be measured on what the map was fitted on.
        target: ``(N, Do)``; row i is the same item as row i of ``source``.
        kind: ``procrustes`` (orthogonal: keeps angles), ``ridge`` (affine), ``low-rank`` (affine through few
            directions), ``mlp`` (``ridge`` plus a small network). ``auto``: the one that retrieves best on a part of
            the pairs that none was fitted on; the simplest of those within one standard error. ``mlp`` is tried
            with ``pairs_wanted`` pairs or more.
        source_space, target_space: The two spaces, or their fingerprints: the direction of the result. With spaces
            widths are checked.
        direction: What the map is for: ``query`` (source = new space, target = old) or ``gallery`` (source = old,
            target = new). The map is the same; what is measured differs, see ``judge_transform``.
        labels: N labels of any kind, ``None`` for an item without one; they only measure.
        held_out: Share of the pairs that is only measured on, in (0, 1); at most 10,000 pairs are held out.
        ridge: Strength of ``ridge`` and ``low-rank``, above 0, in units of the mean variance of an entry of the
            source; default: chosen by cross-validation.
        rank: Of ``low-rank``; default: chosen by cross-validation.
        hidden, steps: Of ``mlp``: its width (default: the larger of the two) and steps at most.
        k: Length of the lists that are compared.
        seed: Of every draw: equal inputs and settings give an equal result, bit for bit, on one machine.

    Returns:
        A ``VectorTransform`` with ``method="compat:adapter"``. Its ``evidence`` holds ``kind``, the settings found, how
        many pairs it was fitted on, with ``auto`` the score of each kind, and ``Verdict.evidence()``.

    Raises:
        InputError: (a ``ValueError``) Rows that do not pair, too few of them (it says how many are needed), or a
            setting out of range.
        DataError: Vectors that are zero or not finite; the row is named.
        SpaceError: Vectors of another width than their space.
    """
    x, y = _checked(source, "source", source_space), _checked(target, "target", target_space)
    _check_settings(kind, held_out, ridge, rank, hidden, steps)
    if len(x) != len(y):
        raise InputError(f"{len(x)} source and {len(y)} target vectors do not pair: one of each item is needed.")
    if labels is not None and len(labels) != len(x):
        raise InputError(f"{len(labels)} labels for {len(x)} pairs.")
    wanted = pairs_wanted(x.shape[1], y.shape[1])
    judged, rest = split_pairs(x, y, held_out=held_out, seed=seed)
    chosen, fitted = np.split(rest, [min(max(len(rest) // 5, MIN_HELD_OUT), MAX_CHOSEN)])
    start, end = _fingerprint(source_space), _fingerprint(target_space)

    def made_of(steps: tuple[Step, ...]) -> VectorTransform:
        return VectorTransform(start, end, x.shape[1], y.shape[1], steps, method="compat:adapter")

    def judge(made: VectorTransform, rows: NDArray[np.int64]) -> Verdict:
        of_rows = None if labels is None else [labels[i] for i in rows]
        return judge_transform(made, x[rows], y[rows], direction=direction, labels=of_rows, k=k, seed=seed)

    maps = _Maps(x, y, fitted, chosen, ridge, rank, hidden, steps, seed)
    evidence: dict[str, Any] = {}
    if kind == "auto":
        # A network with more weights than there are numbers to fit takes minutes and is never chosen.
        tried = [name for name in KINDS if name != "mlp" or len(fitted) >= wanted]
        scores = {name: judge(made_of(maps.make(name)[0]), chosen) for name in tried}
        means = {name: verdict.kept[0] for name, verdict in scores.items()}
        best = max(means, key=lambda name: means[name])
        slack = (scores[best].kept[2] - scores[best].kept[1]) / 2 / 1.96  # an interval is 1.96 standard errors each way
        kind = next(name for name in tried if means[name] >= means[best] - slack)
        evidence["tried"] = {name: round(value, 4) for name, value in means.items()}
    steps_made, settings = maps.make(kind, everything=True)
    transform = made_of(steps_made)
    verdict = judge(transform, judged)
    evidence |= {"kind": kind, "settings": settings, "fitted_on": len(rest), "seed": seed, **verdict.evidence()}
    if len(rest) < wanted:
        evidence["sentence"] += (
            f" It was fitted on {len(rest)} pairs; for {x.shape[1]} to {y.shape[1]} dimensions {wanted} or more are "
            "better."
        )
    return replace(transform, evidence=evidence)


def split_pairs(
    source: NDArray, target: NDArray, *, held_out: float = 0.25, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the pairs to judge by, and of those to fit on, drawn with ``seed``; copies are in neither.

    Args:
        source: ``(N, Di)``; a row that is equal to an earlier one is a copy.
        target: ``(N, Do)``.
        held_out: Share to judge by, in (0, 1); at most 10,000 pairs.

    Raises:
        InputError: (a ``ValueError``) Too few different pairs; it says how many are needed.
    """
    different = _first_of_equals(source)
    least = max(MIN_PAIRS, math.ceil(MIN_HELD_OUT / held_out), math.ceil(MIN_FITTED / (1 - held_out)))
    if len(different) < least:
        copies = f" ({len(different)} different ones)" if len(different) < len(source) else ""
        raise InputError(
            f"{len(source)} pairs are too few{copies} to fit a map and to judge it; at least {least} are needed, and "
            f"{max(least, pairs_wanted(source.shape[1], target.shape[1]))} or more for these widths."
        )
    order = different[np.random.default_rng(seed).permutation(len(different))]
    judged, rest = np.split(order, [min(round(held_out * len(order)), MAX_JUDGED)])
    return judged, rest


def _first_of_equals(rows: NDArray) -> NDArray[np.int64]:
    """Positions of the rows that are equal to no earlier one, in order."""
    digests = np.fromiter((hash(row.tobytes()) for row in rows), np.int64, len(rows))
    return np.sort(np.unique(digests, return_index=True)[1])


def pairs_wanted(dim_in: int, dim_out: int) -> int:
    """Pairs that a linear map between these widths should be fitted on: four per dimension of the larger."""
    return 4 * max(dim_in, dim_out)


class _Maps:
    """The maps of one set of pairs. ``everything``: fitted on the pairs that chose between kinds, too."""

    def __init__(
        self, x: NDArray, y: NDArray, fitted: NDArray[np.int64], chosen: NDArray[np.int64], ridge: float | None,
        rank: int | None, hidden: int | None, steps: int, seed: int,
    ) -> None:  # fmt: skip
        self.x, self.y, self.fitted, self.chosen = x, y, fitted, chosen
        self.ridge, self.rank, self.hidden, self.steps, self.seed = ridge, rank, hidden, steps, seed
        self.space = adapter_maps.Reduced(x, y, np.concatenate([fitted, chosen]))
        self.parts, self.more = self.space.moments(fitted), self.space.moments(chosen)
        self._mlp: tuple[tuple[Step, ...], dict[str, Any]] | None = None

    def make(self, kind: str, *, everything: bool = False) -> tuple[tuple[Step, ...], dict[str, Any]]:
        parts = [a + b for a, b in zip(self.parts, self.more, strict=True)] if everything else self.parts
        if kind == "procrustes":  # turns the whole space, so that there is nothing to reduce
            rows = np.concatenate([self.fitted, self.chosen]) if everything else self.fitted
            if self.space.x is not self.x or self.space.y is not self.y:
                parts = adapter_maps.moments(self.x, self.y, rows)
            linear = adapter_maps.procrustes(parts)
        elif kind == "low-rank":
            linear = self.space.lift(adapter_maps.low_rank(parts, self.ridge, self.rank))
        else:
            linear = self.space.lift(adapter_maps.ridge(parts if kind == "ridge" else self.parts, self.ridge))
        if kind != "mlp":
            return linear.steps(), dict(linear.settings)
        if self._mlp is None:  # it needs the other pairs to stop by, so there is only one
            made, settings = adapter_maps.residual_mlp(
                self.x, self.y, self.fitted, self.chosen, linear, hidden=self.hidden, steps=self.steps, seed=self.seed
            )
            self._mlp = made, {**linear.settings, **settings}
        return self._mlp


def _checked(vectors: ArrayLike, name: str, space: Space | str) -> NDArray:
    rows = np.asarray(vectors)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu" or not rows.size:
        raise InputError(f"{name} vectors have shape {rows.shape} of {rows.dtype}; numbers of shape (N, D) are needed.")
    if isinstance(space, Space) and space.dim != rows.shape[1]:
        raise SpaceError(
            f"the {name} vectors have width {rows.shape[1]}, and the {name} space {space} has {space.dim}; are source "
            "and target swapped?"
        )
    for start in range(0, len(rows), adapter_maps.BLOCK):
        block = np.asarray(rows[start : start + adapter_maps.BLOCK], np.float32)
        broken = ~np.isfinite(block).all(axis=1) | ~block.any(axis=1)
        if broken.any():
            raise DataError(f"{name} vectors: row {start + int(broken.argmax())} is zero or not finite.")
    return rows


def _check_settings(
    kind: str, held_out: float, ridge: float | None, rank: int | None, hidden: int | None, steps: int
) -> None:
    if kind not in get_args(Kind):
        raise InputError(
            f"kind is {kind!r}; accepted: {', '.join(get_args(Kind))}.{did_you_mean(str(kind), get_args(Kind))}"
        )
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out}; a share of the pairs between 0 and 1 is needed.")
    if ridge is not None and not 0 < ridge < float("inf"):
        raise InputError(f"ridge is {ridge}; it must be a finite number above 0.")
    for name, value, least in (("rank", rank, 1), ("hidden", hidden, 1), ("steps", steps, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}.")


def _fingerprint(space: Space | str) -> str:
    return space.fingerprint if isinstance(space, Space) else space
