"""What the tests of promises share: the processes that work, serve and are killed, and the gallery that must come out.

Every vector is a hash of an item's id and content, so that the right gallery is known without running anything. No
process here imports torch; they are forked from one that has imported everything, so that hundreds can be killed.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gallery_world
import numpy as np
import pytest
from gallery_world import NEW, OLD

from bowerbird.errors import UpgradeError
from bowerbird.gallery import Gallery, Item, Space
from bowerbird.upgrade import ItemEncoder
from bowerbird.upgrade.run import run

FULL = os.environ.get("BOWERBIRD_PROMISES") == "full"
OUT = os.environ.get("BOWERBIRD_PROMISES_OUT")
full_or_quick = {True: "full", False: "quick"}[FULL]
vector = functools.lru_cache(maxsize=100_000)(gallery_world.vector)


@pytest.fixture
def promise(request) -> Iterator[dict[str, Any]]:
    """What a test measured: written as one line of JSON to the file that BOWERBIRD_PROMISES_OUT names."""
    measured: dict[str, Any] = {}
    started = time.perf_counter()
    yield measured
    if OUT and measured:
        line = {"test": request.node.name, "version": full_or_quick, **measured,
                "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
        with Path(OUT).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def vectors(contents: dict[str, str], space: Space) -> np.ndarray:
    """``(N, dim)`` of ids with their content."""
    return np.array([vector(name, space, content) for name, content in contents.items()], np.float32)


def add(gallery: Gallery, contents: dict[str, str], space: Space, *, replace: bool = False) -> None:
    gallery.add(
        list(contents), vectors(contents, space), content_hashes=list(contents.values()), space=space.fingerprint,
        replace=replace,
    )  # fmt: skip


def encoder_of(space: Space, delay: float = 0.0) -> ItemEncoder:
    """Encodes by id and content; ``delay`` seconds per batch stand for a model."""

    def encode(items: Sequence[Item]) -> np.ndarray:
        time.sleep(delay)
        return np.array([vector(item.id, space, item.content_hash or "") for item in items], np.float32)

    return ItemEncoder(encode, space=space, batch_size=64)


def everything(gallery: Gallery, queries: dict[str, np.ndarray]) -> list[str]:
    """The ids of a search for all items at once; every item must be there, and once."""
    snapshot = gallery.snapshot()
    found = gallery.search(queries, max(1, snapshot.live), snapshot=snapshot).ids[0]
    assert len(set(found)) == len(found), "an item was found twice"
    assert len(found) == snapshot.live, "an item is missing"
    return found


def difference(gallery: Gallery, contents: dict[str, str], space: Space) -> str | None:
    """How the gallery differs from one with these items, no others, and bit-equal vectors of ``space``."""
    names = sorted(item.id for item in gallery.items())
    if names != sorted(contents):
        return f"items: {sorted(set(names) ^ set(contents))[:5]}, {len(names)} of {len(contents)}"
    got, expected = gallery.vectors_of(list(contents), space.fingerprint), _stored(vectors(contents, space))
    if got.tobytes() != expected.tobytes():
        return f"{np.count_nonzero((got != expected).any(axis=1))} vectors"
    report = gallery.verify()
    return None if report.ok else str(report)


def assert_is(gallery: Gallery, contents: dict[str, str], space: Space) -> None:
    found = difference(gallery, contents, space)
    assert found is None, found


def _stored(rows: np.ndarray) -> np.ndarray:
    """As a gallery keeps them: normalised once more."""
    from bowerbird.gallery.vectors import unit_vectors

    return unit_vectors(rows, rows.shape[1])


# ---------------------------------------------------------------------------------------------------- processes


@functools.cache
def forks() -> Any:
    """Processes forked from one that has imported everything and has no threads."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["promises_world"])
    return context


def start(target: Any, *arguments: Any) -> Any:
    process = forks().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def worker(path: str, delay: float) -> None:
    """Works on whatever upgrade is under way until the file ``over`` appears."""
    over = Path(path).with_suffix(".over")
    with Gallery.open(path) as gallery:
        while not over.exists():
            state = gallery.store.upgrade_state()
            if state is None or state.state == "paused":
                time.sleep(0.005)
                continue
            space = {space.fingerprint: space for space in (OLD, NEW)}[state.new]
            try:
                run(gallery, encoder_of(space, delay), upgrade=state.id, stop=over.exists)
            except UpgradeError:
                continue  # paused or ended in this moment
            time.sleep(0.005)


INITIAL = {f"item-{n:04d}": "a" for n in range(800)}
BATCHES = 8


def plan_of_the_server() -> list[tuple[str, dict[str, str]]]:
    """What the server does, in order: uploads (new and old space), edits and deletes. Each step can be repeated."""
    steps: list[tuple[str, dict[str, str]]] = []
    names = list(INITIAL)
    for batch in range(BATCHES):
        steps.append(("add", {f"late-{batch:02d}-{i}": "a" for i in range(6)}))
        steps.append(("add-old", {f"legacy-{batch:02d}-{i}": "a" for i in range(3)}))
        steps.append(("edit", dict.fromkeys(names[batch * 7 : batch * 7 + 4], f"edit {batch}")))
        steps.append(("delete", {names[-1 - batch]: "", f"late-{batch:02d}-0": ""}))
    return steps


def gallery_of_the_server() -> dict[str, str]:
    """The contents after its last step."""
    contents = dict(INITIAL)
    for kind, given in plan_of_the_server():
        for name, content in given.items():
            if kind == "delete":
                contents.pop(name, None)
            else:
                contents[name] = content
    return contents


def server(path: str, pause: float) -> None:
    """Searches and ingests. Started again after a kill, it goes on at the step that the gallery shows is next."""
    queries = gallery_world.queries(3, seed=1)
    with Gallery.open(path) as gallery:
        for number, (kind, given) in enumerate(plan_of_the_server()):
            marker = f"step-{number:03d}"
            if marker in gallery:
                continue
            everything(gallery, queries)
            # The marker tells that a step was done; a step that was cut off before it is done again, to the same end.
            if kind == "delete":
                present = [name for name in given if name in gallery]
                if present:
                    gallery.delete(present)
            else:
                space = OLD if kind == "add-old" else NEW
                add(gallery, given, space, replace=True)
            gallery.add([marker], vectors({marker: ""}, NEW), content_hashes=[""], space=NEW.fingerprint, replace=True)
            everything(gallery, queries)
            time.sleep(pause)
    Path(path).with_suffix(".served").touch()
