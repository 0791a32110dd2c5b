"""Keep one data set of a network that was trained on several:

    python -m bowerbird_domain.export_single runs/cdcl cityscapes encoders/cityscapes

writes an encoder's folder with plain batch normalisation and the classes of that data set only: the size and cost of a
network that was trained on it alone.
"""

from __future__ import annotations

from pathlib import Path

import click

from bowerbird.encoders import load_encoder
from bowerbird.encoders.bundle import save_encoder
from bowerbird.errors import BowerbirdError, InputError
from bowerbird_domain.segmentation import SegmentationEncoder


def export_dataset(ref: str | Path, dataset: str, out: str | Path) -> str:
    """Write the folder ``out`` and return the fingerprint of the encoder in it.

    Args:
        ref: A run, or an exported encoder.
        dataset: Name of the data set to keep.
        out: The folder to write.

    Raises:
        InputError: The encoder is no segmentation network, or ``out`` is something else than an encoder's folder.
        UnknownNameError: It was not trained on ``dataset``.
    """
    loaded = load_encoder(ref, device="cpu")
    if not isinstance(loaded.module, SegmentationEncoder):
        raise InputError(f"{str(ref)!r} holds a {type(loaded.module).__name__}, no segmentation network")
    return save_encoder(
        loaded.module.single(dataset),
        out,
        use=loaded.spec.use,
        config=loaded.spec.config,
        classes=[name for name in loaded.spec.classes if name.startswith(f"{dataset}/")],
        card=f"The part of {str(ref)!r} for the data set **{dataset}**.",
    )


@click.command(help="Keep one data set of a network that was trained on several.")
@click.argument("run")
@click.argument("dataset")
@click.argument("out", type=click.Path(path_type=Path))
def main(run: str, dataset: str, out: Path) -> None:
    try:
        fingerprint = export_dataset(run, dataset, out)
    except BowerbirdError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: {fingerprint[:12]}")


if __name__ == "__main__":
    main()
