"""``docs/plugin-authors/hooks.md``, made from the hook specifications and the record types."""

from __future__ import annotations

import dataclasses
import inspect

HEAD = """# Hooks and records

Made by `python docs/generate.py` from `bowerbird.hookspecs` and `bowerbird.records`. A plugin is one light module that
declares `BOWERBIRD_API = "{api}"` and implements some of these functions, each decorated with `@hookimpl`:

```toml
[project.entry-points.bowerbird]
acme = "bowerbird_acme.plugin"
```

"""


def hooks_page() -> str:
    from bowerbird import hookspecs, records

    hooks = [getattr(hookspecs, name) for name in vars(hookspecs) if name.startswith("bowerbird_")]
    catalogue = [hook for hook in hooks if hook.__name__ in hookspecs.CATALOGUE_HOOKS]
    events = [hook for hook in hooks if hook.__name__ not in hookspecs.CATALOGUE_HOOKS]
    parts = [HEAD.format(api=records.API_VERSION)]
    parts += ["## Catalogue\n\nCalled once per plugin at discovery; they yield records.\n\n", *map(_hook, catalogue)]
    parts += ["## Events\n\nCalled while something runs; results are ignored.\n\n", *map(_hook, events)]
    parts += ["## Records\n\n", _record(records.Record, set())]
    common = {field.name for field in dataclasses.fields(records.Record)}
    parts += [_record(record_type, common) for record_type in records.RECORD_TYPES]
    parts.append(f"Roles of retrievers: {', '.join(f'`{role}`' for role in records.RETRIEVER_ROLES)}.\n")
    return "".join(parts)


def _hook(hook: object) -> str:
    signature = str(inspect.signature(hook)).replace("'", "")  # type: ignore[arg-type]
    text = inspect.cleandoc(hook.__doc__ or "")
    summary, example, code = text.partition("::\n\n")
    body = summary + (f":\n\n```python\n{inspect.cleandoc(code)}\n```" if example else "")
    return f"### `{hook.__name__}`\n\n```python\n{hook.__name__}{signature}\n```\n\n{_inline(body)}\n\n"  # type: ignore[attr-defined]


def _record(record_type: type, inherited: set[str]) -> str:
    text = inspect.cleandoc(record_type.__doc__ or "")
    summary, _, attributes = text.partition("Attributes:\n")
    meanings: dict[str, str] = {}
    for line in attributes.splitlines():
        name, colon, meaning = line.strip().partition(": ")
        if line.startswith("    ") and not line.startswith("     ") and colon:
            meanings[name] = meaning
        elif meanings:
            meanings[next(reversed(meanings))] += f" {line.strip()}"
    rows = []
    for field in dataclasses.fields(record_type):
        if field.name not in inherited:
            default = "required"
            if field.default is not dataclasses.MISSING:
                default = f"`{field.default!r}`"
            elif field.default_factory is not dataclasses.MISSING:
                default = f"`{field.default_factory()!r}`"
            kind = str(field.type).replace("|", "or")
            rows.append(f"| `{field.name}` | `{kind}` | {default} | {_inline(meanings.get(field.name, '')).strip()} |")
    table = "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows]) if rows else ""
    title = "Every record" if not inherited else record_type.__name__
    return "\n\n".join(part for part in (f"### {title}", _inline(summary).strip(), table) if part) + "\n\n"


def _inline(text: str) -> str:
    return text.replace("``", "`") if "```" not in text else text.replace(" ``", " `").replace("`` ", "` ")
