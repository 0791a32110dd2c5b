"""Small benchmark sets on disk, in the formats that their authors ship. Each image is one flat colour."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bowerbird.data.recordio import pack_image, write_records


def picture(colour: Sequence[int], size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, tuple(int(c) for c in colour))


def encoded(colour: Sequence[int], size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    picture(colour, size).save(stream, "PNG")
    return stream.getvalue()


def save(path: Path, colour: Sequence[int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(colour, size))  # decoders look at the bytes, not at the suffix


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


# ---------------------------------------------------------------------------------------------------- landmarks

Q1, Q2, Q3, Q4 = ("a0b1c2d3e4f50001", "b0b1c2d3e4f50002", "c0b1c2d3e4f50003", "d0b1c2d3e4f50004")
INDEX = [f"{i}f00000000000000"[:16] for i in range(6)]
RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
COLOURS = [RED, (230, 20, 20), GREEN, (20, 230, 20), BLUE, (128, 128, 128)]


def landmarks(root: Path) -> Path:
    """Index: two red (landmark 7), two green (12), blue (100), grey (3). Q1 public red, Q2 private green with a blue
    answer, Q3 ignored, Q4 private with a red query and a green answer."""
    root.mkdir(exist_ok=True)
    table(
        root / "index_image_to_landmark.csv",
        ["id", "landmark_id"],
        list(zip(INDEX, [7, 7, 12, 12, 100, 3], strict=True)),
    )
    table(root / "index.csv", ["id"], [[i] for i in INDEX])
    table(root / "retrieval_solution_v2.0.csv", ["id", "images", "Usage"], [[Q1, INDEX[5], "Public"]])
    solution = [
        [Q1, f"{INDEX[0]} {INDEX[1]}", "Public"],
        [Q2, f"{INDEX[2]} {INDEX[3]} {INDEX[4]}", "Private"],
        [Q3, "None", "Ignored"],
        [Q4, INDEX[2], "Private"],
    ]
    table(root / "retrieval_solution_v2.1.csv", ["id", "images", "Usage"], solution)
    table(root / "train_clean.csv", ["landmark_id", "images"], [[100, f"{INDEX[4]} {INDEX[5]}"], [9, INDEX[0]]])
    table(root / "train.csv", ["id", "url", "landmark_id"], [[i, "http://x/y,z", 5] for i in INDEX[:2]])
    for name, colour in [*zip(INDEX, COLOURS, strict=True)]:
        save(root / "index" / name[0] / name[1] / name[2] / f"{name}.jpg", colour)
        save(root / "train" / name[0] / name[1] / name[2] / f"{name}.jpg", colour)
    for name, colour in {Q1: RED, Q2: GREEN, Q4: RED}.items():
        save(root / "test" / name[0] / name[1] / name[2] / f"{name}.jpg", colour)
    return root


# ---------------------------------------------------------------------------------------------------- revisited


def revisited_truth() -> dict[str, Any]:
    """Two queries on six images; the box of the first is the left half, which is red."""
    return {
        "imlist": [f"g{i}" for i in range(6)],
        "qimlist": ["q0", "q1"],
        "gnd": [
            {"bbx": [0.0, 0.0, 4.0, 8.0], "easy": [0], "hard": [2], "junk": [1]},
            {"bbx": [0.0, 0.0, 8.0, 8.0], "easy": [3], "hard": [4], "junk": []},
        ],
    }


def revisited(root: Path, form: str = "pkl", name: str = "roxford5k") -> Path:
    root.mkdir(exist_ok=True)
    truth = revisited_truth()
    if form == "json":
        (root / f"gnd_{name}.json").write_text(json.dumps(truth))
    else:  # as the authors' file: arrays in it, an old protocol
        for entry in truth["gnd"]:
            entry["easy"] = np.array(entry["easy"])
            entry["bbx"] = np.array(entry["bbx"])
        (root / f"gnd_{name}.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    for i, colour in enumerate(COLOURS):
        save(root / "jpg" / f"g{i}.jpg", colour)
    halves = picture(BLUE)
    halves.paste(RED, (0, 0, 4, 8))
    halves.save(root / "jpg" / "q0.jpg", "PNG")
    save(root / "jpg" / "q1.jpg", GREEN)
    return root


# ------------------------------------------------------------------------------------------------------- market

MARKET = {
    "bounding_box_train": {"0001_c1s1_000151_01.jpg": RED, "0005_c2s1_000151_01.jpg": GREEN},
    "query": {"0002_c1s1_000451_03.jpg": RED, "0007_c3s3_000001_00.jpg": GREEN},
    "bounding_box_test": {
        "0002_c1s1_000400_01.jpg": (249, 11, 11),  # the same camera as the query: ignored
        "0002_c2s1_000500_02.jpg": (240, 20, 20),
        "0007_c1s1_000001_01.jpg": (60, 200, 60),
        "0000_c4s1_000001_01.jpg": (12, 249, 12),  # a distractor nearer to the green query than its own image
        "-1_c1s1_000002_04.jpg": (11, 250, 11),  # junk, nearer still
        "0003_c5s1_000003_01.jpg": BLUE,
    },
}


def market(root: Path) -> Path:
    for folder, files in MARKET.items():
        for name, colour in files.items():
            save(root / folder / name, colour)
    (root / "query" / "Thumbs.db").write_bytes(b"x")  # the distribution has these
    return root


# -------------------------------------------------------------------------------------------------------- faces


def ms1m(root: Path, *, identities: bool = True, classes: int = 3) -> Path:
    """Five images of persons 0, 0, 2, 1, 1; with identity records as InsightFace writes them."""
    root.mkdir(exist_ok=True)
    labels = [0, 0, 2, 1, 1]
    pairs = [(0, label) for label in labels] if identities else [(None, label) for label in labels]
    images = [
        (key, pack_image([label] if flag is None else [label, 0], key, encoded(COLOURS[key - 1])))
        for key, (flag, label) in enumerate(pairs, 1)
    ]
    records = images
    if identities:
        spans = [(1, 3), (3, 4), (4, 6)]
        people = [(6 + i, pack_image(span, 6 + i, b"")) for i, span in enumerate(spans)]
        records = [(0, pack_image([6, 9], 0, b"")), *images, *people]
    write_records(root, records)
    (root / "property").write_text(f"{classes},112,112")
    return root


def face_bin(path: Path, *, protocol: int = 4, as_arrays: bool = False) -> Path:
    """Four pairs: red/red, red/green, blue/blue, green/blue."""
    colours = [RED, RED, RED, GREEN, BLUE, BLUE, GREEN, BLUE]
    images: list[Any] = [encoded(colour) for colour in colours]
    if as_arrays:
        images = [np.frombuffer(image, np.uint8) for image in images]
    path.write_bytes(pickle.dumps((images, [True, False, True, False]), protocol=protocol))
    return path


def ijb(root: Path, faces: Sequence[Mapping[str, Any]], pairs: Sequence[Sequence[int]], *, name: str = "ijbc") -> Path:
    """``faces``: template, media, colour, score."""
    meta = root / "meta"
    meta.mkdir(parents=True, exist_ok=True)
    points = "4 4 10 4 7 7 5 10 9 10"
    rows = list(enumerate(faces, 1))
    (meta / f"{name}_face_tid_mid.txt").write_text("".join(f"{i}.jpg {f['template']} {f['media']}\n" for i, f in rows))
    (meta / f"{name}_name_5pts_score.txt").write_text("".join(f"{i}.jpg {points} {f['score']}\n" for i, f in rows))
    (meta / f"{name}_template_pair_label.txt").write_text("".join(f"{a} {b} {same}\n" for a, b, same in pairs))
    for i, face in rows:
        save(root / "loose_crop" / f"{i}.jpg", face["colour"], (16, 16))
    return root
