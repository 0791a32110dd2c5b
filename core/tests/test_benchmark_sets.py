"""The readers of benchmark sets, on small files of the formats that their authors ship."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import benchmark_sets as made
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.data.benchmark_configs import (
    FacePairsConfig,
    IjbConfig,
    LandmarksConfig,
    MarketConfig,
    Ms1mConfig,
    RevisitedConfig,
)
from bowerbird.data.faces import FacePairs, Ms1m
from bowerbird.data.ijb import ARCFACE_POINTS, Ijb, similarity_transform
from bowerbird.data.landmarks import Landmarks
from bowerbird.data.market1501 import Market1501
from bowerbird.data.plain_pickle import load_plain_pickle
from bowerbird.data.recordio import MAGIC, RecordFile, pack_image, parse_header, write_records
from bowerbird.data.revisited import Revisited, read_ground_truth
from bowerbird.data.uris import item_uris, open_dataset, open_dataset_item
from bowerbird.errors import DataError, InputError, UnknownNameError
from bowerbird.testing import DatasetContract


def colour(image) -> tuple[int, int, int]:
    return tuple(int(c) for c in np.asarray(image).reshape(-1, 3).mean(axis=0).round())


# ---------------------------------------------------------------------------------------------------- contracts


class TestLandmarksContract(DatasetContract):
    name = "core:gldv2"
    splits = ("train", "train-clean", "index")  # queries have no label
    disjoint = (("public", "private"), ("index", "test"))

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.landmarks(tmp_path)}


class TestRevisitedContract(DatasetContract):
    name = "core:revisited"
    disjoint = (("query", "gallery"),)

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.revisited(tmp_path)}


class TestMarketContract(DatasetContract):
    name = "core:market-1501"
    disjoint = (("query", "gallery"), ("train", "gallery"))

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.market(tmp_path)}


class TestMs1mContract(DatasetContract):
    name = "core:ms1m"

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.ms1m(tmp_path)}


class TestFacePairsContract(DatasetContract):
    name = "core:face-pairs"

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"file": made.face_bin(tmp_path / "lfw.bin")}


FACES = [
    {"template": 5, "media": 1, "colour": made.RED, "score": 0.9},
    {"template": 3, "media": 2, "colour": made.BLUE, "score": 0.8},
]


class TestIjbContract(DatasetContract):
    name = "core:ijb"

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.ijb(tmp_path, FACES, [[5, 3, 0]])}


# ---------------------------------------------------------------------------------------------------- landmarks


SOLUTION = "retrieval_solution_v2.1.csv"


def landmarks(root: Path, split: str, **settings: str) -> Landmarks:
    return Landmarks.build(LandmarksConfig(root=root, **settings), split)


def test_landmarks_classes_are_landmark_ids_in_order_of_number(tmp_path):
    made.landmarks(tmp_path)
    index = landmarks(tmp_path, "index")
    assert list(index.item_ids) == made.INDEX
    assert list(index.classes) == ["3", "7", "12", "100"]
    assert [item["label"] for item in index.metadata()] == ["7", "7", "12", "12", "100", "3"]
    clean = landmarks(tmp_path, "train-clean")
    assert list(clean.item_ids) == [made.INDEX[4], made.INDEX[5], made.INDEX[0]]
    assert [clean.classes[label] for label in clean.labels()] == ["100", "100", "9"]
    assert list(landmarks(tmp_path, "train").classes) == ["5"]


def test_landmarks_queries_are_those_of_the_newest_solution_without_the_ignored(tmp_path):
    made.landmarks(tmp_path)
    assert list(landmarks(tmp_path, "test").item_ids) == [made.Q1, made.Q2, made.Q4]
    assert list(landmarks(tmp_path, "public").item_ids) == [made.Q1]
    assert list(landmarks(tmp_path, "private").item_ids) == [made.Q2, made.Q4]
    old = landmarks(tmp_path, "public", solution="retrieval_solution_v2.0.csv")
    index = landmarks(tmp_path, "index")
    assert [p.tolist() for p in old.relevance(index).positives] == [[5]]
    assert [p.tolist() for p in landmarks(tmp_path, "private").relevance(index).positives] == [[2, 3, 4], [2]]
    assert index.relevance(index) is None
    with pytest.raises(InputError, match="index"):
        old.relevance(old)


def test_an_index_without_landmarks_has_no_labels(tmp_path):
    made.landmarks(tmp_path)
    (tmp_path / "index_image_to_landmark.csv").unlink()
    index = landmarks(tmp_path, "index")
    assert list(index.item_ids) == made.INDEX
    assert index.labels() == []
    assert index.metadata() is None
    assert "label" not in index[0]


@pytest.mark.parametrize(
    ("file", "text", "split", "message"),
    [
        (SOLUTION, f"id,images,Usage\n{made.Q1},None\n", "test", "line 2.*2 fields; expected 3"),
        (SOLUTION, f"id,images,Usage\n{made.Q1},{made.INDEX[0]},Publc\n", "test", "line 2.*Publc"),
        (SOLUTION, f"id,images,Usage\n{made.Q1},{made.INDEX[0]} x,Public\n", "test", "line 2.*'x'"),
        (SOLUTION, "id,images\n", "test", "line 1.*expected the columns id,images,Usage"),
        (SOLUTION, "id,images,Usage\n", "public", "no image of the split 'public'"),
        ("train_clean.csv", f"landmark_id,images\n1,{made.INDEX[0]}\n2,\n", "train-clean", "line 3"),
        ("train_clean.csv", f"landmark_id,images\n1,{made.INDEX[0]} {made.INDEX[0]}\n", "train-clean", "earlier"),
        ("train_clean.csv", "landmark_id,images\n1,../../etc/passwd\n", "train-clean", "no image id; expected 16"),
        ("train_clean.csv", "\x00\xff", "train-clean", "line 1"),
    ],
)  # fmt: skip
def test_a_landmarks_table_that_is_wrong_is_named_with_its_line(tmp_path, file, text, split, message):
    made.landmarks(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=rf"{file}.*{message}"):
        landmarks(tmp_path, split)


def test_missing_landmarks_files_teach_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"train_clean\.csv does not exist.*landmark_id,images.*ROOT/train/a/b/c/"):
        landmarks(tmp_path, "train-clean")
    made.landmarks(tmp_path)
    first = tmp_path / "index" / "0" / "f" / "0" / f"{made.INDEX[0]}.jpg"
    first.unlink()
    with pytest.raises(DataError, match=rf"{made.INDEX[0]}\.jpg does not exist.*laid out"):
        landmarks(tmp_path, "index")
    with pytest.raises(UnknownNameError, match=r"'trian-clean'.*Did you mean 'train-clean'"):
        landmarks(tmp_path, "trian-clean")


def test_an_answer_that_is_not_in_the_index_is_named(tmp_path):
    made.landmarks(tmp_path)
    made.table(tmp_path / "index_image_to_landmark.csv", ["id", "landmark_id"], [[i, 1] for i in made.INDEX[:4]])
    with pytest.raises(DataError, match=rf"query {made.Q2}.*{made.INDEX[4]}.*1 of 3"):
        landmarks(tmp_path, "test").relevance(landmarks(tmp_path, "index"))


# ---------------------------------------------------------------------------------------------------- revisited


def revisited(root: Path, split: str, **values) -> Revisited:
    return Revisited.build(RevisitedConfig(root=root, **values), split)


@pytest.mark.parametrize("form", ["pkl", "json"])
def test_revisited_queries_are_cut_to_their_box(tmp_path, form):
    made.revisited(tmp_path, form)
    cut, whole = revisited(tmp_path, "query")[0]["image"], revisited(tmp_path, "query", crop=False)[0]["image"]
    assert (cut.size, colour(cut)) == ((4, 8), made.RED)
    assert whole.size == (8, 8)
    assert list(revisited(tmp_path, "gallery").item_ids) == [f"g{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("setup", "positives", "ignored"),
    [
        ("easy", [[0], [3]], [{1, 2}, {4}]),
        ("medium", [[0, 2], [3, 4]], [{1}, set()]),
        ("hard", [[2], [4]], [{0, 1}, {3}]),
    ],
)
def test_the_set_up_says_what_is_right_and_what_is_ignored(tmp_path, setup, positives, ignored):
    made.revisited(tmp_path)
    relevance = revisited(tmp_path, "query", setup=setup).relevance(revisited(tmp_path, "gallery"))
    assert [sorted(p.tolist()) for p in relevance.positives] == positives
    assert [set(i.tolist()) for i in relevance.ignore] == ignored


def test_both_benchmarks_in_one_folder_must_be_told_apart(tmp_path):
    made.revisited(tmp_path)
    made.revisited(tmp_path, "json", "rparis6k")
    with pytest.raises(DataError, match=r"gnd_roxford5k\.pkl and gnd_rparis6k\.json.*benchmark"):
        revisited(tmp_path, "query")
    assert len(revisited(tmp_path, "query", benchmark="rparis6k")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("gnd"), "expected a dict with imlist, qimlist and gnd"),
        (lambda t: t["gnd"].pop(), "one entry for each of the 2 queries"),
        (lambda t: t["gnd"][1].pop("junk"), r"gnd\[1\] \(q1\).*bbx, easy, hard and junk"),
        (lambda t: t["gnd"][1].update(easy=[6]), r"gnd\[1\] \(q1\): easy.*\[6\].*0 to 5"),
        (lambda t: t["gnd"][0].update(hard=["a"]), r"gnd\[0\] \(q0\): hard"),
        (lambda t: t["gnd"][0].update(bbx=[4, 0, 4, 8]), r"gnd\[0\] \(q0\): bbx.*left, top, right, bottom"),
        (lambda t: t["imlist"].__setitem__(0, "../x"), "imlist must be a list of image names"),
        (lambda t: t["imlist"].__setitem__(0, "g1"), "imlist has a name twice"),
    ],
)
def test_a_ground_truth_that_is_wrong_is_named_with_its_query(tmp_path, change, message):
    truth = made.revisited_truth()
    change(truth)
    file = tmp_path / "gnd_roxford5k.json"
    file.write_text(json.dumps(truth))
    with pytest.raises(DataError, match=message):
        read_ground_truth(file)


def test_a_box_outside_the_image_is_refused_and_one_that_sticks_out_is_cut(tmp_path):
    made.revisited(tmp_path, "json")
    truth = made.revisited_truth()
    truth["gnd"][0]["bbx"] = [-3.0, 2.0, 3.4, 90.0]
    truth["gnd"][1]["bbx"] = [20.0, 20.0, 30.0, 30.0]
    (tmp_path / "gnd_roxford5k.json").write_text(json.dumps(truth))
    queries = revisited(tmp_path, "query")
    assert queries[0]["image"].size == (3, 6)
    with pytest.raises(DataError, match=r"q1\.jpg has 8 x 8 pixels.*outside"):
        queries[1]


# ------------------------------------------------------------------------------------------------ plain pickles


class Trap:
    """Unpickled the usual way, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_asks_for_code_is_refused_by_name_and_runs_nothing(tmp_path):
    file, trace = tmp_path / "gnd_roxford5k.pkl", tmp_path / "trace"
    for data in (Trap(trace), [1, Trap(trace)], {"imlist": Trap(trace)}):
        file.write_bytes(pickle.dumps(data))
        with pytest.raises(DataError, match=r"gnd_roxford5k\.pkl is refused: asks for (builtins\.getattr|pathlib)"):
            load_plain_pickle(file)
    for text in (b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n(S'x'\ntR.", b"cbuiltins\neval\n(S'1'\ntR."):
        file.write_bytes(text)
        with pytest.raises(DataError, match=r"asks for (os\.system|numpy\.load|builtins\.eval)"):
            load_plain_pickle(file)
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    [
        # an array of pointers made from bytes; a state set on a function; attributes set on a function; a cut array
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'AAAAAAAA'\ntb.",
        b"cnumpy\ndtype\n(dS'x'\nI1\nsb.",
        b"c_codecs\nencode\n(N(dS'__defaults__'\nI1\nstb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I4\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'AAAAAAAA'\ntb.",
        b"", b"garbage", b"\x80\x04]", b"I1\n(lp0\n0g5\n.",
    ],
)  # fmt: skip
def test_damaged_and_devious_pickles_are_data_errors(tmp_path, text):
    file = tmp_path / "x.pkl"
    file.write_bytes(text)
    with pytest.raises(DataError, match=r"x\.pkl"):
        load_plain_pickle(file)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner) | st.frozensets(st.integers()),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(plain, st.integers(0, 5))
def test_plain_data_of_every_protocol_comes_back(tmp_path_factory, data, protocol):
    file = tmp_path_factory.getbasetemp() / "plain.pkl"
    file.write_bytes(pickle.dumps(data, protocol=protocol))
    assert load_plain_pickle(file) == data


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1", "?", "<f4", "f8"])
def test_arrays_and_numbers_of_numpy_come_back(tmp_path, protocol, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([array, np.asfortranarray(array), array[2, 3]], protocol=protocol))
    plain_array, turned, number = load_plain_pickle(tmp_path / "x.pkl")
    assert plain_array.dtype == array.dtype.newbyteorder("=")
    assert (plain_array == array).all()
    assert (turned == array).all()
    assert number == array[2, 3]


# ------------------------------------------------------------------------------------------------------- market


def market(root: Path, split: str) -> Market1501:
    return Market1501.build(MarketConfig(root=root), split)


def test_market_leaves_junk_out_and_distractors_without_a_label(tmp_path):
    made.market(tmp_path)
    gallery = market(tmp_path, "gallery")
    assert len(gallery) == 5
    assert gallery.metadata() == [
        {"camera": 4},
        {"camera": 1, "label": "0002"},
        {"camera": 2, "label": "0002"},
        {"camera": 5, "label": "0003"},
        {"camera": 1, "label": "0007"},
    ]
    assert list(market(tmp_path, "train").classes) == ["0001", "0005"]


def test_market_ignores_the_same_person_seen_by_the_same_camera(tmp_path):
    made.market(tmp_path)
    relevance = market(tmp_path, "query").relevance(market(tmp_path, "gallery"))
    assert [p.tolist() for p in relevance.positives] == [[1, 2], [4]]
    assert [i.tolist() for i in relevance.ignore] == [[1], []]


def test_market_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(DataError, match=r"query does not exist.*0002_c1s1_000451_03\.jpg"):
        market(tmp_path, "query")
    made.market(tmp_path)
    (tmp_path / "query" / "someone.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"query/someone\.jpg.*another form"):
        market(tmp_path, "query")
    with pytest.raises(UnknownNameError, match=r"galery.*Did you mean 'gallery'"):
        market(tmp_path, "galery")


# ------------------------------------------------------------------------------------------------------ recordio


PIECES = [struct.pack("<I", MAGIC), b"ab", struct.pack("<I", MAGIC)[:3], b"\0" * 5]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=6), min_size=1, max_size=5))
def test_records_come_back_whatever_bytes_they_hold(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("records")
    records = [(3 * i, b"".join(piece)) for i, piece in enumerate(pieces)]
    write_records(folder, records)
    file = RecordFile(folder / "train.rec", folder / "train.idx")
    assert [(key, file.read(key)) for key in file.keys.tolist()] == records


def test_the_format_is_the_published_one(tmp_path):
    """One whole record and one in two parts, written byte by byte."""
    magic = struct.pack("<I", 0xCED7230A)
    whole = magic + struct.pack("<I", 5) + b"hello\0\0\0"
    split = magic + struct.pack("<I", 1 << 29 | 4) + b"abcd" + magic + struct.pack("<I", 3 << 29 | 2) + b"ef\0\0"
    (tmp_path / "a.rec").write_bytes(whole + split)
    (tmp_path / "a.idx").write_text(f"7\t0\n2\t{len(whole)}\n")
    file = RecordFile(tmp_path / "a.rec", tmp_path / "a.idx")
    assert file.keys.tolist() == [2, 7]
    assert file.read(7) == b"hello"
    assert file.read(2) == b"abcd" + magic + b"ef"


def test_a_header_has_one_label_in_itself_or_several_behind_it():
    one = parse_header(pack_image([4], 9, b"image"), "x")
    many = parse_header(pack_image([4, 0.5, 2], 9, b"image"), "x")
    assert (one.labels, one.ident, one.multiple, one.size) == ((4.0,), 9, False, 24)
    assert (many.labels, many.multiple, many.size) == ((4.0, 0.5, 2.0), True, 36)
    for cut in (b"", b"short", struct.pack("<IfQQ", 2, 0, 0, 0), struct.pack("<IfQQ", 2**31, 0, 0, 0)):
        with pytest.raises(DataError, match="x "):
            parse_header(cut, "x")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("1\t0\n1\t0\n", "2 records, 1 different keys"),
        ("", "0 records"),
        ("1\t0\n2 8\n", "line 2.*a key, a tab and an offset"),
        ("1\tx\n", "line 1: offset is 'x'"),
        ("1\t9999999\n", "line 1: offset 9,999,999 lies outside"),
        ("1\t4\n", "record at byte 4 begins with"),
    ],
)
def test_a_damaged_index_is_named_with_its_line(tmp_path, index, message):
    made.ms1m(tmp_path)
    (tmp_path / "train.idx").write_text(index)
    with pytest.raises(DataError, match=message):
        Ms1m.build(Ms1mConfig(root=tmp_path))


def test_a_cut_record_file_is_named_with_its_place(tmp_path):
    made.ms1m(tmp_path)
    file = tmp_path / "train.rec"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train\.rec: the record at byte [\d,]+ needs 24 bytes, the file ends at"):
        Ms1m.build(Ms1mConfig(root=tmp_path))


# --------------------------------------------------------------------------------------------------------- faces


@pytest.mark.parametrize("identities", [True, False])
def test_ms1m_labels_come_from_identity_records_or_from_every_image(tmp_path, identities):
    faces = Ms1m.build(Ms1mConfig(root=made.ms1m(tmp_path, identities=identities)))
    assert list(faces.item_ids) == [f"{key:08d}" for key in range(1, 6)]
    assert list(faces.labels()) == [0, 0, 2, 1, 1]
    assert list(faces.classes) == ["0", "1", "2"]
    assert [colour(faces[i]["image"]) for i in range(5)] == made.COLOURS[:5]


def test_ms1m_with_labels_beyond_its_classes_or_without_its_files_is_refused(tmp_path):
    made.ms1m(tmp_path, classes=2)
    with pytest.raises(DataError, match=r"record 3: label 2;.*property announces 2 classes"):
        Ms1m.build(Ms1mConfig(root=tmp_path))
    (tmp_path / "property").write_text("2")
    with pytest.raises(DataError, match=r"property, line 1.*classes,height,width"):
        Ms1m.build(Ms1mConfig(root=tmp_path))
    (tmp_path / "train.idx").unlink()
    with pytest.raises(DataError, match=r"train\.idx does not exist.*core:image-folder"):
        Ms1m.build(Ms1mConfig(root=tmp_path))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("as_arrays", [True, False])
def test_face_pairs_are_read_in_every_form_that_is_shipped(tmp_path, protocol, as_arrays):
    file = made.face_bin(tmp_path / "lfw.bin", protocol=protocol, as_arrays=as_arrays)
    pairs = FacePairs.build(FacePairsConfig(file=file))
    assert pairs.same.tolist() == [True, False, True, False]
    assert list(pairs.item_ids[:3]) == ["000000/a", "000000/b", "000001/a"]
    assert colour(pairs[3]["image"]) == made.GREEN


def test_face_pairs_of_python_2_are_read(tmp_path):
    """Its pickles hold bytes as text."""
    image = made.encoded(made.RED)
    quoted = b"S" + repr(image)[1:].encode() + b"\n"
    (tmp_path / "old.bin").write_bytes(b"((l" + quoted + b"a" + quoted + b"a(lI01\nat.")
    pairs = FacePairs.build(FacePairsConfig(file=tmp_path / "old.bin"))
    assert colour(pairs[1]["image"]) == made.RED


@pytest.mark.parametrize(
    ("data", "message"),
    [([b""], "holds a list"), (([b"", b""], [1, 0]), "2 images and 2 pairs"), (([1, 2], [True]), "image 0 is a int"),
     (([b"", b""], ["yes"]), "pair 0 says 'yes'"), ({"a": 1}, "holds a dict")],
)  # fmt: skip
def test_a_face_file_of_another_form_is_refused(tmp_path, data, message):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(data))
    with pytest.raises(DataError, match=rf"x\.bin.*{message}"):
        FacePairs.build(FacePairsConfig(file=tmp_path / "x.bin"))


# ----------------------------------------------------------------------------------------------------------- ijb


def ijb(root: Path) -> Ijb:
    return Ijb.build(IjbConfig(root=root))


def test_ijb_faces_have_their_template_media_and_score(tmp_path):
    faces = ijb(made.ijb(tmp_path, FACES, [[5, 3, 0], [3, 5, 1]]))
    assert faces.metadata() == [{"template": 5, "media": 1}, {"template": 3, "media": 2}]
    assert faces.scores.tolist() == [0.9, 0.8]
    assert faces.points[0].tolist() == [[4, 4], [10, 4], [7, 7], [5, 10], [9, 10]]
    assert faces.pairs().tolist() == [[5, 3, 0], [3, 5, 1]]
    assert faces.identification() is None


def test_alignment_brings_the_points_of_a_turned_and_scaled_face_into_place(tmp_path):
    made.ijb(tmp_path, FACES[:1], [[5, 5, 1]])
    centre = ARCFACE_POINTS.mean(axis=0)
    turn = np.array([[0.0, -2.0], [2.0, 0.0]])  # a quarter turn, twice as large
    points = (ARCFACE_POINTS - centre) @ turn.T + 150
    image = made.picture((0, 0, 0), (300, 300))
    for number, (x, y) in enumerate(points):
        image.paste((255, 40 * number, 0), (round(x) - 6, round(y) - 6, round(x) + 7, round(y) + 7))
    image.save(tmp_path / "loose_crop" / "1.jpg", "PNG")
    numbers = " ".join(str(v) for v in points.ravel())
    (tmp_path / "meta" / "ijbc_name_5pts_score.txt").write_text(f"1.jpg {numbers} 0.5\n")
    face = np.asarray(ijb(tmp_path)[0]["image"])
    assert face.shape == (112, 112, 3)
    for number, (x, y) in enumerate(ARCFACE_POINTS):
        assert face[round(y), round(x)].tolist() == [255, 40 * number, 0]
    assert Ijb.build(IjbConfig(root=tmp_path, align=False))[0]["image"].size == (300, 300)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.floats(-3, 3)] * 2), st.tuples(*[st.floats(-50, 50)] * 2))
def test_the_similarity_transform_of_transformed_points_is_found(a, b):
    turn, shift = complex(*a), complex(*b)
    moved = (ARCFACE_POINTS @ np.array([1, 1j])) * turn + shift
    found = similarity_transform(ARCFACE_POINTS, np.stack([moved.real, moved.imag], axis=1))
    assert found[0] == pytest.approx(turn, abs=1e-9)
    assert found[1] == pytest.approx(shift, abs=1e-7)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ijbc_face_tid_mid.txt", "1.jpg 5 1\n2.jpg 3\n", "line 2.*2 words; expected name template media"),
        ("ijbc_face_tid_mid.txt", "1.jpg 5 one\n2.jpg 3 2\n", "line 1: an id is 'one'"),
        ("ijbc_face_tid_mid.txt", "../1.jpg 5 1\n2.jpg 3 2\n", "line 1.*name of a file in loose_crop"),
        ("ijbc_face_tid_mid.txt", "2.jpg 5 1\n1.jpg 3 2\n", "line 1: the face is '1.jpg'.*'2.jpg'"),
        ("ijbc_face_tid_mid.txt", "1.jpg 5 1\n", "has 1 faces.*has 2"),
        ("ijbc_name_5pts_score.txt", "1.jpg 1 2 3 4 5 6 7 8 9 10 x\n", "line 1: expected a name and 11 numbers"),
        ("ijbc_template_pair_label.txt", "5 3 0\n5 4 1\n", r"line 2: \[5, 4\]: a template has no face"),
        ("ijbc_template_pair_label.txt", "5 3 2\n", "line 1: same is 2"),
        ("ijbc_template_pair_label.txt", "5 3 0\n5 x 0\n", "line 2: a word is 'x'"),
        ("ijbc_template_pair_label.txt", "5 3 0\n5 3\n", "line 2.*2 words"),
    ],
)
def test_an_ijb_file_that_is_wrong_is_named_with_its_line(tmp_path, file, text, message):
    made.ijb(tmp_path, FACES, [[5, 3, 0]])
    (tmp_path / "meta" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        ijb(tmp_path).pairs()


def test_identification_needs_all_three_files(tmp_path):
    made.ijb(tmp_path, FACES, [[5, 3, 0]])
    made.table(tmp_path / "meta" / "ijbc_1N_gallery_G1.csv", ["TEMPLATE_ID", "SUBJECT_ID", "FILENAME"], [[5, 1, "x"]])
    with pytest.raises(DataError, match=r"ijbc_1N_gallery_G2\.csv does not exist"):
        ijb(tmp_path).identification()
    made.table(tmp_path / "meta" / "ijbc_1N_gallery_G2.csv", ["TEMPLATE_ID", "SUBJECT_ID"], [[9, 2]])
    with pytest.raises(DataError, match=r"G2\.csv, line 2: template 9 has no face"):
        ijb(tmp_path).identification()
    made.table(tmp_path / "meta" / "ijbc_1N_gallery_G2.csv", ["TEMPLATE_ID", "SUBJECT_ID"], [[3, 2], [3, 2]])
    made.table(tmp_path / "meta" / "ijbc_1N_probe_mixed.csv", ["TEMPLATE_ID", "SUBJECT_ID"], [[3, 2], [3, 4]])
    with pytest.raises(DataError, match=r"probe_mixed\.csv, line 3: template 3 has subject 4, before 2"):
        ijb(tmp_path).identification()


def test_missing_ijb_files_teach_the_layout(tmp_path):
    with pytest.raises(DataError, match=r"neither ijbc_face_tid_mid\.txt nor ijbb.*loose_crop/NAME"):
        ijb(tmp_path)


# --------------------------------------------------------------------------------------------------------- addresses


def test_an_address_with_settings_opens_the_item_again(tmp_path):
    root = made.market(tmp_path / "Market 1501 & more")
    gallery, address = open_dataset("core:market-1501", "gallery", root=root)
    uris = item_uris(address, gallery.item_ids)
    assert uris[1].startswith("dataset:core:market-1501?root=/")
    assert colour(open_dataset_item(uris[1])) == (249, 11, 11)
    assert colour(open_dataset_item(uris[0])) == (12, 249, 12)
    with pytest.raises(DataError, match="has no item 'query/x'"):
        open_dataset_item(f"{address}#query/x")


def test_settings_that_no_data_set_has_are_refused(tmp_path):
    with pytest.raises(InputError, match="roots"):
        open_dataset(f"core:market-1501?roots={tmp_path}")
    with pytest.raises(InputError, match="'nonsense' is no setting"):
        open_dataset("core:market-1501?nonsense")
