"""``domain:dsu`` and ``domain:mixstyle``: one line in any recipe whose encoder has feature maps or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self

from torch import nn

from bowerbird.errors import RecipeError
from bowerbird.protocols import Modifier
from bowerbird_domain.configs import DSUConfig, MixStyleConfig
from bowerbird_domain.dsu import FeatureStatisticsUncertainty
from bowerbird_domain.layers import Inserted, insert_after
from bowerbird_domain.mixstyle import MixStyle

CHANNELS_LAST = {"auto": None, "channels-first": False, "channels-last": True}


class StatisticsNoise(Modifier):
    """Something random behind named layers of the encoder, in training mode only.

    Nothing of it is in the encoder's state, and nothing needs to be: what it draws comes from torch's global
    generators, which the training loop keeps in its checkpoints. In a distributed run every process tosses its own
    coins and takes the statistics of its own part of the batch.
    """

    def __init__(self, layers: Sequence[str], factory: Callable[[], nn.Module]) -> None:
        self.layers, self.factory = layers, factory
        self._inserted: Inserted | None = None

    def attach(self, module: nn.Module, total_steps: int) -> None:
        """Raises ``RecipeError`` for names that match nothing, and for layers that stay in evaluation mode."""
        inserted = insert_after(module, self.layers, self.factory)
        idle = [name for name in inserted.modules if module.training and not module.get_submodule(name).training]
        if idle:
            inserted.remove()
            raise RecipeError(
                f"layer {idle[0]!r} stays in evaluation mode (a frozen trunk): nothing would ever be added behind it. "
                "Train the trunk, or leave out the modifier"
            )
        self._inserted = inserted

    def finalize(self, module: nn.Module) -> nn.Module:
        """Takes out what was inserted; the weights were never touched."""
        if self._inserted is not None:
            self._inserted.remove()
        return module

    def report(self) -> Mapping[str, float]:
        return {"layers": float(len(self._inserted.modules) if self._inserted is not None else 0)}


class DSUModifier(StatisticsNoise):
    """``domain:dsu``, see ``bowerbird_domain.dsu``."""

    @classmethod
    def build(cls, config: DSUConfig) -> Self:
        c = config
        layout = CHANNELS_LAST[c.layout]
        noise = partial(FeatureStatisticsUncertainty, c.p, c.eps, c.scale, channels_last=layout, strict=c.strict)
        return cls(c.layers, noise)


class MixStyleModifier(StatisticsNoise):
    """``domain:mixstyle``, see ``bowerbird_domain.mixstyle``."""

    @classmethod
    def build(cls, config: MixStyleConfig) -> Self:
        c = config
        layout = CHANNELS_LAST[c.layout]
        return cls(c.layers, partial(MixStyle, c.p, c.alpha, c.eps, channels_last=layout, strict=c.strict))
