"""Searches over HTTP by wrk on the loopback interface, at 32 connections, against what would be possible at best.

    OMP_NUM_THREADS=1 python benchmarks/serve_http.py --output benchmarks/results/serve_http.json

By vector: `bowerbird serve` on 100,000 x 256, against FastAPI on uvicorn that answers the same requests with a constant
body of the same length, plus the time that FAISS alone takes for one search (`IndexFlatIP`: exact, as the gallery is):
at best 1 / (1 / constant + faiss) requests per second. `ratio_faiss_batched` takes the time of a query among as many in
one call as there are connections instead. With `--index ivf` the same of inverted lists, where a search costs little
and HTTP the most.

By picture: against the bare forward pass of the encoder on ready batches, in images per second.

Each subject and its limit are measured in turns. The clients run on the same machine, and share its processors.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bowerbird.gallery import Gallery
from common import serving, started, write_result
from gallery_common import clustered, space

LEAST_OF_VECTOR, LEAST_OF_IMAGE, MOST_P99 = 0.70, 0.90, 5.0
NLIST, NPROBE = 256, 8  # with --index ivf
QUERIES = 256
K = 10
BOUNDARY = "bowerbird-benchmark"

# A constant body from the framework, at any address: what no service on it can be faster than.
CONSTANT = """
import sys
import uvicorn
from fastapi import FastAPI, Response

body = open(sys.argv[1], "rb").read()
app = FastAPI()

@app.post("/v1/search/vector")
async def constant() -> Response:
    return Response(body, media_type="application/json")

config = uvicorn.Config(app, port=0, access_log=False, log_level="warning")
server = uvicorn.Server(config)
socket = config.bind_socket()
socket.listen()  # who reads the address may connect
print("http://127.0.0.1:%d" % socket.getsockname()[1], flush=True)
server.run([socket])
"""

LUA = """
local files, bodies = {FILES}, {}
for i, name in ipairs(files) do
  local file = io.open(name, "rb"); bodies[i] = file:read("*a"); file:close()
end
wrk.method = "POST"
wrk.headers["Content-Type"] = "TYPE"
local turn = 0
request = function()
  turn = turn % #bodies + 1
  return wrk.format(nil, nil, nil, bodies[turn])
end
done = function(summary, latency, requests)
  io.write(string.format("RESULT %d %d %d %f %f %f\\n", summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write
    + summary.errors.timeout, latency:percentile(50), latency:percentile(99), latency.max))
end
"""


def load(url: str, bodies: Sequence[Path], kind: str, seconds: float, connections: int) -> dict[str, float]:
    """What wrk measures: requests per second, errors, and milliseconds until the answer."""
    names = ", ".join(json.dumps(str(body)) for body in bodies)
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "load.lua"
        script.write_text(LUA.replace("FILES", names).replace("TYPE", kind))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "60s", "-s", str(script), url]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"RESULT (\S+) (\S+) (\S+) (\S+) (\S+) (\S+)", printed)
    assert found is not None, printed
    requests, microseconds, errors, p50, p99, most = map(float, found.groups())
    return {
        "per_second": requests / (microseconds / 1e6),
        "errors": errors,
        "p50_ms": p50 / 1e3,
        "p99_ms": p99 / 1e3,
        "max_ms": most / 1e3,
    }


def once(url: str, body: Path, kind: str) -> bytes:
    import urllib.request

    request = urllib.request.Request(url, body.read_bytes(), {"Content-Type": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: bytes = answer.read()
    return found


def by_vector(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(options.threads)
    vectors = clustered(options.items, options.dim, 0, 200)
    queries = clustered(QUERIES, options.dim, 1, 200)
    with Gallery.create(folder / "vectors", space("a", options.dim)) as gallery:
        gallery.add(
            [f"item-{i:06d}" for i in range(options.items)],
            vectors,
            metadata=[{"label": f"class {i % 200}", "year": 2000 + i % 25} for i in range(options.items)],
        )
        if options.index == "ivf":
            gallery.set_index("ivf", nlist=NLIST, nprobe=NPROBE)
    bodies = []
    for number, row in enumerate(queries):
        bodies.append(folder / f"vector-{number}.json")
        bodies[-1].write_text(json.dumps({"vector": [round(float(x), 7) for x in row], "k": K}))
    index: Any = faiss.IndexFlatIP(options.dim)
    if options.index == "ivf":
        index = faiss.IndexIVFFlat(index, options.dim, NLIST, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.nprobe = NPROBE
    index.add(vectors)
    # From four queries on a matrix product: by its default FAISS scans for each of them, which takes ten times as long.
    old = faiss.cvar.distance_compute_blas_threshold <= 1024  # it counted queries then, and numbers since
    faiss.cvar.distance_compute_blas_threshold = 4 if old else 4 * options.dim

    def faiss_seconds(at_once: int) -> float:
        """Of one query, where so many are asked in one call."""
        taken = []
        for start in range(0, QUERIES, at_once):
            began = time.perf_counter()
            index.search(queries[start : start + at_once], K)
            taken.append((time.perf_counter() - began) / at_once)
        return statistics.median(taken)

    kind = "application/json"
    rounds = []
    with serving(folder / "vectors", "--read-only") as (_, ours):
        path = "/v1/search/vector"
        answer = once(ours + path, bodies[0], kind)
        assert len(json.loads(answer)["hits"]) == K
        constant = folder / "constant.json"
        constant.write_bytes(answer)
        with started(sys.executable, "-c", CONSTANT, str(constant)) as (_, other):
            load(ours + path, bodies, kind, 2, options.connections)
            load(other + path, bodies, kind, 1, options.connections)
            for _ in range(options.rounds):
                single, batched = faiss_seconds(1), faiss_seconds(options.connections)
                limit = load(other + path, bodies, kind, options.seconds, options.connections)
                found = load(ours + path, bodies, kind, options.seconds, options.connections)
                rounds.append(
                    {
                        "served": found,
                        "constant": limit,
                        "faiss_ms": 1e3 * single,
                        "faiss_batched_ms": 1e3 * batched,
                        "ratio": found["per_second"] * (1 / limit["per_second"] + single),
                        "ratio_faiss_batched": found["per_second"] * (1 / limit["per_second"] + batched),
                        "p99_to_p50": found["p99_ms"] / found["p50_ms"],
                    }
                )
    return _summary(rounds, ("ratio", "ratio_faiss_batched", "p99_to_p50"))


def by_image(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from bowerbird.encoders import load_encoder
    from bowerbird.gallery.images import add_images

    torch.set_num_threads(options.threads)
    encoder = load_encoder(options.encoder, device="cpu")
    preprocessing = encoder.module.preprocessing
    assert preprocessing is not None
    rng = np.random.default_rng(0)
    pictures, bodies = [], []
    for number in range(64):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((options.side, options.side), Image.Resampling.BICUBIC).save(file, "JPEG")
        pictures.append(file.getvalue())
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="q.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        bodies.append(folder / f"picture-{number}")
        bodies[-1].write_bytes(head.encode() + pictures[-1] + f"\r\n--{BOUNDARY}--\r\n".encode())
    with Gallery.create(folder / "pictures", encoder.space()) as gallery:
        add_images(gallery, encoder, pictures, ids=[f"picture-{i}" for i in range(len(pictures))])
    arrays = np.stack([preprocessing(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures])
    ready = [torch.from_numpy(arrays[start : start + options.batch_size]) for start in range(0, 64, options.batch_size)]

    def bare() -> float:
        """Images per second."""
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < options.seconds:
            for batch in ready:
                encoder.forward({"image": batch})
                done += len(batch)
        return done / (time.perf_counter() - start)

    kind = f"multipart/form-data; boundary={BOUNDARY}"
    rounds = []
    with serving(folder / "pictures", "--read-only", "--device", "cpu") as (_, ours):
        path = "/v1/search/image"
        assert json.loads(once(ours + path, bodies[3], kind))["hits"][0]["id"] == "picture-3"
        load(ours + path, bodies, kind, 2, options.connections)
        for _ in range(options.rounds):
            limit = bare()
            found = load(ours + path, bodies, kind, options.image_seconds, options.connections)
            rounds.append({"served": found, "bare_per_second": limit, "ratio": found["per_second"] / limit})
    return _summary(rounds, ("ratio",))


def _summary(rounds: list[dict[str, Any]], keys: tuple[str, ...]) -> dict[str, Any]:
    """Medians over the rounds, and the rounds."""
    errors = sum(turn["served"]["errors"] for turn in rounds)
    medians = {key: statistics.median(turn[key] for turn in rounds) for key in keys}
    return {**medians, "errors": errors, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--index", choices=["exact", "ivf"], default="exact")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    # wrk counts answers within this time: the batches that are under way at its end are lost to the service's side.
    parser.add_argument("--image-seconds", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", default="core:efficientnet-lite?model=lite0")
    parser.add_argument("--side", type=int, default=256, help="pixels of the pictures that are sent")
    parser.add_argument("--batch-size", type=int, default=32, help="of the bare encoder, and of the service")
    parser.add_argument("--only", choices=["vector", "image"])
    parser.add_argument("--folder", type=Path, help="where the galleries are made; default: a temporary folder")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark needs wrk (Debian: apt-get install wrk)")
    result: dict[str, Any] = {
        "limits": {
            "vector_ratio_at_least": LEAST_OF_VECTOR,
            "vector_p99_to_p50_below": MOST_P99,
            "image_ratio_at_least": LEAST_OF_IMAGE,
        },
        "settings": {key: str(value) for key, value in vars(options).items()},
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.only != "image":
            result["vector"] = by_vector(Path(folder), options)
        if options.only != "vector":
            result["image"] = by_image(Path(folder), options)
    write_result("serve_http", result, out=options.output)


if __name__ == "__main__":
    main()
