"""All-in-one's step: hidden words, matching with the transport of words to patches, and contrast, each a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain(objective: Any) -> Callable[[dict[str, Any]], Tensor]:
    own = dict(objective.named_parameters())
    settings, config = objective.encoder.config, objective.config
    tokenizer = objective.encoder.tokenizer
    words_known, special, mask_id = len(tokenizer), tokenizer.special_ids, tokenizer.mask_id
    dim, depth, heads, divisor = settings.embed_dim, settings.depth, settings.num_heads, settings.roll_divisor

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, own[f"{name}.weight"], own[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, (dim,), own[f"{name}.weight"], own[f"{name}.bias"], eps)

    def embed_words(ids: Tensor) -> Tensor:
        at = "encoder.text_encoder"
        x = F.embedding(ids, own[f"{at}.word_embeddings.weight"])
        x = x + own[f"{at}.position_embeddings.weight"][: ids.shape[1]]
        x = norm(x + own[f"{at}.token_type_embeddings.weight"][0], f"{at}.LayerNorm", 1e-12)
        return x + own["encoder.transformer.token_type.weight"][0]

    def embed_frames(video: Tensor) -> Tensor:
        at = "encoder.transformer"
        batch, frames = video.shape[:2]
        patches = F.conv2d(
            video.flatten(0, 1),
            own[f"{at}.patch_embed.proj.weight"],
            own[f"{at}.patch_embed.proj.bias"],
            stride=settings.patch_size,
        )
        patches = patches.flatten(2).transpose(1, 2).view(batch, frames, -1, dim)
        positions = own[f"{at}.pos_embed"]
        patches = patches + positions[:, 1:] + own[f"{at}.temporal_embed"][:, :frames, None]
        first = (own[f"{at}.cls_token"] + positions[:, :1])[None].expand(batch, frames, -1, -1)
        return torch.cat([first, patches], 2) + own[f"{at}.token_type.weight"][1]

    def block(x: Tensor, name: str, mask: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        qkv = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
        q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, length, dim)
        x = x + linear(seen, f"{name}.attn.proj")
        return x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    def blocks(x: Tensor, mask: Tensor | None, frames: int = 1, words: int = 0) -> Tensor:
        for i in range(depth):
            if frames > 1:
                z = x.view(-1, frames, x.shape[1], dim)
                moved = (x.shape[1] - words) // divisor
                a, b = words + 1, x.shape[1]
                x = torch.cat(
                    [
                        z[:, :, :a],
                        z[:, :, a : a + moved].roll(1, 1),
                        z[:, :, a + moved : b - moved],
                        z[:, :, b - moved :].roll(-1, 1),
                    ],
                    2,
                ).flatten(0, 1)
            x = block(x, f"encoder.transformer.blocks.{i}", mask)
        return norm(x, "encoder.transformer.norm")

    def joint(video: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        frames, words = embed_frames(video), embed_words(ids)
        batch, count, patches, _ = frames.shape
        length = words.shape[1]
        x = torch.cat([words[:, None].expand(-1, count, -1, -1), frames], 2).flatten(0, 1)
        seen = torch.cat([mask.bool(), mask.new_ones(batch, patches, dtype=torch.bool)], 1)
        seen = seen.repeat_interleave(count, 0)[:, None, None]
        x = blocks(x, seen, count, length).view(batch, count, length + patches, dim).mean(1)
        return x[:, :length], x[:, length:]

    def hidden_words(batch: dict[str, Any]) -> Tensor:
        ids, mask = batch["text"]["input_ids"], batch["text"]["attention_mask"]
        free = mask.bool() & ~torch.isin(ids, torch.tensor(special))
        chosen = free & (torch.rand(ids.shape) < config.mask_probability)
        kind, others = torch.rand(ids.shape), torch.randint(words_known, ids.shape)
        changed = torch.where(chosen & (kind < 0.8), mask_id, ids)
        changed = torch.where(chosen & (kind >= 0.9), others, changed)
        x = joint(batch["video"], changed, mask)[0][chosen]
        x = norm(F.gelu(linear(x, "mlm.dense")), "mlm.norm", 1e-12)
        return F.cross_entropy(linear(x, "mlm.decoder"), ids[chosen])

    def transport(words: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
        real = mask.bool().clone()
        real[torch.arange(len(mask)), mask.sum(1) - 1] = False
        real[:, 0] = False
        cost = 1 - F.normalize(words, dim=-1) @ F.normalize(patches, dim=-1).transpose(1, 2)
        with torch.no_grad():
            there = real[:, None].float().expand(-1, patches.shape[1], -1)  # (B, N, M)
            kernel = (-cost.transpose(1, 2) / config.wpa_beta).exp() * there
            count = real.sum(1)[:, None, None]
            plan, s = there, real[:, :, None].float() / count
            for _ in range(config.wpa_iterations):
                q = kernel * plan
                d = 1 / (patches.shape[1] * (q @ s))
                s = real[:, :, None] / (count * (q.transpose(1, 2) @ d)).clamp(min=1e-30)
                plan = d * q * s.transpose(1, 2)
        return (cost * plan.transpose(1, 2)).sum((1, 2))

    def matching(batch: dict[str, Any]) -> Tensor:
        ids, mask, video = batch["text"]["input_ids"], batch["text"]["attention_mask"], batch["video"]
        count = len(video)
        others = (torch.arange(count) + torch.randint(1, count, (count,))) % count
        matched = torch.zeros(count, dtype=torch.bool)
        matched[torch.randperm(count)[: count // 2]] = True
        text, frames = joint(video[torch.where(matched, torch.arange(count), others)], ids, mask)
        pooled = linear(text[:, 0], "encoder.transformer.pooler").tanh()
        loss = F.cross_entropy(linear(pooled, "encoder.matching.fc"), matched.long())
        distance = transport(text, frames[:, 1:], mask)
        return loss + config.wpa_weight * torch.where(matched, distance, -distance).mean()

    def contrast(batch: dict[str, Any]) -> Tensor:
        at = "encoder.transformer"
        ids, mask, video = batch["text"]["input_ids"], batch["text"]["attention_mask"], batch["video"]
        texts = linear(blocks(embed_words(ids), mask.bool()[:, None, None]), f"{at}.txt_proj")[:, 0]
        frames = blocks(embed_frames(video).flatten(0, 1), None).view(*video.shape[:2], -1, dim).mean(1)
        videos = linear(frames, f"{at}.vid_proj")[:, 0]
        logits = F.normalize(texts, dim=1) @ F.normalize(videos, dim=1).T / config.temperature
        target = torch.arange(len(video))
        return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)

    return lambda batch: hidden_words(batch) + matching(batch) + contrast(batch)
