"""Maps between two embedding spaces from paired vectors: orthogonal, ridge, reduced rank, and a residual network.

The linear ones are solved in closed form from second moments, which are summed in one pass over the pairs, in parts:
the part that is left out in turn chooses the ridge and the rank (cross-validation without a second pass).

Sources: Schoenemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966; Mukherjee and
Zhu, Reduced rank ridge regression and its kernel extensions, 2011 (arXiv 1103.0022); the residual network as in
Drift-Adapter (arXiv 2509.23471).

N pairs, Di and Do widths of the source x and of the target y; a linear map is ``x -> W x + b`` with W ``(Do, Di)``.
No torch but in ``residual_mlp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bowerbird.gallery.transform import Step

Matrix = NDArray[np.float64]
BLOCK = 16_384  # pairs in hand at once
FOLDS = 5
RIDGES = tuple(10.0**power for power in range(-7, 3))  # in units of the mean variance of an entry of x


@dataclass(frozen=True)
class Moments:
    """Sums over pairs of unit vectors: their number, of x, of y, of ``x x^T``, of ``y x^T``, and of ``y . y``."""

    count: float
    x: Matrix
    y: Matrix
    xx: Matrix
    yx: Matrix
    yy: float
    width: int = 0  # of the source before it was reduced (``row_space``); 0: it was not

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.x + other.x, self.y + other.y, self.xx + other.xx, self.yx + other.yx,
            self.yy + other.yy, self.width,
        )  # fmt: skip

    def __sub__(self, other: Moments) -> Moments:
        return Moments(
            self.count - other.count, self.x - other.x, self.y - other.y, self.xx - other.xx, self.yx - other.yx,
            self.yy - other.yy, self.width,
        )  # fmt: skip


@dataclass(frozen=True)
class LinearMap:
    """``x -> weight x + bias``, and what it was made with. ``bias`` is ``None`` for an orthogonal map."""

    weight: Matrix
    bias: Matrix | None
    settings: dict[str, float | int]

    def steps(self) -> tuple[Step, ...]:
        from bowerbird.gallery.transform import Step

        bias = None if self.bias is None else self.bias.astype(np.float32)
        return (Step("linear", self.weight.astype(np.float32), bias),)


def moments(source: NDArray, target: NDArray, rows: NDArray[np.int64]) -> list[Moments]:
    """The moments of ``FOLDS`` parts of the pairs at ``rows``; every pair counts with length 1 on both sides."""
    made = []
    for part in np.array_split(rows, FOLDS):
        part = np.sort(part)  # memory is read forwards; the sum does not depend on it
        di, do = source.shape[1], target.shape[1]
        total = Moments(0.0, np.zeros(di), np.zeros(do), np.zeros((di, di)), np.zeros((do, di)), 0.0)
        for start in range(0, len(part), BLOCK):
            x, y = unit(source[part[start : start + BLOCK]]), unit(target[part[start : start + BLOCK]])
            total += Moments(
                float(len(x)), x.sum(0, np.float64), y.sum(0, np.float64), (x.T @ x).astype(np.float64),
                (y.T @ x).astype(np.float64), float(len(x)),
            )  # fmt: skip
        made.append(total)
    return made


def row_space(vectors: NDArray, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """Orthonormal columns ``(D, R)`` that span the vectors at ``rows``, where those are fewer than D; else ``None``.

    Ridge regression on fewer pairs than dimensions has its answer in there, and R x R matrices cost a fraction.
    """
    if len(rows) >= vectors.shape[1]:
        return None
    return np.linalg.qr(unit(vectors[rows]).T.astype(np.float64))[0].astype(np.float32)


class Reduced:
    """Pairs in the spaces that those at ``rows`` span, and the way back of a map that was fitted there."""

    def __init__(self, source: NDArray, target: NDArray, rows: NDArray[np.int64]) -> None:
        self.width = source.shape[1]
        self.from_x, self.from_y = row_space(source, rows), row_space(target, rows)
        self.x = source if self.from_x is None else unit(source) @ self.from_x
        self.y = target if self.from_y is None else unit(target) @ self.from_y

    def moments(self, rows: NDArray[np.int64]) -> list[Moments]:
        """Of pairs that are among those of the spaces."""
        return [replace(part, width=self.width) for part in moments(self.x, self.y, rows)]

    def lift(self, made: LinearMap) -> LinearMap:
        weight, bias = made.weight, made.bias
        if self.from_x is not None:
            weight = weight @ self.from_x.T
        if self.from_y is not None:
            weight, bias = self.from_y @ weight, None if bias is None else self.from_y @ bias
        return LinearMap(weight, bias, made.settings)


def unit(rows: NDArray) -> NDArray[np.float32]:
    rows = np.asarray(rows, np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32, copy=False)


def procrustes(parts: Sequence[Moments]) -> LinearMap:
    """The orthogonal W that maximises the mean of ``y . W x`` (Schoenemann 1966).

    With widths that differ W is semi-orthogonal: ``W^T W = I`` towards more dimensions (lengths and angles are kept),
    ``W W^T = I`` towards fewer.
    """
    u, _, vt = np.linalg.svd(_sum(parts).yx, full_matrices=False)
    return LinearMap(u @ vt, None, {})


def ridge(parts: Sequence[Moments], strength: float | None = None) -> LinearMap:
    """The affine map with the least squared error and ``strength * mean variance * |W|^2``.

    ``strength=None``: the one of ``RIDGES`` with the least error on parts that were left out.
    """
    if strength is None:
        errors = np.zeros(len(RIDGES))
        for part in parts:
            solver = _Ridge(_sum(parts) - part)
            errors += [_error(*solver.solve(value), part) for value in RIDGES]
        strength = RIDGES[int(errors.argmin())]
    return LinearMap(*_Ridge(_sum(parts)).solve(strength), {"ridge": strength})


def low_rank(parts: Sequence[Moments], strength: float | None = None, rank: int | None = None) -> LinearMap:
    """Ridge regression through ``rank`` directions of the target (Mukherjee and Zhu 2011).

    ``rank=None``: the one of some (powers of two and their middles) with the least error on parts that were left out.
    """
    if strength is None:
        strength = float(ridge(parts).settings["ridge"])
    total = _sum(parts)
    most = min(total.yx.shape)
    if rank is None:
        ranks = sorted({min(most, round(2 ** (power / 2))) for power in range(2, 2 * most.bit_length() + 1)})
        errors = np.zeros(len(ranks))
        for part in parts:
            solver = _Ridge(total - part)
            weight, _ = solver.solve(strength)
            directions = solver.directions(weight)
            for i, value in enumerate(ranks):
                errors[i] += _error(*solver.through(weight, directions[:, :value]), part)
        rank = ranks[int(errors.argmin())]
    solver = _Ridge(total)
    weight, _ = solver.solve(strength)
    rank = min(rank, most)
    return LinearMap(*solver.through(weight, solver.directions(weight)[:, :rank]), {"ridge": strength, "rank": rank})


class _Ridge:
    """One eigendecomposition serves every strength."""

    def __init__(self, total: Moments) -> None:
        n = total.count
        self.mean_x, self.mean_y = total.x / n, total.y / n
        covariance = total.xx / n - np.outer(self.mean_x, self.mean_x)
        self.cross = total.yx / n - np.outer(self.mean_y, self.mean_x)
        values, self.basis = np.linalg.eigh(covariance)
        self.values = np.maximum(values, 0)
        self.unit = max(float(self.values.sum()) / (total.width or len(self.values)), 1e-12)

    def solve(self, strength: float) -> tuple[Matrix, Matrix]:
        weight = (self.cross @ self.basis / (self.values + strength * self.unit)) @ self.basis.T
        return weight, self.mean_y - weight @ self.mean_x

    def directions(self, weight: Matrix) -> Matrix:
        """``(Do, Do)`` orthonormal columns, the most important first: of the fitted values, ridge included."""
        fitted = weight @ self.cross.T
        _, vectors = np.linalg.eigh((fitted + fitted.T) / 2)
        return vectors[:, ::-1]

    def through(self, weight: Matrix, directions: Matrix) -> tuple[Matrix, Matrix]:
        weight = directions @ (directions.T @ weight)
        return weight, self.mean_y - weight @ self.mean_x


def _error(weight: Matrix, bias: Matrix, part: Moments) -> float:
    """Sum of squared errors over a part, from its moments."""
    squares = float(np.sum((weight @ part.xx) * weight)) + 2 * float(bias @ (weight @ part.x))
    return squares + part.count * float(bias @ bias) - 2 * float(np.sum(weight * part.yx)) - 2 * float(
        bias @ part.y
    ) + part.yy  # fmt: skip


def _sum(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def residual_mlp(
    source: NDArray,
    target: NDArray,
    rows: NDArray[np.int64],
    held_out: NDArray[np.int64],
    start: LinearMap,
    *,
    hidden: int | None = None,
    steps: int = 1000,
    batch_size: int = 1024,
    lr: float = 1e-3,
    patience: int = 4,
    seed: int = 0,
) -> tuple[tuple[Step, ...], dict[str, float | int]]:
    """``start`` plus ``W2 relu(W1 x)``, the cosine raised with Adam until pairs that it does not train on stop gaining.

    The branch begins at zero, so the network is never worse on ``held_out`` than ``start``.

    Args:
        source, target: ``(N, Di)`` and ``(N, Do)``.
        rows, held_out: Pairs to train on, and pairs to stop by.
        start: A linear map.
        hidden: Width of the branch; default: the larger of the two.
        steps: Of Adam at most; the learning rate falls to 0 by a cosine.
        batch_size, lr: Of Adam.
        patience: Stops after that many looks (one every 50 steps) without a gain of 1e-4.
        seed: Of first weights and draws.

    Returns:
        The steps of a ``VectorTransform``, and the settings.
    """
    import math

    import torch
    import torch.nn.functional as F

    from bowerbird_compat.online_backfilling import ReverseQueryTransform
    from bowerbird_compat.vector_transforms import transform_steps

    hidden = max(source.shape[1], target.shape[1]) if hidden is None else hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ReverseQueryTransform(source.shape[1], target.shape[1], hidden)
    with torch.no_grad():
        net.linear.weight.copy_(torch.from_numpy(start.weight))
        net.linear.bias.copy_(torch.zeros(1) if start.bias is None else torch.from_numpy(start.bias))

    def pairs(chosen: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(unit(source[chosen])), torch.from_numpy(unit(target[chosen]))

    x_out, y_out = pairs(held_out)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=lr)
    best, best_state, since, taken = -math.inf, {}, 0, 0
    for step in range(steps + 1):
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                value = float(F.cosine_similarity(net(x_out), y_out).mean())
            since = 0 if value > best + 1e-4 else since + 1
            if value > best:
                best, taken = value, step
                best_state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            if since > patience or step == steps:
                break
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        x, y = pairs(rows[rng.integers(len(rows), size=min(batch_size, len(rows)))])
        with torch.enable_grad():
            loss = (1 - F.cosine_similarity(net(x), y)).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    net.load_state_dict(best_state)
    return transform_steps(net), {"hidden": hidden, "steps": taken}
