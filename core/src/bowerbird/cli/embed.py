"""``bowerbird embed``."""

from __future__ import annotations

import json
from typing import Any

import click

from bowerbird.cli import examples
from bowerbird.cli.parts import progress_bar


@click.command(
    "embed",
    epilog=examples(
        "bowerbird embed runs/digits-softmax photos/ --out vectors.npy",
        "bowerbird embed 'core:efficientnet-lite?model=lite0' photos/ --out vectors.parquet --skip-errors",
        "bowerbird embed runs/digits-softmax core:digits --split test --out digits.safetensors --json",
        "bowerbird embed runs/new emoji:styles --split unseen-query --set size=48 --out queries.npy",
    ),
)
@click.argument("encoder")
@click.argument("source")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="File: .npy, .safetensors or .parquet.")
@click.option("--split", help="Split of a data set.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of the data set (TOML).")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures, frames or texts at once."
)
@click.option("--skip-errors", is_flag=True, help="Leave out images and videos that cannot be read, and list them.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    encoder: str,
    source: str,
    out: str,
    split: str | None,
    overrides: tuple[str, ...],
    batch_size: int,
    skip_errors: bool,
    device: str,
    as_json: bool,
) -> None:
    """Turn the images (or videos) of SOURCE, a folder or a data set by name, into unit vectors by ENCODER.

    ENCODER is a run, an exported folder, or a name with settings. An interrupted call continues when it is repeated.
    """
    from pathlib import Path

    from bowerbird.data.images import images_in
    from bowerbird.data.videos import videos_in
    from bowerbird.embed import embed_to_file
    from bowerbird.encoders import load_encoder
    from bowerbird.errors import InputError

    ids: Any
    items: Any
    if Path(source).is_dir():
        if split is not None or overrides:
            raise InputError(f"--split and --set are for data sets; {source!r} is a folder")
        loaded = load_encoder(encoder, device=device)
        ids, items = (images_in if loaded.frames is None else videos_in)(source)
    else:
        ids, items = _dataset_items(source, split, overrides)
        loaded = load_encoder(encoder, device=device)
    with progress_bar("embedding", len(ids), "images" if loaded.frames is None else "videos", as_json) as advance:
        result = embed_to_file(
            loaded, ids, items, out, batch_size=batch_size, skip_errors=skip_errors, progress=advance
        )
    if as_json:
        found = {"file": out, "count": result.count, "dim": loaded.dim, "fingerprint": loaded.fingerprint,
                 "resumed_at": result.resumed_at, "skipped": result.skipped}  # fmt: skip
        click.echo(json.dumps(found))
        return
    click.echo(f"{out}: {result.count} vectors of {loaded.dim} numbers, fingerprint {loaded.fingerprint[:12]}")
    for reason in result.skipped.values():
        click.echo(f"skipped: {reason}", err=True)


def _dataset_items(name: str, split: str | None, overrides: tuple[str, ...]) -> Any:
    from bowerbird.data import images_of
    from bowerbird.errors import InputError
    from bowerbird.recipe import apply_override, build_config
    from bowerbird.registry import get_registry

    if ":" not in name:
        raise InputError(f"source {name!r}: there is no such folder; expected one, or a data set such as core:digits")
    registry = get_registry()
    record = registry.get("dataset", name)
    settings: dict[str, Any] = {}
    for override in overrides:
        apply_override(settings, override)
    config = build_config(record, settings, where=f"dataset {record.name!r}")
    dataset = registry.load(record).build(config, split)
    return list(dataset.item_ids), images_of(dataset)
