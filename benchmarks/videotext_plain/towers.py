"""The two halves of a dual encoder in plain torch, on the parameters of ``encoder``, which are read by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Towers:
    """``own``: parameters by name; ``encoder``: for its sizes only."""

    def __init__(self, own: Mapping[str, Tensor], encoder: Any) -> None:
        self.own = own
        video, text = encoder.video_encoder, encoder.text_encoder
        self.depth, self.heads, self.patch = video.depth, video.num_heads, video.patch_size
        self.text_depth, self.text_heads = text.depth, text.blocks[0].heads

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.own[f"{name}.weight"], self.own[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.own[f"{name}.weight"], self.own[f"{name}.bias"], eps)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    # ------------------------------------------------------------------------------------------------ clips

    def divided(self, x: Tensor, name: str, frames: int, axis: str, key_mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        count, heads = (length - 1) // frames, self.heads
        qkv = self.linear(x, f"{name}.qkv").view(batch, length, 3, heads, dim // heads)
        q, k, v = qkv.unbind(2)
        mask = None if key_mask is None else key_mask[:, None, None]
        first = F.scaled_dot_product_attention(
            q[:, :1].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        ).transpose(1, 2)

        def grouped(t: Tensor, with_first: bool) -> Tensor:  # (B, groups, n or T, h, d)
            own = t[:, 1:].view(batch, frames, count, heads, -1)
            if axis == "time":
                own = own.transpose(1, 2)
            if with_first:
                own = torch.cat([t[:, None, :1].expand(-1, own.shape[1], -1, -1, -1), own], 2)
            return own.flatten(0, 1).transpose(1, 2)

        if key_mask is not None:  # of the frames
            own_mask = key_mask[:, 1:].view(batch, frames, count)
            mask = torch.cat([key_mask[:, :1, None].expand(-1, frames, -1), own_mask], 2).flatten(0, 1)[:, None, None]
        others = F.scaled_dot_product_attention(
            grouped(q, False), grouped(k, True), grouped(v, True), attn_mask=mask
        ).transpose(1, 2)
        others = others.reshape(batch, -1, others.shape[1], heads, dim // heads)
        if axis == "time":
            others = others.transpose(1, 2)
        return self.linear(torch.cat([first, others.flatten(1, 2)], 1).flatten(2), f"{name}.proj")

    def embed(self, video: Tensor, at: str, mask: Tensor | None = None) -> Tensor:
        batch, frames = video.shape[:2]
        maps = F.conv2d(
            video.flatten(0, 1),
            self.own[f"{at}.patch_embed.proj.weight"],
            self.own[f"{at}.patch_embed.proj.bias"],
            stride=self.patch,
        )
        patches = maps.flatten(2).transpose(1, 2).unflatten(0, (batch, frames))
        if mask is not None:
            patches = torch.where(mask[..., None], self.own[f"{at}.mask_token"], patches)
        positions = self.own[f"{at}.pos_embed"]
        patches = patches + positions[:, None, 1:]
        if f"{at}.temporal_embed" in self.own:
            patches = patches + self.own[f"{at}.temporal_embed"][:, :frames, None]
        first = (self.own[f"{at}.cls_token"] + positions[:, :1]).expand(batch, -1, -1)
        return torch.cat([first, patches.flatten(1, 2)], 1)

    def block(self, x: Tensor, name: str, frames: int) -> Tensor:
        u = x
        if f"{name}.norm3.weight" in self.own:
            u = x + self.divided(self.norm(x, f"{name}.norm3"), f"{name}.timeattn", frames, "time")
        y = x + self.divided(self.norm(u, f"{name}.norm1"), f"{name}.attn", frames, "space")
        return y + self.mlp(self.norm(y, f"{name}.norm2"), f"{name}.mlp")

    def clip_states(self, video: Tensor, at: str = "encoder.video_encoder", mask: Tensor | None = None) -> list[Tensor]:
        states = [self.embed(video, at, mask)]
        for i in range(self.depth):
            states.append(self.block(states[-1], f"{at}.blocks.{i}", video.shape[1]))
        return states

    # ------------------------------------------------------------------------------------------------ captions

    def text_states(self, text: Mapping[str, Tensor], at: str = "encoder.text_encoder") -> list[Tensor]:
        ids, keys = text["input_ids"], text["attention_mask"].bool()[:, None, None]
        x = F.embedding(ids, self.own[f"{at}.embeddings.weight"]) + self.own[f"{at}.positions"][:, : ids.shape[1]]
        states = [x]
        for i in range(self.text_depth):
            name = f"{at}.blocks.{i}"
            qkv = self.linear(self.norm(x, f"{name}.norm1", 1e-5), f"{name}.qkv")
            q, k, v = qkv.unflatten(2, (3, self.text_heads, -1)).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
            x = x + self.linear(seen, f"{name}.proj")
            x = x + self.mlp(self.norm(x, f"{name}.norm2", 1e-5), name)
            states.append(self.norm(x, f"{at}.norm", 1e-5) if i + 1 == self.text_depth else x)
        return states

    def caption(self, states: list[Tensor]) -> Tensor:
        return self.linear(states[-1][:, 0].relu(), "encoder.text_proj")


def nce(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(rows, dim=1, eps=1e-8) @ F.normalize(columns, dim=1, eps=1e-8).T / temperature
    own = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
