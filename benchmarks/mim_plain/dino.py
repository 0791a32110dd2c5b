"""DINO's step: teacher on two large crops, student on all, the sum over pairs of views, centre and moving average."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_mim.dino import ProjectionHead, SelfDistillation, SelfDistillationLoss
from bowerbird_mim.vit import ViTEncoder
from mim_plain.vit import BATCH, SIZES, PlainViT, plain_vit

HEAD = {"small": (256, 128, 64), "tiny": (4096, 2048, 256)}  # outputs, hidden width, bottleneck
LOCAL = {"small": (16, 4), "tiny": (96, 4)}  # side and number of small crops
MOMENTUM, STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM = 0.996, 0.1, 0.04, 0.9


class PlainHead(nn.Module):
    def __init__(self, dim: int, outputs: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        last = nn.Linear(bottleneck, outputs, bias=False)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        self.last_layer.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


def plain_head(head: ProjectionHead, dim: int, size: str) -> PlainHead:
    """With the weights of ``head``."""
    plain = PlainHead(dim, *HEAD[size])
    plain.mlp.load_state_dict(head.mlp.state_dict())
    with torch.no_grad():
        plain.last_layer.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        plain.last_layer.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    return plain


def class_token(vit: PlainViT, images: Tensor) -> Tensor:
    """Of pictures of any size: the table of positions is resized as in DINO's official code."""
    patches = vit.patch_embed(images)
    table, side = vit.pos_embed[:, 1:], images.shape[-1] // vit.patch_embed.proj.kernel_size[0]
    own = round(table.shape[1] ** 0.5)
    if side != own:
        table = table.reshape(1, own, own, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, scale_factor=(side + 0.1) / own, mode="bicubic").flatten(2).transpose(1, 2)
    return vit.encode(patches + table)[:, 0]


def plain_loss(student: Tensor, teacher: Tensor, center: Tensor, crops: int) -> Tensor:
    targets = ((teacher - center) / TEACHER_TEMP).softmax(dim=-1).chunk(2)
    views = (student / STUDENT_TEMP).chunk(crops)
    total, terms = student.new_zeros(()), 0
    for i, target in enumerate(targets):
        for v, view in enumerate(views):
            if v != i:
                total = total - (target * view.log_softmax(dim=-1)).sum(dim=-1).mean()
                terms += 1
    return total / terms


@torch.no_grad()
def plain_update(student: nn.Module, teacher: nn.Module, center: Tensor, logits: Tensor) -> None:
    center.mul_(CENTER_MOMENTUM).add_(logits.mean(dim=0, keepdim=True), alpha=1 - CENTER_MOMENTUM)
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.mul_(MOMENTUM).add_(theirs, alpha=1 - MOMENTUM)


def make_ours(size: str) -> SelfDistillation:
    encoder = ViTEncoder(**SIZES[size], position="learned", pooling="class", init="truncated")
    outputs, hidden, bottleneck = HEAD[size]
    head = ProjectionHead(encoder.embed_dim, outputs, hidden, bottleneck)
    loss = SelfDistillationLoss(outputs, STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM, defer_center=True)
    return SelfDistillation(encoder, head, loss, MOMENTUM)


def make_views(size: str) -> tuple[Tensor, Tensor]:
    batch, side = BATCH[size] // (1 if size == "small" else 4), SIZES[size]["image_size"]
    local_side, count = LOCAL[size]
    return torch.randn(batch, 2, 3, side, side), torch.randn(batch, count, 3, local_side, local_side)


def plain_dino(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    ours, (large, small) = make_ours(size), make_views(size)
    student = nn.ModuleDict(
        {
            "vit": plain_vit(ours.student.backbone, size),
            "head": plain_head(ours.student.head, ours.student.backbone.embed_dim, size),
        }
    )
    teacher, center = copy.deepcopy(student).requires_grad_(False), torch.zeros(1, HEAD[size][0])

    def our_step() -> Tensor:
        ours.zero_grad(set_to_none=True)
        ours.loss.at_step(0)
        loss = ours(large, small).loss
        loss.backward()
        ours.loss.update_center()
        ours.teacher.update(ours.student, 0)
        return loss.detach()

    def plain_step() -> Tensor:
        student.zero_grad(set_to_none=True)
        large_crops, small_crops = torch.cat(large.unbind(1)), torch.cat(small.unbind(1))
        with torch.no_grad():
            targets = teacher["head"](class_token(teacher["vit"], large_crops))
        tokens = [class_token(student["vit"], crops) for crops in (large_crops, small_crops)]
        loss = plain_loss(student["head"](torch.cat(tokens)), targets, center, 2 + small.shape[1])
        loss.backward()
        plain_update(student, teacher, center, targets)
        return loss.detach()

    return our_step, plain_step
