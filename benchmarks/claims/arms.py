"""The arms of the claims, in plain use of ``bowerbird_compat``. Each function runs one seed of one plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from digits import World, make_world, mean_ap, mlp, ranking_metrics, settings, train, unit
from torch import Tensor, nn

from bowerbird.retrieval.flips import flips
from bowerbird.retrieval.index import ExactIndex
from bowerbird_compat.bct import InfluenceLoss, build_prototypes
from bowerbird_compat.online_backfilling import (
    MetricCompatibleLoss,
    MixedGallery,
    TopK,
    backfill,
    fit_metric_compatible,
    fit_reverse_transform,
)

Values = dict[str, float]
Array = np.ndarray
Extra = Callable[[Tensor, Tensor, Tensor], Tensor]  # (embeddings, labels, positions) -> scalar


def _old(plan: Mapping[str, Any], world: World, seed: int) -> tuple[nn.Module, nn.Linear]:
    encoder = mlp(plan["train"]["old_width"], plan["train"]["embed_dim"], seed)
    return train(encoder, world.train[world.old], world.train_labels[world.old], seed=seed, **settings(plan))


def _new(plan: Mapping[str, Any], world: World, seed: int, extra: Extra | None = None) -> nn.Module:
    """A new encoder on all training images, whose weights start from another seed than the old one's."""
    encoder = mlp(plan["train"]["new_width"], plan["train"]["embed_dim"], seed + 10_000)
    return train(encoder, world.train, world.train_labels, seed=seed + 10_000, extra=extra, **settings(plan))[0]


def _prototypes(old: nn.Module, world: World, weight: float, scale: float) -> Extra:
    made = build_prototypes(old, [(world.train, world.train_labels)], 10)
    influence = InfluenceLoss(made.weight, made.class_map(), weight, normalize=True, scale=scale)
    return lambda embeddings, labels, _: influence(embeddings, labels)


def _old_classifier(classifier: nn.Linear, weight: float) -> Extra:
    influence = InfluenceLoss(classifier.weight, weight=weight)
    return lambda embeddings, labels, _: influence(embeddings, labels)


def _regression(old: nn.Module, world: World, weight: float) -> Extra:
    with torch.no_grad():
        targets = old(world.train)
    return lambda embeddings, _, positions: weight * F.mse_loss(embeddings, targets[positions])


def bct(plan: Mapping[str, Any], seed: int) -> Values:
    """``world.arm.cross`` and ``world.arm.self``: mAP."""
    values: Values = {}
    for name, options in plan["worlds"].items():
        world = make_world(seed, **plan["data"], **options)
        old, classifier = _old(plan, world, seed)
        old_gallery = unit(old, world.gallery)
        values[f"{name}.old.self"] = mean_ap(unit(old, world.queries), old_gallery, world)
        for arm in plan["arms"][1:]:
            extra = None
            if "l2_weight" in arm:
                extra = _regression(old, world, arm["l2_weight"])
            elif arm.get("real"):
                # Its rows of classes without training images mean nothing: only the seen ones are used.
                known = world.train_labels[world.old].unique()
                seen = nn.Linear(classifier.in_features, len(known), bias=False)
                seen.weight.data = classifier.weight.data[known]
                extra = _old_classifier(seen, arm["influence_weight"])
            elif "influence_weight" in arm:
                extra = _prototypes(old, world, arm["influence_weight"], plan["influence"]["scale"])
            new = _new(plan, world, seed, extra)
            queries = unit(new, world.queries)
            values[f"{name}.{arm['name']}.cross"] = mean_ap(queries, old_gallery, world)
            values[f"{name}.{arm['name']}.self"] = mean_ap(queries, unit(new, world.gallery), world)
    return values


# ------------------------------------------------------------------------------------------------ online backfilling


def _curve(
    world: World, gallery_old: Array, gallery_new: Array, q_old: Array, q_new: Array, order: Array, step: int
) -> tuple[Array, list[Array]]:
    """mAP, and per query whether the first hit is right, at every fraction of the backfill."""
    old, n = ExactIndex(), len(gallery_old)
    old.add(np.arange(n), gallery_old)
    gallery = MixedGallery(old, ExactIndex())
    points = []

    def measure(_: object = None) -> None:
        points.append(ranking_metrics(gallery.search(q_old, q_new, n).ids, world))

    measure()
    for _ in backfill(lambda ids: gallery.move(ids, gallery_new[ids]), order, batch_size=step, on_step=measure):
        pass
    return np.array([np.mean(p["ap"]) for p in points]), [p["right"] for p in points]


Parts = tuple[Array, Array, Array]  # unit vectors of the training items, the queries and the gallery


def parts(encoder: nn.Module, world: World) -> Parts:
    return unit(encoder, world.train), unit(encoder, world.queries), unit(encoder, world.gallery)


def online_backfilling(plan: Mapping[str, Any], seed: int) -> Values:
    """``arm.start``, ``end``, ``area``, ``gain``, ``nfr`` for every arm; ``old.self`` and ``star.self``: mAP."""
    world = make_world(seed, **plan["data"])
    old, _ = _old(plan, world, seed)
    star = _new(plan, world, seed)
    compatible = _new(plan, world, seed, _prototypes(old, world, 10.0, 16.0))
    return served(plan, world, seed, parts(old, world), parts(star, world), parts(compatible, world))


def served(plan: Mapping[str, Any], world: World, seed: int, old: Parts, star: Parts, compatible: Parts) -> Values:
    """Every way to serve the old model, the free new one (``star``) and a compatible one while the gallery changes."""
    step, fit = plan["backfill"]["batch_size"], dict(plan["transform"])
    temperature = fit.pop("temperature")
    order = np.random.default_rng(seed).permutation(len(world.gallery))

    (old_train, q_old, g_old), (new_train, q_new, g_new) = old, star
    labels = world.train_labels.numpy()
    reverse = {
        "rqt": fit_reverse_transform(new_train, old_train, seed=seed, **fit),
        "rqt-cl": fit_reverse_transform(
            new_train, old_train, labels, seed=seed, loss=MetricCompatibleLoss(temperature, False), **fit
        ),
        "rqt-mcl": fit_reverse_transform(
            new_train, old_train, labels, seed=seed, loss=MetricCompatibleLoss(temperature), **fit
        ),
        "rqt-mcl-hard": fit_reverse_transform(
            new_train, old_train, labels, seed=seed, loss=MetricCompatibleLoss(temperature, mining=TopK(10)), **fit
        ),
    }
    joint = {
        name: fit_metric_compatible(
            new_train, old_train, labels, seed=seed, loss=MetricCompatibleLoss(temperature, cross, True), **fit
        )
        for name, cross in (("joint-cl", False), ("joint-mcl", True))
    }
    rho = joint["joint-mcl"][0]
    served = {  # arm -> new gallery, queries for the old part, queries for the new part
        "naive": (g_new, q_new, q_new),
        "bct": (compatible[2], compatible[1], compatible[1]),
        "drm": (g_new, q_old, q_new),
        **{name: (g_new, _mapped(psi, q_new), q_new) for name, psi in reverse.items()},
        **{
            name: (_mapped(rho, g_new), _mapped(psi, _mapped(rho, q_new)), _mapped(rho, q_new))
            for name, (rho, psi) in joint.items()
        },
        "joint-drm": (_mapped(rho, g_new), q_old, _mapped(rho, q_new)),
    }
    old_map, old_right = _one_index(g_old, q_old, world)
    star_map, _ = _one_index(g_new, q_new, world)
    values: Values = {"old.self": old_map, "star.self": star_map}
    for arm, (gallery_new, for_old, for_new) in served.items():
        maps, right = _curve(world, g_old, gallery_new, for_old, for_new, order, step)
        area = float(np.mean((maps[1:] + maps[:-1]) / 2))  # trapezoid; the fractions are evenly spaced
        values |= {
            f"{arm}.start": float(maps[0]),
            f"{arm}.end": float(maps[-1]),
            f"{arm}.area": area,
            f"{arm}.gain": (area - old_map) / (star_map - old_map),
            f"{arm}.nfr": max(flips(old_right, now).nfr for now in right),
        }
    return values


def _mapped(module: nn.Module, vectors: Array) -> Array:
    with torch.no_grad():
        return F.normalize(module(torch.tensor(vectors))).numpy()


def _one_index(gallery: Array, queries: Array, world: World) -> tuple[float, Array]:
    """mAP of a system without any upgrade, and per query whether its first hit is right."""
    index = ExactIndex()
    index.add(np.arange(len(gallery)), gallery)
    metrics = ranking_metrics(index.search(queries, len(gallery)).ids, world)
    return float(np.mean(metrics["ap"])), metrics["right"]
