"""A small world for the tests of the service: pictures of six colours, two small encoders, and a service in front.

``served`` is starlette's test client on the application itself, in this process; ``running_server`` is ``bowerbird
serve`` in a process of its own, on a port that the system chose. Fixtures are imported by the tests that use them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import upgrade_world
from fastapi.testclient import TestClient
from PIL import Image

from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.open import open_gallery
from bowerbird.registry import get_registry
from bowerbird.serve.app import create_app
from bowerbird.serve.settings import ServeSettings

SIDE = 16
PHOTOS = 60
LABELS = ("dots", "rings", "bars", "steps", "waves", "marks")
START_SECONDS = 60


def picture(number: int) -> Image.Image:
    """Picture ``number``: a pattern of its label, a little different each time."""
    label = number % len(LABELS)
    rng = np.random.default_rng([5, number])
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    patterns = (
        (x % 4 < 2) & (y % 4 < 2),
        ((x - 7.5) ** 2 + (y - 7.5) ** 2) % 40 < 18,
        x % 5 < 2,
        (x + y) % 8 < 3,
        np.sin(x * 0.9) + np.cos(y * 0.6) > 0.3,
        (x > 8) ^ (y > 8),
    )
    grey = 60 + 130 * patterns[label] + rng.normal(0, 22, (SIDE, SIDE))
    shade = np.array([1.0, 0.9, 0.8]) * grey[..., None]
    return Image.fromarray(shade.clip(0, 255).astype(np.uint8))


def label_of(number: int) -> str:
    return LABELS[number % len(LABELS)]


def photo_id(number: int) -> str:
    return f"{label_of(number)}/{number:03d}.png"


def picture_bytes(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(number).save(file, kind)
    return file.getvalue()


def make_photos(folder: Path, count: int = PHOTOS) -> Path:
    """``folder/LABEL/NNN.png``."""
    for number in range(count):
        path = folder / photo_id(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


def make_encoder(folder: Path, *, seed: int, dim: int) -> Path:
    """An exported ``core:perceptron`` that reads pictures of 16 x 16. Untrained: neighbours stay neighbours."""
    import torch

    from bowerbird.encoders import save_encoder
    from bowerbird.encoders.configs import PerceptronConfig
    from bowerbird.encoders.perceptron import Perceptron

    settings = {"image_size": SIDE, "embed_dim": dim, "depth": 1, "width": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Perceptron.build(PerceptronConfig(**settings))
    save_encoder(encoder, folder, use="core:perceptron", config=settings)
    return folder


@pytest.fixture(scope="session")
def old_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoders") / "old", seed=1, dim=24)


@pytest.fixture(scope="session")
def new_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoders") / "new", seed=2, dim=32)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"))


def fill(path: Path, encoder: Path, photos: Path) -> Path:
    """A gallery of the folder ``photos`` under an encoder, with the metadata ``label`` and ``number``."""
    from bowerbird.encoders import load_encoder
    from bowerbird.gallery.images import add_images

    loaded = load_encoder(encoder, device="cpu")
    files = sorted(photos.rglob("*.png"))
    with Gallery.create(path, loaded.space()) as gallery:
        add_images(
            gallery,
            loaded,
            files,
            ids=[file.relative_to(photos).as_posix() for file in files],
            metadata=[{"label": file.parent.name, "number": int(file.stem)} for file in files],
        )
    return path


@pytest.fixture
def gallery_path(tmp_path: Path, old_encoder: Path, photos: Path) -> Path:
    """A fresh gallery of the photos under the old encoder."""
    return fill(tmp_path / "gallery", old_encoder, photos)


def settings_for(gallery: Path | str, **settings: Any) -> ServeSettings:
    given: dict[str, Any] = {"requests_per_minute": 0, "device": "cpu", "label_key": "label", **settings}
    return ServeSettings(gallery=str(gallery), **given)


@contextlib.contextmanager
def served(gallery: Path | str, **settings: Any) -> Iterator[TestClient]:
    """The application of a gallery, started; ``client.app.state.server`` is its ``Server``."""
    app = create_app(settings_for(gallery, **settings))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


def upload(number: int, name: str = "query.png") -> dict[str, Any]:
    """The ``files=`` of a search by picture ``number``."""
    return {"file": (name, picture_bytes(number), "image/png")}


@pytest.fixture
def world() -> Iterator[None]:
    """The strategy ``world:two-queries``, in this process: the old part is searched by the old encoder's vectors."""
    get_registry().register_module("world", upgrade_world)
    yield
    get_registry().unregister("world")


def begin_upgrade(gallery: Path, new_encoder: Path, *, strategy: str = "world:two-queries", **settings: Any) -> None:
    """Begin an upgrade from outside of the service, as the command line does; nothing is moved yet.

    ``core:compatible``, which other processes know too, claims that the encoders are compatible: they are not, but what
    is served then is served by its rules.
    """
    from bowerbird.encoders import load_encoder
    from bowerbird.upgrade import begin

    space = load_encoder(new_encoder, device="cpu").space()
    with open_gallery(gallery) as opened:
        if strategy == "core:compatible":
            opened.register_space(space)
            opened.relate(space.fingerprint, opened.snapshot().serving)
        begin(opened, space, strategy=strategy, **{"task_items": 5, **settings})


def move(gallery: Path, new_encoder: Path, *, share: float | None = None) -> None:
    """Move items to the new space until their share is ``share``; all of them by default."""
    from bowerbird.encoders import load_encoder
    from bowerbird.upgrade.encoding import ItemEncoder
    from bowerbird.upgrade.run import run

    with open_gallery(gallery) as opened:
        run(opened, ItemEncoder(load_encoder(new_encoder, device="cpu")), stop_at_share=share)


@dataclass
class Running:
    """``bowerbird serve`` in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@contextlib.contextmanager
def running_server(
    gallery: Path | str, *options: str, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start the command, wait for the address that it prints, and end it at the end whatever happened."""
    command = [sys.executable, "-m", "bowerbird", "serve", str(gallery), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    lines: list[str] = []
    found = threading.Event()
    address: list[str] = []

    def read() -> None:  # until the end, so that the pipe never fills
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            match = re.search(r"https?://[\w.:\[\]-]+", line)
            if match and not address:
                address.append(match[0])
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if not found.wait(START_SECONDS) or not address:
            raise AssertionError("bowerbird serve printed no address:\n" + "".join(lines))
        yield Running(process, address[0].rstrip("/"), lines)
    finally:
        if process.poll() is None:
            process.terminate()
            deadline = time.monotonic() + 15
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if process.poll() is None:
                process.kill()
        process.wait(15)
        reader.join(5)
        if process.stdout is not None:
            process.stdout.close()
