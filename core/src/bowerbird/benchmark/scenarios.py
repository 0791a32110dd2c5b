"""The upgrades of the field: what the old and the new model are trained on, and how they are built.

Names as in the codes of the field (AdvBCT, MixBCT): the old model has less data, fewer classes, other classes, another
architecture, another loss, or there are three models in a row. T training items of a world.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.benchmark.worlds import World
from bowerbird.errors import UnknownNameError, did_you_mean

SCENARIOS = {
    "extended-data": "The old model has a part of the training items, the new one all.",
    "extended-classes": "The old model has a part of the classes, the new one all.",
    "open-classes": "The new model has other classes than the old one; none is shared.",
    "new-architecture": "As extended-data; the new model is wider, its embedding longer; emoji: another trunk, too.",
    "new-loss": "As extended-data; the old model was trained by supervised contrast and has no classifier.",
    "sequence": "Three models with ever more data, each trained for its predecessor; the gallery stays at the first.",
}


@dataclass(frozen=True)
class Profile:
    """How models of one data set are built and trained.

    Attributes:
        old_width, new_width, depth, embed_dim: Of ``core:perceptron``.
        epochs, batch_size, lr: Adam, cosine schedule.
        old_share: Of the training items, in the scenarios where the old model has a part of them.
        old_classes: Number of classes of the old model, where it has a part of them.
        objective: Settings of ``core:softmax``, with which models without regard to an old one are trained.
        trunks: Features for the old model, and for the new one in ``new-architecture``.
        sizes: Of the world: ``queries`` and ``gallery``.
        pairs: Training items on which strategies fit a transform, at most (a sample, as in practice); ``None``: all.
    """

    old_width: int = 48
    new_width: int = 192
    depth: int = 2
    embed_dim: int = 16
    epochs: int = 40
    batch_size: int = 64
    lr: float = 2e-3
    old_share: float = 0.15
    old_classes: int = 4
    objective: dict[str, Any] = field(default_factory=dict)
    trunks: tuple[str, str] = ("pixels", "pixels")
    sizes: dict[str, int] = field(default_factory=lambda: {"queries": 300, "gallery": 500})
    pairs: int | None = 600

    def quick(self) -> Profile:
        """A tenth of the work: to see that a method runs, not how good it is."""
        return replace(self, epochs=max(4, self.epochs // 6), sizes={"queries": 100, "gallery": 200}, pairs=256)


PROFILES = {
    "digits": Profile(),
    "fashion-mnist": Profile(old_width=64, new_width=192, epochs=25, old_share=0.1, embed_dim=16),
    "emoji": Profile(
        depth=0, embed_dim=64, epochs=30, batch_size=128, lr=1e-3, old_share=0.3, old_classes=100,
        objective={"cosine": True, "scale": 16.0}, trunks=("lite0", "lite2"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How one model of a scenario is made: its training items and its build."""

    rows: NDArray[np.int64]
    width: int
    depth: int
    embed_dim: int
    trunk: str
    objective: str
    settings: dict[str, Any]
    items_per_class: int | None = None


def plans(scenario: str, world: World, profile: Profile, seed: int) -> list[Plan]:
    """The models of a scenario, oldest first.

    Raises ``UnknownNameError`` for a scenario that there is not.
    """
    if scenario not in SCENARIOS:
        raise UnknownNameError(
            f"no scenario {scenario!r}; there are {', '.join(SCENARIOS)}.{did_you_mean(scenario, SCENARIOS)}"
        )
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(world.train))
    everything = np.arange(len(world.train))

    def part(share: float) -> NDArray[np.int64]:
        return np.sort(order[: max(2, round(share * len(order)))])

    def plan(rows: NDArray[np.int64], width: int, **more: Any) -> Plan:
        values: dict[str, Any] = {
            "depth": profile.depth, "embed_dim": profile.embed_dim, "trunk": profile.trunks[0],
            "objective": "core:softmax", "settings": profile.objective, **more,
        }  # fmt: skip
        return Plan(rows, width, **values)

    old, new = plan(part(profile.old_share), profile.old_width), plan(everything, profile.new_width)
    if scenario in ("extended-classes", "open-classes"):
        of_old = _items_of_old_classes(world, profile.old_classes, rng)
        old = plan(np.flatnonzero(of_old), profile.old_width)
        if scenario == "open-classes":
            known = np.unique(world.train_labels[of_old])
            new = plan(np.flatnonzero(~np.isin(world.train_labels, known)), profile.new_width)
    elif scenario == "new-architecture":
        new = plan(
            everything, profile.new_width * 3 // 2, depth=profile.depth + (profile.depth > 0),
            embed_dim=profile.embed_dim * 3 // 2, trunk=profile.trunks[1],
        )  # fmt: skip
    elif scenario == "new-loss":
        old = plan(
            old.rows, profile.old_width, objective="core:supcon", settings={"temperature": 0.1}, items_per_class=4
        )
    elif scenario == "sequence":
        middle = (profile.old_width + profile.new_width) // 2
        first, second = profile.old_share * 2 / 3, (profile.old_share + 1) / 3
        return [plan(part(first), profile.old_width), plan(part(second), middle), new]
    return [old, new]


def _items_of_old_classes(world: World, count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    if not world.old_only.all():
        return world.old_only
    return np.isin(world.train_labels, rng.permutation(np.unique(world.train_labels))[:count])
