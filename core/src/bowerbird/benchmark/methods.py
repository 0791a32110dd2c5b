"""Which methods and strategies take part, and with which settings. No torch here."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bowerbird.errors import BowerbirdError, InputError, UnknownNameError, did_you_mean
from bowerbird.registry import get_registry

COMPATIBLE = "core:compatible"
FREE = "free"  # the new model that was trained without regard to the old one
NAIVE = "no-strategy"  # its queries on old vectors as they are
FULL = "core:full"
RANK_MERGE = "compat:rank-merge"  # the strategy in which the merger decides
_KEYS = ("name", "objective", "settings", "encoder", "serve")


@dataclass(frozen=True)
class Method:
    """How a compatible new model is trained and served; see ``methods.toml``."""

    name: str
    objective: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    encoder: Mapping[str, Any] | None = None
    serve: tuple[str, ...] = (COMPATIBLE,)

    def key(self) -> dict[str, Any]:
        """What its results depend on."""
        return {"objective": self.objective, "settings": dict(self.settings), "encoder": self.encoder}


@dataclass(frozen=True)
class Selection:
    """Methods and strategies of a run, and what cannot take part (name -> why).

    A strategy with another merger than its own is named ``STRATEGY+MERGER``.
    """

    methods: tuple[Method, ...]
    strategies: tuple[str, ...]
    missing: Mapping[str, str]


def select(wanted: Sequence[str] | None = None, config: Path | None = None) -> Selection:
    """All installed methods and strategies, or those that ``wanted`` names (a name, a record, or its last part).

    Raises:
        UnknownNameError: A wanted name that is neither known nor installed.
        InputError: A damaged ``config``.
    """
    registry = get_registry()
    tables = {method.name: method for method in _read(Path(__file__).with_name("methods.toml"))}
    tables |= {method.name: method for method in _read(config)} if config else {}
    missing: dict[str, str] = {}
    methods: dict[str, Method] = {}
    for method in tables.values():
        try:
            registry.get("objective", method.objective)
            methods[method.name] = method
        except BowerbirdError as error:
            missing[method.name] = str(error)
    named = {method.objective for method in tables.values()}
    for record in registry.records(kind="objective"):
        if record.name in named:
            continue
        try:
            model = registry.load_config(record)
        except BowerbirdError as error:
            missing[record.name] = str(error)
            continue
        if model is not None and "old_run" in model.model_fields:
            methods[record.name] = Method(record.name, record.name)
    strategies = [record.name for record in registry.records(kind="retriever", role="upgrade")]
    strategies = [NAIVE, *(name for name in strategies if name != COMPATIBLE)]
    if RANK_MERGE in strategies:
        place = strategies.index(RANK_MERGE) + 1
        mergers = [record.name for record in registry.records(kind="retriever", role="merger")]
        strategies[place:place] = [f"{RANK_MERGE}+{_short(name)}" for name in mergers if name != "core:distance"]
    for name in (RANK_MERGE, "compat:adapter"):
        if name not in strategies:
            missing[name] = "comes with: pip install bowerbird-compat"
    if wanted is None:
        return Selection(tuple(methods.values()), tuple(strategies), missing)
    return _chosen(wanted, methods, strategies, missing)


def _chosen(
    wanted: Sequence[str], methods: Mapping[str, Method], strategies: Sequence[str], missing: Mapping[str, str]
) -> Selection:
    chosen_methods: dict[str, Method] = {}
    chosen: list[str] = []
    known = {**{name: name for name in (*methods, *strategies, *missing)}}
    known |= {name.partition(":")[2]: name for name in known if ":" in name}
    known |= {method.objective: name for name, method in reversed(list(methods.items()))}
    for name in wanted:
        if name not in known:
            raise UnknownNameError(
                f"no method or strategy {name!r}.{did_you_mean(name, known)} "
                f"Methods: {', '.join(methods)}; strategies: {', '.join(strategies)}"
            )
        full = known[name]
        if full in methods:
            chosen_methods[full] = methods[full]
        elif full in strategies:
            chosen.append(full)
    left_out = {name: missing[name] for name in (known[w] for w in wanted) if name in missing}
    return Selection(tuple(chosen_methods.values()), tuple(dict.fromkeys(chosen)), left_out)


def _short(merger: str) -> str:
    return merger.removeprefix("core:")


def _read(file: Path) -> list[Method]:
    try:
        tables = tomllib.loads(file.read_text("utf-8")).get("method", [])
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: no TOML: {error}") from error
    made = []
    for table in tables:
        unknown = [key for key in table if key not in _KEYS]
        if unknown or not all(isinstance(table.get(key), str) for key in ("name", "objective")):
            raise InputError(
                f"{file}: every [[method]] needs name and objective and may have settings, encoder and serve; "
                f"found {', '.join(table)}.{did_you_mean(unknown[0], _KEYS) if unknown else ''}"
            )
        values = {**table, "serve": tuple(table.get("serve", (COMPATIBLE,)))}
        made.append(Method(**values))
    return made


def filled(value: Any, known: Mapping[str, Any]) -> Any:
    """``value`` with every text ``"$name"`` in it replaced by ``known["name"]``."""
    if isinstance(value, Mapping):
        return {key: filled(item, known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [filled(item, known) for item in value]
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in known:
            raise InputError(f"setting {value!r}: known are {', '.join('$' + name for name in known)}")
        return known[value[1:]]
    return value
