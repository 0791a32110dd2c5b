"""The arms of mae.toml: random against block masks, normalised against raw pixels, reconstruction on held-out items."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pretraining_arms import Pretrained, Values, World, measured_arms, pictures, register

from bowerbird.data import subset
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import ItemTransform
from bowerbird.records import ObjectiveRecord
from bowerbird_mim.mae import MAEObjective, MaskedAutoencoder, NoisyView, noisy_view
from bowerbird_mim.patches import normalize_patches, patchify

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="claims_mae:block",
        target=f"{__name__}:BlockMAEObjective",
        config="bowerbird_mim.mae:MAEConfig",
        summary="MAE that hides blocks, for claims.",
        needs=("image",),
        encoder_needs=("tokens",),
    )


@dataclass(frozen=True)
class BlockNoise:
    """A view whose noise hides rectangles: ``int(L * (1 - ratio))`` patches outside of them have the smallest noise."""

    view: NoisyView
    grid: tuple[int, int]
    mask_ratio: float

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        entries = self.view(item, generator)
        rows, columns = self.grid
        hidden = np.zeros(self.grid, np.float32)
        while hidden.sum() < self.mask_ratio * rows * columns:
            height, width = generator.integers(2, rows // 2 + 1), generator.integers(2, columns // 2 + 1)
            top, left = generator.integers(rows - height + 1), generator.integers(columns - width + 1)
            hidden[top : top + height, left : left + width] = 1
        return {**entries, "noise": entries["noise"] + hidden.ravel()}


class BlockMAEObjective(MAEObjective):
    def item_transform(self) -> ItemTransform:
        encoder = self.encoder
        return BlockNoise(noisy_view(encoder, self.config.crop_scale), encoder.grid, self.config.mask_ratio)


def run(plan: Mapping[str, Any], seed: int) -> Values:
    register("claims_mae", sys.modules[__name__])
    return measured_arms(plan, seed, reconstruction)


@torch.no_grad()
def reconstruction(name: str, made: Pretrained, world: World) -> Values:
    """Errors on 256 held-out pictures in the space of the arm's targets: of random masks, and of the mean picture."""
    if not made.log:
        return {}
    model: MaskedAutoencoder = made.objective.model
    images = pictures(made.encoder, subset(world.test, range(256)))
    length = model.encoder.grid[0] * model.encoder.grid[1]
    noise = torch.rand(len(images), length, generator=torch.Generator().manual_seed(0))
    target = patchify(images, model.encoder.patch_size)
    if model.norm_pix_loss:
        target = normalize_patches(target)
    return {
        "error": float(model(images, 0.75, noise).loss),
        "mean_picture": float((target - target.mean(dim=0)).square().mean()),
    }
