"""``bowerbird upgrade lift``: an upgrade that maps stored vectors and reads no image."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from bowerbird.cli import examples
from bowerbird.cli.upgrade_parts import (
    encoder_of,
    executor_of,
    exit_if_failed,
    moving_bar,
    open_at,
    terminated_like_ctrl_c,
)

if TYPE_CHECKING:
    from bowerbird.gallery import Gallery


@click.command(
    epilog=examples(
        "bowerbird upgrade lift photos --to runs/new --label-key label      (fits the map on 2,000 items)",
        "bowerbird upgrade lift photos --transform forward.safetensors",
        "bowerbird upgrade lift photos --transform forward.safetensors --to runs/new",
        "bowerbird upgrade lift photos --transform forward.safetensors --old-pairs old.npy --new-pairs new.npy",
        "bowerbird upgrade lift photos --transform forward.safetensors --workers 4",
        "bowerbird upgrade lift photos      (goes on with the lift under way)",
    )
)
@click.argument("gallery", type=click.Path(file_okay=False))
@click.option("--transform", "transform_file", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="From the stored vectors' space to the new one; not needed once the lift is under way.")  # fmt: skip
@click.option("--to", metavar="ENCODER", help="The new encoder. Without --transform the map is fitted on items that it "
              "encodes; with it, it checks the direction. Default: the space that the file names.")  # fmt: skip
@click.option("--label-key", metavar="KEY", help="Metadata key with the label of an item, for the fit.")
@click.option("--pairs", "pair_count", type=click.IntRange(min=32), default=2000, show_default=True,
              help="Items that are encoded for the fit.")  # fmt: skip
@click.option("--accept-poor-transform", is_flag=True,
              help="Also a map that held-out pairs say is of no use, or that nothing shows to be of any.")  # fmt: skip
@click.option("--old-pairs", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Check the direction on these: .npy (N, D) of the old space.")  # fmt: skip
@click.option("--new-pairs", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="The same items in the new space: .npy (N, D).")  # fmt: skip
@click.option(
    "--strategy", default="rank-merge", show_default=True, help="How the part that is not lifted is searched."
)
@click.option("--on-top", is_flag=True, help="Begin on top of an upgrade that is under way.")
@click.option("--task-items", type=click.IntRange(min=1), help="Items per commit. [default: 65536, fewer for workers]")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that share it.")
@click.option("--stop-after", type=int, help="End once so many items are lifted.")
@click.option("--stop-at-share", type=float, help="End once this share of the gallery is lifted, 0 to 1.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images per call of --to."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def lift(gallery: str, transform_file: str | None, to: str | None, old_pairs: str | None, new_pairs: str | None,
         label_key: str | None, pair_count: int, accept_poor_transform: bool, strategy: str, on_top: bool,
         task_items: int | None, workers: int, stop_after: int | None, stop_at_share: float | None, batch_size: int,
         device: str, as_json: bool) -> None:  # fmt: skip
    """Map the stored vectors of GALLERY towards a new encoder; no image is read. Begins the lift if none is under way.

    New queries search what is lifted; what is not is served by the strategy. Resumable and exactly reversible like any
    upgrade: `bowerbird upgrade status`, `rollback` and `finish` work on it. Afterwards, where there are images,
    `bowerbird upgrade run --to ENCODER` replaces lifted vectors by real ones.
    """
    from bowerbird.gallery.transform import VectorTransform
    from bowerbird.upgrade.fitting import fit_transform
    from bowerbird.upgrade.lift import (
        TASK_ITEMS,
        WORKER_LOADER,
        begin_lift,
        lifter,
        refuse_lift_amid,
        refuse_second_lift,
        refuse_without_images,
    )
    from bowerbird.upgrade.run import Limits
    from bowerbird.upgrade.run import run as work
    from bowerbird.upgrade.start import check_store

    Limits(stop_after, None, stop_at_share)  # refused here, before a map is fitted and the lift begun
    with open_at(gallery) as opened, terminated_like_ctrl_c():
        if workers > 1:
            check_store(opened, also=("many-workers",))
        pairs = _pairs(old_pairs, new_pairs)
        if _begins(opened, transform_file, to, on_top):
            new = None if to is None else encoder_of(to, batch_size, device)
            if transform_file is not None:
                transform = VectorTransform.load(transform_file)
            else:
                assert new is not None
                refuse_lift_amid(opened, on_top)
                refuse_without_images(opened, new)
                refuse_second_lift(opened, new.space)  # before a sample is encoded
                transform = fit_transform(opened, new, "lift", label_key=label_key, pairs=pair_count)
            # Several tasks for each worker, so that they end together.
            each = TASK_ITEMS if workers == 1 else min(TASK_ITEMS, max(1024, -(-len(opened) // (4 * workers))))
            begin_lift(
                opened, transform, new, strategy=strategy, pairs=pairs, task_items=task_items or each, on_top=on_top,
                accept_poor=accept_poor_transform,
            )  # fmt: skip
        limits: dict[str, Any] = {"stop_after": stop_after, "stop_at_share": stop_at_share}
        with moving_bar(show_it=sys.stderr.isatty() and not as_json) as progress:
            executor = executor_of("local", workers)
            encoder = lifter(opened)  # refused here where what is under way is no lift
            if executor is None:
                report = work(opened, encoder, progress=progress, **limits)
            else:
                from bowerbird.upgrade.engines import make_job, run_workers

                state = opened.snapshot().upgrade
                assert state is not None
                job = make_job(opened, gallery, state, WORKER_LOADER, {}, **limits)
                report = run_workers(opened, lambda: job, executor, progress=progress)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        exit_if_failed(report)
        return
    click.echo(
        f"{report.reason}: lifted {report.encoded} items in {report.seconds:.1f} s ({report.rate:.0f} items/s); "
        f"{report.share:.1%} of the gallery is lifted"
    )
    for share in report.workers:
        if share.error is not None:
            click.echo(f"worker {share.index} failed: {share.error}", err=True)
    exit_if_failed(report)
    if report.reason == "complete":
        click.echo(
            f"next: bowerbird upgrade finish {shlex.quote(str(opened.path))}, or "
            f"bowerbird upgrade run {shlex.quote(str(opened.path))} --to ENCODER --on-top"
        )


def _begins(gallery: Gallery, transform_file: str | None, to: str | None, on_top: bool) -> bool:
    """Whether this call begins a lift; ``False``: it goes on with the one under way."""
    from bowerbird.errors import InputError

    lifting = gallery.store.upgrade_state() is not None and gallery.snapshot().write_space.lifted
    if transform_file is None and to is None and not lifting:
        raise InputError(
            f"no lift is under way in {gallery.path}: to begin one give the map, --transform FILE, or where items have "
            "images the new encoder, --to ENCODER, for which it is fitted"
        )
    return not lifting or (on_top and (transform_file is not None or to is not None))


def _pairs(old: str | None, new: str | None) -> tuple[Any, Any] | None:
    import numpy as np

    from bowerbird.errors import DataError, InputError

    if (old is None) != (new is None):
        raise InputError("--old-pairs and --new-pairs go together: the same items in both spaces")
    if old is None or new is None:
        return None
    rows = []
    for file in (old, new):
        try:
            rows.append(np.load(file, allow_pickle=False))
        except (OSError, ValueError) as exc:
            raise DataError(f"{file} cannot be read as an .npy array: {exc}") from exc
    return rows[0], rows[1]
