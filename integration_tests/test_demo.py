"""The demo, small: what its page promises holds in its numbers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from bowerbird.errors import GalleryError
from bowerbird.gallery import Gallery


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    from bowerbird.demo.run import run_demo

    out = tmp_path_factory.mktemp("demo") / "out"
    return out, run_demo(out, limit=60, steps=4, epochs=12, new_split="validation")


def test_rank_merge_starts_exactly_at_the_old_and_ends_exactly_at_the_new_system(demo: tuple[Path, dict]) -> None:
    _, result = demo
    curve, levels = result["curves"]["rank_merge"], result["levels"]
    assert result["changed_at_start"] == 0
    assert result["different_at_end"] == 0
    assert curve["map"][0] == levels["old_old"]["map"]
    assert curve["map"][-1] == levels["new_new"]["map"]
    assert curve["nfr"][0] == 0


def test_switching_at_once_collapses_and_the_compatible_model_does_not(demo: tuple[Path, dict]) -> None:
    _, result = demo
    levels = result["levels"]
    assert levels["new_old"]["map"] < 0.3 * levels["old_old"]["map"]
    assert levels["bct_old"]["map"] > 2 * levels["new_old"]["map"]


def test_the_page_is_one_file_with_every_picture_inside(demo: tuple[Path, dict]) -> None:
    from bowerbird.demo.page import ARMS

    out, _ = demo
    page = (out / "index.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:|/|\.)""", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL).group(1))
    shown = {hit[0] for row in data["wall"] for arm in ARMS for moment in row[arm] for hit in moment}
    assert shown <= set(data["thumbs"])


def test_the_galleries_it_leaves_behind_are_sound(demo: tuple[Path, dict]) -> None:
    out, result = demo
    for name in ("gallery", "gallery-bct"):
        with Gallery.open(out / name) as gallery:
            assert gallery.verify().ok
            assert len(gallery) == result["gallery"]["items"]


LIVE = """
from bowerbird.demo.live import serve_demo
from bowerbird.errors import InputError

def say(line):
    print(line, flush=True)

try:
    serve_demo({out!r}, port={port}, seconds=6, limit=60, epochs=12, new_split="validation", open_page=say, say=say)
except InputError as error:
    raise SystemExit(f"refused: {{error}}")
"""


def live(out: Path, port: int = 0) -> subprocess.Popen[str]:
    """The served demo in a process of its own."""
    line = [sys.executable, "-c", LIVE.format(out=str(out), port=port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def lines_until(process: subprocess.Popen[str], wanted: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(wanted, line):
            return lines
    raise AssertionError(f"it ended before {wanted!r}: {lines}\n{process.communicate()[1][-3000:]}")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_served_it_plans_and_upgrades_by_itself_with_the_encoders_that_are_there(demo: tuple[Path, dict]) -> None:
    out, result = demo
    process = live(out)
    try:
        told = lines_until(process, "#/upgrade")
        assert not any(line.startswith("train") for line in told), "both encoders were trained by the demo before"
        address = re.search(r"(http://[^/]+)/#/upgrade", told[-1]).group(1)
        with urllib.request.urlopen(f"{address}/") as page:
            assert b"<title>Bowerbird" in page.read()

        second = live(out).communicate(timeout=300)
        assert "another process serves the demo" in second[1]

        told = lines_until(process, "Every item is in the new space")
        assert sum("re-encoded" in line for line in told) >= 5
        with urllib.request.urlopen(f"{address}/v1/upgrade") as answer:
            view = json.load(answer)
        assert view["state"] == "complete" and view["items"] == result["gallery"]["items"]
        assert view["plan"]["lines"] and view["curve"][-1]["share"] == 1

        with urllib.request.urlopen(f"{address}/v1/events") as open_page:  # a page that stays open holds nothing up
            assert open_page.readline() == b"event: gallery\n"
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in errors
        assert "to go on with it" in rest
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_served_a_taken_port_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = live(tmp_path / "out", taken.getsockname()[1])
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "refused: port" in errors
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    from bowerbird.demo.run import run_demo

    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(GalleryError, match="holds no demo"):
        run_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
