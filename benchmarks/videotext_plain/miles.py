"""MILES's step: the masked clip, the whole clip through the following copy, contrast and regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from videotext_plain.towers import Towers, nce


def plain(objective: Any) -> Callable[[dict[str, Any]], Tensor]:
    own = dict(objective.named_parameters())
    towers = Towers(own, objective.encoder)
    temperature, weight, masked = objective.temperature, objective.weight, objective.contrast_on == "masked"
    video_encoder, snapshot = "encoder.video_encoder", "snapshot.module.encoder"

    def loss(batch: dict[str, Any]) -> Tensor:
        video, mask = batch["video"], batch["patch_mask"]
        tokens = towers.norm(towers.clip_states(video, mask=mask)[-1], f"{video_encoder}.norm")
        restored = towers.linear(tokens[:, 1:][mask.flatten(1)], "encoder.video_proj")
        whole = tokens[:, 0] if masked else towers.norm(towers.clip_states(video)[-1][:, 0], f"{video_encoder}.norm")
        with torch.no_grad():
            seen = towers.norm(towers.clip_states(video, snapshot)[-1], f"{snapshot}.norm")
            target = towers.linear(seen[:, 1:][mask.flatten(1)], "snapshot.module.projection")
        caption = towers.caption(towers.text_states(batch["text"]))
        contrast = nce(caption, towers.linear(whole, "encoder.video_proj"), temperature)
        regression = (2 - 2 * F.cosine_similarity(restored, target, dim=1)).mean()
        return contrast + weight * regression

    return loss
