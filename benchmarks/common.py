"""What every benchmark records beside its numbers: the command, versions and the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
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
