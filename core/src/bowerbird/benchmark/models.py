"""Training on ready features: any objective plugin, in seconds, without pictures, folders and checkpoints.

The objective is the same object that ``bowerbird train`` builds; only what it is given differs: batches with
``frozen_features``, and a context whose ``load_run`` knows the models of the benchmark by name.

n items, F features, D ``embed_dim``, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bowerbird.batch import Batch
from bowerbird.errors import RecipeError
from bowerbird.gallery.transform import Step
from bowerbird.protocols import BuildContext, Encoder, Objective, TrainedRun, freeze
from bowerbird.recipe import TrainSettings, build_config
from bowerbird.registry import get_registry
from bowerbird.train.data import epoch_batches
from bowerbird.train.loop import make_optimizer
from bowerbird.train.schedules import lr_factor

Views = Mapping[str, NDArray[np.float32]]  # trunk -> (n, F) features of the same items


@dataclass(frozen=True)
class Model:
    """A trained encoder, frozen, and what a later model may need of it.

    Attributes:
        trunk: Whose features it reads.
        classifier: ``(C, D)`` of its training, or ``None``.
        classes: Their names.
        objective: That it was trained with.
    """

    encoder: Encoder
    trunk: str
    classifier: Tensor | None
    classes: tuple[str, ...]
    objective: Objective

    def embed(self, views: Views) -> NDArray[np.float32]:
        """``(n, D)`` unit rows."""
        with torch.no_grad():
            pooled = self.encoder({"frozen_features": torch.from_numpy(views[self.trunk])}).pooled
        return F.normalize(pooled.float()).numpy()

    def transform_steps(self) -> tuple[Step, ...]:
        """Of the map into the space of the model that it was trained for; none where its training made none."""
        found = (relation["steps"] for relation in self.objective.relations() if relation["kind"] == "transform")
        return next(found, ())


class Context(BuildContext):
    """What an objective may ask for: the training items as features, and older models by name."""

    def __init__(
        self, views: Views, labels: Tensor, classes: Sequence[str], trunk: str, models: Mapping[str, Model],
        *, total_steps: int, seed: int,
    ) -> None:  # fmt: skip
        self.views, self.labels, self.classes, self.trunk = views, labels, tuple(classes), trunk
        self.models, self.total_steps, self.seed = models, total_steps, seed

    def load_run(self, path: str | Path) -> TrainedRun:
        name = str(path)
        if name not in self.models:
            raise RecipeError(f"the benchmark has no model {name!r}; it has {', '.join(self.models) or 'none'}")
        model = self.models[name]
        state = {} if model.classifier is None else {"classifier.weight": model.classifier}
        return TrainedRun(Path(name), model.encoder, state, model.classes, {}, fingerprint=name)

    def eval_batches(self, encoder: Encoder, keys: Sequence[str] = ("image", "label")) -> Iterator[Batch]:
        trunk = next((m.trunk for m in self.models.values() if m.encoder is encoder), self.trunk)
        for rows in np.array_split(np.arange(len(self.labels)), math.ceil(len(self.labels) / 512)):
            yield self.batch(rows, trunk)

    def batch(self, rows: NDArray[np.int64], trunk: str) -> Batch:
        return {
            "frozen_features": torch.from_numpy(self.views[trunk][rows]),
            "label": self.labels[rows],
            "index": torch.from_numpy(rows),
            "item_id": [str(row) for row in rows],
        }


def train_model(
    objective: str,
    settings: Mapping[str, Any],
    *,
    encoder: Mapping[str, Any],
    trunk: str,
    views: Views,
    labels: NDArray[np.int64],
    classes: Sequence[str],
    models: Mapping[str, Model],
    train: TrainSettings,
    where: str = "benchmark",
) -> Model:
    """Build and train.

    Args:
        objective: Name of the record.
        settings: Of its config model.
        encoder: ``use`` and settings of the encoder.
        trunk: The features that it reads.
        views: Features of the training items by trunk; old models read theirs.
        labels: ``(n,)`` positions in ``classes``.
        models: What ``load_run`` finds, such as ``old`` and ``teacher``.
        train: Epochs, batch size, learning rate, seed.
        where: For messages.

    Raises whatever the plugin raises where it cannot be trained here, ``RecipeError`` as a rule.
    """
    registry = get_registry()
    values = dict(encoder)
    record = registry.get("encoder", values.pop("use"))
    target = registry.get("objective", objective)
    per_epoch = len(_batches(train, labels, 0))
    torch.manual_seed(train.seed)
    built: Encoder = registry.load(record).build(build_config(record, values, where=where))
    context = Context(
        views, torch.from_numpy(labels), classes, trunk, models, total_steps=train.epochs * per_epoch, seed=train.seed
    )
    made: Objective = registry.load(target).build(build_config(target, dict(settings), where=where), built, context)
    made.train()
    optimizer = make_optimizer(made, train)
    step = 0
    for epoch in range(train.epochs):
        made.on_epoch_start(epoch)
        for rows in _batches(train, labels, epoch):
            for group in optimizer.param_groups:
                group["lr"] = train.lr * group["lr_scale"] * lr_factor(step, steps_per_epoch=per_epoch, settings=train)
            made.before_step(step)
            optimizer.zero_grad(set_to_none=True)
            total = made(context.batch(rows, trunk)).total
            if not torch.isfinite(total):
                raise RecipeError(f"{where}: the loss of {objective} is {float(total.detach())} at step {step}")
            total.backward()
            optimizer.step()
            made.after_step(step)
            step += 1
    classifier = made.state_dict().get("classifier.weight")
    fits = classifier is not None and classifier.ndim == 2 and len(classifier) == len(classes)
    exported = made.exported_encoder()
    freeze(exported)
    weight = classifier.detach().clone() if fits and classifier is not None else None
    return Model(exported, trunk, weight, tuple(classes), made)


def _batches(train: TrainSettings, labels: NDArray[np.int64], epoch: int) -> list[NDArray[np.int64]]:
    per_class = train.items_per_class
    return epoch_batches(
        len(labels), batch_size=train.batch_size, epoch=epoch, seed=train.seed,
        labels=None if per_class is None else labels.tolist(), items_per_class=per_class,
    )  # fmt: skip
