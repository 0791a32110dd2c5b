"""Search of a half-migrated gallery against one search of a whole gallery of the same size: exact, IVF and HNSW.

OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/serve_share.py --kind ivf

The upgrade goes on as a worker would move it: tasks of 1,000 items, the index files tended beside them, and a search
now and then, so that the index in memory follows. At each share both galleries are searched in turns. Nothing is
rebuilt before a measurement; only for a graph, the thread that links items into it has ended. Both galleries have their
indexes on huge pages (``common.HUGE_PAGES``): on small ones, two searches of one and the same index differ by 10 %.
Vectors are clustered (``gallery_common.clustered``).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bowerbird.gallery import Gallery
from bowerbird.gallery.covered import LINKING
from common import HUGE_PAGES, start_again, write_result
from gallery_common import clustered, paired, parser, space

LIMITS = {"exact": 1.15, "ivf": 1.25, "hnsw": 2.0}
SETTINGS = {"exact": {}, "ivf": {}, "hnsw": {"m": 16, "ef_construction": 40}}
SHARES = (0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1)  # young parts have other ways to be searched
SAMPLE = 500
BLOCK = 50_000


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kind", choices=LIMITS, default="exact")
    arguments.add_argument("--items", type=int, default=1_000_000)
    arguments.add_argument("--whole", type=Path, help="keep the whole gallery here, and use it if it is there")
    arguments.add_argument("--shares", type=float, nargs="+", default=SHARES)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    arguments.add_argument("-k", type=int, default=10)
    arguments.add_argument("--repeats", type=int, default=15)
    args = arguments.parse_args()
    start_again(HUGE_PAGES)
    old, new = space("a", args.dim), space("b", args.dim)
    centres = 1000
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((args.dim, args.dim)))[0].astype(np.float32)
    sample = clustered(SAMPLE, args.dim, 2, centres)
    results: dict[str, dict[str, float]] = {}

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = args.whole or Path(folder) / "whole"
        if not path.exists():
            gallery = Gallery.create(path, old)
            for start in range(0, args.items, BLOCK):
                block = clustered(min(BLOCK, args.items - start), args.dim, [1, start], centres)
                gallery.add([f"item-{start + i}" for i in range(len(block))], block)
            say(f"{args.kind} of {args.items}")
            gallery.set_index(args.kind, **SETTINGS[args.kind])
            gallery.close()
        shutil.copytree(path, Path(folder) / "moving")
        with Gallery.open(path) as whole, Gallery.open(Path(folder) / "moving") as moving:
            order = np.random.default_rng(2).permutation(args.items)
            moving.store.begin_upgrade(
                new, strategy="benchmark", order_name="core:random", order=order, task_items=1000
            )
            first = moving.snapshot().old
            truth = first.search(sample, args.k).ids  # exact
            done = tasks = 0
            for share in sorted(args.shares):
                while done < share * args.items:
                    task = moving.store.lease_task("benchmark")
                    assert task is not None
                    moving.store.commit_task(task, task.nums, first.vectors_of(task.nums) @ rotation)
                    done, tasks = done + len(task.items), tasks + 1
                    if tasks % 10 == 0:
                        moving.tend_index(share=1)
                        one = clustered(1, args.dim, [9, tasks], centres)
                        moving.search({old.fingerprint: one, new.fingerprint: one @ rotation}, args.k)
                settle(lambda: moving.search({old.fingerprint: sample[:1], new.fingerprint: sample[:1] @ rotation}, 1))
                both = {old.fingerprint: sample, new.fingerprint: sample @ rotation}
                found = moving.search(both, args.k).nums  # a rotation keeps all distances: the truth is that of before
                recall = float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())
                say(f"share {share}, recall {recall:.4f}")
                for batch in args.batches:
                    queries = clustered(64, args.dim, 3, centres)
                    turn = iter(range(10**9))

                    def pick(queries: np.ndarray = queries, batch: int = batch, turn: object = turn) -> np.ndarray:
                        start = next(turn) // 2 % 64 if batch == 1 else 0  # type: ignore[call-overload]
                        return queries[start : start + batch]

                    def merged(pick: object = pick) -> None:
                        chosen = pick()  # type: ignore[operator]
                        moving.search({old.fingerprint: chosen, new.fingerprint: chosen @ rotation}, args.k)

                    def single(pick: object = pick) -> None:
                        whole.search(pick(), args.k)  # type: ignore[operator]

                    repeats = args.repeats * (1 if batch > 1 or args.kind == "exact" else 10)
                    measured = paired(merged, single, repeats)
                    results[f"share {share:g}, batch {batch}"] = {**measured, "recall": recall}
                    say(f"  batch {batch}: {measured['ratio']:.3f} of {measured['reference_ms']:.3f} ms")
            searched = whole.search(sample, args.k).nums
            reference = float((searched[:, :, None] == truth[:, None, :]).any(axis=1).mean())
    whole_run = {"limit_ratio": LIMITS[args.kind], "items": args.items, "recall_of_whole": reference, **results}
    write_result(f"serve_share_{args.kind}", whole_run, out=args.output)


def settle(search: Callable[[], object]) -> None:
    """Search until no thread takes items into a graph any more: linking them is building, not searching."""
    while True:
        search()
        linking = [thread for thread in threading.enumerate() if thread.name == LINKING]
        if not linking:
            return
        for thread in linking:
            thread.join()


if __name__ == "__main__":
    main()
