"""``bowerbird evaluate``."""

from __future__ import annotations

import json
from typing import Any

import click

from bowerbird.cli import examples


@click.command(
    "evaluate",
    epilog=examples(
        "bowerbird evaluate runs/digits-softmax --evaluator core:knn --dataset core:digits",
        "bowerbird evaluate runs/new/encoder --evaluator core:retrieval --dataset emoji:styles --json",
        "bowerbird evaluate 'core:efficientnet-lite?model=lite0' --evaluator core:retrieval --dataset emoji:styles",
        "bowerbird evaluate runs/digits-softmax        # the evaluators of the run's own recipe",
    ),
)
@click.argument("encoder")
@click.option("--evaluator", help="Name of the evaluator. Default: those of the run's recipe.")
@click.option("--dataset", help="Data set to evaluate on; the same as --set dataset=NAME.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of the evaluator (TOML).")
@click.option("--out", type=click.Path(file_okay=False), help="Folder for metrics.json and per-query values.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def command(
    encoder: str,
    evaluator: str | None,
    dataset: str | None,
    overrides: tuple[str, ...],
    out: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate ENCODER: a run, an exported folder, or a name with settings such as 'core:timm?model=resnet18'."""
    from pathlib import Path

    from bowerbird.errors import InputError
    from bowerbird.evaluate import evaluate
    from bowerbird.recipe import EvaluateComponent, apply_override, load_recipe

    settings: dict[str, Any] = {} if dataset is None else {"dataset": dataset}
    for override in overrides:
        apply_override(settings, override)
    if evaluator is not None:
        components: tuple[EvaluateComponent, ...] = (EvaluateComponent(use=evaluator, settings=settings),)
    else:
        file = Path(encoder) / "recipe.json"
        if settings or not file.is_file() or not (components := load_recipe(file).evaluate):
            raise InputError(
                "which evaluator? Name one, for example --evaluator core:retrieval; `bowerbird list evaluator` shows "
                "all (without --evaluator, ENCODER must be a run whose recipe has [[evaluate]] tables)"
            )
    metrics = evaluate(encoder, components, device=device, out=out)
    if as_json:
        click.echo(json.dumps(metrics, indent=2))
    else:
        for name, value in metrics.items():
            click.echo(f"{name:<48} {value:.4f}")
