"""UniVIP's step: two scenes and K instances through both networks, three terms with their transport, the average."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_mim.univip import Pooled, UniVIP, byol_head
from bowerbird_mim.vit import ViTEncoder
from mim_plain.dino import class_token
from mim_plain.vit import BATCH, SIZES, plain_vit

INSTANCES = {"small": (16, 4), "tiny": (96, 4)}  # side and number
HEAD = {"small": (256, 64), "tiny": (4096, 256)}  # hidden width, width
MOMENTUM, EPSILON, ITERATIONS = 0.99, 0.1, 50


def plain_head(in_dim: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out)
    )


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return F.cosine_similarity(x, y, dim=-1, eps=1e-12)


def masses(instances: Tensor, scene: Tensor) -> Tensor:
    """``(B, K)``, sum 1; uniform where no instance agrees with the scene."""
    agreement = torch.einsum("bkd,bd->bk", instances, scene).clamp(min=0)
    total = agreement.sum(dim=1, keepdim=True)
    uniform = torch.full_like(agreement, 1 / agreement.shape[1])
    return torch.where(total > 0, agreement / total.clamp(min=1e-30), uniform)


def transport(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Potentials in units of the cost, as the method's card and OTA write them."""
    log_rows, log_columns = (rows + 1e-8).log(), (columns + 1e-8).log()
    u, v = torch.ones_like(rows), torch.ones_like(columns)

    def scaled() -> Tensor:
        return (-cost + u[:, :, None] + v[:, None, :]) / EPSILON

    for _ in range(ITERATIONS):
        u = EPSILON * (log_rows - torch.logsumexp(scaled(), dim=2)) + u
        v = EPSILON * (log_columns - torch.logsumexp(scaled(), dim=1)) + v
    return scaled().exp()


def plain_univip(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    encoder = ViTEncoder(**SIZES[size], position="learned", pooling="class", init="truncated")
    (side, count), (hidden, out) = INSTANCES[size], HEAD[size]
    heads = byol_head(encoder.embed_dim, hidden, out), byol_head(out, hidden, out)
    ours = UniVIP(Pooled(encoder), *heads, count, momentum=MOMENTUM, epsilon=EPSILON, iterations=ITERATIONS)
    batch, full = BATCH[size] // (1 if size == "small" else 4), SIZES[size]["image_size"]
    scene_1, scene_2 = torch.randn(batch, 3, full, full), torch.randn(batch, 3, full, full)
    instances = torch.randn(batch, count, 3, side, side)

    online = nn.ModuleDict({"vit": plain_vit(encoder, size), "head": plain_head(encoder.embed_dim, hidden, out)})
    online["head"].load_state_dict(heads[0].state_dict())
    target = copy.deepcopy(online).requires_grad_(False)
    rest = nn.ModuleDict({"predictor": plain_head(out, hidden, out), "linear": nn.Linear(count * out, out)})
    rest["predictor"].load_state_dict(heads[1].state_dict())
    rest["linear"].load_state_dict(ours.instance_linear.state_dict())

    def project(network: nn.ModuleDict, images: Tensor) -> Tensor:
        return network["head"](class_token(network["vit"], images))

    def our_step() -> Tensor:
        ours.zero_grad(set_to_none=True)
        loss = ours(scene_1, scene_2, instances).loss
        loss.backward()
        ours.update_target(0)
        return loss.detach()

    def plain_step() -> Tensor:
        online.zero_grad(set_to_none=True)
        rest.zero_grad(set_to_none=True)
        crops = instances.flatten(0, 1)
        with torch.no_grad():
            t1, t2, t = (project(target, images) for images in (scene_1, scene_2, crops))
        p1, p2, o = (rest["predictor"](project(online, images)) for images in (scene_1, scene_2, crops))
        scene = -(cosine(p1, t2) + cosine(p2, t1)).mean()
        together = rest["linear"](o.reshape(batch, -1))
        affinity = -(cosine(together, t1) + cosine(together, t2)).mean()
        o, t = o.reshape(batch, count, -1), t.reshape(batch, count, -1)
        cosines = F.normalize(o, dim=2) @ F.normalize(t, dim=2).transpose(1, 2)
        with torch.no_grad():
            plan = transport(1 - cosines, masses(o, (t1 + t2) / 2), masses(t, (p1 + p2) / 2))
        loss = scene + affinity - (plan * cosines).sum(dim=(1, 2)).mean()
        loss.backward()
        with torch.no_grad():
            for theirs, own in zip(target.parameters(), online.parameters(), strict=True):
                theirs.mul_(MOMENTUM).add_(own, alpha=1 - MOMENTUM)
        return loss.detach()

    return our_step, plain_step
