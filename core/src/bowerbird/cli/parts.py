"""What several commands share: which images are meant, and a bar that shows how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bowerbird.errors import InputError

SAME_VECTOR = 0.999  # cosine of two vectors of one item by one encoder, at least; as the canary has it


def images_from(
    images: Sequence[str], folder: str | None, dataset: str | None, split: str | None, *, videos: bool = False
) -> tuple[list[str], Sequence[Any], list[dict[str, Any]] | None]:
    """Ids, what the encoder opens, and the metadata that the source itself has: one of the three sources is given.

    With ``videos`` these of a folder are meant, too.
    """
    if images:
        for image in images:
            if Path(image).is_dir():
                raise InputError(f"{image!r} is a folder, not an image; for every image below it: --folder {image}")
        return [Path(image).as_posix() for image in images], list(images), None
    if folder is not None:
        from bowerbird.data.images import images_in
        from bowerbird.data.videos import videos_in

        ids, paths = (videos_in if videos else images_in)(folder)
        # In subfolders the first one is the label, as in `core:image-folder`.
        labels = [{"label": name.split("/", 1)[0]} if "/" in name else {} for name in ids]
        return ids, paths, labels
    from bowerbird.data.uris import item_uris, open_dataset

    assert dataset is not None
    built, address = open_dataset(dataset, split)
    known = built.metadata()
    return list(built.item_ids), item_uris(address, built.item_ids), None if known is None else list(map(dict, known))


def class_names(ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """A callback: names given one by one or with commas between them."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def times_of(item: Any) -> dict[str, Any]:
    """``start`` and ``end`` in seconds of the item of a gallery that is a video or a clip; of others nothing."""
    if item is None or not item.uri or not {"start", "end"} <= set(item.metadata):
        return {}
    return {key: item.metadata[key] for key in ("start", "end")}


def shown_times(hit: Mapping[str, Any]) -> str:
    """From where to where a result reaches, behind its id; empty where it has no times."""
    return f"  {hit['start']:g}-{hit['end']:g} s" if "start" in hit else ""


@contextmanager
def progress_bar(what: str, total: int, unit: str, quiet: bool) -> Iterator[Callable[[float], None] | None]:
    """A bar with rate and time left on standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.0f} {unit}/s" if task.speed else "")

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
