"""Domains of other packages: the styles of the emoji, one of them left out of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from bowerbird.data.uris import open_dataset
from bowerbird.recipe import load_recipe
from bowerbird.train.loop import train

RECIPES = Path(__file__).parents[1] / "recipes"


def test_a_style_of_emoji_is_left_out_and_classes_are_concepts_or_categories() -> None:
    source = "domain:left-out?source=emoji:styles"
    train_items, _ = open_dataset(source, "train", unseen=["twemoji"], source_split="seen", validation_fraction=0.0)
    test_items, _ = open_dataset(source, "test", unseen=["twemoji"], source_split="unseen", label="category")
    styles = {train_items.domains[i] for i in train_items.domain_indices()}
    assert styles == {"noto", "noto-v1", "fluent-emoji-flat", "fluent-emoji"}
    assert len(train_items.classes) == 448 and len(train_items) == 4 * 448
    assert {test_items.domains[i] for i in test_items.domain_indices()} == {"twemoji"}
    assert list(test_items.classes) == sorted(
        ["activities", "animals", "food", "objects", "people", "smileys", "symbols", "travel"]
    )
    item = test_items[5]
    assert item["item_id"].startswith("twemoji/") and test_items.domains[item["domain"]] == "twemoji"


@pytest.mark.parametrize("modifier", ["domain:dsu", "domain:mixstyle", None])
def test_the_recipe_of_dsu_trains_and_is_measured_in_unseen_looks(tmp_path: Path, modifier: str | None) -> None:
    tables = f'[{{use = "{modifier}", layers = ["conv1", "layer1"]}}]' if modifier else "[]"
    small = [f"modifier={tables}", "train.epochs=1", "dataset.looks=['plain','noise']", "dataset.unseen=['noise']"]
    recipe = load_recipe(RECIPES / "digits-dsu.toml", overrides=[*small, "train.device=cpu", "encoder.image_size=16"])
    result = train(recipe, tmp_path / "run")
    for name in ("top1 noise", "top1 low-contrast", "worst domain", "seen"):
        assert 0 <= result.metrics[f"domain:leave-one-out/{name}"] <= 1
    assert 0 < result.metrics["domain:retrieval/mAP"] <= 1
    assert result.metrics["domain:leave-one-out/seen"] > 0.3  # chance: 0.1
