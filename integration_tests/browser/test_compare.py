"""The old, the new and the served results of one query, side by side, in the middle of an upgrade."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

COLUMNS = ("old", "new", "merged")


@pytest.fixture(scope="module")
def answers(world: Any) -> dict[str, dict[str, Any]]:
    """Comparisons by the flip that they show, each with the id of its query."""
    found: dict[str, dict[str, Any]] = {}
    for item in world.items:
        answer = world.half_way.ask("/v1/compare/item", {"id": item["id"], "k": 20}, token=world.tokens["read"])
        found.setdefault(answer["flip"], {**answer, "query": item["id"]})
        if len(found) == 3:
            break
    return found


@pytest.mark.parametrize("flip", ["positive", "negative", "none"])
def test_three_columns_show_what_each_system_finds_and_what_moved(
    world: Any, open_page: Callable[..., Page], answers: dict[str, Any], flip: str
) -> None:
    answer = answers[flip]
    page = open_page(world.half_way, f"#/compare?item={answer['query']}")
    expect(page.get_by_test_id("verdict")).to_have_attribute("data-flip", flip)
    for name in COLUMNS:
        rows = page.get_by_test_id(f"column-{name}").get_by_test_id("found")
        expect(rows).to_have_count(len(answer[name]))
        assert rows.evaluate_all("rows => rows.map((row) => row.dataset.id)") == [hit["id"] for hit in answer[name]]
    merged = page.get_by_test_id("column-merged")
    assert merged.get_by_test_id("moved").count() == sum(hit["moved"] for hit in answer["merged"]) > 0
    right = merged.get_by_test_id("right").all_inner_texts()
    assert right == ["right" if hit["right"] else "wrong" for hit in answer["merged"]]
    expect(page.get_by_test_id("flip")).to_contain_text(
        {"positive": "Positive flip", "negative": "Negative flip"}.get(flip, "No flip")
    )
    marked = merged.get_by_test_id("found").first
    if flip == "none":
        expect(marked).not_to_have_class(r"flip")
    else:
        expect(marked).to_contain_class(f"flip {'right' if flip == 'positive' else 'wrong'}")


def test_an_item_is_marked_in_every_column_where_it_is(
    world: Any, open_page: Callable[..., Page], answers: dict[str, Any]
) -> None:
    answer = answers["none"]
    kept = next(hit["id"] for hit in answer["merged"] if any(hit["id"] == old["id"] for old in answer["old"]))
    page = open_page(world.half_way, f"#/compare?item={answer['query']}")
    page.get_by_test_id("column-merged").locator(f'[data-id="{kept}"]').hover()
    expect(page.get_by_test_id("column-old").locator(".same")).to_have_attribute("data-id", kept)


def test_outside_an_upgrade_it_says_that_there_is_nothing_to_compare(
    world: Any, open_page: Callable[..., Page]
) -> None:
    page = open_page(world.upgraded, "#/compare?item=ring-03.png", expected=("409",))
    expect(page.get_by_test_id("empty")).to_contain_text("nothing to compare")
