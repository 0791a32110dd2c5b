"""``bowerbird doctor``: is this installation sound? Libraries, plugins, and whether every method can be found."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import click

import bowerbird
from bowerbird.cli import examples
from bowerbird.errors import PluginError
from bowerbird.records import API_VERSION, Record
from bowerbird.registry import Registry, get_registry, import_string, install_command

LIBRARIES = (
    "numpy", "pillow", "pydantic", "pluggy", "click", "rich", "torch", "torchvision", "timm", "transformers",
    "safetensors", "pytorch-metric-learning", "faiss-cpu", "faiss-gpu", "scikit-learn", "matplotlib", "pyarrow",
)  # fmt: skip
# kind -> the class that a target must derive from
CONTRACTS = {
    "encoder": "bowerbird.protocols:Encoder",
    "objective": "bowerbird.protocols:Objective",
    "dataset": "bowerbird.data.dataset:Dataset",
    "modifier": "bowerbird.protocols:Modifier",
    "evaluator": "bowerbird.protocols:Evaluator",
}
EXAMPLES = ("bowerbird doctor", "bowerbird doctor --deep", "bowerbird --plugin my_idea.py doctor")


@click.command("doctor", epilog=examples(*EXAMPLES))
@click.option("--deep", is_flag=True, help="Import every method, which takes seconds and finds more.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
@click.pass_context
def command(ctx: click.Context, deep: bool, as_json: bool) -> None:
    """Check Python, libraries, plugins and methods. The exit code is 1 when something is broken."""
    registry = get_registry()
    libraries = {name: version for name in LIBRARIES if (version := _version(name))}
    methods = [
        {"name": record.name, "kind": record.kind, **_check_method(registry, record, deep=deep)}
        for record in registry.records()
    ]
    report: dict[str, Any] = {
        "bowerbird": bowerbird.__version__,
        "api": API_VERSION,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "libraries": libraries,
        "warnings": _warnings(registry, libraries),
        "plugins": [status.to_dict() for status in registry.plugins],
        "methods": methods,
    }
    report["ok"] = all(status.state in ("ok", "disabled") for status in registry.plugins) and all(
        method["state"] != "broken" for method in methods
    )
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    ctx.exit(0 if report["ok"] else 1)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _warnings(registry: Registry, libraries: dict[str, str]) -> list[str]:
    warnings = []
    if {"faiss-cpu", "faiss-gpu"} <= set(libraries):
        warnings.append(
            "faiss-cpu and faiss-gpu are both installed and overwrite each other's files. Keep one: "
            "pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-gpu (or faiss-cpu)"
        )
    known = {status.name for status in registry.plugins}
    for name in filter(None, map(str.strip, os.environ.get("BOWERBIRD_DISABLE_PLUGINS", "").split(","))):
        if name not in known:
            warnings.append(f"BOWERBIRD_DISABLE_PLUGINS names {name!r}, and no such plugin is installed")
    warnings += [str(status) for status in registry.plugins if status.state == "ok" and status.detail]
    return warnings


def _check_method(registry: Registry, record: Record, *, deep: bool) -> dict[str, str]:
    """``state`` is ok, missing (an extra is not installed) or broken; ``detail`` says what to do."""
    missing = registry.missing_extras(record)
    if missing:
        return {"state": "missing", "detail": f"needs {', '.join(missing)}: {install_command(missing)}"}
    targets = [record.target, *([record.config] if record.config else []), *record.presets.values()]
    problem = _deep_problem(registry, record) if deep else next(filter(None, map(_static_problem, targets)), "")
    return {"state": "broken", "detail": problem} if problem else {"state": "ok", "detail": ""}


def _deep_problem(registry: Registry, record: Record) -> str:
    try:
        target = registry.load(record)
        registry.load_config(record)
        for preset in record.presets:
            registry.load_preset(record, preset)
    except PluginError as exc:
        return str(exc)
    if record.kind in CONTRACTS:
        contract = import_string(CONTRACTS[record.kind])
        if not (isinstance(target, type) and issubclass(target, contract)):
            return f"{record.target!r} is no subclass of {CONTRACTS[record.kind]}"
    return ""


def _static_problem(target: str) -> str:
    """What is wrong with an import string as far as its module's source tells; the module itself is not imported."""
    module, _, attribute = target.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # the package around the module is imported, and may do anything
        return f"target {target!r}: {type(exc).__name__}: {exc}"
    if spec is None:
        return f"target {target!r}: there is no module {module!r}"
    if spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    try:
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (OSError, SyntaxError, ValueError) as exc:
        return f"target {target!r}: {type(exc).__name__}: {exc}"
    names = _names_bound_by(tree)
    first = attribute.partition(".")[0]
    if first not in names and not {"*", "__getattr__"} & names:
        return f"target {target!r}: {spec.origin} defines no {first!r}"
    return ""


def _names_bound_by(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names


def _print(report: dict[str, Any]) -> None:
    click.echo(f"bowerbird {report['bowerbird']} (hook API {report['api']}), Python {report['python']}")
    click.echo(f"{report['executable']} on {report['platform']}\n")
    click.secho("libraries", bold=True)
    for name, version in report["libraries"].items():
        click.echo(f"  {name} {version}")
    click.secho("\nplugins", bold=True)
    for status in report["plugins"]:
        source = f"{status['distribution']} {status['version']}".strip()
        detail = f": {status['detail']}" if status["detail"] else ""
        click.echo(f"  {status['name']} ({source}) {status['state']}{detail}")
        for line in status["traceback"].splitlines():
            click.echo(f"    | {line}")
    click.secho("\nmethods", bold=True)
    for method in report["methods"]:
        if method["state"] != "ok":
            click.echo(f"  {method['name']} ({method['kind']}) {method['state']}: {method['detail']}")
    fine = sum(method["state"] == "ok" for method in report["methods"])
    click.echo(f"  {fine} of {len(report['methods'])} can be used here")
    for warning in report["warnings"]:
        click.secho(f"\nwarning: {warning}", fg="yellow")
    click.echo("\neverything is fine" if report["ok"] else "\nsomething is broken, see above")
