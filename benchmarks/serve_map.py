"""The map of the page with 50,000 points: what a frame costs while it is dragged, in headless Chromium.

    OMP_NUM_THREADS=1 python benchmarks/serve_map.py --output benchmarks/results/serve_map.json

Needs playwright and Chromium ($CHROMIUM, else /usr/bin/chromium). A screen shows 60 frames a second where a frame takes
less than 16.7 ms of the main thread; that is its CPU time, so that a busy machine does not show in it. The frames that
came through in a second are printed, too; they are those of this machine, without a graphics card, at this moment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from bowerbird.gallery import Gallery, Space
from common import serving, write_result

POINTS, DIM, LABELS, FRAMES = 50_000, 64, 14, 150
LIMIT = 1000 / 60  # milliseconds
PATIENCE = 180_000  # milliseconds for the map to appear
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DRAG = """async (frames) => {
  const canvas = document.querySelector('.map-canvas');
  canvas.setPointerCapture = () => {}; // these pointers are made up
  const send = (type, x, y) => canvas.dispatchEvent(new PointerEvent(type,
    {pointerId: 1, clientX: x, clientY: y, button: 0, bubbles: true, pointerType: 'mouse'}));
  const begun = performance.now();
  send('pointerdown', 600, 450);
  for (let n = 0; n < frames; n += 1) {
    await new Promise(requestAnimationFrame);
    send('pointermove', 600 + 100 * Math.sin(n / 10), 450 + 60 * Math.cos(n / 9));
  }
  send('pointerup', 600, 450);
  return frames / (performance.now() - begun) * 1000;
}"""


def make_gallery(folder: Path) -> Path:
    """50,000 items in clouds, by their vectors alone."""
    rng = np.random.default_rng(0)
    labels = np.arange(POINTS) % LABELS
    rows = (rng.normal(size=(LABELS, DIM))[labels] + 0.6 * rng.normal(size=(POINTS, DIM))).astype(np.float32)
    with Gallery.create(folder / "points", Space("f" * 64, "made up", DIM)) as gallery:
        gallery.add(
            [f"item-{number:05}" for number in range(POINTS)],
            rows / np.linalg.norm(rows, axis=1, keepdims=True),
            metadata=[{"label": f"cloud {label}"} for label in labels],
        )
    return folder / "points"


def measure(page: Page, url: str) -> dict[str, Any]:
    page.goto(f"{url}/#/map")
    page.get_by_test_id("map-note").filter(has_text="50,000 items").wait_for(timeout=PATIENCE)
    browser = page.context.browser
    assert browser is not None
    browser.start_tracing(page=page, categories=["devtools.timeline"])
    shown = page.evaluate(DRAG, FRAMES)
    traced = json.loads(browser.stop_tracing())
    events = traced["traceEvents"] if isinstance(traced, dict) else traced
    # The page waits for frames with a callback of its own, which costs nothing; the others draw.
    costs = [event["tdur"] / 1000 for event in events if event["name"] == "FireAnimationFrame" and "tdur" in event]
    drawn = np.array([cost for cost in costs if cost > 0.5])
    return {
        "frames": len(drawn),
        "median_ms": round(float(np.median(drawn)), 2),
        "p95_ms": round(float(np.quantile(drawn, 0.95)), 2),
        "shown_per_second": round(shown, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        gallery = make_gallery(Path(folder))
        with serving(gallery, "--label-key", "label") as (_, address), sync_playwright() as playwright:
            chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            for density in (1, 2):
                page = browser.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=density)
                results[f"{density} pixel ratio"] = measure(page, address)
                page.close()
            browser.close()
    write_result("serve_map", {"points": POINTS, "limit_ms": round(LIMIT, 1), **results}, out=options.output)
    return int(any(result["p95_ms"] > LIMIT or result["frames"] < FRAMES // 2 for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
