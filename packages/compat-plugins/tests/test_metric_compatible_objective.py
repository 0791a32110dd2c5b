"""``compat:metric-compatible`` as it is trained, and the reverse transform that comes out of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_upgrade
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch.testing import assert_close

from bowerbird.batch import Batch
from bowerbird.cli import main
from bowerbird.encoders import load_encoder
from bowerbird.encoders.export import export_encoder
from bowerbird.errors import DataError, RecipeError
from bowerbird.gallery import Gallery
from bowerbird.gallery.transform import Step
from bowerbird.protocols import BuildContext, TrainedRun
from bowerbird.registry import get_registry
from bowerbird.testing import ObjectiveContract, SimpleBuildContext, TinyEncoder
from bowerbird.train.run import load_run
from bowerbird.upgrade import Upgrade
from bowerbird.upgrade.serve import serve
from bowerbird_compat.online_backfilling import MetricCompatibleLoss
from bowerbird_compat.online_backfilling_objective import (
    MetricCompatibleConfig,
    MetricCompatibleObjective,
    reverse_transform_of,
)
from bowerbird_compat.transform_strategies import ReverseTransform


def batch(seed: int) -> Batch:
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "label": torch.arange(12) % 3, "index": torch.arange(12)}


def context(given: Batch) -> BuildContext:
    torch.manual_seed(1)
    old = TrainedRun(path=Path("old"), encoder=TinyEncoder(5), objective_state={}, classes=(), recipe={})
    return SimpleBuildContext(classes=["a", "b", "c"], runs={"old": old}, batches=[given])


class TestContract(ObjectiveContract):
    name = "compat:metric-compatible"
    config: dict[str, Any] = {"old_run": "old", "measure": False}

    def make_context(self) -> BuildContext:
        torch.manual_seed(1)
        old = TrainedRun(path=Path("old"), encoder=TinyEncoder(5), objective_state={}, classes=(), recipe={})
        classes = [f"class-{i}" for i in range(self.num_classes)]
        return SimpleBuildContext(classes=classes, runs={"old": old}, batches=[self.make_batch(seed=9)])


def test_the_loss_is_the_weighted_sum_of_classification_and_the_terms_of_the_paper():
    given = batch(0)
    torch.manual_seed(0)
    config = MetricCompatibleConfig(old_run="old", classification_weight=0.5, regression_weight=2.0, temperature=0.2)
    objective = MetricCompatibleObjective.build(config, TinyEncoder(7), context(given)).eval()
    out = objective(given)
    n = objective.encoder(given).pooled
    old = objective.old_vectors.get(given["index"])
    loss = MetricCompatibleLoss(0.2, include_new_side=True, weights=(2.0, 1.0, 1.0))
    expected = loss(objective.reverse(F.normalize(n)), old, n, given["label"])["total"]
    classification = F.cross_entropy(objective.classifier(n), given["label"])
    assert_close(out.total, expected + 0.5 * classification)
    assert set(out.parts) == {"classification", "rqt_cos", "mcl_old", "mcl_new"}
    out.total.backward()
    assert objective.reverse.linear.weight.grad.abs().sum() > 0


def test_a_recipe_without_an_old_model_is_refused():
    with pytest.raises(RecipeError, match=r"compat:metric-compatible needs the old model: set objective\.old_run"):
        MetricCompatibleObjective.build(MetricCompatibleConfig(), TinyEncoder(7), context(batch(0)))


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    get_registry().register_module("small", small_upgrade)
    yield
    get_registry().unregister("small")


@pytest.fixture(scope="module")
def old_run(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_upgrade.run(tmp_path_factory.mktemp("old"), 'use = "core:softmax"', split="old", epochs=4)


@pytest.fixture(scope="module")
def new_run(old_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_upgrade.run(
        tmp_path_factory.mktemp("new"), f'use = "compat:metric-compatible"\nold_run = "{old_run}"', split="all",
        epochs=15, encoder="freeze_trunk = true", settings="cache_trunk = true",
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, data = tmp_path_factory.mktemp("pictures"), small_upgrade.Patterns.build(None, "all")
    files = [folder / f"{i:03d}.png" for i in range(len(data))]
    for i, file in enumerate(files):
        data[i]["image"].save(file)
    return files


def filled(folder: Path, encoder: Path, pictures: Sequence[Path]) -> Gallery:
    loaded, labels = load_encoder(encoder, device="cpu"), small_upgrade.Patterns.build(None, "all").labels()
    gallery = Gallery.create(folder, loaded.space())
    gallery.add(
        [file.stem for file in pictures], loaded.encode(pictures), uris=[str(file) for file in pictures],
        metadata=[{"label": str(label)} for label in labels],
    )  # fmt: skip
    return gallery


def test_the_export_carries_the_way_into_the_old_space(old_run, new_run, pictures, tmp_path):
    old, new = (load_encoder(path, device="cpu") for path in (old_run, new_run))
    psi = new.transform_to(old.fingerprint)
    assert psi is not None and (psi.source, psi.target) == (new.fingerprint, old.fingerprint)
    o, n = old.encode(pictures), new.encode(pictures)
    own = np.sum(psi(n) * o, axis=1).mean()
    assert own > np.sum(psi(n) * np.roll(o, 1, axis=0), axis=1).mean() + 0.1
    learned = load_run(new_run).objective_state["reverse.linear.weight"]
    assert_close(torch.from_numpy(psi.steps[0].weight), learned)
    export_encoder(new_run, tmp_path / "export")
    for folder in (new_run, tmp_path / "export"):
        assert reverse_transform_of(folder).fingerprint == psi.fingerprint
        assert reverse_transform_of(folder, old_run).fingerprint == psi.fingerprint


def test_the_way_is_refused_for_another_pair_or_direction(old_run, new_run, tmp_path):
    old, new = (load_encoder(path, device="cpu") for path in (old_run, new_run))
    psi = new.transform_to(old.fingerprint)
    assert new.transform_to("f" * 64) is None and old.transform_to(new.fingerprint) is None
    with pytest.raises(DataError, match="has no reverse transform; was it trained"):
        reverse_transform_of(old_run)
    with pytest.raises(DataError, match="has no reverse transform for the old encoder"):
        reverse_transform_of(new_run, new_run)
    export_encoder(new_run, tmp_path / "export")
    (file,) = (tmp_path / "export").glob("transform-*.safetensors")
    for wrong in ({"source": psi.target, "target": psi.source}, {"source": "f" * 64}):
        replace(psi, **wrong).save(file)
        with pytest.raises(DataError, match="is no map from this encoder"):
            load_encoder(tmp_path / "export", device="cpu").transform_to(old.fingerprint)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read as a transform"):
        load_encoder(tmp_path / "export", device="cpu").transform_to(old.fingerprint)


def test_an_upgrade_by_reverse_transform_serves_what_was_trained_and_fits_nothing(
    old_run, new_run, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(ReverseTransform, "fit", lambda *_, **__: pytest.fail("a map was fitted"))
    monkeypatch.setattr("bowerbird.upgrade.upgrade.fit_transform", lambda *_, **__: pytest.fail("a map was fitted"))
    new = load_encoder(new_run, device="cpu")
    with filled(tmp_path / "g", old_run, pictures) as gallery:
        old = gallery.snapshot().serving
        psi = new.transform_to(old)
        poor = replace(psi, steps=(Step("linear", -psi.steps[0].weight),), evidence={"usable": True})
        gallery.register_space(new.space())
        gallery.register_transform(poor)  # what was trained goes before what an upgrade that was taken back has left
        stop = ["--strategy", "reverse-transform", "--stop-at-share", "0.5", "--device", "cpu"]
        done = CliRunner().invoke(main, ["upgrade", "run", str(gallery.path), "--to", str(new_run), *stop])
        assert done.exit_code == 0, done.output
        assert "trained together with the new encoder" in done.output
        assert gallery.transform(new.fingerprint, old).fingerprint == psi.fingerprint
        queries = new.encode(pictures[:6])
        served = serve(gallery).search(vectors={new.fingerprint: queries}, k=20)
        assert set(np.ravel(served.sides)) == {0, 1}
        expected = gallery.search({new.fingerprint: queries, old: psi(queries)}, 20)
        assert served.ids == expected.ids
        asked = ["upgrade", "serve", str(gallery.path), "--image", str(pictures[0]), "--k", "20", "--json"]
        shown = json.loads(CliRunner().invoke(main, [*asked, "--device", "cpu"]).output)
        assert [hit["id"] for hit in shown[0]["results"]] == list(served.ids[0])


def test_a_plan_forecasts_what_was_trained_on_all_items_and_keeps_it(old_run, new_run, pictures, tmp_path):
    new = load_encoder(new_run, device="cpu")
    with filled(tmp_path / "g", old_run, pictures) as gallery:
        psi = new.transform_to(gallery.snapshot().serving)
        names = ["compat:reverse-transform", "compat:adapter"]
        made = Upgrade(gallery, new).plan(label_key="label", strategies=names, mergers=["core:distance"])
        assert made.transforms["compat:reverse-transform"].fingerprint == psi.fingerprint
        assert made.transforms["compat:adapter"].fingerprint != psi.fingerprint
        trained, fitted = (next(curve for curve in made.curves if curve.name == name) for name in names)
        assert (trained.trained_on, trained.items) == (0, len(pictures))
        assert fitted.trained_on + fitted.items == len(pictures)


def test_a_gallery_of_another_encoder_gets_a_map_that_is_fitted(new_run, pictures, tmp_path):
    other = small_upgrade.run(tmp_path / "other", 'use = "core:softmax"', split="old", epochs=4, seed=5)
    with filled(tmp_path / "g", other, pictures) as gallery:
        new = load_encoder(new_run, device="cpu")
        Upgrade(gallery, new).begin(strategy="reverse-transform", label_key="label", accept_poor_transform=True)
        made = gallery.transform(new.fingerprint, gallery.snapshot().upgrade.old)
        assert made.method == "compat:reverse-transform" and made.evidence["fitted_on"] > 0


def test_three_versions_are_reached_one_map_after_the_other(old_run, new_run, pictures, tmp_path):
    newest_run = small_upgrade.run(
        tmp_path / "newest", f'use = "compat:metric-compatible"\nold_run = "{new_run}"', split="all", epochs=6, seed=7
    )
    old, new, newest = (load_encoder(run, device="cpu") for run in (old_run, new_run, newest_run))
    assert newest.transform_to(old.fingerprint) is None
    with filled(tmp_path / "g", old_run, pictures) as gallery:
        Upgrade(gallery, new).run(strategy="reverse-transform", stop_at_share=0.4)
        Upgrade(gallery, newest).run(strategy="reverse-transform", on_top=True, stop_at_share=0.3)
        queries = newest.encode(pictures[:6])
        second = newest.transform_to(new.fingerprint)(queries)
        first = new.transform_to(old.fingerprint)(second)
        vectors = {newest.fingerprint: queries, new.fingerprint: second, old.fingerprint: first}
        served = serve(gallery).search(vectors={newest.fingerprint: queries}, k=30)
        assert served.ids == gallery.search(vectors, 30).ids
        assert all(part.count for part in gallery.snapshot().parts)
