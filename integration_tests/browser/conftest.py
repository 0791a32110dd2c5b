"""Services over small galleries, started once; one browser; a page for every test that ends without an error."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser_world import Service, export_encoders, make_gallery, move_half, write_hostile, write_photos
from chromium import TIMEOUT, Watched, launch
from playwright.sync_api import Browser, Page, expect

expect.set_options(timeout=TIMEOUT)
PER_LABEL = 20  # 120 pictures


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Folder, encoders by name, the items, and a gallery of them with the old encoder."""
    folder = tmp_path_factory.mktemp("world")
    encoders = export_encoders(folder / "encoders", {"old": 12, "better": 24, "other": 20})
    items = write_photos(folder / "photos", PER_LABEL)
    gallery = make_gallery(folder / "photos-gallery", encoders["old"], items)
    return {"folder": folder, "encoders": encoders, "items": items, "gallery": gallery}


@pytest.fixture(scope="session")
def serve(world: dict[str, Any]) -> Iterator[Callable[..., Service]]:
    """Starts services; all of them are stopped at the end."""
    running: list[Service] = []

    def start(gallery: Path, *options: str) -> Service:
        candidates = (f"--candidate={key}={world['encoders'][key]}" for key in ("better", "other"))
        service = Service(gallery, [*candidates, "--label-key=label", *options])
        running.append(service)
        service.start()
        return service

    yield start
    for service in running:
        service.stop()


def copy_of(world: dict[str, Any], name: str) -> Path:
    return Path(shutil.copytree(world["gallery"], world["folder"] / name))


@pytest.fixture(scope="session")
def half_way(serve: Callable[..., Service], world: dict[str, Any]) -> Service:
    """A service whose gallery stands in the middle of an upgrade, paused. Tests only look."""
    gallery = copy_of(world, "half-way")
    move_half(gallery, world["encoders"]["old"], world["encoders"]["better"])
    return serve(gallery)


@pytest.fixture(scope="session")
def upgraded(serve: Callable[..., Service], world: dict[str, Any]) -> Service:
    """A service on which tests upgrade; each leaves the gallery outside an upgrade. Slow enough to be seen."""
    return serve(copy_of(world, "upgraded"), "--backfill-rate=40")


@pytest.fixture(scope="session")
def hostile(serve: Callable[..., Service], world: dict[str, Any]) -> Service:
    """A service over items whose names and metadata are hostile."""
    items = write_hostile(world["folder"] / "hostile-photos")
    return serve(make_gallery(world["folder"] / "hostile", world["encoders"]["old"], items))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page of a service in a new profile: ``open_page(service, "#/search", viewport=...)``.

    In the end every page that was opened must have had no error on its console, no exception, no dialog, no request to
    another place and no violation of its policy; ``expected``: parts of messages that a test provokes.
    """
    opened: list[tuple[Watched, tuple[str, ...]]] = []

    def open_(service: Service, view: str = "", *, expected: tuple[str, ...] = (), **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", **settings})
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        opened.append((Watched(page, service.url), expected))
        page.goto(f"{service.url}/{view}")
        return page

    yield open_
    problems = []
    for watched, expected in opened:
        problems += [text for text in watched.all() if not any(part in text for part in expected)]
        watched.page.context.close()
    assert not problems, problems
