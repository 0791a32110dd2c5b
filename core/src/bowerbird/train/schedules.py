"""Schedules of learning rate and weight decay as pure functions of the optimiser step."""

from __future__ import annotations

import math

from bowerbird.recipe import TrainSettings


def lr_factor(step: int, *, steps_per_epoch: int, settings: TrainSettings) -> float:
    """What the peak learning rate is multiplied with at optimiser step ``step`` (counted from 0).

    Warm-up grows linearly and reaches 1 with its last step. After it, ``cosine`` falls from 1 towards ``min_lr / lr``
    (reached after the last step), ``step`` is multiplied with ``step_factor`` every ``step_epochs`` epochs, or at each
    of several, counted from the start of the run, ``poly`` is the share of steps left (1 at its first step) to the
    power ``poly_power``, and ``constant`` stays at 1.
    """
    warmup = round(settings.warmup * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "cosine":
        total = settings.epochs * steps_per_epoch
        low = settings.min_lr / settings.lr
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if settings.schedule == "poly":
        done = (step - warmup) / max(1, settings.epochs * steps_per_epoch - warmup)
        return (1 - done) ** (0.9 if settings.poly_power is None else settings.poly_power)
    if settings.schedule == "step":
        assert settings.step_epochs is not None
        factor = 0.1 if settings.step_factor is None else settings.step_factor
        if isinstance(settings.step_epochs, tuple):
            return factor ** sum(step >= round(epoch * steps_per_epoch) for epoch in settings.step_epochs)
        return factor ** math.floor(step / (settings.step_epochs * steps_per_epoch))
    return 1.0


def weight_decay_at(step: int, *, total_steps: int, settings: TrainSettings) -> float:
    """The weight decay at optimiser step ``step``: constant, or half a cosine from its first to its last value."""
    if settings.weight_decay_end is None:
        return settings.weight_decay
    done = 0.5 * (1 - math.cos(math.pi * step / max(1, total_steps)))
    return settings.weight_decay + (settings.weight_decay_end - settings.weight_decay) * done
