"""The training loop: exact resume, clean stops, equal results over processes, and what a run's folder holds."""

from __future__ import annotations

import json
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_fixtures as tiny
from PIL import Image

from bowerbird.encoders import load_encoder
from bowerbird.errors import DataError, RecipeError
from bowerbird.hookspecs import hookimpl
from bowerbird.recipe import Recipe, load_recipe, resolve_recipe
from bowerbird.registry import get_registry
from bowerbird.testing.gloo import run_two_ranks
from bowerbird.train.checkpoint import latest_checkpoint, load_checkpoint
from bowerbird.train.data import alternating_batches, augmented, epoch_batches
from bowerbird.train.loop import TrainingError, train
from bowerbird.train.run import load_run
from bowerbird.train.schedules import lr_factor, weight_decay_at


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    get_registry().register_module("tiny", tiny.make_plugin())
    tiny.Faulty.armed = True
    yield
    get_registry().unregister("tiny")


def make_recipe(**tables: dict[str, Any]) -> Recipe:
    base: dict[str, Any] = {
        "name": "squares",
        "encoder": {"use": "tiny:net"},
        "objective": {"use": "core:softmax"},
        "dataset": {"use": "tiny:squares", "split": "train"},
        "train": {"epochs": 3, "batch_size": 8, "lr": 0.01, "log_every": 1, "device": "cpu"},
    }
    for name, table in tables.items():
        base[name] = {**base[name], **table} if name in base else table
    return resolve_recipe(base)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    path = latest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    return dict(load_checkpoint(path).objective)


def assert_equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# -------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("objective", ["core:softmax", "core:margin", "core:supcon"])
def test_a_trained_encoder_groups_unseen_items_by_class(objective: str, tmp_path: Path) -> None:
    settings = {"epochs": 20, "items_per_class": 4} if objective == "core:supcon" else {"epochs": 20}
    result = train(make_recipe(objective={"use": objective}, train=settings), tmp_path / "run")
    assert result.finished
    test = tiny.Squares(seed=1)
    vectors = load_encoder(result.run_dir).encode_dataset(test)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    labels = np.asarray(test.labels())
    assert (labels[similarity.argmax(1)] == labels).mean() > 0.95


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    a, b, c = (
        train(make_recipe(train={"seed": seed}), tmp_path / name).run_dir
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert_equal_bits(weights(a), weights(b))
    assert not torch.equal(weights(a)["classifier.weight"], weights(c)["classifier.weight"])


def test_worker_processes_do_not_change_the_result(tmp_path: Path) -> None:
    data = {"augment": "crop-flip"}
    train(make_recipe(dataset=data, train={"epochs": 1}), tmp_path / "a")
    train(make_recipe(dataset=data, train={"epochs": 1, "workers": 1}), tmp_path / "b")
    assert_equal_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_two_accumulated_half_batches_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    sgd = {"optimizer": "sgd", "momentum": 0.0, "schedule": "constant", "epochs": 1}
    train(make_recipe(train={**sgd, "batch_size": 40}), tmp_path / "whole")
    train(make_recipe(train={**sgd, "batch_size": 20, "accumulate": 2}), tmp_path / "halves")
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    for key in whole:
        torch.testing.assert_close(whole[key], halves[key], rtol=1e-5, atol=1e-6)


def test_a_cached_frozen_trunk_gives_what_running_it_gives(tmp_path: Path) -> None:
    frozen = {"freeze_trunk": True}
    train(make_recipe(encoder=frozen), tmp_path / "run")
    train(make_recipe(encoder=frozen, train={"cache_trunk": True}), tmp_path / "cached")
    run, cached = weights(tmp_path / "run"), weights(tmp_path / "cached")
    for key in run:
        torch.testing.assert_close(run[key], cached[key], rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "cached" / "cache").exists()


def test_caching_a_trunk_that_is_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="freeze_trunk"):
        train(make_recipe(train={"cache_trunk": True}), tmp_path / "run")


def test_a_modifier_works_while_training_and_is_gone_from_the_exported_encoder(tmp_path: Path) -> None:
    noisy = make_recipe(modifier=[{"use": "tiny:noise"}])  # type: ignore[arg-type]
    train(noisy, tmp_path / "noisy")
    train(make_recipe(), tmp_path / "plain")
    assert not torch.equal(
        weights(tmp_path / "noisy")["classifier.weight"], weights(tmp_path / "plain")["classifier.weight"]
    )
    vectors = load_encoder(tmp_path / "noisy").encode_dataset(tiny.Squares(seed=1))
    assert np.array_equal(vectors, load_encoder(tmp_path / "noisy").encode_dataset(tiny.Squares(seed=1)))


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [0, 4, 7, 14])
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(step: int, tmp_path: Path) -> None:
    tables: dict[str, Any] = {
        "encoder": {"dropout": 0.3},  # draws from the global generator
        "dataset": {"augment": "crop-flip"},
        "objective": {"use": "tiny:faulty", "fault": "die", "at_step": step},
        "train": {"checkpoint_every": 2, "warmup": 0.5, "clip_norm": 1.0},
    }
    tiny.Faulty.armed = False
    train(make_recipe(**tables), tmp_path / "undisturbed")
    tiny.Faulty.armed = True
    with pytest.raises(MemoryError):
        train(make_recipe(**tables), tmp_path / "killed")
    result = train(make_recipe(**tables), tmp_path / "killed", resume=True)
    assert result.finished
    assert_equal_bits(weights(tmp_path / "undisturbed"), weights(tmp_path / "killed"))
    log = (tmp_path / "undisturbed" / "metrics.jsonl").read_text()
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == log


def test_ctrl_c_writes_a_checkpoint_and_the_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    objective = {"use": "tiny:faulty", "fault": "interrupt", "at_step": 6}
    tiny.Faulty.armed = False
    train(make_recipe(objective=objective), tmp_path / "undisturbed")
    tiny.Faulty.armed = True
    stopped = train(make_recipe(objective=objective), tmp_path / "stopped")
    assert (stopped.finished, stopped.steps) == (False, 7)
    with pytest.raises(RecipeError, match="not finished"):
        load_run(tmp_path / "stopped")
    assert train(make_recipe(objective=objective), tmp_path / "stopped", resume=True).finished
    assert_equal_bits(weights(tmp_path / "undisturbed"), weights(tmp_path / "stopped"))


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    train(make_recipe(), tmp_path / "run")
    before = weights(tmp_path / "run")
    assert train(make_recipe(), tmp_path / "run", resume=True).steps == 15
    assert_equal_bits(before, weights(tmp_path / "run"))


def test_a_run_is_not_overwritten_nor_resumed_by_another_recipe(tmp_path: Path) -> None:
    train(make_recipe(), tmp_path / "run")
    with pytest.raises(RecipeError, match="already holds a run"):
        train(make_recipe(), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"train\.lr \(0\.01 there, 0\.5 now\)"):
        train(make_recipe(train={"lr": 0.5}), tmp_path / "run", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(RecipeError, match="not empty"):
        train(make_recipe(), tmp_path / "full")


def test_parts_that_do_not_fit_are_named_with_their_table_and_leave_no_folder(tmp_path: Path) -> None:
    recipe = make_recipe(objective={"use": "tiny:faulty", "fault": "build"})
    with pytest.raises(RecipeError, match=r"\[objective\] tiny:faulty: num_parts = 5 does not divide 64 patches"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(make_recipe(), tmp_path / "run")
    path = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert path is not None
    file = path / "objective.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=path.name):
        train(make_recipe(), tmp_path / "run", resume=True)


def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    broken = make_recipe(objective={"use": "tiny:faulty", "fault": "nan", "at_step": 7}, train={"checkpoint_every": 3})
    with pytest.raises(TrainingError, match=r"nan at optimiser step 8 .*step-00000006"):
        train(broken, tmp_path / "run")
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


# ------------------------------------------------------------------------------- views, unreadable items, schedules


def test_an_objective_may_make_its_own_views_and_they_depend_on_seed_epoch_and_item_only(tmp_path: Path) -> None:
    seen = []
    for workers in (0, 1):
        tiny.Viewing.seen, tiny.Viewing.updates = [], []
        train(
            make_recipe(objective={"use": "tiny:views"}, train={"workers": workers, "epochs": 2}),
            tmp_path / f"{workers}",
        )
        seen.append(torch.cat(tiny.Viewing.seen))
        assert tiny.Viewing.updates == list(range(10))
    assert torch.equal(*seen)
    assert len(seen[0].unique()) == 80  # another number for every item in every epoch


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"dataset": {"augment": "flip"}}, "dataset.augment = 'flip': tiny:views makes its own views"),
        (
            {"encoder": {"freeze_trunk": True}, "train": {"cache_trunk": True}},
            "sees a picture differently in every epoch",
        ),
    ],
)
def test_settings_that_such_an_objective_would_ignore_are_refused(
    tables: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        train(make_recipe(objective={"use": "tiny:views"}, **tables), tmp_path / "run")


def test_an_item_that_cannot_be_read_ends_the_run_or_is_left_out_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"square-(3|11)\.png"):
        train(make_recipe(dataset={"split": "damaged"}), tmp_path / "strict")
    recipe = make_recipe(dataset={"split": "damaged", "unreadable": "skip"}, train={"epochs": 2, "log_every": 5})
    assert train(recipe, tmp_path / "run").skipped == 4  # both damaged items, once per epoch
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [2, 4]


def test_weight_decay_follows_its_cosine_and_leaves_vectors_alone(tmp_path: Path) -> None:
    settings = make_recipe(train={"weight_decay": 0.04, "weight_decay_end": 0.4}).train
    values = [weight_decay_at(step, total_steps=10, settings=settings) for step in range(11)]
    np.testing.assert_allclose([values[0], values[5], values[10]], [0.04, 0.22, 0.4])
    constant = make_recipe(train={"weight_decay": 0.1}).train
    assert {weight_decay_at(step, total_steps=10, settings=constant) for step in range(11)} == {0.1}
    moved = []
    for end in (0.0, 50.0):
        recipe = make_recipe(train={"weight_decay": 0.0, "weight_decay_end": end, "epochs": 1})
        train(recipe, tmp_path / f"{end}")
        moved.append(weights(tmp_path / f"{end}"))
    assert moved[1]["encoder.trunk.weight"].norm() < moved[0]["encoder.trunk.weight"].norm()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "sgd", "betas": [0.9, 0.95]}, "betas is a setting of optimizer = 'adam' and 'adamw'"),
        ({"betas": [0.9, 1.0]}, "expected two numbers from 0 to below 1"),
        ({"min_lr": 1.0}, "min_lr = 1.0 is above lr"),
        ({"min_lr": 1e-5, "schedule": "constant"}, "min_lr is a setting of schedule = 'cosine'"),
        ({"poly_power": 2.0}, "poly_power is a setting of schedule = 'poly'"),
        ({"alternate": True, "items_per_class": 2}, "leave one of them out"),
        ({"alternate": True, "cache_trunk": True}, "leave one of them out"),
        ({"alternate": True}, "train.alternate needs items with a domain"),
    ],
)
def test_settings_without_an_effect_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(train=values)


# ------------------------------------------------------------------------------------------------------- processes


def train_in_a_group(rank: int, folder: str) -> int:
    get_registry().register_module("tiny", tiny.make_plugin())
    return train(make_recipe(train=TWO_PROCESSES), folder).steps


TWO_PROCESSES = {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size": 10, "accumulate": 2}


def test_two_processes_give_what_one_gives_on_the_joined_batch(tmp_path: Path) -> None:
    train(make_recipe(train=TWO_PROCESSES), tmp_path / "one")
    assert run_two_ranks(train_in_a_group, str(tmp_path / "two"), timeout=240) == [4, 4]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


ALTERNATING: dict[str, dict[str, Any]] = {
    "dataset": {"use": "tiny:places", "split": "train"},
    "objective": {"use": "tiny:by-place"},
    "train": {"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size": 6, "alternate": True, "log_every": 1},
}


def train_alternating(rank: int, folder: str) -> int:
    get_registry().register_module("tiny", tiny.make_plugin())
    return train(make_recipe(**ALTERNATING), folder).steps


def test_an_alternating_step_adds_up_one_pure_batch_of_every_domain_on_one_and_on_two_processes(tmp_path: Path) -> None:
    tiny.ByPlace.seen.clear()
    one = train(make_recipe(**ALTERNATING), tmp_path / "one")
    assert one.steps == 2 * 5  # an epoch is one pass over the 30 items of the larger domain
    assert [domain for _, (domain,) in tiny.ByPlace.seen] == [0, 1] * 10
    for items, (domain,) in tiny.ByPlace.seen:
        assert len(set(items)) == 6
        assert {int(i % 4 == 3) for i in items} == {domain}
    lines = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # the mean over the passes of a step, and each domain's own loss undiluted
        assert line["loss"] == pytest.approx((line["loss of land"] + line["loss of sea"]) / 2, rel=1e-6)
    assert run_two_ranks(train_alternating, str(tmp_path / "two"), timeout=240) == [10, 10]
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for key in ours:  # the classifier of land is not used in the pass that exchanges gradients
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


def test_an_alternating_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    undisturbed = train(make_recipe(**ALTERNATING), tmp_path / "whole").run_dir
    settings = {**ALTERNATING["train"], "checkpoint_every": 3}
    faulty = make_recipe(**{**ALTERNATING, "train": settings})
    step = tiny.ByPlace.forward

    def dies_later(self: Any, batch: Any) -> Any:
        if len(tiny.ByPlace.seen) == 9:  # in the fifth step
            raise MemoryError("as if the machine had died")
        return step(self, batch)

    tiny.ByPlace.seen.clear()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(tiny.ByPlace, "forward", dies_later)
        train(faulty, tmp_path / "cut")
    tiny.ByPlace.seen.clear()
    train(faulty, tmp_path / "cut", resume=True)
    assert len(tiny.ByPlace.seen) == 2 * (10 - 3)
    assert_equal_bits(weights(undisturbed), weights(tmp_path / "cut"))


# ------------------------------------------------------------------------------------------- what a run leaves behind


def test_a_run_records_its_recipe_versions_seed_and_metrics(tmp_path: Path) -> None:
    recipe = make_recipe(train={"seed": 5})
    run = train(recipe, tmp_path / "run").run_dir
    assert load_recipe(run / "recipe.toml") == recipe == load_recipe(run / "recipe.json")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 5
    assert {"bowerbird-core", "torch", "numpy"} <= environment["packages"].keys()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_run_says_how_long_it_waited_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Any, index: int) -> dict[str, Any]:
        time.sleep(0.01)
        return read(self, index)

    read = tiny.Squares.__getitem__
    monkeypatch.setattr(tiny.Squares, "__getitem__", slow)
    train(make_recipe(train={"epochs": 1}), tmp_path / "run")
    timing = json.loads((tmp_path / "run" / "timing.json").read_text())
    assert timing["steps"] == 5
    assert 5 * 8 * 0.01 <= timing["data_wait_seconds"] <= timing["seconds"]
    # All three are rounded; 0.0005 of the half second that this takes is 0.001 of a share.
    assert timing["data_wait_share"] == pytest.approx(timing["data_wait_seconds"] / timing["seconds"], abs=5e-3)


def test_a_finished_run_gives_its_encoder_classifier_and_classes(tmp_path: Path) -> None:
    run_dir = train(make_recipe(), tmp_path / "run").run_dir
    run = load_run(run_dir)
    assert run.classes == tiny.COLOURS
    assert run.objective_state["classifier.weight"].shape == (3, 8)
    assert not run.encoder.training
    assert not any(parameter.requires_grad for parameter in run.encoder.parameters())
    exported = load_run(run_dir / "encoder")
    assert torch.equal(exported.objective_state["classifier.weight"], run.objective_state["classifier.weight"])
    with pytest.raises(RecipeError, match="no such folder"):
        load_run(tmp_path / "nowhere")


def test_loggers_hear_of_the_start_the_steps_and_the_end(tmp_path: Path) -> None:
    heard: list[Any] = []
    logger = types.ModuleType("logger_plugin")
    logger.BOWERBIRD_API = "1.0"  # type: ignore[attr-defined]

    @hookimpl
    def bowerbird_run_started(run_dir: str, recipe: dict[str, Any]) -> None:
        heard.append(recipe["name"])

    @hookimpl
    def bowerbird_step_logged(run_dir: str, step: int, values: dict[str, float]) -> None:
        heard.append((step, round(values["lr"], 4)))

    @hookimpl
    def bowerbird_run_finished(run_dir: str, metrics: dict[str, float]) -> None:
        heard.append("end")

    for hook in (bowerbird_run_started, bowerbird_step_logged, bowerbird_run_finished):
        setattr(logger, hook.__name__, hook)
    get_registry().register_module("logger", logger)
    try:
        train(make_recipe(train={"epochs": 1, "log_every": 2, "schedule": "constant"}), tmp_path / "run")
    finally:
        get_registry().unregister("logger")
    assert heard == ["squares", (2, 0.01), (4, 0.01), (5, 0.01), "end"]


# ---------------------------------------------------------------------------------------------------- order of items


def test_an_epoch_visits_every_item_once_and_the_next_one_in_another_order() -> None:
    epochs = [np.concatenate(epoch_batches(40, batch_size=8, epoch=e, seed=3)) for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_parts_of_the_processes_make_up_the_joined_batches() -> None:
    joined = epoch_batches(50, batch_size=12, epoch=2, seed=1)
    parts = [epoch_batches(50, batch_size=12, epoch=2, seed=1, rank=r, world_size=3) for r in range(3)]
    for position, batch in enumerate(joined):
        np.testing.assert_array_equal(batch, np.concatenate([part[position] for part in parts]))
    with pytest.raises(RecipeError, match="divided among 5"):
        epoch_batches(50, batch_size=12, epoch=0, seed=0, world_size=5)


def test_alternating_batches_are_pure_and_repeat_the_smaller_domain_with_new_random_numbers() -> None:
    domains = [0] * 23 + [1] * 9 + [2] * 3
    batches = alternating_batches(domains, batch_size=4, epoch=1, seed=2)
    assert len(batches) == 3 * 5  # 23 // 4 rounds
    assert [{domains[i % 35] for i in batch} for batch in batches] == [{0}, {1}, {2}] * 5
    assert [len(batch) for batch in batches] == [4, 4, 3] * 5
    assert all(len({i % 35 for i in batch}) == len(batch) for batch in batches)
    indices = np.concatenate(batches)
    assert len(set(indices)) == len(indices)  # an item that comes again has another index, and so other noise
    assert sorted(i // 35 for i in np.concatenate(batches[2::3])) == [count for count in range(5) for _ in range(3)]
    joined = alternating_batches([0, 1] * 12, batch_size=6, epoch=0, seed=0)
    parts = [alternating_batches([0, 1] * 12, batch_size=6, epoch=0, seed=0, rank=r, world_size=2) for r in range(2)]
    for position, batch in enumerate(joined):
        np.testing.assert_array_equal(batch, np.concatenate([part[position] for part in parts]))
    with pytest.raises(RecipeError, match="3 items of one domain cannot be divided among 2"):
        alternating_batches(domains, batch_size=4, epoch=0, seed=0, world_size=2)


def test_batches_by_class_hold_groups_of_one_class() -> None:
    labels = np.random.default_rng(0).integers(0, 6, 120)
    batches = epoch_batches(120, batch_size=24, epoch=0, seed=0, labels=list(labels), items_per_class=4)
    found = np.concatenate(batches)
    assert sorted(found) == list(range(120))
    alone = sum((np.bincount(labels[batch]) == 1).sum() for batch in batches)
    assert alone <= 6  # at most the last group of a class can be smaller, or cut by the end of a batch


def test_augmentation_keeps_a_share_of_the_area_and_flips_half_of_the_images() -> None:
    image = Image.fromarray(np.arange(30 * 20, dtype=np.uint8).reshape(20, 30))
    generator = np.random.default_rng(0)
    for _ in range(50):
        width, height = augmented(image, "crop", generator).size
        assert 0.3 * 600 < width * height <= 600
    flips = [np.asarray(augmented(image, "flip", generator))[0, 0] != 0 for _ in range(200)]
    assert 70 < sum(flips) < 130
    assert augmented(image, "none", generator) is image


def test_learning_rates_warm_up_and_then_follow_the_schedule() -> None:
    def factors(**values: Any) -> list[float]:
        settings = make_recipe(train={"epochs": 4, **values}).train
        return [lr_factor(step, steps_per_epoch=10, settings=settings) for step in range(40)]

    warm = factors(warmup=1.0)
    np.testing.assert_allclose(warm[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(warm[10:], 0.5 * (1 + np.cos(np.pi * np.arange(30) / 30)))
    np.testing.assert_allclose(factors(schedule="step", step_epochs=1.5, step_factor=0.5),
                               [1.0] * 15 + [0.5] * 15 + [0.25] * 10)  # fmt: skip
    np.testing.assert_allclose(factors(schedule="step", step_epochs=[2, 3.5]), [1.0] * 20 + [0.1] * 15 + [0.01] * 5)
    assert set(factors(schedule="constant")) == {1.0}
    np.testing.assert_allclose(factors(schedule="poly"), (1 - np.arange(40) / 40) ** 0.9)
    np.testing.assert_allclose(factors(schedule="poly", poly_power=2.0, warmup=1.0)[10:], (1 - np.arange(30) / 30) ** 2)
    low = factors(min_lr=0.001)  # of lr = 0.01
    np.testing.assert_allclose(low, 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40)))
