"""What happens beyond one machine, in small: do catalogues disturb each other, and what does it cost to join shards?

    OMP_NUM_THREADS=1 python benchmarks/scale_shards.py --output benchmarks/results/scale_shards.json

*Independence*: processor time per task of a backfill in one gallery, and in ten galleries whose tasks are taken in
turns in the same process. *Joining*: the k hits of each of S shards, each with an old and a new part, merged to the k
best, for synthetic hits; and, as a check, ten galleries that are shards of one give the lists of the one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from bowerbird.gallery import Gallery
from bowerbird.gallery.merge import merge_parts
from bowerbird.retrieval.index import Hits
from common import write_result
from gallery_common import clustered, parser, space

SHARDS = 10


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=10_000, help="of one shard")
    arguments.add_argument("--task-items", type=int, default=500)
    arguments.add_argument("--fan-in", type=int, nargs="+", default=[1, 10, 50, 200])
    arguments.add_argument("-k", type=int, default=10)
    args = arguments.parse_args()
    old, new = space("a", args.dim), space("b", args.dim)
    vectors = clustered(SHARDS * args.items, args.dim, 0, 100)
    fresh = clustered(SHARDS * args.items, args.dim, 1, 100)
    queries = clustered(20, args.dim, 2, 100)
    both = {old.fingerprint: queries, new.fingerprint: queries}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        def gallery_of(name: str, first: int, count: int) -> Gallery:
            gallery = Gallery.create(Path(folder) / name, old)
            gallery.add([f"item-{i}" for i in range(first, first + count)], vectors[first : first + count])
            gallery.store.begin_upgrade(new, strategy="benchmark", order_name="core:random", task_items=args.task_items)
            return gallery

        def step(gallery: Gallery, first: int) -> float:
            start = time.process_time()
            task = gallery.store.lease_task("benchmark")
            assert task is not None
            gallery.store.commit_task(task, task.nums, fresh[task.nums + first])
            gallery.counts()  # as a worker looks after each task
            return 1e3 * (time.process_time() - start)

        tasks = args.items // args.task_items // 2
        alone = gallery_of("alone", 0, args.items)
        shards = [gallery_of(f"shard-{i}", i * args.items, args.items) for i in range(SHARDS)]
        lone, among = [], []
        for _turn in range(tasks):
            lone.append(step(alone, 0))
            among.extend(step(shard, i * args.items) for i, shard in enumerate(shards))
        joined = merge_parts([_global(shard, both, args.k, i * args.items) for i, shard in enumerate(shards)], args.k,
                             tie="lower_id")  # fmt: skip
        vectors_now = vectors.copy()
        for i in range(SHARDS):
            vectors_now[i * args.items : i * args.items + tasks * args.task_items] = fresh[
                i * args.items : i * args.items + tasks * args.task_items
            ]
        truth = np.argsort(-(queries @ vectors_now.T), axis=1, kind="stable")[:, : args.k]
        assert (joined.ids == truth).mean() > 0.999, "shards and the whole disagree"
        for gallery in (alone, *shards):
            gallery.close()

    joins = {}
    for count in args.fan_in:
        rng = np.random.default_rng(count)
        parts = [
            Hits(rng.permutation(10**6)[None, : args.k] + 10**6 * i, np.sort(rng.random((1, args.k)), axis=1))
            for i in range(2 * count)
        ]
        taken = []
        for _ in range(200):
            start = time.process_time()
            merge_parts(parts, args.k)
            taken.append(1e3 * (time.process_time() - start))
        joins[str(count)] = {"lists": 2 * count, "ms": statistics.median(taken), "fastest_ms": min(taken),
                             "bytes": 2 * count * args.k * 12}  # fmt: skip
    write_result(
        "scale_shards",
        {
            "independence": {
                "catalogues": SHARDS,
                "alone_ms": statistics.median(lone),
                "among_others_ms": statistics.median(among),
                "ratio": statistics.median(among) / statistics.median(lone),
                "task_items": args.task_items,
            },
            "joining": joins,
        },
        out=args.output,
    )


def _global(gallery: Gallery, both: dict[str, np.ndarray], k: int, first: int) -> Hits:
    """Hits of a shard with the numbers that its items have in the whole."""
    found = gallery.search(both, k)
    return Hits(np.where(found.nums < 0, -1, found.nums + first), found.distances)


if __name__ == "__main__":
    main()
