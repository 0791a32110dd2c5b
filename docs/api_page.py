"""``docs/http-api.md`` and ``docs/openapi.json``, made from the schema that ``bowerbird serve`` publishes."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

Schema = Mapping[str, Any]

HEAD = """# HTTP API

Made by `python docs/generate.py` from the schema that a service publishes under `/openapi.json`
([this version's](openapi.json)). [Serving](serve.md) shows most of it at work.

- **Base.** Everything is under `http://HOST:PORT`. Bodies and answers are JSON (UTF-8), except for pictures: they are
  uploaded as `multipart/form-data` and thumbnails come back as WebP.
- **Who may.** With a token file, every request that needs a role carries `Authorization: Bearer TOKEN`. The role
  `write` includes `read`, and `admin` includes `write`. Without a token file, the service is on the loopback address
  only, and whoever can reach it is an administrator. See [the threat model](serve-security.md).
- **Errors** are [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problems, `application/problem+json`, with a
  `detail` that says what was asked, what was found and what to do: [`Problem`](#problem).
- **Ids** of items may hold any character, so they travel in bodies and query strings, never in paths.
- **Again is safe.** Adding is idempotent by id and content, deleting by id. What was answered with 200 is on the disk.
- **Pages of results.** `offset` and `k` page a search. Answers with the same `epoch` saw the same gallery.
- **Too much.** 429 and 503 come with `Retry-After`, in seconds.

"""


def schema() -> dict[str, Any]:
    """What a service publishes; no gallery is opened."""
    from bowerbird.serve.app import create_app
    from bowerbird.serve.settings import ServeSettings

    return create_app(ServeSettings.model_validate({"gallery": "photos"})).openapi()


def roles() -> dict[str, str]:
    """Operation id -> the role that it needs, as its route asks for it."""
    from bowerbird.serve import depends, routes

    needed = {depends._reader: "read", depends._writer: "write", depends._admin: "admin"}
    found = {}
    for module in pkgutil.iter_modules(routes.__path__, "bowerbird.serve.routes."):
        for route in importlib.import_module(module.name).router.routes:
            for part in getattr(getattr(route, "dependant", None), "dependencies", ()):
                if part.call in needed:
                    found[route.operation_id] = needed[part.call]
    return found


def made_by() -> str:
    """What writes the schema: another version of it may write the same interface in other words."""
    return f"fastapi {metadata.version('fastapi')}"


def openapi_json(found: Schema) -> str:
    return json.dumps({**found, "x-made-by": made_by()}, indent=1, ensure_ascii=False) + "\n"


def made_by_another(committed: Path) -> bool:
    """Whether the committed schema was written by another version of FastAPI, so that its words do not count."""
    return committed.is_file() and json.loads(committed.read_text()).get("x-made-by") != made_by()


def api_page(found: Schema, needs: Mapping[str, str]) -> str:
    """``needs``: see ``roles``."""
    operations = [
        (method, path, operation)
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    ]  # fmt: skip
    models = found["components"]["schemas"]
    usual = set.intersection(*(_problems(operation) for _, _, operation in operations))
    meant = {status: text for _, _, o in operations for status, text in _described(o) if status in usual}
    parts = [HEAD, "Any request may be answered by these problems:\n\n| status | |\n|---|---|\n"]
    parts += [f"| {status} | {_cell(text)} |\n" for status, text in sorted(meant.items())] + ["\n"]
    for tag in dict.fromkeys(_tag(operation) for _, _, operation in operations):
        own = [operation for operation in operations if _tag(operation[2]) == tag]
        parts += [f"## {tag.capitalize()}\n\n", _overview(own, needs)]
        parts += [_operation(*operation, models, usual) for operation in own]
    asked = _reached([operation.get("requestBody", {}) for _, _, operation in operations], models)
    told = _reached([operation["responses"] for _, _, operation in operations], models)
    json_bodies = [name for name in models if name in asked and not name.startswith("Body_")]
    parts += ["## Models of requests\n\n", *(_model(name, models[name], request=True) for name in json_bodies)]
    answers = [name for name in models if name in told and name not in json_bodies]
    parts += ["## Models of answers\n\n", *(_model(name, models[name], request=False) for name in answers)]
    return "".join(parts).rstrip() + "\n"


def _tag(operation: Schema) -> str:
    return str(operation.get("tags", ["other"])[0])


def _described(operation: Schema) -> Iterator[tuple[str, str]]:
    """Problems with their descriptions."""
    yield from ((s, r["description"]) for s, r in operation["responses"].items() if s[0] in "45")


def _problems(operation: Schema) -> set[str]:
    return {status for status, _ in _described(operation)}


def _reached(part: Any, models: Schema) -> set[str]:
    """Names of the models that ``part`` of a schema refers to, directly or not."""
    found: set[str] = set()
    waiting = [part]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            name = str(part.get("$ref", "")).rpartition("/")[2]
            if name and name not in found:
                found.add(name)
                waiting.append(models[name])
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
    return found


def _overview(operations: list[tuple[str, str, Schema]], needs: Mapping[str, str]) -> str:
    rows = [
        f"| `{method.upper()} {path}` | {_cell(op.get('summary', ''))} | {needs.get(op['operationId'], '')} |"
        for method, path, op in operations
    ]
    return "\n".join(["| request | | role |", "|---|---|---|", *rows]) + "\n\n"


def _operation(method: str, path: str, operation: Schema, models: Schema, usual: set[str]) -> str:
    lines = [f"### `{method.upper()} {path}`", "", f"{operation.get('summary', '').rstrip('.')}."]
    if operation.get("description"):
        lines += ["", operation["description"].strip()]
    given = operation.get("parameters", [])
    if given:
        lines += ["", "| parameter | type | |", "|---|---|---|"]
        lines += [_row(p["name"], p["schema"], p.get("required", False), p.get("description")) for p in given]
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        name = body["schema"].get("$ref", "").rpartition("/")[2]
        form = models[name] if name.startswith("Body_") else body["schema"]
        if "properties" in form:  # its fields belong to this operation alone
            lines += ["", f"Body, `{kind}`:", "", *_fields(form, request=True)]
        else:
            lines += ["", f"Body, `{kind}`: {_type(body['schema'])}."]
    lines += [""]
    for status, response in operation["responses"].items():
        if status[0] == "2":
            contents = response.get("content", {}).items()
            what = [_type(c.get("schema", {})) if k == "application/json" else f"`{k}`" for k, c in contents]
            lines += [f"Answers {status}{': ' + ', '.join(what) if what else ''}."]
    lines += [f"{status}: {text}" for status, text in _described(operation) if status not in usual]
    return "\n".join([*lines, "", ""])


def _model(name: str, model: Schema, *, request: bool) -> str:
    lines = [f"### `{name}`", ""]
    if model.get("description"):
        lines += [" ".join(model["description"].split()), ""]
    return "\n".join([*lines, *_fields(model, request=request), "", ""])


def _fields(model: Schema, *, request: bool) -> list[str]:
    required = model.get("required", ()) if request else ()
    rows = []
    for name, part in model.get("properties", {}).items():
        shown = part if request else {key: value for key, value in part.items() if key != "default"}
        rows.append(_row(name, shown, name in required, part.get("description")))
    return ["| field | type | |", "|---|---|---|", *rows]


def _row(name: str, schema: Schema, required: bool, text: str | None) -> str:
    return f"| `{name}` | {_type(schema)} | {_notes(schema, required, text or schema.get('description'))} |"


def _notes(schema: Schema, required: bool, text: str | None) -> str:
    """Default or "required", bounds, and what is said of it."""
    found = []
    if "default" in schema:
        found.append(f"default `{json.dumps(schema['default'], ensure_ascii=False)}`")
    elif required:
        found.append("required")
    for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")):
        found += [f"{sign} {part[key]}" for part in _alternatives(schema) if key in part]
    for key in ("minLength", "minItems"):
        found += ["not empty" for part in _alternatives(schema) if part.get(key) == 1]
    for key, unit in (("maxLength", "characters"), ("maxItems", "entries"), ("maxProperties", "entries")):
        found += [f"at most {part[key]} {unit}" for part in _alternatives(schema) if key in part]
    return _cell(". ".join(part for part in (", ".join(found), (text or "").strip().rstrip(".")) if part))


def _alternatives(schema: Schema) -> list[Schema]:
    return [schema, *schema.get("anyOf", ())]


def _type(schema: Schema) -> str:
    """A type in words, with links to models."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part) for part in schema["anyOf"]))
    if "allOf" in schema:
        return _type(schema["allOf"][0])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_inner(schema.get('items', {}))}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"object of {_inner(inner)}" if isinstance(inner, Mapping) and inner else "object"
    if schema.get("format") == "binary" or "contentMediaType" in schema:
        return "file"
    return str(kind or "anything")


def _inner(schema: Schema) -> str:
    found = _type(schema)
    return f"({found})" if " or " in found else found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
