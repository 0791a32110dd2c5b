"""Galleries of videos: filled with clips, searched by sentences and by moments, moved to another encoder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from training_fixtures import TinyConfig, TinyEncoder
from video_files_world import write

from bowerbird.batch import Batch
from bowerbird.cli import main
from bowerbird.data.dataset import Dataset
from bowerbird.data.images import Preprocessing
from bowerbird.data.videos import prepare_clip, read_clip
from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import DataError, InputError
from bowerbird.gallery import Gallery
from bowerbird.gallery.images import add_images, search_images, search_texts
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Encoder, Features
from bowerbird.records import DatasetRecord, EncoderRecord
from bowerbird.registry import get_registry
from bowerbird.train.data import ordered_batches
from bowerbird.upgrade.serve import serve

BOWERBIRD_API = "1.0"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: int = 4
    turned: bool = False


class ColourEncoder(Encoder):
    """A clip's mean colour, its first and its last; a sentence as the sum of the colours it names."""

    preprocessing = Preprocessing(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")  # type: ignore[arg-type]
    embed_dim = 3

    def __init__(self, config: ColourConfig) -> None:
        super().__init__()
        self.frames = config.frames
        self.order = torch.tensor([1, 2, 0] if config.turned else [0, 1, 2])
        self.weight = torch.nn.Parameter(torch.ones(()))

    @classmethod
    def build(cls, config: ColourConfig) -> Self:
        return cls(config)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids = torch.tensor([[int(word in text.split()) for word in COLOURS] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def forward(self, batch: Batch) -> Features:
        if "video" in batch:
            assert batch["video"].shape[1:] == (self.frames, 3, 8, 8)
            found = batch["video"].mean(dim=(1, 3, 4))
        else:
            found = batch["text"]["input_ids"].float()
        return Features(pooled=self.weight * found[:, self.order] + 1e-3)


class Strips(Dataset):
    """One video per colour, with a caption or two."""

    classes = tuple(COLOURS)
    folder = Path()

    @classmethod
    def build(cls, config: Any, split: str | None) -> Self:
        return cls()

    def __len__(self) -> int:
        return len(COLOURS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.item_ids[index]
        text: Any = f"a {name} strip" if index else ["a red strip", "something else"]
        return {"video": f"{self.folder}/{name}.mp4", "text": text, "label": index, "item_id": name}

    @property
    def item_ids(self) -> Sequence[str]:
        return list(COLOURS)


@hookimpl
def bowerbird_encoders() -> Iterator[EncoderRecord]:
    here = {"target": f"{__name__}:ColourEncoder", "config": f"{__name__}:ColourConfig"}
    yield EncoderRecord(name="strips:colour", **here, summary="Colours.", inputs=("video", "text"), outputs=("pooled",))
    tiny = {"target": "training_fixtures:TinyEncoder", "config": "training_fixtures:TinyConfig"}
    yield EncoderRecord(name="strips:pictures", **tiny, summary="Pictures.", inputs=("image",), outputs=("pooled",))


@hookimpl
def bowerbird_datasets() -> Iterator[DatasetRecord]:
    here = {"target": f"{__name__}:Strips", "config": None}
    yield DatasetRecord(name="strips:strips", **here, summary="Strips.", provides=("video", "text", "label"))


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[None]:
    get_registry().register_module("strips", sys.modules[__name__])
    yield
    get_registry().unregister("strips")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("old", {}), ("new", {"turned": True, "frames": 2})):
        save_encoder(ColourEncoder(ColourConfig(**config)), folder / name, use="strips:colour", config=config)
    save_encoder(TinyEncoder(TinyConfig()), folder / "pictures", use="strips:pictures", config={})
    return folder


def strip(*colours: str) -> np.ndarray:
    """One second (8 frames) of each colour."""
    return np.concatenate([np.full((8, 16, 16, 3), COLOURS[name], np.uint8) for name in colours])


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    for name in COLOURS:
        write(folder / f"{name}.mp4", strip(name))
    write(folder / "flag.mp4", strip("red", "green", "blue"))
    Image.new("RGB", (9, 9), "blue").save(folder / "still.png")
    monkeypatch.setattr(Strips, "folder", folder)
    return folder


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def hits(*arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("gallery", "search", *arguments, "--json").output)["results"]
    return found[0]["hits"]


@pytest.fixture
def filled(films: Path, models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "gallery"
    run("gallery", "create", path, "--encoder", models / "old")
    run("gallery", "add", path, "--folder", films)
    return path


# ------------------------------------------------------------------------------------------------ the encoder


def test_videos_and_texts_become_vectors_of_one_space(films: Path, models: Path) -> None:
    encoder = load_encoder(models / "old")
    videos = encoder.encode([films / "red.mp4", f"{films}/flag.mp4#t=1,2", films / "still.png"], batch_size=2)
    texts = encoder.encode_texts(["a red strip", "green", "blue and so on"])
    assert videos.shape == texts.shape == (3, 3)
    assert (videos @ texts.T).argmax(axis=1).tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="text to be encoded is empty"):
        encoder.encode_texts(["red", " "])
    with pytest.raises(DataError, match=r"gone\.mp4: the file does not exist"):
        encoder.encode([films / "gone.mp4"])


@pytest.mark.parametrize(("batch_size", "videos"), [(1, 1), (4, 1), (11, 2), (64, 5)])
def test_a_batch_of_videos_has_no_more_frames_than_a_batch_of_pictures_has_pictures(
    films: Path, models: Path, batch_size: int, videos: int
) -> None:
    encoder = load_encoder(models / "old")  # of 4 frames
    sources = [films / "red.mp4", films / "green.mp4", films / "flag.mp4", films / "still.png", films / "red.mp4"]
    batches = list(encoder.encode_batches(sources, batch_size=batch_size))
    assert [len(rows) for _, rows in batches] == [min(videos, 5 - start) for start in range(0, 5, videos)]
    assert np.concatenate([positions for positions, _ in batches]).tolist() == list(range(5))
    done: list[int] = []
    whole = encoder.encode(sources, batch_size=batch_size, progress=done.append)
    assert sum(done) == 5
    np.testing.assert_array_equal(whole, np.concatenate([rows for _, rows in batches]))


def test_an_encoder_without_texts_says_so(models: Path) -> None:
    with pytest.raises(InputError, match=r"pictures.*takes no texts"):
        load_encoder(models / "pictures").encode_texts(["red"])


def test_one_sentence_is_not_searched_letter_by_letter(filled: Path, models: Path) -> None:
    encoder = load_encoder(models / "old")
    with Gallery.open(filled, readonly=True) as gallery:
        for ask in (
            lambda: search_texts(gallery, encoder, "red"),
            lambda: serve(gallery, [encoder]).search(texts="red"),
        ):
            with pytest.raises(InputError, match=r"\['red'\] is a list of it"):
                ask()


def test_a_data_set_of_videos_is_encoded_in_order(films: Path, models: Path) -> None:
    encoder = load_encoder(models / "old")
    assert encoder.encode_dataset(Strips()).argmax(axis=1).tolist() == [0, 1, 2]
    device = torch.device("cpu")
    (batch,) = ordered_batches(encoder.module, Strips(), keys=("video", "label"), batch_size=12, device=device)
    assert torch.equal(batch["video"][1], torch.from_numpy(_clip(films / "green.mp4")))
    assert batch["label"].tolist() == [0, 1, 2]
    (both,) = ordered_batches(encoder.module, Strips(), keys=("video", "text"), batch_size=12, device=device)
    assert torch.equal(both["video"], batch["video"])
    assert both["text"]["input_ids"].argmax(dim=1).tolist() == [0, 1, 2]  # of several captions the first
    few = ordered_batches(encoder.module, Strips(), keys=("video",), batch_size=9, device=device)
    assert [len(batch["video"]) for batch in few] == [2, 1]  # 9 frames are two clips of 4


def _clip(path: Path) -> Any:
    return prepare_clip(read_clip(path, 4), ColourEncoder.preprocessing, 4)


# ------------------------------------------------------------------------------------------------ filling


def test_a_folder_of_videos_is_one_vector_each(filled: Path, films: Path) -> None:
    with Gallery.open(filled, readonly=True) as gallery:
        assert sorted(gallery.get(name).id for name in gallery_ids(gallery)) == [
            "blue.mp4", "flag.mp4", "green.mp4", "red.mp4", "still.png",
        ]  # fmt: skip
        flag, still = gallery.get("flag.mp4"), gallery.get("still.png")
    assert flag.uri == str(films / "flag.mp4") and flag.metadata == {"start": 0, "end": 3}
    assert still.metadata == {}
    again = json.loads(run("gallery", "add", filled, "--folder", films, "--json").output)
    assert (again["added"], again["replaced"], again["unchanged"]) == (0, 0, 5)
    write(films / "red.mp4", strip("red", "red"))
    again = json.loads(run("gallery", "add", filled, "--folder", films, "--json").output)
    assert (again["replaced"], again["unchanged"]) == (1, 4)


def gallery_ids(gallery: Gallery) -> list[str]:
    return [item.id for item in gallery.items()]


def test_long_videos_are_cut_into_clips_of_their_own_times(films: Path, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "clips"
    run("gallery", "create", path, "--encoder", models / "old")
    run("gallery", "add", path, "--folder", films, "--clip-seconds", 1)
    with Gallery.open(path, readonly=True) as gallery:
        assert sorted(gallery_ids(gallery)) == [
            "blue.mp4", "flag.mp4#t=0,1", "flag.mp4#t=1,2", "flag.mp4#t=2,3", "green.mp4", "red.mp4", "still.png",
        ]  # fmt: skip
        clip = gallery.get("flag.mp4#t=1,2")
    assert clip.uri == f"{films}/flag.mp4#t=1,2"
    assert clip.metadata == {"video": "flag.mp4", "start": 1, "end": 2}
    first = hits(path, "--text", "green", "--where", "video=flag.mp4", "-k", 1)[0]
    assert (first["id"], first["start"], first["end"]) == ("flag.mp4#t=1,2", 1, 2)
    again = json.loads(run("gallery", "add", path, "--folder", films, "--clip-seconds", 1, "--json").output)
    assert (again["added"], again["unchanged"]) == (0, 7)


def test_a_moment_and_a_data_set_are_added_too(films: Path, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "clips"
    run("gallery", "create", path, "--encoder", models / "old")
    run("gallery", "add", path, f"{films}/flag.mp4#t=2,2.5")
    run("gallery", "add", path, "--dataset", "strips:strips")
    found = hits(path, "--text", "something blue", "-k", 2)
    assert [hit["id"] for hit in found] == ["blue", f"{films}/flag.mp4#t=2,2.5"] or found[0]["distance"] == 0
    assert {hit["id"]: (hit["start"], hit["end"]) for hit in found}[f"{films}/flag.mp4#t=2,2.5"] == (2, 2.5)


def test_unreadable_videos_are_skipped_only_if_told_and_listed(films: Path, models: Path, tmp_path: Path) -> None:
    whole = (films / "flag.mp4").read_bytes()
    (films / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (films / "empty.mp4").write_bytes(b"")
    path = tmp_path / "gallery"
    run("gallery", "create", path, "--encoder", models / "old")
    for more in ((), ("--clip-seconds", 1)):
        said = run("gallery", "add", path, "--folder", films, *more, code=2).output
        assert str(films / "cut.mp4") in said and "--on-error skip" in said
        found = json.loads(run("gallery", "add", path, "--folder", films, "--on-error", "skip", *more, "--json").output)
        assert set(found["skipped"]) == {"cut.mp4", "empty.mp4"}
        assert str(films / "cut.mp4") in found["skipped"]["cut.mp4"]
    said = run("gallery", "add", path, f"{films}/red.mp4#t=5,6", code=2).output
    assert "the moment starts at 5 s, but the video has a length of 1.000 s" in said


# ------------------------------------------------------------------------------------------------ searching


def test_a_sentence_finds_clips_with_their_times(filled: Path) -> None:
    found = hits(filled, "--text", "a green strip", "-k", 5)
    assert found[0]["id"] == "green.mp4" and (found[0]["start"], found[0]["end"]) == (0, 1)
    assert found[1]["id"] == "flag.mp4" and found[1]["end"] == 3
    assert "start" not in next(hit for hit in found if hit["id"] == "still.png")
    lines = run("gallery", "search", filled, "--text", "green", "--text", "red", "-k", 2).output.splitlines()
    assert lines[0] == "green" and lines[1].endswith("green.mp4  0-1 s") and lines[2].endswith("flag.mp4  0-3 s")
    assert lines[3] == "red" and "red.mp4" in lines[4]


def test_a_moment_of_a_video_finds_videos(filled: Path, films: Path) -> None:
    assert hits(filled, "--video", f"{films}/flag.mp4#t=2", "-k", 1)[0]["id"] in ("blue.mp4", "still.png")
    assert hits(filled, "--image", films / "still.png", "-k", 2)[0]["distance"] == pytest.approx(0, abs=1e-6)
    with Gallery.open(filled, readonly=True) as gallery:
        encoder = load_encoder(str(gallery.spaces()[0].encoder))
        assert search_images(gallery, encoder, [films / "red.mp4"], 1).ids == [["red.mp4"]]
        assert search_texts(gallery, encoder, ["red"], 1).ids == [["red.mp4"]]


def test_encoders_of_pictures_refuse_texts_and_videos(films: Path, models: Path, tmp_path: Path) -> None:
    path = tmp_path / "pictures"
    run("gallery", "create", path, "--encoder", models / "pictures")
    run("gallery", "add", path, "--folder", films)
    with Gallery.open(path, readonly=True) as gallery:
        assert gallery_ids(gallery) == ["still.png"]
    assert "takes no texts" in run("gallery", "search", path, "--text", "red", code=2).output
    assert "not videos" in run("gallery", "search", path, "--video", films / "red.mp4", code=2).output
    said = run("gallery", "add", path, "--folder", films, "--clip-seconds", 1, code=2).output
    assert "takes pictures" in said
    for asked in (("add", path, films / "red.mp4"), ("search", path, "--image", films / "red.mp4")):
        said = run("gallery", *asked, code=2).output
        assert "red.mp4: it is a video, and pictures are asked for" in said
    said = run("gallery", "search", path, "--text", "red", "--image", films / "still.png", code=2).output
    assert "one of: --image, --text, --video" in said


# ------------------------------------------------------------------------------------------------ upgrades, embed


def test_a_gallery_of_videos_moves_to_another_encoder_by_its_uris(filled: Path, models: Path) -> None:
    run("upgrade", "run", filled, "--to", models / "new", "--stop-at-share", 0.5, "--strategy", "full")
    with Gallery.open(filled, readonly=True) as gallery:
        assert len([part for part in gallery.snapshot().parts if part.count]) == 2
    for text in COLOURS:
        found = json.loads(run("upgrade", "serve", filled, "--text", text, "-k", 3, "--json").output)[0]["results"]
        assert {(hit["start"], hit["end"]) for hit in found if hit["id"] == f"{text}.mp4"} == {(0, 1)}
    said = run("upgrade", "serve", filled, "--text", "red", "--where", "label=none").output
    assert "nothing found" in said
    assert "red.mp4  0-1 s" in run("upgrade", "serve", filled, "--text", "red", "-k", 3).output
    run("upgrade", "run", filled)
    run("upgrade", "finish", filled)
    assert hits(filled, "--text", "red", "-k", 1)[0]["id"] == "red.mp4"
    assert hits(filled, "--text", "red", "-k", 1)[0]["end"] == 1


def test_a_service_takes_texts_or_images_not_both(filled: Path, models: Path) -> None:
    with Gallery.open(filled, readonly=True) as gallery:
        service = serve(gallery, [load_encoder(models / "old")])
        assert service.search(texts=["red"], k=1).ids == [["red.mp4"]]
        with pytest.raises(InputError, match="needs images, or texts"):
            service.search(["a.png"], texts=["red"])


def test_embed_takes_the_videos_of_a_folder(films: Path, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.npy"
    (films / "bad.mp4").write_bytes(b"bad")
    run("embed", models / "old", films, "--out", out, code=2)
    found = json.loads(run("embed", models / "old", films, "--out", out, "--skip-errors", "--json").output)
    assert found["count"] == 5 and list(found["skipped"]) == ["bad.mp4"]
    ids = (tmp_path / "vectors.ids.txt").read_text().split()
    assert ids == ["blue.mp4", "flag.mp4", "green.mp4", "red.mp4", "still.png"]
    assert np.load(out)[3].argmax() == 0


def test_videos_from_python_get_their_times(films: Path, models: Path, tmp_path: Path) -> None:
    encoder = load_encoder(models / "old")
    with Gallery.create(tmp_path / "g", encoder.space()) as gallery:
        sources = [f"{films}/flag.mp4#t=0.5,1", films / "red.mp4"]
        added = add_images(gallery, encoder, sources, ids=["a", "b"], metadata=[{"year": 2024}, None])
        assert added.added == 2
        assert gallery.get("a").metadata == {"year": 2024, "start": 0.5, "end": 1}
        assert gallery.get("b").metadata == {"start": 0, "end": 1}
