"""The README's examples, as they stand there, in the order in which they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def example(name: str) -> str:
    """The code block after ``<!-- example: name -->``."""
    found = re.search(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", README, flags=re.DOTALL)
    assert found, f"the README has no example {name!r}"
    return found.group(1)


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures with labels, and a query, in the working folder of an example."""
    from bowerbird_emoji.styles import EmojiStyles

    gallery, queries = EmojiStyles.build(None, "validation-gallery"), EmojiStyles.build(None, "validation-query")
    for position in range(0, len(gallery), 16):
        file = tmp_path / "pictures" / f"{gallery.item_ids[position]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        gallery[position]["image"].save(file)
    queries[0]["image"].save(tmp_path / "query.png")
    return tmp_path


def test_the_operators_example_runs(pictures: Path) -> None:
    out = run(["bash", "-euo", "pipefail", "-c", example("operator")], pictures)
    assert "noto/" in out  # results of the search


def test_the_example_with_ready_vectors_runs(tmp_path: Path) -> None:
    out = run([sys.executable, "-c", example("vectors")], tmp_path)
    assert out.startswith("['item-0'"), "a stored vector finds its own item first, half way through the upgrade too"


def test_the_researchers_example_runs(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    run(["bash", "-euo", "pipefail", "-c", example("researcher")], tmp_path)
    assert (tmp_path / "encoders/digits/weights.safetensors").is_file()


def test_every_link_to_a_file_of_the_repository_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / link).exists()] == []
