"""The arms of emae.toml: MAE and EMAE, and how far two visible sets of one picture lead to different predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pretraining_arms import Pretrained, Values, World, measured_arms, pictures

from bowerbird.data import subset
from bowerbird_mim.emae import EfficientMaskedAutoencoder, prediction_inconsistency


def run(plan: Mapping[str, Any], seed: int) -> Values:
    return measured_arms(plan, seed, agreement)


@torch.no_grad()
def agreement(name: str, made: Pretrained, world: World) -> Values:
    """On 256 held-out pictures in four parts: inconsistency, error of masked patches, error of the mean picture."""
    if not made.log:
        return {}
    model = made.objective.model
    mae = model.mae if isinstance(model, EfficientMaskedAutoencoder) else model
    images = pictures(made.encoder, subset(world.test, range(256)))
    length = mae.encoder.grid[0] * mae.encoder.grid[1]
    noise = torch.rand(len(images), length, generator=torch.Generator().manual_seed(0))
    output = EfficientMaskedAutoencoder(mae)(images, noise, with_pred=False)
    error = float(output.loss_reconstruction)
    return {
        "inconsistency": prediction_inconsistency(mae, images, 4, torch.Generator().manual_seed(1)),
        "error": error,
        "error x 1.05": 1.05 * error,
        "mean_picture": float((output.target - output.target.mean(dim=0)).square().mean()),
        "weight": made.log[-1].get("consistency_weight", 0.0),
    }
