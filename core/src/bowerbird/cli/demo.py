"""``bowerbird demo``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bowerbird.cli import examples


@click.command(
    "demo",
    epilog=examples("bowerbird demo", "bowerbird demo --out /tmp/demo --seed 3", "bowerbird demo --json | jq .curves"),
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder for the page, the galleries and the encoders; an earlier demo there is replaced.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the training runs.")
@click.option("--steps", type=click.IntRange(2, 50), default=10, show_default=True, help="Measurements up to 100 %.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def command(out: Path, seed: int, steps: int, as_json: bool) -> None:
    """Move a live gallery of real pictures to a better model, and draw what happens.

    Trains an old encoder, a better one and one that is compatible with the old (BCT) on emoji pictures, then upgrades a
    gallery of concepts that none of them has seen, in four ways: switching at once, rank merge by
    plain distances and on one scale, compatible. Writes one
    self-contained page, index.html. About a minute and a half on 2 cores; needs no network.
    """
    from bowerbird.demo.run import run_demo

    result = run_demo(out, seed=seed, steps=steps, say=lambda line: click.echo(line, err=as_json), show=not as_json)
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    levels, curves, queries = result["levels"], result["curves"], result["gallery"]["queries"]
    depth = result["gallery"]["depth"]
    click.echo(f"\n{'':26}{'mAP@' + str(depth) + ' at 0 %':>16}{'at 100 %':>12}{'area':>9}{'most flips':>13}")
    for name, key in (
        ("switch at once", "switch"),
        ("rank merge", "rank_merge"),
        ("rank merge, one scale", "zscore"),
        ("compatible (BCT)", "compatible"),
    ):
        curve = curves[key]
        click.echo(
            f"{name:26}{curve['map'][0]:16.3f}{curve['map'][-1]:12.3f}{curve['area']:9.3f}{max(curve['nfr']):12.1%}"
        )
    click.echo(
        f"old model {levels['old_old']['map']:.3f}, new model {levels['new_new']['map']:.3f}. Rank merge: "
        f"{result['changed_at_start']} of {queries} result lists changed at the start, "
        f"{result['different_at_end']} differ at the end from a gallery built with the new model.\n\n"
        f"Look at it: {(out / 'index.html').resolve()}"
    )
