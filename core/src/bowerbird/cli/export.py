"""``bowerbird export``."""

from __future__ import annotations

import json

import click

from bowerbird.cli import examples


@click.command(
    "export",
    epilog=examples(
        "bowerbird export runs/digits-softmax --to models/digits",
        "bowerbird export runs/digits-softmax --to models/digits-timm --format timm",
        "bowerbird export 'core:efficientnet-lite?model=lite0' --to models/lite0",
        "bowerbird export runs/digits-softmax --to models/digits --push-to-hub me/digits-encoder",
    ),
)
@click.argument("encoder")
@click.option("--to", "folder", type=click.Path(file_okay=False), required=True, help="Folder to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["bowerbird", "timm", "transformers"]),
    default="bowerbird",
    show_default=True,
    help="timm, transformers: a folder that those libraries load.",
)
@click.option("--push-to-hub", "repository", metavar="REPO", help="Also upload the folder to this hub repository.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(encoder: str, folder: str, kind: str, repository: str | None, as_json: bool) -> None:
    """Export ENCODER (a run, an exported folder, or a name with settings) to a folder.

    The folder holds the weights as safetensors, the settings, a model card and, where the run had one, the classifier
    that backward-compatible training of a later encoder uses.
    """
    from bowerbird.encoders.export import export_encoder, push_to_hub

    loaded = export_encoder(encoder, folder, kind=kind)
    url = push_to_hub(folder, repository) if repository else None
    if as_json:
        click.echo(json.dumps({"folder": folder, "fingerprint": loaded.fingerprint, "dim": loaded.dim, "hub": url}))
    else:
        click.echo(f"{folder}: {loaded.dim} numbers per vector, fingerprint {loaded.fingerprint[:12]}")
        if url:
            click.echo(f"uploaded to {url}")
