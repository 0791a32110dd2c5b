"""The arms of pass.toml: pre-training on composite people, then retrieval across cameras and what a token knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pretraining_arms import Values, dataset, logistic_accuracy, pictures, pretrain, untrained
from torch import Tensor

from bowerbird.data import subset
from bowerbird.protocols import Dataset
from bowerbird_mim.data.people import CompositePeople
from bowerbird_mim.part_vit import PartViTEncoder, fuse_part_features
from bowerbird_mim.reid import evaluate_reid


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<metric>``: see the plan. The seed sets the people, the cameras, every first weight and every crop."""
    people = {**plan["people"], "seed": seed}
    train, query, gallery = (dataset("mim:composite-people", part, **people) for part in ("train", "query", "gallery"))
    recipe = {**plan["recipe"], "dataset": {"use": "mim:composite-people", "split": "train", **people}}
    values: Values = {}
    for arm in plan["arms"]:
        made = (untrained if arm.get("random") else pretrain)(recipe, train, seed, arm.get("set"))
        found = retrieval(made.encoder, query, gallery)
        found |= knowledge(made.encoder, train, gallery, np.random.default_rng(seed), **plan["probe"])
        values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
    return values


@torch.no_grad()
def tokens(encoder: PartViTEncoder, people: Dataset) -> tuple[Tensor, Tensor]:
    """Class tokens ``(N, D)`` and part tokens ``(N, J, D)``."""
    chunks = [encoder.vit(images) for images in pictures(encoder, people).split(256)]
    cls, parts = zip(*chunks, strict=True)
    return torch.cat(cls), torch.cat(parts)


def retrieval(encoder: PartViTEncoder, query: CompositePeople, gallery: CompositePeople) -> Values:
    """mAP and R@1 of the camera-aware protocol: of the class token, and with parts of the two fusions."""
    found = [tokens(encoder, people) for people in (query, gallery)]
    features = {"class": [cls for cls, _ in found]}
    if encoder.vit.num_parts:
        features |= {mode: [fuse_part_features(cls, parts, mode) for cls, parts in found] for mode in ("cat", "mean")}
        features["parts"] = [parts.flatten(1) for _, parts in found]
    values: Values = {}
    if encoder.vit.num_parts:
        values |= zone_retrieval(*(parts for _, parts in found), query, gallery)
    for name, (of_query, of_gallery) in features.items():
        at, mean = evaluate_reid(
            of_query, of_gallery, query.identities, gallery.identities, query.cameras, gallery.cameras, max_rank=1
        )
        values |= {f"mAP {name}": mean, f"R@1 {name}": float(at[0])}
    return values


def zone_retrieval(of_query: Tensor, of_gallery: Tensor, query: CompositePeople, gallery: CompositePeople) -> Values:
    """mAP of part token j where right is the same item in zone k: mean over j = k, and over j != k.

    Pictures from the query's camera that show the item are left out, as in the protocol for identities.
    """
    worn = [people.worn[people.identities] for people in (query, gallery)]
    zones = range(worn[0].shape[1])
    matrix = np.array(
        [
            [
                evaluate_reid(
                    of_query[:, j], of_gallery[:, j], worn[0][:, k], worn[1][:, k], query.cameras, gallery.cameras, 1
                )[1]
                for k in zones
            ]
            for j in zones
        ]
    )
    own = np.eye(len(matrix), dtype=bool)
    return {"find own": float(matrix[own].mean()), "find other": float(matrix[~own].mean())}


def knowledge(
    encoder: PartViTEncoder,
    train: CompositePeople,
    test: CompositePeople,
    generator: np.random.Generator,
    *,
    train_items: int,
    test_items: int,
) -> Values:
    """Accuracy of logistic regressions from one token to the class of the item in one zone.

    ``class``: mean over zones, from the class token. ``own``: mean over j, from part token j to zone j. ``other``: mean
    over j != k, from part token j to zone k.
    """
    taken = [generator.permutation(len(people))[:n] for people, n in ((train, train_items), (test, test_items))]
    found = [tokens(encoder, subset(people, at)) for people, at in zip((train, test), taken, strict=True)]
    labels = [people.zone_labels[at] for people, at in zip((train, test), taken, strict=True)]
    zones = range(labels[0].shape[1])

    def accuracy(first: Tensor, second: Tensor, zone: int) -> float:
        return logistic_accuracy(first.numpy(), labels[0][:, zone], second.numpy(), labels[1][:, zone])

    values = {"probe class": float(np.mean([accuracy(found[0][0], found[1][0], zone) for zone in zones]))}
    parts = range(encoder.vit.num_parts)
    if parts:
        matrix = np.array([[accuracy(found[0][1][:, j], found[1][1][:, j], k) for k in zones] for j in parts])
        own = np.eye(len(matrix), dtype=bool)
        values |= {"probe own": float(matrix[own].mean()), "probe other": float(matrix[~own].mean())}
        values |= {f"probe pt{j + 1} zone{k + 1}": float(matrix[j, k]) for j in parts for k in zones}
    return values
