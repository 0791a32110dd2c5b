"""``bowerbird report``."""

from __future__ import annotations

import json

import click

from bowerbird.cli import examples


@click.group("report", epilog=examples("bowerbird report sparsity runs/fashion-spartan"))
def command() -> None:
    """Look into a trained encoder."""


@command.command(
    "sparsity",
    epilog=examples(
        "bowerbird report sparsity runs/fashion-spartan",
        "bowerbird report sparsity runs/fashion-spartan --out sparsity       # with a picture of the kept weights",
        "bowerbird report sparsity models/fast --batch-size 1 --json",
        "bowerbird export runs/fashion-spartan --to models/fast --sparse auto",
    ),
)
@click.argument("encoder")
@click.option("--out", type=click.Path(file_okay=False), help="Folder for sparsity.txt, .json and .svg.")
@click.option(
    "--batch-size", type=click.IntRange(1, 4096), default=32, show_default=True, help="Pictures at once, for the times."
)
@click.option("--device", default="cpu", show_default=True, help="Where times are measured: cpu, cuda.")
@click.option("--no-times", is_flag=True, help="Do not measure: only what is kept, and bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def sparsity_command(
    encoder: str, out: str | None, batch_size: int, device: str, no_times: bool, as_json: bool
) -> None:
    """What is kept of the weights of ENCODER (a run, an exported folder, a name with settings), and what that saves.

    A table of its layers: how many weights are kept, and whether the zeros lie in blocks, rows or singly. Bytes on
    disk, dense and compressed. And times, dense against the fastest sparse form of every layer, measured here: zeros
    alone make nothing faster, and the table says where they do not.
    """
    from bowerbird.encoders.sparse import sparsity

    reports = sparsity("report", needed_by="report sparsity")
    report, masks = reports.sparsity_report(encoder, batch_size=batch_size, device=device, measure=not no_times)
    if out is not None:
        reports.write_report(report, masks, out)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if out is not None and not as_json:
        click.echo(f"\nwritten to {out}: sparsity.txt, sparsity.json, sparsity.svg")
