"""MSR-VTT, DiDeMo, LSMDC and MSVD: small files of the form in which they are distributed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from video_files import video

from bowerbird.data.videos import video_info
from bowerbird.errors import DataError, UnknownNameError
from bowerbird_videotext.annotations import DiDeMo, Lsmdc, MsrVtt, Msvd
from bowerbird_videotext.clips import UnreadableVideoWarning
from bowerbird_videotext.data_configs import DiDeMoConfig, LsmdcConfig, MsrVttConfig, MsvdConfig


def said(dataset: Any) -> dict[str, list[str]]:
    return {item_id: dataset.captions(i) for i, item_id in enumerate(dataset.item_ids)}


# ------------------------------------------------------------------------------------------------------------ MSR-VTT


@pytest.fixture
def msr_vtt(tmp_path: Path) -> Path:
    """Six videos: 0 to 2 for training (full and 9k), 3 for validation, 4 and 5 for test; two captions each."""
    splits = ["train", "train", "train", "validate", "test", "test"]
    videos = [
        {"category": 1, "url": "", "video_id": f"video{i}", "start time": 0, "end time": 3, "split": split, "id": i}
        for i, split in enumerate(splits)
    ]
    sentences = [
        {"caption": f"caption {j} of {i}", "video_id": f"video{i}", "sen_id": 2 * i + j}
        for i in range(6)
        for j in range(2)
    ]
    content = {"info": {}, "videos": videos, "sentences": sentences}
    (tmp_path / "msrvtt_data").mkdir()
    (tmp_path / "msrvtt_data/MSRVTT_data.json").write_text(json.dumps(content))
    (tmp_path / "msrvtt_data/MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo1\nvideo2\nvideo3\n")
    (tmp_path / "msrvtt_data/MSRVTT_train.7k.csv").write_text("video_id\nvideo0\nvideo2\n")
    (tmp_path / "msrvtt_data/MSRVTT_JSFUSION_test.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr4,video4,"a man, talking"\nret1,msr5,video5,caption 1 of 5\n'
    )
    for i in range(6):
        video(tmp_path / "videos/all" / f"video{i}.mp4")
    return tmp_path


def test_msr_vtt_has_the_splits_of_its_protocols(msr_vtt: Path) -> None:
    def ids(split: str | None, **settings: Any) -> list[str]:
        return list(MsrVtt.build(MsrVttConfig(root=msr_vtt, **settings), split).item_ids)

    assert ids(None) == ["video0", "video1", "video2", "video3"]
    assert ids("train", protocol="7k") == ["video0", "video2"]
    assert ids("test") == ids("test", protocol="7k") == ["video4", "video5"]
    assert ids("train", protocol="full") == ["video0", "video1", "video2"]
    assert ids("val", protocol="full") == ["video3"]
    assert ids("test", protocol="full") == ["video4", "video5"]
    with pytest.raises(UnknownNameError, match=r"protocol 1k-A has no split 'val'; it has train, test"):
        ids("val")


def test_msr_vtt_has_all_captions_for_training_and_one_fixed_for_the_test_of_1k(msr_vtt: Path) -> None:
    train = MsrVtt.build(MsrVttConfig(root=msr_vtt, videos=msr_vtt / "videos"))
    assert said(train)["video3"] == ["caption 0 of 3", "caption 1 of 3"]
    assert train[3]["video"] == str(msr_vtt / "videos/all/video3.mp4")
    assert train[3]["where"].endswith("MSRVTT_train.9k.csv', line 5")
    test = MsrVtt.build(MsrVttConfig(root=msr_vtt), "test")
    assert said(test) == {"video4": ["a man, talking"], "video5": ["caption 1 of 5"]}
    full = MsrVtt.build(MsrVttConfig(root=msr_vtt, protocol="full"), "test")
    assert len(full.captions(0)) == 2


def test_msr_vtt_may_come_in_cocos_form_with_lists_and_a_pickle_of_the_chosen_captions(msr_vtt: Path) -> None:
    for file in (msr_vtt / "msrvtt_data").iterdir():
        file.unlink()
    notes = [{"image_id": f"video{i}", "caption": f"{j} of {i}", "id": 2 * i + j} for i in range(6) for j in range(2)]
    content = {"info": {}, "images": [{"id": f"video{i}"} for i in range(6)], "annotations": notes}
    (msr_vtt / "MSR_VTT.json").write_text(json.dumps(content))
    lists = msr_vtt / "structured-symlinks"
    lists.mkdir()
    (lists / "train_list_jsfusion.txt").write_text("video0\nvideo1\n")
    (lists / "val_list_jsfusion.txt").write_text("video4\nvideo5\n")
    (lists / "test_list_full.txt").write_text("video4\n")
    (lists / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps({"video4": 1, "video5": 0}))
    assert said(MsrVtt.build(MsrVttConfig(root=msr_vtt)))["video1"] == ["0 of 1", "1 of 1"]
    assert said(MsrVtt.build(MsrVttConfig(root=msr_vtt), "test")) == {"video4": ["1 of 4"], "video5": ["0 of 5"]}
    assert said(MsrVtt.build(MsrVttConfig(root=msr_vtt, protocol="full"), "test")) == {"video4": ["0 of 4", "1 of 4"]}
    (lists / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps({"video4": 1, "video5": 2}))
    with pytest.raises(DataError, match=r"line 2: .*gives caption 2 of 'video5', which has 2"):
        MsrVtt.build(MsrVttConfig(root=msr_vtt), "test")
    with pytest.raises(DataError, match="no file says which videos are the split 'train'"):
        MsrVtt.build(MsrVttConfig(root=msr_vtt, protocol="full"), "train")


def test_msr_vtts_two_official_files_are_read_as_one(msr_vtt: Path) -> None:
    whole = json.loads((msr_vtt / "msrvtt_data/MSRVTT_data.json").read_text())
    (msr_vtt / "msrvtt_data/MSRVTT_data.json").unlink()
    for name, parts in (("train_val", (0, 1, 2, 3)), ("test", (4, 5))):
        mine = {f"video{i}" for i in parts}
        content = {key: [one for one in whole[key] if one["video_id"] in mine] for key in ("videos", "sentences")}
        (msr_vtt / f"{name}_videodatainfo.json").write_text(json.dumps(content))
    counts = [
        len(MsrVtt.build(MsrVttConfig(root=msr_vtt, protocol="full"), split)) for split in ("train", "val", "test")
    ]
    assert counts == [3, 1, 2]


def test_what_is_wrong_in_msr_vtt_is_named(msr_vtt: Path, tmp_path: Path) -> None:
    (msr_vtt / "videos/all/video1.mp4").unlink()
    with pytest.raises(DataError, match=r"MSRVTT_train\.9k\.csv', line 3: the video 'video1' does not exist"):
        MsrVtt.build(MsrVttConfig(root=msr_vtt))
    with pytest.warns(UnreadableVideoWarning, match=r"1 left out, 3 videos are used: .*line 3"):
        MsrVtt.build(MsrVttConfig(root=msr_vtt, skip_unreadable=True))
    listed = msr_vtt / "msrvtt_data/MSRVTT_train.9k.csv"
    listed.write_text("video_id\nvideo0\nvideo9\n")
    video(msr_vtt / "videos/video9.mp4")
    with pytest.raises(DataError, match=r"line 3: 'video9' has no caption"):
        MsrVtt.build(MsrVttConfig(root=msr_vtt))
    listed.write_text("id\nvideo0\n")
    with pytest.raises(UnknownNameError, match=r"no column 'video_id'; it has id"):
        MsrVtt.build(MsrVttConfig(root=msr_vtt))
    (msr_vtt / "msrvtt_data/MSRVTT_data.json").write_text("{")
    with pytest.raises(DataError, match=r"MSRVTT_data\.json' is no JSON"):
        MsrVtt.build(MsrVttConfig(root=msr_vtt))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds none of the files MSRVTT_data\.json, .*docs/video-data\.md"):
        MsrVtt.build(MsrVttConfig(root=tmp_path / "empty"))
    with pytest.raises(DataError, match="is no folder"):
        MsrVtt.build(MsrVttConfig(root=tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------------- DiDeMo


@pytest.fixture
def didemo(tmp_path: Path) -> Path:
    found = [
        {"video": "1@N00_a.mov", "description": "a dog runs", "times": [[0, 0], [1, 1], [1, 1]], "num_segments": 2},
        {"video": "2@N00_b.avi", "description": "rain", "times": [[0, 1]], "num_segments": 2},
        {"video": "1@N00_a.mov", "description": "it sleeps", "times": [[0, 0], [0, 1]], "num_segments": 2},
    ]
    (tmp_path / "train_data.json").write_text(json.dumps(found))
    video(tmp_path / "videos/1@N00_a.mp4", 18)  # many copies were downloaded in another container; nine seconds
    video(tmp_path / "videos/2@N00_b.mp4", 18)
    return tmp_path


def test_didemos_descriptions_are_joined_apart_or_with_their_moments(didemo: Path) -> None:
    joined = DiDeMo.build(DiDeMoConfig(root=didemo))
    assert said(joined) == {"1@N00_a.mov": ["a dog runs it sleeps"], "2@N00_b.avi": ["rain"]}
    assert joined[0]["video"].endswith("1@N00_a.mp4")
    apart = DiDeMo.build(DiDeMoConfig(root=didemo, captions="separate"))
    assert said(apart)["1@N00_a.mov"] == ["a dog runs", "it sleeps"]
    moments = DiDeMo.build(DiDeMoConfig(root=didemo, captions="moments"))
    assert said(moments) == {
        "1@N00_a.mov#t=5,10": ["a dog runs"],  # two of three annotators
        "2@N00_b.avi#t=0,10": ["rain"],
        "1@N00_a.mov#t=0,5": ["it sleeps"],  # as many as the other, and first
    }
    assert [video_info(moments.video(i)).frames for i in range(3)] == [8, 18, 10]


def test_what_is_wrong_in_didemo_is_named(didemo: Path) -> None:
    with pytest.raises(DataError, match=r"val_data\.json"):
        DiDeMo.build(DiDeMoConfig(root=didemo), "val")
    (didemo / "val_data.json").write_text('[{"video": "1@N00_a.mov", "description": "x", "times": [[3, 1]]}]')
    with pytest.raises(DataError, match=r"val_data\.json', description 1: expected video, description and times"):
        DiDeMo.build(DiDeMoConfig(root=didemo, captions="moments"), "val")
    (didemo / "val_data.json").write_text('{"video": 1}')
    with pytest.raises(DataError, match="expected a JSON list, found dict"):
        DiDeMo.build(DiDeMoConfig(root=didemo), "val")


# -------------------------------------------------------------------------------------------------------------- LSMDC


def test_lsmdc_has_a_row_of_six_values_without_header_for_every_sentence(tmp_path: Path) -> None:
    first, second = "1012_Film_00.05.16.065-00.05.21.941", "3009_OTHER_FILM_00.00.01.000-00.00.03.000"
    rows = [
        [first, "00.05.16.065", "00.05.21.941", "00.05.16.065", "00.05.21.941", 'SOMEONE says "no, never'],
        [second, "00.00.01.000", "00.00.03.000", "00.00.01.000", "00.00.03.000", "He sits."],
        [first, "00.05.16.065", "00.05.21.941", "00.05.16.065", "00.05.21.941", "She leaves."],
    ]
    text = "".join("\t".join(row) + "\n" for row in rows)
    (tmp_path / "LSMDC16_annos_training.csv").write_text(text)
    (tmp_path / "LSMDC16_challenge_1000_publictect.csv").write_text("\t".join(rows[1]) + "\n")
    video(tmp_path / "avi/1012_Film" / f"{first}.mkv")
    video(tmp_path / "avi/3009_OTHER_FILM" / f"{second}.mkv")
    train = Lsmdc.build(LsmdcConfig(root=tmp_path))
    assert said(train) == {first: ['SOMEONE says "no, never', "She leaves."], second: ["He sits."]}
    assert list(Lsmdc.build(LsmdcConfig(root=tmp_path), "test").item_ids) == [second]
    (tmp_path / "LSMDC16_annos_val.csv").write_text(f"{text}{first}\tonly two\n")
    with pytest.raises(DataError, match=r"LSMDC16_annos_val\.csv', line 4: 2 values; expected 6: clip, start_aligned"):
        Lsmdc.build(LsmdcConfig(root=tmp_path), "val")


# --------------------------------------------------------------------------------------------------------------- MSVD


@pytest.fixture
def msvd(tmp_path: Path) -> Path:
    for name, ids in (("train", "-4wsu_5_15\nabc_0_7\n"), ("val", "abc_0_7\n"), ("test", "xyz_1_2\n")):
        (tmp_path / f"{name}_list.txt").write_text(ids)
    for name in ("-4wsu_5_15", "abc_0_7", "xyz_1_2"):
        video(tmp_path / "YouTubeClips" / f"{name}.mkv")
    return tmp_path


def test_msvds_descriptions_may_be_a_text_a_pickle_or_the_corpus(msvd: Path) -> None:
    right = {"-4wsu_5_15": ["a squirrel eats", "an animal"], "abc_0_7": ["rain"]}
    text = msvd / "AllVideoDescriptions.txt"
    text.write_text("# about\n\n-4wsu_5_15 a squirrel eats\n-4wsu_5_15 an animal\nabc_0_7 rain\n")
    assert said(Msvd.build(MsvdConfig(root=msvd))) == right
    assert said(Msvd.build(MsvdConfig(root=msvd), "val")) == {"abc_0_7": ["rain"]}
    text.unlink()
    words = {name: [caption.split() for caption in captions] for name, captions in right.items()}
    (msvd / "raw-captions.pkl").write_bytes(pickle.dumps(words))
    assert said(Msvd.build(MsvdConfig(root=msvd))) == right
    (msvd / "raw-captions.pkl").unlink()
    (msvd / "video_corpus.csv").write_text(
        "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
        "-4wsu,5,15,1,clean,30,English,a squirrel eats\n-4wsu,5,15,2,clean,30,German,ein Tier\n"
        "-4wsu,5,15,3,clean,30,English,an animal\nabc,0,7,3,clean,30,English,rain\n"
    )
    assert said(Msvd.build(MsvdConfig(root=msvd))) == right
    with pytest.raises(DataError, match=r"train_list\.txt', line 2: 'abc_0_7' has no caption"):
        Msvd.build(MsvdConfig(root=msvd, language="German"))


def test_a_pickle_that_asks_for_anything_is_refused(msvd: Path) -> None:
    (msvd / "raw-captions.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DataError, match=r"asks for os\.system"):
        Msvd.build(MsvdConfig(root=msvd))
