"""The verbs of an upgrade through the command line, on galleries that a server keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from click.testing import CliRunner

from bowerbird.cli import main
from bowerbird.gallery import open_gallery

COUNT, CLASSES = 120, 6
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
    with open_gallery(url) as gallery:  # the command takes no labels for ready vectors
        labels = [{"label": f"class-{n % CLASSES}"} for n in range(COUNT)]
        gallery.add(NAMES, np.load("items-old.npy"), metadata=labels)
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


def test_plan_watch_and_serve_in_the_local_mode_of_qdrant_say_what_they_say_of_a_folder(qdrant: str) -> None:
    asked = ("--queries", "vectors:asked-old.npy,asked-new.npy")
    new = ("--to", "vectors:items-new.npy")
    seen = []
    for place in (qdrant, filled("folder")):
        plan = invoke("upgrade", "plan", place, *new, "--label-key", "label", "--strategy", "core:full", "--json",
                      "--out", "plan.json")  # fmt: skip
        run = ("upgrade", "run", place, *new, "--strategy", "core:full", "--seed", 1, "--task-items", 10)
        report = invoke(*run, *asked, "--stop-at-share", 0.5, "--json")
        watched = invoke("upgrade", "watch", place, "--json")
        half = invoke("upgrade", "serve", place, *asked, "--k", 7, "--json")
        invoke(*run)
        invoke("upgrade", "finish", place)
        end = invoke("upgrade", "serve", place, "--queries", "vectors:asked-new.npy", "--k", 7, "--json")
        made = json.loads(plan)
        seen.append(
            (
                [made[name] for name in ("items", "sample", "old_old", "new_new", "gain")],
                [made["recommendation"][name] for name in ("decision", "strategy")],
                json.loads(report)["share"], watched_of(watched), json.loads(half), json.loads(end),
            )
        )  # fmt: skip
    assert seen[0] == seen[1]
    assert seen[0][2] == 0.5 and len(seen[0][4]) == 60


def watched_of(said: str) -> dict[str, object]:
    """A measurement, without when it was made."""
    return {name: value for name, value in json.loads(said).items() if name not in ("at", "time", "epoch")}


COMMAND = ("--to", "vectors:items-new.npy", "--strategy", "core:full", "--task-items", "10", "--json")


def test_two_workers_on_a_ray_move_a_gallery_of_postgres(files: Path, postgres_url: Callable[[], str]) -> None:
    pytest.importorskip("ray")
    url = filled(postgres_url())
    ray = ("--engine", "ray", "--workers", "2", "--rate", "60")
    ran = subprocess.run(
        [sys.executable, "-m", "bowerbird", "upgrade", "run", url, *COMMAND, *ray],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["reason"], report["encoded"]) == ("complete", COUNT)
    assert [share["encoded"] > 0 for share in report["workers"]] == [True, True]
    ends_new(url)


def test_torchrun_starts_workers_again_of_which_one_was_killed(files: Path, postgres_url: Callable[[], str]) -> None:
    pytest.importorskip("torch", reason="torchrun comes with torch, which is not installed")
    url = filled(postgres_url())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["--max-restarts", "1", "-m", "bowerbird", "upgrade", "run", url, *COMMAND]
    process = subprocess.Popen(
        [*launcher, *command, "--engine", "torchrun", "--rate", "30"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        moved = 0
        with open_gallery(url) as gallery:
            deadline = time.monotonic() + 120
            while moved < 20:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
                snapshot = gallery.snapshot()
                moved = snapshot.new.count if snapshot.upgrade is not None else 0
            assert moved < COUNT
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    report = json.loads([line for line in out.splitlines() if line.startswith("{")][-1])
    assert report["reason"] == "complete" and 0 < report["encoded"] < COUNT
    ends_new(url)


def workers_of(launcher: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher:
            found.append(int(folder.name))
    return sorted(found)
