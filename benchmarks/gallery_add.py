"""`Gallery.add` of ready vectors against `numpy.save` with fsync of the same bytes, in turns.

    OMP_NUM_THREADS=1 python benchmarks/gallery_add.py --output benchmarks/results/gallery_add.json

Wall time, because most of it is the disk. The vectors come from a memory-mapped file, so that the memory that is
measured is the gallery's own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bowerbird.gallery import Gallery
from common import write_result
from gallery_common import parser, resident_mb, space, unit


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, default=1_000_000)
    arguments.add_argument("--call", type=int, default=100_000, help="items per call of add")
    arguments.add_argument("--repeats", type=int, default=3)
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source = np.lib.format.open_memmap(folder / "source.npy", "w+", np.float32, (args.items, args.dim))
        for start in range(0, args.items, 100_000):
            source[start : start + 100_000] = unit(min(100_000, args.items - start), args.dim, start)
        source.flush()
        ids = [f"photos/{i:08d}.jpg" for i in range(args.items)]
        runs = []
        for repeat in range(args.repeats):
            saved, added = folder / f"saved-{repeat}.npy", folder / f"gallery-{repeat}"
            save_s = _timed(lambda path=saved: _save(path, source))
            saved.unlink()
            peak: list[float] = []
            before = time.process_time()
            add_s = _timed(lambda path=added, peak=peak: _add(path, ids, source, args.call, peak))
            runs.append(
                {"save_s": save_s, "add_s": add_s, "speed": save_s / add_s, "add_cpu_s": time.process_time() - before}
            )
        result = {
            "limit_speed": 0.5,
            "speed": statistics.median(run["speed"] for run in runs),
            "vectors_per_s": args.items / statistics.median(run["add_s"] for run in runs),
            "anonymous_memory_growth_mb": max(peak),
            "runs": runs,
        }
    write_result("gallery_add", result, out=args.output)


def _timed(call: Callable[[], None]) -> float:
    os.sync()  # what was written before must not be paid by this call
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _save(path: Path, vectors: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, vectors)
        file.flush()
        os.fsync(file.fileno())


def _add(path: Path, ids: list[str], vectors: np.ndarray, call: int, peak: list[float]) -> None:
    with Gallery.create(path, space("a", vectors.shape[1])) as gallery:
        before = resident_mb(anonymous=True)
        for start in range(0, len(ids), call):
            gallery.add(ids[start : start + call], vectors[start : start + call])
            peak.append(resident_mb(anonymous=True) - before)


if __name__ == "__main__":
    main()
