"""Values that move during training: of a teacher's momentum, of a temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import InputError

# A constant; a table, whose last value holds after its end; or a function of the step.
Schedule = float | Sequence[float] | NDArray[np.float64] | Callable[[int], float]


def as_schedule(schedule: Schedule) -> Callable[[int], float]:
    """``schedule`` as a function of the step (counted from 0). Raises ``InputError`` for an empty table."""
    if callable(schedule):
        return schedule
    table = np.atleast_1d(np.asarray(schedule, np.float64))
    if table.ndim != 1 or not len(table):
        raise InputError(f"a schedule of shape {table.shape}: expected a number, a function, or one value per step")
    return lambda step: float(table[min(step, len(table) - 1)])


def cosine_schedule(
    base: float, final: float, steps: int, warmup_steps: int = 0, start: float = 0.0
) -> NDArray[np.float64]:
    """``(steps,)`` values: a linear warm-up from ``start`` to ``base``, then half a cosine towards ``final``.

    As in DINO the warm-up includes both its ends, and the cosine ends one step before it would reach ``final``.

    Raises:
        InputError: ``steps`` < 1, or ``warmup_steps`` outside 0..steps.
    """
    if steps < 1 or not 0 <= warmup_steps <= steps:
        raise InputError(
            f"steps = {steps}, warmup_steps = {warmup_steps}: expected at least one step, and a warm-up of 0 to steps"
        )
    rest = steps - warmup_steps
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(rest) / max(1, rest)))
    return np.concatenate([np.linspace(start, base, warmup_steps), cosine])


def linear_then_constant(first: float, last: float, warmup_steps: int) -> NDArray[np.float64]:
    """A table that goes from ``first`` to ``last`` over ``warmup_steps`` (both included) and stays there."""
    return np.append(np.linspace(first, last, warmup_steps), last)
