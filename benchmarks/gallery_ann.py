"""Approximate search of a gallery against bare FAISS with as many lists, of which as many are searched.

OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/gallery_ann.py --output benchmarks/results/gallery_ann.json

What a gallery adds: it follows commits, looks the hits' vectors up to rank them exactly, and names them. See
``serve_share`` for galleries that are being upgraded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from bowerbird.gallery import Gallery
from bowerbird.retrieval.faiss_index import load_faiss
from common import write_result
from gallery_common import clustered, paired, parser, space


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found[:, :, None] == truth[:, None, :]).any(axis=1).mean())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=100_000)
    arguments.add_argument("--centres", type=int, default=1000, help="of the vectors")
    arguments.add_argument("--nlist", type=int, default=256)
    arguments.add_argument("--nprobe", type=int, default=8)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    arguments.add_argument("-k", type=int, default=10)
    arguments.add_argument("--repeats", type=int, default=31)
    args = arguments.parse_args()
    faiss = load_faiss()
    vectors = clustered(args.items, args.dim, 0, args.centres)
    sample = clustered(200, args.dim, 2, args.centres)
    bare = faiss.IndexIVFFlat(faiss.IndexFlatIP(args.dim), args.dim, args.nlist, faiss.METRIC_INNER_PRODUCT)
    bare.train(vectors)
    bare.add(vectors)
    bare.nprobe = args.nprobe
    results: dict[str, dict[str, float]] = {}
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        Gallery.create(Path(folder) / "gallery", space("a", args.dim)) as gallery,
    ):
        gallery.add([f"item-{i}" for i in range(args.items)], vectors)
        truth = gallery.search(sample, args.k).nums
        gallery.set_index("ivf", nlist=args.nlist, nprobe=args.nprobe)
        measured = {
            "gallery": recall(gallery.search(sample, args.k).nums, truth),
            "bare": recall(bare.search(sample, args.k)[1], truth),
        }
        for batch in args.batches:
            queries = clustered(batch, args.dim, 3, args.centres)
            results[f"gallery over bare FAISS, batch {batch}"] = paired(
                lambda q=queries: gallery.search(q, args.k),
                lambda q=queries: bare.search(q, args.k),
                args.repeats if batch > 1 else 5 * args.repeats,
            )
    write_result("gallery_ann", {"recall_at_k": measured, **results}, out=args.output)


if __name__ == "__main__":
    main()
