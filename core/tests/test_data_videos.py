"""Videos and moments of them: which frames are read, how they are named, and what is refused."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files_world import STEP, grey_frames, positions, turned, write, write_sound

from bowerbird.data import uris, video_files, videos
from bowerbird.data.dataset import Dataset
from bowerbird.data.images import Preprocessing
from bowerbird.data.moments import Moment, clips_of, moment_uri, split_moment
from bowerbird.data.videos import (
    VideoInfo,
    cut_into_clips,
    decode_clips,
    frame_indices,
    prepare_clip,
    read_clip,
    read_frames,
    video_info,
    video_times,
    videos_in,
    write_video,
)  # fmt: skip
from bowerbird.errors import DataError, InputError
from bowerbird.gallery.images import content_hash, uri_of
from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord
from bowerbird.registry import get_registry

COUNT = 40
BOWERBIRD_API = "1.0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 frames at 8 a second, in containers that know their number of frames and in others."""
    folder = tmp_path_factory.mktemp("videos")
    frames = grey_frames(COUNT)
    for name in ("a.mp4", "a.mkv", "a.ts", "a.mov"):
        write(folder / name, frames)
    write(folder / "a.avi", frames, codec="mpeg4")
    write(folder / "a.mpg", frames, codec="mpeg1video", rate=25)
    write(folder / "bare.h264", frames)
    write(folder / "front.mp4", frames, container={"movflags": "faststart"})
    return folder


# ------------------------------------------------------------------------------------------------ which frames


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.integers(1, 40), st.integers(0, 2**32))
def test_one_frame_of_each_of_nearly_equal_segments(length: int, count: int, seed: int) -> None:
    k = min(length, count)
    edges = [i * length // k for i in range(k + 1)]
    drawn = frame_indices(length, count, mode="random", generator=np.random.default_rng(seed))
    for indices in (frame_indices(length, count), drawn, frame_indices(length, count, offset=seed % 9)):
        assert len(indices) == k and indices.dtype == np.int64
        assert all(low <= index < high for low, index, high in zip(edges, indices, edges[1:], strict=False))
    assert frame_indices(length, count).tolist() == [(a + b - 1) // 2 for a, b in itertools.pairwise(edges)]


def test_any_frame_of_a_segment_may_be_drawn_also_its_last() -> None:
    generator = np.random.default_rng(0)
    seen = np.array([frame_indices(10, 2, mode="random", generator=generator) for _ in range(300)])
    assert set(seen[:, 0]) == {0, 1, 2, 3, 4} and set(seen[:, 1]) == {5, 6, 7, 8, 9}


@pytest.mark.parametrize("wrong", [{"length": 0}, {"count": 0}, {"mode": "middle"}, {"offset": -1}])
def test_senseless_numbers_of_frames_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        frame_indices(**{"length": 5, "count": 2, **wrong})


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.mov", "a.avi", "a.mpg", "bare.h264", "front.mp4"])
def test_frames_are_found_by_their_position_whatever_the_container(made: Path, name: str) -> None:
    info = video_info(made / name)
    assert (info.frames, info.height, info.width) == (COUNT, 32, 48)
    everything = read_frames(made / name, range(COUNT))
    assert positions(everything) == list(range(COUNT))
    some = [0, 5, 5, 11, 12, 13, 30, 39]
    chosen = read_frames(made / name, some)
    assert positions(chosen) == some
    assert np.array_equal(chosen, everything[some])  # a seek changes no pixel
    for last in (23, 38):
        assert np.array_equal(read_frames(made / name, [last]), everything[[last]])


def test_length_and_rate_are_those_of_the_file(made: Path) -> None:
    assert video_info(made / "a.mp4") == VideoInfo(COUNT, 5.0, 8.0, 32, 48)
    assert video_info(made / "a.mkv").seconds == pytest.approx(5.0, abs=0.01)


def test_frames_between_far_ones_are_left_out(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames 3 and 38 are in the first and the last group of twelve: the two groups between are not decoded."""
    seeks: list[int] = []
    found = video_files._from_keyframe
    monkeypatch.setattr(video_files, "_from_keyframe", lambda *args: (seeks.append(args[-1]), found(*args))[1])
    assert positions(read_frames(made / "a.mp4", [3, 4, 38])) == [3, 4, 38]
    assert len(seeks) == 1 and 24 < seeks[0] <= 38
    seeks.clear()
    read_frames(made / "a.mp4", range(COUNT))
    assert not seeks


def test_a_video_of_variable_rate_is_read_by_frame_and_by_time(tmp_path: Path) -> None:
    times = [0, 1, 2, 10, 11, 30, 31, 32, 33, 50]
    path = write(tmp_path / "vfr.mp4", grey_frames(10), rate=10, times=times)
    assert video_info(path).frames == 10
    assert positions(read_frames(path, range(10))) == list(range(10))
    assert positions(read_frames(f"{path}#t=1,3.1", range(3))) == [3, 4, 5]
    assert video_info(f"{path}#t=1,3.1").frames == 3
    assert positions(read_frames(f"{path}#t=4,4.5", [0])) == [8]  # what is on the screen then


@pytest.mark.parametrize(
    ("matrix", "corner", "size"),
    [
        ((1, 0, 0, 1), (0, 0), (32, 48)),
        ((0, 1, -1, 0), (0, -1), (48, 32)),  # a quarter turn clockwise: the corner goes to the right
        ((-1, 0, 0, -1), (-1, -1), (32, 48)),
        ((0, -1, 1, 0), (-1, 0), (48, 32)),
        ((-1, 0, 0, 1), (0, -1), (32, 48)),  # mirrored
    ],
)
def test_a_turned_video_comes_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: tuple[int, int], size: tuple[int, int]
) -> None:
    path = write(tmp_path / "phone.mp4", grey_frames(2))
    path = path if matrix == (1, 0, 0, 1) else turned(path, matrix)
    info = video_info(path)
    frame = read_frames(path, [1])[0]
    assert (info.height, info.width) == frame.shape[:2] == size
    corners = {(y, x): int(frame[y, x].mean()) for y in (0, -1) for x in (0, -1)}
    assert max(corners, key=corners.__getitem__) == corner and corners[corner] > 200


def test_a_clip_has_as_many_pictures_as_the_video_can_give(made: Path, tmp_path: Path) -> None:
    clip = read_clip(made / "a.mp4", 4)
    assert [image.size for image in clip] == [(48, 32)] * 4
    assert positions(np.stack(clip)) == frame_indices(COUNT, 4).tolist()
    short = write(tmp_path / "short.mp4", grey_frames(3))
    assert positions(np.stack(read_clip(short, 8))) == [0, 1, 2]
    drawn = read_clip(made / "a.mp4", 4, mode="random", generator=np.random.default_rng(3))
    expected = frame_indices(COUNT, 4, mode="random", generator=np.random.default_rng(3))
    assert positions(np.stack(drawn)) == expected.tolist()


def test_a_clip_of_large_frames_is_shrunk_to_a_bounded_size(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "MAX_CLIP_PIXELS", 4 * 24 * 16)
    clip = read_clip(made / "a.mp4", 4)
    assert [image.size for image in clip] == [(24, 16)] * 4
    assert np.asarray(clip[2])[10, 10].mean() == pytest.approx(STEP * frame_indices(COUNT, 4)[2], abs=2)


def test_a_replaced_file_is_looked_at_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", grey_frames(10))
    assert video_info(path).frames == 10
    write(path, grey_frames(6))
    os.utime(path, ns=(1, 1))
    assert video_info(path).frames == 6


# ------------------------------------------------------------------------------------------------ pictures


def test_a_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.save(tmp_path / "red.png")
    for source in (image, tmp_path / "red.png", (tmp_path / "red.png").read_bytes()):
        assert video_info(source) == VideoInfo(1, 0.0, 0.0, 10, 20)
        assert read_frames(source, [0, 0]).shape == (2, 10, 20, 3)
        assert [found.size for found in read_clip(source, 4)] == [(20, 10)]
        assert video_times(source) is None
    assert [found.size for found in read_clip(f"{tmp_path}/red.png#xywh=5,5,4,3", 4)] == [(4, 3)]
    with pytest.raises(DataError, match="has no frame 1"):
        read_frames(image, [1])


PREPARED = Preprocessing(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")  # type: ignore[arg-type]


def test_a_prepared_clip_ends_in_zeros(made: Path) -> None:
    clip = prepare_clip(read_clip(f"{made}/a.mp4#t=4.75", 4), PREPARED, 4)
    assert clip.shape == (4, 3, 8, 8) and clip.dtype == np.float32
    assert (clip[:2].mean(axis=(1, 2, 3)) > 0.5).all() and not clip[2:].any()
    with pytest.raises(InputError, match="clip of 0 pictures"):
        prepare_clip([], PREPARED, 4)
    with pytest.raises(InputError, match="clip of 5 pictures for 4"):
        prepare_clip([Image.new("RGB", (2, 2))] * 5, PREPARED, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_are_decoded_ahead_and_bad_ones_left_out(made: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    sources = [made / "a.mp4", tmp_path / "bad.mp4", f"{made}/a.mkv#t=1,2", Image.new("RGB", (9, 9), "white")]
    told: list[tuple[int, str]] = []
    batches = list(
        decode_clips(
            sources, PREPARED, 4, batch_size=3, workers=workers, on_error=lambda i, error: told.append((i, str(error)))
        )
    )
    assert [indices.tolist() for indices, _ in batches] == [[0, 2], [3]]
    assert np.array_equal(batches[0][1][1], prepare_clip(read_clip(sources[2], 4), PREPARED, 4))
    assert batches[1][1][0, 0].min() == 1 and not batches[1][1][0, 1:].any()
    assert [position for position, _ in told] == [1] and "bad.mp4" in told[0][1]
    with pytest.raises(DataError, match=r"bad\.mp4"):
        list(decode_clips(sources, PREPARED, 4, batch_size=3, workers=workers))


def test_videos_and_pictures_of_a_folder_have_its_paths_as_ids(made: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "B.MP4").write_bytes((made / "a.mp4").read_bytes())
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no video")
    assert videos_in(tmp_path)[0] == ["a.png", "deep/B.MP4"]
    with pytest.raises(DataError, match="no folder"):
        videos_in(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no video"):
        videos_in(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------ moments


@pytest.mark.parametrize(
    ("written", "start", "end"),
    [
        ("1,2.5", 1, 2.5), ("3", 3, None), (",4", 0, 4), ("npt:10,20", 10, 20), ("1:02,1:03.5", 62, 63.5),
        ("1:00:01", 3601, None), ("npt%3A0.25%2C1", 0.25, 1),
    ],
)  # fmt: skip
def test_moments_are_written_as_the_recommendation_says(written: str, start: float, end: float | None) -> None:
    assert split_moment(f"a/b#c.mp4#t={written}") == ("a/b#c.mp4", Moment(start, end))


@pytest.mark.parametrize(
    "written", ["", "x", "5,3", "2,2", "-1,3", "1,2,3", ",", "1:75,3:00", "1e3", "smpte:1,2", "3,"]
)
def test_what_is_no_moment_is_refused_by_name(written: str) -> None:
    with pytest.raises(DataError, match=r"clip\.mp4#t="):
        split_moment(f"clip.mp4#t={written}")


def test_a_file_whose_name_looks_like_a_moment_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4#t=1,2"
    path.write_bytes(b"")
    assert split_moment(path) == (str(path), None)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**7), st.integers(1, 10**7))
def test_a_written_moment_is_read_again(start: int, length: int) -> None:
    moment = Moment(start / 1000, (start + length) / 1000)
    assert split_moment(moment_uri("a.mp4", moment)) == ("a.mp4", moment)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 500), st.floats(0.05, 60))
def test_clips_cover_a_video_without_gap_or_overlap(seconds: float, length: float) -> None:
    clips = list(clips_of(seconds, length))
    assert clips[0].start == 0 and clips[-1].end == seconds
    assert all(a.end == b.start for a, b in itertools.pairwise(clips))
    if len(clips) > 1:
        assert all(0.5 - 1e-6 <= ((clip.end or 0) - clip.start) / length <= 1.5 + 1e-6 for clip in clips)


@pytest.mark.parametrize("length", [0.0, -1.0, 1e-9, 0.0009, float("inf"), float("nan")])
def test_a_video_is_cut_into_clips_that_an_address_can_name(length: float) -> None:
    with pytest.raises(DataError, match=r"clips of .* s; expected a number from 0\.001"):
        next(clips_of(5.0, length))
    assert next(clips_of(5.0, 0.001)) == Moment(0.0, 0.001)


@pytest.mark.parametrize("times", [(0.0, float("inf")), (float("inf"), None), (float("nan"), 1.0), (0.0, float("nan"))])
def test_a_moment_that_no_address_can_name_is_refused(times: tuple[float, float | None]) -> None:
    with pytest.raises(DataError, match="is empty"):
        Moment(*times)


def test_frames_are_counted_from_the_start_of_the_moment(made: Path) -> None:
    source = f"{made}/a.mp4#t=1,2"
    assert video_info(source) == VideoInfo(8, 1.0, 8.0, 32, 48)
    assert positions(read_frames(source, [0, 7])) == [8, 15]
    assert positions(np.stack(read_clip(source, 2))) == [8 + 1, 8 + 5]
    assert video_times(source) == (1.0, 2.0)
    assert video_times(f"{made}/a.mp4#t=4") == (4.0, 5.0)
    assert video_times(f"{made}/a.mp4#t=4,99") == (4.0, 5.0)  # cut at the end, as the recommendation says
    with pytest.raises(DataError, match=r"there is no frame 8; the moment has 8 frames"):
        read_frames(source, [8])


def test_clips_of_a_video_share_no_frame(made: Path) -> None:
    ids, sources, whence = cut_into_clips(["m", "picture"], [made / "a.mkv", Image.new("RGB", (4, 4))], 0.7)
    assert ids[:2] == ["m#t=0,0.7", "m#t=0.7,1.4"] and ids[-1] == "picture" and whence == [0] * 7 + [1]
    seen = [positions(read_frames(source, range(video_info(source).frames))) for source in sources[:-1]]
    assert list(itertools.chain(*seen)) == list(range(COUNT))


def test_a_moment_past_the_end_is_refused_with_the_length(made: Path) -> None:
    for read in (video_info, lambda source: read_clip(source, 4), lambda source: read_frames(source, [0])):
        with pytest.raises(DataError, match=r"a\.mp4#t=9,10: the moment starts at 9 s, .* length of 5\.000 s"):
            read(f"{made}/a.mp4#t=9,10")


class Films(Dataset):
    """Two parts of one video, and a picture."""

    folder = Path()

    @classmethod
    def build(cls, config: Any, split: str | None) -> Films:
        return cls()

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 2:
            return {"image": Image.new("RGB", (8, 8), "white"), "item_id": "still"}
        return {"video": f"{self.folder}/a.mp4#t={index},{index + 2}", "item_id": self.item_ids[index]}

    @property
    def item_ids(self) -> list[str]:
        return ["first", "second", "still"]


@hookimpl
def bowerbird_datasets() -> list[DatasetRecord]:
    here = {"target": f"{__name__}:Films", "config": None}
    return [DatasetRecord(name="films:parts", **here, summary="Parts of a video.", provides=("video",))]


@pytest.fixture
def films(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Films, "folder", made)
    get_registry().register_module("films", sys.modules[__name__])
    yield "dataset:films:parts"
    get_registry().unregister("films")
    uris._opened.cache_clear()


def test_a_video_of_a_data_set_is_read_by_its_address(films: str, made: Path) -> None:
    assert positions(read_frames(f"{films}#second", [0, 15])) == [8, 23]
    assert positions(read_frames(f"{films}#second#t=1,1.5", range(4))) == [16, 17, 18, 19]  # a moment of the part
    assert positions(read_frames(f"{films}#second#t=1,99", [7])) == [23]
    assert video_times(f"{films}#second") == (1.0, 3.0)  # in the file, where they can be played
    assert video_times(f"{films}#second#t=1,1.5") == (2.0, 2.5)
    assert len(read_clip(f"{films}#still", 4)) == 1
    with pytest.raises(DataError, match=r"t=2,3 lies outside the clip t=1,3"):
        read_frames(f"{films}#second#t=2,3", [0])
    hashes = {content_hash(f"{films}#{name}") for name in ("first", "second", "still", "second#t=0,1")}
    assert len(hashes) == 4 and None not in hashes
    assert uri_of(f"{films}#second#t=1,1.5") == f"{films}#second#t=1,1.5"
    assert uri_of(f"{made}/../{made.name}/a.mp4#t=1,2") == f"{(made / 'a.mp4').resolve()}#t=1,2"


# ------------------------------------------------------------------------------------------------ bad files


def test_what_is_no_video_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("a text\n" * 50)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{made}/a.ts\n")
    write_sound(tmp_path / "sound.mp4")
    expected = {
        tmp_path / "gone.mp4": "does not exist",
        tmp_path: "is a folder",
        tmp_path / "empty.mp4": "0 bytes",
        tmp_path / "text.mp4": "no video in a known format",
        tmp_path / "list.mp4": "no video in a known format",
        tmp_path / "sound.mp4": "no stream of pictures",
    }
    for path, reason in expected.items():
        for read in (video_info, lambda source: read_clip(source, 2), lambda source: read_frames(source, [0])):
            with pytest.raises(DataError, match=reason) as caught:
                read(path)
            assert str(path) in str(caught.value)
    with pytest.raises(DataError, match="found int"):
        read_frames(7, [0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.mp4", "front.mp4", "a.mkv", "a.avi"])
def test_a_truncated_video_is_refused_also_where_the_frames_are_there(made: Path, tmp_path: Path, name: str) -> None:
    whole = (made / name).read_bytes()
    cut = tmp_path / name
    cut.write_bytes(whole[: int(len(whole) * 0.6)])
    for read in (video_info, lambda source: read_frames(source, [0])):
        with pytest.raises(DataError, match=r"truncated|header is missing") as caught:
            read(cut)
        assert str(cut) in str(caught.value)


def test_damaged_frames_are_refused_and_no_other(made: Path, tmp_path: Path) -> None:
    data = bytearray((made / "front.mp4").read_bytes())
    place = data.index(b"mdat")
    middle = place + (len(data) - place) * 3 // 5
    data[middle : middle + 60] = b"\xff" * 60
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    assert positions(read_frames(path, [0, 3])) == [0, 3]  # in another group of frames
    with pytest.raises(DataError, match=rf"Cannot decode frame \d+ of video {path}"):
        read_frames(path, range(COUNT))


def test_a_stream_cut_from_a_longer_one_begins_with_its_first_keyframe(made: Path, tmp_path: Path) -> None:
    whole = (made / "a.ts").read_bytes()
    packets = [whole[at : at + 188] for at in range(0, len(whole), 188)]
    path = tmp_path / "cut.ts"
    path.write_bytes(b"".join(packets[len(packets) // 3 :]))
    count = video_info(path).frames
    assert 0 < count < COUNT
    found = positions(read_frames(path, range(count)))
    assert found == list(range(COUNT - count, COUNT))


def test_frames_that_do_not_exist_are_refused(made: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mp4: there is no frame 40; the video has 40 frames"):
        read_frames(made / "a.mp4", [1, 40])
    with pytest.raises(DataError, match="there is no frame -1"):
        read_frames(made / "a.mp4", [-1, 0])
    for wrong in ([], [3, 2], [[1]]):
        with pytest.raises(InputError, match="rising order"):
            read_frames(made / "a.mp4", wrong)


# ------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize(("height", "width"), [(32, 48), (31, 33)])
def test_a_written_video_is_read_again(tmp_path: Path, height: int, width: int) -> None:
    frames = grey_frames(9, height=height, width=width)
    write_video(tmp_path / "w.mp4", frames, rate=7.5)
    assert video_info(tmp_path / "w.mp4") == VideoInfo(9, pytest.approx(1.2), pytest.approx(7.5), height, width)  # type: ignore[arg-type]
    found = read_frames(tmp_path / "w.mp4", range(9))
    assert positions(found) == list(range(9))
    assert np.abs(found.astype(int) - frames).mean() < 3


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_video_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot write video .*a\.xyz"):
        write_video(tmp_path / "a.xyz", grey_frames(2))
    for wrong in (grey_frames(2)[0], grey_frames(2).astype(np.float32), grey_frames(2)[:0]):
        with pytest.raises(InputError, match="uint8"):
            write_video(tmp_path / "a.mp4", wrong)
    with pytest.raises(InputError, match="rate"):
        write_video(tmp_path / "a.mp4", grey_frames(2), rate=0)
    assert not list(tmp_path.iterdir())
