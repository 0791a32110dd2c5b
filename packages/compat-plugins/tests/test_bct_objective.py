"""``compat:bct`` as it is trained: built from a finished run, in the real training loop, and its exported relation."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict, ValidationError
from small_upgrade import NAMES, Patterns
from torch import nn

from bowerbird.batch import Batch
from bowerbird.cli.gallery import relate
from bowerbird.data.images import Preprocessing
from bowerbird.encoders import load_encoder
from bowerbird.errors import RecipeError
from bowerbird.gallery import Gallery
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import BuildContext, Encoder, Features, TrainedRun
from bowerbird.recipe import load_recipe
from bowerbird.records import DatasetRecord, EncoderRecord
from bowerbird.registry import get_registry
from bowerbird.testing import ObjectiveContract, PluginTester, SimpleBuildContext, TinyEncoder
from bowerbird.train.loop import train
from bowerbird_compat.bct import BCTConfig, BCTObjective
from bowerbird_compat.prototypes import build_prototypes


class PatchConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    embed_dim: int = 6


class PatchEncoder(Encoder):
    """8 x 8 pixels through one hidden layer."""

    preprocessing = Preprocessing(size=8, interpolation="bilinear")

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, embed_dim)
        )

    @classmethod
    def build(cls, config: PatchConfig) -> Self:
        return cls(config.embed_dim)

    def forward(self, batch: Batch) -> Features:
        return Features(pooled=self.layers(batch["image"]))

    def stored_config(self, config: Any) -> dict[str, Any]:
        return dict(config)


@hookimpl
def bowerbird_encoders() -> Iterator[EncoderRecord]:
    yield EncoderRecord(name="toy:patch", target="toy:PatchEncoder", config="toy:PatchConfig", summary="Small.")


@hookimpl
def bowerbird_datasets() -> Iterator[DatasetRecord]:
    yield DatasetRecord(
        name="toy:patterns",
        target="toy:Patterns",
        summary="Patterns.",
        provides=("image", "label", "item_id"),
        splits=("old", "new"),
    )


@pytest.fixture(scope="module", autouse=True)
def toy() -> Iterator[None]:
    module = types.ModuleType("toy")
    vars(module).update({"BOWERBIRD_API": "1.0", "PatchEncoder": PatchEncoder, "PatchConfig": PatchConfig})
    vars(module).update({"Patterns": Patterns, "bowerbird_encoders": bowerbird_encoders})
    vars(module)["bowerbird_datasets"] = bowerbird_datasets
    sys.modules["toy"] = module
    get_registry().register_module("toy", module)
    yield
    get_registry().unregister("toy")
    del sys.modules["toy"]


def run(folder: Path, *, objective: str, split: str, embed_dim: int = 6, epochs: int = 20, seed: int = 0) -> Path:
    recipe = folder / f"{split}-{seed}.toml"
    recipe.write_text(
        f"""
name = "test"
[encoder]
use = "toy:patch"
embed_dim = {embed_dim}
[dataset]
use = "toy:patterns"
split = "{split}"
[objective]
{objective}
[train]
epochs = {epochs}
batch_size = 24
lr = 0.01
weight_decay = 0.1
seed = {seed}
device = "cpu"
"""
    )
    out = folder / f"run-{split}-{seed}-{embed_dim}"
    assert train(load_recipe(recipe), out).finished
    return out


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory, toy: None) -> Path:
    return run(tmp_path_factory.mktemp("old"), objective='use = "core:softmax"', split="old")


class Split(SimpleBuildContext):
    """A context over a split of the patterns, with real runs."""

    def __init__(self, split: str) -> None:
        self.data = Patterns.build(None, split)
        super().__init__(classes=self.data.classes)

    def load_run(self, path: str | Path) -> TrainedRun:
        from bowerbird.train.run import load_run

        return load_run(path)

    def eval_batches(self, encoder: Encoder, keys: Sequence[str] = ("image", "label")) -> Iterator[Batch]:
        assert not encoder.training
        items = [self.data[i] for i in range(len(self.data))]
        for start in range(0, len(items), 50):
            part = items[start : start + 50]
            images = np.stack([encoder.preprocessing(item["image"]) for item in part])
            yield {"image": torch.from_numpy(images), "label": torch.tensor([item["label"] for item in part])}


def build(context: BuildContext, **settings: Any) -> BCTObjective:
    torch.manual_seed(0)
    return BCTObjective.build(BCTConfig(**settings), PatchEncoder(9), context)


# ------------------------------------------------------------------------------------------------------- contracts


class TestContract(ObjectiveContract):
    name = "compat:bct"
    config = {"old_run": "old", "measure": False, "classifier": "arcface"}

    def make_context(self) -> BuildContext:
        torch.manual_seed(1)
        old = TrainedRun(
            path=Path("old"),
            encoder=TinyEncoder(5),
            objective_state={"classifier.weight": torch.randn(3, 5)},
            classes=("class-2", "class-0", "another"),
            recipe={},
        )
        classes = [f"class-{i}" for i in range(self.num_classes)]
        return SimpleBuildContext(classes=classes, runs={"old": old}, batches=[self.make_batch(seed=9)])


class TestContractWithSoftmaxAndRealClassifier(TestContract):
    config = {"old_run": "old", "measure": False, "old_classifier": "real"}


def test_the_plugin_is_sound():
    PluginTester("compat").assert_sound()


# ------------------------------------------------------------------------------------------------------- what it builds


def test_classes_are_matched_by_name_between_the_old_run_and_the_new_split(old_run):
    influence = build(Split("new"), old_run=str(old_run), old_classifier="real").influence
    weight = load_classifier(old_run)
    assert torch.equal(influence.old_classifier, weight)
    rows = influence.old_labels(torch.arange(6)).tolist()
    assert [NAMES[::-1][label] for label in range(6) if rows[label] >= 0] == ["cat", "bee", "ant"]
    assert rows == [-1, -1, -1, 2, 1, 0]
    assert (influence.normalize, influence.scale) == (False, 1.0)


def load_classifier(run_dir: Path) -> torch.Tensor:
    from bowerbird.encoders.bundle import read_classifier

    weight = read_classifier(run_dir / "encoder")
    assert weight is not None
    return weight


def test_prototypes_are_the_class_means_of_the_old_encoder_on_the_new_split(old_run):
    context = Split("new")
    influence = build(context, old_run=str(old_run)).influence
    old = load_encoder(old_run, device="cpu").module
    expected = build_prototypes(old, context.eval_batches(old), 6).weight
    assert torch.equal(influence.old_classifier, expected)
    assert influence.old_labels(torch.arange(6)).tolist() == list(range(6))
    assert (influence.normalize, influence.scale) == (True, 16.0)
    normalised = build(context, old_run=str(old_run), normalize_prototypes=True).influence.old_classifier
    torch.testing.assert_close(normalised, F.normalize(expected))


def test_auto_takes_the_real_classifier_only_where_it_knows_every_new_class(old_run):
    assert len(build(Split("old"), old_run=str(old_run)).influence.old_classifier) == 3
    same_classes = build(Split("old"), old_run=str(old_run)).influence
    assert torch.equal(same_classes.old_classifier, load_classifier(old_run))
    assert len(build(Split("new"), old_run=str(old_run)).influence.old_classifier) == 6


def test_unit_embeddings_meet_unit_rows_of_a_real_classifier(old_run):
    influence = build(
        Split("old"), old_run=str(old_run), old_classifier="real", influence_normalize=True, influence_scale=20.0
    ).influence
    torch.testing.assert_close(influence.old_classifier, F.normalize(load_classifier(old_run)))
    assert (influence.normalize, influence.scale) == (True, 20.0)


def test_an_exported_encoder_serves_as_the_old_model(old_run):
    from_run = build(Split("old"), old_run=str(old_run)).influence.old_classifier
    from_folder = build(Split("old"), old_run=str(old_run / "encoder")).influence.old_classifier
    assert torch.equal(from_run, from_folder)


@pytest.mark.parametrize("classifier", ["softmax", "cosine", "cosface", "arcface", "arcface_monotone"])
def test_the_loss_is_the_new_term_plus_the_weighted_influence(old_run, classifier):
    objective = build(
        Split("new"), old_run=str(old_run), classifier=classifier, influence_weight=3.0, label_smoothing=0.1
    ).eval()
    batch = next(Split("new").eval_batches(objective.encoder))
    out = objective(batch)
    embeddings = objective.encoder(batch).pooled
    influence = objective.influence
    features = F.normalize(F.pad(embeddings, (0, 0))[:, :6])
    old = F.cross_entropy(16 * features @ influence.old_classifier.T, batch["label"], label_smoothing=0.1)
    if classifier == "softmax":
        logits = objective.classifier(embeddings)
    else:
        logits = objective.head(embeddings, objective.classifier.weight, batch["label"])
        assert objective.classifier.bias is None
    new = F.cross_entropy(logits, batch["label"], label_smoothing=0.1)
    torch.testing.assert_close(out.parts["new"], new)
    torch.testing.assert_close(out.parts["influence"], 3 * old)
    torch.testing.assert_close(out.total, new + 3 * old)


def test_a_classifier_that_cannot_be_used_is_refused_with_the_way_out(old_run):
    class Elsewhere(Split):
        def __init__(self) -> None:
            super().__init__("new")
            self.classes = ("x", "y")

    with pytest.raises(RecipeError, match=r"no class of the training split \(x, y\).*prototypes"):
        build(Elsewhere(), old_run=str(old_run), old_classifier="real")
    without = TrainedRun(path=Path("o"), encoder=PatchEncoder(4), objective_state={}, classes=NAMES, recipe={})
    context = SimpleBuildContext(classes=NAMES, runs={"o": without})
    with pytest.raises(RecipeError, match="holds no classifier"):
        build(context, old_run="o", old_classifier="real")
    with pytest.raises(RecipeError, match="no classes"):
        build(SimpleBuildContext(classes=()), old_run="o")
    with pytest.raises(RecipeError, match=r"set objective\.old_run"):
        build(context)
    with pytest.raises(ValidationError, match="not both"):
        BCTConfig(old_run="a", old_encoder="b")


# ------------------------------------------------------------------------------------------------- the real loop


def mean_ap(queries: np.ndarray, gallery: np.ndarray, labels: Sequence[int]) -> float:
    from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision

    relevant = Relevance.from_labels(np.array(labels), np.array(labels), exclude_self=True)
    return float(average_precision(RankedList.from_scores(queries @ gallery.T), relevant))


@pytest.fixture(scope="module")
def bct_run(old_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    objective = f'use = "compat:bct"\nold_run = "{old_run}"'
    return run(tmp_path_factory.mktemp("bct"), objective=objective, split="new", seed=2)


def test_a_gallery_learns_the_relation_and_its_evidence_from_the_export(old_run, bct_run, tmp_path):
    old, bct = load_encoder(old_run, device="cpu"), load_encoder(bct_run, device="cpu")
    with Gallery.create(tmp_path / "gallery", old.space()) as gallery:
        gallery.add(["a"], np.eye(6, dtype=np.float32)[:1])
        assert not gallery.compatible(bct.fingerprint, old.fingerprint)
    result = CliRunner().invoke(relate, [str(tmp_path / "gallery"), "--new", str(bct_run), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    with Gallery.open(tmp_path / "gallery", readonly=True) as gallery:
        assert gallery.compatible(bct.fingerprint, old.fingerprint)
        assert gallery.relations()[0].evidence == bct.spec.relations[0]["evidence"]


def test_a_trained_encoder_searches_the_old_gallery_and_its_export_says_so(old_run, bct_run, tmp_path):
    star = load_encoder(run(tmp_path, objective='use = "core:softmax"', split="new", seed=1), device="cpu")
    bct = load_encoder(bct_run, device="cpu")
    old, data = load_encoder(old_run, device="cpu"), Patterns.build(None, "new")
    images, labels = [data[i]["image"] for i in range(len(data))], data.labels()
    o, n, s = (encoder.encode(images) for encoder in (old, bct, star))
    assert mean_ap(n, o, labels) > 2 * mean_ap(s, o, labels), "a freely trained encoder cannot search the old gallery"

    (relation,) = bct.spec.relations
    assert (relation["kind"], relation["to"]) == ("compatible", old.fingerprint)
    evidence = relation["evidence"]
    assert evidence["items"] == len(data)
    assert evidence["map_new_old"] == pytest.approx(mean_ap(n, o, labels), abs=1e-3)
    assert evidence["map_old_old"] == pytest.approx(mean_ap(o, o, labels), abs=1e-3)
    assert evidence["improves"] is (mean_ap(n, o, labels) > mean_ap(o, o, labels))
    assert star.spec.relations == ()
    json.dumps(relation)


@pytest.mark.parametrize("embed_dim", [4, 9])
def test_training_leaves_the_old_classifier_as_it_was_whatever_the_sizes_and_the_weight_decay(
    old_run, tmp_path, embed_dim
):
    from bowerbird.train.run import load_run

    objective = f'use = "compat:bct"\nold_run = "{old_run}"\nmeasure = false'
    out = run(tmp_path, objective=objective, split="new", embed_dim=embed_dim, epochs=2)
    trained = load_run(out)
    before = build(Split("new"), old_run=str(old_run)).influence.old_classifier
    assert torch.equal(trained.objective_state["influence.old_classifier"], before)
    assert trained.objective_state["classifier.weight"].shape == (6, embed_dim)
    assert load_encoder(out).spec.relations[0]["evidence"] == {"method": "compat:bct", "influence_weight": 1.0}


def test_the_influence_loss_alone_moves_only_the_encoder(old_run):
    objective = build(Split("new"), old_run=str(old_run)).train()
    assert "influence.old_classifier" not in dict(objective.named_parameters())
    grouped = [p for group in objective.parameter_groups() for p in group["params"]]
    assert all(p is not objective.influence.old_classifier for p in grouped)
    batch = next(Split("new").eval_batches(objective.encoder.eval()))
    objective.influence(objective.encoder(batch).pooled, batch["label"]).backward()
    assert all(p.grad is not None for p in objective.encoder.parameters())
    assert all(p.grad is None for p in objective.classifier.parameters())
    last = objective.encoder.layers[-1].weight.grad
    assert torch.equal(last[6:], torch.zeros(3, 32)), "entries beyond the old size are free"
