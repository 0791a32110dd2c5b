"""`upgrade run` against the bare encoder on the same image files: how much of its speed does the worker keep?

Each task of the run is followed at once by `encoder.encode` of the same files in the same process, so that both see the
same machine. The limit is 95 % of the bare encoder's items per second (median over the pairs). The ratio of processor
time is given too: it hardly depends on what else the machine does.

python benchmarks/upgrade_run.py --output benchmarks/results/upgrade_run.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bowerbird.encoders import load_encoder
from bowerbird.gallery import Gallery, Space
from bowerbird.upgrade import ItemEncoder, begin
from bowerbird.upgrade.run import run
from common import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="core:efficientnet-lite?model=lite0")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--task-items", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, nargs=2, default=[320, 240], help="Of the JPEG images in pixels.")
    parser.add_argument("--threads", type=int, help="of the encoder; default: all cores")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    encoder = load_encoder(args.encoder)
    items = (args.pairs + 1) * args.task_items  # the first pair warms up
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [str(folder / f"{i}.jpg") for i in range(items)]
        for path in paths:
            small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(small).resize(args.size, Image.Resampling.BICUBIC).save(path, quality=90)
        old = Space("benchmark-old", "random vectors", 128)
        with Gallery.create(folder / "gallery", old) as gallery:
            gallery.add([f"item-{i}" for i in range(items)], rng.normal(size=(items, 128)), uris=paths)
            begin(gallery, encoder.space(), task_items=args.task_items)
            order = np.fromfile(next((folder / "gallery" / "plan").glob("*.i64")), np.int64)
            worked: list[tuple[float, float]] = []  # wall and processor seconds
            bare: list[tuple[float, float]] = []
            clock = _now()

            def after_batch(count: int, status: object) -> None:
                nonlocal clock
                if count:
                    return
                worked.append(_since(clock))
                start = len(bare) * args.task_items
                same = [paths[i] for i in order[start : start + args.task_items]]
                clock = _now()
                encoder.encode(same, batch_size=args.batch_size)
                bare.append(_since(clock))
                clock = _now()

            report = run(gallery, ItemEncoder(encoder, batch_size=args.batch_size), progress=after_batch)
    with_run, without = np.array(worked[1:]), np.array(bare[1:])
    wall, processor = np.median(without / with_run, axis=0).tolist()
    write_result(
        "upgrade_run",
        {
            "limit_ratio": 0.95,
            "ratio_wall": round(wall, 4),
            "ratio_processor": round(processor, 4),
            "ratios_wall": np.round((without / with_run)[:, 0], 4).tolist(),
            "ratios_processor": np.round((without / with_run)[:, 1], 4).tolist(),
            "run_items_per_second": args.task_items / float(np.median(with_run[:, 0])),
            "bare_items_per_second": args.task_items / float(np.median(without[:, 0])),
            "items": report.encoded,
            "task_items": args.task_items,
            "batch_size": args.batch_size,
            "encoder": args.encoder,
        },
        out=args.output,
    )


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, processor = _now()
    return wall - start[0], processor - start[1]


if __name__ == "__main__":
    main()
