"""``bowerbird demo``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import click
from click.core import ParameterSource

from bowerbird.cli import examples


@click.command(
    "demo",
    epilog=examples(
        "bowerbird demo",
        "bowerbird demo --serve                 (the upgrade live, on a page)",
        "bowerbird demo --out /tmp/demo --seed 3",
        "bowerbird demo --json | jq .curves",
    ),
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Folder for the page, the galleries and the encoders; an earlier demo there is replaced, with --serve its "
    "encoders are used again.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the training runs.")
@click.option("--steps", type=click.IntRange(2, 50), default=10, show_default=True, help="Measurements up to 100 %.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@click.option("--serve", is_flag=True, help="Show the upgrade live instead: on the page of a service, until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="Of --serve; 0: one that is free.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=1), default=120, show_default=True,
              help="For which the upgrade of --serve should last.")  # fmt: skip
@click.pass_context
def command(ctx: click.Context, out: Path, seed: int, steps: int, as_json: bool, serve: bool, port: int,
            seconds: float) -> None:  # fmt: skip
    """Move a live gallery of real pictures to a better model, and draw what happens.

    Trains an old encoder, a better one and one that is compatible with the old (BCT) on emoji pictures, then upgrades a
    gallery of concepts that none of them has seen, in four ways: switching at once, rank merge by
    plain distances and on one scale, compatible. Writes one
    self-contained page, index.html. About a minute and a half on 2 cores; needs no network.

    With --serve nothing is compared: an old and a new encoder are trained, the gallery is served on this machine, and
    the service plans and begins its upgrade. Watch it, search meanwhile, pause it, take it back. About a minute until
    the page is there, a few seconds when the encoders are trained already.
    """
    other = ("steps", "as_json") if serve else ("port", "seconds")
    for name in other:
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + name.removeprefix("as_")
            raise click.UsageError(f"{option} has no meaning {'with' if serve else 'without'} --serve")
    if serve:
        from bowerbird.demo.live import serve_demo

        serve_demo(
            out,
            port=port,
            seconds=seconds,
            seed=seed,
            open_page=click.launch if _has_browser() else None,
            say=click.echo,
            show=sys.stderr.isatty(),
        )
        return
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


def _has_browser() -> bool:
    """Whether a page can be opened beside the terminal; a text browser inside it would hide what is said."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
