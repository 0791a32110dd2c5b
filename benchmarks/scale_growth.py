"""How a gallery grows: from 1e5 to 1e7 vectors on one machine, each step of an upgrade timed and its memory watched.

    OMP_NUM_THREADS=1 python benchmarks/scale_growth.py --folder /tmp/scale

Every step runs in a process of its own, whose memory is sampled from outside. What is finished is kept in the folder
(``steps-<items>.json``), so that a run that was cut off goes on where it ended.

*Memory outside the index* is the largest ``RssAnon`` of the process (resident anonymous pages; pages of mapped files,
which the kernel takes back whenever it needs them, are left out) less the bytes of the FAISS indexes that it held. The
vectors are synthetic (see ``gallery_common.clustered``). The encoder of the upgrade is a rotation of the stored vector,
so that the time is the gallery's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bowerbird.gallery import Gallery, Space
from common import write_result
from gallery_common import clustered, space

DIM = 128
BLOCK = 100_000
OLD, NEW = space("a", DIM), space("b", DIM)
STEPS = ("add", "open", "exact", "verify", "index", "ivf", "begin", "half", "merged", "merged_cold", "verify_half")
LIMIT_MB = 2048
QUERIES = 64


def rows(start: int, count: int) -> np.ndarray:
    """Vectors of the items ``start`` to ``start + count``; whole blocks."""
    return clustered(count, DIM, [11, start], 1000, fading=0.5)


def rotation() -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(5).standard_normal((DIM, DIM)))[0].astype(np.float32)


def queries() -> dict[str, np.ndarray]:
    found = rows(10**9, QUERIES)
    return {OLD.fingerprint: found, NEW.fingerprint: found @ rotation()}


class Rotation:
    """Encodes an item by rotating its old vector: an encoder that costs next to nothing."""

    space: Space = NEW

    def __init__(self, gallery: Gallery) -> None:
        self.part = gallery.snapshot().part_of(OLD.fingerprint)  # of the beginning; its rows stay
        self.matrix = rotation()

    def items(self, items: Any, on_batch: Callable[[int], None] | None = None) -> Any:
        vectors = self.part.vectors_of(np.array([item.num for item in items], np.int64)) @ self.matrix
        if on_batch is not None:
            on_batch(len(items))
        return SimpleNamespace(positions=np.arange(len(items)), vectors=vectors, failures={})

    def vectors(self, items: Any) -> np.ndarray:
        return self.items(items).vectors


# ---------------------------------------------------------------------------------------------------------- steps


def step_add(path: Path, items: int) -> dict[str, Any]:
    wall = cpu = 0.0
    with Gallery.create(path, OLD) as gallery:
        for start in range(0, items, BLOCK):
            block = rows(start, min(BLOCK, items - start))
            names = [f"photos/{i:09d}.jpg" for i in range(start, start + len(block))]
            before = time.perf_counter(), time.process_time()
            gallery.add(names, block)
            wall += time.perf_counter() - before[0]
            cpu += time.process_time() - before[1]
    size = sum(file.stat().st_size for file in path.glob("catalog.db*"))
    return {"wall_s": wall, "cpu_s": cpu, "items_per_s": items / wall, "catalogue_mb": size / 2**20}


def step_open(path: Path, items: int) -> dict[str, Any]:
    opened = []
    for _ in range(5):
        start = time.perf_counter()
        gallery = Gallery.open(path)
        opened.append(time.perf_counter() - start)
        gallery.close()
    with Gallery.open(path) as gallery:
        first = _seconds(lambda: gallery.search(queries()[OLD.fingerprint][:1]))
    return {"open_s": statistics.median(opened), "first_search_s": first}


def search_times(gallery: Gallery, given: Any, repeats: int) -> dict[str, Any]:
    def one(q: Any, slice_: slice) -> Any:
        return {name: rows[slice_] for name, rows in q.items()} if isinstance(q, dict) else q[slice_]

    for _ in range(200):  # an index in memory takes in what its file lacks, a piece with each search
        gallery.search(one(given, slice(0, 1)))
        if gallery.snapshot().upgrade is None:
            break
    result = {}
    for batch in (1, QUERIES):
        wall, cpu = [], []
        for turn in range(repeats if batch > 1 else 4 * repeats):
            chosen = one(given, slice(turn % QUERIES, turn % QUERIES + 1) if batch == 1 else slice(0, batch))
            before = time.perf_counter(), time.process_time()
            gallery.search(chosen)
            wall.append(time.perf_counter() - before[0])
            cpu.append(time.process_time() - before[1])
        result[f"batch_{batch}"] = {"wall_ms": 1e3 * min(wall), "cpu_ms": 1e3 * min(cpu),
                                    "cpu_median_ms": 1e3 * statistics.median(cpu)}  # fmt: skip
    return result


def step_exact(path: Path, items: int) -> dict[str, Any]:
    with Gallery.open(path) as gallery:
        times = search_times(gallery, queries()[OLD.fingerprint], 5)
        np.save(path.with_name(f"truth-{items}.npy"), gallery.search(queries()[OLD.fingerprint]).nums)
    return times


def step_index(path: Path, items: int) -> dict[str, Any]:
    with Gallery.open(path) as gallery:
        before = time.perf_counter(), time.process_time()
        (entry,) = gallery.set_index("ivf")
        return {"wall_s": time.perf_counter() - before[0], "cpu_s": time.process_time() - before[1],
                "recall": entry.recall, "index_mb": entry.bytes / 2**20}  # fmt: skip


def step_ivf(path: Path, items: int) -> dict[str, Any]:
    with Gallery.open(path) as gallery:
        first = _seconds(lambda: gallery.search(queries()[OLD.fingerprint][:1]))
        times = search_times(gallery, queries()[OLD.fingerprint], 15)
        found = gallery.search(queries()[OLD.fingerprint]).nums
        truth = np.load(path.with_name(f"truth-{items}.npy"))
        recall = float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())
        return {**times, "first_search_s": first, "recall_of_queries": recall, "index_mb": index_mb(gallery)}


def step_begin(path: Path, items: int) -> dict[str, Any]:
    from bowerbird.upgrade import begin

    with Gallery.open(path) as gallery:
        before = time.perf_counter(), time.process_time()
        begin(gallery, NEW, strategy="rank-merge", task_items=10_000)
        return {"wall_s": time.perf_counter() - before[0], "cpu_s": time.process_time() - before[1]}


def step_half(path: Path, items: int) -> dict[str, Any]:
    from bowerbird.upgrade.run import run

    with Gallery.open(path) as gallery:
        moved = gallery.snapshot().new.count
        before = time.perf_counter(), time.process_time()
        report = run(gallery, Rotation(gallery), stop_at_share=0.5)  # type: ignore[arg-type]
        wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        assert report.share >= 0.5, report
        largest = max((file["bytes"] for file in gallery.index()["files"]), default=0)  # one index at a time
        return {"wall_s": wall, "cpu_s": cpu, "items_per_s": (gallery.snapshot().new.count - moved) / wall,
                "index_mb": largest / 2**20}  # fmt: skip


def step_merged(path: Path, items: int) -> dict[str, Any]:
    with Gallery.open(path) as gallery:
        gallery.tend_index(share=1)
        times = search_times(gallery, queries(), 15)
        found = gallery.search(queries()).nums
        truth = np.load(path.with_name(f"truth-{items}.npy"))  # a rotation keeps all distances
        recall = float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())
        return {**times, "recall_of_queries": recall, "index_mb": index_mb(gallery)}


def step_merged_cold(path: Path, items: int) -> dict[str, Any]:
    with Gallery.open(path) as gallery:
        one = {name: rows[:1] for name, rows in queries().items()}
        first = _seconds(lambda: gallery.search(one))
        return {"first_search_s": first, "index_mb": index_mb(gallery)}


def step_verify(path: Path, items: int) -> dict[str, Any]:
    with Gallery.open(path) as gallery:
        before = time.perf_counter(), time.process_time()
        report = gallery.verify()
        assert report.ok and report.items == items, report
        return {"wall_s": time.perf_counter() - before[0], "cpu_s": time.process_time() - before[1]}


def index_mb(gallery: Gallery) -> float:
    return sum(file["bytes"] for file in gallery.index()["files"]) / 2**20


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------- the whole run


def watch_memory(pid: int, peak: dict[str, float], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            key, _, rest = line.partition(":")
            if key in ("RssAnon", "RssFile"):
                peak[key] = max(peak.get(key, 0), int(rest.split()[0]) / 1024)


def run_step(name: str, items: int, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--folder", str(folder), "--step", name, "--items", str(items)]
    peak: dict[str, float] = {}
    stop = threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=watch_memory, args=(process.pid, peak, stop))
    watcher.start()
    output = process.communicate()[0]
    stop.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"step {name} of {items} items failed with status {process.returncode}")
    result = json.loads(output.splitlines()[-1])
    held = result.get("index_mb", 0.0)
    return {**result, "anonymous_mb": peak["RssAnon"], "mapped_mb": peak["RssFile"],
            "outside_index_mb": max(peak["RssAnon"] - held, 0.0), "load_average": os.getloadavg()[0]}  # fmt: skip


def steps_of(items: int, folder: Path, *, finished: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    kept = folder / f"steps-{items}.json"
    done = json.loads(kept.read_text()) if kept.exists() else {}
    for name in STEPS:
        if name not in done and finished:
            continue
        if name not in done:
            print(f"{time.strftime('%H:%M:%S')} {items} {name}", file=sys.stderr, flush=True)
            done[name] = run_step(name, items, folder)
            print(json.dumps(done[name]), file=sys.stderr, flush=True)
            temporary = kept.with_suffix(".tmp")
            temporary.write_text(json.dumps(done, indent=1))
            temporary.replace(kept)
        yield name, done[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, required=True, help="on a local disk; 1e7 items need 25 GB")
    parser.add_argument("--step", choices=STEPS, help="one step in this process (used by the run itself)")
    parser.add_argument("--finished", action="store_true", help="run nothing; write what has been measured so far")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.step:
        (items,) = args.items
        path = args.folder / f"gallery-{items}"
        step = step_verify if args.step.startswith("verify") else globals()[f"step_{args.step}"]
        print(json.dumps(step(path, items)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    growth = {str(items): dict(steps_of(items, args.folder, finished=args.finished)) for items in args.items}
    worst = max(step["outside_index_mb"] for steps in growth.values() for step in steps.values())
    result = {"dim": DIM, "limit_outside_index_mb": LIMIT_MB, "worst_outside_index_mb": worst, "growth": growth}
    write_result("scale_growth", result, out=args.output)


if __name__ == "__main__":
    main()
