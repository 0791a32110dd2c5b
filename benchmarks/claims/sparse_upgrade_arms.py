"""Sparsity meets upgrades: sparse new encoders by BCT and an old gallery. One seed of ``sparse-upgrade.toml``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from arms import Extra, Values, _old, _prototypes
from digits import World, make_world, mean_ap, unit
from torch import nn

from bowerbird_sparsity.spartan import Sparsifier, SparsityConfig


def encoder(width: int, embed_dim: int) -> nn.Sequential:
    """Two hidden layers with batch norm and a linear embedding."""
    layers: list[nn.Module] = []
    for inputs in (64, width):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, embed_dim))


def train(
    plan: Mapping[str, Any], world: World, seed: int, extra: Extra | None, sparse: SparsityConfig | None
) -> nn.Module:
    """Softmax training on all training images, with the influence loss and the masks that are given."""
    settings = plan["train"]
    torch.manual_seed(seed)
    model = encoder(settings["new_width"], settings["embed_dim"])
    classifier = nn.Linear(settings["embed_dim"], 10)
    steps = settings["epochs"] * math.ceil(len(world.train) / settings["batch_size"])
    sparsifier = None if sparse is None else Sparsifier(model, sparse, steps)
    optimizer = torch.optim.Adam([*model.parameters(), *classifier.parameters()], lr=settings["lr"])
    for _epoch in range(settings["epochs"]):
        for chosen in torch.randperm(len(world.train)).split(settings["batch_size"]):
            embeddings, labels = model(world.train[chosen]), world.train_labels[chosen]
            loss = F.cross_entropy(classifier(embeddings), labels)
            if extra is not None:
                loss = loss + extra(embeddings, labels, chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if sparsifier is not None:
                sparsifier.step()
    if sparsifier is not None:
        sparsifier.finalize()
    return model.eval()


def run(plan: Mapping[str, Any], seed: int) -> Values:
    world = make_world(seed, **plan["data"])
    old, _ = _old(plan, world, seed)
    g_old = unit(old, world.gallery)
    values: Values = {"old.self": mean_ap(unit(old, world.queries), g_old, world)}
    moved = np.random.default_rng(seed).random(len(g_old)) < 0.5
    for arm in plan["arms"][1:]:
        extra = (
            _prototypes(old, world, plan["influence"]["weight"], plan["influence"]["scale"]) if arm.get("bct") else None
        )
        sparse = SparsityConfig(mode=arm["mode"], target_density=arm["density"]) if "mode" in arm else None
        new = train(plan, world, seed + 10_000, extra, sparse)
        queries, gallery = unit(new, world.queries), unit(new, world.gallery)
        weights = [layer.weight for layer in new.modules() if isinstance(layer, nn.Linear)]
        values |= {
            f"{arm['name']}.cross": mean_ap(queries, g_old, world),
            f"{arm['name']}.half": mean_ap(queries, np.where(moved[:, None], gallery, g_old), world),
            f"{arm['name']}.self": mean_ap(queries, gallery, world),
            f"{arm['name']}.kept": float(sum(int((w != 0).sum()) for w in weights)),
        }
    return values
