"""Upgrades on the page alone: one planned, started, paused, resumed and finished, and one rolled back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Locator, Page, expect

SLOW = 120_000  # milliseconds: a worker or a plan starts, at a low priority, perhaps on a busy machine
SOME = re.compile(r"^(?!0(\.\d+)?$)")  # of the progress bar: above nought


def confirmed(page: Page, *consequences: str) -> None:
    """Read what the dialog says will happen, then go on."""
    for text in consequences:
        expect(page.locator("#confirm-text")).to_contain_text(text)
    page.get_by_test_id("confirm-ok").click()
    expect(page.get_by_test_id("confirm-dialog")).to_be_hidden()


def start(page: Page, candidate: str, rate: float) -> Locator:
    """Start an upgrade; its progress bar."""
    page.get_by_test_id("start-candidate").select_option(candidate)
    page.get_by_test_id("start-rate").fill(str(rate))
    page.get_by_test_id("upgrade-start").click()
    confirmed(page, f"encodes 120 items by {candidate}", "you can roll back until then")
    return page.get_by_test_id("upgrade-progress")


def results(service: Any, ids: list[str]) -> list[list[tuple[str, float, str]]]:
    """What the service finds for some items: ids, distances, spaces."""
    answers = [service.ask("/v1/search/item", {"id": name, "k": 119}) for name in ids]
    return [[(hit["id"], hit["distance"], hit["space"]) for hit in answer["hits"]] for answer in answers]


def test_an_upgrade_from_the_plan_to_the_end_with_a_pause_and_a_resume(
    world: Any, open_page: Callable[..., Page]
) -> None:
    page = open_page(world.upgraded, "#/upgrade")
    title = page.get_by_test_id("upgrade-state")
    expect(title).to_have_text("No upgrade is under way")
    page.get_by_test_id("start-candidate").select_option("better")
    page.get_by_test_id("plan-start").click()
    expect(page.get_by_test_id("plan-recommendation")).to_contain_text("Upgrade", timeout=SLOW)
    expect(page.get_by_test_id("plan-lines")).to_contain_text("rank-merge")

    progress = start(page, "better", rate=15)
    expect(title).to_have_text("Moving to better", timeout=SLOW)
    expect(progress).to_have_attribute("aria-valuenow", SOME, timeout=SLOW)
    page.get_by_test_id("upgrade-pause").click()
    confirmed(page, "Nothing is lost; resume at any time")
    expect(title).to_have_text("Paused on the way to better")
    share = world.upgraded.ask("/v1/upgrade")["share"]
    assert 0 < share < 1
    expect(page.get_by_test_id("fact-share")).to_contain_text(f"{round(120 * share)} of 120")

    page.get_by_test_id("nav-search").click()
    page.get_by_test_id("query-text").fill("ring-03.png")
    page.get_by_test_id("query-go").click()
    sides = page.get_by_test_id("hit").get_by_test_id("side")
    expect(sides.filter(has_text="old")).not_to_have_count(0)
    expect(sides.filter(has_text="new")).not_to_have_count(0)

    page.get_by_test_id("nav-upgrade").click()
    page.get_by_test_id("upgrade-resume").click()
    confirmed(page, "still to encode")
    expect(title).to_have_text("Every item is in better", timeout=SLOW)
    expect(progress).to_have_attribute("aria-valuenow", "100.0")
    page.get_by_test_id("upgrade-finish").click()
    confirmed(page, "Drops the 120 old vectors; there is no way back")
    expect(title).to_have_text("No upgrade is under way")
    expect(page.get_by_test_id("upgrade-sentence")).to_contain_text("All 120 items are served by better")
    expect(page.get_by_test_id("toasts")).to_contain_text("Finished: better serves the gallery")
    spaces = {row["encoder"]: row["items"] for row in world.upgraded.ask("/v1/gallery")["spaces"]}
    assert spaces["better"] == 120
    assert sum(spaces.values()) == 120


def test_an_upgrade_that_is_rolled_back_leaves_the_results_as_they_were(
    world: Any, open_page: Callable[..., Page]
) -> None:
    ids = ["ring-03.png", "bars-11.png", "circle-19.png"]
    before = results(world.upgraded, ids)
    page = open_page(world.upgraded, "#/upgrade")
    progress = start(page, "other", rate=8)
    expect(progress).to_have_attribute("aria-valuenow", SOME, timeout=SLOW)
    assert results(world.upgraded, ids) != before
    page.get_by_test_id("upgrade-rollback").click()
    confirmed(page, "serves every item again, with exactly the results of before")
    expect(page.get_by_test_id("upgrade-state")).to_have_text("No upgrade is under way")
    expect(page.get_by_test_id("toasts")).to_contain_text("Rolled back")
    assert results(world.upgraded, ids) == before


def test_a_dialog_that_is_cancelled_changes_nothing(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/upgrade")
    before = world.half_way.ask("/v1/upgrade", token=world.tokens["read"])
    for name in ("resume", "rollback"):
        page.get_by_test_id(f"upgrade-{name}").click()
        page.get_by_test_id("confirm-cancel").click()
        page.get_by_test_id(f"upgrade-{name}").click()
        page.keyboard.press("Escape")
        expect(page.get_by_test_id("confirm-dialog")).to_be_hidden()
    assert world.half_way.ask("/v1/upgrade", token=world.tokens["read"]) == before


def test_the_spaces_say_which_queries_reach_which_vectors(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/spaces")
    expect(page.get_by_test_id("spaces").locator("li")).to_have_count(2)
    expect(page.get_by_test_id("cell-own")).to_have_count(2, timeout=SLOW)
    expect(page.get_by_test_id("cell-none")).to_have_count(2)
    page.get_by_test_id("cell-none").first.click()
    expect(page.get_by_test_id("matrix-about")).to_contain_text("Queries of")
