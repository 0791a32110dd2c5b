"""Which patches of a clip are hidden: rectangles through all frames, single places through all frames, or anything.

The rectangles are drawn in the way of BEiT (Bao et al., ICLR 2022, arXiv 2106.08254). B batch, T frames, N patches.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bowerbird.errors import InputError

MaskMode = Literal["tube_block", "random_tube", "random"]
Generator = np.random.Generator | torch.Generator
_ASPECT = 0.3  # smallest ratio of height to width of a rectangle; the largest is its inverse
_SMALLEST = 4  # patches of a rectangle, where so many are still to be hidden


def tube_block_mask(
    batch: int, grid: tuple[int, int], frames: int, ratio: float, generator: Generator | None = None
) -> Tensor:
    """Rectangles of patches, the same in all frames of a clip.

    Rectangles are added until at least ``round(ratio * rows * columns)`` places are hidden. Their area is uniform
    between 4 (or fewer, if fewer are to be hidden) and what is still to be hidden, the ratio of their sides
    log-uniform between 0.3 and its inverse.

    Args:
        batch: B.
        grid: (rows, columns) of patches of a frame.
        frames: T.
        ratio: Share of the patches, 0 to below 1.
        generator: Where random numbers come from; by default torch's own.

    Returns:
        bool ``(B, T, rows * columns)``, true where a patch is hidden.

    Raises:
        InputError: Values outside these ranges.
    """
    return _masks(batch, grid, frames, ratio, generator, mode="tube_block")


def random_tube_mask(
    batch: int, grid: tuple[int, int], frames: int, ratio: float, generator: Generator | None = None
) -> Tensor:
    """``round(ratio * rows * columns)`` places drawn uniformly, the same in all frames. See ``tube_block_mask``."""
    return _masks(batch, grid, frames, ratio, generator, mode="random_tube")


def random_mask(
    batch: int, grid: tuple[int, int], frames: int, ratio: float, generator: Generator | None = None
) -> Tensor:
    """``round(ratio * rows * columns)`` places drawn uniformly for every frame. See ``tube_block_mask``."""
    return _masks(batch, grid, frames, ratio, generator, mode="random")


MASKS = {"tube_block": tube_block_mask, "random_tube": random_tube_mask, "random": random_mask}


def _masks(
    batch: int, grid: tuple[int, int], frames: int, ratio: float, generator: Generator | None, *, mode: MaskMode
) -> Tensor:
    rows, columns = grid
    if batch < 1 or frames < 1 or rows < 1 or columns < 1:
        raise InputError(f"batch = {batch}, grid = {tuple(grid)}, frames = {frames}: expected 1 or more of each")
    if not 0 <= ratio < 1:
        raise InputError(f"ratio = {ratio}: expected a share of the patches, 0 to below 1")
    rng = _numpy_generator(generator)
    count = round(ratio * rows * columns)
    masks = np.empty((batch, frames, rows * columns), bool)
    for clip in masks:
        if mode == "tube_block":
            clip[:] = _blocks((rows, columns), count, rng).reshape(-1)
        elif mode == "random_tube":
            clip[:] = _places(rows * columns, count, rng)
        else:
            for frame in clip:
                frame[:] = _places(rows * columns, count, rng)
    return torch.from_numpy(masks)


def _numpy_generator(generator: Generator | None) -> np.random.Generator:
    """``generator`` itself, or one that is seeded by it."""
    if isinstance(generator, np.random.Generator):
        return generator
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator = {generator!r}: expected a torch.Generator or a numpy.random.Generator")
    seed = torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device)
    return np.random.default_rng(int(seed))


def _places(patches: int, count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    mask = np.zeros(patches, bool)
    mask[rng.permutation(patches)[:count]] = True
    return mask


def _blocks(grid: tuple[int, int], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    mask = np.zeros(grid, bool)
    rows, columns = grid
    while (hidden := int(mask.sum())) < count:
        wanted = count - hidden
        area = rng.uniform(min(_SMALLEST, wanted), wanted)
        aspect = math.exp(rng.uniform(math.log(_ASPECT), -math.log(_ASPECT)))
        height = min(max(round(math.sqrt(area * aspect)), 1), rows)
        width = min(max(round(math.sqrt(area / aspect)), 1), columns)
        top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
        mask[top : top + height, left : left + width] = True
    return mask
