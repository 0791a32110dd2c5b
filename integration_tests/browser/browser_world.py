"""What the browser looks at: pictures with labels, two encoders, galleries of them, and services as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image, ImageDraw

LABELS = ("circle", "square", "triangle", "cross", "ring", "bars")
ADDRESS = re.compile(r"http://[\w.\[\]:-]+:\d+")

# What strangers may call their pictures, and write into their metadata: every value that could run, break a line, turn
# the direction of reading, leave a folder, or fill the screen.
SCRIPT = "window.hacked = 1"
HOSTILE = (
    f'<img src=x onerror="{SCRIPT}">.png',
    f'"><script>{SCRIPT}</script>',
    f"' onmouseover='{SCRIPT}' autofocus onfocus='{SCRIPT}",
    f"javascript:{SCRIPT}",
    "&lt;b&gt;&#x3C;svg/onload=" + SCRIPT + ">",
    "${" + SCRIPT + "} {{" + SCRIPT + "}}",
    "invoice\u202egnp.exe\u2066\u200f",
    "two\nlines\tand a tab",
    "../../../../etc/passwd?x=1#y&z=%2e%2e%00",
    "w" * 900,
)


# ------------------------------------------------------------------------------------------------ a gallery


def draw(label: str, seed: int) -> Image.Image:
    """64 x 64 pixels: one shape, somewhere, on a ground of another colour."""
    rng = np.random.default_rng(seed)
    paper, ink = (tuple(int(v) for v in rng.integers(low, high, 3)) for low, high in ((170, 256), (0, 130)))
    picture = Image.new("RGB", (64, 64), paper)
    pen = ImageDraw.Draw(picture)
    x, y = (int(v) for v in rng.integers(4, 18, 2))
    size = int(rng.integers(34, 43))
    box, middle = (x, y, x + size, y + size), (x + size // 2, y + size // 2)
    if label == "circle":
        pen.ellipse(box, fill=ink)
    elif label == "square":
        pen.rectangle(box, fill=ink)
    elif label == "triangle":
        pen.polygon([(x, y + size), (x + size, y + size), (middle[0], y)], fill=ink)
    elif label == "cross":
        pen.line([(x, y), (x + size, y + size)], fill=ink, width=9)
        pen.line([(x, y + size), (x + size, y)], fill=ink, width=9)
    elif label == "ring":
        pen.ellipse(box, outline=ink, width=7)
    else:
        for step in range(0, size, 12):
            pen.rectangle((x, y + step, x + size, y + step + 5), fill=ink)
    return picture


def write_photos(folder: Path, per_label: int) -> list[dict[str, Any]]:
    """Pictures as files: id, path and metadata of each."""
    folder.mkdir(parents=True)
    items = []
    for number in range(per_label):
        for position, label in enumerate(LABELS):
            path = folder / f"{label}-{number:02}.png"
            draw(label, seed=100 * position + number).save(path)
            metadata = {"label": label, "series": "even" if number % 2 == 0 else "odd", "number": number}
            items.append({"id": path.name, "path": path, "metadata": metadata})
    return items


def write_hostile(folder: Path) -> list[dict[str, Any]]:
    """Items whose ids, metadata keys and metadata values are hostile; the pictures are pictures."""
    folder.mkdir(parents=True)
    items = []
    for number, text in enumerate(HOSTILE):
        path = folder / f"{number}.png"
        draw("circle", seed=9000 + number).save(path)
        key = f"<img src=x onerror='{SCRIPT}'>{number}"
        items.append({"id": text, "path": path, "metadata": {"label": text, "series": text, key: text}})
    return items


def export_encoders(folder: Path, dims: dict[str, int]) -> dict[str, Path]:
    """Encoders of 16 x 16 grey pixels with random weights, exported: name -> folder."""
    import torch

    from bowerbird.encoders import save_encoder
    from bowerbird.encoders.configs import PerceptronConfig
    from bowerbird.encoders.perceptron import Perceptron

    for seed, (name, dim) in enumerate(dims.items()):
        config = {"image_size": 16, "depth": 0, "embed_dim": dim}
        torch.manual_seed(seed)
        save_encoder(Perceptron.build(PerceptronConfig(**config)), folder / name, use="core:perceptron", config=config)
    return {name: folder / name for name in dims}


def make_gallery(path: Path, encoder: Path, items: Sequence[dict[str, Any]]) -> Path:
    from bowerbird.encoders import load_encoder
    from bowerbird.gallery import Gallery

    loaded = load_encoder(encoder)
    with Gallery.create(path, loaded.space()) as gallery:
        gallery.add(
            [item["id"] for item in items],
            loaded.encode([item["path"] for item in items]),
            uris=[str(item["path"].resolve()) for item in items],
            metadata=[item["metadata"] for item in items],
        )
    return path


def move_half(path: Path, old: Path, new: Path) -> None:
    """Begin an upgrade by rank merge, with watched queries, and stop it half way, paused."""
    from bowerbird.encoders import load_encoder
    from bowerbird.gallery import Gallery
    from bowerbird.upgrade import Upgrade

    with Gallery.open(path) as gallery:
        upgrade = Upgrade(gallery, load_encoder(new), old=load_encoder(old))
        upgrade.run(strategy="rank-merge", label_key="label", watch_every=0.1, stop_at_share=0.5)
        upgrade.pause()


# ------------------------------------------------------------------------------------------------- services


@dataclass
class Service:
    """A command of ``bowerbird`` that serves, as a process on the loopback address. A context manager.

    Attributes:
        arguments: Of the command, without its port: ``["serve", GALLERY, ...]``.
        patience: Seconds to wait until it is there.
    """

    arguments: Sequence[str]
    patience: float = 180.0  # on a busy machine
    port: int = 0
    url: str = ""
    _process: subprocess.Popen[str] | None = None
    _printed: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, on the port that it had before, and wait until it is ready."""
        line = [sys.executable, "-m", "bowerbird", *self.arguments, "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._printed = []
        self._process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
        )
        found = threading.Event()
        threading.Thread(target=self._read, args=(self._process, found), daemon=True).start()
        if not found.wait(self.patience) or not self.url:
            self.stop()
            raise AssertionError(f"no address from {' '.join(line)}:\n{self.printed}")
        self.port = int(self.url.rsplit(":", 1)[1])
        self._wait_until_ready()

    def stop(self) -> int | None:
        """Ask it to stop, as an operator does, and give its exit code; kill it where it does not."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    @property
    def printed(self) -> str:
        return "".join(self._printed)

    def ask(self, path: str, body: Any = None, *, token: str | None = None) -> Any:
        """The JSON of an answer; a POST where there is a ``body``."""
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
            return json.load(answer)

    def _read(self, process: subprocess.Popen[str], found: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._printed.append(line)
                if (match := ADDRESS.search(line)) and not found.is_set():
                    self.url = match[0]
                    found.set()
        found.set()  # it has ended: do not let anybody wait for it

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            try:
                if self.ask("/ready")["ready"]:
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.05)
        self.stop()
        raise AssertionError(f"the service did not become ready:\n{self.printed}")
