"""A training step with each loss of bowerbird-compat beside the same step with its formula written in plain torch.

python benchmarks/compat_losses.py --output benchmarks/results/compat_losses.json

Both steps: a trunk of two layers on cached features, a classifier, the loss, backward, Adam. They alternate in one
process, in huge pages that it keeps. The ratio is that of the shortest times of the processor, one thread: a busy
machine disturbs them less than the clock's.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_compat.bct import InfluenceLoss
from bowerbird_compat.bict import ForwardCompatibleLoss
from bowerbird_compat.bict_objective import BackwardContrast
from bowerbird_compat.bt2 import BasisTransformHead, BT2Loss
from bowerbird_compat.compatible_losses import (
    ClassLevelCompatibleLoss,
    CompatibleContrastiveLoss,
    CompatibleTripletLoss,
)
from bowerbird_compat.distillation import DistillationLoss, FocalDistillationLoss
from bowerbird_compat.online_backfilling import MetricCompatibleLoss, ReverseQueryTransform, TopK
from bowerbird_compat.unibct import PrototypeLoss
from common import HUGE_PAGES, start_again, write_result

LIMIT = 1.05
FEATURES, WIDTH, DIM, CLASSES = 1280, 512, 256, 1000
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # embeddings, old embeddings, labels


def contrastive(u: Tensor, o: Tensor, labels: Tensor, temperature: float, topk: int | None, *, ract: bool) -> Tensor:
    u, o = F.normalize(u), F.normalize(o)
    same = labels[:, None] == labels
    logits = [(u * o).sum(1, keepdim=True)]
    for keys in (o, u) if ract else (o,):
        block = (u @ keys.T).masked_fill(same, -torch.inf)
        logits.append(block if topk is None else block.topk(topk, dim=1).values)
    return F.cross_entropy(torch.cat(logits, 1) / temperature, torch.zeros(len(u), dtype=torch.int64))


def triplet(u: Tensor, o: Tensor, labels: Tensor, margin: float, topk: int) -> Tensor:
    u, o = F.normalize(u), F.normalize(o)
    same = labels[:, None] == labels
    positive = (u - o).norm(dim=1, keepdim=True)
    total = u.new_zeros(())
    for keys in (o, u):
        distance = torch.cdist(u, keys, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(same, torch.inf)
        nearest = distance.topk(topk, dim=1, largest=False).values
        total = total + (margin - nearest + positive).clamp(min=0).mean()
    return total


def metric_compatible(r: Tensor, o: Tensor, n: Tensor, labels: Tensor, temperature: float) -> Tensor:
    r, o, n = F.normalize(r), F.normalize(o), F.normalize(n)
    same = labels[:, None] == labels
    old, new = r @ o.T / temperature, n @ n.T / temperature
    positive = old.masked_fill(~same, -torch.inf)
    rest = [old.masked_fill(same, -torch.inf), new.masked_fill(same, -torch.inf)]
    term = torch.cat([positive, *rest], 1).logsumexp(1) - positive.logsumexp(1)
    return (1 - (r * o).sum(1)).mean() + term.mean()


def learnable(r: Tensor, o: Tensor, n: Tensor, labels: Tensor, temperature: float, topk: int | None) -> Tensor:
    r, o, n = F.normalize(r), F.normalize(o), F.normalize(n)
    same = labels[:, None] == labels
    logits = [r @ o.T / temperature, n @ n.T / temperature]
    negatives = [block.masked_fill(same, -torch.inf) for block in logits]
    if topk is not None:
        negatives = [block.topk(topk, dim=1).values for block in negatives]
    partner = same & ~torch.eye(len(labels), dtype=torch.bool)
    total = (1 - (r * o).sum(1)).mean()
    for block, positive in zip(logits, (same, partner), strict=True):
        rows = positive.any(1)
        if rows.any():
            first = block.masked_fill(~positive, -torch.inf)
            term = torch.cat([first, *negatives], 1).logsumexp(1)[rows] - first[rows].logsumexp(1)
            total = total + term.mean()
    return total


def class_level(e: Tensor, labels: Tensor, old_rows: Tensor, new_rows: Tensor) -> Tensor:
    others = (e @ new_rows.T).scatter(1, labels[:, None], -torch.inf)
    return F.cross_entropy(torch.cat([e @ old_rows.T, others], 1), labels)


def distillation(e: Tensor, o: Tensor, rows: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(e @ rows.T / temperature, (o @ rows.T / temperature).softmax(1))


def focal(e: Tensor, o: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
    return ((1 + 5.0 * (logits.argmax(1) == labels)) * (e - o).square().mean(1)).mean()


def bt2_plain(head: BasisTransformHead, rows: Tensor, teacher: Tensor) -> Loss:
    def loss(h: Tensor, o: Tensor, labels: Tensor) -> Tensor:
        u = F.normalize(h[:, :DIM])
        free = F.normalize(F.linear(h.relu(), head.free.weight, head.free.bias))
        mixed = torch.cat([F.normalize(free[:, :32]), 2 * F.linear(u, head.new_basis.weight)], 1)
        b = F.linear(mixed[:, :DIM], head.old_basis.weight)
        torch.cat([b, mixed[:, DIM:]], 1)
        total = 10 * F.cross_entropy(F.normalize(b) @ rows.T, labels) + 5 * (1 - F.cosine_similarity(b, o).mean())
        return total + (1 - F.cosine_similarity(u, teacher).mean()) + F.cross_entropy(head.classifier(u), labels)

    return loss


def methods(batch: int) -> dict[str, tuple[Loss, Loss, nn.Module | None, int]]:
    """name -> ours, plain, a module that is trained, too, and the size of the embedding."""
    torch.manual_seed(0)
    rows, unit_rows = torch.randn(CLASSES, DIM), F.normalize(torch.randn(CLASSES, DIM))
    influence, prototype = InfluenceLoss(rows), PrototypeLoss(unit_rows, scale=16.0)
    ract, contra = CompatibleContrastiveLoss(0.05, 10), CompatibleContrastiveLoss(0.05, None, new_to_new=False)
    hinge, forward, mcl = CompatibleTripletLoss(0.8, 10), ForwardCompatibleLoss(), MetricCompatibleLoss()
    head = BasisTransformHead(2 * DIM, DIM, DIM, 32, num_classes=CLASSES)
    classifier, psi = nn.Linear(DIM, CLASSES, bias=False), ReverseQueryTransform(DIM, DIM)
    level, backward = ClassLevelCompatibleLoss(rows), BackwardContrast()
    joint, mined = MetricCompatibleLoss(0.1, True, True), MetricCompatibleLoss(0.1, True, True, TopK(10))
    lwf, focus, said = DistillationLoss(rows), FocalDistillationLoss(), torch.randn(batch, CLASSES)
    bt2, teacher, new = BT2Loss(unit_rows), F.normalize(torch.randn(batch, DIM)), torch.randn(batch, DIM)
    return {
        "bct": (lambda e, o, y: influence(e, y), lambda e, o, y: F.cross_entropy(e @ rows.T, y), None, DIM),
        "unibct": (
            lambda e, o, y: prototype(e, y),
            lambda e, o, y: F.cross_entropy(16 * F.normalize(e) @ unit_rows.T, y), None, DIM,
        ),
        "ract": (ract, lambda e, o, y: contrastive(e, o, y, 0.05, 10, ract=True), None, DIM),
        "ract, baseline": (contra, lambda e, o, y: contrastive(e, o, y, 0.05, None, ract=False), None, DIM),
        "ract, triplet": (hinge, lambda e, o, y: triplet(e, o, y, 0.8, 10), None, DIM),
        "ract, class level": (
            lambda e, o, y: level(e, y, classifier.weight),
            lambda e, o, y: class_level(e, y, rows, classifier.weight), classifier, DIM,
        ),
        "distillation": (lambda e, o, y: lwf(e, o), lambda e, o, y: distillation(e, o, rows, 0.01), None, DIM),
        "focal distillation": (
            lambda e, o, y: focus(e, o, y, said), lambda e, o, y: focal(e, o, y, said), None, DIM,
        ),
        "bict, backward": (backward, lambda e, o, y: contrastive(e, o, y, 0.01, None, ract=False), None, DIM),
        "bict, forward": (
            forward,
            lambda e, o, y: (1 - F.cosine_similarity(e, o)).mean() + contrastive(e, o, y, 0.1, None, ract=False),
            None, DIM,
        ),
        "online backfilling": (
            lambda e, o, y: mcl(e, o, new, y)["total"],
            lambda e, o, y: metric_compatible(e, o, new, y, 0.1), None, DIM,
        ),
        "online backfilling, learnable": (
            lambda e, o, y: joint(psi(F.normalize(e)), o, e, y)["total"],
            lambda e, o, y: learnable(psi(F.normalize(e)), o, e, y, 0.1, None), psi, DIM,
        ),
        "online backfilling, learnable, hard negatives": (
            lambda e, o, y: mined(psi(F.normalize(e)), o, e, y)["total"],
            lambda e, o, y: learnable(psi(F.normalize(e)), o, e, y, 0.1, 10), psi, DIM,
        ),
        "bt2": (
            lambda e, o, y: bt2(head(e), y, o, teacher)["total"], bt2_plain(head, unit_rows, teacher), head, 2 * DIM,
        ),
    }  # fmt: skip


def step_of(loss: Loss, more: nn.Module | None, dim: int, batch: int) -> Callable[[], float]:
    torch.manual_seed(1)
    trunk = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, dim))
    classifier = nn.Linear(dim, CLASSES)
    parameters = [*trunk.parameters(), *classifier.parameters(), *(more.parameters() if more is not None else ())]
    optimiser = torch.optim.Adam(parameters, lr=1e-4)
    features, old, labels = torch.randn(batch, FEATURES), torch.randn(batch, DIM), torch.randint(CLASSES, (batch,))

    def step() -> float:
        embeddings = trunk(features)
        total = F.cross_entropy(classifier(embeddings), labels) + loss(embeddings, old, labels)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        return float(total.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    start_again(HUGE_PAGES)
    torch.set_num_threads(1)
    results = {}
    for name, (ours, plain, more, dim) in methods(args.batch).items():
        same = copy.deepcopy(more.state_dict()) if more is not None else None
        steps = [step_of(loss, more, dim, args.batch) for loss in (ours, plain)]
        first = [0.0, 0.0]
        for side in (0, 1):
            if more is not None and same is not None:
                more.load_state_dict(same)
            first[side] = steps[side]()
        assert abs(first[0] - first[1]) < 1e-3 * abs(first[1]), f"{name}: {first} are not the same loss"
        times: list[list[float]] = [[], []]
        for repeat in range(args.repeats):
            for side in (0, 1) if repeat % 2 else (1, 0):
                start = time.process_time()
                steps[side]()
                times[side].append(time.process_time() - start)
        best = [min(values) * 1000 for values in times]
        results[name] = {
            "ours_ms": round(best[0], 3),
            "plain_ms": round(best[1], 3),
            "ratio": round(best[0] / best[1], 4),
        }
        print(name, results[name], flush=True)
    ratios = [entry["ratio"] for entry in results.values()]
    write_result(
        "compat_losses",
        {"limit_ratio": LIMIT, "batch": args.batch, "within_limit": max(ratios) <= LIMIT, "methods": results},
        out=args.output,
    )


if __name__ == "__main__":
    main()
