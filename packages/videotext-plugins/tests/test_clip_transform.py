"""``ClipTransform``: one clip and one caption of a video for a training batch."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_files import truncated, video

from bowerbird.data.images import Preprocessing
from bowerbird.errors import DataError, InputError
from bowerbird_videotext.data_configs import ClipAugmentation
from bowerbird_videotext.transforms import ClipTransform, random_box

PLAIN = Preprocessing(size=16, mean=(0, 0, 0), std=(1, 1, 1))


def item(path: Path, **more: Any) -> dict[str, Any]:
    return {"video": str(path), "text": "it becomes bright", "item_id": "a", "where": "'t.csv', line 2", **more}


def brightness(clip: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.rint(clip.mean(axis=(1, 2, 3)) * 255 / 30)


def test_a_clip_has_one_frame_of_every_part_and_differs_from_epoch_to_epoch(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 8)
    transform = ClipTransform(PLAIN, 4)
    drawn = {tuple(brightness(transform(item(path), np.random.default_rng(i))["video"])) for i in range(12)}
    assert len(drawn) > 1
    assert all(frame // 2 == part for clip in drawn for part, frame in enumerate(clip))
    uniform = ClipTransform(PLAIN, 4, ClipAugmentation(sampling="uniform"))
    assert brightness(uniform(item(path), np.random.default_rng(0))["video"]).tolist() == [0, 2, 4, 6]


def test_a_clip_depends_on_its_generator_alone(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 8)
    transform = ClipTransform(PLAIN, 4, ClipAugmentation(crop=(0.3, 0.9), flip=0.5))
    first = transform(item(path), np.random.default_rng(5))
    transform(item(path), np.random.default_rng(6))
    again = pickle.loads(pickle.dumps(transform))(item(path), np.random.default_rng(5))
    assert (first["video"] == again["video"]).all()


def test_a_short_video_and_a_picture_are_padded_with_zeros(tmp_path: Path) -> None:
    short = ClipTransform(PLAIN, 4)(item(video(tmp_path / "a.mp4", 3)), np.random.default_rng(0))["video"]
    assert short.shape == (4, 3, 16, 16)
    assert short.dtype == np.float32
    assert brightness(short[:3]).tolist() == [0, 1, 2]
    assert not short[3].any()
    picture = {"image": Image.new("RGB", (20, 20), (255, 255, 255)), "text": "white", "item_id": "p"}
    clip = ClipTransform(PLAIN, 2)(picture, np.random.default_rng(0))["video"]
    assert clip[0].min() == 1
    assert not clip[1].any()


def test_one_crop_and_one_mirroring_hold_for_all_frames() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    transform = ClipTransform(PLAIN, 3, ClipAugmentation(crop=(0.2, 0.6), flip=0.5))
    for seed in range(6):
        images = transform.augmented([Image.fromarray(noise)] * 3, np.random.default_rng(seed))
        assert all((np.asarray(images[0]) == np.asarray(image)).all() for image in images)
        assert images[0].size != (48, 32)
    mirror = ClipTransform(PLAIN, 3, ClipAugmentation(flip=1.0))
    mirrored = mirror.augmented([Image.fromarray(noise)], np.random.default_rng(0))
    assert (np.asarray(mirrored[0]) == noise[:, ::-1]).all()


def test_by_default_nothing_is_cropped_or_mirrored(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    clip = ClipTransform(PLAIN, 1)({"image": picture, "text": "noise"}, np.random.default_rng(0))["video"]
    assert np.array_equal(clip[0], PLAIN(picture))


def test_a_random_box_has_the_share_of_the_area_that_was_asked_for() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = random_box((100, 60), (0.25, 0.5), (0.75, 4 / 3), generator)
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 60
        assert 0.22 <= (right - left) * (bottom - top) / 6000 <= 0.53


def test_one_of_several_captions_is_drawn_and_the_rest_of_the_item_is_kept(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4")
    transform = ClipTransform(PLAIN, 2)
    made = [transform(item(path, text=["x", "y", "z"], index=7), np.random.default_rng(i)) for i in range(30)]
    assert {entry["text"] for entry in made} == {"x", "y", "z"}
    assert all(entry["caption"] == entry["text"] for entry in made)
    assert {key: made[0][key] for key in ("index", "item_id", "source")} == {
        "index": 7, "item_id": "a", "source": str(path),
    }  # fmt: skip
    silent = ClipTransform(PLAIN, 2, captions=False)
    assert "text" not in silent(item(path), np.random.default_rng(0))


def test_what_cannot_be_read_is_named_by_file_and_row(tmp_path: Path) -> None:
    transform, generator = ClipTransform(PLAIN, 2), np.random.default_rng(0)
    with pytest.raises(DataError, match=r"'t.csv', line 2: .*gone\.mp4"):
        transform(item(tmp_path / "gone.mp4"), generator)
    with pytest.raises(DataError, match=r"'t.csv', line 2: .*half\.mp4"):
        transform(item(truncated(tmp_path / "half.mp4")), generator)
    with pytest.raises(InputError, match=r"'t.csv', line 2: no caption"):
        transform(item(video(tmp_path / "a.mp4"), text=[]), generator)
    with pytest.raises(InputError, match=r"'t.csv', line 2: the caption ' ' is empty"):
        transform(item(video(tmp_path / "b.mp4"), text=" "), generator)
    with pytest.raises(InputError, match="items have no video; they have label"):
        transform({"label": 3}, generator)


def test_settings_that_make_no_clip_are_refused() -> None:
    with pytest.raises(InputError, match="1 frame or more"):
        ClipTransform(PLAIN, 0)
    with pytest.raises(InputError, match="encoder of videos"):
        ClipTransform(PLAIN, None)
    for values in ({"crop": (0.9, 0.5)}, {"crop": (0, 1)}, {"crop_ratio": (2, 1)}, {"flip": 2}):
        with pytest.raises(ValueError, match=r"crop|flip"):
            ClipAugmentation(**values)
