"""DemoVLP's step: cells of a grid as regions, two transformers, contrast, alignment of regions and words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align


def plain(objective: Any) -> Callable[[dict[str, Any]], Tensor]:
    own = dict(objective.named_parameters())
    settings, config = objective.encoder.config, objective.config
    rows, columns = settings.extractor.grid
    heads, count = settings.num_heads, min(rows * columns, settings.regions_per_frame)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, own[f"{name}.weight"], own.get(f"{name}.bias"))

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], eps)

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}fc1")), f"{name}fc2")

    @torch.no_grad()
    def regions(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, frames, _, height, width = video.shape
        y, x = torch.arange(rows) / rows, torch.arange(columns) / columns
        left_top = torch.stack([x.repeat(rows), y.repeat_interleave(columns)], 1)
        sides = torch.tensor([1 / columns, 1 / rows])
        cells = torch.cat([left_top, left_top + sides], 1)
        boxes = (cells * torch.tensor([width, height, width, height]))[:count]
        pixels = roi_align(video.flatten(0, 1), [boxes] * (batch * frames), settings.extractor.cell, 1.0, 2, True)
        features = (2 * pixels - 1).reshape(batch, frames, count, -1)
        fill = settings.regions_per_frame - count  # the last one is repeated, not valid
        features = torch.cat([features, features[:, :, -1:].expand(-1, -1, fill, -1)], 2)
        places = torch.cat([cells, sides.expand(len(cells), 2)], 1)[:count]
        places = torch.cat([places, places[-1:].expand(fill, -1)]).expand(batch, frames, -1, -1)
        valid = torch.arange(count + fill) < count
        return features, places, valid & video.flatten(2).any(2)[..., None]

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2)

    def region_block(x: Tensor, name: str, frames: int, mask: Tensor) -> Tensor:
        batch, length, dim = x.shape
        n = (length - 1) // frames
        q, k, v = linear(norm(x, f"{name}.norm1", 1e-6), f"{name}.attn.qkv").view(batch, length, 3, heads, -1).unbind(2)
        first = attention(q[:, :1], k, v, mask)

        def own_frame(t: Tensor) -> Tensor:
            shared = t[:, None, :1].expand(-1, frames, *[-1] * (t.ndim - 1))
            return torch.cat([shared, t[:, 1:].unflatten(1, (frames, n))], 2).flatten(0, 1)

        others = attention(q[:, 1:].reshape(batch * frames, n, heads, -1), own_frame(k), own_frame(v), own_frame(mask))
        seen = torch.cat([first, others.reshape(batch, frames * n, heads, -1)], 1).reshape(batch, length, dim)
        x = x + linear(seen, f"{name}.attn.proj")
        return x + mlp(norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.")

    def videos(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        at = "encoder.region_encoder"
        features, places, valid = regions(batch["video"])
        frames = features.shape[1]
        x = linear(features, f"{at}.object_embedding") + linear(places, f"{at}.pos_embedding")
        x = (x + own[f"{at}.temporal_embed"][:, :frames, None]).flatten(1, 2)
        first = (own[f"{at}.cls_token"] + own[f"{at}.cls_position"]).expand(len(x), -1, -1)
        valid = valid.flatten(1)
        mask = F.pad((valid.float() - 1) * 100, (1, 0))
        x = torch.cat([first, x], 1)
        for i in range(settings.depth):
            x = region_block(x, f"{at}.blocks.{i}", frames, mask)
        return linear(x, f"{at}.proj"), valid

    def texts(text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        at, ids, mask = "encoder.text_encoder", text["input_ids"], text["attention_mask"].bool()
        x = F.embedding(ids, own[f"{at}.embeddings.weight"]) + own[f"{at}.positions"][:, : ids.shape[1]]
        for i in range(settings.text_depth):
            name = f"{at}.blocks.{i}"
            qkv = linear(norm(x, f"{name}.norm1", 1e-5), f"{name}.qkv")
            q, k, v = qkv.unflatten(2, (3, settings.text_heads, -1)).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
            x = x + linear(seen.transpose(1, 2).flatten(2), f"{name}.proj")
            x = x + mlp(norm(x, f"{name}.norm2", 1e-5), f"{name}.")
        x = norm(x, f"{at}.norm", 1e-5)
        return linear(x.relu(), "encoder.text_proj"), mask[:, 1:]

    def one_way(pairs: Tensor, queries: Tensor, asks: Tensor, context: Tensor, there: Tensor) -> Tensor:
        """Mean cosine of queries ``(J, Q, P)`` with what they find in ``context (I, X, P)``: ``(I, J)``."""
        pairs = pairs * asks[None, :, :, None]
        pairs = pairs / (pairs.norm(dim=2, keepdim=True) + 1e-8)
        weights = (pairs * settings.scale).masked_fill(~there[:, None, None], -torch.inf).softmax(-1)
        if settings.focal:
            kept = weights * there.sum(1)[:, None, None, None] > weights.sum(-1, keepdim=True)
            weights = weights * (kept | ~kept.any(-1, keepdim=True))
            weights = weights / weights.sum(-1, keepdim=True)
        unit = context / (context.norm(dim=-1, keepdim=True) + 1e-8)
        found = torch.einsum("ijqx,ixp->ijqp", weights, unit)
        cosines = F.cosine_similarity(queries, found, dim=-1)
        return (cosines * asks).sum(-1) / asks.sum(-1)

    def loss(batch: dict[str, Any]) -> Tensor:
        (video, region_valid), (text, word_valid) = videos(batch), texts(batch["text"])
        logits = F.normalize(text[:, 0], dim=1) @ F.normalize(video[:, 0], dim=1).T / config.temperature
        target = torch.arange(len(video))
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        parts, words = video[:, 1:], text[:, 1:]
        units = [t / (t.norm(dim=-1, keepdim=True) + 1e-8) for t in (parts, words)]
        pairs = F.leaky_relu(torch.einsum("inp,jlp->ijnl", *units), 0.1)
        scores = one_way(pairs.transpose(2, 3), words, word_valid, parts, region_valid)
        scores = scores + one_way(pairs.transpose(0, 1), parts, region_valid, words, word_valid).T
        shares = (config.alignment_scale * scores).log_softmax(1)
        aligned = (shares.exp() * (shares - (torch.eye(len(shares)) + 1e-6).log())).sum() / len(shares)
        return contrast + config.alignment_weight * aligned

    return loss
