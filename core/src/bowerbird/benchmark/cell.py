"""One cell of the benchmark: a scenario of one data set with one seed. Trains its models and measures every row.

A row is a model and the way in which it is served while the gallery is backfilled. Rows of the *free* new model are the
strategies that need no training; those of the methods show what compatible training gains. All are measured on the same
queries and gallery, in one random order of the backfill.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.benchmark.methods import COMPATIBLE, FREE, FULL, NAIVE, Method, Selection, filled
from bowerbird.benchmark.models import Model, Views, train_model
from bowerbird.benchmark.scenarios import Plan, Profile, plans
from bowerbird.benchmark.worlds import World
from bowerbird.errors import BowerbirdError
from bowerbird.gallery.routing import match_width
from bowerbird.gallery.space import Space
from bowerbird.gallery.transform import Step, VectorTransform
from bowerbird.recipe import TrainSettings
from bowerbird.registry import get_registry
from bowerbird.retrieval.compatibility import (
    Embeddings,
    average_compatibility,
    average_multimodel_accuracy,
    compatibility_matrix,
)
from bowerbird.retrieval.intervals import Interval
from bowerbird.upgrade.forecast import ForecastCurve, Forecaster, PairedVectors
from bowerbird.upgrade.strategies import (
    TrainingPairs,
    load_strategy,
    switches_at_end,
    transform_direction,
    uses_trained_transform,
)

Vectors = NDArray[np.float32]
OLD, NEW = "benchmark-old", "benchmark-new"


class Cell:
    """Models are trained when a row needs them, once.

    Args:
        world: With the features of the first trunk.
        views: Trunk -> ``(train, queries, gallery)`` features, of every trunk that a scenario uses.
        scenario, profile, seed: See ``scenarios``.
    """

    def __init__(
        self, world: World, views: Mapping[str, tuple[Vectors, Vectors, Vectors]], scenario: str, profile: Profile,
        seed: int,
    ) -> None:  # fmt: skip
        self.world, self.views, self.scenario, self.profile, self.seed = world, views, scenario, profile, seed
        self.plans = plans(scenario, world, profile, seed)
        self._free: list[Model] = []
        self._vectors: dict[int, tuple[Vectors, Vectors]] = {}
        self.order = np.random.default_rng([seed, 2]).permutation(len(world.gallery))

    # ------------------------------------------------------------------------------------------------ models

    def free(self, step: int) -> Model:
        """Model ``step`` (0 is the oldest), trained without regard to any other."""
        while len(self._free) <= step:
            plan = self.plans[len(self._free)]
            self._free.append(
                self._train(plan, len(self._free), plan.objective, plan.settings, self._encoder(plan), {}, FREE)
            )
        return self._free[step]

    def compatible(self, method: Method) -> list[Model]:
        """The models of a method, the oldest (a free one) first; each is trained for its predecessor."""
        models = [self.free(0)]
        for step in range(1, len(self.plans)):
            plan, old = self.plans[step], models[-1]
            old_dim = old.encoder.embed_dim
            known = {
                "old_dim": old_dim, "new_dim": plan.embed_dim, "half_dim": old_dim // 2, "base": self._encoder(plan),
                "wide_base": {**self._encoder(plan), "embed_dim": old_dim + plan.embed_dim},
                "third": self.profile.epochs // 3, "two_thirds": 2 * self.profile.epochs // 3,
            }  # fmt: skip
            encoder = self._encoder(plan) if method.encoder is None else filled(method.encoder, known)
            settings = filled(method.settings, known)
            fields = _fields(method.objective)
            runs = {"old_run": "old", "teacher_run": "teacher"}
            settings |= {key: name for key, name in runs.items() if key in fields and key not in settings}
            if "measure" in fields:
                settings.setdefault("measure", False)
            teacher = {"teacher": self.free(step)} if "teacher_run" in fields else {}
            models.append(
                self._train(plan, step, method.objective, settings, encoder, {"old": old, **teacher}, method.name)
            )
        return models

    def _encoder(self, plan: Plan) -> dict[str, Any]:
        inputs = self.views[plan.trunk][0].shape[1]
        sizes = {"inputs": int(inputs), "width": plan.width, "depth": plan.depth, "embed_dim": plan.embed_dim}
        return {"use": "core:perceptron", **sizes}

    def _train(
        self, plan: Plan, step: int, objective: str, settings: Mapping[str, Any], encoder: Mapping[str, Any],
        models: Mapping[str, Model], name: str,
    ) -> Model:  # fmt: skip
        profile = self.profile
        known, labels = np.unique(self.world.train_labels[plan.rows], return_inverse=True)
        views: Views = {trunk: parts[0][plan.rows] for trunk, parts in self.views.items()}
        train = TrainSettings(
            epochs=profile.epochs, batch_size=profile.batch_size, lr=profile.lr, optimizer="adam",
            seed=1000 * self.seed + step,  # not the old model's: an honest incompatible pair
            items_per_class=plan.items_per_class,
        )  # fmt: skip
        return train_model(
            objective, settings, encoder=encoder, trunk=plan.trunk, views=views, labels=labels.astype(np.int64),
            classes=[self.world.classes[c] for c in known], models=models, train=train,
            where=f"benchmark method {name!r} in scenario {self.scenario!r}",
        )  # fmt: skip

    def vectors(self, model: Model) -> tuple[Vectors, Vectors]:
        """Unit vectors of the queries and of the gallery."""
        if id(model) not in self._vectors:
            parts = [{trunk: views[i] for trunk, views in self.views.items()} for i in (1, 2)]
            self._vectors[id(model)] = (model.embed(parts[0]), model.embed(parts[1]))
        return self._vectors[id(model)]

    # -------------------------------------------------------------------------------------------------- rows

    def levels(self) -> dict[str, Any]:
        """old/old, and the free new model: new/new."""
        forecast = self.forecaster(self.free(0), self.free(len(self.plans) - 1))
        made = forecast.do_nothing((0.0, 1.0))
        full = forecast.full((0.0, 1.0))
        return {"old_old": _interval(made.start_interval), "free_free": _interval(full.end_interval)}

    def measure(self, models: Sequence[Model], strategy: str) -> dict[str, Any]:
        """One row: quality at the start, at the end and over the backfill, flips; for three models their matrix."""
        old, new = models[0], models[-1]
        forecast = self.forecaster(old, new)
        curve, about = self._curve(forecast, models, strategy)
        row = {
            "start": _interval(curve.start_interval), "end": _interval(curve.end_interval),
            "area": _interval(curve.area_interval), "max_nfr": curve.max_nfr,
            "shares": list(curve.shares), "quality": list(curve.quality), "nfr": list(curve.nfr), **about,
        }  # fmt: skip
        if len(models) > 2 and strategy == COMPATIBLE:
            row |= self._sequence(models)
        return row

    def _sequence(self, models: Sequence[Model]) -> dict[str, float]:
        """Over all pairs of the three models; vectors of unequal length are compared as ``core:compatible`` does."""
        width = models[0].encoder.embed_dim
        cut = [Embeddings(*(match_width(part, width) for part in self.vectors(model))) for model in models]
        whole = [Embeddings(*self.vectors(model)) for model in models]
        matrix = compatibility_matrix(cut, self.world.relevance())
        for i, one in enumerate(whole):
            matrix[i, i] = compatibility_matrix([one], self.world.relevance())[0, 0]
        return {
            "average_compatibility": average_compatibility(matrix),
            "average_accuracy": average_multimodel_accuracy(matrix),
        }

    def forecaster(self, old: Model, new: Model) -> Forecaster:
        """What measures an upgrade from ``old`` to ``new`` on the world's queries and gallery."""
        (query_old, gallery_old), (query_new, gallery_new) = self.vectors(old), self.vectors(new)
        labels = self.world.gallery_labels.tolist(), self.world.query_labels.tolist()
        return Forecaster(PairedVectors(gallery_old, gallery_new, query_old, query_new, *labels), seed=self.seed)

    def _curve(self, forecast: Forecaster, models: Sequence[Model], name: str) -> tuple[ForecastCurve, dict[str, Any]]:
        old, new = models[0], models[-1]
        (query_old, gallery_old), (query_new, _) = self.vectors(old), self.vectors(new)
        if name == NAIVE:
            return forecast.switch_now(self.order), {}
        full_name, strategy = load_strategy(name.partition("+")[0])
        if full_name == FULL or switches_at_end(strategy):
            return forecast.full(), {}
        registry = get_registry()
        joined_by = name.partition("+")[2] or strategy.merger
        merger = registry.load(registry.get("retriever", joined_by, role="merger"))
        old_space = Space(OLD, OLD, old.encoder.embed_dim)
        new_space = Space(NEW, NEW, new.encoder.embed_dim)
        queries = {OLD: query_old, NEW: query_new}
        held, about, transform = None, {}, None
        direction = transform_direction(strategy)
        if direction is not None:
            fitter: Any = strategy
            transform = _trained(models, old_space, new_space) if uses_trained_transform(strategy) else None
            if transform is None:
                transform = fitter.fit(self.pairs(old, new, old_space, new_space), seed=self.seed)
            about = {"transform": str(transform.evidence.get("kind", transform.method))}
        if direction == "gallery":
            assert transform is not None
            # Served from the moment when every stored vector is lifted; what is encoded again then replaces it.
            held, old_part = transform(gallery_old), query_new
        elif direction == "query":
            assert transform is not None
            old_part = strategy.old_part_queries(queries, old_space, new_space, transform)
        else:
            old_part = strategy.old_part_queries(queries, old_space, new_space)
        curve = forecast.curve(name, old_part, self.order, merger=merger, merger_name=joined_by, old_part_vectors=held)
        return curve, about

    def pairs(self, old: Model, new: Model, old_space: Space, new_space: Space) -> TrainingPairs:
        """The training items of the new model (at most ``Profile.pairs``), encoded by both."""
        rows = self.plans[-1].rows
        if self.profile.pairs is not None and self.profile.pairs < len(rows):
            rows = np.random.default_rng([self.seed, 3]).permutation(rows)[: self.profile.pairs]
        views = {trunk: parts[0][rows] for trunk, parts in self.views.items()}
        labels = self.world.train_labels[rows].tolist()
        return TrainingPairs(old.embed(views), new.embed(views), labels, old_space, new_space)


def _trained(models: Sequence[Model], old: Space, new: Space) -> VectorTransform | None:
    """From the newest space to the oldest, through the maps that the models between them were trained with: the way on
    which a gallery routes queries. ``None`` where a model has no such map."""
    steps: list[Step] = []
    for model in reversed(models[1:]):
        own = model.transform_steps()
        if not own:
            return None
        steps += [*own, Step("normalize")]
    return VectorTransform(new.fingerprint, old.fingerprint, new.dim, old.dim, tuple(steps), method="trained")


def run_cell(
    cell: Cell, selection: Selection, done: dict[str, Any], *, save: Callable[[dict[str, Any]], None],
    advance: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Measure the rows that ``done`` does not have, or has with other settings, and save after each.

    A method that cannot be trained in this scenario gets a row with ``unavailable``, why.
    """
    rows = done.setdefault("rows", {})
    settings = {"profile": asdict(cell.profile), "items": len(cell.world.train), "format": 1}
    if done.get("settings") != _digest(settings):
        done.clear()
        done |= {"scenario": cell.scenario, "seed": cell.seed, "dataset": cell.world.name}
        done |= {"settings": _digest(settings), "rows": (rows := {})}
    if "levels" not in done:
        done["levels"] = cell.levels()
    jobs: list[tuple[str, Any, Callable[[], Sequence[Model]], Sequence[str]]] = [
        (FREE, FREE, lambda: [cell.free(step) for step in range(len(cell.plans))], selection.strategies)
    ]
    for method in selection.methods:
        jobs.append((method.name, method.key(), partial(cell.compatible, method), method.serve))
    for name, key, train, strategies in jobs:
        models: Sequence[Model] | None = None
        for strategy in strategies:
            row, digest = f"{name} / {strategy}", _digest([key, strategy])
            advance(row)
            if rows.get(row, {}).get("key") == digest:
                continue
            started = time.process_time()
            try:
                models = models or train()
                made = cell.measure(models, strategy)
            except BowerbirdError as error:
                made = {"unavailable": str(error)}
            rows[row] = {"key": digest, "seconds": round(time.process_time() - started, 2), **made}
            save(done)


def _fields(objective: str) -> Mapping[str, Any]:
    registry = get_registry()
    model = registry.load_config(registry.get("objective", objective))
    return {} if model is None else model.model_fields


def _interval(interval: Interval | None) -> list[float]:
    assert interval is not None
    return [interval.mean, interval.low, interval.high]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=list).encode()).hexdigest()[:16]
