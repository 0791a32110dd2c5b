"""Reading videos: time, waiting, memory. ``python benchmarks/videotext_data.py``.

1. Processor time to write a video of ``videotext:moving``, and to read a clip of it for training.
2. How long the small recipes wait for data: each is trained for some steps by the loop of ``bowerbird train``, on files
   that are there already, and its ``timing.json`` read. The share means something on a machine with a free core for the
   worker process only. Beside it stand processor times, which others on the machine do not change: while reading a
   batch takes less than a step, one worker keeps up.
3. The most memory of a process that samples eight frames of a film of an hour (25 frames a second, a keyframe every
   ten seconds) in 480, 1080 and 2160 lines, everything included: interpreter, numpy, FFmpeg.

    python benchmarks/videotext_data.py --output benchmarks/results/videotext_data.json
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from common import write_result

ROOT = Path(__file__).parents[1]
WAIT_LIMIT = 0.10
MEMORY_LIMIT = 300e6  # bytes
HEIGHTS = (480, 1080, 2160)
RATE, HOUR, KEYFRAME = 25, 3600, 250  # frames a second, seconds, frames
CLIPS = 128  # of the first part
STEPS, READ = 60, 6  # batches trained on; batches read beside

_CHILD = """
import json, re, sys, time
import numpy as np
from bowerbird.data.images import Preprocessing
from bowerbird_videotext.transforms import ClipTransform
start = time.process_time()
transform = ClipTransform(Preprocessing(size=224), 8, captions=False)
clip = transform({"video": sys.argv[1]}, np.random.default_rng(0))["video"]
assert clip.shape == (8, 3, 224, 224) and "torch" not in sys.modules
status = open("/proc/self/status").read()  # not getrusage: its peak is also that of the process that started this one
print(json.dumps({
    "peak_bytes": 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]),
    "cpu_seconds": round(time.process_time() - start, 2),
}))
"""


def moving_times(folder: Path) -> dict[str, float]:
    """Milliseconds of processor time per video."""
    from bowerbird.data.images import Preprocessing
    from bowerbird_videotext.data_configs import MovingConfig
    from bowerbird_videotext.moving import Moving
    from bowerbird_videotext.transforms import ClipTransform

    dataset = Moving.build(MovingConfig(root=folder, counts={"train": CLIPS}), "train")
    transform = ClipTransform(Preprocessing(size=32), 4)
    dataset.captions(0)  # the words of all videos are chosen at once
    times = {}
    start = time.process_time()
    items = [dataset[i] for i in range(CLIPS)]
    times["write_ms"] = 1000 * (time.process_time() - start) / CLIPS
    start = time.process_time()
    for i, item in enumerate(items):
        transform(item, np.random.default_rng(i))
    times["read_ms"] = 1000 * (time.process_time() - start) / CLIPS
    return {name: round(value, 3) for name, value in times.items()}


def waiting(file: Path, folder: Path, workers: int | None) -> dict[str, Any]:
    """What a recipe waits for its data; see the page of the module."""
    import torch

    from bowerbird.recipe import load_recipe
    from bowerbird.train.data import TrainItems, collate
    from bowerbird.train.loop import build, train
    from bowerbird.train.run import TrainContext

    changes = ["train.epochs=1", "train.warmup=0", "evaluate=[]", "train.device=cpu", "train.checkpoint_every=100000"]
    if workers is not None:
        changes.append(f"train.workers={workers}")
    size = load_recipe(file, changes).train.batch_size
    changes.append(f"dataset.counts={{train = {STEPS * size}}}")
    recipe = load_recipe(file, changes)
    dataset = build(recipe.dataset, "dataset", recipe.dataset.split)
    for i in range(len(dataset)):
        dataset[i]  # writes it
    before = resource.getrusage(resource.RUSAGE_SELF)
    train(recipe, folder)
    after = resource.getrusage(resource.RUSAGE_SELF)
    timing = json.loads((folder / "timing.json").read_text())
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    encoder = build(recipe.encoder, "encoder")
    context = TrainContext(dataset, total_steps=STEPS, seed=0, device=torch.device("cpu"))
    transform = build(recipe.objective, "objective", encoder, context).item_transform()
    items = TrainItems(dataset, encoder.preprocessing, augment="none", seed=0, transform=transform)
    start = time.process_time()
    for batch in range(READ):
        collate([items[0, batch * size + i] for i in range(size)], getattr(encoder, "tokenize", None))
    read = time.process_time() - start
    return {
        "workers": recipe.train.workers,
        "batch_size": size,
        "steps": timing["steps"],
        "wait_share": timing["data_wait_share"],
        "read_cpu_ms": round(1000 * read / READ, 2),
        "step_cpu_ms": round(1000 * seconds / timing["steps"], 2),
    }


def film(path: Path, height: int) -> None:
    """A film of an hour: ten seconds are encoded, and their packets written again and again."""
    width = height * 16 // 9 // 2 * 2
    picture = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    picture = picture.repeat(20, axis=0).repeat(20, axis=1)[:height, :width]
    height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "x264-params": f"keyint={KEYFRAME}:bframes=0:scenecut=0"}
        packets = []
        for i in range(KEYFRAME):
            moved = np.ascontiguousarray(np.roll(picture, 4 * (i // 25), axis=1)[:height, :width])
            packets += stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24"))
        packets += stream.encode()
        data = [(bytes(packet), packet.is_keyframe, packet.duration, packet.time_base) for packet in packets]
        for number in range(RATE * HOUR):
            content, is_key, duration, unit = data[number % KEYFRAME]
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.is_keyframe = stream, unit, is_key
            packet.pts = packet.dts = number * int(1 / (RATE * unit))
            packet.duration = duration
            container.mux(packet)


def memory(folder: Path, heights: Sequence[int]) -> dict[str, Any]:
    found = {}
    for height in heights:
        path = folder / f"film-{height}.mp4"
        film(path, height)
        out = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=True)
        found[str(height)] = {**json.loads(out.stdout), "file_bytes": path.stat().st_size}
        path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="default: every recipes/moving-*.toml")
    parser.add_argument("--parts", nargs="+", choices=("moving", "waiting", "memory"), help="default: all")
    parser.add_argument("--heights", nargs="+", type=int, default=HEIGHTS)
    parser.add_argument("--workers", type=int, help="default: those of the recipe")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    parts = options.parts or ("moving", "waiting", "memory")
    result: dict[str, Any] = {"wait_limit": WAIT_LIMIT, "memory_limit": MEMORY_LIMIT}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "moving" in parts:
            result["moving"] = moving_times(folder / "moving")
        if "memory" in parts:
            result["memory"] = memory(folder, options.heights)
            result["memory_within_limit"] = all(one["peak_bytes"] < MEMORY_LIMIT for one in result["memory"].values())
        if "waiting" in parts:
            import torch

            torch.set_num_threads(1)
            files = options.recipes or sorted(ROOT.glob("recipes/moving-*.toml"))
            result["waiting"] = {file.stem: waiting(file, folder / file.stem, options.workers) for file in files}
            result["wait_within_limit"] = all(one["wait_share"] <= WAIT_LIMIT for one in result["waiting"].values())
    write_result("videotext_data", result, out=options.output)


if __name__ == "__main__":
    main()
