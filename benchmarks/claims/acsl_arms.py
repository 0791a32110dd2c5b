"""The arms of acsl.toml: the last layer of a classifier of crops, and of a detector, trained once more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretraining_arms import Values
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from bowerbird.recipe import resolve_recipe
from bowerbird.train.loop import train
from bowerbird_detection.acsl import adaptive_class_suppression_loss, sigmoid_classification_loss

CLASSES, DIGIT, CROP, CANVAS = 10, 8, 12, 28
HEAD, MID = 4, 3  # classes; the others are the tail
Array = np.ndarray
Loss = Callable[[Tensor, Tensor], Tensor]


def run(plan: Mapping[str, Any], seed: int) -> Values:
    values: Values = {}
    for world, measured in (("crops", crops), ("canvases", canvases)):
        for arm, found in measured(plan, seed).items():
            values |= {f"{arm}.{world}.{key}": value for key, value in found.items()}
    return values | {"softmax.crops.recall head - 0.1": values["softmax.crops.recall head"] - 0.1}


# ---------------------------------------------------------------------------------------------------------- crops


@dataclass(frozen=True)
class Crops:
    """``images (N, 1, 12, 12)``; ``labels (N,)``: 1 to 10 by falling frequency, 0 the background."""

    images: Tensor
    labels: Tensor


def crops(plan: Mapping[str, Any], seed: int) -> dict[str, Values]:
    p = plan["crops"]
    rng = np.random.default_rng([seed, 0])
    training, test = make_crops(p, seed, rng)
    torch.manual_seed(seed)
    features = nn.Sequential(
        *[nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU()],
    )
    layer = nn.Linear(64, CLASSES + 1)
    first = torch.optim.Adam([*features.parameters(), *layer.parameters()], lr=p["first"]["lr"])
    for rows in batches(len(training.labels), p["first"]["batch_size"], p["first"]["epochs"], rng):
        first.zero_grad()
        F.cross_entropy(layer(features(training.images[rows])), training.labels[rows]).backward()
        first.step()
    features.eval()
    with torch.no_grad():
        seen, unseen = features(training.images), features(test.images)
    return {arm["name"]: second_stage(p, arm, seed, layer, seen, training.labels, unseen, test) for arm in plan["arms"]}


def make_crops(p: Mapping[str, Any], seed: int, rng: np.random.Generator) -> tuple[Crops, Crops]:
    """A long tail to train on, whose frequent digits the seed chooses, and a test set with as many of each."""
    digits, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        digits.reshape(-1, DIGIT, DIGIT) / 16, labels, test_size=359, random_state=seed, stratify=labels
    )
    order = rng.permutation(CLASSES)  # the most frequent digit first
    wanted = np.rint(np.geomspace(p["most"], p["least"], CLASSES)).astype(int)
    place = np.argsort(order)
    chosen = np.concatenate([rng.choice(np.flatnonzero(parts[2] == order[c]), wanted[c]) for c in range(CLASSES)])
    return (
        cropped(parts[0][chosen], 1 + place[parts[2][chosen]], p, rng),
        cropped(np.tile(parts[1], (3, 1, 1)), 1 + place[np.tile(parts[3], 3)], p, rng),
    )


def cropped(digits: Array, labels: Array, p: Mapping[str, Any], rng: np.random.Generator) -> Crops:
    """Every digit whole, and ``background`` crops beside it in which it is cut off."""
    images, found = [], []
    middle = (CANVAS - CROP) // 2
    for digit, label in zip(digits, labels, strict=True):
        canvas = np.zeros((CANVAS, CANVAS))
        canvas[(CANVAS - DIGIT) // 2 :, (CANVAS - DIGIT) // 2 :][:DIGIT, :DIGIT] = digit
        shifts = [rng.integers(-2, 3, 2)]
        for _ in range(p["background"]):
            cut = rng.integers(4, 8) * rng.choice([-1, 1])  # of 8 columns or rows, 2 to 5 stay in the crop
            other = rng.integers(-4, 5)
            shifts.append(np.array([cut, other] if rng.random() < 0.5 else [other, cut]))
        for i, (down, right) in enumerate(shifts):
            top, left = middle + down, middle + right
            images.append(canvas[top : top + CROP, left : left + CROP])
            found.append(0 if i else label)
    noisy = np.stack(images) + rng.normal(0, p["noise"], (len(images), CROP, CROP))
    return Crops(torch.from_numpy(noisy).float()[:, None], torch.tensor(found))


def batches(count: int, size: int, epochs: int, rng: np.random.Generator) -> list[Tensor]:
    parts = [rng.permutation(count)[: count - count % size].reshape(-1, size) for _ in range(epochs)]
    return [torch.from_numpy(rows) for part in parts for rows in part]


def second_stage(
    p: Mapping[str, Any], arm: Mapping[str, Any], seed: int, first: nn.Linear, seen: Tensor, labels: Tensor,
    unseen: Tensor, test: Crops,
) -> Values:  # fmt: skip
    """The last layer again, from its first stage; the features do not change, so they are computed once."""
    s, generator = p["second"], torch.Generator().manual_seed(seed)
    loss = loss_of(arm, p["groups"], generator)
    layer = nn.Linear(64, CLASSES + 1)
    layer.load_state_dict(first.state_dict())
    suppression = pushed_down(layer, loss, seen, labels, s["batch_size"], seed)
    optimizer = torch.optim.SGD(layer.parameters(), lr=s["lr"], momentum=0.9)
    steps = batches(len(labels), s["batch_size"], s["epochs"], np.random.default_rng([seed, 1]))
    for step, rows in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = s["lr"] * 0.1 ** sum(step >= share * len(steps) for share in s["drops"])
        optimizer.zero_grad()
        loss(layer(seen[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = layer(unseen)
    scores = logits.softmax(dim=1) if arm["class_loss"] == "softmax" else logits.sigmoid()
    return {**measures(scores.numpy(), test.labels.numpy()), "suppression": suppression}


def loss_of(arm: Mapping[str, Any], groups: Mapping[str, int], generator: torch.Generator) -> Loss:
    if arm["class_loss"] == "softmax":
        return F.cross_entropy
    if arm["class_loss"] == "sigmoid":
        return sigmoid_classification_loss
    frequent = CLASSES - groups["rare"] - groups["common"]
    frequency = torch.tensor([-1] + [2] * frequent + [1] * groups["common"] + [0] * groups["rare"])
    fractions = arm.get("background_fractions", (0.01, 0.1, 1.0))
    return lambda logits, labels: adaptive_class_suppression_loss(
        logits, labels, class_frequency=frequency, background_fractions=fractions, generator=generator
    )


def pushed_down(layer: nn.Linear, loss: Loss, seen: Tensor, labels: Tensor, size: int, seed: int) -> float:
    """Sum of the gradients above 0 in the tail's columns, over the sum of those below 0, in one pass without steps."""
    down = up = 0.0
    for rows in batches(len(labels), size, 1, np.random.default_rng([seed, 2])):
        logits = layer(seen[rows]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(logits, labels[rows]), logits)
        tail = gradient[:, 1 + HEAD + MID :]
        down, up = down + float(tail.clamp(min=0).sum()), up - float(tail.clamp(max=0).sum())
    return down / up


def measures(scores: Array, labels: Array) -> Values:
    """Recall among the ten classes and AP against everything else, by groups of classes."""
    columns, shown = scores[:, 1:], labels > 0
    guess = 1 + columns.argmax(axis=1)
    recall = np.array([(guess[labels == c] == c).mean() for c in range(1, CLASSES + 1)])
    precision = np.array([average_precision_score(labels == c, columns[:, c - 1]) for c in range(1, CLASSES + 1)])
    assert shown.any()
    parts = {"": slice(None), " head": slice(HEAD), " mid": slice(HEAD, HEAD + MID), " tail": slice(HEAD + MID, None)}
    return {
        f"{name}{part}": float(values[where].mean())
        for name, values in (("recall", recall), ("AP", precision))
        for part, where in parts.items()
    }


# ------------------------------------------------------------------------------------------------------- canvases


def canvases(plan: Mapping[str, Any], seed: int) -> dict[str, Values]:
    """The first stage once, then the second stage of every arm, as ``bowerbird train`` runs them."""
    p = plan["canvases"]
    data = {**p["dataset"], "seed": seed}
    settings = {key: value for key, value in data.items() if key != "use"}
    measure = {
        "use": "detection:coco-ap", "name": "test", "dataset": data["use"], "split": "test", "settings": settings,
        "groups_split": "train", "kinds": ["box"], **p["limits"],
    }  # fmt: skip
    common = {"encoder": p["encoder"], "dataset": {**data, "split": "train"}}

    def stage(
        name: str, objective: Mapping[str, Any], settings: Mapping[str, Any], folder: Path, **more: Any
    ) -> Values:
        values = {"name": name, "objective": objective, "train": {**settings, "seed": seed, "device": "cpu"}, **more}
        result = train(resolve_recipe({**common, **values}, "acsl.toml [canvases]"), folder / name)
        return dict(result.metrics)

    found: dict[str, Values] = {}
    with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as temporary:
        folder = Path(temporary)
        stage("first", {"use": "detection:detector"}, p["first"], folder)
        for arm in plan["arms"]:
            objective = {"use": "detection:acsl", "run": str(folder / "first"), "class_loss": arm["class_loss"]}
            if arm["class_loss"] == "acsl":
                objective |= p["limits"] | {k: v for k, v in arm.items() if k == "background_fractions"}
            metrics = stage(arm["name"], objective, p["second"], folder, evaluate=[measure])
            found[arm["name"]] = {key: metrics[f"test/{key}"] for key in ("AP", "APr", "APc", "APf")}
    return found
