"""``bowerbird train``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bowerbird.cli import examples


@click.command(
    "train",
    epilog=examples(
        "bowerbird train recipes/digits-softmax.toml",
        "bowerbird train recipes/digits-softmax.toml --set train.epochs=2 --set train.seed=1 --out runs/seed-1",
        "bowerbird train recipes/digits-softmax.toml --resume auto",
        "bowerbird train recipes/digits-softmax.toml --dry-run",
        "torchrun --nproc-per-node 2 -m bowerbird train recipes/digits-softmax.toml",
        "bowerbird train --schema > recipe.schema.json",
    ),
)
@click.argument("recipe", type=click.Path(dir_okay=False), required=False)
@click.option("--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Change one value of the recipe (TOML).")
@click.option("--out", type=click.Path(file_okay=False), help="Folder of the run. Default: runs/NAME.")
@click.option(
    "--resume",
    type=click.Choice(["never", "auto"]),
    default="never",
    show_default=True,
    help="auto: continue from the last checkpoint in the folder, or start.",
)
@click.option("--dry-run", is_flag=True, help="Check the recipe, print it resolved, and stop.")
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes, for editors, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    recipe: str | None,
    overrides: tuple[str, ...],
    out: str | None,
    resume: str,
    dry_run: bool,
    schema: bool,
    as_json: bool,
) -> None:
    """Train an encoder by RECIPE, a TOML file.

    The run's folder receives the resolved recipe, versions and seeds, metrics.jsonl, the last checkpoint, the exported
    encoder and the results of the recipe's evaluators. Ctrl-C writes a checkpoint and stops.
    """
    from bowerbird.recipe import load_recipe, recipe_schema

    if schema:
        click.echo(json.dumps(recipe_schema(), indent=2))
        return
    if recipe is None:
        raise click.UsageError("RECIPE is missing, for example: bowerbird train recipes/digits-softmax.toml")
    resolved = load_recipe(recipe, overrides)
    if dry_run:
        click.echo(json.dumps(resolved.to_dict(), indent=2) if as_json else resolved.to_toml(), nl=as_json)
        return

    import os
    import sys

    from bowerbird.train.loop import train

    run_dir = Path(out) if out else Path("runs") / resolved.name
    result = train(resolved, run_dir, resume=resume == "auto", show=sys.stderr.isatty() and not as_json)
    if os.environ.get("RANK", "0") == "0":  # torchrun's; its group of processes has ended with the training
        if as_json:
            click.echo(
                json.dumps(
                    {
                        "run": str(result.run_dir),
                        "steps": result.steps,
                        "finished": result.finished,
                        "metrics": dict(result.metrics),
                        "skipped": result.skipped,
                    }
                )
            )
        elif result.finished:
            click.echo(f"{result.run_dir}: {result.steps} steps; the encoder is in {result.run_dir / 'encoder'}")
            if result.skipped:
                click.echo(f"  items that could not be read were left out {result.skipped} times")
            for name, value in result.metrics.items():
                click.echo(f"  {name:<40} {value:.4f}")
    if not result.finished:
        click.echo(
            f"stopped after step {result.steps}; continue with: bowerbird train {recipe} --out {run_dir} --resume auto",
            err=True,
        )
        ctx.exit(130)
