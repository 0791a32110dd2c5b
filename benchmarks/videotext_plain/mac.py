"""MAC's step: the contrast of "Frozen in Time" between the kept patches of clips and captions with hidden words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from videotext_plain.towers import Towers, nce

AT = "encoder.video_encoder"


def plain(objective: Any) -> Callable[[dict[str, Any]], Tensor]:
    own = dict(objective.named_parameters())
    towers = Towers(own, objective.encoder)
    tokenizer = objective.encoder.tokenizer

    def kept(video: Tensor, keep: Tensor) -> Tensor:
        batch, frames = video.shape[:2]
        weight, bias = own[f"{AT}.patch_embed.proj.weight"], own[f"{AT}.patch_embed.proj.bias"]
        maps = F.conv2d(video.flatten(0, 1), weight, bias, stride=towers.patch)
        patches = maps.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
        places = own[f"{AT}.pos_embed"]
        patches = patches + places[:, None, 1:] + own[f"{AT}.temporal_embed"][:, :frames, None]
        patches = patches.gather(2, keep[..., None].expand(-1, -1, -1, patches.shape[-1]))
        first = (own[f"{AT}.cls_token"] + places[:, :1]).expand(batch, -1, -1)
        return torch.cat([first, patches.flatten(1, 2)], 1)

    def loss(batch: dict[str, Any]) -> Tensor:
        noise, video, ids = batch["patch_noise"], batch["video"], batch["text"]["input_ids"]
        count = max(1, int(noise.shape[-1] * (1 - objective.video_ratio) + 1e-6))
        x = kept(video, noise.argsort(-1)[..., :count].sort(-1).values)
        for i in range(towers.depth):
            x = towers.block(x, f"{AT}.blocks.{i}", video.shape[1])
        videos = towers.linear(towers.norm(x[:, 0], f"{AT}.norm"), "encoder.video_proj")
        word = (ids != tokenizer.pad_id) & (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
        hidden = (batch["piece_noise"][:, : ids.shape[1]] < objective.text_ratio) & word
        text = {**batch["text"], "input_ids": torch.where(hidden, tokenizer.mask_id, ids)}
        return nce(towers.caption(towers.text_states(text)), videos, objective.temperature)

    return loss
