"""Which weights are kept or dropped together: single weights, blocks, or n of every m inputs.

A pattern is given a weight of shape ``(s_1, ..., s_d)`` (output, input, and the kernel of a convolution) and says what
the entries of its mask are. E(M) denotes a mask M that is spread over the weights of its entries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bowerbird.errors import InputError

GROUPS = re.compile(r"([1-9]\d*):([1-9]\d*)")


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``sizes``, one number per dimension; all ones: single weights."""

    sizes: tuple[int, ...]

    @property
    def single(self) -> bool:
        return math.prod(self.sizes) == 1

    @property
    def weights_per_entry(self) -> int:
        return math.prod(self.sizes)

    def mask_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``(s_1 / b_1, ..., s_d / b_d)``."""
        return tuple(s // b for s, b in zip(shape, self.sizes, strict=True))

    def times(self, weight: Tensor, mask: Tensor) -> Tensor:
        """``weight * E(mask)``."""
        if self.single:
            return weight * mask
        return (self._split(weight) * self._spread(mask)).reshape(weight.shape)

    def sums(self, weights: Tensor) -> Tensor:
        """Sum over every block, in the shape of the mask."""
        if self.single:
            return weights
        return self._split(weights).sum(dim=tuple(range(1, 2 * weights.ndim, 2)))

    def values(self, weight: Tensor) -> Tensor:
        """What an entry is worth: sum of the absolute weights of its block."""
        return self.sums(weight.abs())

    def _split(self, weight: Tensor) -> Tensor:
        """``(s_1 / b_1, b_1, s_2 / b_2, b_2, ...)``."""
        return weight.reshape([n for s, b in zip(weight.shape, self.sizes, strict=True) for n in (s // b, b)])

    def _spread(self, mask: Tensor) -> Tensor:
        return mask.reshape([n for s in mask.shape for n in (s, 1)])


@dataclass(frozen=True)
class Groups:
    """``n`` of every ``m`` consecutive inputs are kept: 2:4 is what sparse tensor cores run.

    The mask has the shape of the weight with the inputs (dimension 1) moved to the end.
    """

    n: int
    m: int

    single = False
    weights_per_entry = 1

    def mask_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0], *shape[2:], shape[1])

    def times(self, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask.movedim(-1, 1)

    def sums(self, weights: Tensor) -> Tensor:
        return weights.movedim(1, -1)

    def values(self, weight: Tensor) -> Tensor:
        return self.sums(weight.abs())

    def keep_exactly(self, margin: Tensor) -> None:
        """Make, in place, all but the n largest of every group negative, of equal ones the later; ``(groups, m)``."""
        order = margin.argsort(dim=-1, descending=True, stable=True)
        margin.scatter_(-1, order[:, self.n :], -1.0)


Pattern = Blocks | Groups


def parse_groups(text: str) -> Groups | None:
    """``"2:4"``; ``None`` for ``"blocks"``. Raises ``InputError`` for anything else."""
    if text == "blocks":
        return None
    found = GROUPS.fullmatch(text)
    if found is None or int(found[1]) >= int(found[2]):
        raise InputError(f"pattern {text!r} is not accepted; give 'blocks', or 'n:m' with n < m, such as '2:4'")
    return Groups(int(found[1]), int(found[2]))


def block_sizes(shape: Sequence[int], block_size: Sequence[int], *, name: str) -> tuple[int, ...]:
    """Block sizes of every dimension of a weight.

    Args:
        shape: Of the weight.
        block_size: Of the first dimensions, (output, input) or all four of a convolution; -1: the whole dimension.
            Dimensions that are not named, those of the kernel, get 1.
        name: Of the layer, for messages.

    Raises:
        InputError: A size that does not divide its dimension.
    """
    sizes = list(block_size)[: len(shape)] + [1] * (len(shape) - len(block_size))
    sizes = [s if b == -1 else b for s, b in zip(shape, sizes, strict=True)]
    wrong = [axis for axis, (s, b) in enumerate(zip(shape, sizes, strict=True)) if s % b]
    if wrong:
        axis = wrong[0]
        fitting = [b for b in range(1, shape[axis] + 1) if shape[axis] % b == 0]
        raise InputError(
            f"layer {name!r}: blocks of {sizes[axis]} do not divide dimension {axis} of its weight {tuple(shape)}. "
            f"That dimension accepts {', '.join(map(str, fitting))} or -1 (all of it). Choose another block_size, name "
            "other layers in `layers`, or set strict = false, which treats single weights of such layers"
        )
    return tuple(sizes)


def pattern_of(weight: Tensor, *, groups: Groups | None, block_size: Sequence[int], name: str) -> Pattern:
    """The pattern of one layer. Raises ``InputError`` where it does not fit the weight's shape."""
    if groups is None:
        return Blocks(block_sizes(weight.shape, block_size, name=name))
    if weight.shape[1] % groups.m:
        raise InputError(
            f"layer {name!r}: {groups.n}:{groups.m} needs a number of inputs that {groups.m} divides; its weight "
            f"{tuple(weight.shape)} has {weight.shape[1]}. Name other layers in `layers`, or set strict = false, which "
            "leaves such layers dense"
        )
    return groups


def block_values(weight: Tensor, block_size: Sequence[int]) -> Tensor:
    """Sum of the absolute weights of every block. Raises ``InputError`` where a size does not divide its dimension."""
    return Blocks(block_sizes(weight.shape, block_size, name="weight")).values(weight)


def mask_blocks(weight: Tensor, mask: Tensor, block_size: Sequence[int]) -> Tensor:
    """``weight`` times ``mask``, of which an entry stands for a block.

    Raises ``InputError`` where the sizes do not divide the weight, or the mask is not of the shape that follows.
    """
    blocks = Blocks(block_sizes(weight.shape, block_size, name="weight"))
    expected = blocks.mask_shape(weight.shape)
    if tuple(mask.shape) != expected:
        raise InputError(f"a mask of shape {tuple(mask.shape)} was given; the weight has blocks {expected}")
    return blocks.times(weight, mask)


__all__ = ["Blocks", "Groups", "Pattern", "block_sizes", "block_values", "mask_blocks", "parse_groups", "pattern_of"]
