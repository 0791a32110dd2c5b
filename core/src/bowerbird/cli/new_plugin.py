"""``bowerbird new-plugin NAME``: a distribution of your own, with one working method and green tests."""

from __future__ import annotations

import keyword
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

import click

from bowerbird.cli import examples
from bowerbird.errors import InputError
from bowerbird.files import atomic_folder
from bowerbird.records import API_VERSION, PLUGIN_NAME
from bowerbird.registry import get_registry

# kind -> (method, module, summary, dependencies)
KINDS = {
    "encoder": (
        "tiny",
        "tiny",
        "A small convolutional encoder.",
        ("bowerbird-core[torch]", "pydantic>=2.8,<3", "torch>=2.4"),
    ),
    "objective": (
        "tiny",
        "tiny",
        "Cross-entropy over cosines to class directions.",
        ("bowerbird-core[torch]", "pydantic>=2.8,<3", "torch>=2.4"),
    ),
    "dataset": (
        "shapes",
        "shapes",
        "Circles, squares and triangles.",
        ("bowerbird-core", "pillow>=10.3", "pydantic>=2.8,<3"),
    ),
    "retriever": (
        "newest-first",
        "newest_first",
        "Upgrades the newest items first.",
        ("bowerbird-core", "numpy>=1.26"),
    ),
}
CORE_RANGE = ">=0.1,<0.2"
EXAMPLES = (
    "bowerbird new-plugin acme",
    "bowerbird new-plugin acme --kind objective --output ~/code",
    "cd bowerbird-acme && nox",
)


@click.command("new-plugin", epilog=examples(*EXAMPLES))
@click.argument("name")
@click.option(
    "--kind", type=click.Choice(list(KINDS)), default="encoder", show_default=True, help="Of its first method."
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where to put it [default: here].",
)
def command(name: str, kind: str, output: Path) -> None:
    """Write the distribution bowerbird-NAME: one small method that works, and tests that are green.

    NAME becomes the left part of your methods' names (NAME:method).
    """
    folder = create_plugin(name, kind=kind, output=output)
    click.echo(f"Wrote {folder}, with the {kind} {name}:{KINDS[kind][0]}. Next:\n")
    click.echo(f"  cd {folder}\n  python -m pip install -e '.[test]' && python -m pytest")
    click.echo(f"  bowerbird show {name}:{KINDS[kind][0]}")
    click.echo("\nThen replace the method by yours; the contract tests say what it must keep.")


def create_plugin(name: str, *, kind: str = "encoder", output: str | Path = ".") -> Path:
    """Write the folder ``bowerbird-NAME`` into ``output`` and return its path. It is either whole or not there.

    Raises:
        InputError: The name cannot be used, or the folder exists and is not empty.
    """
    check_name(name)
    folder = Path(output) / f"bowerbird-{name}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{str(folder)!r} already exists and is not empty; choose another name, or --output DIR")
    method, module, summary, dependencies = KINDS[kind]
    values = {
        "api": API_VERSION,
        "dependencies": ", ".join(f'"{d + CORE_RANGE if d.startswith("bowerbird-core") else d}"' for d in dependencies),
        "distribution": f"bowerbird-{name}",
        "kind": kind,
        "method": f"{name}:{method}",
        "module": module,
        "name": name,
        "package": package_name(name),
        "summary": summary,
    }
    template = resources.files("bowerbird") / "template"
    with atomic_folder(folder) as temporary:
        for part in ("common", kind):
            _render(template / part, temporary, values)
    return folder


def check_name(name: str) -> None:
    """Raises ``InputError`` unless ``name`` can be a distribution, an import package and the name of an entry point."""
    if name.startswith("bowerbird-"):
        raise InputError(f"leave out the prefix: `bowerbird new-plugin {name.removeprefix('bowerbird-')}`")
    if not PLUGIN_NAME.fullmatch(name) or "_" in name or len(name) > 40:
        raise InputError(f"{name!r} is no plugin name: use up to 40 of a-z, 0-9 and single '-' between them")
    package = package_name(name)
    if not package.isidentifier() or keyword.iskeyword(package):
        raise InputError(f"{name!r} is no plugin name: {package!r} is no Python identifier")
    for status in get_registry().plugins:
        if status.name == name:
            raise InputError(f"the name {name!r} is taken by {status.source}; choose another one")


def package_name(name: str) -> str:
    return "bowerbird_" + name.replace("-", "_")


def _render(source: Traversable, target: Path, values: dict[str, str]) -> None:
    """Copy a template folder: ``package`` becomes the import package, ``x.tmpl`` the file ``x`` with values in it."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir():
            _render(entry, target / (values["package"] if entry.name == "package" else entry.name), values)
        elif entry.name.endswith(".tmpl"):
            name = entry.name.removesuffix(".tmpl").replace("gitignore", ".gitignore")
            text = Template(entry.read_text(encoding="utf-8")).substitute(values)
            (target / name).write_text(text, encoding="utf-8")
