"""Pre-train on unlabelled pictures, then measure with few labels: what the claims of mim-plugins have in common.

A method's ``<slug>_arms.py`` holds ``run(plan, seed) -> values`` and uses these functions. The simplest is

    def run(plan, seed):
        return measured_arms(plan, seed)

with a plan of this form (keys of an arm's ``set`` are those of ``bowerbird train --set``):

    [recipe]                                    # as in a recipe file; the data set and the seed are filled in
    encoder = { use = "mim:vit", image_size = 32, patch_size = 4, embed_dim = 64, depth = 3, num_heads = 4 }
    objective = { use = "mim:mae" }
    train = { epochs = 1, batch_size = 64, lr = 1e-3, warmup = 0.1, weight_decay = 0.05, betas = [0.9, 0.95] }
    [data]                                      # optional; defaults below
    items = 25600
    [probe]                                     # optional; settings of ``measure``
    finetune_steps = 120
    [[arms]]
    name = "scratch"
    random = true                               # first weights, not trained
    [[arms]]
    name = "mae"
    [[arms]]
    name = "half"
    set = { "objective.mask_ratio" = 0.5 }

Everything is a function of plan and seed. Torch runs on one thread (``run.py``).
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from bowerbird.data import images_of, subset
from bowerbird.data.images import decode_batches
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Dataset, Encoder, Features, Objective
from bowerbird.recipe import Recipe, resolve_recipe
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry
from bowerbird.train.checkpoint import latest_checkpoint, load_checkpoint
from bowerbird.train.loop import build, train
from bowerbird.train.run import TrainContext

Values = dict[str, float]
Array = np.ndarray
DATA = {"use": "core:fashion-mnist", "split": "train", "test_split": "test", "items": 25_600}
BOWERBIRD_API = "1.0"


# ----------------------------------------------------------------------------------------------------- data set


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="claims:part",
        target=f"{__name__}:Part",
        summary="A random part of another data set, for claims.",
        provides=("image", "label"),
    )


def register(name: str, module: ModuleType) -> None:
    """Make ``module`` the plugin ``name``, unless it is one already."""
    if all(status.name != name for status in get_registry().plugins):
        get_registry().register_module(name, module)


class Part:
    """The data set that ``pretrain`` has put here: the loop builds its own by name."""

    current: Dataset

    @classmethod
    def build(cls, config: None, split: str | None) -> Dataset:
        return cls.current


def dataset(use: str, split: str | None = None, **settings: Any) -> Dataset:
    """A data set by name."""
    registry = get_registry()
    record = registry.get("dataset", use)
    model = registry.load_config(record)
    return registry.load(record).build(model(**settings) if model else None, split)


@dataclass(frozen=True)
class World:
    """``unlabelled``: what is pre-trained on; ``train``: few items with labels; ``test``: others with labels."""

    unlabelled: Dataset
    train: Dataset
    test: Dataset


def make_world(seed: int, *, labels: int = 1000, test: int = 3000, **data: Any) -> World:
    """Random parts of a data set, drawn by the seed. The labelled items are among those of the training split.

    Args:
        labels: How many training items have a label.
        test: How many items of the test split are classified.
        data: ``use``, ``split``, ``test_split``, ``items`` (of the unlabelled part), other settings of the data set.
    """
    data = {**DATA, **data}
    use, split, test_split, items = (data.pop(key) for key in ("use", "split", "test_split", "items"))
    generator = np.random.default_rng(seed)
    whole, others = dataset(use, split, **data), dataset(use, test_split, **data)
    return World(
        unlabelled=subset(whole, generator.permutation(len(whole))[:items]),
        train=subset(whole, generator.permutation(len(whole))[:labels]),
        test=subset(others, generator.permutation(len(others))[:test]),
    )


# -------------------------------------------------------------------------------------------------- pre-training


@dataclass(frozen=True)
class Pretrained:
    """``encoder``: what the run exports, eval mode; ``objective``: with heads, teacher, decoder; ``log``: its lines."""

    recipe: Recipe
    encoder: Encoder
    objective: Objective
    log: list[dict[str, Any]]

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the log."""
        last = self.log[-max(1, len(self.log) // 10) :]
        return float(np.mean([line["loss"] for line in last]))


def _recipe(values: Mapping[str, Any], seed: int, overrides: Mapping[str, Any]) -> Recipe:
    values = copy.deepcopy(dict(values))
    values.setdefault("name", "claim")
    values.setdefault("dataset", {"use": "claims:part"})
    values["train"] = {"device": "cpu", "log_every": 5, "seed": seed, **values.get("train", {})}
    texts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    register("claims", sys.modules[__name__])
    return resolve_recipe(values, "plan [recipe]", texts)


def pretrain(
    recipe: Mapping[str, Any], unlabelled: Dataset, seed: int, overrides: Mapping[str, Any] | None = None
) -> Pretrained:
    """Train ``recipe`` with the loop of ``bowerbird train`` in a temporary folder.

    Args:
        recipe: As in a recipe file. Without ``dataset`` it is trained on ``unlabelled``.
        overrides: ``{"objective.mask_ratio": 0.5}``.
    """
    resolved = _recipe(recipe, seed, overrides or {})
    Part.current = unlabelled
    with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as folder:
        train(resolved, Path(folder, "run"))
        checkpoint = latest_checkpoint(Path(folder, "run", "checkpoints"))
        assert checkpoint is not None
        state = load_checkpoint(checkpoint)
        log = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    objective = _fresh_objective(resolved, unlabelled, seed, state.progress.step)
    objective.load_state_dict(dict(state.objective))
    objective.eval()
    return Pretrained(recipe=resolved, encoder=objective.exported_encoder().eval(), objective=objective, log=log)


def untrained(
    recipe: Mapping[str, Any], unlabelled: Dataset, seed: int, overrides: Mapping[str, Any] | None = None
) -> Pretrained:
    """The same networks with the first weights that ``pretrain`` starts from: the arm from scratch."""
    resolved = _recipe(recipe, seed, overrides or {})
    objective = _fresh_objective(resolved, unlabelled, seed, 1).eval()
    return Pretrained(recipe=resolved, encoder=objective.exported_encoder().eval(), objective=objective, log=[])


def _fresh_objective(recipe: Recipe, unlabelled: Dataset, seed: int, total_steps: int) -> Objective:
    torch.manual_seed(seed)  # as the loop does before it builds
    encoder = build(recipe.encoder, "encoder").train()
    context = TrainContext(unlabelled, total_steps=total_steps, seed=seed, device=torch.device("cpu"))
    objective: Objective = build(recipe.objective, "objective", encoder, context)
    return objective


@contextmanager
def run_folder(
    recipe: Mapping[str, Any], unlabelled: Dataset, seed: int, overrides: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """A finished run in a temporary folder, for what other recipes name by path (a tokenizer)."""
    resolved = _recipe(recipe, seed, overrides or {})
    Part.current = unlabelled
    with tempfile.TemporaryDirectory(prefix="bowerbird-claim-") as folder:
        train(resolved, Path(folder, "run"))
        yield Path(folder, "run")


# ------------------------------------------------------------------------------------------------------- measures


def pictures(encoder: Encoder, items: Dataset) -> Tensor:
    """``(N, 3, H, W)``, prepared as the encoder says."""
    assert encoder.preprocessing is not None
    batches = decode_batches(images_of(items), encoder.preprocessing, batch_size=256, workers=0)
    return torch.from_numpy(np.concatenate([images for _, images in batches]))


def summarised(features: Features, kind: str) -> Tensor:
    """``(B, D)``: ``mean`` of the patch tokens (the embedding where there are none), or ``pooled``, the embedding."""
    if kind == "mean" and features.tokens is not None:
        return features.tokens.mean(dim=1)
    return features.pooled


@torch.no_grad()
def features_of(encoder: Encoder, images: Tensor, kind: str = "mean") -> Array:
    """float32 ``(N, D)``."""
    encoder.eval()
    parts = [summarised(encoder({"image": chunk}), kind) for chunk in images.split(256)]
    return torch.cat(parts).numpy()


def logistic_accuracy(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> float:
    """Logistic regression on standardised features."""
    scaler = StandardScaler().fit(train_x)
    probe = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(train_x), train_y)
    return float(probe.score(scaler.transform(test_x), test_y))


def knn_accuracy(
    train_x: Array, train_y: Array, test_x: Array, test_y: Array, k: int = 10, temperature: float = 0.07
) -> float:
    """The k nearest by cosine vote with weight exp(cosine / temperature) (DINO, official code)."""
    unit = [F.normalize(torch.from_numpy(x), dim=1) for x in (train_x, test_x)]
    cosines, nearest = (unit[1] @ unit[0].T).topk(k, dim=1)
    labels = torch.from_numpy(train_y)[nearest]
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1)
    votes.scatter_add_(1, labels, (cosines / temperature).exp())
    return float((votes.argmax(dim=1).numpy() == test_y).mean())


class Classifier(nn.Module):
    """The encoder and a linear layer on its (un-normalised) summary."""

    def __init__(self, encoder: Encoder, kind: str, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(summarised(self.encoder({"image": images}), self.kind))


def finetuned_accuracy(
    encoder: Encoder,
    train_x: Tensor,
    train_y: Array,
    test_x: Tensor,
    test_y: Array,
    *,
    seed: int,
    kind: str = "mean",
    steps: int = 120,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
) -> float:
    """All weights of a copy of ``encoder`` and a new linear layer, AdamW, ten steps of warm-up, then half a cosine."""
    torch.manual_seed(seed)
    encoder = copy.deepcopy(encoder).train()
    with torch.no_grad():
        width = summarised(encoder.eval()({"image": train_x[:2]}), kind).shape[1]
    model = Classifier(encoder.train(), kind, width, int(max(train_y.max(), test_y.max())) + 1)
    model.requires_grad_(True)  # a teacher is frozen; position tables are trained too, as in MAE's official code
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    warm_up = min(10, steps // 4)
    factor = [min(1.0, (i + 1) / max(1, warm_up)) * 0.5 * (1 + np.cos(np.pi * i / steps)) for i in range(steps)]
    labels, generator = torch.from_numpy(train_y), torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(train_x), generator=generator) for _ in range(1 + steps * batch_size // len(train_x))]
    )
    for step in range(steps):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        for group in optimizer.param_groups:
            group["lr"] = lr * factor[step]
        loss = F.cross_entropy(model(train_x[chosen]), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(chunk).argmax(dim=1) for chunk in test_x.split(256)])
    return float((predicted.numpy() == test_y).mean())


def measure(
    encoder: Encoder,
    world: World,
    *,
    seed: int,
    kind: str = "mean",
    k: int = 10,
    finetune_steps: int = 120,
    finetune_lr: float = 1e-3,
) -> Values:
    """Accuracies on ``world.test`` with the labels of ``world.train``.

    Args:
        kind: Which features: ``mean`` of the patch tokens, or ``pooled``.
        finetune_steps: 0 leaves fine-tuning out.

    Returns:
        ``probe`` (logistic regression), ``knn``, and ``finetune``.
    """
    train_images, test_images = pictures(encoder, world.train), pictures(encoder, world.test)
    train_y, test_y = np.asarray(world.train.labels()), np.asarray(world.test.labels())
    train_x, test_x = features_of(encoder, train_images, kind), features_of(encoder, test_images, kind)
    values = {
        "probe": logistic_accuracy(train_x, train_y, test_x, test_y),
        "knn": knn_accuracy(train_x, train_y, test_x, test_y, k),
    }
    if finetune_steps:
        values["finetune"] = finetuned_accuracy(
            encoder, train_images, train_y, test_images, test_y,
            seed=seed, kind=kind, steps=finetune_steps, lr=finetune_lr,
        )  # fmt: skip
    return values


def measured_arms(
    plan: Mapping[str, Any], seed: int, more: Callable[[str, Pretrained, World], Values] | None = None
) -> Values:
    """Every arm of the plan: pre-trained (or not), then measured; values are called ``<arm>.<metric>``.

    Args:
        more: Other metrics of an arm, given its name: the mechanism that the paper's gain is explained by.
    """
    probe = dict(plan.get("probe", {}))
    sizes = {key: probe.pop(key) for key in ("labels", "test") if key in probe}
    world = make_world(seed, **sizes, **plan.get("data", {}))
    values: Values = {}
    for arm in plan["arms"]:
        make = untrained if arm.get("random") else pretrain
        made = make(plan["recipe"], world.unlabelled, seed, arm.get("set"))
        found = measure(made.encoder, world, seed=seed, **{**probe, **arm.get("probe", {})})
        if made.log:
            found["loss"] = made.final_loss
        if more is not None:
            found |= more(arm["name"], made, world)
        values |= {f"{arm['name']}.{key}": value for key, value in found.items()}
    return values
