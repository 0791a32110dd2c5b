"""What every benchmark records beside its numbers: the command, versions and the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

LIBRARIES = ("bowerbird-core", "numpy", "torch", "torchvision", "timm", "faiss-cpu", "pillow", "pluggy", "click")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    load = os.getloadavg()[0]  # a busy machine makes absolute times worthless and ratios noisy
    return {"system": platform.platform(), "processor": model, "cores": os.cpu_count(), "load_average": load}


# What torch's tuning guide asks of an allocator, said to glibc: blocks that are freed stay with the process. By default
# large ones go back to the system, which hands cleared pages out again a moment later.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}  # bytes
# And large pages: which of two equal indexes is the faster one is not decided by where its small pages came to lie.
HUGE_PAGES = {**KEEP_MEMORY, "MALLOC_TOP_PAD_": str(1 << 26), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def start_again(settings: Mapping[str, str]) -> None:
    """Start this process again where the C library, which reads its settings once, does not have just these."""
    environment = {key: value for key, value in os.environ.items() if key not in HUGE_PAGES} | settings
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def result_with_default_memory(script: str, *arguments: str) -> dict[str, Any]:
    """The result of a benchmark that has ``--malloc``, where the C library is left as it is."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, script, *arguments, "--malloc", "default", "--output", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(output.read_text())["result"]
    return found


def write_result(name: str, result: dict[str, Any], *, out: Path | None = None) -> None:
    """Print ``result`` as JSON and, where ``out`` is given, write it there with command, versions and machine."""
    whole = {
        "benchmark": name,
        "command": shlex.join(["python", *sys.argv]),
        "result": result,
        "versions": versions(),
        "machine": machine(),
    }
    text = json.dumps(whole, indent=1)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


@contextmanager
def serving(gallery: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`bowerbird serve` of a gallery on a free port, without a limit of requests: its process and its address."""
    command = (sys.executable, "-m", "bowerbird", "serve", str(gallery), "--port", "0", "--requests-per-minute", "0")
    with started(*command, *options) as found:
        yield found


@contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and the address that it prints."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            address = re.search(r"http://[\w.]+:\d+", line)
            if address:
                yield process, address[0]
                break
        else:
            raise SystemExit(f"{command[0]} ended before it printed an address")
    finally:
        process.terminate()
        process.wait(60)


def shortest(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, float]:
    """Seconds of processor time of each case, the least of ``rounds``: others on the machine disturb that least.

    The cases take turns, each round in another order; a round before them warms up. ``within``: what a case runs in,
    outside the clock.
    """
    best = dict.fromkeys(cases, float("inf"))
    names = list(cases)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with within[name]() if within and name in within else nullcontext():
                start = time.process_time()
                cases[name]()
                if turn:
                    best[name] = min(best[name], time.process_time() - start)
    return best


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most that torch's allocator holds during ``step``, above what it held before it, by its own record."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
