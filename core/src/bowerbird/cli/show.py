"""``bowerbird show NAME``: one method, with every setting that it has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from bowerbird.cli import examples
from bowerbird.errors import PluginError
from bowerbird.records import Record
from bowerbird.registry import Registry, get_registry, install_command

EXAMPLES = (
    "bowerbird show compat:bct",
    "bowerbird show rank-merge",
    "bowerbird show core:timm --json-schema > timm.schema.json",
)
RANGES = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "pattern": "matching {}",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
}


@click.command("show", epilog=examples(*EXAMPLES))
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
@click.option("--json-schema", is_flag=True, help="Print the JSON schema of its settings, for editors.")
def command(name: str, as_json: bool, json_schema: bool) -> None:
    """Show the method NAME: what it is, its settings with types, defaults and ranges, and its presets.

    NAME is plugin:method, or only the method where that is unambiguous.
    """
    registry = get_registry()
    # One name may stand for an encoder and an objective that belong together; `show` shows both.
    records = [record for record in registry.records() if record.name == name] or [registry.get(None, name)]
    if json_schema:
        schemas = [schema for record in records if (schema := _schema(registry, record)) is not None]
        click.echo(json.dumps(schemas[0] if len(schemas) == 1 else {"oneOf": schemas} if schemas else {}, indent=2))
        return
    if as_json:
        click.echo(json.dumps([_as_data(registry, record) for record in records], indent=2))
        return
    for position, record in enumerate(records):
        if position:
            click.echo()
        _print(registry, record)


def _schema(registry: Registry, record: Record) -> dict[str, Any] | None:
    config = registry.load_config(record)
    return None if config is None else config.model_json_schema()


def _as_data(registry: Registry, record: Record) -> dict[str, Any]:
    data = {
        **record.to_dict(),
        "distribution": registry.distribution(record),
        "missing_extras": registry.missing_extras(record),
    }
    try:
        data["settings"] = _schema(registry, record)
        data["preset_values"] = {preset: registry.load_preset(record, preset) for preset in record.presets}
    except PluginError as exc:
        data["settings_error"] = str(exc)
    return data


def _print(registry: Registry, record: Record) -> None:
    click.secho(f"{record.name}  ({record.kind})", bold=True)
    click.echo(f"  {record.summary}\n")
    values = {**record.to_dict(), "from": registry.distribution(record)}
    for key in ("kind", "name", "summary", "presets", "extras"):
        del values[key]
    for key, value in values.items():
        if value not in (None, (), ""):
            click.echo(f"  {key.replace('_', ' '):<15} {', '.join(value) if isinstance(value, tuple) else value}")
    missing = registry.missing_extras(record)
    if missing:
        click.echo(f"\n  Not installed: {', '.join(sorted(missing))}. Install with: {install_command(missing)}")

    click.echo()
    try:
        schema = _schema(registry, record)
        rows = [] if schema is None else list(_rows(schema, schema.get("$defs", {})))
        presets = {preset: registry.load_preset(record, preset) for preset in record.presets}
    except PluginError as exc:
        click.echo(f"Settings cannot be shown: {exc}")
        return
    if not rows:
        click.echo("It has no settings.")
    else:
        click.secho("Settings", bold=True)
        _print_table([("name", "type", "default", "accepted"), *[row[:4] for row in rows]], [row[4] for row in rows])
    if presets:
        click.secho("\nPresets", bold=True)
        for preset, settings in presets.items():
            click.echo(f"  {preset}: " + ", ".join(f"{key} = {json.dumps(v)}" for key, v in settings.items()))


def _rows(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """``(name, type, default, accepted, description)`` of every field; nested models as ``outer.inner``."""
    for name, field in schema.get("properties", {}).items():
        resolved = _resolve(field, definitions)
        if "properties" in resolved:
            yield from _rows(resolved, definitions, f"{prefix}{name}.")
            continue
        default = (
            json.dumps(field["default"]) if "default" in field else "(required)" if _required(schema, name) else ""
        )
        yield (prefix + name, _type(field, definitions), default, _accepted(field, definitions), _description(field))


def _required(schema: Mapping[str, Any], name: str) -> bool:
    return name in schema.get("required", ())


def _description(field: Mapping[str, Any]) -> str:
    return " ".join(field.get("description", "").split())


def _resolve(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = field.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else field


def _alternatives(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    field = _resolve(field, definitions)
    return [_resolve(part, definitions) for part in field.get("anyOf") or field.get("oneOf") or [field]]


def _type(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    names = []
    for part in _alternatives(field, definitions):
        if "enum" in part or "const" in part:
            names.append("choice")
        elif part.get("type") == "array":
            items = part.get("items")
            names.append(f"list of {_type(items, definitions)}" if items else "list")
        else:
            names.append(str(part.get("type", part.get("title", "any"))))
    return " or ".join(dict.fromkeys(names))


def _accepted(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    limits = []
    for part in _alternatives(field, definitions):
        choices = part.get("enum") or ([part["const"]] if "const" in part else [])
        if choices:
            limits.append(", ".join(map(str, choices)))
        limits += [text.format(part[key]) for key, text in RANGES.items() if key in part]
    return " and ".join(limits)


def _print_table(rows: list[tuple[str, ...]], descriptions: list[str]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row, description in zip(rows, ["", *descriptions], strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(f"  {cells}".rstrip())
        if description:
            click.echo(click.wrap_text(description, 100, initial_indent="      ", subsequent_indent="      "))
