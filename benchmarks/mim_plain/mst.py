"""MST's step: DINO's, with the teacher's class attention, masked large crops, a decoder and the restoration."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bowerbird_mim.mst import GlobalImageDecoder, MaskedSelfDistillation
from mim_plain.dino import HEAD, class_token, make_ours, make_views, plain_head, plain_loss, plain_update
from mim_plain.vit import SIZES, Block, PlainViT, plain_vit

LOW_FRACTION, MASK_PROB, RESTORE_WEIGHT = 0.25, 0.5, 0.6


def block_and_attention(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """A block written out, with its attention, the usual way to read it."""
    attn = block.attn
    batch, length, dim = x.shape
    q, k, v = attn.qkv(block.norm1(x)).view(batch, length, 3, attn.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(dim // attn.heads)).softmax(dim=-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).reshape(batch, length, dim))
    return x + block.mlp(block.norm2(x)), weights


def teach(vit: PlainViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class tokens, and the class token's attention to the patches."""
    first = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([first, vit.embed(images)], 1)
    for block in vit.blocks[:-1]:
        x = block(x)
    x, weights = block_and_attention(vit.blocks[-1], x)
    return vit.norm(x)[:, 0], weights[:, :, 0, 1:].mean(dim=1)


def plain_decoder(dim: int, patch: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(patch))):
        narrower = max(16, dim // 2)
        layers += [nn.ConvTranspose2d(dim, narrower, 4, 2, 1, bias=False), nn.BatchNorm2d(narrower), nn.ReLU()]
        dim = narrower
    return nn.Sequential(*layers, nn.Conv2d(dim, 3, 3, padding=1))


def plain_mst(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    dino, (large, small) = make_ours(size), make_views(size)
    dim, patch = SIZES[size]["embed_dim"], SIZES[size]["patch_size"]
    decoder = GlobalImageDecoder(dim, patch)
    ours = MaskedSelfDistillation(dino, decoder, 1.0, RESTORE_WEIGHT, low_fraction=LOW_FRACTION, mask_prob=MASK_PROB)
    patches = (large.shape[-1] // patch) ** 2
    uniform = torch.rand(len(large), 2, patches)

    assert ours.mask_token is not None
    student = nn.ModuleDict(
        {
            "vit": plain_vit(dino.student.backbone, size),
            "head": plain_head(dino.student.head, dim, size),
        }
    )
    teacher, center = copy.deepcopy(student).requires_grad_(False), torch.zeros(1, HEAD[size][0])
    rest = nn.ModuleDict({"decoder": plain_decoder(dim, patch)})
    rest["decoder"].load_state_dict(decoder.layers.state_dict())
    mask_token = nn.Parameter(ours.mask_token.detach().clone())

    def our_step() -> Tensor:
        ours.zero_grad(set_to_none=True)
        dino.loss.at_step(0)
        loss = ours(large, small, uniform).loss
        loss.backward()
        dino.loss.update_center()
        dino.teacher.update(dino.student, 0)
        return loss.detach()

    def plain_step() -> Tensor:
        student.zero_grad(set_to_none=True)
        rest.zero_grad(set_to_none=True)
        mask_token.grad = None
        vit = student["vit"]
        images, small_crops = torch.cat(large.unbind(1)), torch.cat(small.unbind(1))
        with torch.no_grad():
            tokens, attention = teach(teacher["vit"], images)
            targets = teacher["head"](tokens)
            threshold = attention.sort(dim=1).values[:, math.floor(LOW_FRACTION * patches), None]
            mask = (attention < threshold) & (torch.cat(uniform.unbind(1)) < MASK_PROB)
        seen = torch.where(mask[..., None], mask_token, vit.patch_embed(images)) + vit.pos_embed[:, 1:]
        tokens = vit.encode(seen)
        logits = student["head"](torch.cat([tokens[:, 0], class_token(vit, small_crops)]))
        side = images.shape[-1] // patch
        restored = rest["decoder"](tokens[:, 1:].transpose(1, 2).reshape(len(images), -1, side, side))
        loss = plain_loss(logits, targets, center, 2 + small.shape[1])
        loss = loss + RESTORE_WEIGHT * (restored - images).abs().mean()
        loss.backward()
        plain_update(student, teacher, center, targets)
        return loss.detach()

    return our_step, plain_step
