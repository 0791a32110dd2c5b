"""Services over small galleries, started once; one browser; a page for every test that ends without an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser_world import Service, export_encoders, make_gallery, move_half, write_hostile, write_photos
from chromium import TIMEOUT, Watched, launch
from playwright.sync_api import Browser, Page, expect

expect.set_options(timeout=TIMEOUT)
PER_LABEL = 20  # 120 pictures


@dataclass(frozen=True)
class World:
    """What the tests look at.

    Attributes:
        items: Id, path and metadata of the pictures that are in both galleries.
        half_way: A service that asks for a token, whose gallery stands in the middle of an upgrade, paused; with
            hostile items besides. Tests leave it as they find it.
        upgraded: A service without tokens on which tests upgrade; each leaves the gallery outside an upgrade.
        tokens: Of ``half_way``, by their role.
    """

    items: list[dict[str, Any]]
    half_way: Service
    upgraded: Service
    tokens: dict[str, str]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from bowerbird.serve.access import ROLES, new_token

    folder = tmp_path_factory.mktemp("world")
    encoders = export_encoders(folder / "encoders", {"old": 4, "better": 64, "other": 24})
    items, hostile = write_photos(folder / "photos", PER_LABEL), write_hostile(folder / "hostile")
    made = {role: new_token(role) for role in ROLES}
    (folder / "tokens.toml").write_text("\n".join(lines for _, lines in made.values()))
    tokens = {role: token for role, (token, _) in made.items()}

    half_way = make_gallery(folder / "half-way", encoders["old"], [*items, *hostile])
    move_half(half_way, encoders["old"], encoders["better"])
    upgraded = make_gallery(folder / "photos gallery", encoders["old"], items)
    options = [*(f"--candidate={name}={encoders[name]}" for name in ("better", "other")), "--label-key=label"]
    services = (
        Service(["serve", str(half_way), *options, f"--tokens={folder / 'tokens.toml'}"]),
        Service(["serve", str(upgraded), *options, "--backfill-nice=0"]),  # a busy machine would starve its worker
    )
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Service.start, services))
        yield World(items, *services, tokens)
    finally:
        for service in services:
            service.stop()


@pytest.fixture(scope="session")
def browser(world: World) -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser, world: World) -> Iterator[Callable[..., Page]]:
    """Opens a page of a service in a new profile: ``open_page(service, "#/search", viewport=...)``.

    In the end every page that was opened must have had no error on its console, no exception, no dialog, no request to
    another place and no violation of its policy; ``expected``: parts of messages that a test provokes. ``role``: whose
    token the tab already has, where the service wants one.
    """
    opened: list[tuple[Watched, tuple[str, ...]]] = []

    def open_(
        service: Service, view: str = "", *, role: str | None = "admin", expected: tuple[str, ...] = (), **settings: Any
    ) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", **settings})
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        opened.append((Watched(page, service.url), expected))
        if role is not None and service is world.half_way:
            page.add_init_script(f"sessionStorage.setItem('bowerbird-token', {world.tokens[role]!r})")
        page.goto(f"{service.url}/{view}")
        return page

    yield open_
    problems = []
    for watched, expected in opened:
        problems += [text for text in watched.all() if not any(part in text for part in expected)]
        watched.page.context.close()
    assert not problems, problems
