"""The modifiers ``sparsity:spartan``, ``sparsity:magnitude`` and ``sparsity:top-k``: a ``Sparsifier`` in a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from bowerbird.errors import RecipeError
from bowerbird.protocols import Modifier
from bowerbird_sparsity.config import MagnitudeConfig, SparsityConfig, SpartanConfig, TopKConfig
from bowerbird_sparsity.costs import FlopsCost, LatencyCost
from bowerbird_sparsity.spartan import Sparsifier

RecipeConfig = SpartanConfig | MagnitudeConfig | TopKConfig


class SparsityModifier(Modifier):
    """Makes the encoder sparse while it trains. Masks and counter are buffers of the encoder, so that a run resumes."""

    def __init__(self, config: RecipeConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: RecipeConfig) -> Self:
        return cls(config)

    def attach(self, module: nn.Module, total_steps: int) -> None:
        values = {name: getattr(self.config, name) for name in type(self.config).model_fields}
        del values["cost_model"], values["latency_table"]
        settings = SparsityConfig(mode=self.config.mode, cost_model=self._cost_model(module), **values)
        self.module = module
        self.sparsifier = Sparsifier(module, settings, total_steps)

    def after_step(self, step: int) -> None:
        self.sparsifier.step()

    def finalize(self, module: nn.Module) -> nn.Module:
        """Plain weights with exact zeros; ``module`` may be another one than was attached to, such as a teacher."""
        dead = [layer.name for layer in self.sparsifier.report() if not layer.kept]
        if dead:
            warnings.warn(
                f"no weight is left in {len(dead)} layer(s): {', '.join(dead[:5])}. What they compute does not depend "
                "on the picture any more. Keep more (target_density), spread it over the layers (allocation = 'erk' or "
                "'uniform'), or leave them out (layers)",
                stacklevel=2,
            )
        if any(part is self.module for part in module.modules()):
            self.sparsifier.finalize()
            return module
        return self.sparsifier.prune_like(module)

    def report(self) -> Mapping[str, float]:
        layers = self.sparsifier.report()
        weights, kept = sum(layer.weights for layer in layers), sum(layer.kept for layer in layers)
        softness = sum(layer.softness * layer.weights for layer in layers) / weights
        return {"sparse_layers_density": kept / weights, "mask_softness": softness}

    def _cost_model(self, module: nn.Module) -> Any:
        if self.config.cost_model == "latency":
            assert self.config.latency_table is not None
            return LatencyCost(self.config.latency_table)
        if self.config.cost_model == "parameters":
            return "parameters"
        prepared = getattr(module, "preprocessing", None)
        if prepared is None:
            raise RecipeError(
                f"cost_model = 'flops': {type(module).__name__} does not say how large its pictures are; use an "
                "encoder with preprocessing, or cost_model = 'parameters'"
            )
        device = next(module.parameters()).device
        return FlopsCost({"image": torch.zeros(1, 3, prepared.height, prepared.width, device=device)})
