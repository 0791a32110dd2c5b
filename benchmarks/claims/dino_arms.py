"""The arms of dino on Fashion-MNIST: accuracies of frozen features, and the signs of collapse on test items."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pretraining_arms import Pretrained, Values, World, knn_accuracy, measured_arms, pictures
from torch import Tensor

from bowerbird.protocols import Dataset
from bowerbird_mim.dino import DINOObjective, crop_major

ITEMS = 1000  # test items of the entropies


def global_views(objective: DINOObjective, items: Dataset, seed: int) -> Tensor:
    """``(2 N, 3, H, W)``: the two large crops of the first items, crop by crop, as in training."""
    transform = objective.item_transform()
    views = [transform(items[i], np.random.default_rng([seed, i]))["global_views"] for i in range(ITEMS)]
    return crop_major(torch.from_numpy(np.stack(views)))


@torch.no_grad()
def entropies(made: Pretrained, world: World, seed: int) -> Values:
    """``teacher_entropy``: mean entropy of the targets; ``mean_entropy``: entropy of their mean. Shares of ln K."""
    objective = made.objective
    assert isinstance(objective, DINOObjective)
    objective.on_epoch_start(made.recipe.train.epochs - 1)
    objective.before_step(0)  # the last temperature
    views = global_views(objective, world.test, seed)
    logits = torch.cat([objective.dino.teacher(chunk) for chunk in views.split(256)])  # type: ignore[misc]
    top = math.log(objective.config.out_dim)
    return {name: float(value) / top for name, value in objective.dino.loss.entropies(logits).items()}


def pixel_knn(made: Pretrained, world: World) -> float:
    """The same vote on the pixels that the encoder reads."""
    train, test = (pictures(made.encoder, part).flatten(1).numpy() for part in (world.train, world.test))
    return knn_accuracy(train, np.asarray(world.train.labels()), test, np.asarray(world.test.labels()))


def run(plan: Mapping[str, Any], seed: int) -> Values:
    def more(arm: str, made: Pretrained, world: World) -> Values:
        if arm == "scratch":
            return {"pixel_knn": pixel_knn(made, world)}
        return entropies(made, world, seed)

    return measured_arms(plan, seed, more)
