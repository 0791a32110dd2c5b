"""The tutorial of the service is executed, block by block, against a real server; the options that it names exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "serve.md"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Path]:
    """The tutorial with a port that is free; its server ends with the test, whatever becomes of it."""
    port = free_port()
    text = PAGE.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    copy = tmp_path / "serve.md"
    options = f"--port {port} --backfill-nice 0"  # tests run beside each other
    copy.write_text(text.replace("bowerbird serve photos --", f"bowerbird serve photos {options} --"))
    yield copy
    with suppress(OSError, ValueError):
        os.kill(int((tmp_path / "serve.pid").read_text()), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="the blocks are for a POSIX shell")
def test_every_block_of_the_tutorial_runs_against_a_real_server(
    page: Path, tmp_path: Path, run_page: Callable[[Path], list[str]]
) -> None:
    try:
        outputs = run_page(page)
    except AssertionError as error:
        log = tmp_path / "serve.log"
        raise AssertionError(f"{error}\n{log.read_text()[-3000:] if log.is_file() else ''}") from error
    (_, ready, by_picture, by_item, by_vector, refused, added, looked, plan, events, compared, acts, _, finished,
     metrics, tokens) = outputs  # fmt: skip

    assert json.loads(ready)["ready"] is True
    assert [hit["rank"] for hit in json.loads(by_picture)["hits"]] == [1, 2, 3]
    second = json.loads(by_item)["hits"]
    assert [hit["rank"] for hit in second] == [4, 5, 6]
    assert {hit["metadata"]["label"] for hit in second} <= {"ambulance", "police-car"}
    assert "1280" in by_vector
    problem = json.loads(refused)
    assert 400 <= problem["status"] < 500 and "text" in problem["detail"]

    first, again, found = (json.loads(line) for line in added.split("\n") if line)
    assert first["added"] == ["uploads/mine"] and again["unchanged"] == ["uploads/mine"]
    assert found["hits"][0]["id"] == "uploads/mine" and found["hits"][0]["distance"] < 1e-6
    item, end = json.JSONDecoder().raw_decode(looked)
    assert item["id"] == "uploads/mine" and item["metadata"]["year"] == 2026 and item["has_picture"]
    deleted = json.loads(looked[end:])
    assert deleted["deleted"] == ["uploads/mine"] and deleted["absent"] == ["never-there"]
    assert (tmp_path / "thumbnail.webp").read_bytes()[8:12] == b"WEBP"

    assert " - " in plan
    assert events.startswith('"new_items":')
    assert 0 < float(compared.split()[0]) < 1, "the comparison was made while items move"
    states = [line.split()[0] for line in acts.splitlines()]
    assert states == ["paused", "running", "none"]

    info = json.loads(finished)
    assert info["upgrade"] is None and info["items"] == 448
    assert "bowerbird_items 448" in metrics
    assert (tmp_path / "new-tokens.txt").read_text().count("sha256") == 3 and tokens == ""


def test_every_option_of_a_documented_command_exists() -> None:
    from bowerbird.cli.serve import command

    known = {"--help"} | {option for parameter in command.params for option in parameter.opts}
    commands = 0
    for page in (PAGE, DOCS / "serve-security.md", DOCS.parent / "README.md"):
        text = page.read_text().replace("\\\n", " ") if page.is_file() else ""
        for line in re.findall(r"bowerbird serve ([^\n`]*)", text):
            commands += 1
            words = shlex.split(line, comments=True)
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known, line
        for option in re.findall(r"`(--[a-z-]+)[^`]*`", text) if page == PAGE else ():
            assert option in known | {"--workers"}, option
    assert commands > 5


def test_the_tutorial_shows_pictures_that_are_there() -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE.read_text())
    assert pictures
    assert [name for name in pictures if not (DOCS / name).is_file()] == []
