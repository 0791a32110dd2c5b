"""``bowerbird gallery matrix``: which spaces of a gallery are comparable, by which route, and how well."""

from __future__ import annotations

import json

import click

from bowerbird.cli import examples


@click.command(
    epilog=examples(
        "bowerbird gallery matrix photos",
        "bowerbird gallery matrix photos --label-key label --out matrix.svg",
        "bowerbird gallery matrix photos --label-key label --json",
    )
)
@click.argument("path", type=click.Path(file_okay=False))
@click.option("--label-key", metavar="KEY", help="Metadata key with the label of an item; R@1 is measured with it.")
@click.option("--queries", type=click.IntRange(min=10), default=200, show_default=True, help="Items used as queries.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), help="Also draw it: a file .svg or .png (extra [report]).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def matrix(path: str, label_key: str | None, queries: int, seed: int, out: str | None, as_json: bool) -> None:
    """Spaces x spaces: queries of the row's space on stored vectors of the column's.

    A pair is comparable inside one space, or along registered transforms and compatible relations. Numbers are measured
    on items that have vectors in both spaces, as during an upgrade: with --label-key R@1, without it how often an item
    finds itself.
    """
    from bowerbird.gallery import open_gallery
    from bowerbird.upgrade.matrix import cell_text
    from bowerbird.upgrade.matrix import matrix as make_matrix

    with open_gallery(path, readonly=True) as gallery:
        made = make_matrix(gallery, label_key=label_key, queries=queries, seed=seed)
    if out is not None:
        made.save(out)
    if as_json:
        click.echo(json.dumps(made.to_dict()))
        return
    from rich.table import Table

    from bowerbird.upgrade.tables import show

    names = made.names()
    table = Table(show_lines=True)
    table.add_column("queries of \\ vectors of")
    for name, space in zip(names, made.spaces, strict=True):
        table.add_column(f"{name}\n{space['dim']}-d, {space['items']} items", justify="center")
    for name, space in zip(names, made.spaces, strict=True):
        cells = [made.cell(space["fingerprint"], other["fingerprint"]) for other in made.spaces]
        table.add_row(name, *(cell_text(cell) for cell in cells))
    show(table)
    if out is not None:
        click.echo(f"drawn: {out}")
