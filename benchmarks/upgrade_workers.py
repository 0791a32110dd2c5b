"""`upgrade run --workers 2` against one worker, with an encoder that uses one core: how much faster is it on two cores?

Each pair upgrades two equal galleries, one with one worker and one with two, one right after the other and in changing
order. The encoder multiplies matrices (numpy, one thread, outside the interpreter's lock) or is EfficientNet-Lite0 on
JPEG files. Only the time in which all workers work is counted: starting a process costs the same for ten items and for
ten million. The limit is 1.7 (median over the pairs). The processor time per item is given too: unlike the speed it
hardly depends on what else the machine does.

python benchmarks/upgrade_workers.py --output benchmarks/results/upgrade_workers.json
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Gallery, Space
from bowerbird.upgrade import ItemEncoder
from bowerbird.upgrade.executors import THREADS, LocalExecutor
from bowerbird.upgrade.worker import Event, Job
from common import write_result

LIMIT = 1.7
OLD = Space("benchmark-old", "random vectors", 128)
MATMUL = Space("benchmark-matmul", "three matrix products", 256)


def load(settings: dict[str, Any], gallery: Gallery, space: Space, index: int) -> ItemEncoder:
    """The encoder of a worker process."""
    if settings["encoder"] != "matmul":
        from bowerbird.encoders import load_encoder

        return ItemEncoder(load_encoder(settings["encoder"], device="cpu"), batch_size=settings["batch_size"])
    size = settings["size"]
    weights = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32) / np.sqrt(size)

    def encode(items: Sequence[Any]) -> np.ndarray:
        rows = []
        for item in items:
            x = np.random.default_rng(item.num).random((size, size), np.float32)
            for _ in range(3):
                x = np.tanh(x @ weights)
            rows.append(x[0, : space.dim])
        return np.array(rows)

    return ItemEncoder(encode, space=space, batch_size=settings["batch_size"])


def upgrade(folder: Path, workers: int, settings: dict[str, Any], items: int, task_items: int, uris: list[str]) -> dict:
    """Items per second while all workers worked, and processor seconds per item of the whole run."""
    rng = np.random.default_rng(0)
    space = MATMUL
    if settings["encoder"] != "matmul":
        from bowerbird.encoders import load_encoder

        space = load_encoder(settings["encoder"], device="cpu").space()
    with Gallery.create(folder, OLD) as gallery:
        gallery.add([f"item-{i}" for i in range(items)], rng.normal(size=(items, OLD.dim)), uris=uris or None)
        state = gallery.store.begin_upgrade(space, strategy="none", order_name="none", task_items=task_items)
        heard: dict[int, list[tuple[float, int]]] = {index: [] for index in range(workers)}

        def tell(index: int, event: Event) -> None:
            if event["event"] == "committed":
                heard[index].append((time.perf_counter(), event["count"]))

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shares = LocalExecutor(workers).run(Job(str(folder), state.id, "upgrade_workers:load", settings), tell)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert all(share.reason == "complete" for share in shares), shares
        assert gallery.store.progress().complete and gallery.counts()[space.fingerprint] == items
    start = max(times[0][0] for times in heard.values())
    end = min(times[-1][0] for times in heard.values())
    moved = sum(count for times in heard.values() for at, count in times if start < at <= end)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"rate": moved / (end - start), "processor": processor / items, "shares": [s.encoded for s in shares]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="matmul", help="matmul, or a reference such as core:efficientnet-lite")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--items", type=int, default=800)
    parser.add_argument("--task-items", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--size", type=int, default=512, help="of the matrices")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    os.environ.update(dict.fromkeys(THREADS, "1"))
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    settings = {"encoder": args.encoder, "batch_size": args.batch_size, "size": args.size}
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        uris = _images(Path(name), args.items) if args.encoder != "matmul" else []
        for pair in range(args.pairs):
            measured = {}
            for workers in (1, 2) if pair % 2 == 0 else (2, 1):
                folder = Path(name) / f"{pair}-{workers}"
                measured[workers] = upgrade(folder, workers, settings, args.items, args.task_items, uris)
            pairs.append(measured)
            print(pair, {n: round(m["rate"], 1) for n, m in measured.items()}, flush=True)
    ratios = sorted(m[2]["rate"] / m[1]["rate"] for m in pairs)
    write_result(
        "upgrade_workers",
        {
            "encoder": args.encoder, "items": args.items, "pairs": args.pairs,
            "items_per_second_one": float(np.median([m[1]["rate"] for m in pairs])),
            "items_per_second_two": float(np.median([m[2]["rate"] for m in pairs])),
            "speed_of_two": float(np.median(ratios)), "speed_of_two_range": [ratios[0], ratios[-1]],
            "processor_per_item_two_over_one": float(np.median([m[2]["processor"] / m[1]["processor"] for m in pairs])),
            "items_by_worker": [m[2]["shares"] for m in pairs],
            "limit": LIMIT, "ok": float(np.median(ratios)) >= LIMIT,
        },
        out=args.output,
    )  # fmt: skip


def _images(folder: Path, count: int) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = [str(folder / f"{i}.jpg") for i in range(count)]
    for path in paths:
        small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


if __name__ == "__main__":
    main()
