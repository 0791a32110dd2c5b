"""``compat:ract`` as it is trained: contracts, where old vectors come from, and the real training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_upgrade
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.testing import assert_close

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders import load_encoder
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, TrainedRun
from bowerbird.registry import get_registry
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, TinyEncoder
from bowerbird_compat.ract import (
    CompatibleContrastiveLoss,
    CompatibleTripletLoss,
    RACTConfig,
    RACTObjective,
    contra,
    opencompatible,
)

CLASSES = ("class-0", "class-1", "class-2")


def context(*, size: int = 8, classes: Sequence[str] = CLASSES, batches: Sequence[Batch] = ()) -> SimpleBuildContext:
    torch.manual_seed(1)
    old = TrainedRun(
        path=Path("old"),
        encoder=TinyEncoder(size),
        objective_state={"classifier.weight": torch.randn(4, size)},
        classes=("class-2", "another", "class-0", "class-1"),
        recipe={},
    )
    return SimpleBuildContext(classes=classes, runs={"old": old}, batches=batches)


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(12, 3, 8, 8, generator=generator)
    return {"image": images, "label": torch.randint(3, (12,), generator=generator)}


def build(given: BuildContext, **settings: Any) -> RACTObjective:
    torch.manual_seed(0)
    return RACTObjective.build(RACTConfig(old_run="old", measure=False, **settings), TinyEncoder(8), given)


# ------------------------------------------------------------------------------------------------------- contracts


class TestContract(ObjectiveContract):
    name = "compat:ract"
    config: dict[str, Any] = {"old_run": "old", "measure": False, "temperature": 0.1, "classifier": "arcface"}

    def make_context(self) -> BuildContext:
        return context()


class TestContractOfTheTripletForm(TestContract):
    config = {"old_run": "old", "measure": False, "compatibility": "triplet"}


class TestContractOfTheClassLevelForm(TestContract):
    config = {"old_run": "old", "measure": False, "compatibility": "class"}


# ---------------------------------------------------------------------------------------------------- what it builds


def test_the_loss_is_the_new_term_plus_the_weighted_compatibility_with_old_vectors_of_the_same_picture():
    for form in ("contrastive", "triplet", "l2", "class"):
        given = context()
        objective = build(given, compatibility=form, weight=3.0, temperature=0.2, topk=4, triplet_margin=0.5)
        seen = batch()
        out = objective(seen)
        new, labels = objective.encoder(seen).pooled, seen["label"]
        run = given.load_run("old")
        old, weight = run.encoder(seen).pooled, objective.classifier.weight
        if form == "contrastive":
            expected = CompatibleContrastiveLoss(0.2, 4, gather=True)(new, old, labels)
        elif form == "triplet":
            expected = CompatibleTripletLoss(0.5, 4)(new, old, labels)
        elif form == "l2":
            expected = (F.normalize(new) - F.normalize(old)).square().mean()
        else:
            rows = run.objective_state["classifier.weight"][[2, 3, 0]]  # matched by name
            of_new = (new @ weight.T).masked_fill(F.one_hot(labels, 3).bool(), -torch.inf)
            expected = F.cross_entropy(torch.cat([new @ rows.T, of_new], dim=1), labels)
        base = F.cross_entropy(new @ weight.T, labels)
        assert_close(out.parts["compatibility"], 3 * expected)
        assert_close(out.parts["new"], base)
        assert_close(out.total, base + 3 * expected)
        assert not any(name.startswith("_old") or "old_encoder" in name for name in objective.state_dict())


def test_the_old_encoder_never_learns_and_stays_in_eval_mode():
    given = context()
    objective = build(given).train()
    old = given.load_run("old").encoder
    objective(batch()).total.backward()
    assert not old.training
    assert all(p.grad is None and not p.requires_grad for p in old.parameters())


def test_old_vectors_come_from_the_batch_or_from_one_pass_where_they_are_cached():
    passes = [{**batch(seed=s), "index": torch.arange(12) + 12 * s} for s in range(2)]
    given = context(batches=passes)
    old = given.load_run("old").encoder
    cached = build(given, old_features="cached")
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    seen = {key: value[shuffled] for key, value in passes[1].items()}
    expected = build(given)(seen)
    assert_close(cached(seen).total, expected.total)
    given_vectors = {**seen, "old_features": old(seen).pooled + 1.0}
    moved = build(given)(given_vectors).parts["compatibility"]
    assert not torch.allclose(moved, expected.parts["compatibility"])


def test_presets_are_valid_and_differ_in_the_new_negatives_only():
    one, other = (RACTConfig(**preset()) for preset in (opencompatible, contra))
    assert (one.temperature, one.topk, one.weight) == (0.01, 10, 1.0)
    assert one.model_copy(update={"new_to_new": False}) == other


def test_an_old_model_that_cannot_be_used_is_refused_with_the_way_out():
    with pytest.raises(RecipeError, match=r"size 8, old has 5\. Set encoder\.embed_dim = 5"):
        build(context(size=5))
    with pytest.raises(RecipeError, match="no classes"):
        build(context(classes=()))
    with pytest.raises(RecipeError, match=r"set objective\.old_run"):
        RACTObjective.build(RACTConfig(), TinyEncoder(8), context())
    with pytest.raises(RecipeError, match="lacks stranger"):
        build(context(classes=("class-0", "stranger")), compatibility="class")
    without = TrainedRun(path=Path("old"), encoder=TinyEncoder(8), objective_state={}, classes=CLASSES, recipe={})
    with pytest.raises(RecipeError, match="holds none"):
        build(SimpleBuildContext(classes=CLASSES, runs={"old": without}), compatibility="class")
    other = TinyEncoder(8)
    other.preprocessing = Preprocessing(size=16)
    differing = TrainedRun(path=Path("old"), encoder=other, objective_state={}, classes=CLASSES, recipe={})
    given = SimpleBuildContext(classes=CLASSES, runs={"old": differing})
    with pytest.raises(RecipeError, match="old_features = 'cached'"):
        build(given)
    build(given, old_features="cached")
    with pytest.raises(ValidationError, match="not both"):
        RACTConfig(old_run="a", old_encoder="b")
    with pytest.raises(ValidationError, match="linear logits"):
        RACTConfig(compatibility="class", classifier="arcface")


# ----------------------------------------------------------------------------------------------------- the real loop


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    get_registry().register_module("small", small_upgrade)
    yield
    get_registry().unregister("small")


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    return small_upgrade.run(tmp_path_factory.mktemp("old"), 'use = "core:softmax"', split="old")


def mean_ap(queries: np.ndarray, gallery: np.ndarray, labels: Sequence[int]) -> float:
    relevant = Relevance.from_labels(np.array(labels), np.array(labels), exclude_self=True)
    return float(average_precision(RankedList.from_scores(queries @ gallery.T), relevant))


def test_a_trained_encoder_searches_the_old_gallery_and_its_export_says_so(old_run, tmp_path):
    objective = f'use = "compat:ract"\nold_run = "{old_run}"\ntemperature = 0.1'
    ract = load_encoder(small_upgrade.run(tmp_path / "ract", objective, split="all", seed=2), device="cpu")
    free = small_upgrade.run(tmp_path / "free", 'use = "core:softmax"', split="all", seed=1)
    old, data = load_encoder(old_run, device="cpu"), small_upgrade.Patterns.build(None, "all")
    images, labels = [data[i]["image"] for i in range(len(data))], data.labels()
    o, n, f = (encoder.encode(images) for encoder in (old, ract, load_encoder(free, device="cpu")))
    assert mean_ap(n, o, labels) > 1.5 * mean_ap(f, o, labels), "a free encoder cannot search the old gallery"

    (relation,) = ract.spec.relations
    assert (relation["kind"], relation["to"]) == ("compatible", old.fingerprint)
    evidence = relation["evidence"]
    assert (evidence["method"], evidence["new_to_new"]) == ("compat:ract", True)
    assert evidence["map_new_old"] == pytest.approx(mean_ap(n, o, labels), abs=1e-3)
    assert evidence["map_old_old"] == pytest.approx(mean_ap(o, o, labels), abs=1e-3)


@pytest.mark.parametrize("old_trunk", ["shared", "other"])
def test_a_cached_trunk_trains_as_the_pictures_do(old_run, tmp_path, old_trunk):
    """Without augmentation the old vectors of one pass are those of every step."""
    if old_trunk == "shared":
        frozen = "freeze_trunk = true"
        old_run = small_upgrade.run(tmp_path / "old", 'use = "core:softmax"', split="old", epochs=2, encoder=frozen)
    objective = f'use = "compat:ract"\nold_run = "{old_run}"\ntemperature = 0.1\nmeasure = false'
    weights = []
    for name, cache in (("pictures", "false"), ("cached", "true")):
        out = small_upgrade.run(
            tmp_path / name, objective, split="all", epochs=2, encoder="freeze_trunk = true",
            settings=f"cache_trunk = {cache}",
        )  # fmt: skip
        weights.append(load_encoder(out, device="cpu").module.head[1].weight)
    assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
