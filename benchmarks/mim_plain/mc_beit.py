"""mc-BEiT's step: soft tokens of the small view, mixed with those of similar patches, at the masked patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bowerbird_mim.mc_beit import McBEiTObjective
from mim_plain.beit import parts, plain_model
from mim_plain.vit import step_of

TEMPERATURE, OMEGA = 4.0, 0.2


def plain_mc_beit(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    tokenizer, model, batch = parts(size)
    length = batch["token_mask"].shape[1]
    order = torch.rand(batch["token_mask"].shape).argsort(1)
    batch["token_mask"] = order < int(0.75 * length)
    objective, plain = (
        McBEiTObjective(tokenizer, TEMPERATURE, model=model, refine_weight=OMEGA),
        plain_model(model, size),
    )

    def loss() -> Tensor:
        mask = batch["token_mask"]
        with torch.no_grad():
            choices = (tokenizer.encoder(batch["tokenizer_image"]) / TEMPERATURE).softmax(1).flatten(2).transpose(1, 2)
        features = plain(batch["image"], mask)
        unit = F.normalize(features, dim=-1)
        similar = (unit @ unit.transpose(1, 2)).softmax(-1)
        target = OMEGA * (similar @ choices) + (1 - OMEGA) * choices
        return -(target[mask] * plain.lm_head(features[mask]).log_softmax(-1)).sum(-1).mean()

    return step_of(model, lambda: objective(batch).total), step_of(plain, loss)
