"""Token rolling: time mixes because some tokens of a frame change places with those of its neighbours in time.

Wang et al.: All in One: Exploring Unified Video-Language Pre-training, CVPR 2023 (arXiv 2203.07303). No parameter, and
no arithmetic: tokens are copied to other places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bowerbird.errors import InputError


def temporal_token_roll(tokens: Tensor, divisor: int = 8, *, first: int = 0) -> Tensor:
    """The tokens of T frames after a cyclic shift of two groups of them along time.

    With l tokens per frame and f = floor(l / divisor): token 0 (the class token) stays, tokens 1 to f come from the
    frame before, the last f tokens from the frame after, the others stay. Where f is 0 nothing moves. A permutation of
    the tokens of all frames: T of them are the identity. (With a divisor of 2 and an even l the groups would overlap in
    one token, which then belongs to the first.)

    Args:
        tokens: ``(B, T, first + l, D)``; the frames of a clip in order.
        divisor: 2 or more; about 2/divisor of the tokens move.
        first: The first token that counts. Tokens before it (the words that share a sequence with every frame) stay.

    Returns:
        A new tensor of the same shape.

    Raises:
        InputError: Another rank, a divisor below 2, or ``first`` beyond the tokens.
    """
    if tokens.ndim != 4:
        raise InputError(f"tokens have shape {tuple(tokens.shape)}; expected (B, T, L, D)")
    frames = tokens.shape[1]
    return roll_in_place(tokens.flatten(0, 1).clone(), frames, divisor, first=first).unflatten(0, (-1, frames))


def roll_in_place(tokens: Tensor, frames: int, divisor: int = 8, *, first: int = 0) -> Tensor:
    """``temporal_token_roll`` in the memory of ``tokens (B T, first + l, D)``, frame index fastest; returns them.

    For tokens that nothing else needs, such as what a block gives: only those that move are copied. Autograd knows of
    it and raises where something else needs them. No view, where gradients are wanted.

    Raises ``InputError`` for a divisor below 2, or ``first`` beyond the tokens.
    """
    if divisor < 2:
        raise InputError(f"divisor = {divisor}: expected 2 or more")
    end = tokens.shape[1]
    if not 0 <= first <= end:
        raise InputError(f"first = {first}: expected 0 to {end}, the number of tokens of a frame")
    moved = (end - first) // divisor
    if moved == 0 or frames == 1:
        return tokens
    later = (first + 1, first + 1 + moved)
    earlier = (max(end - moved, later[1]), end)
    rolled: Tensor = _Roll.apply(tokens, frames, later, earlier)
    return rolled


class _Roll(torch.autograd.Function):
    """Frame t takes the tokens ``later`` of frame t - 1 and the tokens ``earlier`` of frame t + 1, in place."""

    @staticmethod
    def forward(context: Any, tokens: Tensor, frames: int, later: tuple[int, int], earlier: tuple[int, int]) -> Tensor:
        context.frames, context.groups = frames, (later, earlier)
        clips = tokens.unflatten(0, (-1, frames))
        for (start, end), step in ((later, 1), (earlier, -1)):
            clips[:, :, start:end] = clips[:, :, start:end].roll(step, 1)
        context.mark_dirty(tokens)
        return tokens

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        # A permutation's transpose is its inverse: the groups change their parts. Others may need the gradient, too.
        later, earlier = context.groups
        return _Roll.apply(gradients[0].clone(), context.frames, earlier, later), None, None, None
