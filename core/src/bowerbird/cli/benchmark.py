"""``bowerbird benchmark``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bowerbird.cli import examples


@click.group("benchmark", epilog=examples("bowerbird benchmark upgrade --quick", "bowerbird benchmark upgrade --help"))
def command() -> None:
    """Compare methods on the same data, with intervals."""


@command.command(
    "upgrade",
    epilog=examples(
        "bowerbird benchmark upgrade --quick --out bench",
        "bowerbird benchmark upgrade --dataset core:digits --scenario open-classes --method bct --method rank-merge",
        "bowerbird benchmark upgrade --dataset emoji:styles --seeds 5 --out bench-emoji",
        "bowerbird --plugin mine.py benchmark upgrade --method mine:pull --method bct",
    ),
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="NAME",
    help="core:digits, core:fashion-mnist or emoji:styles; may be repeated.  [default: core:digits]",
)
@click.option(
    "--scenario",
    "--scenarios",
    "scenarios",
    multiple=True,
    metavar="NAME",
    help="extended-data, extended-classes, open-classes, new-architecture, new-loss or sequence; may be repeated or "
    "separated by commas.  [default: all]",
)
@click.option(
    "--method",
    "--methods",
    "methods",
    multiple=True,
    metavar="NAME",
    help="A compatible-training method or an upgrade strategy; may be repeated or separated by commas.  "
    "[default: all installed]",
)
@click.option("--seeds", type=click.IntRange(1, 1000), help="Number of repetitions.  [default: 5; with --quick 1]")
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="More [[method]] tables.")
@click.option("--quick", is_flag=True, help="Few epochs, one seed, two scenarios: shows that everything runs.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("benchmark-out"),
    show_default=True,
    help="Folder of the results. A run that was interrupted is continued there.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def upgrade(
    datasets: tuple[str, ...],
    scenarios: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: int | None,
    config: Path | None,
    quick: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Compare every way to upgrade a model under a live gallery.

    Trains an old model, a free new one and one compatible new one per installed method on the scenarios of the field,
    serves each in every way while the gallery is backfilled, and writes tables with intervals: quality at the start and
    at the end, the area under the curve, and negative flips. An objective of your own takes part if its settings have
    old_run; see docs/researchers.md. About 20 CPU seconds per scenario and seed of core:digits, on one core.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from bowerbird.benchmark.report import compared, standing_table
    from bowerbird.benchmark.run import run_benchmark

    columns = (
        BarColumn(30),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=1.0)
        result = run_benchmark(
            out,
            datasets=datasets or ("core:digits",),
            scenarios=_separated(scenarios),
            seeds=seeds,
            methods=_separated(methods),
            config=config,
            quick=quick,
            advance=lambda share, what: progress.update(task, completed=share, description=what),
        )
    for name, why in result["missing"].items():
        click.echo(f"left out: {name}: {why}", err=True)
    if as_json:
        click.echo(json.dumps(result["summary"], indent=1))
        return
    for dataset, found in result["summary"].items():
        click.echo(f"\n{dataset}, mean over {', '.join(compared(found))}; {len(result['seeds'])} seed(s)\n")
        click.echo("\n".join(_aligned(standing_table(found))))
    click.echo(f"\nAll tables: {(out / 'results.md').resolve()}\nLook at them: {(out / 'index.html').resolve()}")


def _separated(values: tuple[str, ...]) -> list[str] | None:
    """Names that were repeated or separated by commas; ``None`` where there are none."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()] or None


def _aligned(lines: list[str]) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
