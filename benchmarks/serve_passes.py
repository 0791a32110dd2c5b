"""How often a query image is encoded during an upgrade, by strategy and share, and what a mapped query costs.

    OMP_NUM_THREADS=1 python benchmarks/serve_passes.py --output benchmarks/results/serve_passes.json

The encoders only count: each makes vectors of its space from a number that stands for an image. With the reverse query
transform the old part is searched with a mapped new query, so that the old encoder is never needed. Its cost, one
product of a vector with a matrix, is timed beside the search.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bowerbird.gallery import Gallery, Space
from bowerbird.upgrade.serve import SearchService
from bowerbird.upgrade.strategies import TrainingPairs, load_strategy
from common import write_result
from gallery_common import clustered, parser, space

STRATEGIES = ("compat:rank-merge", "compat:reverse-transform")


class Counting:
    """Stands for an encoder: image number i gives row i."""

    def __init__(self, space: Space, vectors: np.ndarray) -> None:
        self.space, self.vectors, self.passes = space, vectors, 0

    def images(self, images: Any) -> np.ndarray:
        self.passes += len(images)
        return self.vectors[np.asarray(images)]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=20_000)
    arguments.add_argument("--searches", type=int, default=100)
    args = arguments.parse_args()
    old, new = space("a", args.dim), space("b", args.dim)
    old_vectors = clustered(args.items, args.dim, 0, 200)
    mapping = np.linalg.qr(np.random.default_rng(5).standard_normal((args.dim, args.dim)))[0].astype(np.float32)
    noise = np.random.default_rng(6).standard_normal(old_vectors.shape, np.float32)
    new_vectors = old_vectors @ mapping + 0.3 * noise / np.sqrt(args.dim)
    new_vectors /= np.linalg.norm(new_vectors, axis=1, keepdims=True)
    results: dict[str, Any] = {}
    for name in STRATEGIES:
        strategy: Any = load_strategy(name)[1]
        with (
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
            Gallery.create(Path(folder) / "gallery", old) as gallery,
        ):
            gallery.add([f"item-{i}" for i in range(args.items)], old_vectors)
            gallery.register_space(new)
            if hasattr(strategy, "fit"):
                half = args.items // 2
                gallery.register_transform(
                    strategy.fit(TrainingPairs(old_vectors[:half], new_vectors[:half], None, old, new))
                )
            gallery.store.begin_upgrade(new, strategy=name, order_name="core:random", task_items=args.items // 20)
            encoders = {s.fingerprint: Counting(s, v) for s, v in ((old, old_vectors), (new, new_vectors))}
            service = SearchService(gallery, loader=lambda wanted, encoders=encoders: encoders[wanted.fingerprint])
            done = 0
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                while done < share * args.items:
                    task = gallery.store.lease_task("benchmark")
                    assert task is not None
                    gallery.store.commit_task(task, task.nums, new_vectors[task.nums])
                    done += len(task.items)
                before = {key: encoder.passes for key, encoder in encoders.items()}
                taken = []
                for image in range(args.searches):
                    start = time.process_time()
                    service.search([image])
                    taken.append(1e3 * (time.process_time() - start))
                passes = {key: encoders[key].passes - count for key, count in before.items()}
                results[f"{name}, share {share:g}"] = {
                    "old_encoder_passes_per_query": passes[old.fingerprint] / args.searches,
                    "new_encoder_passes_per_query": passes[new.fingerprint] / args.searches,
                    "search_ms": statistics.median(taken),
                }
    none = all(r["old_encoder_passes_per_query"] == 0 for key, r in results.items() if "reverse" in key)
    write_result("serve_passes", {"no_old_pass_with_reverse_transform": none, **results}, out=args.output)


if __name__ == "__main__":
    main()
