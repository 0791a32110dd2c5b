"""A teacher that follows its student as a moving average."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bowerbird.errors import InputError
from bowerbird.protocols import freeze
from bowerbird_mim.schedules import Schedule, as_schedule


class EMATeacher(nn.Module):
    """A frozen copy of ``student`` whose parameters follow it: teacher <- m teacher + (1 - m) student.

    It follows what the student computes with: where a modifier has parametrised a weight since (with a mask, say), it
    follows what comes out of that. Only parameters move; buffers (batch statistics) follow the teacher's own forward
    passes.

    Args:
        student: Copied as it is; the copy never gets a gradient. The teacher may hold fewer parts than the student that
            ``update`` is given, they are matched by name.
        momentum_schedule: m in [0, 1] at every optimiser step (counted from 0): a number, a table or a function.
    """

    def __init__(self, student: nn.Module, momentum_schedule: Schedule) -> None:
        super().__init__()
        self.module = freeze(copy.deepcopy(student))
        self.momentum_schedule = as_schedule(momentum_schedule)

    def forward(self, *args: object, **kwargs: object) -> object:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Move towards ``student``; call it after the optimiser of step ``step`` has moved.

        Raises:
            InputError: A momentum outside [0, 1], or a student that lacks parameters of the teacher.
        """
        momentum = self.momentum_schedule(step)
        if not 0 <= momentum <= 1:
            raise InputError(f"momentum_schedule is {momentum} at step {step}: expected a momentum from 0 to 1")
        ours = dict(self.module.named_parameters())
        theirs = {name: _tensor(student, name) for name in ours}
        differing = [name for name, tensor in theirs.items() if tensor is None or tensor.shape != ours[name].shape]
        if differing:
            raise InputError(
                f"{type(student).__name__} is not the student of this teacher: no parameter of the same name and shape "
                f"for {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}"
            )
        if not ours:
            return
        followed = [tensor.detach() for tensor in theirs.values() if tensor is not None]
        torch._foreach_mul_(list(ours.values()), momentum)
        torch._foreach_add_(list(ours.values()), followed, alpha=1 - momentum)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """The tensor that ``module`` has under a parameter's name: the parameter, or what it was parametrised to."""
    path, _, own = name.rpartition(".")
    try:
        return getattr(module.get_submodule(path), own)
    except AttributeError:
        return None
