"""Searching by what one has: a picture, an id, a text, something that was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

DROP = """
async ([name, bytes]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  for (const type of ["dragover", "drop"]) {
    const event = new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
  }
}
"""


def shown(page: Page) -> list[str]:
    """Ids on the wall, from the first to the last."""
    return page.get_by_test_id("hit").evaluate_all("cards => cards.map((card) => card.dataset.id)")


def test_a_picture_that_is_chosen_finds_itself_first(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way)
    picture = world.items[41]
    page.get_by_test_id("query-file").set_input_files(picture["path"])
    first = page.get_by_test_id("hit").first
    expect(first).to_have_attribute("data-id", picture["id"])
    expect(first.get_by_test_id("score")).to_have_text("1.000")
    expect(first).to_contain_text(picture["metadata"]["label"])
    expect(page.get_by_test_id("query-subject")).to_have_text(picture["path"].name)
    expect(page.get_by_test_id("status")).to_contain_text("30 results")
    first.locator("img").wait_for()
    assert first.locator("img").evaluate("image => image.naturalWidth") > 0


def test_a_picture_that_is_dropped_is_searched_by_from_any_view(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/spaces")
    page.get_by_test_id("spaces").wait_for()
    picture = world.items[3]
    page.evaluate(DROP, ["my picture.png", list(picture["path"].read_bytes())])
    expect(page.get_by_test_id("hit").first).to_have_attribute("data-id", picture["id"])
    expect(page.get_by_test_id("query-subject")).to_have_text("my picture.png")


def test_a_hit_opens_and_leads_to_what_is_like_it(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/search?item=ring-03.png")
    second = page.get_by_test_id("hit").nth(1)
    name = second.get_attribute("data-id")
    second.click()
    dialog = page.get_by_test_id("item-dialog")
    expect(dialog.get_by_test_id("item-id")).to_have_text(name)
    expect(dialog.get_by_test_id("metadata")).to_contain_text("series")
    dialog.get_by_test_id("find-similar").click()
    expect(dialog).to_have_count(0)
    expect(page.get_by_test_id("query-subject")).to_have_text(name)
    found = world.half_way.ask("/v1/search/item", {"id": name, "k": 30}, token=world.tokens["read"])
    expect(page.get_by_test_id("hit").first).to_have_attribute("data-id", found["hits"][0]["id"])
    assert shown(page) == [hit["id"] for hit in found["hits"]]
    page.go_back()
    expect(page.get_by_test_id("query-subject")).to_have_text("ring-03.png")


def test_a_filter_holds_until_it_is_removed(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/search?item=cross-01.png")
    page.get_by_test_id("hit").first.wait_for()
    page.get_by_test_id("filter-toggle").click()
    page.get_by_test_id("filter-key").fill("series")
    page.get_by_test_id("filter-value").fill("even")
    page.get_by_test_id("filter-add").click()
    expect(page.get_by_test_id("filter-chip")).to_contain_text("even")
    expect(page.get_by_test_id("traits").filter(has_text="odd")).to_have_count(0)
    expect(page.get_by_test_id("traits").filter(has_text="even")).to_have_count(30)
    page.get_by_test_id("filter-chip").click()
    expect(page.get_by_test_id("traits").filter(has_text="odd")).not_to_have_count(0)


def test_more_results_follow_those_that_are_shown(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, "#/search?item=bars-05.png")
    expect(page.get_by_test_id("hit")).to_have_count(30)
    page.get_by_test_id("more").click()
    expect(page.get_by_test_id("hit")).to_have_count(60)
    found = world.half_way.ask("/v1/search/item", {"id": "bars-05.png", "k": 60}, token=world.tokens["read"])
    assert shown(page) == [hit["id"] for hit in found["hits"]]


def test_where_no_encoder_takes_texts_the_field_is_for_ids(world: Any, open_page: Callable[..., Page]) -> None:
    page = open_page(world.half_way, expected=("404",))
    field = page.get_by_test_id("query-text")
    expect(field).to_have_attribute("placeholder", "Search by the id of an item, or drop a picture")
    field.fill("square-07.png")
    field.press("Enter")
    expect(page.get_by_test_id("query-subject")).to_have_text("square-07.png")
    expect(page.get_by_test_id("hit")).to_have_count(30)
    field.fill("square-70.png")
    field.press("Enter")
    expect(page.get_by_test_id("error")).to_contain_text("square-70.png")
    expect(page.get_by_test_id("error")).to_contain_text("cannot be searched by words")
    expect(page.get_by_test_id("error").get_by_role("button")).to_have_count(0)  # the same again would not help


def test_where_the_encoder_takes_texts_the_field_asks_by_text(world: Any, open_page: Callable[..., Page]) -> None:
    """The encoders here take none: the answers about texts are made from others of the same service."""
    page = open_page(world.half_way, "#/map")
    asked: list[dict[str, Any]] = []

    def gallery(route: Route) -> None:
        info = route.fetch().json()
        route.fulfill(json={**info, "accepts": {**info["accepts"], "text": True}})

    def search(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or "{}"))
        found = world.half_way.ask("/v1/search/item", {"id": "ring-03.png"}, token=world.tokens["read"])
        route.fulfill(json=found)

    page.route("**/v1/gallery", gallery)
    page.route("**/v1/search/text", search)
    page.goto(f"{world.half_way.url}/#/search")
    page.reload()
    field = page.get_by_test_id("query-text")
    expect(field).to_have_attribute("placeholder", "Describe what you are looking for, or drop a picture")
    field.fill("a ring")
    page.get_by_test_id("query-go").click()
    expect(page.get_by_test_id("hit")).to_have_count(20)
    assert [body["text"] for body in asked] == ["a ring"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("notes.png", b"not a picture at all"), ("half.png", None)],
    ids=["text called a picture", "truncated picture"],
)
def test_a_file_that_is_no_picture_is_told_and_the_page_goes_on(
    world: Any, open_page: Callable[..., Page], name: str, content: bytes | None
) -> None:
    page = open_page(world.half_way, expected=("422",))
    whole = world.items[0]["path"].read_bytes()
    half = content or whole[: len(whole) // 2]
    page.get_by_test_id("query-file").set_input_files({"name": name, "mimeType": "image/png", "buffer": half})
    expect(page.get_by_test_id("error")).to_be_visible()
    page.get_by_test_id("query-file").set_input_files(world.items[0]["path"])
    expect(page.get_by_test_id("hit").first).to_have_attribute("data-id", world.items[0]["id"])
