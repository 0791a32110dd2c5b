"""Which patches are hidden: rectangles as BEiT draws them, or single patches as mc-BEiT does.

Bao, Dong, Piao, Wei: BEiT: BERT Pre-Training of Image Transformers, ICLR 2022 (arXiv 2106.08254).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bowerbird.errors import InputError

Generator = np.random.Generator | np.random.RandomState | random.Random | torch.Generator


@dataclass(frozen=True)
class BlockwiseMaskGenerator:
    """Masks made of rectangles (BEiT, algorithm 1 and the official generator).

    Rectangles are added until ``num_masked`` patches are hidden or ten tries in a row add nothing, so a mask may hold
    fewer, never more.

    Args:
        grid: (rows, columns) of patches.
        num_masked: Largest number of hidden patches, 1 to rows x columns.
        min_block, max_block: Bounds of the area of a rectangle in patches; ``None``: up to ``num_masked``.
        min_aspect: Smallest ratio of height to width, in (0, 1]; the largest is its inverse.

    Raises:
        InputError: A value outside these ranges.
    """

    grid: tuple[int, int]
    num_masked: int
    min_block: int = 4
    max_block: int | None = None
    min_aspect: float = 0.3

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows < 1 or columns < 1:
            raise InputError(f"grid = {self.grid}: expected at least one row and one column")
        if not 1 <= self.num_masked <= rows * columns:
            raise InputError(
                f"num_masked = {self.num_masked}: a grid of {rows} x {columns} patches accepts 1 to {rows * columns}"
            )
        if self.min_block < 1 or (self.max_block is not None and self.max_block < self.min_block):
            raise InputError(
                f"min_block = {self.min_block}, max_block = {self.max_block}: expected 1 <= min_block <= max_block"
            )
        if not 0 < self.min_aspect <= 1:
            raise InputError(f"min_aspect = {self.min_aspect}: expected a ratio above 0 and at most 1")

    def __call__(self, rng: Generator) -> Tensor:
        """bool ``(rows, columns)``, true where a patch is hidden; random numbers only from ``rng``.

        Uniform numbers and whole numbers are drawn in the order of the official generator: with
        ``random.Random(seed)`` the mask is the official one.
        """
        uniform, integer = _draws(rng)
        mask = np.zeros(self.grid, bool)
        count = 0
        while count < self.num_masked:
            added = self._add_rectangle(mask, self.num_masked - count, uniform, integer)
            if not added:
                break
            count += added
        return torch.from_numpy(mask)

    def _add_rectangle(
        self,
        mask: np.ndarray,
        wanted: int,
        uniform: Callable[[float, float], float],
        integer: Callable[[int, int], int],
    ) -> int:
        """Hide a random rectangle of ``mask``; returns how many patches it newly hides, 0 after ten tries."""
        rows, columns = self.grid
        cap = min(wanted, self.max_block or self.num_masked)
        log_aspect = math.log(self.min_aspect), math.log(1 / self.min_aspect)
        for _ in range(10):
            area = uniform(self.min_block, cap)  # the bounds may be reversed near the end
            aspect = math.exp(uniform(*log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = integer(0, rows - height), integer(0, columns - width)
            part = mask[top : top + height, left : left + width]
            new = int((~part).sum())
            if 0 < new <= cap:
                part[:] = True
                return new
        return 0


def _draws(rng: Generator) -> tuple[Callable[[float, float], float], Callable[[int, int], int]]:
    """``uniform(low, high)`` and ``integer(low, high)``, both bounds included, of a generator of any of the kinds."""
    if isinstance(rng, np.random.Generator | np.random.RandomState):
        whole = rng.integers if isinstance(rng, np.random.Generator) else rng.randint  # both exclude the upper bound
        # Their own uniform need not take reversed bounds.
        return (lambda low, high: low + (high - low) * rng.random()), (lambda low, high: int(whole(low, high + 1)))
    if isinstance(rng, torch.Generator):
        return (lambda low, high: low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64).item()), (
            lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))
        )
    if not isinstance(rng, random.Random) and rng is not random:
        raise _no_generator(rng, "random.Random, numpy.random.Generator or RandomState, or torch.Generator")
    return rng.uniform, rng.randint


def _no_generator(rng: object, accepted: str) -> InputError:
    return InputError(f"rng = {rng!r}: expected a generator of random numbers, {accepted}")


@dataclass(frozen=True)
class RandomMaskGenerator:
    """Masks of ``int(mask_ratio * L)`` patches drawn uniformly (mc-BEiT's recipe).

    Raises:
        InputError: ``mask_ratio`` is outside (0, 1), or hides no patch of this grid.
    """

    grid: tuple[int, int]
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise InputError(f"mask_ratio = {self.mask_ratio}: expected a share between 0 and 1, both excluded")
        if self.num_masked < 1:
            raise InputError(f"mask_ratio = {self.mask_ratio} hides none of {self.grid[0]} x {self.grid[1]} patches")

    @property
    def num_masked(self) -> int:
        return int(self.mask_ratio * self.grid[0] * self.grid[1])

    def __call__(self, rng: np.random.Generator | np.random.RandomState | random.Random) -> Tensor:
        """bool ``(rows, columns)``, true where a patch is hidden."""
        if not isinstance(rng, np.random.Generator | np.random.RandomState | random.Random):
            raise _no_generator(rng, "numpy.random.Generator or RandomState, or random.Random")
        mask = np.arange(self.grid[0] * self.grid[1]) >= self.grid[0] * self.grid[1] - self.num_masked
        rng.shuffle(mask)  # type: ignore[arg-type]
        return torch.from_numpy(mask).reshape(self.grid)
