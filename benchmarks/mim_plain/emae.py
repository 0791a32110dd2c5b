"""EMAE's step: K passes of MAE as one batch, the mean of their losses, and agreement where two parts are blind."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn

from bowerbird_mim.emae import EfficientMaskedAutoencoder
from mim_plain.mae import make_batch, make_ours, plain_decoder, restored, target_of
from mim_plain.vit import plain_vit, step_of

PARTS, WEIGHT = 4, 0.1


def plain_emae(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    model = EfficientMaskedAutoencoder(make_ours(size), PARTS, WEIGHT)
    vit, decoder = plain_vit(model.mae.encoder, size), plain_decoder(model.mae, size)
    images, noise = make_batch(model.mae, size)
    batch, length = noise.shape
    visible = length // PARTS

    def loss() -> Tensor:
        order = noise.argsort(1)
        orders = torch.stack([order.roll(-k * visible, 1) for k in range(PARTS)], 1).flatten(0, 1)
        repeated = images.repeat_interleave(PARTS, 0)
        pred, mask = restored(vit, decoder, repeated, orders, visible)
        pred, mask = pred.view(batch, PARTS, length, -1), mask.view(batch, PARTS, length)
        target = target_of(images, model.mae.encoder.patch_size)[:, None]
        reconstruction = ((pred - target).square().mean(-1) * mask).sum() / mask.sum()
        apart, overlap = pred.new_zeros(()), pred.new_zeros(())
        for i, j in combinations(range(PARTS), 2):
            one, other = pred[:, i], pred[:, j]
            both = mask[:, i] * mask[:, j]
            distance = (one.detach() - other).abs().mean(-1) + (one - other.detach()).abs().mean(-1)
            apart, overlap = apart + (distance * both).sum(), overlap + both.sum()
        return reconstruction + WEIGHT * apart / overlap

    return (
        step_of(model, lambda: model(images, noise, with_pred=False).loss),
        step_of(nn.ModuleList([vit, decoder]), loss),
    )
