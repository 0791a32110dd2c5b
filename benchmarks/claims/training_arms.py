"""The arms of ract, unibct, bict and bt2 on the small digits. Each function runs one seed of one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from arms import Extra, Parts, Values, _mapped, _new, _old, _one_index, _prototypes, parts
from digits import World, make_world, mean_ap, minimise, mlp, settings, train, unit
from torch import Tensor, nn

from bowerbird.retrieval.curves import BackfillState, backfill_curve
from bowerbird.retrieval.flips import flips
from bowerbird.retrieval.metrics import PerQuery, RankedList, Relevance, average_precision, cmc
from bowerbird.upgrade.orders import class_means
from bowerbird_compat.bct import InfluenceLoss, build_prototypes
from bowerbird_compat.bict import ForwardCompatibleLoss, fit_forward_transform
from bowerbird_compat.bt2 import BasisTransformHead, BT2Loss
from bowerbird_compat.ract import CompatibleContrastiveLoss, backfill_order
from bowerbird_compat.unibct import PrototypeLoss, PrototypeRefresh, refine_prototypes

Array = np.ndarray


def hot_refresh(
    world: World, q_old: Array, q_new: Array, g_old: Array, g_new: Array, order: Array, steps: int
) -> Values:
    """New queries from the start on: mAP over the backfill, and flips against its start and against the old system."""
    relevance = Relevance.from_labels(world.query_labels.numpy(), world.gallery_labels.numpy())
    right: list[PerQuery] = []

    def metric(ranked: RankedList) -> PerQuery:
        # The first two are enough to know the first hit.
        right.append(cmc(RankedList(ranked.ids[:, :2], ranked.scores[:, :2]), relevance, 1))
        return average_precision(ranked, relevance)

    state = BackfillState.from_vectors(q_new, g_old, g_new, query_old=q_new)
    curve = backfill_curve(state, order, [i / steps for i in range(steps + 1)], metric)
    rates = [flips(right[0], now).nfr for now in right]
    before = _one_index(g_old, q_old, world)[1]
    return {
        "area": curve.area(),
        "nfr": float(np.mean(rates)),
        "nfr_max": max(rates),
        "nfr_old": float(np.mean([flips(before, now).nfr for now in right])),
        "falls": curve.negative_steps() / steps,
        "cross": float(curve.values[0]),
        "self": float(curve.values[-1]),
    }


# ----------------------------------------------------------------------------------------------------------- ract


def ract(plan: Mapping[str, Any], seed: int) -> Values:
    world = make_world(seed, **plan["data"])
    old, _ = _old(plan, world, seed)
    star = _new(plan, world, seed)
    q_old, g_old, steps = unit(old, world.queries), unit(old, world.gallery), plan["backfill"]["steps"]
    values = {
        "old.self": mean_ap(q_old, g_old, world),
        "star.self": mean_ap(unit(star, world.queries), unit(star, world.gallery), world),
        "star.cross": mean_ap(unit(star, world.queries), g_old, world),
    }
    with torch.no_grad():
        old_train = F.normalize(old(world.train))
    known = world.train_labels[world.old].numpy()
    centers = torch.tensor(class_means(old_train[world.old].numpy(), known.tolist()))
    random = np.random.default_rng(seed).permutation(len(g_old))
    vectors: dict[str, tuple[Array, Array]] = {}
    for arm in plan["arms"][2:]:
        name, order = arm["name"].partition("/")[0], random
        if "weight" in arm:
            loss = CompatibleContrastiveLoss(arm["temperature"], None, arm["new_to_new"], weight=arm["weight"])
            new = _new(plan, world, seed, lambda e, labels, at, loss=loss: loss(e, old_train[at], labels))
            vectors[name] = unit(new, world.queries), unit(new, world.gallery)
        elif arm["order"] == "oracle":
            turned = world.gallery_inverted.numpy()[random]
            order = np.concatenate([random[turned], random[~turned]])
        else:
            order = backfill_order(torch.tensor(g_old), centers, arm["order"]).numpy()
        queries, gallery = vectors[name]
        measured = hot_refresh(world, q_old, queries, g_old, gallery, order, steps)
        if "weight" not in arm:  # another order has the ends of the random one
            measured = {key: value for key, value in measured.items() if key not in ("cross", "self")}
        values |= {f"{arm['name']}.{key}": value for key, value in measured.items()}
    return values


# --------------------------------------------------------------------------------------------------------- unibct


def unibct(plan: Mapping[str, Any], seed: int) -> Values:
    data = dict(plan["data"])
    first, shuffled = data["old_classes"], data.pop("shuffled")
    world = make_world(seed, **data)
    old, _ = _old(plan, world, seed)
    g_old = unit(old, world.gallery)
    open_set = world.train_labels >= first
    images, clean = world.train[open_set], world.train_labels[open_set] - first
    generator = np.random.default_rng(seed)
    moved = generator.random(len(clean)) < shuffled
    labels = clean.clone()
    labels[torch.tensor(moved)] = clean[torch.tensor(generator.permutation(np.flatnonzero(moved)))]
    with torch.no_grad():
        old_train = old(images)

    options = {**settings(plan), "classes": 10 - first}
    warm_up, width, embed = plan["train"]["warm_up"], plan["train"]["new_width"], plan["train"]["embed_dim"]
    warmed = mlp(width, embed, seed + 10_000)
    train(warmed, images, labels, seed=seed + 10_000, **{**options, "epochs": warm_up})
    with torch.no_grad():
        new_train = warmed(images)
    truth = refine_prototypes(old_train, new_train, clean, lam=0.0).weight

    values: Values = {"old.self": mean_ap(unit(old, world.queries), g_old, world)}
    for arm in plan["arms"][1:]:
        loss: PrototypeLoss | None = None
        new, refresh = mlp(width, embed, seed + 10_000), None
        if "lam" in arm:
            refined = {key: arm[key] for key in ("lam", "temperature", "edges") if key in arm}
            made = refine_prototypes(old_train, new_train, labels, **refined)
            values |= {f"{arm['name']}.{key}": value for key, value in prototype_values(made.weight, truth).items()}
            loss = PrototypeLoss(made, plan["influence"]["scale"])
            refresh = PrototypeRefresh(
                loss, new, lambda: [(images, labels)], old_train, (warm_up, 2 * warm_up), **refined
            )
        values |= _towards(new, loss, refresh, warm_up, images, labels, world, g_old, arm["name"], seed, options)
    return values


def prototype_values(prototypes: Tensor, truth: Tensor) -> Values:
    """Means of the cosines of each class with its true mean (``cos``), and of all pairs of classes (``pairwise``)."""
    unit_rows = F.normalize(prototypes.double())
    between = (unit_rows @ unit_rows.T)[~torch.eye(len(prototypes), dtype=torch.bool)]
    cosines = F.cosine_similarity(prototypes.double(), truth.double())
    return {"cos": float(cosines.mean()), "pairwise": float(between.mean())}


def _towards(
    new: nn.Module,
    loss: PrototypeLoss | None,
    refresh: PrototypeRefresh | None,
    warm_up: int,
    images: Tensor,
    labels: Tensor,
    world: World,
    g_old: Array,
    name: str,
    seed: int,
    options: dict[str, Any],
) -> Values:
    """Training with prototypes after the warm-up (without them for ``loss=None``), and the two tests."""
    epoch = 0

    def begin(now: int) -> None:
        nonlocal epoch
        epoch = now
        if refresh is not None:
            refresh.on_epoch_start(now)

    def extra(embeddings: Tensor, of_batch: Tensor, _: Tensor) -> Tensor:
        return embeddings[:0].sum() if loss is None or epoch < warm_up else loss(embeddings, of_batch)

    train(new, images, labels, seed=seed + 10_000, extra=extra, before_epoch=begin, **options)
    queries = unit(new, world.queries)
    return {
        f"{name}.cross": mean_ap(queries, g_old, world),
        f"{name}.self": mean_ap(queries, unit(new, world.gallery), world),
    }


# ----------------------------------------------------------------------------------------------------------- bict


def bict(plan: Mapping[str, Any], seed: int) -> Values:
    data = dict(plan["data"])
    shares = data.pop("shares")
    world = make_world(seed, **data)
    widths, embed = plan["train"]["widths"], plan["train"]["embed_dim"]
    sizes = [round(share * len(world.train)) for share in shares]

    def model(step: int, before: nn.Module | None, weight: float) -> nn.Module:
        """Model ``step`` (0, 1, 2) with the first part of the images, compatible with the one before it."""
        images, labels = world.train[: sizes[step]], world.train_labels[: sizes[step]]
        extra: Extra | None = None
        if before is not None and weight:
            made = build_prototypes(before, [(images, labels)], 10, on_missing="skip")
            influence = InfluenceLoss(
                made.weight, made.class_map(), weight, normalize=True, scale=plan["influence"]["scale"]
            )
            extra = lambda e, y, _: influence(e, y)  # noqa: E731
        encoder = mlp(widths[step], embed, seed + 10_000 * step)
        return train(encoder, images, labels, seed=seed + 10_000 * step, extra=extra, **settings(plan))[0]

    first = model(0, None, 0.0)
    values: Values = {"first.q1/g1": mean_ap(unit(first, world.queries), unit(first, world.gallery), world)}
    rows = [np.arange(size) for size in sizes]
    for arm in plan["arms"][1:]:
        second = model(1, first, arm["weight"])
        third = model(2, second, arm["weight"])
        measured = lifted(plan["transform"], world, seed, [parts(m, world) for m in (first, second, third)], rows)
        values |= {f"{arm['name']}.{key}": value for key, value in measured.items()}
    return values


def lifted(
    transform: Mapping[str, Any], world: World, seed: int, models: Sequence[Parts], rows: Sequence[Array]
) -> Values:
    """The gallery of the first of three models, searched by the second and third as it is, and lifted to them.

    ``rows``: the training items of each model.
    """
    fit = dict(transform)
    loss = ForwardCompatibleLoss(temperature=fit.pop("temperature"))

    def lift(source: Array, target: Array, step: int) -> nn.Module:
        chosen = rows[step]
        labels = world.train_labels.numpy()[chosen]
        return fit_forward_transform(source[chosen], target[chosen], labels, loss=loss, seed=seed, **fit)

    (t1, _, g1), (t2, q2, _), (t3, q3, g3) = models
    psi12 = lift(t1, t2, 1)
    once = _mapped(psi12, g1)
    # The third model meets a gallery that was lifted once: its transform learns on vectors that were lifted, too.
    twice = _mapped(lift(_mapped(psi12, t1), t3, 2), once)
    direct = _mapped(lift(t1, t3, 2), g1)
    measured = {
        "q2/g1": mean_ap(q2, g1, world),
        "q2/psi(g1)": mean_ap(q2, once, world),
        "q3/g1": mean_ap(q3, g1, world),
        "q3/psi(psi(g1))": mean_ap(q3, twice, world),
        "q3/psi13(g1)": mean_ap(q3, direct, world),
        "q3/g3": mean_ap(q3, g3, world),
    }
    measured["gain2"] = measured["q2/psi(g1)"] - measured["q2/g1"]
    measured["gain3"] = measured["q3/psi(psi(g1))"] - measured["q3/g1"]
    return measured


# ------------------------------------------------------------------------------------------------------------ bt2


def bt2(plan: Mapping[str, Any], seed: int) -> Values:
    world = make_world(seed, **plan["data"])
    old, _ = _old(plan, world, seed)
    g_old, star = unit(old, world.gallery), None
    values: Values = {"old.self": mean_ap(unit(old, world.queries), g_old, world)}
    for arm in plan["arms"][1:]:
        if "added_dim" in arm:
            assert star is not None
            encoder: nn.Module = _basis_transform(plan, world, old, star, arm, seed)
        else:
            weight = arm.get("influence_weight")
            extra = None if weight is None else _prototypes(old, world, weight, plan["influence"]["scale"])
            encoder = _new(plan, world, seed, extra)
            star = encoder if weight is None else star
        queries, size = unit(encoder, world.queries), g_old.shape[1]
        values[f"{arm['name']}.cross"] = mean_ap(queries[:, :size], g_old, world)  # order does not depend on the norm
        values[f"{arm['name']}.self"] = mean_ap(queries, unit(encoder, world.gallery), world)
    return values


def _basis_transform(
    plan: Mapping[str, Any], world: World, old: nn.Module, star: nn.Module, arm: Mapping[str, Any], seed: int
) -> nn.Module:
    size = plan["train"]["embed_dim"]
    trunk = mlp(plan["train"]["new_width"], 2 * size, seed + 10_000)
    torch.manual_seed(seed + 10_000)
    weights = {key: value for key, value in plan["bt2"].items() if key != "scale"}
    head = BasisTransformHead(2 * size, size, size, arm["added_dim"], plan["bt2"]["scale"], num_classes=10)
    prototypes = build_prototypes(old, [(world.train, world.train_labels)], 10).weight
    loss = BT2Loss(prototypes, **weights, influence_scale=arm.get("influence_scale", 1.0))
    with torch.no_grad():
        old_train, star_train = F.normalize(old(world.train)), F.normalize(star(world.train))

    def total(chosen: Tensor) -> Tensor:
        out = head(trunk(world.train[chosen]))
        return loss(out, world.train_labels[chosen], old_train[chosen], star_train[chosen])["total"]

    minimise(total, [trunk, head], len(world.train), **settings(plan))
    return nn.Sequential(trunk, head.export()).eval()
