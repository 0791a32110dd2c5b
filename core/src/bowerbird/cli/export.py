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
        "bowerbird export runs/fashion-spartan --to models/fast --sparse auto",
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
@click.option(
    "--sparse",
    metavar="FORMAT",
    help="For weights with zeros (bowerbird-sparsity): auto, blocks, csr, bsr, rows, 2:4 or onnx. Every layer is timed "
    "and stays dense where that is faster.",
)
@click.option("--device", default="cpu", show_default=True, help="With --sparse: where it will serve. cpu, cuda.")
@click.option(
    "--batch-size",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="With --sparse: pictures that it gets at once when it serves.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    encoder: str,
    folder: str,
    kind: str,
    repository: str | None,
    sparse: str | None,
    device: str,
    batch_size: int,
    as_json: bool,
) -> None:
    """Export ENCODER (a run, an exported folder, or a name with settings) to a folder.

    The folder holds the weights as safetensors, the settings, a model card and, where the run had one, the classifier
    that backward-compatible training of a later encoder uses.

    With --sparse the zeros of the weights are neither stored nor, where that is faster, multiplied. The folder is used
    like any other and gives the same vectors: a gallery that the dense encoder filled is searched with it. `bowerbird
    report sparsity ENCODER` shows beforehand what is to be gained.
    """
    from bowerbird.encoders.export import export_encoder, push_to_hub

    if sparse is not None:
        _export_sparse(encoder, folder, kind, sparse, device, batch_size, repository, as_json)
        return
    for name in ("device", "batch_size"):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --sparse only")
    loaded = export_encoder(encoder, folder, kind=kind)
    url = push_to_hub(folder, repository) if repository else None
    if as_json:
        click.echo(json.dumps({"folder": folder, "fingerprint": loaded.fingerprint, "dim": loaded.dim, "hub": url}))
    else:
        click.echo(f"{folder}: {loaded.dim} numbers per vector, fingerprint {loaded.fingerprint[:12]}")
        if url:
            click.echo(f"uploaded to {url}")


def _export_sparse(
    encoder: str,
    folder: str,
    kind: str,
    sparse: str,
    device: str,
    batch_size: int,
    repository: str | None,
    as_json: bool,
) -> None:
    from bowerbird.encoders.export import push_to_hub
    from bowerbird.encoders.sparse import sparsity

    if kind != "bowerbird":
        raise click.UsageError(f"--sparse writes a folder of Bowerbird; leave out --format {kind}")
    if sparse == "onnx":
        made = sparsity("onnx_export", needed_by="--sparse").export_onnx_encoder(encoder, folder, batch_size=batch_size)
    else:
        made = sparsity("folders", needed_by="--sparse").export_sparse_encoder(
            encoder, folder, format=sparse, batch_size=batch_size, device=device
        )
    url = push_to_hub(folder, repository) if repository else None
    if as_json:
        click.echo(json.dumps({**made.to_dict(), "hub": url}))
        return
    for line in made.lines():
        click.echo(line)
    if url:
        click.echo(f"uploaded to {url}")
