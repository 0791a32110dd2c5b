"""Bootstrap intervals over queries, and paired comparison of two systems on the same queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bowerbird.errors import InputError
from bowerbird.retrieval.metrics import PerQuery

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """``mean`` of the values and the interval ``low``..``high`` that the bootstrap gives at ``level``."""

    mean: float
    low: float
    high: float
    level: float


def bootstrap_interval(
    values: PerQuery | ArrayLike, *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean over queries.

    Args:
        values: ``(Q,)``; queries that are not valid (or NaN) are left out.
        level: Coverage, in (0, 1).
        samples: Number of resamples.
        seed: Same seed, same interval.

    Raises:
        InputError: No value left, or an argument out of range.
    """
    array = _valid_values(values)
    if not 0 < level < 1 or samples < 1:
        raise InputError(f"level must be in (0, 1) and samples at least 1; got {level} and {samples}.")
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    block = max(1, 2**21 // len(array))
    for start in range(0, samples, block):
        stop = min(samples, start + block)
        means[start:stop] = array[rng.integers(len(array), size=(stop - start, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high), level)


def paired_difference(
    first: PerQuery | ArrayLike,
    second: PerQuery | ArrayLike,
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of ``second - first`` over the queries valid in both. Pairing removes what queries share.

    Raises:
        InputError: The two have different numbers of queries.
    """
    a, b = _all_values(first), _all_values(second)
    if a.shape != b.shape:
        raise InputError(f"the two systems must have the same queries; got {a.shape} and {b.shape}.")
    return bootstrap_interval(b - a, level=level, samples=samples, seed=seed)


def _all_values(values: PerQuery | ArrayLike) -> NDArray[np.float64]:
    if isinstance(values, PerQuery):
        array = np.array(values.values, np.float64)
        array[~values.valid] = np.nan
    else:
        array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise InputError(f"values must have shape (Q,), one per query; got {array.shape}. Choose one k.")
    return array


def _valid_values(values: PerQuery | ArrayLike) -> NDArray[np.float64]:
    array = _all_values(values)
    array = array[~np.isnan(array)]
    if not len(array):
        raise InputError("there is no valid query to take an interval over.")
    return array
