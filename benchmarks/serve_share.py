"""Search of a half-migrated gallery against one search of a whole gallery of the same size.

OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/serve_share.py --output benchmarks/results/serve_share.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from bowerbird.gallery import Gallery
from common import write_result
from gallery_common import paired, parser, space, unit


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=100_000)
    arguments.add_argument("--shares", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    arguments.add_argument("-k", type=int, default=10)
    arguments.add_argument("--repeats", type=int, default=31)
    args = arguments.parse_args()
    old, new = space("a", args.dim), space("b", args.dim)
    old_vectors, new_vectors = unit(args.items, args.dim, 0), unit(args.items, args.dim, 1)
    ids = [f"item-{i}" for i in range(args.items)]
    results = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        whole = Gallery.create(Path(folder) / "whole", old)
        moving = Gallery.create(Path(folder) / "moving", old)
        with whole, moving:
            whole.add(ids, old_vectors)
            moving.add(ids, old_vectors)
            order = np.random.default_rng(2).permutation(args.items)
            moving.store.begin_upgrade(
                new, strategy="benchmark", order_name="core:random", order=order, task_items=1000
            )
            done = 0
            for share in sorted(args.shares):
                while done < share * args.items:
                    task = moving.store.lease_task("benchmark")
                    assert task is not None
                    moving.store.commit_task(task, task.nums, new_vectors[task.nums])
                    done += len(task.items)
                for batch in args.batches:
                    queries = unit(batch, args.dim, 3)
                    both = {old.fingerprint: queries, new.fingerprint: unit(batch, args.dim, 4)}
                    repeats = args.repeats if batch > 1 else 5 * args.repeats
                    results[f"share {share:g}, batch {batch}"] = paired(
                        lambda b=both: moving.search(b, args.k), lambda q=queries: whole.search(q, args.k), repeats
                    )
    write_result("serve_share", {"limit_ratio": 1.3, **results}, out=args.output)


if __name__ == "__main__":
    main()
