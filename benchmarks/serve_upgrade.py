"""Ten minutes of a service with everything going on: searches, uploads, deletes, an upgrade that is paused and resumed.

    OMP_NUM_THREADS=1 python benchmarks/serve_upgrade.py --output benchmarks/results/serve_upgrade.json

`bowerbird serve` on pictures under one encoder is asked, by clients of this process, for searches by vector at random
moments at a fixed rate (each is counted from the moment at which it was due, so that a stall is seen by all that wait
through it), for searches by picture, thumbnails, uploads and deletes; a stream of events is read all the time. After a
while without an upgrade it begins one by `rank-merge`, with a background worker that takes what it can get, pauses and
resumes it again and again, finishes it, and goes on for a while.

Held against: p99 of searches by vector while items are moved at most 2 times that before; no error of any request; the
service's own memory (anonymous pages, without the mapped vectors, which grow with the new space) flat: below 1 MB a
minute, after the encoders are loaded and half a minute has passed.

The clients and the worker share the machine's processors with the service.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from bowerbird.gallery import Gallery
from common import serving, write_result

MOST_P99, MOST_SLOPE = 2.0, 1.0  # times; MB a minute
WARM_SECONDS = 30.0
CYCLE = (45.0, 15.0)  # seconds running, seconds paused
BOUNDARY = "bowerbird-benchmark"
DISTINCT = 400  # pictures; items share them
MIB = 2**20


class Client:
    """A keep-alive connection for HTTP/1.1, as small as can be: it shares the processor with the service."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> tuple[int, bytes]:
        """``(status, body)``; status 0 where the connection failed."""
        try:
            if self._reader is None or self._writer is None:
                self._reader, self._writer = await asyncio.open_connection(self.host, self.port)
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: {kind}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            self._writer.write(head.encode() + body)
            found = await self._reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", found, re.IGNORECASE)
            answer = await self._reader.readexactly(int(length[1])) if length else b""
            if b"connection: close" in found.lower():
                self.close()
            return int(found[9:12]), answer
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            return 0, str(error).encode()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


class Load:
    """Requests of several kinds at random moments, each kind at its own rate.

    Attributes:
        phase: What is going on now; every request is booked on the phase at which it was due.
        taken: ``(kind, phase) -> milliseconds`` of every request that was answered with 2xx.
        errors: What was not.
    """

    def __init__(self, host: str, port: int, connections: int) -> None:
        self.host, self.port = host, port
        self.phase = "before"
        self.taken: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self._idle: asyncio.Queue[Client] = asyncio.Queue()
        for _ in range(connections):
            self._idle.put_nowait(Client(host, port))
        self._asked: set[asyncio.Task[None]] = set()

    async def send(self, kind: str, rate: float, requests: AsyncIterator[tuple[Any, ...]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        due = time.perf_counter()
        async for request in requests:
            due += rng.exponential(1 / rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self._one(kind, due, self.phase, request))
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)

    async def _one(self, kind: str, due: float, phase: str, request: tuple[Any, ...]) -> None:
        client = await self._idle.get()
        status, answer = await client.ask(*request)
        self._idle.put_nowait(client)
        if 200 <= status < 300:
            self.taken[kind, phase].append(1e3 * (time.perf_counter() - due))
        else:
            self.errors.append(f"{kind} ({phase}): {status} {answer[:300].decode(errors='replace')}")

    async def control(self, verb: str, **body: Any) -> dict[str, Any]:
        """A request about the upgrade, beside the load."""
        client = Client(self.host, self.port)
        method, path = ("GET", "/v1/upgrade") if verb == "view" else ("POST", f"/v1/upgrade/{verb}")
        status, answer = await client.ask(method, path, json.dumps(body).encode() if body else b"")
        client.close()
        if status != 200:
            self.errors.append(f"{verb}: {status} {answer[:300].decode(errors='replace')}")
            raise SystemExit(self.errors[-1])
        found: dict[str, Any] = json.loads(answer)
        return found

    async def listen(self) -> None:
        """Read the stream of events, as the page does."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(f"GET /v1/events HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n\r\n".encode())
        with contextlib.closing(writer):
            while await reader.read(65536):
                pass
        self.errors.append("events: the stream ended")


# ------------------------------------------------------------------------------------------------------- the world


def pictures(rng: np.random.Generator, count: int) -> list[bytes]:
    made = []
    for _ in range(count):
        file = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((256, 192), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def make_gallery(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A gallery of the old encoder, and vectors of queries in both spaces by fingerprint."""
    import torch

    from bowerbird.encoders import load_encoder

    torch.set_num_threads(1)
    old, new = (load_encoder(ref, device="cpu") for ref in (options.old, options.new))
    (folder / "pictures").mkdir()
    files = []
    for number, content in enumerate(pictures(np.random.default_rng(0), DISTINCT)):
        files.append(str(folder / "pictures" / f"{number}.jpg"))
        Path(files[-1]).write_bytes(content)
    vectors = old.encode(files)
    began = time.perf_counter()
    queries = new.encode(files[:64])
    rate = 64 / (time.perf_counter() - began)
    # A worker of the lowest priority gets what is left: about a third, and it is to be done in half of the time.
    items = options.items or max(200, int(rate * 0.33 * options.minutes * 30))
    with Gallery.create(folder / "gallery", old.space()) as gallery:
        for start in range(0, items, 5000):
            rows = np.arange(start, min(start + 5000, items))
            gallery.add(
                [f"item-{row:06d}" for row in rows],
                vectors[rows % DISTINCT],
                uris=[files[row % DISTINCT] for row in rows],
                metadata=[{"year": int(2000 + row % 25)} for row in rows],
            )
        gallery.register_space(new.space())
    return {
        "items": items,
        "encoder_items_per_second": round(rate, 1),
        "queries": {old.fingerprint: vectors[:64], new.fingerprint: queries},
    }


# -------------------------------------------------------------------------------------------------------- requests


async def vector_searches(queries: dict[str, np.ndarray]) -> AsyncIterator[tuple[Any, ...]]:
    bodies = [
        json.dumps({"vectors": {name: rows[n].tolist() for name, rows in queries.items()}, "k": 10}).encode()
        for n in range(64)
    ]
    number = 0
    while True:
        yield "POST", "/v1/search/vector", bodies[number % 64]
        number += 1


def multipart(parts: list[tuple[str, str | None, bytes]]) -> tuple[bytes, str]:
    body = b""
    for name, file, content in parts:
        named = f'; filename="{file}"' if file else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        body += head.encode() + content + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={BOUNDARY}"


async def picture_searches(sent: list[bytes]) -> AsyncIterator[tuple[Any, ...]]:
    number = 0
    while True:
        yield "POST", "/v1/search/image", *multipart([("file", "q.jpg", sent[number % len(sent)])])
        number += 1


async def uploads(sent: list[bytes], there: list[str]) -> AsyncIterator[tuple[Any, ...]]:
    number = 0
    while True:
        ids = [f"upload-{number}-{part}" for part in range(2)]
        items = json.dumps([{"id": name, "metadata": {"year": 2026}} for name in ids]).encode()
        files = [("files", f"{name}.jpg", sent[(number + i) % len(sent)]) for i, name in enumerate(ids)]
        yield "POST", "/v1/items", *multipart([("items", None, items), *files])
        there += ids
        number += 1


async def deletes(there: list[str]) -> AsyncIterator[tuple[Any, ...]]:
    while True:
        gone, there[:8] = there[:8], []
        yield "POST", "/v1/items/delete", json.dumps({"ids": gone or ["item-000001"]}).encode()


async def looks(items: int) -> AsyncIterator[tuple[Any, ...]]:
    number = 0
    while True:
        yield "GET", f"/v1/thumbnail?id=item-{(number * 37) % (items - 2) + 2:06d}&size=128"
        yield "GET", "/v1/gallery"
        yield "GET", "/v1/upgrade"
        number += 1


# ---------------------------------------------------------------------------------------------------------- the run


async def sample_memory(pid: int, samples: list[tuple[float, str, float, float]], load: Load) -> None:
    while True:
        text = Path(f"/proc/{pid}/status").read_text()
        found = {name: int(value) / 1024 for name, value in re.findall(r"(RssAnon|RssFile):\s+(\d+)", text)}
        samples.append((time.monotonic(), load.phase, found["RssAnon"], found["RssFile"]))
        await asyncio.sleep(1)


def slope(samples: list[tuple[float, str, float, float]], phases: tuple[str, ...], column: int) -> float | None:
    """MB a minute, from ``WARM_SECONDS`` after the first of these phases began to the end of the last."""
    inside = [sample for sample in samples if sample[1] in phases]
    inside = [sample for sample in inside if sample[0] - inside[0][0] > WARM_SECONDS]
    if len(inside) < 20:
        return None
    times = np.array([sample[0] for sample in inside]) / 60
    return float(np.polyfit(times, [sample[column] for sample in inside], 1)[0])


async def drive(load: Load, minutes: float) -> dict[str, Any]:
    """The upgrade, from before it begins until after it is finished."""
    seconds, began = 60 * minutes, time.monotonic()
    await asyncio.sleep(0.2 * seconds)
    load.phase = "starting"
    view = await load.control("start", candidate="new", strategy="rank-merge", watch_every=0.1)
    number, pauses = view["id"], 0
    running, paused = CYCLE if minutes >= 5 else (5.0, 3.0)
    load.phase, since, moving = "running", time.monotonic(), 0.0
    while True:
        await asyncio.sleep(0.5)
        view = await load.control("view")
        if view["worker"]["state"] == "failed":
            raise SystemExit(f"the worker failed: {view['worker']['error']}")
        if view["state"] == "complete" and view["worker"]["state"] == "done":
            moving += time.monotonic() - since
            break
        if view["state"] == "running" and time.monotonic() - since > running:
            moving += time.monotonic() - since
            await load.control("pause", id=number)
            pauses += 1
            while (await load.control("view"))["worker"]["state"] != "paused":
                await asyncio.sleep(0.2)
            load.phase = "paused"
            await asyncio.sleep(paused)
            await load.control("resume", id=number)
            load.phase, since = "running", time.monotonic()
        if time.monotonic() - began > 3 * seconds:
            raise SystemExit(f"not done after {3 * minutes} minutes: {view['share']:.0%}; fewer --items would be")
    load.phase = "ending"
    await load.control("finish", id=number)
    await asyncio.sleep(2)
    load.phase = "after"
    await asyncio.sleep(max(0.1 * seconds, seconds - (time.monotonic() - began)))
    return {
        "minutes": round((time.monotonic() - began) / 60, 2),
        "pauses": pauses,
        "moved": view["new_items"],
        "moved_per_second": round(view["new_items"] / moving, 1),
        "measurements": len(view["curve"]),
    }


async def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    world = await asyncio.to_thread(make_gallery, folder, options)
    candidate = ("--candidate", f"new={options.new}", "--device", "cpu", "--backfill-nice", str(options.nice))
    with serving(folder / "gallery", *candidate) as (process, address):
        host, port = str(urlsplit(address).hostname), urlsplit(address).port or 80
        load = Load(host, port, options.connections)
        sent, there = pictures(np.random.default_rng(1), 50), list[str]()
        samples: list[tuple[float, str, float, float]] = []
        kinds = {
            "vector": (options.rate, vector_searches(world.pop("queries"))),
            "image": (2.0, picture_searches(sent)),
            "upload": (0.5, uploads(sent, there)),
            "delete": (0.1, deletes(there)),
            "look": (2.0, looks(world["items"])),
        }
        beside = [
            asyncio.create_task(load.send(kind, rate, requests, seed))
            for seed, (kind, (rate, requests)) in enumerate(kinds.items())
        ]
        beside += [asyncio.create_task(sample_memory(process.pid, samples, load)), asyncio.create_task(load.listen())]
        try:
            driven = await drive(load, options.minutes)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)
        for task in beside:
            if not task.cancelled() and task.exception() is not None:
                load.errors.append(f"a client failed: {task.exception()!r}")
    found = {
        f"{kind}, {phase}": {
            "requests": len(taken),
            **{f"p{q}_ms": round(float(np.percentile(taken, q)), 2) for q in (50, 90, 99)},
            "max_ms": round(max(taken), 2),
        }
        for (kind, phase), taken in sorted(load.taken.items())
    }
    p99 = {phase: found[f"vector, {phase}"]["p99_ms"] for phase in ("before", "running", "paused", "after")
           if f"vector, {phase}" in found}  # fmt: skip
    during = ("running", "paused", "ending", "after")
    return {
        "limits": {"p99_ratio_at_most": MOST_P99, "errors": 0, "mb_per_minute_below": MOST_SLOPE},
        "settings": {key: str(value) for key, value in vars(options).items()},
        "p99_ratio": round(p99["running"] / p99["before"], 3),
        "p99_ratio_to_paused": round(p99["running"] / p99["paused"], 3) if "paused" in p99 else None,
        "errors": len(load.errors),
        "first_errors": load.errors[:10],
        "mb_per_minute": slope(samples, during, 2),
        "mb_per_minute_before": slope(samples, ("before",), 2),
        "mapped_mb_per_minute": slope(samples, during, 3),
        "rss_anon_mb": {"first": samples[0][2], "last": samples[-1][2], "most": max(s[2] for s in samples)},
        "rss_anon_every_15_s": [[phase, round(anonymous, 1)] for _, phase, anonymous, _ in samples[::15]],
        **world,
        **driven,
        "requests": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--items", type=int, help="default: what the worker should get done in half of the time")
    parser.add_argument("--nice", type=int, default=19, help="of the worker, as `serve --backfill-nice`")
    parser.add_argument("--rate", type=float, default=40, help="searches by vector per second")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--old", default="core:efficientnet-lite?image_size=96")
    parser.add_argument("--new", default="core:efficientnet-lite?image_size=128")
    parser.add_argument("--folder", type=Path, help="where the gallery is made; default: a temporary folder")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = asyncio.run(run(Path(folder), options))
    write_result("serve_upgrade", result, out=options.output)


if __name__ == "__main__":
    main()
