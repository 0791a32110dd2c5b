"""What a demo needs before it starts: what must be installed, a folder of its own, and a clock."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

from bowerbird.errors import GalleryError, InputError, MissingExtraError, UnknownNameError
from bowerbird.registry import get_registry

MARKER = "demo.json"  # in every folder of a demo
RECORDS = (
    ("dataset", "emoji:styles", "bowerbird-emoji"),
    ("objective", "compat:bct", "bowerbird-compat"),
    ("encoder", "core:efficientnet-lite", "bowerbird-core[lite]"),
)


class Clock:
    """Times the steps and says what is done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.steps: list[dict[str, Any]] = []
        self._say = say

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.steps.append({"name": name, "seconds": round(seconds, 2), "what": what})
        self._say(f"{name:<12} {seconds:6.1f} s  {what}")


def check_installed(extra: str, *modules: str) -> None:
    """Raises ``MissingExtraError`` where a part of the demo, or one of ``modules`` (of ``extra``), is missing."""
    registry = get_registry()
    for kind, name, package in RECORDS:
        try:
            registry.get(kind, name)
        except UnknownNameError as error:
            raise MissingExtraError(f"the demo uses {name}. Install it: pip install {package}") from error
    for module in modules:
        if util.find_spec(module) is None:
            raise MissingExtraError(f"this demo uses {module}. Install it: pip install 'bowerbird-core[{extra}]'")


def own_folder(out: Path, *, keep: bool = False) -> None:
    """A folder of a demo at ``out``, empty unless ``keep``.

    Raises ``GalleryError`` where something else than an earlier demo is there, ``InputError`` where it is being served.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).is_file():
            raise GalleryError(f"{out} is not empty and holds no demo. Choose another folder with --out.")
        if keep:
            return
        with only_one(out):
            shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("{}\n")  # from now on this is a demo's folder, also if the demo is interrupted


@contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Held while the demo of ``out`` is served: its galleries must stay. The lock ends with its process.

    Raises ``InputError`` where another process holds it.
    """
    with (out / "serving.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process serves the demo of {out}; end it, or choose another --out") from error
        yield
