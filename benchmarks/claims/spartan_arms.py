"""The arms of Spartan, magnitude pruning and dual averaging on the digits: one seed of ``spartan.toml``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bowerbird_sparsity.spartan import Sparsifier, SparsityConfig

Values = dict[str, float]


@dataclass(frozen=True)
class Digits:
    """Images float32 ``(n, 64)`` in [0, 1] and labels, of disjoint parts."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits(seed: int, test_share: float) -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)
    order = torch.tensor(np.random.default_rng(seed).permutation(len(x)))
    first = round(test_share * len(x))
    test, train = order[:first], order[first:]
    return Digits(x[train], y[train], x[test], y[test])


def network(hidden: Sequence[int], seed: int, *, norm: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    width = 64
    for size in hidden:
        layers += [nn.Linear(width, size), *([nn.BatchNorm1d(size)] if norm else []), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, 10))


def kept_entries(model: nn.Module) -> Tensor:
    """Of all masks together, bool."""
    return torch.cat([mask.flatten() > 0 for name, mask in model.named_buffers() if name.endswith(".signed")])


def train(
    data: Digits,
    plan: Mapping[str, Any],
    seed: int,
    *,
    hidden: Sequence[int],
    norm: bool,
    sparse: SparsityConfig | None,
) -> Values:
    """Accuracy, churn of the kept entries, and how many weights are left."""
    settings = plan["train"]
    model = network(hidden, seed, norm=norm)
    steps = settings["epochs"] * math.ceil(len(data.train) / settings["batch_size"])
    sparsifier = None if sparse is None else Sparsifier(model, sparse, steps)
    names = {key: settings[key] for key in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(model.parameters(), **names)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    churn: list[float] = []
    before: Tensor | None = None
    torch.manual_seed(seed)
    for _epoch in range(settings["epochs"]):
        for chosen in torch.randperm(len(data.train)).split(settings["batch_size"]):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train[chosen]), data.train_labels[chosen]).backward()
            optimizer.step()
            decay.step()
            if sparsifier is None:
                continue
            done = sparsifier.step().step
            if sparsifier.schedule.warmup_end <= done <= sparsifier.schedule.finetune_start:
                kept = kept_entries(model)
                if before is not None:
                    churn.append(float((kept & ~before).sum() / kept.sum().clamp(min=1)))
                before = kept
    if sparsifier is not None:
        sparsifier.finalize()
    with torch.no_grad():
        right = (model.eval()(data.test).argmax(dim=1) == data.test_labels).double().mean()
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    values = {"accuracy": float(right), "kept": float(sum(int((w != 0).sum()) for w in weights))}
    return values | ({"churn": float(np.mean(churn))} if churn else {})


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``pattern.sparsity.arm.metric``; ``dense`` and ``plain`` (without norm layers) beside them."""
    data = digits(seed, plan["test_share"])
    hidden, without = plan["train"]["hidden"], plan["without_norm"]
    found: dict[str, Values] = {"dense": train(data, plan, seed, hidden=hidden, norm=True, sparse=None)}
    for arm in plan["arms"][1:]:
        how = {key: arm[key] for key in ("mode", "beta_final") if key in arm}
        for pattern, block in plan["patterns"].items():
            for sparsity, density in plan["densities"].items():
                config = SparsityConfig(target_density=density, block_size=tuple(block), **how)
                name = f"{pattern}.{sparsity}.{arm['name']}"
                found[name] = train(data, plan, seed, hidden=hidden, norm=True, sparse=config)
        config = SparsityConfig(target_density=without["density"], **how)
        found[f"plain.98.{arm['name']}"] = train(data, plan, seed, hidden=without["hidden"], norm=False, sparse=config)
    found["plain.dense"] = train(data, plan, seed, hidden=without["hidden"], norm=False, sparse=None)
    values = {f"{name}.{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}
    for pattern in plan["patterns"]:
        for sparsity in plan["densities"]:
            at = f"{pattern}.{sparsity}"
            values[f"{at}.gap"] = values[f"{at}.spartan.accuracy"] - values[f"{at}.magnitude.accuracy"]
    return values
