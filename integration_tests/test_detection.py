"""From a recipe to a search by regions: a small detector is trained, exported, used, measured, and replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from faster_coco_eval import COCO, COCOeval_faster

from bowerbird.cli import main
from bowerbird.data.images import open_image
from bowerbird.data.uris import open_dataset
from bowerbird.gallery import Gallery

RECIPES = Path(__file__).parents[1] / "recipes"
SHORT = [
    "train.epochs=3", "train.workers=0", "train.device=cpu", "train.lr=2e-3", "dataset.count=160",
    "dataset.items=[1,2]",
    "dataset.item_size=[20,24]", "encoder.detector=faster-rcnn", "encoder.backbone.patch_size=4",
    "encoder.backbone.sr_ratios=[4,2,2,1]", "encoder.backbone.dims=[16,24,36,48]", "encoder.backbone.depths=[1,1,1,1]",
    "encoder.fpn_width=32", "encoder.head_width=64", "encoder.anchor_scale=5.0", "encoder.anchor_ratios=[1.0]",
    "encoder.proposals_train=100", "encoder.proposals_test=50", "encoder.rois=32",
]  # fmt: skip
CANVASES = "detection:canvases?count=12&items=[1,2]&item_size=[20,24]"


def run(*arguments: object) -> Any:
    """What the command prints: JSON where it is asked for."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, f"{arguments}\n{result.output}"
    return json.loads(result.stdout) if "--json" in arguments else result.output


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector of recipes/canvases-dpt.toml, smaller and trained for a few steps, as an exported folder."""
    folder = tmp_path_factory.mktemp("detector")
    recipe = (RECIPES / "canvases-dpt.toml").read_text().partition("[[evaluate]]")[0]
    (folder / "recipe.toml").write_text(recipe)
    settings = [part for text in SHORT for part in ("--set", text)]
    run("train", folder / "recipe.toml", "--out", folder / "run", *settings)
    run("export", folder / "run", "--to", folder / "model")
    return folder / "model"


def test_boxes_are_found_better_than_by_chance_and_both_ways_to_measure_them_agree(
    detector: Path, tmp_path: Path
) -> None:
    settings = ["dataset=detection:canvases", "split=test", "settings={count=12,items=[1,2],item_size=[20,24]}"]
    sets = [part for text in settings for part in ("--set", text)]
    measured = run("evaluate", detector, "--evaluator", "detection:coco-ap", *sets, "--device", "cpu", "--json")
    everything = ("--threshold", 0, "--no-pictures", "--device", "cpu", "--json")
    run("detect", detector, "--dataset", CANVASES, "--split", "test", "--out", tmp_path / "out", *everything)
    dataset, _ = open_dataset(CANVASES, "test")
    truth = COCO(dataset.coco())  # type: ignore[attr-defined]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    scores = COCOeval_faster(truth, truth.loadRes(results), "bbox", print_function=lambda *_: None)
    scores.run()
    assert measured["detection:coco-ap/AR"] > 0.2  # at random places: about 0.02
    assert scores.stats[0] == pytest.approx(measured["detection:coco-ap/AP"], abs=1e-6)


def test_pictures_are_drawn_with_what_was_found(detector: Path, tmp_path: Path) -> None:
    chosen = ("--threshold", 0, "--max-per-image", 3, "--device", "cpu", "--json")
    found = run("detect", detector, "--dataset", CANVASES, "--split", "test", "--out", tmp_path / "out", *chosen)
    assert found["images"] == 12
    assert 12 <= found["objects"] <= 36
    dataset, _ = open_dataset(CANVASES, "test")
    for index, name in enumerate(dataset.item_ids):
        drawn = open_image(tmp_path / "out" / "pictures" / f"{name}.png")
        plain = dataset[index]["image"].resize(drawn.size, 0)
        changed = (np.asarray(drawn) != np.asarray(plain)).any(axis=2)
        assert drawn.size == (640, 640)
        assert 0.005 < changed.mean() < 0.6


def test_a_search_by_a_region_finds_objects_and_an_upgrade_encodes_them_again(detector: Path, tmp_path: Path) -> None:
    things = tmp_path / "things"
    run("gallery", "create", things, "--encoder", detector)
    chosen = ("--detect", detector, "--threshold", 0, "--max-per-image", 3, "--device", "cpu", "--json")
    source = ("--dataset", CANVASES, "--split", "test")
    added = run("gallery", "add", things, *source, *chosen)
    again = run("gallery", "add", things, *source, *chosen)
    assert added["items"] == added["added"] >= 12
    assert (again["unchanged"], again["added"], again["pictures"]) == (added["added"], 0, added["empty"])

    with Gallery.open(things, readonly=True) as gallery:
        item = next(gallery.items())
        assert dict(item.metadata).keys() >= {"image", "label", "score", "box"}
    query = ("--image", item.uri, "-k", 3, "--device", "cpu", "--json")
    hits = run("gallery", "search", things, *query)["results"][0]["hits"]
    assert hits[0]["id"] == item.id == f"{item.metadata['image']}#xywh={str(item.uri).rpartition('=')[2]}"
    assert hits[0]["distance"] == pytest.approx(0, abs=1e-5)
    assert (hits[0]["label"], hits[0]["box"]) == (item.metadata["label"], item.metadata["box"])
    assert len({hit["id"] for hit in hits}) == 3

    new = "core:perceptron?image_size=8"
    run("upgrade", "run", things, "--to", new, "--strategy", "core:full", "--device", "cpu")
    run("upgrade", "finish", things)
    with Gallery.open(things, readonly=True) as gallery:
        assert gallery.snapshot().write_space.encoder.startswith("core:perceptron")
        assert len(gallery) == added["items"]
    hits = run("gallery", "search", things, *query)["results"][0]["hits"]
    assert (hits[0]["id"], hits[0]["label"]) == (item.id, item.metadata["label"])
