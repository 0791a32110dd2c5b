"""What the commands of ``bowerbird upgrade`` share: encoders and queries by name, saved plans, workers, output."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from bowerbird.cli.parts import SAME_VECTOR, shown_times, times_of

if TYPE_CHECKING:
    from bowerbird.gallery import Gallery, Space
    from bowerbird.upgrade import ItemEncoder, QuerySet, RunReport, UpgradeStatus
    from bowerbird.upgrade.engines import Executor
    from bowerbird.upgrade.saved_plan import SavedPlan
    from bowerbird.upgrade.vectors_encoder import VectorTable
    from bowerbird.upgrade.worker import Job


def open_at(path: str, *, readonly: bool = False) -> Gallery:
    from bowerbird.gallery import open_gallery

    return open_gallery(path, readonly=readonly)


def load(ref: str, device: str) -> Any:
    from bowerbird.errors import MissingExtraError

    try:
        from bowerbird.encoders import load_encoder
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"encoder {ref!r} needs {exc.name}, which is not installed: pip install 'bowerbird-core[torch]'"
        ) from exc
    return load_encoder(ref, device=device)


KNOWN_QUERIES = 64  # queries that are looked up among the items, to see of which space they are
GAIN_STEP = 0.05  # of the gallery, after which the gain is measured again


def gain_is_there(gallery: Gallery, saved: SavedPlan, asked: float, share: float) -> bool:
    """Whether the watched queries show what the plan forecast for this share; without any, the forecast counts."""
    from bowerbird.upgrade.saved_plan import measured_gain

    gain = measured_gain(gallery, saved)
    if gain is None:
        click.echo("the gain is not measured: no labelled queries are watched", err=True)
        return True
    click.echo(f"at {share:.1%} of the gallery {gain:.0%} of the gain are measured", err=True)
    return gain >= asked


def together(first: RunReport, then: RunReport) -> RunReport:
    """Two calls of ``run`` as one."""
    from dataclasses import replace

    sums = {name: getattr(first, name) + getattr(then, name) for name in ("encoded", "failed", "seconds", "watched")}
    return replace(then, **sums)


WORKER_LOADER = "bowerbird.cli.upgrade_parts:load_in_worker"


def load_in_worker(settings: dict[str, Any], gallery: Gallery, space: Space, index: int) -> ItemEncoder:
    """The encoder of a worker process: that of the command which started it."""
    return encoder_of(settings["ref"], settings["batch_size"], settings["device"], space)


def executor_of(engine: str, workers: int | None) -> Executor | None:
    """``None`` where this process does the work alone."""
    if engine in ("local", "core:local") and workers in (None, 1):
        return None
    from bowerbird.upgrade.engines import load_executor

    return load_executor(engine)(workers)


def work_silently(gallery: Gallery, executor: Executor) -> None:
    """A process that a launcher started beside the one that speaks: it works, and leaves the talking to that one."""
    from bowerbird.upgrade.engines import run_workers

    def begin() -> Job:
        raise AssertionError("only the process that speaks begins")

    run_workers(gallery, begin, executor)
    click.get_current_context().exit(0)


def exit_if_failed(report: RunReport) -> None:
    if report.reason == "failed":
        codes = [share.exit_code for share in report.workers if share.exit_code]
        click.get_current_context().exit(75 if set(codes) == {75} else codes[0])


@contextmanager
def terminated_like_ctrl_c() -> Iterator[None]:
    """SIGTERM (a container that stops, torchrun) gives the task in hand back, as Ctrl-C does."""
    import signal
    import threading

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def encoder_of(ref: str, batch_size: int, device: str, space: Space | None = None) -> ItemEncoder:
    from bowerbird.errors import DataError, InputError
    from bowerbird.upgrade import ItemEncoder
    from bowerbird.upgrade.vectors_encoder import is_vectors_ref, load_vectors_encoder

    try:
        if is_vectors_ref(ref):
            return load_vectors_encoder(ref, space=space, batch_size=batch_size)
        return ItemEncoder(load(ref, device), space=space, batch_size=batch_size)
    except (DataError, InputError) as exc:
        if space is None or ref != space.encoder:
            raise
        # Nobody typed this name just now: a path in it is that of the folder in which the upgrade was begun.
        raise type(exc)(
            f"{exc}. This is what the gallery calls the encoder of space {space.fingerprint[:12]}; where it is "
            "elsewhere now, say so (--to ENCODER, or --old for the old one)"
        ) from exc


def latest_plan(gallery: Gallery) -> tuple[str, ...]:
    """Where a plan is kept unless another place is named: in the gallery's folder, where it has one."""
    from pathlib import Path

    return (str(gallery.path / "plan" / "latest.json"),) if isinstance(gallery.path, Path) else ()


def refuse_out(path: str) -> None:
    """That a plan can be saved there, which is better known before a sample is encoded than afterwards."""
    import os
    from pathlib import Path

    from bowerbird.errors import InputError

    file = Path(path)
    if file.suffix.lower() not in (".json", ".html", ".svg"):
        raise InputError(f"--out {path}: a plan is saved as .json, .html or .svg")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"--out {path}: {file.parent} is no folder that can be written to")


def saved_plan(path: str | None, new: Space) -> SavedPlan:
    from bowerbird.errors import InputError, UpgradeError
    from bowerbird.upgrade.saved_plan import load_plan

    if path is None:
        raise InputError("this gallery has no folder with its last plan; name one, --plan plan.json")
    saved = load_plan(path)
    if saved.new != new.fingerprint:
        raise UpgradeError(f"the plan {path} was made for another encoder (space {saved.new[:12]}), not for {new}")
    return saved


def planned_merger(gallery: Gallery, new: Space, strategy: str) -> str | None:
    """What the last plan recommends for this strategy, where there is one for this pair of encoders."""
    from pathlib import Path

    from bowerbird.errors import BowerbirdError
    from bowerbird.upgrade.saved_plan import load_plan
    from bowerbird.upgrade.strategies import load_strategy

    files = [Path(name) for name in latest_plan(gallery)]
    if not files or not files[0].is_file():
        return None
    try:
        saved = load_plan(files[0])
    except BowerbirdError:
        return None  # it recommends no upgrade, or cannot be read: then it says nothing of mergers
    pair = (gallery.snapshot().write_space.fingerprint, new.fingerprint)
    same = (saved.old, saved.new) == pair and saved.strategy == load_strategy(strategy)[0]
    return saved.merger if same else None


def old_encoder_of(
    gallery: Gallery, ref: str | None, batch_size: int, device: str, *, required: bool
) -> ItemEncoder | None:
    """The encoder of the space that is written now. Where it is not named and not needed, its absence is only said."""
    from bowerbird.errors import BowerbirdError, InputError, SpaceError

    snapshot = gallery.snapshot()
    space = snapshot.write_space
    if space.lifted and ref is None:
        return None  # its vectors come from a transform; no encoder makes them
    if space.encoder.startswith("black-box:") and ref is None:
        if required:
            raise InputError(
                f"queries that are images need the old encoder, and {space.encoder} is known by its vectors alone; "
                "give the queries as vectors, --queries vectors:OLD_FILE,NEW_FILE"
            )
        click.echo(
            f"note: {space.encoder} is known by its vectors alone, so nothing is compared with the stored ones "
            "(--old vectors:FILE would be)",
            err=True,
        )
        return None
    try:
        return encoder_of(ref or space.encoder, batch_size, device, space)
    except BowerbirdError as exc:
        if ref is not None or required or isinstance(exc, SpaceError):
            raise
        click.echo(f"note: the old encoder is not checked, because it cannot be loaded: {exc}", err=True)
        return None


def what_to_ask(
    gallery: Gallery, images: tuple[str, ...], texts: tuple[str, ...], queries: str | None
) -> Callable[[], tuple[tuple[str, ...], dict[str, Any]]]:
    """``(names of the queries, arguments of a search)``, by the spaces of the gallery at that moment."""
    if texts:
        return lambda: (texts, {"texts": list(texts)})
    if queries is None:
        return lambda: (images, {"images": list(images)})
    from bowerbird.errors import InputError
    from bowerbird.upgrade.vectors_encoder import query_tables

    tables = query_tables(queries)

    def ask() -> tuple[tuple[str, ...], dict[str, Any]]:
        snapshot = gallery.snapshot()
        # A lifted part is searched by queries of the encoder that it was lifted to, which may be in the stack itself.
        compatible = {r.old for r in snapshot.relations if r.kind == "compatible" and r.new in snapshot.stack}
        reached = {name for name in compatible if snapshot.spaces[name].lifted}
        spaces, given = [name for name in snapshot.stack if name not in reached], tables
        if len(tables) == 1:
            spaces = spaces[-1:]  # of the newest space: enough where the strategy encodes a query once
        elif snapshot.upgrade is None:
            ended = gallery.store.history()
            given = tables[-1:] if ended and ended[-1]["state"] == "finished" else tables[:1]
        elif len(tables) != len(spaces):
            listed = ", ".join(snapshot.spaces[name].encoder for name in spaces)
            raise InputError(
                f"{queries!r} names {len(tables)} files, and {gallery.path} has vectors of {len(spaces)} encoders, the "
                f"oldest first: {listed}. Give one file of each, or that of the newest alone"
            )
        asked = dict(zip(spaces, given, strict=True))
        refuse_other_order(gallery, asked)
        return tuple(tables[0].ids), {"vectors": {name: table.vectors for name, table in asked.items()}}

    return ask


def refuse_other_order(gallery: Gallery, queries: Mapping[str, VectorTable]) -> None:
    """``SpaceError`` where a file of queries is not of the space (fingerprint) for which its place in the list stands.

    Widths tell, and queries that are items of the gallery: their stored vectors are known.
    """
    import numpy as np

    from bowerbird.errors import SpaceError
    from bowerbird.gallery.vectors import unit_vectors

    snapshot = gallery.snapshot()
    turned = ". The file of the oldest encoder comes first: vectors:OLD_FILE,NEW_FILE" if len(queries) > 1 else ""
    for name, table in queries.items():
        space, width = snapshot.spaces[name], table.vectors.shape[1]
        if width != space.dim:
            raise SpaceError(
                f"{table.source} has vectors of width {width}, and queries of space {space} have width {space.dim}"
                f"{turned}"
            )
        items = gallery.get_many(table.ids[:KNOWN_QUERIES])
        at = {item.num: row for row, item in enumerate(items) if item is not None and item.num < snapshot.num_limit}
        known = np.array(sorted(at), np.int64)
        alike = {}
        for part in snapshot.parts:
            nums = known[part.contains(known)] if part.space.dim == width else known[:0]
            if len(nums):
                rows = unit_vectors(table.vectors[[at[num] for num in nums.tolist()]], width)
                alike[part.space.fingerprint] = float(np.median((rows * part.vectors_of(nums)).sum(axis=1)))
        other = max(alike, key=lambda one: alike[one], default=name)
        if alike.get(name, 0.0) < alike.get(other, 0.0) and alike[other] > SAME_VECTOR:
            raise SpaceError(
                f"{table.source} has vectors of space {snapshot.spaces[other]}, as those stored of these items show, "
                f"and queries of space {space} are expected in its place{turned}"
            )


def as_images(queries: str | None) -> bool:
    """Whether both encoders must encode the queries."""
    return queries is not None and not queries.startswith("vectors:")


def queries_of(source: str | None, split: str | None) -> QuerySet | None:
    if source is None:
        return None
    from pathlib import Path

    from bowerbird.data import images_of
    from bowerbird.data.uris import open_dataset
    from bowerbird.errors import InputError
    from bowerbird.upgrade import QuerySet

    if source.startswith("vectors:"):
        from bowerbird.upgrade.vectors_encoder import query_vectors

        old, new = query_vectors(source)
        labels = old.labels if old.labels is not None else new.labels
        return QuerySet(labels, old=old.vectors, new=new.vectors)
    is_folder = Path(source).is_dir()
    if not is_folder and ":" not in source:
        raise InputError(
            f"queries {source!r}: there is no such folder; expected one, or a data set such as core:digits"
        )
    dataset, _ = open_dataset("core:image-folder", split, root=source) if is_folder else open_dataset(source, split)
    labels = [dataset.classes[label] if dataset.classes else label for label in dataset.labels()]
    return QuerySet(labels, images=images_of(dataset))


def settings_of(overrides: tuple[str, ...]) -> dict[str, Any]:
    if not overrides:
        return {}
    from bowerbird.recipe import apply_override

    settings: dict[str, Any] = {}
    for override in overrides:
        apply_override(settings, override)
    return settings


def print_results(gallery: Gallery, queries: tuple[str, ...], found: Any, state: Any, as_json: bool) -> None:
    sides = {0: "old", 1: "new"}
    items = {
        name: item for names in found.ids for name, item in zip(names, gallery.get_many(names), strict=True) if item
    }
    results = [
        {
            "query": query,
            "image": query,  # its name before there were queries of other kinds
            "share": state.share,
            "results": [
                {"id": name, "distance": float(distance), "side": sides[int(side)], **times_of(items.get(name))}
                for name, distance, side in zip(ids, distances, row, strict=False)
            ],
        }
        for query, ids, distances, row in zip(queries, found.ids, found.distances, found.sides, strict=True)
    ]
    if as_json:
        click.echo(json.dumps(results))
        return
    under_way = f"{state.share:.1%} of the gallery is new, strategy {state.strategy}"
    click.echo(under_way if state.strategy else "no upgrade is under way")

    def side(hit: dict[str, Any]) -> str:
        return f"{hit['side']}  " if state.strategy else ""  # there are no two sides

    for result in results:
        click.echo(result["query"])
        for rank, hit in enumerate(result["results"], start=1):
            click.echo(f"  {rank:>3}  {hit['distance']:.4f}  {side(hit)}{hit['id']}{shown_times(hit)}")
        if not result["results"]:
            click.echo("  nothing found")


def print_status(status: UpgradeStatus, gallery: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(status.to_dict()))
        return
    from bowerbird.upgrade.tables import show, status_text

    show(status_text(status))
    click.echo(f"next: bowerbird upgrade {_next_verb(status).format(shlex.quote(gallery))}")


def _next_verb(status: UpgradeStatus) -> str:
    """What leads on from here, with ``{}`` for the gallery."""
    from bowerbird.gallery.space import LIFTED

    if status.state == "paused":
        return "resume {}"
    if not status.complete:
        return "lift {}" if str(status.new["encoder"]).startswith(LIFTED) else "run {}"
    return "run {} --retry-failed" if status.failures else "finish {}"


@contextmanager
def steps_bar(*, show_it: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A line on standard error that says what is done now."""
    if not show_it:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with bar:
        line = bar.add_task("planning", total=None)
        yield lambda what, done, total: bar.update(line, description=what, completed=done, total=total)


@contextmanager
def moving_bar(*, show_it: bool) -> Iterator[Callable[[int, UpgradeStatus], None] | None]:
    """A bar with rate and time left on standard error."""
    if not show_it:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} items/s" if task.speed else "")

    bar = Progress(
        "upgrading", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with bar:
        task = bar.add_task("upgrading", total=None)

        def advance(count: int, status: UpgradeStatus) -> None:
            if count:
                bar.advance(task, count)
            else:
                bar.update(task, total=status.items, completed=status.new_items)

        yield advance
