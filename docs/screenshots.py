"""Draw the screenshots of the page that the documentation shows: docs/images/serve-*.png.

python docs/screenshots.py              train the demo's encoders in a temporary folder (about two minutes), then draw
python docs/screenshots.py --out DIR    use the encoders of an earlier `bowerbird demo` there, and keep them

`bowerbird demo --serve` plans an upgrade of its gallery (emoji of concepts that no encoder has seen) and starts it. It
is looked at half way, first while items move and then paused, in headless Chromium: Playwright's Python package, and
Debian's chromium or $CHROMIUM.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "integration_tests/browser"))

from browser_world import Service
from chromium import TIMEOUT, launch
from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs/images"
MOST_BYTES = 150_000
SHARE = 0.6  # of the items that have moved
SCREEN: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}}
TALL: dict[str, Any] = {"viewport": {"width": 1200, "height": 980}}  # both panels of the curve
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
QUERY = "dog-face"  # of the style twemoji, which is not in the gallery
VIEWS = {  # image -> address, theme, window, what must be there
    "upgrade": ("#/upgrade", "light", TALL, "[data-testid=upgrade-facts]"),
    "phone": ("#/upgrade", "dark", PHONE, "[data-testid=upgrade-facts]"),
    "search": ("#/search", "light", SCREEN, "[data-testid=hit]"),
    "compare": ("#/compare", "light", SCREEN, "[data-testid=column-merged] [data-testid=found]"),
    "spaces": ("#/spaces", "light", SCREEN, "[data-testid=matrix] [data-cell]"),
    "map": ("#/map", "dark", SCREEN, "[data-testid=map-legend] li"),
}
MOVING = ("upgrade", "phone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the demo")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder) / "demo"
        with Service(["demo", "--serve", "--out", str(out), "--seconds", "120"], patience=900) as service:
            query = next((out / "images/unseen-query").rglob(f"{QUERY}.png"))
            with launch() as browser:
                upgrade = half_way(service)
                for name in VIEWS:
                    if name not in MOVING:
                        pause(service, upgrade)
                    draw(browser, service, name, query)


def half_way(service: Service) -> int:
    """Wait until enough items have moved; the upgrade's id."""
    while (view := service.ask("/v1/upgrade"))["state"] == "none" or view["share"] < SHARE:
        time.sleep(0.5)
    return int(view["id"])


def pause(service: Service, upgrade: int) -> None:
    """So that all images show one moment."""
    if service.ask("/v1/upgrade")["state"] == "running":
        service.ask("/v1/upgrade/pause", {"id": upgrade})
    while service.ask("/v1/upgrade")["worker"]["state"] in ("starting", "working", "stopping"):
        time.sleep(0.5)


def draw(browser: Browser, service: Service, name: str, query: Path) -> None:
    """One image, in a profile of its own."""
    address, scheme, window, ready = VIEWS[name]
    context = browser.new_context(**window, color_scheme=scheme, locale="en-GB", reduced_motion="reduce")
    context.set_default_timeout(10 * TIMEOUT)
    page = context.new_page()
    page.goto(f"{service.url}/{address}")
    for _ in range(2 if name in ("search", "compare") else 0):  # the first search of a service is its slowest
        with page.expect_response("**/image"):
            page.get_by_test_id("query-file").set_input_files(query)
    page.locator(ready).first.wait_for()
    quiet(page)
    write(page.screenshot(), IMAGES / f"serve-{name}.png")
    context.close()


def quiet(page: Page) -> None:
    """Until no picture of the window is missing, and nothing is under way."""
    page.evaluate(
        """async () => {
          const seen = (node) => node.getBoundingClientRect().top < innerHeight;
          const waiting = () => [...document.querySelectorAll(".skeleton, .spinner")];
          while (waiting().some((node) => node.checkVisibility() && seen(node)))
            await new Promise((resolve) => setTimeout(resolve, 50));
          await new Promise((resolve) => setTimeout(resolve, 300));
        }"""
    )


def write(png: bytes, path: Path) -> None:
    """With all of its colours where that fits into ``MOST_BYTES``, else with as many as do."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colors in (None, 256, 128, 64):
        out = io.BytesIO()
        # Small things have colours that mean something: those that are rare are kept.
        drawn = picture if colors is None else picture.quantize(colors, Image.Quantize.MAXCOVERAGE, kmeans=2)
        drawn.save(out, "PNG", optimize=True)
        if len(out.getvalue()) < MOST_BYTES:
            break
    path.write_bytes(out.getvalue())
    print(f"{path.relative_to(ROOT)}: {len(out.getvalue()) / 1000:.0f} kB, {colors or 'all'} colours", flush=True)


if __name__ == "__main__":
    main()
