"""Approximate search of a gallery against bare FAISS, and of a half-migrated gallery against a whole one.

OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/gallery_ann.py --output benchmarks/results/gallery_ann.json

Both searches of a pair use inverted lists of the same number and search the same number of them. ``rebuilt``: the index
was built again at that share; otherwise it is the one from before the upgrade, which is given up for an exact search
once much of it has moved. Vectors are clustered: uniformly random ones have no neighbourhoods that an index could find.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from bowerbird.gallery import Gallery, SearchResult
from bowerbird.retrieval.index import load_faiss
from common import write_result
from gallery_common import paired, parser, space


def clustered(count: int, dim: int, seed: int, centres: int) -> np.ndarray:
    """Unit rows around random centres; the noise is as long as a centre is."""
    middle = np.random.default_rng(7).standard_normal((centres, dim), np.float32)
    rng = np.random.default_rng(seed)
    rows = middle[rng.integers(centres, size=count)] + rng.standard_normal((count, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=100_000)
    arguments.add_argument("--centres", type=int, default=1000, help="of the vectors")
    arguments.add_argument("--nlist", type=int, default=256)
    arguments.add_argument("--nprobe", type=int, default=8)
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    arguments.add_argument("-k", type=int, default=10)
    arguments.add_argument("--repeats", type=int, default=31)
    args = arguments.parse_args()
    faiss = load_faiss()
    old, new = space("a", args.dim), space("b", args.dim)
    old_vectors, new_vectors = (clustered(args.items, args.dim, seed, args.centres) for seed in (0, 1))
    ids = [f"item-{i}" for i in range(args.items)]
    config = {"nlist": args.nlist, "nprobe": args.nprobe}
    sample = clustered(200, args.dim, 2, args.centres)
    results: dict[str, dict[str, float]] = {}

    bare = faiss.IndexIVFFlat(faiss.IndexFlatIP(args.dim), args.dim, args.nlist, faiss.METRIC_INNER_PRODUCT)
    bare.train(old_vectors)
    bare.add(old_vectors)
    bare.nprobe = args.nprobe
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        whole, moving = (Gallery.create(Path(folder) / name, old) for name in ("whole", "moving"))
        with whole, moving:
            for gallery in (whole, moving):
                gallery.add(ids, old_vectors)
            truth = whole.search(sample, args.k).nums
            for gallery in (whole, moving):
                gallery.set_index("ivf", **config)
            measured = {
                "gallery": recall(whole.search(sample, args.k).nums, truth),
                "bare": recall(bare.search(sample, args.k)[1], truth),
            }
            for batch in args.batches:
                queries = clustered(batch, args.dim, 3, args.centres)
                results[f"gallery over bare FAISS, batch {batch}"] = paired(
                    lambda q=queries: whole.search(q, args.k),
                    lambda q=queries: bare.search(q, args.k),
                    args.repeats if batch > 1 else 5 * args.repeats,
                )
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
                for how in ("", ", rebuilt"):
                    if how:
                        moving.build_index()
                    for batch in args.batches:
                        queries = clustered(batch, args.dim, 3, args.centres)
                        both = {old.fingerprint: queries, new.fingerprint: clustered(batch, args.dim, 4, args.centres)}

                        def merged(both: dict[str, np.ndarray] = both) -> SearchResult:
                            return moving.search(both, args.k)

                        repeats = args.repeats if batch > 1 else 5 * args.repeats
                        results[f"share {share:g}, batch {batch}{how}"] = paired(
                            merged, lambda q=queries: whole.search(q, args.k), repeats
                        )
    write_result("gallery_ann", {"recall_at_k": measured, **results}, out=args.output)


if __name__ == "__main__":
    main()
