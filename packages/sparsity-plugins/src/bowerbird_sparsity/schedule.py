"""When a sparse training drops how much, and how sharply."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bowerbird_sparsity.config import SparsityConfig


def ramp(step: int, first: int, last: int, *, start: float, end: float, form: str = "linear") -> float:
    """``start`` until step ``first``, ``end`` from step ``last`` on, between them a line or half a cosine."""
    share = 1.0 if step >= last else max(0.0, (step - first) / (last - first))
    if form == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return end if share == 1 else start + share * (end - start)  # the end itself, not rounded


@dataclass(frozen=True)
class Schedule:
    """Density and sharpness after every step, counted from 1.

    Attributes:
        total_steps: Of the training.
        entry_weights: Weights of an entry of the mask: means over blocks spread less, by the root of their size.
    """

    config: SparsityConfig
    total_steps: int
    entry_weights: float = 1.0

    @property
    def warmup_end(self) -> int:
        """The step with which the target density is reached."""
        return int(self.config.warmup_fraction * self.total_steps)

    @property
    def finetune_start(self) -> int:
        """The last step after which masks change; then they are frozen."""
        return self.total_steps - int(self.config.finetune_fraction * self.total_steps)

    def density(self, step: int) -> float:
        """Share of the cost that is kept after ``step`` steps, before any adjustment for dense parameters."""
        c = self.config
        return ramp(step, 0, self.warmup_end, start=c.initial_density, end=c.target_density, form=c.annealing)

    def beta(self, step: int) -> float:
        """Sharpness of the masks after ``step`` steps."""
        c = self.config
        end = c.beta_final * math.sqrt(self.entry_weights)
        return ramp(step, 0, self.finetune_start, start=c.beta_init, end=end, form=c.annealing)
