"""The verbs of an upgrade through the command line, on galleries that a server keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from click.testing import CliRunner

from bowerbird.cli import main
from bowerbird.gallery import open_gallery

COUNT, CLASSES = 240, 6
NAMES = [f"item-{n:03d}" for n in range(COUNT)]
HERE = Path(__file__).parent


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Vectors of two encoders, of items and of queries; the new one sees the classes better."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((CLASSES, 10))
    for kind, names in (("items", NAMES), ("asked", [f"query-{n}" for n in range(60)])):
        seen = centers[np.arange(len(names)) % CLASSES]
        for encoder, dim, noise in (("old", 8, 1.5), ("new", 12, 0.6)):
            project = np.random.default_rng(dim).standard_normal((10, dim))
            rows = (seen + noise * rng.standard_normal(seen.shape)) @ project
            np.save(tmp_path / f"{kind}-{encoder}.npy", rows.astype(np.float32))
            (tmp_path / f"{kind}-{encoder}.ids.txt").write_text("\n".join(names))
    return tmp_path


def filled(url: str) -> str:
    invoke("gallery", "create", url, "--encoder", "vectors:items-old.npy")
    invoke("gallery", "add", url, "--vectors", "items-old.npy")
    with open_gallery(url) as gallery:  # the command takes no labels for ready vectors
        rows = gallery.vectors_of(NAMES)
        labels = [{"label": f"class-{n % CLASSES}"} for n in range(COUNT)]
        gallery.add(NAMES, rows, metadata=labels, replace=True)
    return url


@pytest.fixture
def qdrant(files: Path, postgres_url: Callable[[], str]) -> Iterator[str]:
    pytest.importorskip("qdrant_client")
    yield filled(f"qdrant+{postgres_url()}&qdrant={quote(str(files / 'qdrant'), safe='/')}")


def expected() -> np.ndarray:
    rows = np.load("items-new.npy")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ends_new(url: str) -> None:
    invoke("upgrade", "finish", url)
    with open_gallery(url) as gallery:
        assert gallery.verify().ok and len(gallery) == COUNT
        assert np.allclose(gallery.vectors_of(NAMES), expected(), atol=1e-6)


def test_in_the_local_mode_of_qdrant_several_workers_are_refused_before_anything_begins(qdrant: str) -> None:
    new = ("--to", "vectors:items-new.npy", "--strategy", "core:full")
    said = invoke("upgrade", "run", qdrant, *new, "--workers", 2, code=2)
    assert "lacks 'many-workers'" in said and "--workers 1" in said
    assert "no upgrade is under way" in invoke("upgrade", "status", qdrant, code=2)
    invoke("upgrade", "run", qdrant, *new)
    ends_new(qdrant)
