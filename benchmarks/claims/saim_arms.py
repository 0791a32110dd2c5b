"""The arms of saim.toml: random and raster order, what each model predicts under either order, and the leak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pretraining_arms import Pretrained, Values, World, make_world, measured_arms, pictures, untrained
from torch import Tensor

from bowerbird.data import subset
from bowerbird_mim.saim import StochasticAutoregressiveModel, permutation_attention_masks


def run(plan: Mapping[str, Any], seed: int) -> Values:
    return measured_arms(plan, seed, errors_by_order) | leak(plan, seed)


@torch.no_grad()
def errors_by_order(name: str, made: Pretrained, world: World) -> Values:
    """Mean squared errors on held-out pictures under random orders and under the raster, and by place in the order."""
    if not made.log:
        return {}
    model: StochasticAutoregressiveModel = made.objective.model
    images = pictures(made.encoder, subset(world.test, range(500)))
    length = model.encoder.grid[0] * model.encoder.grid[1]
    noise = torch.rand(len(images), length, generator=torch.Generator().manual_seed(0))
    raster = torch.arange(length).float().expand_as(noise)
    error = patch_errors(model, images, noise)
    by_place = error.gather(1, noise.argsort(dim=1)).mean(dim=0)  # (L,)
    quarter = length // 4
    return {
        "in_random": float(error.mean()),
        "in_raster": float(patch_errors(model, images, raster).mean()),
        "first_quarter": float(by_place[:quarter].mean()),
        "last_quarter": float(by_place[-quarter:].mean()),
    }


def patch_errors(model: StochasticAutoregressiveModel, images: Tensor, noise: Tensor) -> Tensor:
    """``(N, L)``."""
    parts = zip(images.split(100), noise.split(100), strict=True)
    return torch.cat([(model(x, order).pred - model.target(x)).square().mean(dim=-1) for x, order in parts])


def leak(plan: Mapping[str, Any], seed: int) -> Values:
    """Losses after so many steps of the model as it is, and of one whose queries see their own patch."""
    steps, batch = plan["leak"]["steps"], plan["recipe"]["train"]["batch_size"]
    world = make_world(seed, **plan.get("data", {}))
    values = {}
    for name, leaks in (("legal", False), ("leak", True)):
        made = untrained(plan["recipe"], world.unlabelled, seed)
        model: StochasticAutoregressiveModel = made.objective.model
        model.train()
        images = pictures(made.encoder, subset(world.unlabelled, range(steps * batch)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=plan["leak"]["lr"])
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for chunk in images.split(batch):
            noise = torch.rand(len(chunk), model.encoder.grid[0] * model.encoder.grid[1], generator=generator)
            content, query = permutation_attention_masks(noise)
            pred = model.predict(chunk, content, content if leaks else query)
            loss = (pred - model.target(chunk)).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        values[f"{name}.final"] = sum(losses[-5:]) / 5
    return values
