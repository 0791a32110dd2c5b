"""Recipes: one TOML file that says everything about a training run.

Tables ``[encoder]``, ``[objective]``, ``[dataset]``, ``[[modifier]]`` and ``[[evaluate]]`` name a method with ``use``;
the other keys of the table are its settings, checked by the method's own config model. ``preset`` takes the settings of
one of the method's presets, and the table's own keys override them. There is no inheritance between files.

    recipe = load_recipe("recipes/emoji-softmax.toml", overrides=["train.epochs=2"])

Everything is checked before anything is built: keys, types, ranges, names, splits, and whether the data set provides
what the objective needs. Imports pydantic and, through the config models, whatever the methods import.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bowerbird.errors import InputError, RecipeError, UnknownNameError, did_you_mean
from bowerbird.records import DatasetRecord, EncoderRecord, ObjectiveRecord, Record
from bowerbird.registry import get_registry

CACHED_KEYS = ("image", "label", "index", "item_id")  # image: as frozen_features


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Component(_Table):
    """A method by name, with its settings."""

    use: str = Field(description="Name of the method, plugin:method.")
    preset: str | None = Field(default=None, description="Start from the settings of this preset.")
    settings: dict[str, Any] = Field(default_factory=dict)


class DatasetComponent(Component):
    split: str | None = Field(default=None, description="Which part of the data set to train on.")
    augment: Literal["none", "flip", "crop", "crop-flip"] = Field(
        default="none", description="Random horizontal flip, random crop of 35 to 100 % of the area, or both."
    )
    unreadable: Literal["raise", "skip"] = Field(
        default="raise", description="What an item that cannot be read does: end the run, or be left out and counted."
    )


class EvaluateComponent(Component):
    name: str | None = Field(
        default=None, description="Prefix of its numbers in metrics.json; by default the method's name."
    )


class TrainSettings(_Table):
    """How the loop runs. Batches are joined over processes: two processes share one batch of ``batch_size``."""

    epochs: int = Field(default=10, ge=1, description="Passes over the training split.")
    batch_size: int = Field(default=128, ge=1, description="Items per forward pass, over all processes.")
    items_per_class: int | None = Field(
        default=None, ge=2, description="Make batches of groups of so many items of one class (for pair losses)."
    )
    accumulate: int = Field(
        default=1, ge=1, description="Forward passes per optimiser step; with alternate, for every domain."
    )
    alternate: bool = Field(
        default=False,
        description="Batches of one domain each; an optimiser step takes one of every domain, and shorter ones repeat.",
    )
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0, description="Where schedule = 'cosine' ends.")
    momentum: float | None = Field(default=None, ge=0, lt=1, description="Of sgd; by default 0.9.")
    betas: Annotated[tuple[float, float], Field(strict=False)] | None = Field(
        default=None, description="Of adam and adamw; by default [0.9, 0.999]."
    )
    weight_decay: float = Field(default=0.0, ge=0)
    weight_decay_end: float | None = Field(
        default=None, ge=0, description="Let the weight decay follow half a cosine from weight_decay to this value."
    )
    schedule: Literal["cosine", "constant", "step", "poly"] = Field(
        default="cosine", description="Of the learning rate."
    )
    warmup: float = Field(default=0.0, ge=0, description="Epochs of linear growth from 0 to lr.")
    step_epochs: float | Annotated[tuple[float, ...], Field(strict=False)] | None = Field(
        default=None, description="With schedule = 'step': epochs between drops, or a list of epochs at which it drops."
    )
    step_factor: float | None = Field(
        default=None, gt=0, lt=1, description="With 'step': factor of a drop, by default 0.1."
    )
    poly_power: float | None = Field(
        default=None, gt=0, description="With schedule = 'poly': power of the share of steps left, by default 0.9."
    )
    clip_norm: float | None = Field(default=None, gt=0, description="Largest norm of the gradient.")
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = Field(default=0, ge=0, lt=2**63)
    cache_trunk: bool = Field(
        default=False, description="Run the encoder's frozen trunk once per item and keep the result."
    )
    workers: int = Field(default=0, ge=0, le=256, description="Processes that read and decode items.")
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="Optimiser steps; by default with the epochs, at most once per 30 s."
    )
    log_every: int = Field(default=10, ge=1, description="Optimiser steps between log lines.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:0, mps.")

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        if self.momentum is not None and self.optimizer != "sgd":
            raise ValueError(f"momentum is a setting of optimizer = 'sgd', not of {self.optimizer!r}")
        if self.betas is not None and self.optimizer == "sgd":
            raise ValueError("betas is a setting of optimizer = 'adam' and 'adamw', not of 'sgd'")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {list(self.betas)}: expected two numbers from 0 to below 1")
        if self.min_lr and self.schedule != "cosine":
            raise ValueError(f"min_lr is a setting of schedule = 'cosine', not of {self.schedule!r}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is above lr = {self.lr}")
        if self.schedule != "step" and (self.step_epochs is not None or self.step_factor is not None):
            raise ValueError(f"step_epochs and step_factor are settings of schedule = 'step', not of {self.schedule!r}")
        if self.schedule == "step" and self.step_epochs is None:
            raise ValueError("schedule = 'step' needs step_epochs, the epochs between two drops or those of the drops")
        if self.step_epochs is not None:
            drops = self.step_epochs if isinstance(self.step_epochs, tuple) else (self.step_epochs,)
            if not drops or drops[0] <= 0 or list(drops) != sorted(set(drops)):
                raise ValueError(f"step_epochs = {self.step_epochs}: expected a number above 0, or several that grow")
        if self.poly_power is not None and self.schedule != "poly":
            raise ValueError(f"poly_power is a setting of schedule = 'poly', not of {self.schedule!r}")
        if self.alternate and self.items_per_class is not None:
            raise ValueError("items_per_class makes batches by class and alternate by domain; leave one of them out")
        if self.alternate and self.cache_trunk:
            raise ValueError("cache_trunk keeps no domains, which alternate needs; leave one of them out")
        if self.warmup >= self.epochs:
            raise ValueError(f"warmup = {self.warmup} epochs leaves nothing of epochs = {self.epochs}")
        return self


class Recipe(_Table):
    """A resolved recipe: presets and defaults are filled in, every table is checked."""

    name: str = Field(min_length=1, description="Name of the run.")
    encoder: Component
    objective: Component
    dataset: DatasetComponent
    train: TrainSettings = TrainSettings()
    modifier: tuple[Component, ...] = ()
    evaluate: tuple[EvaluateComponent, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the form of the TOML file: settings stand beside ``use``."""
        data = self.model_dump(mode="json", exclude_none=True)
        for table in ("encoder", "objective", "dataset"):
            data[table] = _flat(data[table])
        for tables in ("modifier", "evaluate"):
            data[tables] = [_flat(table) for table in data[tables]]
        return {key: value for key, value in data.items() if value != []}

    def to_toml(self) -> str:
        return to_toml(self.to_dict())


@dataclass(frozen=True)
class Source:
    """Where values come from, for messages: a file, and the keys that ``--set`` changed."""

    file: str
    overridden: Mapping[str, str]

    def of(self, path: str) -> str:
        for key in self.overridden:
            if path == key or path.startswith((f"{key}.", f"{key}[")):
                return f"--set {key}={self.overridden[key]}"
        return self.file


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override, resolve and check a recipe.

    Args:
        path: TOML file, or the ``recipe.json`` of a run.
        overrides: ``a.b=value`` each; the value is TOML, and a bare word is a text.

    Raises:
        RecipeError: The file cannot be read, a key is unknown, a value is not accepted, or the parts do not fit.
        UnknownNameError: A method, preset or split does not exist.
    """
    file = Path(path)
    try:
        text = file.read_text()
        data = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {str(path)!r}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error}") from error
    except ValueError as error:
        raise RecipeError(f"recipe {str(path)!r} is not valid {file.suffix[1:].upper() or 'TOML'}: {error}") from error
    return resolve_recipe(data, str(path), overrides)


def resolve_recipe(data: Mapping[str, Any], where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Like ``load_recipe``, for plain data. ``where`` names it in messages."""
    values: dict[str, Any] = json.loads(json.dumps(data, default=str))
    changed = {}
    for override in overrides:
        key, value = apply_override(values, override)
        changed[key] = value
    source = Source(where, changed)
    recipe = _validated(Recipe, _nested(values, source), source)
    recipe = _resolved(recipe, source)
    check_fit(recipe, source)
    return recipe


def apply_override(data: dict[str, Any], override: str) -> tuple[str, str]:
    """Set one ``a.b.0.c=value`` in place and return key and value as texts. Raises ``RecipeError``."""
    key, equals, value = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set {override!r}: expected key=value, for example train.epochs=2")
    *parents, last = key.split(".")
    table: Any = data
    for part in parents:
        if isinstance(table, list):
            if not part.isdigit() or int(part) >= len(table):
                raise RecipeError(f"--set {override!r}: {part!r} is no position in a list of {len(table)}")
            table = table[int(part)]
        else:
            table = table.setdefault(part, {})
        if not isinstance(table, dict | list):
            raise RecipeError(f"--set {override!r}: {part!r} is a value, not a table")
    if isinstance(table, list):
        if not last.isdigit() or int(last) >= len(table):
            raise RecipeError(f"--set {override!r}: {last!r} is no position in a list of {len(table)}")
        table[int(last)] = parse_value(value)
    else:
        table[last] = parse_value(value)
    return key, value


def parse_value(text: str) -> Any:
    """A TOML value (number, true, "text", [list], {table}); anything else is the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if set(value) != {"value"}:
        return text
    parsed = value["value"]
    return parsed if isinstance(parsed, bool | int | float | str | list | dict) else text


def build_config(record: Record, values: Mapping[str, Any], where: str) -> BaseModel | None:
    """The settings of a method, checked by its config model; ``None`` for a method without settings.

    Args:
        record: The method.
        values: Plain data, as read from TOML or JSON.
        where: What to call the place of the values in messages, for example ``recipe.toml [encoder]``.

    Raises:
        RecipeError: An unknown key or a value that is not accepted; all of them are named.
    """
    model = get_registry().load_config(record)
    if model is None:
        if values:
            raise RecipeError(f"{where}: {record.name} has no settings; found {', '.join(map(repr, values))}")
        return None
    return _validated(model, values, Source(where, {}), owner=record.name)


def check_fit(recipe: Recipe, source: Source | None = None) -> None:
    """Whether data set, encoder and objective fit together, from their records alone. Raises ``RecipeError``."""
    source = source or Source("recipe", {})
    registry = get_registry()
    encoder = registry.get("encoder", recipe.encoder.use)
    objective = registry.get("objective", recipe.objective.use)
    dataset = registry.get("dataset", recipe.dataset.use)
    assert isinstance(encoder, EncoderRecord)
    assert isinstance(objective, ObjectiveRecord)
    assert isinstance(dataset, DatasetRecord)
    split = recipe.dataset.split
    if dataset.splits and split is not None and split not in dataset.splits:
        raise UnknownNameError(
            f"{source.of('dataset.split')}: dataset {dataset.name!r} has no split {split!r}."
            f"{did_you_mean(split, dataset.splits)} Splits: {', '.join(dataset.splits)}."
        )
    provided = {*dataset.provides, "item_id", "index"}  # the loop adds these two
    for what, record, needs in (("objective", objective, objective.needs), ("encoder", encoder, encoder.inputs)):
        lacking = [key for key in needs if key not in provided]
        if lacking:
            raise RecipeError(
                f"{source.of(f'{what}.use')}: {what} {record.name!r} needs batch keys {_set(needs)}; "
                f"dataset {dataset.name!r} provides {_set(dataset.provides)}. Missing: {_set(lacking)}."
            )
    lacking = [output for output in objective.encoder_needs if output not in encoder.outputs]
    if lacking:
        raise RecipeError(
            f"{source.of('objective.use')}: objective {objective.name!r} needs encoder outputs "
            f"{_set(objective.encoder_needs)}; encoder {encoder.name!r} gives {_set(encoder.outputs)}. "
            f"Missing: {_set(lacking)}."
        )
    for position, component in enumerate(recipe.evaluate):
        _check_evaluated_dataset(component, source.of(f"evaluate.{position}"))
    uncached = [key for key in objective.needs if key not in CACHED_KEYS]
    if recipe.train.cache_trunk and uncached:
        raise RecipeError(
            f"{source.of('train.cache_trunk')}: objective {objective.name!r} needs {_set(uncached)}, and with "
            f"train.cache_trunk a batch has only {_set(CACHED_KEYS)}; set train.cache_trunk = false"
        )
    if recipe.train.items_per_class is not None and "label" not in dataset.provides:
        raise RecipeError(
            f"{source.of('train.items_per_class')}: train.items_per_class needs labels; dataset {dataset.name!r} "
            f"provides {_set(dataset.provides)}"
        )
    if recipe.train.alternate and "domain" not in dataset.provides:
        raise RecipeError(
            f"{source.of('train.alternate')}: train.alternate needs items with a domain; dataset {dataset.name!r} "
            f"provides {_set(dataset.provides)}"
        )
    if recipe.train.cache_trunk and recipe.dataset.augment != "none":
        raise RecipeError(
            f"{source.of('train.cache_trunk')}: train.cache_trunk keeps one result per item, and dataset.augment = "
            f"{recipe.dataset.augment!r} changes the item every time; set one of the two to false or 'none'"
        )


def _check_evaluated_dataset(component: EvaluateComponent, where: str) -> None:
    """An evaluator that measures on a data set names it in ``dataset`` and its parts in settings called ``*split``.

    A typing error there would otherwise be found when the training is over.
    """
    name = component.settings.get("dataset")
    if not isinstance(name, str):
        return
    try:
        record = get_registry().get("dataset", name.partition("?")[0])
    except UnknownNameError as error:
        raise UnknownNameError(f"{where}: evaluate {component.use!r}: {error}") from error
    assert isinstance(record, DatasetRecord)
    for key, split in component.settings.items():
        if key.endswith("split") and isinstance(split, str) and record.splits and split not in record.splits:
            raise UnknownNameError(
                f"{where}: evaluate {component.use!r}: {key} = {split!r}: dataset {record.name!r} has no such split."
                f"{did_you_mean(split, record.splits)} Splits: {', '.join(record.splits)}."
            )


def recipe_schema() -> dict[str, Any]:
    """A JSON schema of the recipe file for editors, with the settings of every installed method."""
    registry = get_registry()
    kinds = {"encoder": Component, "objective": Component, "dataset": DatasetComponent, "modifier": Component,
             "evaluate": EvaluateComponent}  # fmt: skip
    definitions: dict[str, Any] = {}
    for table, model in kinds.items():
        variants = []
        for record in registry.records("evaluator" if table == "evaluate" else table):
            if registry.missing_extras(record):
                continue
            config = registry.load_config(record)
            schema = config.model_json_schema(ref_template="#/$defs/{model}") if config else {"properties": {}}
            definitions |= schema.pop("$defs", {})
            own = {key: value for key, value in model.model_json_schema()["properties"].items() if key != "settings"}
            variants.append(
                {
                    "title": record.name,
                    "description": record.summary,
                    "type": "object",
                    "properties": {**schema["properties"], **own, "use": {"const": record.name}},
                    "required": ["use"],  # a preset may fill in the settings that the config requires
                    "additionalProperties": False,
                }
            )
        definitions[f"{table} table"] = {"oneOf": variants} if variants else {"type": "object"}
    whole = Recipe.model_json_schema()
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for table in kinds:
        reference = {"$ref": f"#/$defs/{table} table"}
        many = table in ("modifier", "evaluate")
        whole["properties"][table] = {"type": "array", "items": reference} if many else reference
    whole["$defs"] = {**{k: v for k, v in whole["$defs"].items() if k == "TrainSettings"}, **definitions}
    return whole


def to_toml(data: Mapping[str, Any]) -> str:
    """Plain data as TOML: values first, then tables. ``None`` has no form in TOML and is left out."""
    lines: list[str] = []
    _write_table(lines, data, ())
    return "\n".join(lines).strip() + "\n"


# ------------------------------------------------------------------------------------------------------- helpers


def _nested(data: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The file's flat tables (settings beside ``use``) in the form of ``Recipe``."""
    nested = dict(data)
    for table, model in (("encoder", Component), ("objective", Component), ("dataset", DatasetComponent)):
        if isinstance(nested.get(table), Mapping):
            nested[table] = _split(nested[table], model)
    for table, model in (("modifier", Component), ("evaluate", EvaluateComponent)):
        if isinstance(nested.get(table), Mapping):
            raise RecipeError(f"{source.of(table)}: [{table}] is a list of tables; write [[{table}]]")
        if isinstance(nested.get(table), list):
            nested[table] = [_split(item, model) if isinstance(item, Mapping) else item for item in nested[table]]
    return nested


def _split(table: Mapping[str, Any], model: type[Component]) -> dict[str, Any]:
    own = {key: value for key, value in table.items() if key in model.model_fields and key != "settings"}
    return {**own, "settings": {key: value for key, value in table.items() if key not in own}}


def _flat(component: Mapping[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in component.items() if k != "settings"}, **component["settings"]}


def _resolved(recipe: Recipe, source: Source) -> Recipe:
    """``recipe`` with full names, presets and defaults filled in."""

    def complete(component: Any, kind: str, path: str) -> Any:
        registry = get_registry()
        key = "use"
        try:
            record = registry.get(kind, component.use)
            key = "preset"
            preset = registry.load_preset(record, component.preset) if component.preset is not None else {}
        except UnknownNameError as error:
            raise UnknownNameError(f"{source.of(f'{path}.{key}')}: {path}.{key}: {error}") from error
        values = {**preset, **component.settings}
        model = registry.load_config(record)
        if model is None:
            config = build_config(record, values, f"{source.of(path)}: [{path}]")
        else:
            config = _validated(model, values, source, owner=record.name, prefix=f"{path}.")
        settings = config.model_dump(mode="json", exclude_none=True) if config is not None else {}
        return component.model_copy(update={"use": record.name, "preset": None, "settings": settings})

    return recipe.model_copy(
        update={
            "encoder": complete(recipe.encoder, "encoder", "encoder"),
            "objective": complete(recipe.objective, "objective", "objective"),
            "dataset": complete(recipe.dataset, "dataset", "dataset"),
            "modifier": tuple(complete(m, "modifier", f"modifier.{i}") for i, m in enumerate(recipe.modifier)),
            "evaluate": tuple(complete(e, "evaluator", f"evaluate.{i}") for i, e in enumerate(recipe.evaluate)),
        }
    )


def _validated(model: Any, values: Mapping[str, Any], source: Source, *, owner: str = "", prefix: str = "") -> Any:
    try:
        # Through JSON: strict about types, and still lists for tuples and texts for paths, as files have them.
        return model.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems = [_explain(model, problem, source, owner, prefix) for problem in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from error
    except InputError as error:
        raise RecipeError(f"{source.of(prefix.rstrip('.'))}: {error}") from error


def _explain(model: Any, problem: Mapping[str, Any], source: Source, owner: str, prefix: str) -> str:
    location = [part for part in problem["loc"] if part != "settings"]
    path = (prefix + ".".join(map(str, location))).rstrip(".")
    place = f"{source.of(path)}: {path}".rstrip(": ")
    if problem["type"] in ("extra_forbidden", "value_error"):
        # An unknown table, or keys that contradict each other: a key below it that --set gave is what changed.
        below = [key for key in source.overridden if not path or key.startswith(f"{path}.")]
        place = f"{source.of(below[0] if below else path)}: {path}".rstrip(": ")
    of_owner = f" of {owner}" if owner else ""
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        return f"{place}: unknown key{of_owner}.{did_you_mean(str(location[-1]), known)} Accepted: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{place}: this key{of_owner} is required and not given"
    message = str(problem["msg"]).removeprefix("Value error, ")
    found = problem.get("input")
    hint = did_you_mean(found, _choices(problem)) if isinstance(found, str) else ""
    if problem["type"] == "value_error":
        return f"{place}: {message}"
    value = json.dumps(found, default=str)
    return f"{place} = {value} is not accepted{of_owner}: {message[0].lower()}{message[1:]}.{hint}"


def _choices(problem: Mapping[str, Any]) -> list[str]:
    expected = str(problem.get("ctx", {}).get("expected", ""))
    return [part.strip(" '") for part in expected.replace(" or ", ",").split(",")]


def _keys_at(model: Any, location: Sequence[Any]) -> list[str]:
    """Field names of the model that ``location`` leads to."""
    for part in location:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            model = _model_in(model.model_fields[part].annotation) or model
    return sorted(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _set(names: Sequence[str]) -> str:
    return "{" + ", ".join(repr(name) for name in sorted(names)) + "}"


def _write_table(lines: list[str], table: Mapping[str, Any], path: tuple[str, ...]) -> None:
    later: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, Mapping) or (isinstance(value, list) and value and isinstance(value[0], Mapping)):
            later.append((key, value))
        elif value is not None:
            lines.append(f"{_key(key)} = {toml_value(value)}")
    for key, value in later:
        header = ".".join(map(_key, (*path, key)))
        for item in value if isinstance(value, list) else [value]:
            lines += ["", f"[[{header}]]" if isinstance(value, list) else f"[{header}]"]
            _write_table(lines, item, (*path, key))


def toml_value(value: Any) -> str:
    """Plain data as a value of TOML, on one line; the inverse of ``parse_value``."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return "nan" if value != value else ("inf" if value > 0 else "-inf")
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML forbids the bare control character


def _key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key) else _text(key)
