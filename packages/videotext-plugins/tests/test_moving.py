"""``videotext:moving``: what the program promises, on handwritten digits, which need no files."""

from __future__ import annotations

import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bowerbird.data.fashion_mnist import DEBIAN_ROOT
from bowerbird.data.uris import open_dataset
from bowerbird.data.videos import read_frames, video_info
from bowerbird.data.views import Subset
from bowerbird.errors import DataError, InputError, RecipeError, UnknownNameError
from bowerbird_videotext.data_configs import VERBS, MovingConfig, digits, emoji, rich, single, still
from bowerbird_videotext.moving import Moving
from bowerbird_videotext.sprites import Sprites
from bowerbird_videotext.video_set import captions_of, video_text_set

ACTOR = r"an? (?P<colour{0}>\w+) (?P<noun{0}>\w+) (?P<verb{0}>moves \w+|stays still|grows|shrinks|spins)"
CAPTION = re.compile(f"{ACTOR.format(1)} while {ACTOR.format(2)}")


def moving(root: Path, split: str = "train", **settings: Any) -> Moving:
    return Moving.build(MovingConfig(root=root, **{**digits(), **settings}), split)


def test_a_video_depends_on_settings_split_and_position_alone(tmp_path: Path) -> None:
    few, many = moving(tmp_path / "a", counts={"train": 5}), moving(tmp_path / "b", counts={"train": 50})
    assert many.captions(4) == few.captions(4)  # nothing else was asked for before
    assert Path(many.video(4)).read_bytes() == Path(few.video(4)).read_bytes()
    other = moving(tmp_path / "a", seed=1)
    assert other.captions(4) != few.captions(4)
    assert (other.pixels(4) != few.pixels(4)).any()


def test_the_file_shows_what_the_program_drew(tmp_path: Path) -> None:
    dataset = moving(tmp_path)
    item = dataset[2]
    info = video_info(item["video"])
    assert (info.frames, info.height, info.width, info.rate) == (8, 32, 32, 8.0)
    difference = np.abs(read_frames(item["video"], range(8)).astype(int) - dataset.pixels(2))
    assert difference.mean() < 8  # of 255; colours have half the resolution
    assert item["text"] == dataset.captions(2)[0]
    assert item["item_id"] == "train/000002"


def test_captions_follow_the_grammar_and_name_two_different_nouns(tmp_path: Path) -> None:
    dataset = moving(tmp_path, verbs=VERBS)
    for caption in captions_of(dataset)[:300]:
        found = CAPTION.fullmatch(caption)
        assert found, caption
        assert found["noun1"] != found["noun2"]
        assert {found["colour1"], found["colour2"]} <= set(dataset.colours)
        assert {found["verb1"], found["verb2"]} <= set(dataset.verbs)


def test_sprites_do_what_the_caption_says(tmp_path: Path) -> None:
    dataset = moving(tmp_path, verbs=VERBS, sprite_size=10)
    seen = set()
    for index in range(60):
        for actor, boxes in zip(dataset.actors(index), dataset.boxes(index).transpose(1, 0, 2), strict=True):
            seen.add(actor.verb)
            way = (boxes[-1, :2] + boxes[-1, 2:] - boxes[0, :2] - boxes[0, 2:]) / 2
            sides = boxes[:, 2:] - boxes[:, :2]
            direction = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
            along = direction.get(actor.verb, (0, 0))
            assert (np.sign(way) * (np.abs(way) > 2) == along).all(), (actor, way)
            if actor.verb == "grows":
                assert sides[-1].max() > 1.6 * sides[0].max()
            elif actor.verb == "shrinks":
                assert sides[0].max() > 1.6 * sides[-1].max()
            elif actor.verb != "spins":
                assert (sides == sides[0]).all()
            assert boxes.min() >= 0
            assert boxes.max() <= 32
    assert seen == set(VERBS)


def test_a_sprite_lies_in_its_box_in_its_colour_and_nothing_else_is_drawn(tmp_path: Path) -> None:
    dataset = moving(tmp_path, colours=["red", "green"])
    for index in range(20):
        frames, boxes = dataset.pixels(index).astype(int), dataset.boxes(index).astype(int)
        front = dataset.actors(index)[1]  # the later one hides the earlier one
        for frame, (behind, (left, top, right, bottom)) in zip(frames, boxes, strict=True):
            part = frame[top:bottom, left:right].reshape(-1, 3)
            part = part[part.max(axis=1) > 0]
            strong, weak = (0, 1) if front.colour == "red" else (1, 0)
            assert (part[:, strong] > part[:, weak]).mean() > 0.6
            frame[top:bottom, left:right] = 0
            frame[behind[1] : behind[3], behind[0] : behind[2]] = 0
            assert not frame.any()


def test_no_two_test_captions_say_the_same_in_either_order(tmp_path: Path) -> None:
    for split in ("val", "test"):
        dataset = moving(tmp_path, split)
        said = {frozenset(dataset.actors(i)) for i in range(len(dataset))}
        assert len(said) == len(dataset) == 256
    assert captions_of(moving(tmp_path, "val")) != captions_of(moving(tmp_path, "test"))


def test_everything_is_said_once_before_training_repeats_anything(tmp_path: Path) -> None:
    dataset = moving(tmp_path, objects=1, colours=["red"], counts={"train": 130, "val": 60, "test": 60})
    said = [dataset.captions(i)[0] for i in range(len(dataset))]
    assert len(set(said[:60])) == len(set(said[60:120])) == 60  # ten digits, six verbs
    with pytest.raises(InputError, match=r"make 60 different captions, and test shall have 61"):
        moving(tmp_path, "test", objects=1, colours=["red"], counts={"test": 61})


def test_no_picture_is_in_two_splits(tmp_path: Path) -> None:
    parts = [Sprites(moving(tmp_path).config.sprites, split) for split in ("train", "val", "test")]
    for positions in zip(*(part.positions for part in parts), strict=True):
        train, val, test = map(set, positions)
        assert not train & val
        assert not train & test
        assert not val & test
        assert len(train) > 7 * len(test) > 0


def test_options_differ_in_one_word_and_only_the_answer_is_true(tmp_path: Path) -> None:
    dataset = moving(tmp_path, "test")
    places, answers = [], []
    for index in range(len(dataset)):
        options, answer = dataset.multiple_choice(index) or ([], 0)
        words = [option.split() for option in options]
        assert options[answer] == dataset.captions(index)[0]
        assert len(set(options)) == 4
        different = [i for i, one in enumerate(zip(*words, strict=True)) if len(set(one)) > 1]
        assert len(different) == 1
        assert len({one[different[0]] for one in words}) == 4  # so that none is nearest to all
        found = [CAPTION.fullmatch(option) for option in options]
        assert all(one and one["noun1"] != one["noun2"] for one in found)
        places.append(different[0])
        answers.append(answer)
    assert set(answers) == {0, 1, 2, 3}
    assert {1, 2, 4} <= set(places)  # colours, nouns, directions


def test_questions_are_answered_by_the_caption(tmp_path: Path) -> None:
    dataset = moving(tmp_path, "test")
    kinds = set()
    for index in range(60):
        found = CAPTION.fullmatch(dataset.captions(index)[0])
        assert found
        for question, answer, kind in dataset.question(index):
            kinds.add(kind)
            if kind == "what":
                verb = question.removeprefix("what ").removesuffix("?")
                right = [found[f"noun{i}"] for i in (1, 2) if found[f"verb{i}"] == verb]
            else:
                which = 1 if found["noun1"] in question.rstrip("?").split() else 2
                right = [found[f"{'verb' if kind == 'motion' else 'colour'}{which}"]]
            assert [answer] == right  # the only one
    assert kinds == {"what", "colour", "motion"}


def test_distractor_boxes_come_after_the_sprites_and_cover_little_of_them(tmp_path: Path) -> None:
    dataset = moving(tmp_path, **still(), size=64)
    boxes = dataset.boxes(3)
    assert boxes.shape == (8, 6, 4)
    assert boxes.dtype == np.float32
    assert (boxes == boxes[0]).all()  # nothing moves
    assert (boxes[:, :2] == moving(tmp_path, verbs=[], size=64).boxes(3)).all()
    sprite = np.zeros((64, 64), bool)
    for left, top, right, bottom in boxes[0, :2].astype(int):
        sprite[top:bottom, left:right] = True
    assert all(sprite[t:b, x:r].mean() < 0.5 for x, t, r, b in boxes[0, 2:].astype(int))
    assert re.fullmatch(r"an? \w+ \w+ and an? \w+ \w+", dataset.captions(3)[0])
    assert {kind for *_, kind in dataset.question(3)} == {"colour"}


def test_with_one_sprite_the_class_is_the_verb(tmp_path: Path) -> None:
    dataset = moving(tmp_path, "test", **single())
    assert dataset.classes == VERBS[:6]
    for index in range(20):
        assert dataset.captions(index)[0].endswith(dataset.classes[dataset[index]["label"]])
    with pytest.raises(InputError, match="no classes"):
        moving(tmp_path).labels()


def test_other_settings_have_another_folder_but_for_what_changes_no_pixel(tmp_path: Path) -> None:
    plain = moving(tmp_path).folder
    assert moving(tmp_path, counts={"train": 7}, choices=3, distractor_boxes=2).folder == plain
    assert moving(tmp_path, frames=9).folder != plain


def test_a_file_is_written_once_and_again_where_it_is_gone(tmp_path: Path) -> None:
    dataset = moving(tmp_path)
    path = Path(dataset.video(0))
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert Path(dataset.video(0)).stat().st_mtime_ns == before[1]
    path.unlink()
    with ThreadPoolExecutor(4) as pool:  # all at once, as reading processes do
        assert set(pool.map(dataset.video, [0] * 8)) == {str(path)}
    assert path.read_bytes() == before[0]
    assert [file.name for file in path.parent.iterdir()] == ["000000.mp4"]  # nothing half-written beside it


def test_reading_processes_get_the_set_without_its_pictures(tmp_path: Path) -> None:
    dataset = moving(tmp_path, counts={"train": 20})
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    assert (pickle.loads(sent).pixels(3) == dataset.pixels(3)).all()


def test_items_are_found_by_address(tmp_path: Path) -> None:
    _, address = open_dataset("videotext:moving", "test", root=str(tmp_path), **digits(), counts={"test": 4})
    uri = f"{address}#test/000003"
    assert (read_frames(uri, [0, 7]) == read_frames(moving(tmp_path, "test").video(3), [0, 7])).all()


def test_subsets_keep_their_captions(tmp_path: Path) -> None:
    whole = moving(tmp_path, counts={"train": 9})
    part = Subset(Subset(whole, [8, 3, 1]), [2, 0])
    assert captions_of(part) == [whole.captions(1)[0], whole.captions(8)[0]]
    assert video_text_set(part, "test")[1] == [1, 8]
    assert list(whole.metadata() or ())[3] == {"text": whole.captions(3)}
    images, _ = open_dataset("core:digits")
    with pytest.raises(InputError, match="Digits is none"):
        captions_of(images)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"no split 'tests'; .*Did you mean 'test'"):
        moving(tmp_path, "tests")
    for values, message in (
        ({"colours": ["red", "violet"]}, "'violet' is not known"),
        ({"verbs": ["grows", "grows"]}, "more than once"),
        ({"counts": {"dev": 3}}, "dev = 3"),
        ({"sprite_size": [20, 30]}, "three quarters"),
    ):
        with pytest.raises(RecipeError, match=message):
            open_dataset("videotext:moving", **values)
    missing = {"source": f"core:fashion-mnist?root={tmp_path}/none"}
    with pytest.raises(DataError, match=r"does not exist.*preset digits needs no files"):
        moving(tmp_path, sprites=missing)
    with pytest.raises(InputError, match=r"no class 'ten' \(names\)"):
        moving(tmp_path, sprites={"source": "core:digits", "names": {"ten": "10"}})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written .*set root"):
        moving(tmp_path / "file")[0]


@pytest.mark.skipif(not DEBIAN_ROOT.is_dir(), reason="needs dataset-fashion-mnist")
def test_by_default_garments_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOWERBIRD_CACHE", str(tmp_path))
    dataset = Moving.build(None, "test")
    assert set(dataset.nouns) >= {"boot", "shirt", "tee"}
    assert Path(dataset[0]["video"]).is_relative_to(tmp_path / "moving")
    varied = Moving.build(MovingConfig(**rich()), "test")
    assert varied.pixels(0).shape == (8, 64, 64, 3)
    assert emoji()["sprites"]["source"] == "emoji:styles"
