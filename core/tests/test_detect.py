"""Finding, drawing and storing objects. The detector is exact: it finds rectangles of pure colours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from pydantic import BaseModel

from bowerbird.cli import main
from bowerbird.coco import run_lengths
from bowerbird.data.dataset import Dataset
from bowerbird.data.images import Preprocessing, open_image
from bowerbird.data.regions import split_region
from bowerbird.detect import ObjectFinder
from bowerbird.draw import READABLE_SIDE, class_colour, draw_objects
from bowerbird.encoders import save_encoder
from bowerbird.errors import DataError, InputError, UnknownNameError
from bowerbird.gallery import Gallery
from bowerbird.hookspecs import hookimpl
from bowerbird.protocols import Detector, Encoder, Features, Objects
from bowerbird.records import DatasetRecord, EncoderRecord
from bowerbird.registry import get_registry

BOWERBIRD_API = "1.0"
CLASSES = ("red", "green", "blue")
GROUND = (90, 90, 90)


class NoSettings(BaseModel):
    pass


class Blobs(Detector):
    """Finds at most one rectangle of every pure colour; its score is its brightness. Embeds by the mean colour."""

    embed_dim = 6
    preprocessing = Preprocessing(size=8)
    classes = CLASSES
    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(3, 6)

    @classmethod
    def build(cls, config: Any) -> Blobs:
        return cls()

    def forward(self, batch: Mapping[str, Any]) -> Features:
        return Features(pooled=self.mix(batch["image"].mean(dim=(2, 3))))

    def detect(self, images: Sequence[torch.Tensor]) -> list[Objects]:
        found = []
        for image in images:
            type(self).calls += 1
            rows = []
            for label in range(3):
                others = [i for i in range(3) if i != label]
                mask = (image[label] > 0.5) & (image[others] < 0.1).all(dim=0)
                if mask.any():
                    y, x = mask.nonzero().T
                    score = float(image[label][mask].mean())
                    box = [float(x.min()) + 0.25, float(y.min()) + 0.25, float(x.max()) + 0.75, float(y.max()) + 0.75]
                    rows.append((score, label, box, mask))
            rows.sort(key=lambda row: -row[0])
            height, width = image.shape[1:]
            found.append(
                Objects(
                    boxes=torch.tensor([row[2] for row in rows]).reshape(-1, 4),
                    labels=torch.tensor([row[1] for row in rows], dtype=torch.int64),
                    scores=torch.tensor([row[0] for row in rows]),
                    masks=torch.stack([row[3] for row in rows]) if rows else torch.zeros(0, height, width).bool(),
                )
            )
        return found


class Untrained(Blobs):
    classes = ()


class Plain(Encoder):
    """Another space than that of ``Blobs``: the corners of the picture."""

    embed_dim = 12
    preprocessing = Preprocessing(size=2)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    @classmethod
    def build(cls, config: Any) -> Plain:
        return cls()

    def forward(self, batch: Mapping[str, Any]) -> Features:
        return Features(pooled=self.scale * batch["image"].flatten(1) + 0.01)


@hookimpl
def bowerbird_encoders() -> Iterator[EncoderRecord]:
    for name in ("Blobs", "Untrained", "Plain"):
        yield EncoderRecord(
            name=f"finding:{name.lower()}",
            target=f"{__name__}:{name}",
            config=f"{__name__}:NoSettings",
            summary=f"{name}.",
            outputs=("pooled",),
        )


class Annotated(Dataset):
    """Two pictures whose annotation file has ids of its own, and knows two of the detector's classes."""

    classes, category_ids, image_ids = ("blue", "cat", "red"), (7, 17, 90), (139, 285)

    @classmethod
    def build(cls, config: Any, split: str | None) -> Annotated:
        return cls()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.new("RGB", (20, 20), GROUND)
        for label in range(3):
            image.paste(tuple(230 if i == label else 0 for i in range(3)), (6 * label, 2, 6 * label + 4, 9))
        return {"image": image, "item_id": self.item_ids[index]}

    @property
    def item_ids(self) -> list[str]:
        return ["one", "two"]


@hookimpl
def bowerbird_datasets() -> Iterator[DatasetRecord]:
    target = f"{__name__}:Annotated"
    yield DatasetRecord(name="finding:annotated", target=target, summary="Annotated.", provides=("image",))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    get_registry().register_module("finding", sys.modules[__name__])
    yield
    get_registry().unregister("finding")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, module in (("blobs", Blobs()), ("untrained", Untrained()), ("plain", Plain())):
        save_encoder(module, folder / name, use=f"finding:{name}", config={})
    return folder


def paint(
    path: Path, *rectangles: tuple[int, tuple[int, int, int, int], int], size: tuple[int, int] = (40, 30)
) -> Path:
    """A picture with rectangles: class, left top right bottom, brightness."""
    image = Image.new("RGB", size, GROUND)
    for label, box, brightness in rectangles:
        image.paste(tuple(brightness if i == label else 0 for i in range(3)), box)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    paint(folder / "a.png", (0, (2, 3, 12, 9), 250), (1, (20, 10, 38, 28), 200))
    paint(folder / "old" / "b.png", (2, (5, 5, 15, 25), 180), size=(30, 30))
    paint(folder / "old" / "none.png")
    return folder


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


# ------------------------------------------------------------------------------------------------ finding


def test_objects_above_the_threshold_come_best_first(models: Path, pictures: Path) -> None:
    sources = [pictures / "a.png", pictures / "old" / "none.png", pictures / "old" / "b.png"]
    found = list(ObjectFinder(models / "blobs").find(sources, batch_size=2))
    assert [(one.position, one.objects.labels.tolist()) for one in found] == [(0, [0, 1]), (1, []), (2, [2])]
    assert found[0].image.size == (40, 30)
    assert found[0].objects.masks is not None and found[0].objects.masks.sum(dim=(1, 2)).tolist() == [60, 324]
    sure = list(ObjectFinder(models / "blobs", threshold=0.9).find(sources))
    assert [one.objects.labels.tolist() for one in sure] == [[0], [], []]


def test_objects_are_chosen_by_class_and_number(models: Path, pictures: Path) -> None:
    def labels(**options: Any) -> list[int]:
        (found,) = ObjectFinder(models / "blobs", **options).find([pictures / "a.png"])
        assert found.objects.masks is not None and len(found.objects.masks) == len(found.objects.boxes)
        return found.objects.labels.tolist()

    assert labels(classes=["green", "blue"]) == [1]
    assert labels(max_per_image=1) == [0]
    assert labels(threshold=1.0) == []


def test_what_is_no_detector_or_no_class_is_refused(models: Path) -> None:
    with pytest.raises(InputError, match=r"finding:plain.*finds no objects"):
        ObjectFinder(models / "plain")
    with pytest.raises(InputError, match="no classes yet"):
        ObjectFinder(models / "untrained")
    with pytest.raises(UnknownNameError, match=r"finds no 'gren'.*green.*It finds: red, green, blue"):
        ObjectFinder(models / "blobs", classes=["gren"])
    with pytest.raises(InputError, match=r"threshold = 1\.5"):
        ObjectFinder(models / "blobs", threshold=1.5)


def test_unreadable_pictures_are_told_in_order(models: Path, pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    sources = [pictures / "a.png", pictures / "broken.png", pictures / "old" / "b.png"]
    finder, told = ObjectFinder(models / "blobs"), []
    found = finder.find(sources, on_error=lambda position, error: told.append((position, str(error))))
    assert [one.position for one in found] == [0, 2]
    assert told[0][0] == 1 and "broken.png" in told[0][1]
    seen = []
    with pytest.raises(DataError, match=r"broken\.png"):
        for one in finder.find(sources):
            seen.append(one.position)
    assert seen == [0]


# ------------------------------------------------------------------------------------------------ COCO


def decoded(encoded: Mapping[str, Any]) -> np.ndarray:
    """The mask of compressed run lengths, by the description of the format."""
    runs: list[int] = []
    value = shift = 0
    for character in encoded["counts"]:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    height, width = encoded["size"]
    return np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T.astype(bool)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (90, 130)])
def test_run_lengths_hold_the_mask(size: tuple[int, int], share: float) -> None:
    mask = np.random.default_rng(0).random(size) < share
    encoded = run_lengths(mask)
    assert encoded["size"] == list(size)
    assert np.array_equal(decoded(encoded), mask)


def test_run_lengths_have_the_form_of_coco() -> None:
    assert run_lengths(np.zeros((3, 3), bool)) == {"size": [3, 3], "counts": "9"}
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:6] = True  # runs 32 3 7 3 7 3 45: the first needs two characters, later ones are differences
    assert run_lengths(mask)["counts"] == "P137000V1"


# ------------------------------------------------------------------------------------------------ drawing


def test_boxes_masks_and_names_are_drawn_in_the_colour_of_the_class() -> None:
    image = Image.new("RGB", (800, 600), GROUND)
    masks = torch.zeros(1, 600, 800, dtype=torch.bool)
    masks[0, 220:380, 320:480] = True
    objects = Objects(
        boxes=torch.tensor([[300.0, 200.0, 500.0, 400.0]]), labels=torch.tensor([1]), scores=torch.tensor([0.87]),
        masks=masks, keypoints=torch.tensor([[[310.0, 390.0, 2.0], [490.0, 390.0, 0.0]]]),
    )  # fmt: skip
    drawn = np.asarray(draw_objects(image, objects, CLASSES)).astype(int)
    colour, ground = np.array(class_colour(1)), np.array(GROUND)
    assert drawn.shape == (600, 800, 3)
    assert (drawn[300, 300] == colour).all() and (drawn[399, 450] == colour).all()  # the frame
    assert (drawn[300, 321] == drawn[300, 400]).all()
    assert (np.abs(drawn[300, 400] - (0.45 * colour + 0.55 * ground)) <= 1).all()  # within the mask
    assert (drawn[220, 400] == colour).all()  # its outline
    assert (drawn[390, 310] == colour).all() and (drawn[390, 480] == ground).all()  # keypoints that are there
    name = drawn[170:200, 300:420]
    assert (name == colour).all(axis=2).sum() > 200 and ((name == 0) | (name == 255)).all(axis=2).sum() > 30
    assert (drawn[:160] == ground).all() and (drawn[:, :290] == ground).all()
    assert np.array_equal(np.asarray(image), np.full((600, 800, 3), GROUND))  # a copy


def test_small_pictures_are_enlarged_and_names_stay_within_them() -> None:
    objects = Objects(
        boxes=torch.tensor([[0.0, 0.0, 39.0, 2.0], [35.0, 27.0, 60.0, 50.0], [5.0, 5.0, 5.2, 5.2]]),
        labels=torch.tensor([0, 1, 2]), scores=torch.tensor([0.9, 0.8, 0.7]),
    )  # fmt: skip
    drawn = draw_objects(
        Image.new("RGB", (40, 30), GROUND), objects, ["a", "a name that is longer than the picture", "c"]
    )
    assert drawn.size == (READABLE_SIDE, READABLE_SIDE * 30 // 40)
    assert draw_objects(Image.new("RGB", (700, 9)), Objects(torch.zeros(0, 4), torch.zeros(0).long()), []).size == (
        700,
        9,
    )


def test_the_names_of_objects_in_one_place_do_not_cover_each_other() -> None:
    image = Image.new("RGB", (800, 600), GROUND)
    box = [300.0, 200.0, 500.0, 400.0]
    objects = Objects(torch.tensor([box] * 4), torch.arange(4), torch.tensor([0.9, 0.8, 0.7, 0.6]))
    alone = [Objects(*(part[[i]] for part in (objects.boxes, objects.labels, objects.scores))) for i in range(4)]

    def areas(drawn: Image.Image) -> list[int]:
        """Pixels of each class's colour, but for the frame, of which the surest object's hides the others."""
        pixels = np.asarray(drawn).copy()
        pixels[:, [*range(295, 312), *range(490, 506)]] = 0
        return [int((pixels == class_colour(label)).all(axis=2).sum()) for label in range(4)]

    together = areas(draw_objects(image, objects, ["one", "two", "three", "four"]))
    for label, one in enumerate(alone):
        name = areas(draw_objects(image, one, ["one", "two", "three", "four"]))[label]
        assert together[label] > 0.5 * min(name, 400)


def test_neighbouring_classes_have_different_colours() -> None:
    colours = np.array([class_colour(label) for label in range(40)], float)
    near = np.linalg.norm(colours[1:] - colours[:-1], axis=1)
    assert near.min() > 80
    assert len({class_colour(label) for label in range(40)}) == 40


# ------------------------------------------------------------------------------------------------ the command


def test_detect_draws_every_picture_and_writes_coco_results(models: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = json.loads(run("detect", models / "blobs", "--folder", pictures, "--out", out, "--json").output)
    assert (summary["images"], summary["objects"]) == (3, 3)
    assert summary["classes"] == {"red": 1, "green": 1, "blue": 1}
    about = json.loads((out / "images.json").read_text())
    assert about["categories"] == [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    names = {entry["id"]: entry for entry in about["images"]}
    assert {entry["file_name"] for entry in names.values()} == {"a.png", "old/b.png", "old/none.png"}
    results = json.loads((out / "results.json").read_text())
    first = results[0]
    assert names[first["image_id"]] == {"id": first["image_id"], "file_name": "a.png", "width": 40, "height": 30}
    assert first["category_id"] == 1 and first["score"] == pytest.approx(250 / 255)
    assert first["bbox"] == pytest.approx([2.25, 3.25, 9.5, 5.5])
    mask = decoded(first["segmentation"])
    assert mask[3:9, 2:12].all() and mask.sum() == 60
    drawn = {path.relative_to(out / "pictures").as_posix() for path in (out / "pictures").rglob("*.png")}
    assert drawn == {"a.png.png", "old/b.png.png", "old/none.png.png"}
    assert open_image(out / "pictures" / "a.png.png").size == (640, 480)


def test_results_have_the_ids_of_the_annotation_file(models: Path, tmp_path: Path) -> None:
    run("detect", models / "blobs", "--dataset", "finding:annotated", "--out", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "images.json").read_text())
    assert {entry["name"]: entry["id"] for entry in about["categories"]} == {"red": 90, "green": 91, "blue": 7}
    assert [(entry["id"], entry["file_name"]) for entry in about["images"]] == [(139, "one"), (285, "two")]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [entry["image_id"] for entry in results] == [139] * 3 + [285] * 3
    by_place = {entry["bbox"][0] // 6: entry["category_id"] for entry in results}
    assert by_place == {0: 90, 1: 91, 2: 7}


def test_pictures_of_odd_places_are_drawn_within_the_folder(
    models: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "out"
    names = [pictures / "a.png", f"{pictures}/../pictures/a.png", f"{pictures}/a.png#xywh=0,0,15,15"]
    monkeypatch.chdir(pictures)
    names += ["a.png", "old/../a.png", "../pictures/a.png"]
    run("detect", models / "blobs", *names, "--out", out)
    drawn = list(out.rglob("*.png"))
    assert len(drawn) == len(names)
    assert set(drawn) == {path for path in tmp_path.rglob("*.png") if pictures not in path.parents}


def test_only_results_where_nothing_shall_be_drawn(models: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("detect", models / "blobs", pictures / "a.png", "--out", out, "--no-pictures", "--classes", "green,blue")
    assert [entry["category_id"] for entry in json.loads((out / "results.json").read_text())] == [2]
    assert {path.name for path in out.iterdir()} == {"results.json", "images.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{models}/blobs", "--out", "{tmp}/o"), "one of: image files, --folder, --dataset"),
        (("{models}/blobs", "{a}", "--folder", "{pictures}", "--out", "{tmp}/o"), "one of: image files"),
        (("{models}/blobs", "{a}", "--split", "test", "--out", "{tmp}/o"), "--split goes with --dataset"),
        (("{models}/blobs", "{a}", "--out", "{a}"), "is a file"),
        (("{models}/plain", "{a}", "--out", "{tmp}/o"), "finds no objects"),
        (("{models}/blobs", "{a}", "--classes", "rad", "--out", "{tmp}/o"), "Did you mean 'red'"),
        (("{models}/none", "{a}", "--out", "{tmp}/o"), "there is no such folder"),
        (("{models}/blobs", "{tmp}/gone.png", "--out", "{tmp}/o"), "gone.png: the file does not exist"),
        (("{models}/blobs", "{tmp}/gone.png", "--out", "{tmp}/o"), "--on-error skip"),
        (("{models}/blobs", "{pictures}", "--out", "{tmp}/o"), "is a folder, not an image; for every image below it"),
        (("{models}/blobs", "{a}#xywh=40,0,1,1", "--out", "{tmp}/o"), "lies outside the picture"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    models: Path, pictures: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    places = {"models": models, "pictures": pictures, "tmp": tmp_path, "a": pictures / "a.png"}
    said = run("detect", *(text.format(**places) for text in arguments), code=2).output
    assert message in said
    assert not (tmp_path / "o" / "results.json").exists()


def test_unreadable_pictures_can_be_left_out(models: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "broken.jpg").write_bytes(b"no picture")
    options = ("--folder", pictures, "--out", tmp_path / "out", "--on-error", "skip", "--json")
    summary = json.loads(run("detect", models / "blobs", *options).output)
    assert summary["images"] == 3
    assert list(summary["skipped"]) == ["broken.jpg"]


def test_help_needs_no_torch() -> None:
    code = "import sys; from bowerbird.cli import main\ntry: main(['detect', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys(), 'imported'"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "results.json" in done.stdout


# ------------------------------------------------------------------------------------------------ a gallery of objects


@pytest.fixture
def things(models: Path, tmp_path: Path) -> Path:
    run("gallery", "create", tmp_path / "things", "--encoder", models / "blobs")
    return tmp_path / "things"


def add(things: Path, models: Path, *more: object, code: int = 0) -> dict[str, Any]:
    options = ("--detect", models / "blobs", "--device", "cpu", "--json")
    output = run("gallery", "add", things, *more, *options, code=code).output
    return json.loads(output) if not code else {"said": output}


def test_every_object_is_an_item_with_its_box_label_and_picture(models: Path, pictures: Path, things: Path) -> None:
    result = add(things, models, "--folder", pictures)
    assert (result["added"], result["pictures"], result["empty"], result["items"]) == (3, 3, 1, 3)
    with Gallery.open(things, readonly=True) as gallery:
        red, blue = gallery.get("a.png#xywh=2,3,10,6"), gallery.get("old/b.png#xywh=5,5,10,20")
        assert red.uri == f"{(pictures / 'a.png').resolve()}#xywh=2,3,10,6"
        assert dict(red.metadata) | {"detector": "", "score": 0} == {
            "image": "a.png", "label": "red", "box": [2.25, 3.25, 11.75, 8.75], "detector": "", "score": 0,
        }  # fmt: skip
        assert red.metadata["score"] == pytest.approx(250 / 255, abs=1e-4)
        assert blue.metadata["label"] == "blue"  # of the object, not of the folder
        hashes = {item.content_hash for item in gallery.items()}
        assert len(hashes) == 3 and None not in hashes


def test_a_search_returns_regions(models: Path, pictures: Path, things: Path) -> None:
    add(things, models, "--folder", pictures)
    query = f"{pictures / 'a.png'}#xywh=24,12,6,6"
    found = json.loads(run("gallery", "search", things, "--image", query, "-k", 2, "--device", "cpu", "--json").output)
    best = found["results"][0]["hits"][0]
    assert best["id"] == "a.png#xywh=20,10,18,18"
    assert (best["label"], best["image"], best["box"]) == ("green", "a.png", [20.25, 10.25, 37.75, 27.75])
    assert split_region(best["uri"])[0] == str((pictures / "a.png").resolve())
    assert "a.png#xywh=20,10,18,18  green" in run("gallery", "search", things, "--image", query).output
    only = run("gallery", "search", things, "--id", best["id"], "--where", "label=blue", "--json").output
    assert [hit["label"] for hit in json.loads(only)["results"][0]["hits"]] == ["blue"]


def test_a_repeated_call_looks_only_at_what_is_new_or_changed(models: Path, pictures: Path, things: Path) -> None:
    add(things, models, pictures / "a.png")
    Blobs.calls = 0
    paint(pictures / "c.png", (0, (1, 1, 9, 9), 250))
    again = add(things, models, pictures / "a.png", pictures / "c.png")
    assert (again["added"], again["unchanged"], again["pictures"], Blobs.calls) == (1, 2, 1, 1)
    paint(pictures / "a.png", (0, (2, 3, 12, 9), 250))  # the green one is gone, the red one is the same box
    changed = add(things, models, pictures / "a.png", pictures / "c.png")
    assert (changed["added"], changed["replaced"], changed["removed"], changed["unchanged"]) == (0, 1, 1, 1)
    other = add(things, models, pictures / "a.png", pictures / "c.png", "--classes", "green")
    assert (other["removed"], other["items"], other["empty"]) == (2, 0, 2)


def test_what_is_there_is_skipped_or_refused_on_demand(models: Path, pictures: Path, things: Path) -> None:
    add(things, models, pictures / "a.png")
    other = add(things, models, pictures / "a.png", "--classes", "green", "--existing", "skip")
    assert (other["unchanged"], other["pictures"]) == (2, 0)
    said = add(things, models, pictures / "a.png", "--existing", "error", code=2)["said"]
    assert "have objects in the gallery already" in said


def test_items_that_only_look_like_objects_are_left_alone(models: Path, pictures: Path, things: Path) -> None:
    source = str(pictures / "a.png")
    with Gallery.open(things) as gallery:
        vector = np.eye(6, dtype=np.float32)[:1]
        gallery.add(["mine"], vector, metadata=[{"image": source, "box": [0, 0, 1, 1]}])
    assert add(things, models, source)["removed"] == 0
    with Gallery.open(things, readonly=True) as gallery:
        assert "mine" in gallery and len(gallery) == 3


def test_an_interrupted_call_keeps_whole_pictures_and_goes_on(
    models: Path, things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [paint(tmp_path / f"{i}.png", (0, (1, 1, 9, 9), 250), (1, (12, 1, 20, 9), 220)) for i in range(6)]
    monkeypatch.setattr("bowerbird.gallery.objects.COMMIT_ITEMS", 4)
    seen, find = Blobs.detect, ObjectFinder.find

    def stops(self: Blobs, images: Sequence[torch.Tensor]) -> list[Objects]:
        if Blobs.calls == 3:
            raise KeyboardInterrupt
        return seen(self, images)

    monkeypatch.setattr(ObjectFinder, "find", lambda self, sources, **more: find(self, sources, batch_size=1, **more))
    monkeypatch.setattr(Blobs, "detect", stops)
    Blobs.calls = 0
    add(things, models, *names, code=130)
    with Gallery.open(things, readonly=True) as gallery:
        assert len(gallery) == 4  # two pictures, both objects of each
    monkeypatch.setattr(Blobs, "detect", seen)
    Blobs.calls = 0
    result = add(things, models, *names)
    assert (result["added"], result["unchanged"], Blobs.calls) == (8, 4, 4)


def test_an_upgrade_moves_a_gallery_of_objects_like_any_other(models: Path, pictures: Path, things: Path) -> None:
    add(things, models, "--folder", pictures)
    run("upgrade", "run", things, "--to", models / "plain", "--strategy", "core:full", "--device", "cpu")
    run("upgrade", "finish", things)
    with Gallery.open(things, readonly=True) as gallery:
        assert gallery.snapshot().write_space.dim == 12
        for item in gallery.items():
            crop = open_image(str(item.uri))
            batch = {"image": torch.from_numpy(Plain.preprocessing(crop))[None]}
            expected = torch.nn.functional.normalize(Plain()(batch).pooled, dim=1)[0].detach().numpy()
            np.testing.assert_allclose(gallery.vectors_of([item.id])[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{a}", "--threshold", "0.4"), "--threshold goes with --detect"),
        (("{a}", "--max-per-image", "4"), "--max-per-image goes with --detect"),
        (("--vectors", "{a}", "--detect", "{models}/blobs"), "--detect finds objects in images"),
        (("{a}#xywh=0,0,5,5", "--detect", "{models}/blobs"), "found in whole pictures"),
        (("{a}", "--detect", "{models}/plain"), "finds no objects"),
    ],
)
def test_what_cannot_be_added_is_refused(
    models: Path, pictures: Path, things: Path, arguments: tuple[str, ...], message: str
) -> None:
    texts = (text.format(a=pictures / "a.png", models=models) for text in arguments)
    assert message in run("gallery", "add", things, *texts, code=2).output
