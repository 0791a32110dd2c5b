"""MV-Former's step: features of a frozen network, learnt pooling, transformer over all entities, contrast in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(objective: Any) -> Callable[[dict[str, Any]], Tensor]:
    """Of the published form: static queries, one-hot rows behind the pooling, the first entity; without dropout."""
    own = dict(objective.named_parameters())
    settings, config = objective.encoder.config, objective.config
    network, blocks = objective.encoder.backbone.model, list(objective.encoder.backbone.blocks)
    entities, heads, hidden = settings.num_static, settings.heads, settings.hidden
    assert settings.dropout == 0 and settings.num_dynamic == 0 and blocks == sorted(blocks)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (hidden,), own[f"{name}.weight"], own[f"{name}.bias"])

    def batch_norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, None, None, own[f"{name}.weight"], own[f"{name}.bias"], training=True)

    @torch.no_grad()
    def features(frames: Tensor) -> Tensor:
        found = []
        for part in frames.split(settings.chunk):
            maps = network.forward_intermediates(part, indices=blocks, stop_early=True, intermediates_only=True)
            found.append(torch.cat(maps, 1).flatten(2).transpose(1, 2))
        return torch.cat(found)

    def positions(frames: int) -> Tensor:
        steps = torch.arange(frames, dtype=torch.float64)
        channel = torch.arange(hidden, dtype=torch.float64)
        angles = steps[:, None] / 10000 ** (channel / hidden)
        return torch.where(channel % 2 == 0, angles.sin(), angles.cos()).float()

    def embeddings(frames: Tensor, valid: Tensor) -> Tensor:
        clips, count = valid.shape
        x = features(frames.flatten(0, 1))
        keys, values = linear(x, "encoder.head.pooling.key"), linear(x, "encoder.head.pooling.value")
        queries = own["encoder.head.pooling.queries"] + own["encoder.head.pooling.query_bias"]
        tokens = (queries @ keys.transpose(1, 2) / keys.shape[2] ** 0.5).softmax(-1) @ values
        x = torch.cat([tokens, torch.eye(entities).expand(len(tokens), -1, -1)], 2).flatten(0, 1)
        for i in (1, 5):
            x = F.relu(batch_norm(linear(x, f"encoder.head.mlp.{i}"), f"encoder.head.mlp.{i + 1}"))
        x = linear(x, "encoder.head.to_hidden").view(clips, count, entities, hidden) + positions(count)[:, None]
        x = x.transpose(1, 2).reshape(clips, entities * count, hidden)
        seen = valid.repeat(1, entities)[:, None, None]
        for i in range(settings.layers):
            name = f"encoder.head.transformer.layers.{i}"
            y = layer_norm(x, f"{name}.norm1")
            qkv = F.linear(y, own[f"{name}.self_attn.in_proj_weight"], own[f"{name}.self_attn.in_proj_bias"])
            q, k, v = qkv.view(clips, -1, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
            x = x + linear(y, f"{name}.self_attn.out_proj")
            x = x + linear(F.relu(linear(layer_norm(x, f"{name}.norm2"), f"{name}.linear1")), f"{name}.linear2")
        return linear(x.view(clips, entities, count, hidden)[:, 0], "encoder.head.to_embedding")

    def loss(batch: dict[str, Any]) -> Tensor:
        clips, _, count = batch["times"].shape
        valid = batch["valid"].flatten(0, 1)
        z = embeddings(batch["views"].flatten(0, 1), valid).flatten(0, 1)
        z = linear(F.relu(batch_norm(linear(z, "head.layers.0"), "head.layers.1")), "head.layers.3")
        z = F.normalize(z, dim=1).view(clips, 2, count, -1)
        times, lengths = batch["times"].float(), batch["lengths"].float()
        total = z.new_zeros(())
        # Only frames of the other view count: one matrix per video and direction.
        for i, j in ((0, 1), (1, 0)):
            both = batch["valid"][:, i, :, None] & batch["valid"][:, j, None]
            moved = times[:, i] / lengths[:, i, None]
            distance = moved[:, :, None] * lengths[:, j, None, None] - times[:, j, None]
            target = (-(distance**2) / (2 * config.variance)).exp() * both
            target = target / target.sum(2, keepdim=True).clamp(min=1e-30)
            power = (z[:, i] @ z[:, j].transpose(1, 2) / config.temperature).exp()
            own_view = (z[:, i] @ z[:, i].transpose(1, 2) / config.temperature).exp()
            # Frames that are not there count with 1e-6, those of the own view and of other videos, too.
            alone = batch["valid"][:, i, :, None] & batch["valid"][:, i, None]
            normalizer = torch.where(both, power, 1e-6 * power).sum(2) + torch.where(alone, 0, 1e-6 * own_view).sum(2)
            p = power / normalizer[:, :, None]
            total = total + (torch.xlogy(target, target) - target * (p + 1e-6).log()).sum()
        return total / valid.sum()

    return loss
