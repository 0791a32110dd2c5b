"""The web page of the service: what is served, and what its files keep from each other."""

from __future__ import annotations

import re
from importlib import resources

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from bowerbird.serve.page import TYPES, mount_page

FILES = {
    file.name: file.read_text("utf-8")
    for file in resources.files("bowerbird.serve.page").iterdir()
    if file.name.endswith(tuple(TYPES))
}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
MOST_BYTES = 150_000  # over the wire, all views together


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    mount_page(app)
    return TestClient(app)


def test_the_root_is_the_page(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == FILES["index.html"]
    assert client.get("/page/index.html").text == answer.text


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_with_its_type(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert (answer.status_code, answer.text) == (200, FILES[name])
    assert answer.headers["content-type"] == TYPES[name[name.rindex(".") :]]
    assert answer.headers["cache-control"] == "no-cache"
    assert client.head(f"/page/{name}").headers["etag"] == answer.headers["etag"]
    plain = client.get(f"/page/{name}", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == answer.content


def test_a_browser_that_has_a_file_gets_it_once(client: TestClient) -> None:
    tag = client.get("/page/app.js").headers["etag"]
    for known in (tag, tag.removeprefix("W/"), f'"other", {tag}'):
        answer = client.get("/page/app.js", headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    assert client.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name", ["__init__.py", "__pycache__", "..%2fapp.py", "%2e%2e%2fapp.py", "absent.js", "app.js%00", "x/app.js"]
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_the_page_is_not_part_of_the_schema(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}


def test_the_page_weighs_little(client: TestClient) -> None:
    sent = [int(client.get(f"/page/{name}").headers["content-length"]) for name in FILES]
    assert sum(sent) < MOST_BYTES


def test_everything_that_a_file_asks_for_is_there() -> None:
    for name, text in FILES.items():
        asked = re.findall(r'/page/([\w.-]+)"', text) + re.findall(r'(?:from|import\()\s*["`]\./([\w.-]+)["`]', text)
        assert not set(asked) - set(FILES), name
    views = re.findall(r'data-view="(\w+)"', FILES["index.html"])
    assert len(views) == 5
    assert {f"{view}.js" for view in views} <= set(FILES)


def test_every_icon_is_drawn() -> None:
    drawn = set(re.findall(r'<symbol id="i-(\w+)"', FILES["index.html"]))
    used = set(re.findall(r'href="#i-(\w+)"', FILES["index.html"]))
    for text in SCRIPTS.values():
        used |= set(re.findall(r'\bicon\("(\w+)"\)', text)) | set(re.findall(r'\bsymbol: "(\w+)"', text))
    assert used <= drawn


def test_the_files_keep_to_the_content_security_policy() -> None:
    html = FILES["index.html"]
    assert not re.search(r"<script(?![^>]*\ssrc=)", html), "an inline script"
    assert not re.search(r"<style|\sstyle=", html), "an inline style"
    assert not re.search(r"\son\w+=", html), "a handler in an attribute"
    for name, text in FILES.items():
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, f"{name} names another host"


def test_data_never_becomes_markup() -> None:
    risky = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|setHTML"
    )
    for name, text in SCRIPTS.items():
        code = re.sub(r"^\s*(//|\*|/\*).*$", "", text, flags=re.MULTILINE)
        assert not risky.search(code), name


def _luminance(colour: str) -> float:
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2, 1 to 21."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(theme: str) -> None:
    css = FILES["style.css"]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split(":root {")[1].split("}")[0]))
    if theme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css.split('data-theme="dark"] {')[1].split("}")[0]))
    grounds = ["bg", "surface", "sunken", "accent-soft", "right-soft", "wrong-soft"]
    text = [(ink, ground) for ink in ("ink", "ink-2") for ground in grounds]
    text += [(ink, ground) for ink in ("accent", "old", "new") for ground in ("bg", "surface", "sunken")]
    text += [(name, f"{name}-soft") for name in ("accent", "old", "new", "right", "wrong")]
    text += [("on-accent", ground) for ground in ("accent", "accent-hover", "wrong", "danger-hover")]
    text += [("right", "surface"), ("wrong", "surface")]
    assert {pair: _contrast(*(colours[name] for name in pair)) for pair in text} == {
        pair: pytest.approx(21, abs=21 - 4.5) for pair in text
    }
    for ground in ("bg", "surface", "sunken"):
        assert _contrast(colours["line-strong"], colours[ground]) >= 3
