"""``videotext:table``: videos and captions of a folder or a table, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from video_files import truncated, video

from bowerbird.data.uris import open_dataset
from bowerbird.data.videos import read_clip, video_info
from bowerbird.errors import DataError, InputError, UnknownNameError
from bowerbird_videotext.clips import UnreadableVideoWarning
from bowerbird_videotext.data_configs import VideoTableConfig
from bowerbird_videotext.video_table import VideoTable


@pytest.fixture
def root(tmp_path: Path) -> Path:
    video(tmp_path / "clips" / "a.mp4")
    video(tmp_path / "clips" / "b.mp4")
    return tmp_path


def table(root: Path, text: str = "", split: str | None = None, *, name: str = "t.csv", **settings: Any) -> VideoTable:
    if text:
        (root / name).write_text(text)
    return VideoTable.build(VideoTableConfig(root=root, table=name, **settings), split)


def test_rows_of_one_video_are_its_captions(root: Path) -> None:
    found = table(root, "video,caption\nclips/a.mp4,it  brightens\nclips/b.mp4,so it is\nclips/a.mp4,and more\n")
    assert list(found.item_ids) == ["clips/a.mp4", "clips/b.mp4"]
    assert found[0]["text"] == ["it brightens", "and more"]
    assert found[1]["text"] == "so it is"
    assert found[1]["video"] == str(root / "clips/b.mp4")
    assert found[1]["where"] == f"'{root}/t.csv', line 3"
    assert "label" not in found[0]


def test_the_ending_of_a_video_may_be_left_out_and_its_folder_named_apart(root: Path) -> None:
    assert table(root, "video,caption\na,x\n", videos="clips")[0]["video"] == str(root / "clips/a.mp4")
    assert table(root, "video,caption\nb,x\n")[0]["video"] == str(root / "clips/b.mp4")  # in any folder
    video(root / "more" / "b.mkv")
    with pytest.raises(DataError, match=r"line 2: 'b' may be '.*clips/b\.mp4' or '.*more/b\.mkv': give the path"):
        table(root, "video,caption\nb,x\n")
    video(root / "clips" / "film_00.01.02.500.mp4")
    assert len(table(root, "video,caption\nfilm_00.01.02.500,x\n")) == 1


def test_columns_say_split_moment_class_and_id(root: Path) -> None:
    text = (
        "file\tsaid\tpart\tfrom\tto\tkind\tname\tnouns\n"
        "clips/a.mp4\tdark\ttrain\t0\t1.5\tnight\tn1\tx\n"
        "clips/a.mp4\tlight\ttrain\t1.5\t\tday\tn2\ty\n"
        "clips/b.mp4\tlight\ttest\t\t\tday\tn3\tz\n"
    )
    settings: dict[str, Any] = {
        "name": "t.tsv", "video": "file", "caption": "said", "split_column": "part", "start": "from", "end": "to",
        "label": "kind", "item_id": "name", "keep": "nouns",
    }  # fmt: skip
    found = table(root, text, "train", **settings)
    assert list(found.item_ids) == ["n1", "n2"]
    assert found[0]["video"].endswith("a.mp4#t=0,1.5")
    assert [video_info(found.video(i)).frames for i in range(2)] == [3, 3]
    assert list(found.classes) == ["day", "night"]
    assert found.labels() == [1, 0]
    assert found[1]["label"] == 0
    assert found[1]["nouns"] == "y"
    assert list(table(root, text, "test", **settings).item_ids) == ["n3"]
    assert len(table(root, text, None, **settings)) == 3
    without_ids = {**settings, "item_id": None}
    assert list(table(root, text, "train", **without_ids).item_ids) == ["clips/a.mp4#t=0,1.5", "clips/a.mp4#t=1.5"]
    with pytest.raises(UnknownNameError, match=r"no split 'tset'; it has test, train\. Did you mean 'test'"):
        table(root, text, "tset", **settings)


def test_a_table_may_be_json_lines_or_parquet_with_lists_of_captions(root: Path) -> None:
    rows = [{"video": "clips/a.mp4", "caption": ["one", "two"]}, {"video": "clips/b.mp4", "caption": "three"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    found = table(root, lines, name="t.jsonl")
    assert [found.captions(i) for i in range(2)] == [["one", "two"], ["three"]]
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    columns = {"video": ["clips/a.mp4", "clips/b.mp4"], "caption": [["one", "two"], ["three"]]}
    parquet.write_table(pyarrow.table(columns), root / "t.parquet")
    same = table(root, name="t.parquet")
    assert [same.captions(i) for i in range(2)] == [["one", "two"], ["three"]]
    (root / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"t\.parquet' cannot be read as Parquet"):
        table(root, name="t.parquet")


def test_captions_may_be_left_out_where_they_are_optional(root: Path) -> None:
    text = "video,caption\nclips/a.mp4,x\nclips/b.mp4,\n"
    found = table(root, text, captions="optional")
    assert [found.captions(i) for i in range(2)] == [["x"], []]
    assert "text" not in found[1]
    assert len(table(root, "video\nclips/a.mp4\n", captions="optional")) == 1


def test_a_table_for_every_split(root: Path) -> None:
    (root / "train.csv").write_text("video,caption\nclips/a.mp4,x\n")
    config = VideoTableConfig(root=root, table="{split}.csv")
    assert len(VideoTable.build(config, "train")) == 1
    with pytest.raises(DataError, match=r"no table '.*val\.csv'"):
        VideoTable.build(config, "val")
    with pytest.raises(InputError, match="a split must be named"):
        VideoTable.build(config, None)


def test_without_a_table_captions_are_lines_of_a_text_beside_each_video(root: Path) -> None:
    (root / "clips/a.txt").write_text("it brightens\n\nit is grey\n")
    (root / "clips/b.txt").write_text("also grey")
    Image.new("RGB", (8, 8)).save(root / "clips/c.png")
    (root / "clips/c.txt").write_text("black")
    found = VideoTable.build(VideoTableConfig(root=root))
    assert [found[i]["text"] for i in range(3)] == [["it brightens", "it is grey"], "also grey", "black"]
    assert len(read_clip(found.video(2), 4)) == 1  # a picture is a video of one frame
    assert list(VideoTable.build(VideoTableConfig(root=root), "clips").item_ids) == ["a.mp4", "b.mp4", "c.png"]
    by_split = VideoTable.build(VideoTableConfig(root=root, videos="{split}"), "clips")
    assert list(by_split.item_ids) == ["a.mp4", "b.mp4", "c.png"]
    (root / "clips/b.txt").write_text("\n")
    with pytest.raises(DataError, match=r"b\.mp4': its captions 'b\.txt': the file is empty"):
        VideoTable.build(VideoTableConfig(root=root))
    (root / "clips/b.txt").unlink()
    optional = VideoTable.build(VideoTableConfig(root=root, captions="optional"))
    assert "text" not in optional[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("clips/gone.mp4,x", r"line 3: the video 'clips/gone\.mp4' does not exist in"),
        ("clips/half.mp4,x", r"line 3: .*half\.mp4.*"),
        ("clips/none.mp4,x", r"line 3: .*none\.mp4.*"),
        ("clips/b.mp4,", r"line 3: the caption of 'clips/b\.mp4' is empty"),
        ("clips/b.mp4,  ", r"line 3: the caption of 'clips/b\.mp4' is empty"),
        (",x", "line 3: the path of the video is empty"),
        ("clips/b.mp4,x,y", "line 3: 3 values; expected 2: video, caption"),
        ("clips/b.mp4", "line 3: 1 values; expected 2: video, caption"),
    ],
)
def test_a_bad_row_is_named_or_left_out_and_listed(root: Path, row: str, message: str) -> None:
    truncated(root / "clips/half.mp4")
    (root / "clips/none.mp4").write_bytes(b"")
    text = f"video,caption\nclips/a.mp4,fine\n{row}\nclips/b.mp4,fine\n"
    with pytest.raises(DataError, match=message):
        table(root, text)
    report = root / "report.jsonl"
    with pytest.warns(UnreadableVideoWarning, match="1 left out, 2 videos are used: .*line 3"):
        found = table(root, text, skip_unreadable=True, report=report)
    assert [found.captions(i) for i in range(2)] == [["fine"], ["fine"]]
    assert [json.loads(line)["where"] for line in report.read_text().splitlines()] == [f"'{root}/t.csv', line 3"]


def test_an_id_stands_for_one_video(root: Path) -> None:
    text = "video,caption,id\nclips/a.mp4,x,1\nclips/b.mp4,y,1\n"
    with pytest.raises(DataError, match=r"line 3: the id '1' is there already, for another video: .*line 2"):
        table(root, text, item_id="id")
    text = "video,caption,kind\nclips/a.mp4,x,day\nclips/a.mp4,y,night\n"
    with pytest.raises(DataError, match=r"line 3: the id 'clips/a\.mp4' is there already, for the class 'day'"):
        table(root, text, label="kind")


def test_columns_that_are_not_there_are_named_with_those_that_are(root: Path) -> None:
    text = "video,captoin\nclips/a.mp4,x\n"
    with pytest.raises(
        UnknownNameError, match=r"no column 'caption' \(caption\); it has video, captoin\. Did you mean"
    ):
        table(root, text)
    with pytest.raises(UnknownNameError, match=r"no column 'begin' \(start\)"):
        table(root, text, caption="captoin", start="begin")
    with pytest.raises(UnknownNameError, match=r"no column 'split' \(split_column\); it has video, captoin"):
        table(root, text, "train", caption="captoin")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"video,caption\n", "has no row"),
        ("t.csv", b"video,video\na,b\n", "two columns have the same name"),
        ("t.csv", b"video,caption\na,\xff\n", "is not UTF-8 text"),
        ("t.jsonl", b'{"video": 1\n', "line 1: no JSON"),
        ("t.jsonl", b"[1]\n", "line 1: expected a JSON object, found list"),
        ("t.xls", b"x", "is no table; expected .csv"),
    ],
)
def test_what_is_no_table_is_refused(root: Path, name: str, content: bytes, message: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        table(root, name=name)


def test_bad_moments_and_nothing_left_are_named(root: Path) -> None:
    head = "video,caption,a,b\nclips/a.mp4,x,"
    for times, message in (
        ("2,1", "line 2: the moment t=2,1 is empty"),
        ("x,1", "line 2: a = 'x' is no time in seconds"),
        ("90,91", "line 2: .*starts at 90 s"),
        ("0,inf", "line 2: the moment .* is empty"),
        ("0.1001,0.1002", "line 2: .*the moment .* is empty"),  # both 0.1 in an address
    ):
        with pytest.raises(DataError, match=message):
            table(root, f"{head}{times}\n", start="a", end="b")
    for times in ("2,1", "0.1001,0.1002"):
        with pytest.raises(DataError, match=r"no video can be used \(.*line 2: .*is empty"):
            table(root, f"{head}{times}\n", start="a", end="b", skip_unreadable=True)
    with pytest.raises(InputError, match=r"report = .*expected a file in a folder that is there"):
        table(root, f"{head}0,1\n", report=root / "no" / "report.jsonl")
    with pytest.raises(DataError, match="there is no folder of videos"):
        table(root, f"{head}0,1\n", videos="films")


def test_headers_need_not_be_read(root: Path) -> None:
    truncated(root / "clips/half.mp4")
    found = table(root, "video,caption\nclips/half.mp4,x\n", check="files")
    with pytest.raises(DataError, match=r"half\.mp4"):
        read_clip(found.video(0), 4)


def test_items_have_addresses(root: Path) -> None:
    (root / "t.csv").write_text("video,caption\nclips/a.mp4,x\n")
    _, address = open_dataset("videotext:table", root=str(root), table="t.csv")
    assert len(read_clip(f"{address}#clips/a.mp4", 3)) == 3
