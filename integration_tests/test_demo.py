"""The demo, small: what its page promises holds in its numbers."""

from __future__ import annotations

import json
import re
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


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    from bowerbird.demo.run import run_demo

    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(GalleryError, match="holds no demo"):
        run_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
