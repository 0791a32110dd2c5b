"""Warm `Gallery.search` against the bare FAISS flat index with `distance_compute_blas_threshold = 4 * d`.

OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/gallery_search.py --output benchmarks/results/gallery_search.json
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bowerbird.gallery import Gallery
from common import write_result
from gallery_common import paired, parser, space, unit


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=100_000)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="queries per search")
    arguments.add_argument("-k", type=int, default=10)
    arguments.add_argument("--repeats", type=int, default=31)
    args = arguments.parse_args()
    import faiss

    faiss.omp_set_num_threads(1)
    vectors = unit(args.items, args.dim, 0)
    index = faiss.IndexFlatIP(args.dim)
    index.add(vectors)
    faiss.cvar.distance_compute_blas_threshold = 4 * args.dim
    results = {}
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        Gallery.create(Path(folder) / "gallery", space("a", args.dim)) as gallery,
    ):
        gallery.add([f"item-{i}" for i in range(args.items)], vectors)
        for batch in args.batches:
            queries = unit(batch, args.dim, 1 + batch)
            ours = gallery.search(queries, args.k)
            _, rows = index.search(queries, args.k)
            assert ours.nums.tolist() == rows.tolist(), "the two searches disagree"
            repeats = args.repeats if batch > 1 else 5 * args.repeats
            results[f"batch {batch}"] = paired(
                lambda q=queries: gallery.search(q, args.k), lambda q=queries: index.search(q, args.k), repeats
            )
    write_result("gallery_search", {"limit_ratio": 1.1, **results}, out=args.output)


if __name__ == "__main__":
    main()
