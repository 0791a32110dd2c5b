"""Recipes: strict tables, overrides, presets, and errors that name the place, the value and what is accepted."""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import training_fixtures as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import InputError, RecipeError, UnknownNameError
from bowerbird.recipe import (
    apply_override,
    build_config,
    load_recipe,
    parse_value,
    recipe_schema,
    resolve_recipe,
    to_toml,
)
from bowerbird.registry import get_registry

RECIPE = """
name = "squares"
[encoder]
use = "tiny:net"
embed_dim = 4
[objective]
use = "core:softmax"
[dataset]
use = "tiny:squares"
split = "train"
[train]
epochs = 2
lr = 1
"""


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    get_registry().register_module("tiny", tiny.make_plugin())
    yield
    get_registry().unregister("tiny")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "squares.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_is_resolved_with_every_default_written_out(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.encoder.settings == {"embed_dim": 4, "dropout": 0.0, "freeze_trunk": False}
    assert recipe.train.lr == 1.0
    assert recipe.train.optimizer == "adamw"
    assert recipe.to_dict()["encoder"] == {"use": "tiny:net", "embed_dim": 4, "dropout": 0.0, "freeze_trunk": False}


def test_the_resolved_recipe_read_again_is_the_same(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["train.clip_norm=0.5", 'evaluate=[{use = "core:knn", dataset = "tiny:squares"}]'])
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_overrides_take_toml_values_and_win_over_the_file(file: Path) -> None:
    recipe = load_recipe(file, ["train.epochs=7", "train.schedule=constant", 'name="other"', "encoder.dropout=0.25"])
    assert (recipe.train.epochs, recipe.train.schedule, recipe.name) == (7, "constant", "other")
    assert recipe.encoder.settings["dropout"] == 0.25


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("3.5", 3.5), ("true", True), ("resnet18", "resnet18"), ('"3"', "3"), ("[1, 2]", [1, 2]), ("", ""),
     ("a = 1\nb", "a = 1\nb"), ("1\nb = 2", "1\nb = 2"), ("core:timm", "core:timm"), ("2020-01-01", "2020-01-01")],
)  # fmt: skip
def test_an_override_value_is_toml_or_the_text_itself(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_overrides_reach_into_lists_of_tables() -> None:
    data: dict[str, Any] = {"evaluate": [{"k": 1}, {"k": 2}]}
    apply_override(data, "evaluate.1.k=5")
    assert data == {"evaluate": [{"k": 1}, {"k": 5}]}
    with pytest.raises(RecipeError, match="'7' is no position in a list of 2"):
        apply_override(data, "evaluate.7.k=5")
    with pytest.raises(RecipeError, match="expected key=value"):
        apply_override(data, "evaluate")


@pytest.mark.parametrize(
    ("override", "error", "parts"),
    [
        ("train.epoks=3", RecipeError, ["train.epoks", "unknown key", "Did you mean 'epochs'", "batch_size"]),
        ("trian.epochs=3", RecipeError, ["trian", "Did you mean 'train'"]),
        ("train.epochs=0", RecipeError, ["train.epochs = 0", "greater than or equal to 1"]),
        ("train.epochs=2.5", RecipeError, ["train.epochs = 2.5", "integer"]),
        ('train.epochs="3"', RecipeError, ['train.epochs = "3"', "integer"]),
        ("train.lr=-1", RecipeError, ["train.lr = -1", "greater than 0"]),
        ("train.optimizer=adamm", RecipeError, ['"adamm"', "'sgd', 'adam' or 'adamw'", "Did you mean 'adam"]),
        ("train.momentum=0.5", RecipeError, ["momentum is a setting of optimizer = 'sgd'"]),
        ("train.step_epochs=3", RecipeError, ["settings of schedule = 'step'"]),
        ("train.schedule=step", RecipeError, ["needs step_epochs"]),
        ("train={schedule='step',step_epochs=0}", RecipeError, ["step_epochs = 0", "above 0"]),
        ("train={schedule='step',step_epochs=[8,5]}", RecipeError, ["step_epochs = (8.0, 5.0)", "that grow"]),
        ("train.warmup=2", RecipeError, ["leaves nothing"]),
        ("encoder.embd_dim=3", RecipeError, ["encoder.embd_dim", "of tiny:net", "Did you mean 'embed_dim'"]),
        ("encoder.embed_dim=wide", RecipeError, ['encoder.embed_dim = "wide"', "integer"]),
        ("encoder.use=tiny:nett", UnknownNameError, ["encoder", "'tiny:nett'", "Did you mean 'tiny:net'"]),
        ("objective.use=core:sofmax", UnknownNameError, ["Did you mean 'core:softmax'"]),
        ("objective.preset=fast", UnknownNameError, ["no preset 'fast'"]),
        ("objective.scale=3", RecipeError, ["scale is a setting of cosine"]),
        ("dataset.split=tran", UnknownNameError, ["no split 'tran'", "Did you mean 'train'", "train, test"]),
        ("dataset.augment=flop", RecipeError, ["'none', 'flip', 'crop'", "Did you mean 'flip'"]),
        ("evaluate=[{use = 'core:knn', dataset = 'tiny:square'}]", UnknownNameError, ["Did you mean 'tiny:squares'"]),
        (
            "evaluate=[{use = 'core:knn', dataset = 'tiny:squares', test_split = 'tets'}]",
            UnknownNameError,
            ["test_split = 'tets'", "Did you mean 'test'"],
        ),
    ],
)
def test_a_wrong_value_is_an_error_that_names_set_the_value_and_what_is_accepted(
    override: str, error: type[Exception], parts: list[str], file: Path
) -> None:
    with pytest.raises(error) as caught:
        load_recipe(file, [override])
    assert str(caught.value).startswith(f"--set {override.partition('=')[0]}")
    for part in parts:
        assert part in str(caught.value)


def test_errors_of_the_file_name_the_file_and_all_are_told_at_once(file: Path) -> None:
    file.write_text(RECIPE.replace("epochs = 2", "epochs = 0\nbatch = 3"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{file}: train.") for line in lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("name = ", "not valid TOML"), ("name = 'x'", "encoder: this key is required"), ("[train]\nepochs = 1", "name")],
)
def test_a_file_that_is_no_recipe_is_named(text: str, reason: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(RecipeError, match=reason) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(file.with_name("other.toml"))


def test_an_objective_whose_keys_the_data_set_lacks_is_refused_naming_both(file: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["objective.use=tiny:video"])
    for part in ("'tiny:video'", "{'label', 'video'}", "'tiny:squares'", "{'image', 'label'}", "Missing: {'video'}"):
        assert part in str(caught.value)


def test_an_objective_whose_features_the_encoder_does_not_give_is_refused_naming_both(file: Path) -> None:
    from bowerbird.records import ObjectiveRecord

    patches = types.ModuleType("patches")
    patches.BOWERBIRD_API = "1.0"  # type: ignore[attr-defined]
    record = ObjectiveRecord(
        name="patchy:o", target="x:y", summary="Test.", needs=("label",), encoder_needs=("tokens",)
    )
    patches.bowerbird_objectives = tiny.hookimpl(lambda: [record])  # type: ignore[attr-defined]
    patches.bowerbird_objectives.__name__ = "bowerbird_objectives"
    get_registry().register_module("patchy", patches)
    try:
        with pytest.raises(RecipeError, match=r"'patchy:o' needs encoder outputs .*'tiny:net' gives \{'pooled'\}"):
            load_recipe(file, ["objective.use=patchy:o"])
    finally:
        get_registry().unregister("patchy")


def test_caching_the_trunk_of_augmented_items_is_refused(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"cache_trunk.*augment = 'flip'"):
        load_recipe(file, ["train.cache_trunk=true", "dataset.augment=flip"])


def test_a_method_without_settings_takes_none() -> None:
    record = get_registry().get("dataset", "tiny:squares")
    assert build_config(record, {}, where="here") is None
    with pytest.raises(InputError, match="here: tiny:squares has no settings; found 'size'"):
        build_config(record, {"size": 3}, where="here")


def test_lists_from_a_file_fill_tuples_of_a_config() -> None:
    record = get_registry().get("evaluator", "core:retrieval")
    config: Any = build_config(record, {"dataset": "tiny:squares", "ks": [1, 3]}, where="here")
    assert config.ks == (1, 3)


def test_the_schema_for_editors_has_the_settings_of_every_installed_method() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["properties"]["train"]
    variants = {v["title"]: v for v in schema["$defs"]["encoder table"]["oneOf"]}
    assert variants["tiny:net"]["properties"]["use"] == {"const": "tiny:net"}
    assert "dropout" in variants["tiny:net"]["properties"]
    assert variants["tiny:net"]["additionalProperties"] is False
    assert {"core:knn", "core:retrieval"} <= {v["title"] for v in schema["$defs"]["evaluate table"]["oneOf"]}


_VALUES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text()
_TABLES = st.recursive(
    st.dictionaries(st.text(), _VALUES, max_size=4),
    lambda inner: st.dictionaries(st.text(), inner | st.lists(inner, min_size=1, max_size=2), max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(_TABLES)
def test_written_toml_reads_back_to_the_same_values(table: dict[str, Any]) -> None:
    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_none(item) for key, item in value.items() if item is not None}
        return [without_none(item) for item in value] if isinstance(value, list) else value

    assert tomllib.loads(to_toml(table)) == without_none(table)


def test_plain_data_is_not_changed_by_resolving_it() -> None:
    data = tomllib.loads(RECIPE)
    before = json.dumps(data)
    resolve_recipe(data, overrides=["train.epochs=5"])
    assert json.dumps(data) == before
