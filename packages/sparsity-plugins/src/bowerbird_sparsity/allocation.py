"""How a budget is spread over layers: one problem over all of them, or one per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bowerbird.errors import InputError


def erk_densities(shapes: Sequence[Sequence[int]], density: float, sizes: Sequence[float] | None = None) -> list[float]:
    """Densities by Erdos-Renyi-kernel: layers with few weights per unit keep a larger share.

    Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery, ICML 2020 (arXiv 1911.11134).
    The density of a layer is ``sum(shape) / prod(shape)`` times a number common to all layers, at most 1; what a full
    layer cannot take goes to the others.

    Args:
        shapes: Of the weights.
        density: Share to keep of everything, in [0, 1].
        sizes: What a whole layer counts for; default: its number of weights.

    Returns:
        A density in [0, 1] per layer, with ``sum(density * size) = density * sum(size)``; it does not depend on the
        order of the layers.

    Raises:
        InputError: A density outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise InputError(f"density = {density}; a share in [0, 1] is accepted")
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    sizes = [float(math.prod(shape)) for shape in shapes] if sizes is None else sizes
    budget = density * math.fsum(sizes)
    full: set[int] = set()
    while len(full) < len(raw):
        rest = [i for i in range(len(raw)) if i not in full]
        scale = (budget - math.fsum(sizes[i] for i in full)) / math.fsum(raw[i] * sizes[i] for i in rest)
        over = {i for i in rest if scale * raw[i] > 1}
        if not over:
            return [1.0 if i in full else max(0.0, scale * raw[i]) for i in range(len(raw))]
        full |= over
    return [1.0] * len(raw)
