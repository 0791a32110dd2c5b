"""Entropic optimal transport between small sets.

Cuturi: Sinkhorn Distances: Lightspeed Computation of Optimal Transport, NeurIPS 2013.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird_mim.precision import at_least_float32

_TINY_MASS = 1e-8  # added to masses before their logarithm (OTA, official code)


def sinkhorn(cost: Tensor, row_mass: Tensor, col_mass: Tensor, epsilon: float = 0.1, iterations: int = 50) -> Tensor:
    """Plan of entropic optimal transport ``(..., M, N)``: rows are scaled first, columns last.

    In the log domain, so that float32 and small ``epsilon`` do. After the last update columns sum to ``col_mass`` (plus
    1e-8); rows approach ``row_mass`` with the iterations where both sides have equal totals.

    Args:
        cost: ``(..., M, N)``.
        row_mass, col_mass: ``(..., M)`` and ``(..., N)``, not negative. Zero counts as 1e-8.
        epsilon: Weight of the entropy, in units of the cost.
        iterations: Updates of both sides.

    Raises:
        InputError: Shapes that do not fit, a mass that is negative or not finite, ``epsilon`` not above 0 or no
            iteration.
    """
    check_entropy(epsilon, iterations)
    fits = cost.ndim >= 2 and row_mass.ndim and col_mass.ndim
    if (
        not fits
        or (row_mass.shape[-1], col_mass.shape[-1]) != cost.shape[-2:]
        or not broadcastable(cost.shape[:-2], row_mass.shape[:-1], col_mass.shape[:-1])
    ):
        raise InputError(
            f"cost {tuple(cost.shape)}, row_mass {tuple(row_mass.shape)} and col_mass {tuple(col_mass.shape)} do not "
            "fit: expected (..., M, N), (..., M) and (..., N)"
        )
    if not torch.compiler.is_compiling():
        for name, mass in (("row_mass", row_mass), ("col_mass", col_mass)):
            if not (accepted := (mass >= 0) & mass.isfinite()).all():
                raise InputError(f"{name} has the value {mass[~accepted][0].item()}: masses must be finite, 0 or more")
    scores = at_least_float32(cost) / -epsilon
    rows, columns = ((at_least_float32(mass) + _TINY_MASS).log() for mass in (row_mass, col_mass))
    v = torch.zeros_like(columns)
    for _ in range(iterations):
        u = rows - torch.logsumexp(scores + v[..., None, :], dim=-1)
        v = columns - torch.logsumexp(scores + u[..., :, None], dim=-2)
    return (scores + u[..., :, None] + v[..., None, :]).exp()


def check_entropy(epsilon: float, iterations: int) -> None:
    """Raise ``InputError`` unless ``sinkhorn`` can run with these."""
    if not epsilon > 0 or iterations < 1:
        raise InputError(f"epsilon = {epsilon}, iterations = {iterations}: expected epsilon > 0 and iterations >= 1")


def broadcastable(*shapes: Sequence[int]) -> bool:
    """Whether tensors of these shapes can be combined."""
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True
