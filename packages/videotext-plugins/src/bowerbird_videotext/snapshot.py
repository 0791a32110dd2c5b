"""A slowly following copy of a module, whose outputs are targets."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird.protocols import freeze


class SnapshotEncoder(nn.Module):
    """A frozen copy of ``module`` that moves towards it: copy <- m copy + (1 - m) module, every so many steps.

    The copy never gets a gradient and stays in eval mode. It starts equal to ``module``. It follows what the module
    computes with: where a weight was parametrised since (a pruning mask, say), it follows what comes out of that.
    Buffers are copied. The module itself is not part of this one's state.

    Args:
        module: What is followed.
        momentum: m, 0 to 1. 0 copies, 1 never moves.
        update_every: Steps between two updates. 1 with a momentum near 1 is a moving average; the steps of an epoch
            with momentum 0 is a snapshot per epoch.

    Raises:
        InputError: Values outside these ranges.
    """

    def __init__(self, module: nn.Module, momentum: float, update_every: int = 1) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise InputError(f"momentum = {momentum}: expected a number from 0 to 1")
        if update_every < 1:
            raise InputError(f"update_every = {update_every}: expected a number of steps, 1 or more")
        self.momentum, self.update_every = momentum, update_every
        self.module = freeze(copy.deepcopy(module))
        self._followed = (module,)  # in a tuple: as an attribute its parameters would belong to this module, too

    def forward(self, *args: object, **kwargs: object) -> object:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> SnapshotEncoder:
        super().train(mode)
        self.module.eval()
        return self

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move, if ``step`` is a multiple of ``update_every``. ``step``: how many optimiser steps there were."""
        if step % self.update_every:
            return
        (followed,) = self._followed
        for name, ours in self.module.named_parameters():
            ours.lerp_(_tensor(followed, name), 1 - self.momentum)  # equal tensors stay equal to the bit
        buffers = dict(followed.named_buffers())
        for name, copied in self.module.named_buffers():
            if name in buffers:
                copied.copy_(buffers[name])


def _tensor(module: nn.Module, name: str) -> Tensor:
    """The tensor that ``module`` has under a parameter's name: the parameter, or what it was parametrised to."""
    path, _, own = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), own)
    return found.detach()
