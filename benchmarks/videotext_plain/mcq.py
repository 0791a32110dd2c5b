"""MCQ's step: caption, question and answer through the text encoder, the clip and the bridge, two contrasts."""

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
    tokenize, depth, heads = objective.encoder.tokenize, objective.bridge.depth, towers.heads
    temperature = objective.temperature

    def cross(patches: Tensor, question: Tensor, frames: int, name: str) -> Tensor:
        batch, length, dim = patches.shape
        q = towers.linear(question, f"{name}.q_question").view(batch, -1, heads, dim // heads)
        k, v = towers.linear(patches, f"{name}.kv_video").view(batch, length, 2, heads, dim // heads).unbind(2)
        first = F.scaled_dot_product_attention(q[:, :1].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        words = q[:, None, 1:].expand(-1, frames, -1, -1, -1).flatten(0, 1).transpose(1, 2)
        k, v = (t.reshape(batch * frames, length // frames, heads, -1).transpose(1, 2) for t in (k, v))
        others = F.scaled_dot_product_attention(words, k, v).transpose(1, 2).reshape(batch, -1, dim)
        return towers.linear(torch.cat([first.transpose(1, 2).flatten(2), others], 1), f"{name}.proj")

    def bridge(videos: list[Tensor], questions: list[Tensor], mask: Tensor, frames: int) -> Tensor:
        padding = (1 - mask.to(videos[0].dtype)) * -10000.0
        key_mask = torch.cat([padding[:, :1], padding[:, 1:].repeat(1, frames)], 1)
        b: Tensor | None = None
        for i in range(depth):
            at = f"bridge.blocks.{i}"
            patches, question = towers.norm(videos[i][:, 1:], f"{at}.norm4"), questions[i // 2]
            c = cross(patches, towers.norm(question, f"{at}.norm5"), frames, f"{at}.crossattn")
            b = c if b is None else c + b
            b = b + towers.divided(towers.norm(b, f"{at}.norm7"), f"{at}.bridgeattn", frames, "space", key_mask)
            b = b + towers.mlp(towers.norm(b, f"{at}.norm6"), f"{at}.bridge_mlp")
        assert b is not None
        return towers.linear(towers.norm(b[:, 0], "bridge.norm"), "bridge_proj")

    def texts(batch: dict[str, Any], key: str) -> dict[str, Tensor]:
        return {name: tensor.to(batch["video"].device) for name, tensor in tokenize(batch[key]).items()}

    def loss(batch: dict[str, Any]) -> Tensor:
        states = towers.clip_states(batch["video"])
        clip = towers.linear(towers.norm(states[-1][:, 0], "encoder.video_encoder.norm"), "encoder.video_proj")
        question = texts(batch, "question")
        answered = bridge(states, towers.text_states(question), question["attention_mask"], batch["video"].shape[1])
        answer = towers.caption(towers.text_states(texts(batch, "answer")))
        caption = towers.caption(towers.text_states(batch["text"]))
        return nce(caption, clip, temperature) + nce(answer, answered, temperature)

    return loss
