"""The page by the keyboard alone, on a phone, and in both themes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

VIEWS = ("search", "compare", "upgrade", "spaces", "map")
FOCUSED = "document.activeElement?.dataset.id ?? document.activeElement?.dataset.testid ?? ''"

# What can be pressed and is in sight, with its size: of a control inside of a label, the label's. `scrolled`: in a part
# of the page that is scrolled sideways for itself, as a wide table is.
TARGETS = """
() => [...document.querySelectorAll("a[href], button, input, select, summary, [role=button]")].map((element) => {
  const target = element.closest("label") ?? element;
  const box = target.getBoundingClientRect();
  const style = getComputedStyle(element);
  const seen = target.checkVisibility({ checkVisibilityCSS: true, checkOpacity: true })
    && !element.matches(".hidden-text[aria-hidden=true], .skip");
  const inline = style.display === "inline" && element.matches("a");
  const name = element.dataset.testid || element.ariaLabel || element.textContent.trim().slice(0, 40);
  let scrolled = false;
  for (let above = element.parentElement; above; above = above.parentElement)
    scrolled ||= above.scrollWidth > above.clientWidth && /auto|scroll/.test(getComputedStyle(above).overflowX);
  return { scrolled, name: name || element.className,
    seen: seen && box.width > 1 && box.height > 1 && !inline, width: box.width, height: box.height,
    left: box.left, right: box.right };
}).filter((target) => target.seen)
"""


def test_everything_needed_for_a_search_is_done_by_keys(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/spaces")
    page.get_by_test_id("spaces").wait_for()
    page.keyboard.press("/")
    expect(page.get_by_test_id("query-text")).to_be_focused()
    page.keyboard.type("ring-03.png")
    page.keyboard.press("Enter")
    hits = page.get_by_test_id("hit")
    expect(hits).to_have_count(30)
    page.keyboard.press("Tab")  # out of the field, from where the arrows lead into the wall
    while page.evaluate(FOCUSED) != hits.first.get_attribute("data-id"):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(hits.nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    below = page.evaluate(FOCUSED)
    assert below not in (hits.nth(0).get_attribute("data-id"), hits.nth(1).get_attribute("data-id"))
    page.keyboard.press("Enter")
    dialog = page.get_by_test_id("item-dialog")
    expect(dialog.get_by_test_id("item-id")).to_have_text(below)
    page.keyboard.press("ArrowRight")
    expect(dialog.get_by_test_id("item-id")).not_to_have_text(below)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    assert page.evaluate(FOCUSED) == below


def test_the_link_that_skips_the_navigation_stays_in_the_view(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/spaces")
    page.get_by_test_id("spaces").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate(FOCUSED) == "view"
    assert page.url.endswith("#/spaces")


def test_numbers_change_the_view_and_a_question_mark_shows_the_keys(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way)
    page.get_by_test_id("hit").first.wait_for()
    for number, view in enumerate(VIEWS, 1):
        page.keyboard.press(str(number))
        expect(page.get_by_test_id(f"nav-{view}")).to_have_attribute("aria-current", "page")
    page.keyboard.press("?")
    expect(page.get_by_test_id("keys-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("keys-dialog")).to_be_hidden()


def test_the_buttons_of_an_upgrade_are_reached_and_answered_by_keys(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/upgrade")
    page.get_by_test_id("upgrade-rollback").wait_for()
    while page.evaluate(FOCUSED) != "upgrade-rollback":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("confirm-dialog")).to_be_visible()
    expect(page.get_by_test_id("confirm-cancel")).to_be_focused()  # not the one that cannot be taken back
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("confirm-dialog")).to_be_hidden()
    expect(page.get_by_test_id("upgrade-rollback")).to_be_focused()


PLACES = ("#/search?item=ring-03.png", "#/compare?item=ring-03.png", "#/upgrade", "#/spaces", "#/map")
READY = {  # the selector of what a view is about
    "search": "[data-testid=hit]",
    "compare": "[data-testid=column-merged] [data-testid=found]",
    "upgrade": "[data-testid=upgrade-facts]",
    "spaces": "[data-testid=matrix]",
    "map": "[data-testid=map-legend] li",
}


def test_on_a_phone_nothing_is_wider_than_the_screen_and_everything_can_be_touched(
    world: Any, open_page: Callable[..., Page]
) -> None:
    page = open_page(world.half_way, PLACES[0], viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    for view, place in zip(VIEWS, PLACES, strict=True):
        page.goto(f"{world.half_way.url}/{place}")
        page.locator(READY[view]).first.wait_for(timeout=120_000)  # spaces and map are measured at a low priority
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths == [360, 360], (view, widths)
        targets = page.evaluate(TARGETS)
        assert len(targets) > 5
        outside = [t for t in targets if not t["scrolled"] and (t["left"] < -1 or t["right"] > 361)]
        small = [t for t in targets if min(t["width"], t["height"]) < 24]  # WCAG 2.2, 2.5.8
        assert (view, outside, small) == (view, [], [])


def test_on_a_phone_one_column_of_the_comparison_is_seen_at_a_time(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, PLACES[1], viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    expect(page.get_by_test_id("column-merged")).to_be_visible()
    expect(page.get_by_test_id("column-old")).to_be_hidden()
    page.get_by_text("Old", exact=True).first.tap()
    expect(page.get_by_test_id("column-old")).to_be_visible()
    expect(page.get_by_test_id("column-merged")).to_be_hidden()


def luminance(page: Page, selector: str, name: str) -> float:
    """Relative luminance (WCAG 2) of a colour of an element."""
    text = page.eval_on_selector(selector, f"element => getComputedStyle(element).{name}")
    channels = [int(v) / 255 for v in text[text.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_theme_of_the_system_and_a_choice_is_kept(
    world: Any, open_page: Callable[..., Page], scheme: str
) -> None:
    page = open_page(world.half_way, "#/upgrade", color_scheme=scheme)
    page.get_by_test_id("upgrade-sentence").wait_for()
    paper, ink = luminance(page, "html", "backgroundColor"), luminance(page, "html", "color")
    quiet = luminance(page, "[data-testid=upgrade-sentence]", "color")
    panel = luminance(page, ".panel", "backgroundColor")
    assert (paper > ink) == (scheme == "light")
    assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7
    assert (max(panel, quiet) + 0.05) / (min(panel, quiet) + 0.05) > 4.5
    other = "light" if scheme == "dark" else "dark"
    while page.locator("html").get_attribute("data-theme-choice") != other:
        page.get_by_test_id("theme-button").click()
    assert (luminance(page, "html", "backgroundColor") > 0.5) == (other == "light")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", other)
