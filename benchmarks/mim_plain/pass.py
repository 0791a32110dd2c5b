"""PASS's step: DINO's with part tokens, crops of three areas, four heads, four centres and 44 terms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_mim.distillation import ProjectionHead
from bowerbird_mim.part_aware import PartAwareLoss, PartAwareNetwork, PartSelfDistillation, branch_names
from bowerbird_mim.part_vit import PartTokenViT, PartViTEncoder
from bowerbird_mim.vit import ViTEncoder
from mim_plain.dino import CENTER_MOMENTUM, HEAD, MOMENTUM, STUDENT_TEMP, TEACHER_TEMP, plain_head
from mim_plain.vit import BATCH, SIZES, PlainViT

PARTS, LOCALS = 3, 3
LOCAL_SIDE = {"small": 16, "tiny": 96}


class PlainPartViT(PlainViT):
    """With part tokens and their positions in two lists; the first row of the table is the class token's."""

    def __init__(self, size: str, vit: PartTokenViT) -> None:
        super().__init__(**SIZES[size])
        state = vit.state_dict()
        self.part_tokens = nn.ParameterList(state.pop(f"part_token{j}") for j in range(1, PARTS + 1))
        self.part_positions = nn.ParameterList(state.pop(f"part{j}_pos") for j in range(1, PARTS + 1))
        state["pos_embed"] = torch.cat([state.pop("cls_pos"), state["pos_embed"]], dim=1)
        assert not self.load_state_dict(state, strict=False).unexpected_keys

    def leading(self, images: Tensor, parts: list[int]) -> Tensor:
        """Class token and part tokens after the final norm, ``(B, 1 + P, D)``."""
        x = self.patch_embed(images)
        table, side = self.pos_embed[:, 1:], images.shape[-1] // self.patch_embed.proj.kernel_size[0]
        own = round(table.shape[1] ** 0.5)
        if side != own:
            table = table.reshape(1, own, own, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, scale_factor=(side + 0.1) / own, mode="bicubic").flatten(2).transpose(1, 2)
        first = [self.cls_token + self.pos_embed[:, :1]]
        first += [self.part_tokens[j] + self.part_positions[j] for j in parts]
        x = torch.cat([token.expand(len(x), -1, -1) for token in first] + [x + table], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, : 1 + len(parts)]


def plain_loss(student: list[list[Tensor]], targets: list[list[Tensor]]) -> Tensor:
    """The mean over all terms of all branches: every branch has its views, the first two of which have targets."""
    total, terms = student[0][0].new_zeros(()), 0
    for views, wanted in zip(student, targets, strict=True):
        for i, target in enumerate(wanted):
            for v, view in enumerate(views):
                if v != i:
                    total = total - (target * (view / STUDENT_TEMP).log_softmax(dim=-1)).sum(dim=-1).mean()
                    terms += 1
    return total / terms


def plain_pass(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    plain = ViTEncoder(**SIZES[size], position="learned", pooling="class", init="truncated")
    encoder = PartViTEncoder(PartTokenViT(plain, PARTS), "cat")
    outputs, hidden, bottleneck = HEAD[size]
    names, dim = branch_names(PARTS), encoder.vit.embed_dim
    network = PartAwareNetwork(encoder, {name: ProjectionHead(dim, outputs, hidden, bottleneck) for name in names})
    loss = PartAwareLoss(outputs, PARTS, STUDENT_TEMP, TEACHER_TEMP, CENTER_MOMENTUM, defer_center=True)
    ours = PartSelfDistillation(network, loss, MOMENTUM)
    batch, side = BATCH[size] // (1 if size == "small" else 4), SIZES[size]["image_size"]
    large = torch.randn(batch, 2, 3, side, side)
    small = torch.randn(batch, PARTS * LOCALS, 3, LOCAL_SIDE[size], LOCAL_SIDE[size])

    heads = nn.ModuleList(plain_head(network.heads[name], dim, size) for name in names)
    student = nn.ModuleDict({"vit": PlainPartViT(size, encoder.vit), "heads": heads})
    teacher, centers = copy.deepcopy(student).requires_grad_(False), torch.zeros(1 + PARTS, 1, outputs)

    def our_step() -> Tensor:
        ours.zero_grad(set_to_none=True)
        ours.loss.at_step(0)
        value = ours(large, small).loss
        value.backward()
        ours.loss.update_center()
        ours.teacher.update(ours.student, 0)
        return value.detach()

    def plain_step() -> Tensor:
        student.zero_grad(set_to_none=True)
        large_crops, all_parts = torch.cat(large.unbind(1)), list(range(PARTS))
        with torch.no_grad():
            seen = teacher["vit"].leading(large_crops, all_parts)
            logits = [head(seen[:, i]) for i, head in enumerate(teacher["heads"])]
            targets = [((t - c) / TEACHER_TEMP).softmax(dim=-1).chunk(2) for t, c in zip(logits, centers, strict=True)]
        whole = student["vit"].leading(large_crops, all_parts)
        of_areas = [
            student["vit"].leading(torch.cat(small[:, j * LOCALS : (j + 1) * LOCALS].unbind(1)), [j]) for j in all_parts
        ]
        rows = [torch.cat([whole[:, 0], *(area[:, 0] for area in of_areas)])]
        rows += [torch.cat([whole[:, 1 + j], of_areas[j][:, 1]]) for j in all_parts]
        views = [head(x).split(batch) for head, x in zip(student["heads"], rows, strict=True)]
        value = plain_loss(views, targets)
        value.backward()
        with torch.no_grad():
            for center, t in zip(centers, logits, strict=True):
                center.mul_(CENTER_MOMENTUM).add_(t.mean(dim=0, keepdim=True), alpha=1 - CENTER_MOMENTUM)
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.mul_(MOMENTUM).add_(theirs, alpha=1 - MOMENTUM)
        return value.detach()

    return our_step, plain_step
