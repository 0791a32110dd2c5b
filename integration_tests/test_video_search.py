"""From captions to clips with times: a small dual encoder is trained, exported, fills a gallery, and is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from bowerbird.cli import main
from bowerbird.data.uris import open_dataset
from bowerbird.data.videos import read_frames, video_info, write_video
from bowerbird.encoders import load_encoder
from bowerbird.gallery import Gallery

RECIPE = """
name = "colours"
[encoder]
use = "videotext:dual-encoder"
image_size = 16
resize = "squash"
patch_size = 8
embed_dim = 32
depth = 1
num_heads = 2
frames = 2
projection_dim = 16
text_dim = 32
text_depth = 1
text_heads = 2
mean = [0.0, 0.0, 0.0]
std = [0.3, 0.3, 0.3]
[objective]
use = "videotext:frozen"
[dataset]
use = "videotext:moving"
split = "train"
objects = 1
size = 16
frames = 4
sprite_size = [10, 12]
verbs = "stays still"
sprites = "core:digits"
[dataset.counts]
train = 96
val = 8
test = 16
[train]
batch_size = 32
lr = 3e-3
workers = 0
device = "cpu"
"""
COLOURS = ("red", "green", "blue")


def run(*arguments: object, code: int = 0) -> Any:
    """What the command prints: JSON where it is asked for."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, f"{arguments}\n{result.output}"
    return json.loads(result.stdout) if "--json" in arguments else result.output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained dual encoders, ``old`` and ``new``; a folder of videos, one of which shows three pictures in turn."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "recipe.toml").write_text(RECIPE)
    root = ("--set", f"dataset.root={folder / 'made'}")
    for name, epochs, seed in (("old", 40, 0), ("new", 1, 1)):
        settings = (*root, "--set", f"train.epochs={epochs}", "--set", f"train.seed={seed}")
        run("train", folder / "recipe.toml", "--out", folder / f"run-{name}", *settings)
        run("export", folder / f"run-{name}", "--to", folder / name)
    dataset, _ = open_dataset(test_set(folder), "test")
    films = folder / "films"
    films.mkdir()
    scenes = []
    for colour in COLOURS:
        position = next(i for i in range(len(dataset)) if f" {colour} " in f" {caption(dataset[i])} ")
        video = dataset[position]["video"]
        scenes.append(read_frames(video, range(video_info(video).frames)))
        write_video(films / f"{colour}.mp4", scenes[-1], rate=4)
    write_video(films / "all.mp4", np.concatenate(scenes), rate=4)
    return folder


def test_set(folder: Path) -> str:
    return (
        f"videotext:moving?root={folder / 'made'}&objects=1&size=16&frames=4&sprite_size=[10,12]&sprites=core:digits&"
        "verbs=stays still&counts={train=96,val=8,test=16}"
    )


test_set.__test__ = False  # type: ignore[attr-defined]


def caption(item: dict[str, Any]) -> str:
    return str(item["text"] if isinstance(item["text"], str) else item["text"][0])


@pytest.fixture
def gallery(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "clips"
    run("gallery", "create", path, "--encoder", world / "old")
    run("gallery", "add", path, "--folder", world / "films", "--clip-seconds", 1)
    return path


def test_a_sentence_finds_the_clip_and_says_when(world: Path, gallery: Path) -> None:
    for second, colour in enumerate(COLOURS):
        sentence = next(text for text in captions(world) if f" {colour} " in f" {text} ")
        hits = run("gallery", "search", gallery, "--text", sentence, "-k", 2, "--json")["results"][0]["hits"]
        assert {hit["id"] for hit in hits} == {f"{colour}.mp4", f"all.mp4#t={second},{second + 1}"}
        assert {(hit["start"], hit["end"]) for hit in hits} == {(0, 1), (second, second + 1)}
    assert f"{len(COLOURS) - 1}-{len(COLOURS)} s" in run("gallery", "search", gallery, "--text", "a blue one", "-k", 6)


def captions(world: Path) -> list[str]:
    dataset, _ = open_dataset(test_set(world), "test")
    return [caption(dataset[i]) for i in range(len(dataset))]


def test_results_are_the_cosines_of_the_exported_encoder(world: Path, gallery: Path) -> None:
    encoder = load_encoder(world / "old", device="cpu")
    sources = [world / "films" / "red.mp4", f"{world}/films/all.mp4#t=1,2"]
    cosines = encoder.encode(sources) @ encoder.encode_texts(["a green one"])[0]
    found = run("gallery", "search", gallery, "--text", "a green one", "-k", 6, "--json")["results"][0]["hits"]
    distances = {hit["id"]: hit["distance"] for hit in found}
    assert distances["red.mp4"] == pytest.approx(1 - cosines[0], abs=1e-5)
    assert distances["all.mp4#t=1,2"] == pytest.approx(1 - cosines[1], abs=1e-5)


def test_the_videos_of_a_data_set_are_found_by_their_addresses(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "moving"
    run("gallery", "create", path, "--encoder", world / "old")
    added = run("gallery", "add", path, "--dataset", test_set(world), "--split", "test", "--json")
    assert added["added"] == added["items"] == 16
    with Gallery.open(path, readonly=True) as opened:
        item = next(iter(opened.items()))
    assert item.uri is not None and item.uri.startswith("dataset:videotext:moving?")
    again = run("gallery", "search", path, "--video", item.uri, "-k", 1, "--json")["results"][0]["hits"][0]
    assert again["distance"] == pytest.approx(0, abs=1e-5) and again["end"] > again["start"] == 0


def test_another_encoder_takes_over_while_sentences_are_answered(world: Path, gallery: Path) -> None:
    run("upgrade", "run", gallery, "--to", world / "new", "--stop-at-share", 0.5)
    half = run("upgrade", "serve", gallery, "--text", captions(world)[0], "-k", 6, "--json")[0]
    assert 0 < half["share"] < 1 and {hit["side"] for hit in half["results"]} == {"old", "new"}
    run("upgrade", "run", gallery)
    run("upgrade", "finish", gallery)
    with Gallery.open(gallery, readonly=True) as opened:
        stored = opened.vectors_of(["all.mp4#t=2,3"])
    encoder = load_encoder(world / "new", device="cpu")
    assert np.allclose(stored, encoder.encode([f"{world}/films/all.mp4#t=2,3"]), atol=1e-5)


def test_an_encoder_of_pictures_says_what_it_cannot_do(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "pictures"
    run("gallery", "create", path, "--encoder", "core:efficientnet-lite?model=lite0")
    said = run("gallery", "search", path, "--text", "a red boot", code=2)
    assert "takes no texts" in said and "videotext:dual-encoder" in said
    said = run("gallery", "search", path, "--video", world / "films" / "red.mp4", code=2)
    assert "takes pictures, not videos" in said
