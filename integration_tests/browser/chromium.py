"""Debian's Chromium under Playwright, and pages that remember what went wrong in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--force-color-profile=srgb",
)
TIMEOUT = 20_000  # milliseconds: a busy machine is slow, a page that does not work never gets there
# Runs before any script of the page, in its world: what the content security policy has stopped.
WATCHER = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) =>
  window.violations.push(`${event.violatedDirective}: ${event.blockedURI} ${event.sample}`));
"""


def chromium_path() -> str:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise RuntimeError("no chromium: install Debian's (apt-get install chromium), or set $CHROMIUM to a Chrome")
    return path


@contextmanager
def launch() -> Iterator[Browser]:
    """A browser with a new profile of its own, which is removed with it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path(), headless=True, args=list(ARGUMENTS), chromium_sandbox=False
        )
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """What went wrong in a page: errors of its console, exceptions, dialogs, requests to other places."""

    def __init__(self, page: Page, origin: str) -> None:
        self.problems: list[str] = []
        self.page, self.origin = page, origin
        page.add_init_script(WATCHER)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("dialog", self._dialog)
        page.on("request", lambda request: self._request(request.url))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text} ({message.location.get('url')})")

    def _dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, url: str) -> None:
        if not url.startswith((self.origin + "/", f"blob:{self.origin}/")):
            self.problems.append(f"request to {url}")

    def all(self) -> list[str]:
        """Also what the content security policy has stopped."""
        return self.problems + [f"policy: {text}" for text in self.page.evaluate("window.violations ?? []")]
