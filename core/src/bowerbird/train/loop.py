"""The training loop. Nothing in it is named after a method.

One optimiser step = ``accumulate`` forward passes of joined batches (with ``alternate``, of every domain). Under
``torchrun`` each process takes its equal part of every joined batch and DDP averages the gradients. An interrupted run
continues bit for bit: the order and augmentation of items are functions of seed, epoch and position, and everything
that moves is in the checkpoint.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.encoders.bundle import save_encoder
from bowerbird.errors import BowerbirdError, InputError, RecipeError
from bowerbird.protocols import Dataset, Encoder, LossOutput, Modifier, Objective
from bowerbird.recipe import Component, Recipe, TrainSettings, build_config
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry
from bowerbird.train.checkpoint import (
    Progress,
    latest_checkpoint,
    load_checkpoint,
    restore_random_state,
    save_checkpoint,
)
from bowerbird.train.data import (
    SKIPPED,
    BatchReader,
    CachedTrunk,
    TrainItems,
    alternating_batches,
    cache_trunk,
    epoch_batches,
    to_device,
)
from bowerbird.train.log import RunLog, Timing
from bowerbird.train.run import TrainContext, start_folder
from bowerbird.train.schedules import lr_factor, weight_decay_at

CHECKPOINT_SECONDS = 30  # least time between two checkpoints that no setting asked for


class TrainingError(BowerbirdError):
    """Training cannot go on: the loss is no number. The last checkpoint is kept."""


@dataclass(frozen=True)
class RunResult:
    """``finished``: false where the run was stopped; ``metrics``: results of the evaluators.

    ``skipped``: items that could not be read and were left out since the start or the last resume, once per epoch.
    """

    run_dir: Path
    steps: int
    finished: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0


@dataclass
class _Run:
    """What the loop works on."""

    recipe: Recipe
    run_dir: Path
    device: torch.device
    dataset: Dataset
    objective: Objective
    wrapped: nn.Module  # the objective, in DDP where there are several processes
    modifiers: list[Modifier]
    optimizer: torch.optim.Optimizer
    batches_per_epoch: int
    steps_per_epoch: int
    progress: Progress
    labels: list[int] | None
    domains: list[int] | None  # where batches of the domains alternate
    cached: CachedTrunk | None = None
    skipped: int = 0  # items that this process could not read since it started, once per epoch

    @property
    def settings(self) -> TrainSettings:
        return self.recipe.train

    @property
    def passes(self) -> int:
        """Forward passes of an optimiser step; the last step of an epoch may have fewer."""
        return _passes(self.settings, self.domains)


def train(recipe: Recipe, run_dir: str | Path, *, resume: bool = False, show: bool = False) -> RunResult:
    """Train, export the encoder, and run the recipe's evaluators.

    Args:
        recipe: A resolved recipe (``bowerbird.recipe.load_recipe``).
        run_dir: Folder of the run; see ``bowerbird.train.run`` for what is in it.
        resume: Continue from the newest checkpoint in ``run_dir``; start where there is none.
        show: Draw a progress bar.

    Ctrl-C ends the current step, writes a checkpoint and returns with ``finished = False``.

    Raises:
        RecipeError: The folder is in use, or the parts of the recipe do not fit.
        TrainingError: The loss became NaN or infinite.
    """
    run_dir = Path(run_dir)
    device = dist.pick_device(recipe.train.device)
    with dist.process_group(device):
        begun = dist.is_main() and start_folder(run_dir, recipe, resume=resume)
        dist.barrier()
        try:
            run = _prepare(recipe, run_dir, device)
        except BowerbirdError:
            if begun:  # parts that do not fit leave no folder that the corrected recipe would stumble over
                shutil.rmtree(run_dir)
            raise
        if dist.is_main():
            get_registry().hook.bowerbird_run_started(run_dir=str(run_dir), recipe=recipe.to_dict())
        finished = run.progress.finished or _train(run, show=show and dist.is_main())
        metrics: Mapping[str, float] = {}
        if finished and dist.is_main():
            export_run(run.objective, run.modifiers, recipe, run_dir, run.dataset)
            metrics = _evaluate(recipe, run_dir, run.dataset)
            shutil.rmtree(run_dir / "cache", ignore_errors=True)
            get_registry().hook.bowerbird_run_finished(run_dir=str(run_dir), metrics=dict(metrics))
        dist.barrier()
        return RunResult(
            run_dir=run_dir, steps=run.progress.step, finished=finished, metrics=metrics, skipped=run.skipped
        )


def _prepare(recipe: Recipe, run_dir: Path, device: torch.device) -> _Run:
    """Build everything of a run and bring it to the state of its newest checkpoint."""
    settings = recipe.train
    record = get_registry().get("dataset", recipe.dataset.use)
    assert isinstance(record, DatasetRecord)
    dataset: Dataset = build(recipe.dataset, "dataset", recipe.dataset.split)
    if len(dataset) == 0:
        raise RecipeError(f"dataset {recipe.dataset.use!r}, split {recipe.dataset.split!r}: it has no items")
    has_labels = "label" in record.provides
    labels = list(dataset.labels()) if has_labels and settings.items_per_class is not None else None
    domains = list(dataset.domain_indices()) if settings.alternate else None
    batches = len(_epoch_batches(settings, len(dataset), 0, labels, domains))
    steps_per_epoch = math.ceil(batches / _passes(settings, domains))

    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed % 2**32)  # noqa: NPY002  plugins may use the global generator
    encoder: Encoder = build(recipe.encoder, "encoder").to(device)
    context = TrainContext(dataset, total_steps=settings.epochs * steps_per_epoch, seed=settings.seed, device=device)
    cached = None
    if settings.cache_trunk:
        file = run_dir / "cache" / "trunk.npy"
        cached = cache_trunk(encoder, dataset, file, device=device, with_labels=has_labels)
        context.trunk = (encoder, cached)
    encoder.train()
    objective: Objective = build(recipe.objective, "objective", encoder, context).to(device)
    objective.train()
    modifiers: list[Modifier] = [build(component, "modifier") for component in recipe.modifier]
    for modifier in modifiers:
        modifier.attach(objective.encoder, context.total_steps)
    if objective.item_transform() is not None:
        _check_item_transform(recipe)
    if not any(parameter.requires_grad for parameter in objective.parameters()):
        raise RecipeError("nothing to train: every parameter is frozen; add encoder.embed_dim or free the trunk")
    wrapped: nn.Module = objective
    if dist.is_distributed():
        wrapped = DistributedDataParallel(
            objective,
            device_ids=[device.index] if device.type == "cuda" else None,
            # Every pass of a step may use other parameters, those of its domain.
            find_unused_parameters=domains is not None and len(set(domains)) > 1,
        )
    run = _Run(
        recipe=recipe,
        run_dir=run_dir,
        device=device,
        dataset=dataset,
        objective=objective,
        wrapped=wrapped,
        modifiers=modifiers,
        optimizer=make_optimizer(objective, settings),
        batches_per_epoch=batches,
        steps_per_epoch=steps_per_epoch,
        progress=Progress(),
        labels=labels,
        domains=domains,
        cached=cached,
    )
    torch.manual_seed(settings.seed + dist.rank())  # from here on processes draw different noise
    path = latest_checkpoint(run_dir / "checkpoints")
    if path is not None:
        checkpoint = load_checkpoint(path)
        if checkpoint.progress.step_in_epoch:
            objective.on_epoch_start(checkpoint.progress.epoch)  # before the state, which was taken after it
        objective.load_state_dict(dict(checkpoint.objective))
        run.optimizer.load_state_dict(checkpoint.optimizer)
        if len(checkpoint.random_states) != dist.world_size():
            raise RecipeError(
                f"checkpoint {str(path)!r} was written by {len(checkpoint.random_states)} processes; "
                f"there are {dist.world_size()} now. Resume with the same number"
            )
        restore_random_state(checkpoint.random_states[dist.rank()])
        run.progress = checkpoint.progress
    return run


def _check_item_transform(recipe: Recipe) -> None:
    """Raise ``RecipeError`` for settings that would be ignored because the objective makes its own views."""
    if recipe.dataset.augment != "none":
        raise RecipeError(
            f"dataset.augment = {recipe.dataset.augment!r}: {recipe.objective.use} makes its own views of a picture; "
            "remove dataset.augment and see the objective's settings"
        )
    if recipe.train.cache_trunk:
        raise RecipeError(
            f"train.cache_trunk: {recipe.objective.use} sees a picture differently in every epoch, so nothing can be "
            "kept; remove train.cache_trunk"
        )


def _train(run: _Run, *, show: bool) -> bool:
    """Train to the end; false where the user stopped it."""
    settings = run.settings
    total = settings.epochs * run.steps_per_epoch
    timing = Timing()
    log = None
    if dist.is_main():
        log = RunLog(run.run_dir, total_steps=total, first_step=run.progress.step, timing=timing, show=show)
    reader = _reader(run) if run.cached is None else None
    with log or nullcontext(), _stop_request() as stop_request:
        losses = _Averages()
        saved_at = time.monotonic()
        for epoch in range(run.progress.epoch, settings.epochs):
            first = run.progress.step_in_epoch
            if not first:
                run.objective.on_epoch_start(epoch)
            groups = timing.waiting_for(_epoch_groups(run, reader, epoch, first))
            for step_in_epoch, group in enumerate(groups, start=first + 1):
                step = run.progress.step
                values = _step(run, step, group)
                losses.add(values)
                ends_epoch = step_in_epoch == run.steps_per_epoch
                run.progress = (
                    Progress(step=step + 1, epoch=epoch + 1)
                    if ends_epoch
                    else Progress(step=step + 1, epoch=epoch, step_in_epoch=step_in_epoch)
                )
                _check_loss(run, values["loss"])
                if log is not None:
                    log.step(step + 1)
                if (step + 1) % settings.log_every == 0 or step + 1 == total:
                    means = losses.take()
                    if log is not None:
                        left_out = {SKIPPED: run.skipped} if run.skipped else {}
                        log.values(step + 1, {"epoch": epoch, **means, **left_out})
                stop = dist.any_process(stop_request.is_set())
                due = _checkpoint_due(settings, step + 1, ends_epoch, saved_at)
                if step + 1 == total:
                    run.progress = replace(run.progress, finished=True)
                if due or stop or step + 1 == total:
                    save_checkpoint(
                        run.run_dir / "checkpoints",
                        progress=run.progress,
                        objective=run.objective,
                        optimizer=run.optimizer,
                    )
                    saved_at = time.monotonic()
                if stop and step + 1 < total:
                    return False
    return True


def _checkpoint_due(settings: TrainSettings, steps: int, ends_epoch: bool, saved_at: float) -> bool:
    if settings.checkpoint_every is not None:
        return steps % settings.checkpoint_every == 0
    # Epochs can be shorter than writing a checkpoint takes. The main process's clock decides for all.
    return ends_epoch and dist.any_process(dist.is_main() and time.monotonic() - saved_at > CHECKPOINT_SECONDS)


def _step(run: _Run, step: int, group: list[Batch]) -> dict[str, Tensor | float]:
    """One optimiser step over the forward passes of ``group``; returns what is logged."""
    settings = run.settings
    factor = lr_factor(step, steps_per_epoch=run.steps_per_epoch, settings=settings)
    decay = weight_decay_at(step, total_steps=settings.epochs * run.steps_per_epoch, settings=settings)
    for parameters in run.optimizer.param_groups:
        parameters["lr"] = settings.lr * parameters["lr_scale"] * factor
        if parameters["decays_as_recipe"]:
            parameters["weight_decay"] = decay
    run.objective.before_step(step)
    for modifier in run.modifiers:
        modifier.before_step(step)
    run.optimizer.zero_grad(set_to_none=True)
    seen: dict[str, list[Any]] = {}
    for position, batch in enumerate(group):
        last = position == len(group) - 1
        run.skipped += batch.pop(SKIPPED, 0)
        # DDP exchanges gradients once per step, with the last forward pass.
        waits = isinstance(run.wrapped, DistributedDataParallel) and not last
        with run.wrapped.no_sync() if waits else nullcontext():  # type: ignore[operator]
            with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
                output: LossOutput = run.wrapped(to_device(batch, run.device))
            (output.total / len(group)).backward()
        for key, value in {"loss": output.total, **output.parts, **output.stats}.items():
            seen.setdefault(key, []).append(value.detach() if isinstance(value, Tensor) else value)
    # A value that only some passes have (the loss of one domain) is the mean of those.
    values: dict[str, Any] = {key: sum(found) / len(found) for key, found in seen.items()}
    run.objective.before_update(step)
    if settings.clip_norm is not None:
        values["grad_norm"] = clip_grad_norm_(
            [p for parameters in run.optimizer.param_groups for p in parameters["params"]], settings.clip_norm
        )
    run.optimizer.step()
    run.objective.after_step(step)
    for modifier in run.modifiers:
        modifier.after_step(step)
    values["loss"] = dist.mean_over_processes(values["loss"])
    values["lr"] = settings.lr * factor
    return values


def _check_loss(run: _Run, loss: Tensor | float) -> None:
    if math.isfinite(float(loss)):
        return
    kept = latest_checkpoint(run.run_dir / "checkpoints")
    raise TrainingError(
        f"the loss is {float(loss)} at optimiser step {run.progress.step} of run {str(run.run_dir)!r}. "
        + (f"The last checkpoint is kept: {kept}. " if kept else "There is no checkpoint yet. ")
        + "Try a smaller train.lr, train.clip_norm = 1.0, or more train.warmup"
    )


def _passes(settings: TrainSettings, domains: list[int] | None) -> int:
    return settings.accumulate * (1 if domains is None else len(set(domains)))


def _epoch_batches(
    settings: TrainSettings, count: int, epoch: int, labels: list[int] | None, domains: list[int] | None
) -> list[Any]:
    if domains is not None:
        return alternating_batches(
            domains,
            batch_size=settings.batch_size,
            epoch=epoch,
            seed=settings.seed,
            rank=dist.rank(),
            world_size=dist.world_size(),
        )
    return epoch_batches(
        count,
        batch_size=settings.batch_size,
        epoch=epoch,
        seed=settings.seed,
        labels=labels,
        items_per_class=settings.items_per_class,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )


def _reader(run: _Run) -> BatchReader:
    encoder = run.objective.encoder
    items = TrainItems(
        run.dataset,
        encoder.preprocessing,
        augment=run.recipe.dataset.augment,
        seed=run.settings.seed,
        transform=run.objective.item_transform(),
        skip_unreadable=run.recipe.dataset.unreadable == "skip",
        frames=encoder.frames,
    )
    return BatchReader(items, workers=run.settings.workers, tokenize=getattr(encoder, "tokenize", None))


def _epoch_groups(run: _Run, reader: BatchReader | None, epoch: int, first_step: int) -> Iterator[list[Batch]]:
    """The batches of every optimiser step of an epoch, without the first ``first_step`` steps."""
    settings = run.settings
    order = _epoch_batches(settings, len(run.dataset), epoch, run.labels, run.domains)[first_step * run.passes :]
    if reader is None:
        assert run.cached is not None
        batches = run.cached.batches(order)
    else:
        batches = reader.epoch(epoch, order)
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == run.passes:
            yield group
            group = []
    if group:
        yield group


def build(component: Component, kind: str, *arguments: Any) -> Any:
    """The object that a table of a resolved recipe describes. Raises ``RecipeError`` that names the table."""
    registry = get_registry()
    record = registry.get(kind, component.use)
    config = build_config(record, component.settings, where=f"[{kind}]")
    try:
        return registry.load(record).build(config, *arguments)
    except InputError as error:
        raise RecipeError(f"[{kind}] {component.use}: {error}") from error


def make_optimizer(objective: Objective, settings: TrainSettings) -> torch.optim.Optimizer:
    """The recipe's optimiser over the objective's parameter groups; ``lr_scale`` of a group stays in it."""
    groups = [
        {
            "lr_scale": 1.0,
            "weight_decay": settings.weight_decay,
            "decays_as_recipe": "weight_decay" not in group,
            **group,
        }
        for group in objective.parameter_groups()
    ]
    if settings.optimizer == "sgd":
        momentum = 0.9 if settings.momentum is None else settings.momentum
        return torch.optim.SGD(groups, lr=settings.lr, momentum=momentum)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=settings.lr, betas=settings.betas or (0.9, 0.999))


def export_run(objective: Objective, modifiers: list[Modifier], recipe: Recipe, run_dir: Path, dataset: Dataset) -> str:
    """Write ``run_dir/encoder`` and return the fingerprint."""
    encoder: Any = objective.exported_encoder()
    for modifier in modifiers:
        encoder = modifier.finalize(encoder)
    classes = list(dataset.classes)
    classifier = objective.state_dict().get("classifier.weight")
    fits = classifier is not None and classifier.ndim == 2 and len(classifier) == len(classes)
    return save_encoder(
        encoder,
        run_dir / "encoder",
        use=recipe.encoder.use,
        config=recipe.encoder.settings,
        classes=classes,
        classifier=classifier if fits else None,
        relations=objective.relations(),
        card=f"Trained by the recipe **{recipe.name}** with `{recipe.objective.use}` on `{recipe.dataset.use}`"
        f"{f' (split `{recipe.dataset.split}`)' if recipe.dataset.split else ''}.\n\n"
        f"```toml\n{recipe.to_toml()}```",
    )


def _evaluate(recipe: Recipe, run_dir: Path, dataset: Dataset) -> Mapping[str, float]:
    if not recipe.evaluate:
        return {}
    from bowerbird.evaluate import evaluate

    return evaluate(run_dir, recipe.evaluate, device=recipe.train.device, training_set=dataset)


class _Averages:
    """Means of logged values since they were last taken."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.count = 0

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1

    def take(self) -> dict[str, float]:
        means = {key: float(value) / self.count for key, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


@contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_signal: int, _frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
