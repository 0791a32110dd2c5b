"""train, evaluate, export and embed as commands: results, files, exit codes and messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_fixtures as tiny
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open

from bowerbird.cli import main
from bowerbird.embed import embed_to_file
from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.registry import get_registry

RECIPE = """
name = "squares"
[encoder]
use = "tiny:net"
[objective]
use = "core:softmax"
[dataset]
use = "tiny:squares"
split = "train"
[train]
epochs = 20
batch_size = 8
lr = 0.01
device = "cpu"
[[evaluate]]
name = "seen"
use = "core:retrieval"
dataset = "tiny:squares"
query_split = "test"
gallery_split = "test"
samples = 10
"""


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    get_registry().register_module("tiny", tiny.make_plugin())
    tiny.Faulty.armed = True
    yield
    get_registry().unregister("tiny")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    save_encoder(tiny.TinyEncoder(tiny.TinyConfig()), tmp_path / "encoder", use="tiny:net", config={})
    return tmp_path / "encoder"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (7, 9, 9, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / ("more" if i % 2 else ".") / f"{i}.png")
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_recipe_is_trained_evaluated_exported_and_its_encoder_embeds(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    done = run("train", tmp_path / "r.toml", "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)["metrics"]
    assert metrics["seen/R@1"] > 0.95
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    with np.load(tmp_path / "run" / "per_query" / "seen.npz") as file:
        per_query = dict(file)
    assert per_query["R@1"].shape == (40,)
    assert per_query["R@1"].mean() == pytest.approx(metrics["seen/R@1"])

    again = run("evaluate", tmp_path / "run", "--evaluator", "core:knn", "--dataset", "tiny:squares",
                "--set", "k=5", "--set", "samples=10", "--json")  # fmt: skip
    assert json.loads(again.stdout)["core:knn/top1"] > 0.95
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"seen/R@1", "core:knn/top1"} <= kept.keys()

    exported = run("export", tmp_path / "run", "--to", tmp_path / "model", "--json")
    fingerprint = json.loads(exported.stdout)["fingerprint"]
    assert load_encoder(tmp_path / "model").fingerprint == fingerprint == load_encoder(tmp_path / "run").fingerprint
    assert (tmp_path / "model" / "classifier.safetensors").is_file()
    assert "squares" in (tmp_path / "model" / "README.md").read_text()

    embedded = run(
        "embed", tmp_path / "model", "tiny:squares", "--split", "test", "--out", tmp_path / "v.npy", "--json"
    )
    assert json.loads(embedded.stdout)["count"] == 40
    expected = load_encoder(tmp_path / "run").encode_dataset(tiny.Squares(seed=1))
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-6)
    assert (tmp_path / "v.ids.txt").read_text().split() == list(tiny.Squares(seed=1).item_ids)


def test_a_dry_run_prints_the_resolved_recipe_and_builds_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    done = run("train", tmp_path / "r.toml", "--set", "train.epochs=3", "--out", tmp_path / "run", "--dry-run")
    (tmp_path / "resolved.toml").write_text(done.stdout)
    again = run("train", tmp_path / "resolved.toml", "--dry-run")
    assert again.stdout == done.stdout
    assert "epochs = 3" in done.stdout
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_with_code_130_and_the_command_that_continues(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    faulty = (
        "--set",
        "objective.use=tiny:faulty",
        "--set",
        "objective.fault=interrupt",
        "--set",
        "objective.at_step=4",
    )
    stopped = run("train", tmp_path / "r.toml", *faulty, "--out", tmp_path / "run")
    assert stopped.exit_code == 130
    assert f"--out {tmp_path / 'run'} --resume auto" in stopped.stderr
    assert run("train", tmp_path / "r.toml", *faulty, "--out", tmp_path / "run", "--resume", "auto").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "no such file"),
        (["train"], "RECIPE is missing"),
        (["evaluate", "{encoder}"], "which evaluator?"),
        (["evaluate", "{encoder}", "--evaluator", "core:knnn"], "Did you mean 'core:knn'"),
        (["evaluate", "{encoder}", "--evaluator", "core:knn"], "dataset: this key of core:knn is required"),
        (["export", "nowhere/run", "--to", "x"], "no such folder"),
        (["export", "{encoder}", "--to", "{encoder}-timm", "--format", "timm"], "is no timm model"),
        (["embed", "{encoder}", "nowhere", "--out", "x.npy"], "no such folder"),
        (["embed", "{encoder}", "tiny:squares", "--split", "tset", "--out", "x.npy"], "no split 'tset'"),
        (["embed", "{encoder}", "tiny:squares", "--out", "x.csv"], "Accepted: .npy, .safetensors, .parquet"),
    ],
)
def test_a_users_error_is_one_message_and_exit_code_2(arguments: list[str], message: str, encoder: Path) -> None:
    done = run(*[argument.format(encoder=encoder) for argument in arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------- embed


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_every_kind_of_file_holds_the_same_vectors_and_ids(
    kind: str, encoder: Path, photos: Path, tmp_path: Path
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"v.{kind}"
    assert run("embed", encoder, photos, "--out", out).exit_code == 0
    ids = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    if kind == "npy":
        vectors, found = np.load(out), out.with_suffix(".ids.txt").read_text().splitlines()
    elif kind == "safetensors":
        with safe_open(out, "numpy") as file:
            vectors, found = file.get_tensor("vectors"), json.loads(file.metadata()["ids"])
    else:
        from pyarrow import parquet

        table = parquet.read_table(out).to_pydict()
        vectors, found = np.asarray(table["vector"], np.float32), table["id"]
    assert found == ids
    np.testing.assert_allclose(vectors, load_encoder(encoder).encode([photos / name for name in ids]), atol=1e-6)
    assert not list(tmp_path.glob("*.part*"))


def test_an_unreadable_image_is_named_and_can_be_skipped(encoder: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "3.5-broken.png").write_bytes(b"not a picture")
    failed = run("embed", encoder, photos, "--out", tmp_path / "v.npy")
    assert failed.exit_code == 2
    assert "3.5-broken.png" in failed.stderr
    assert not (tmp_path / "v.npy").exists()
    done = run("embed", encoder, photos, "--out", tmp_path / "v.npy", "--skip-errors", "--json")
    assert list(json.loads(done.stdout)["skipped"]) == ["3.5-broken.png"]
    assert np.load(tmp_path / "v.npy").shape == (7, 8)
    assert "3.5-broken.png" not in (tmp_path / "v.ids.txt").read_text()


class Dying:
    """Pictures of which one cannot be read until it is repaired."""

    def __init__(self, pictures: list[Image.Image], dies_at: int) -> None:
        self.pictures, self.dies_at, self.read = pictures, dies_at, set()  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Image.Image:
        if index == self.dies_at:
            raise KeyboardInterrupt
        self.read.add(index)
        return self.pictures[index]


@pytest.mark.parametrize("dies_at", [0, 5, 19])
def test_an_interrupted_embedding_continues_and_gives_the_same_file(
    dies_at: int, encoder: Path, tmp_path: Path
) -> None:
    loaded = load_encoder(encoder)
    dataset = tiny.Squares(seed=0, count=20)
    pictures = [dataset[i]["image"] for i in range(20)]
    embed_to_file(loaded, dataset.item_ids, pictures, tmp_path / "whole.npy", batch_size=2)
    items = Dying(pictures, dies_at)
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(loaded, dataset.item_ids, items, tmp_path / "v.npy", batch_size=2)  # type: ignore[arg-type]
    items.dies_at, items.read = -1, set()
    result = embed_to_file(loaded, dataset.item_ids, items, tmp_path / "v.npy", batch_size=2)  # type: ignore[arg-type]
    assert result.resumed_at == dies_at // 2 * 2
    assert min(items.read) == result.resumed_at
    assert np.array_equal(np.load(tmp_path / "v.npy"), np.load(tmp_path / "whole.npy"))


def test_what_another_encoder_began_is_not_continued(encoder: Path, tmp_path: Path) -> None:
    dataset = tiny.Squares(seed=0, count=6)
    pictures = [dataset[i]["image"] for i in range(6)]
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(load_encoder(encoder), dataset.item_ids, Dying(pictures, 4), tmp_path / "v.npy", batch_size=2)  # type: ignore[arg-type]
    other = tiny.TinyEncoder(tiny.TinyConfig())
    save_encoder(other, tmp_path / "other", use="tiny:net", config={})
    result = embed_to_file(load_encoder(tmp_path / "other"), dataset.item_ids, pictures, tmp_path / "v.npy")
    assert result.resumed_at == 0
    np.testing.assert_allclose(
        np.load(tmp_path / "v.npy"), load_encoder(tmp_path / "other").encode(pictures), atol=1e-6
    )


@pytest.mark.parametrize("name", ["train", "evaluate", "export", "embed"])
def test_help_shows_examples(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0
    assert f"bowerbird {name}" in done.output.split("Examples:")[1]
