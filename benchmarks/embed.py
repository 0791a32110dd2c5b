"""Images per second of ``LoadedEncoder.encode`` (from image files, decoding overlapped) against the bare forward pass
on ready tensors of the same batch size. The two are timed in turns, so that a busy machine slows both; the limit holds
for the median of the paired ratios.

    python benchmarks/embed.py --threads 1 --output benchmarks/results/embed.json
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bowerbird.encoders import load_encoder
from common import write_result

LIMIT = 0.95


def make_files(count: int, side: int, kind: str) -> list[bytes]:
    """Encoded pictures with structure (smooth noise), as JPEG or PNG."""
    generator = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, kind)
        files.append(buffer.getvalue())
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="core:efficientnet-lite?model=lite0")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=256, help="pixels of the pictures before preprocessing")
    parser.add_argument("--kind", default="JPEG", choices=["JPEG", "PNG"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    encoder = load_encoder(options.encoder)
    files = make_files(options.images, options.side, options.kind)
    preprocessing = encoder.module.preprocessing
    assert preprocessing is not None
    arrays = [preprocessing(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    ready = [
        torch.from_numpy(np.stack(arrays[start : start + options.batch_size])).to(encoder.device)
        for start in range(0, len(arrays), options.batch_size)
    ]

    def bare() -> None:
        with torch.inference_mode():
            for images in ready:
                encoder.module({"image": images}).pooled.cpu()

    def full() -> None:
        encoder.encode(files, batch_size=options.batch_size)

    def seconds(work: object) -> float:
        start = time.perf_counter()
        work()  # type: ignore[operator]
        return time.perf_counter() - start

    bare()
    full()
    pairs = []
    for turn in range(options.rounds):
        first, second = (bare, full) if turn % 2 == 0 else (full, bare)
        times = {first: seconds(first), second: seconds(second)}
        pairs.append((times[bare], times[full]))
    ratios = [b / f for b, f in pairs]
    write_result(
        "embed",
        {
            "limit_ratio": LIMIT,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "bare_images_per_second": options.images / min(b for b, _ in pairs),
            "encode_images_per_second": options.images / min(f for _, f in pairs),
            "threads": torch.get_num_threads(),
            "settings": {k: str(v) for k, v in vars(options).items()},
        },
        out=options.output,
    )


if __name__ == "__main__":
    main()
