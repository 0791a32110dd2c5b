"""Sends hostile requests to a running ``bowerbird serve`` and judges what comes back.

    python integration_tests/serve/fuzz.py --requests 10000 --out benchmarks/results/serve_fuzz.json

Every answer must be 2xx, 304 or 4xx, every 4xx a problem as of RFC 9457, none may show a path of the server or take
long. Meanwhile and afterwards searches must work as before: no worker is stuck. Exits with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "core/tests"), str(ROOT / "benchmarks"), str(Path(__file__).parent)]

import httpx  # noqa: E402
import psutil  # noqa: E402
import serve_world  # noqa: E402
from hostile import DIM, TOKEN, Request, hostile_request  # noqa: E402

PATIENCE = 20.0  # seconds until an answer must be there
UNFINISHED = 0.5  # seconds to wait for an answer to bytes that may be no whole request
AT_ONCE = 8  # connections
CHECK_EVERY = 250  # requests
OPTIONS = ("--requests-per-minute=0", "--max-upload-mib=4", "--decode-seconds=5", "--label-key=label", "--device=cpu")
HEADERS = (b"content-security-policy: default-src 'none'", b"x-content-type-options: nosniff")
RESPONSE = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n(.*?)\r\n\r\n", re.DOTALL)
LENGTH = re.compile(rb"^content-length: (\d+)\r?$", re.MULTILINE)


@dataclass
class Findings:
    """What was seen, and what was wrong."""

    statuses: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    seconds: list[tuple[float, int, str]] = field(default_factory=list)  # with the request's number and family
    faults: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, number: int, request: Request, outcome: str, seconds: float, faults: list[str]) -> None:
        with self.lock:
            self.statuses.setdefault(request.family, collections.Counter())[outcome] += 1
            self.seconds.append((seconds, number, request.family))
            for fault in faults:
                sent = request.data[:300].decode("latin-1")
                self.faults.append({"number": number, "family": request.family, "fault": fault, "sent": sent})


def send(address: tuple[str, int], request: Request) -> tuple[bytes, bool]:
    """What comes back, and whether the server ended the connection or a whole answer came in time."""
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        with contextlib.suppress(OSError):  # refused while it was still being sent: the answer may be there
            connection.sendall(request.data)
        if not request.complete:
            return b"", True
        if request.family == "framing":
            connection.settimeout(UNFINISHED)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
                if b"text/event-stream" in answer or (_is_whole(answer) and request.family != "framing"):
                    return answer, True
        except TimeoutError:
            return answer, _is_whole(answer) or (request.family == "framing" and not answer)
        except OSError:
            pass
        return answer, True


def _is_whole(answer: bytes) -> bool:
    match = RESPONSE.match(answer)
    if match is None:
        return False
    length = LENGTH.search(match[2])
    # An answer to HEAD has a length and no body; the connection ends behind it.
    return length is not None and len(answer) >= match.end() + int(length[1])


def judge(request: Request, answer: bytes, ended: bool, secrets: tuple[bytes, ...]) -> tuple[str, list[str]]:
    """The status of the answer, and what is wrong with it."""
    if not request.complete:
        return "left", []
    if not ended:
        return "no answer", ["no answer in time"]
    if not answer:
        return "closed", [] if request.family == "framing" else ["the connection was closed without an answer"]
    faults = [f"the answer has {secret!r}" for secret in secrets if secret in answer]
    found = list(RESPONSE.finditer(answer))
    if not found or found[0].start() != 0:
        return "not HTTP", ["the answer is not HTTP"]
    first = found[0]
    status, head, body = int(first[1]), first[2], answer[first.end() :]
    if status == 100:
        return "100", faults
    for wanted in HEADERS:
        if wanted not in head.lower():
            faults.append(f"no header {wanted!r}")
    busy = status == 503 and b"retry-after" in head.lower()
    if not (200 <= status < 300 or status == 304 or 400 <= status < 500 or busy):
        faults.append(f"status {status}")
    if status >= 400 and not request.data.startswith(b"HEAD "):
        faults += _problem_faults(status, head, body)
    return str(status), faults


def _problem_faults(status: int, head: bytes, body: bytes) -> list[str]:
    if b"content-type: application/problem+json" not in head.lower():
        return [f"{status} is no problem"]
    length = LENGTH.search(head)
    try:
        problem = json.loads(body[: int(length[1])] if length else body)
        whole = problem["status"] == status and all(
            isinstance(problem[key], str) for key in ("type", "title", "detail")
        )
    except (ValueError, KeyError, TypeError):
        whole = False
    return [] if whole else [f"{status} has a broken problem"]


class Bystander:
    """An ordinary client, which must not notice anything."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=PATIENCE, headers={"Authorization": f"Bearer {TOKEN}"})
        self.slowest = 0.0
        self.searches = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()

    def faults(self) -> list[str]:
        """What does not work."""
        wrong = []
        vector = [1.0] * DIM
        for what, ask in (
            ("/health", lambda: self.client.get("/health")),
            ("/ready", lambda: self.client.get("/ready")),
            ("a search by picture", lambda: self.client.post("/v1/search/image", files=serve_world.upload(3))),
            ("a search by vector", lambda: self.client.post("/v1/search/vector", json={"vector": vector})),
            ("a search by item", lambda: self.client.post("/v1/search/item", json={"id": serve_world.photo_id(5)})),
            ("a thumbnail", lambda: self.client.get("/v1/thumbnail", params={"id": serve_world.photo_id(5)})),
        ):
            began = time.monotonic()
            try:
                answer = ask()
            except httpx.HTTPError as error:
                wrong.append(f"{what}: {error!r}")
                continue
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.searches += 1
            empty = "search" in what and answer.status_code == 200 and not answer.json()["hits"]
            if answer.status_code != 200 or empty:
                wrong.append(f"{what}: {answer.status_code} {answer.text[:300]}")
        return wrong


def fuzz(url: str, secrets: tuple[bytes, ...], *, count: int, seed: int, first: int = 0) -> tuple[Findings, Bystander]:
    """Send ``count`` hostile requests to a service; every ``CHECK_EVERY`` of them an ordinary client looks."""
    parts = urlsplit(url)
    address = (str(parts.hostname), int(parts.port or 80))
    findings = Findings()

    def one(number: int) -> None:
        request = hostile_request(number, seed)
        began = time.monotonic()
        try:
            answer, ended = send(address, request)
            outcome, faults = judge(request, answer, ended, secrets)
        except OSError as error:
            outcome, faults = "unreachable", [repr(error)]
        findings.note(number, request, outcome, time.monotonic() - began, faults)

    with ThreadPoolExecutor(AT_ONCE) as threads, Bystander(url) as bystander:
        for start in range(first, first + count, CHECK_EVERY):
            list(threads.map(one, range(start, min(start + CHECK_EVERY, first + count))))
            findings.faults += [
                {"number": start, "family": "bystander", "fault": fault} for fault in bystander.faults()
            ]
    return findings, bystander


@contextlib.contextmanager
def hostile_world(folder: Path) -> Iterator[tuple[serve_world.Running, tuple[bytes, ...]]]:
    """A service over a gallery of 60 pictures, asking for tokens, and what must never be in an answer."""
    old = serve_world.make_encoder(folder / "old", seed=1, dim=DIM)
    new = serve_world.make_encoder(folder / "new", seed=2, dim=32)
    photos = serve_world.make_photos(folder / "photos")
    gallery = serve_world.fill(folder / "gallery", old, photos)
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens = folder / "tokens.toml"
    tokens.write_text(f'[[token]]\nname = "fuzz"\nrole = "admin"\nsha256 = "{digest}"\n')
    secrets = (str(folder).encode(), sys.prefix.encode(), str(ROOT).encode(), b"Traceback", b'File \\"')
    with serve_world.running_server(gallery, *OPTIONS, f"--candidate=new={new}", f"--tokens={tokens}") as running:
        yield running, secrets


def server_faults(lines: list[str]) -> list[str]:
    """What the log of the service says about bugs: entries with a traceback, whole."""
    entries = re.split(r"^(?=\d{4}-\d\d-\d\d )", "".join(lines), flags=re.MULTILINE)
    return [entry.strip()[-600:] for entry in entries if "Traceback (most recent" in entry or " ERROR " in entry[:60]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="Number of the first request: to repeat a finding.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, hostile_world(Path(folder)) as (running, secrets):
        process = psutil.Process(running.process.pid)
        before = process.memory_info().rss
        began = time.monotonic()
        findings, bystander = fuzz(running.url, secrets, count=options.requests, seed=options.seed, first=options.first)
        seconds = time.monotonic() - began
        alive = running.process.poll() is None
        memory = (process.memory_info().rss - before) / 2**20 if alive else None
        code = running.stop()
    log = server_faults(running.lines)
    told = sorted(findings.seconds)
    result = {
        "seed": options.seed,
        "requests": len(told),
        "answers": {family: dict(sorted(counts.items())) for family, counts in sorted(findings.statuses.items())},
        "faults": findings.faults[:100],
        "faults_in_all": len(findings.faults),
        "faults_in_the_log": log[:100],
        "searches_of_an_ordinary_client_meanwhile": bystander.searches,
        "slowest_of_them_seconds": round(bystander.slowest, 3),
        "seconds": round(seconds, 1),
        "slowest_answers": [[round(took, 2), number, family] for took, number, family in told[:-6:-1]],
        "p99_seconds": round(told[int(0.99 * (len(told) - 1))][0], 3),
        "memory_grown_mib": None if memory is None else round(memory, 1),
        "exit_code_after_sigterm": code,
    }
    from common import write_result

    write_result("serve_fuzz", result, out=options.out)
    sys.exit(bool(findings.faults or log or not alive or code != 0))


if __name__ == "__main__":
    main()
