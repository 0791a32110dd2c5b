"""The field's protocols as evaluators, with an encoder whose vectors are mean colours: right answers by hand."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_sets as made
import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

import training_fixtures as tiny  # noqa: E402

from bowerbird.cli import main  # noqa: E402
from bowerbird.data.market1501 import Market1501  # noqa: E402
from bowerbird.encoders import load_encoder, save_encoder  # noqa: E402
from bowerbird.gallery import Gallery  # noqa: E402
from bowerbird.protocols import EvalContext  # noqa: E402
from bowerbird.recipe import build_config  # noqa: E402
from bowerbird.registry import get_registry  # noqa: E402
from bowerbird.retrieval import configs, evaluators, fold_accuracy  # noqa: E402
from bowerbird.testing import EvaluatorContract, assert_close, load_golden  # noqa: E402
from bowerbird.upgrade import QuerySet  # noqa: E402

DATA = Path(__file__).parent / "data" / "upgrade-evaluation"


class Colours(EvalContext):
    """Real data sets; the vector of an image is its mean colour."""

    encoder = None

    def dataset(self, use, *, split=None, **config):
        record = get_registry().get("dataset", use)
        return get_registry().load(record).build(build_config(record, config, where="test"), split)

    def embed(self, dataset, encoder=None):
        rows = np.stack([np.asarray(dataset[i]["image"], np.float32).mean(axis=(0, 1)) for i in range(len(dataset))])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run(name: str, **settings):
    record = get_registry().get("evaluator", name)
    return get_registry().load(record).build(build_config(record, settings, where="test")).run(Colours())


# --------------------------------------------------------------------------------------------------- by hand


def test_landmarks_map_at_100_divides_by_the_answers_that_fit(tmp_path):
    made.landmarks(tmp_path)
    # public: red query, both red answers first
    assert run("core:gldv2", root=tmp_path, split="public").summary["mAP@100"] == pytest.approx(1)
    # private: green query, answers at 1, 2 and 5 of 6 (blue is last but grey nearer); red query, its green answer at 4
    found = run("core:gldv2", root=tmp_path, split="private")
    order = _order(tmp_path)
    expected = [
        _ap([order[made.Q2].index(i) + 1 for i in (2, 3, 4)], 3),
        _ap([order[made.Q4].index(2) + 1], 1),
    ]
    assert found.per_query["mAP@100"] == pytest.approx(expected)
    assert run("core:gldv2", root=tmp_path, split="private", ap_k=1).per_query["mAP@1"].tolist() == [1, 0]
    assert len(run("core:gldv2", root=tmp_path, split="test").per_query["R@1"]) == 3


def _order(root: Path) -> dict[str, list[int]]:
    context = Colours()
    queries, index = (context.dataset("core:gldv2", split=s, root=str(root)) for s in ("test", "index"))
    scores = context.embed(queries) @ context.embed(index).T
    return {name: np.argsort(-row, kind="stable").tolist() for name, row in zip(queries.item_ids, scores, strict=True)}


def _ap(ranks: list[int], n: int) -> float:
    return sum((j + 1) / r for j, r in enumerate(sorted(ranks))) / n


def test_revisited_measures_three_set_ups_on_cut_queries(tmp_path):
    made.revisited(tmp_path)
    found = run("core:revisited", root=tmp_path)
    # q0 is red once cut: g0 is first (easy: g1 junk and g2 hard ignored). q1 is green: g2, g3 (easy) first.
    assert found.per_query["mAP easy"][0] == pytest.approx(1)
    assert found.per_query["mP@1 easy"][0] == 1
    # q1 easy: g4 ignored; g2 ranks before g3, so the positive is at rank 2: trapezoid (0/1 + 1/2)/2
    assert found.per_query["mAP easy"][1] == pytest.approx(0.25)
    assert found.per_query["mP@1 easy"][1] == 0
    assert {f"{m} {s}" for m in ("mAP", "mP@1", "mP@5", "mP@10") for s in ("easy", "medium", "hard")} <= set(
        found.summary
    )
    whole = run("core:revisited", root=tmp_path, crop=False)
    assert whole.per_query["mAP easy"][0] < 1  # half blue: the blue image is nearer


def test_market_counts_other_cameras_only_and_distractors_stand_in_the_way(tmp_path):
    made.market(tmp_path)
    found = run("core:market-1501", root=tmp_path, ks=(1, 2))
    # red: the image of the same camera is ignored, the other one is first. green: the distractor is first.
    assert found.per_query["mAP"].tolist() == [1, 0.5]
    assert found.per_query["CMC@1"].tolist() == [1, 0]
    assert found.summary["CMC@2"] == 1
    assert found.summary["num_valid"] == 2


def test_the_upgrade_evaluator_asks_a_set_for_its_own_ground_truth(tmp_path):
    """Without it the image of the same camera would be right, and the distractors would be a class."""
    made.market(tmp_path)
    config = configs.RetrievalConfig(
        dataset="core:market-1501", settings={"root": str(tmp_path)}, query_split="query", gallery_split="gallery"
    )
    found = evaluators.Retrieval.build(config).run(Colours())
    assert found.per_query["mAP"].tolist() == [1, 0.5]


def test_face_pairs_are_judged_by_the_threshold_of_the_other_folds(tmp_path):
    file = made.face_bin(tmp_path / "lfw.bin")
    found = run("core:face-pairs", file=file, folds=2)
    assert found.summary["accuracy"] == 1
    assert found.summary["TAR@FAR=0.001"] == 1
    assert found.per_query["accuracy"].tolist() == [1, 1, 1, 1]


def test_fold_accuracy_is_that_of_every_threshold_tried():
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=60), 1)  # with ties
    same = rng.random(60) < 1 / (1 + np.exp(-2 * scores))
    right = fold_accuracy(scores, same, 5)
    for fold in np.array_split(np.arange(60), 5):
        others = np.setdiff1d(np.arange(60), fold)
        candidates = [*np.unique(scores[others]), np.inf]
        best = max(candidates, key=lambda t: (((scores[others] >= t) == same[others]).sum(), -t))
        assert (right[fold] == ((scores[fold] >= best) == same[fold])).all()


# ------------------------------------------------------------------------------------------------------------ ijb


def ijb_world(root: Path, *, identification: bool = True) -> Path:
    """Templates 1 (red), 2 (red), 3 (green), 4 (blue), 5 (green, of two media)."""
    faces = [
        {"template": 1, "media": 1, "colour": made.RED, "score": 0.9},
        {"template": 2, "media": 2, "colour": (240, 30, 30), "score": 0.9},
        {"template": 3, "media": 3, "colour": made.GREEN, "score": 0.9},
        {"template": 4, "media": 4, "colour": made.BLUE, "score": 0.9},
        {"template": 5, "media": 5, "colour": (30, 240, 30), "score": 0.9},
        {"template": 5, "media": 6, "colour": made.BLUE, "score": 0.1},  # a bad detection weighs little
    ]
    made.ijb(root, faces, [[1, 2, 1], [1, 3, 0], [3, 5, 1], [4, 5, 0], [2, 4, 0]])
    if identification:
        header = ["TEMPLATE_ID", "SUBJECT_ID", "FILENAME"]
        made.table(root / "meta" / "ijbc_1N_gallery_G1.csv", header, [[1, 10, "a"], [4, 40, "b"]])
        made.table(root / "meta" / "ijbc_1N_gallery_G2.csv", header, [[3, 30, "a"]])
        made.table(root / "meta" / "ijbc_1N_probe_mixed.csv", header, [[2, 10, "a"], [5, 30, "b"]])
    return root


def test_ijb_verifies_pairs_and_identifies_probes(tmp_path):
    found = run("core:ijb", root=ijb_world(tmp_path))
    assert found.summary["TAR@FAR=0.0001"] == 1
    assert found.summary["rank-1"] == 1
    assert found.summary["TPIR@FPIR=0.01"] == 1
    assert found.per_query["rank-1"].tolist() == [1, 1]
    only_pairs = run("core:ijb", root=ijb_world(tmp_path / "pairs", identification=False))
    assert set(only_pairs.summary) == {"TAR@FAR=0.0001", "TAR@FAR=1e-05", "TAR@FAR=1e-06"}


def test_ijb_templates_weigh_faces_by_their_detector_score(tmp_path):
    """Without it the bad detection pulls template 5 as far to blue as its good face to green."""
    root = ijb_world(tmp_path)
    (root / "meta" / "ijbc_template_pair_label.txt").write_text("3 5 1\n4 5 0\n")
    assert run("core:ijb", root=root, fars=[0.0]).summary["TAR@FAR=0"] == 1
    assert run("core:ijb", root=root, fars=[0.0], detector_score=False).summary["TAR@FAR=0"] == 0


def test_the_ijb_evaluator_gives_the_numbers_of_the_published_script(tmp_path):
    """Golden vectors in the place of faces, self test: the same scores, thresholds and hits."""
    g = load_golden(DATA / "ijb_protocol.npz")
    faces = [
        {"template": int(t), "media": int(m), "colour": (i, 0, 0), "score": repr(float(s))}
        for i, (t, m, s) in enumerate(zip(g["template_ids"], g["media_ids"], g["detector_score"], strict=True))
    ]
    made.ijb(tmp_path, faces, np.stack([g["pair_a"], g["pair_b"], g["pair_label"]], axis=1).tolist())
    subject = dict(zip(np.unique(g["template_ids"]).tolist(), g["template_subject"].tolist(), strict=True))
    gallery = [[t, s] for t, s in zip(g["gallery_template_ids"].tolist(), g["gallery_subjects"].tolist(), strict=True)]
    probes = [[t, subject[t]] for t in g["probe_template_ids"].tolist()]
    for name, rows in {"gallery_G1": gallery, "gallery_G2": gallery, "probe_mixed": probes}.items():
        made.table(tmp_path / "meta" / f"ijbc_1N_{name}.csv", ["TEMPLATE_ID", "SUBJECT_ID"], rows)

    class Given(Colours):
        def embed(self, dataset, encoder=None):
            return g["embeddings_new_flip" if type(dataset).__name__ == "Mirrored" else "embeddings_new"]

    record = get_registry().get("evaluator", "core:ijb")
    values = {"root": tmp_path, "fars": g["far_1to1"].tolist(), "fpirs": g["far_1toN"].tolist(), "ks": [1, 5]}
    found = get_registry().load(record).build(build_config(record, values, where="test")).run(Given()).summary
    tar = [found[f"TAR@FAR={far:g}"] for far in g["far_1to1"]]
    assert_close(tar, g["tpr_at_most_self"], rtol=1e-6)
    assert_close([found[f"TPIR@FPIR={far:g}"] for far in g["far_1toN"]], g["tpir_self"])
    # both galleries are the golden's one, so that every hit counts twice
    assert_close([found["rank-1"], found["rank-5"]], 2 * np.array([g["top1_self"], g["top5_self"]]) / len(probes))


# ------------------------------------------------------------------------------------------ contracts and commands


class TestLandmarksContract(EvaluatorContract):
    name = "core:gldv2"

    def make_context(self):
        return TinyColours()

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.landmarks(tmp_path), "samples": 20}


class TestRevisitedContract(EvaluatorContract):
    name = "core:revisited"

    def make_context(self):
        return TinyColours()

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.revisited(tmp_path), "samples": 20}


class TestMarketContract(EvaluatorContract):
    name = "core:market-1501"

    def make_context(self):
        return TinyColours()

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": made.market(tmp_path), "samples": 20}


class TestFacePairsContract(EvaluatorContract):
    name = "core:face-pairs"

    def make_context(self):
        return TinyColours()

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"file": made.face_bin(tmp_path / "lfw.bin"), "folds": 2, "samples": 20}


class TestIjbContract(EvaluatorContract):
    name = "core:ijb"

    def make_context(self):
        return TinyColours()

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path) -> None:
        self.config = {"root": ijb_world(tmp_path), "samples": 20}


class TinyColours(Colours):
    def __init__(self):
        self.encoder = torch.nn.Linear(2, 2).eval()


@pytest.fixture
def encoder(tmp_path: Path):
    get_registry().register_module("tiny", tiny.make_plugin())
    save_encoder(tiny.TinyEncoder(tiny.TinyConfig()), tmp_path / "encoder", use="tiny:net", config={})
    yield str(tmp_path / "encoder")
    get_registry().unregister("tiny")


def command(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_line_measures_a_benchmark_and_names_a_missing_file(tmp_path, encoder):
    root = made.market(tmp_path / "market")
    done = command("evaluate", encoder, "--evaluator", "core:market-1501", "--set", f"root={root}", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["core:market-1501/num_valid"] == 2
    wrong = command("evaluate", encoder, "--evaluator", "core:market-1501", "--set", f"root={tmp_path}")
    assert wrong.exit_code == 2
    assert "query does not exist" in wrong.output
    assert "bounding_box_test" in wrong.output


def test_every_evaluator_takes_a_data_set_with_its_settings(tmp_path, encoder):
    root = made.market(tmp_path / "market")
    done = command("evaluate", encoder, "--evaluator", "core:retrieval", "--dataset", f"core:market-1501?root={root}",
                   "--set", "query_split=query", "--set", "gallery_split=gallery", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["core:retrieval/num_valid"] == 2


def test_an_old_encoder_is_compared_with_a_new_one_on_ijb(tmp_path, encoder):
    root = ijb_world(tmp_path / "ijb")
    done = command("evaluate", encoder, "--evaluator", "core:ijb", "--set", f"root={root}", "--set", f"old={encoder}",
                   "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["core:ijb/TAR@FAR=0.0001"] == found["core:ijb/new/old TAR@FAR=0.0001"]
    assert found["core:ijb/rank-1"] == found["core:ijb/old/old rank-1"]


def test_show_teaches_the_layout_of_the_files():
    for name, part in {"core:market-1501": "0002_c1s1_000451_03.jpg", "core:gldv2": "train/a/b/c/",
                       "core:revisited": "gnd_roxford5k.pkl", "core:ms1m": "train.rec", "core:ijb": "loose_crop",
                       "core:face-pairs": "lfw.bin"}.items():  # fmt: skip
        done = command("show", name)
        assert done.exit_code == 0
        assert part in done.output


def test_a_gallery_filled_from_a_benchmark_keeps_labels_cameras_and_addresses(tmp_path, encoder):
    root = made.market(tmp_path / "market")
    path = tmp_path / "gallery"
    assert command("gallery", "create", path, "--encoder", encoder).exit_code == 0
    done = command("gallery", "add", path, "--dataset", f"core:market-1501?root={root}", "--split", "gallery")
    assert done.exit_code == 0, done.output
    with Gallery.open(path, readonly=True) as gallery:
        item = gallery.get("bounding_box_test/0002_c2s1_000500_02.jpg")
        assert item.metadata == {"camera": 2, "label": "0002"}
        assert gallery.get("bounding_box_test/0000_c4s1_000001_01.jpg").metadata == {"camera": 4}
        queries = QuerySet.from_gallery(gallery, "label", count=10)
        assert sorted(queries.labels) == ["0002", "0002", "0003", "0007"]
        again = load_encoder(encoder).encode([item.uri])
        np.testing.assert_allclose(again, gallery.vectors_of([item.id]), atol=1e-5)


def test_an_upgrade_is_planned_with_queries_of_the_benchmark(tmp_path, encoder):
    """The old part, the new part and the queries all come from the data set, by address and by name."""
    root = made.market(tmp_path / "market")
    path = tmp_path / "gallery"
    torch.manual_seed(5)
    save_encoder(tiny.TinyEncoder(tiny.TinyConfig()), tmp_path / "new", use="tiny:net", config={})
    assert command("gallery", "create", path, "--encoder", encoder).exit_code == 0
    added = command("gallery", "add", path, "--dataset", f"core:market-1501?root={root}", "--split", "gallery")
    assert added.exit_code == 0
    done = command("upgrade", "plan", path, "--to", tmp_path / "new", "--label-key", "label", "--queries",
                   f"core:market-1501?root={root}", "--split", "query", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "recommendation" in json.loads(done.output)


def test_a_subset_and_the_default_keep_the_class_as_metadata(tmp_path):
    from bowerbird.data import subset
    from bowerbird.data.benchmark_configs import MarketConfig

    train = Market1501.build(MarketConfig(root=made.market(tmp_path)), "train")
    assert subset(train, [1]).metadata() == [{"camera": 2, "label": "0005"}]


@pytest.mark.parametrize(("use", "make"), [("core:ms1m", made.ms1m), ("core:gldv2", made.landmarks)])
def test_the_training_splits_can_be_trained_on(tmp_path, encoder, use, make):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "x"\n[encoder]\nuse = "tiny:net"\n[objective]\nuse = "core:softmax"\n'
        f'[dataset]\nuse = "{use}"\nroot = "{make(tmp_path / "data")}"\n[train]\nepochs = 1\nbatch_size = 2\n'
    )
    done = command("train", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "encoder" / "weights.safetensors").is_file()
