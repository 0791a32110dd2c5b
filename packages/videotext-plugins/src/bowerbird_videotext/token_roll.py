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
    if divisor < 2:
        raise InputError(f"divisor = {divisor}: expected 2 or more")
    if not 0 <= first <= tokens.shape[2]:
        raise InputError(f"first = {first}: expected 0 to {tokens.shape[2]}, the number of tokens of a frame")
    moved = (tokens.shape[2] - first) // divisor
    if moved == 0 or tokens.shape[1] == 1:
        return tokens.clone()
    end = tokens.shape[2]
    forward = (first + 1, first + 1 + moved)
    backward = (max(end - moved, forward[1]), end)
    return _Roll.apply(tokens, forward, backward)


class _Roll(torch.autograd.Function):
    """One copy of the tokens and of their gradient: slicing and joining would make one for every piece."""

    @staticmethod
    def forward(context: Any, tokens: Tensor, later: tuple[int, int], earlier: tuple[int, int]) -> Tensor:
        context.groups = later, earlier
        rolled = tokens.clone()
        for (start, end), step in ((later, 1), (earlier, -1)):
            # Frame t takes the group of frame t - step, the ends of the clip exchange theirs.
            if step == 1:
                rolled[:, 1:, start:end] = tokens[:, :-1, start:end]
                rolled[:, 0, start:end] = tokens[:, -1, start:end]
            else:
                rolled[:, :-1, start:end] = tokens[:, 1:, start:end]
                rolled[:, -1, start:end] = tokens[:, 0, start:end]
        return rolled

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # A permutation's transpose is its inverse: the groups change their parts.
        later, earlier = context.groups
        return _Roll.apply(gradients[0], earlier, later), None, None
