"""``bowerbird list``: everything that is installed, by kind."""

from __future__ import annotations

import json

import click

from bowerbird.cli import examples
from bowerbird.records import API_VERSION, RECORD_TYPES, Record
from bowerbird.registry import get_registry

KINDS = tuple(record_type.kind for record_type in RECORD_TYPES)
EXAMPLES = ("bowerbird list", "bowerbird list objective", "bowerbird list retriever --json")


@click.command("list", epilog=examples(*EXAMPLES))
@click.argument("kind", required=False, metavar="[KIND]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def command(kind: str | None, as_json: bool) -> None:
    """List methods by kind: encoder, objective, dataset, retriever, modifier or evaluator.

    Ends with one line for each plugin that cannot be used; `bowerbird doctor` says why.
    """
    registry = get_registry()
    if kind is not None and kind not in KINDS and kind.removesuffix("s") in KINDS:
        kind = kind.removesuffix("s")
    records = registry.records(kind)
    if as_json:
        data = {
            "api": API_VERSION,
            "records": [record.to_dict() for record in records],
            "plugins": [status.to_dict() for status in registry.plugins],
        }
        click.echo(json.dumps(data, indent=2))
        return

    width = max((len(record.name) for record in records), default=0)
    for wanted in KINDS:
        group = [record for record in records if record.kind == wanted]
        if group:
            click.secho(f"{wanted}s", bold=True)
            for record in group:
                click.echo(f"  {record.name:<{width}}  {describe(record)}")
            click.echo()
    if not records:
        click.echo(f"No {kind or 'method'} is installed.\n")
    for status in registry.plugins:
        if status.state != "ok":
            click.echo(f"{status}  (see `bowerbird doctor`)")


def describe(record: Record) -> str:
    """The summary, with a retriever's role before it and what is not stable after it."""
    role = getattr(record, "role", None)
    note = "" if record.maturity == "stable" else f" [{record.maturity}]"
    return f"{f'{role}: ' if role else ''}{record.summary}{note}"
