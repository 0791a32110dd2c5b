"""What an upgrade refuses, as its user meets it: the message, the exit code, and a gallery that is as it was.

Every message stands in the table "What is refused" of docs/upgrade.md.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from black_box_world import bowerbird, bowerbird_json, npy

from bowerbird.errors import BowerbirdError
from bowerbird.gallery import Gallery
from bowerbird.gallery.transform import VectorTransform
from bowerbird.upgrade import Upgrade
from bowerbird.upgrade.strategies import TrainingPairs, load_strategy
from bowerbird.upgrade.vectors_encoder import load_vectors_encoder

PAGE = Path(__file__).parents[1] / "docs" / "upgrade.md"
ITEMS, DIM, NEW_DIM = 200, 8, 12


@pytest.fixture(scope="module")
def table():
    section = PAGE.read_text(encoding="utf-8").partition("## What is refused")[2].partition("\n## ")[0]
    return re.sub(r"\s+", " ", section)


@pytest.fixture
def world(tmp_path, monkeypatch, table):
    """A folder with the gallery `g` and files of vectors, and a function that tries something that is refused."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    ids = [f"item-{n}" for n in range(ITEMS)]
    latent = rng.standard_normal((ITEMS, 6))
    old, new = (np.tanh(latent @ rng.standard_normal((6, d))).astype(np.float32) for d in (DIM, NEW_DIM))
    npy(tmp_path / "old.npy", ids, old)
    npy(tmp_path / "new.npy", ids, new)
    npy(tmp_path / "third.npy", ids, rng.standard_normal((ITEMS, DIM)).astype(np.float32))
    npy(tmp_path / "few.npy", ids[:20], new[:20])
    npy(tmp_path / "unpaired.npy", ids, new[:-1])
    npy(tmp_path / "nan.npy", ids, np.where(np.arange(ITEMS)[:, None] == 7, np.nan, new))
    npy(tmp_path / "asked-old.npy", ["a", "b", "c"], old[:3])
    npy(tmp_path / "asked-new.npy", ["a", "b", "x"], new[:3])
    npy(tmp_path / "late.npy", ["late"], new[:1])
    bowerbird("gallery", "create", "g", "--encoder", "vectors:old.npy")
    bowerbird("gallery", "add", "g", "--vectors", "old.npy")

    def refused(message, command, code=2):
        with Gallery.open("g", readonly=True) as gallery:
            before = gallery.snapshot().epoch, gallery.store.upgrade_state()
        said = re.sub(r"\s+", " ", bowerbird(*command.split(), code=code).stderr)
        assert re.search(re.escape(message).replace(r"\.\.\.", ".*"), said), said
        assert f"| {message} |" in table, f"docs/upgrade.md does not list: {message}"
        with Gallery.open("g", readonly=True) as gallery:
            assert (gallery.snapshot().epoch, gallery.store.upgrade_state()) == before, "nothing was changed"

    return refused


def maps():
    """Files `query.safetensors` (new -> old) and `forward.safetensors` (old -> new)."""
    old, new = (load_vectors_encoder(f"vectors:{name}.npy") for name in ("old", "new"))
    names = Path("old.ids.txt").read_text().split()
    pairs = TrainingPairs(old.images(names), new.images(names), None, old.space, new.space)
    for strategy, file in (("adapter", "query"), ("lift", "forward")):
        load_strategy(strategy)[1].fit(pairs, seed=0, kind="ridge").save(f"{file}.safetensors")


@pytest.mark.parametrize(
    ("message", "command"),
    [
        ("200 ids for 199 vectors; they do not pair", "upgrade plan g --to vectors:unpaired.npy"),
        ("1 vectors have NaN, infinity or length zero", "upgrade run g --to vectors:nan.npy"),
        (
            "lacks 1 queries of",
            "upgrade run g --to vectors:new.npy --queries vectors:asked-old.npy,asked-new.npy",
        ),
        ("has the metadata key 'label'", "upgrade plan g --to vectors:new.npy --label-key label"),
        (
            "has the metadata key 'label'",
            "upgrade run g --to vectors:new.npy --order class-distance --label-key label",
        ),
        ("needs a relation compatible(...)", "upgrade run g --to vectors:new.npy --strategy compatible"),
        ("20 pairs are too few ...; at least 50 are needed", "upgrade run g --to vectors:few.npy --strategy adapter"),
        ("20 pairs are too few ...; at least 50 are needed", "upgrade lift g --to vectors:few.npy"),
        ("is not usable", "upgrade run g --to vectors:third.npy --strategy adapter"),
        ("needs a log of requests: --set log=FILE", "upgrade plan g --to vectors:new.npy --order traffic"),
        ("needs a log of requests: --set log=FILE", "upgrade run g --to vectors:new.npy --order traffic"),
        ("is not what made space", "upgrade plan g --to vectors:new.npy --old vectors:third.npy"),
        ("is not what made space", "upgrade run g --to vectors:new.npy --old vectors:third.npy"),
        ("have width 12; the space has width 8", "gallery add g --vectors late.npy"),
        ("are not of space", "gallery add g --vectors third.npy --existing update"),
        (
            "is not compatible with the stored vectors",
            "upgrade run g --to vectors:third.npy --strategy compatible --compatible",
        ),
        ("is no folder that can be written to", "upgrade plan g --to vectors:new.npy --out nowhere/plan.json"),
        ("have no images", "upgrade run g --to core:perceptron?image_size=8"),
        ("there is nothing to upgrade", "upgrade run g --to vectors:old.npy"),
        ("Did you mean", "upgrade run g --to vectors:new.npy --strategy adaptor"),
        ("no upgrade is under way", "upgrade status g"),
        ("no upgrade is under way", "upgrade finish g"),
        ("no lift is under way", "upgrade lift g"),
    ],
)
def test_before_an_upgrade(world, message, command):
    world(message, command)


def test_maps_that_go_the_other_way(world):
    maps()
    world("goes the other way", "upgrade run g --to vectors:new.npy --strategy adapter --transform forward.safetensors")
    world("goes the other way", "upgrade lift g --transform query.safetensors")
    forward = VectorTransform.load("forward.safetensors")
    replace(forward, evidence={}).save("unmeasured.safetensors")
    world("nothing shows that the transform ...", "upgrade lift g --transform unmeasured.safetensors")
    world("uses no transform", "upgrade run g --to vectors:new.npy --strategy rank-merge --transform query.safetensors")


def test_while_an_upgrade_is_under_way(world):
    bowerbird("upgrade", "run", "g", "--to", "vectors:new.npy", "--stop-at-share", 0.5)
    world("begin this one on top of it (--on-top)", "upgrade run g --to vectors:third.npy")
    world("cannot replace it", "upgrade run g --to vectors:new.npy --strategy adapter")
    world("items are not in the new space yet", "upgrade finish g")
    world("say which space the vectors are of", "gallery add g --vectors late.npy")
    bowerbird("upgrade", "pause", "g")
    world("is paused", "upgrade run g")
    bowerbird("upgrade", "resume", "g")
    bowerbird("upgrade", "run", "g")
    bowerbird("upgrade", "finish", "g")
    world("cannot be undone", "upgrade rollback g")


def test_another_model_of_the_same_name_and_width(world):
    npy(Path("named.npy"), Path("new.ids.txt").read_text().split(), np.load("new.npy"))
    bowerbird("upgrade", "run", "g", "--to", "vectors:named.npy?space=hosted", "--stop-at-share", 0.5)
    np.save("named.npy", np.roll(np.load("new.npy"), 1, axis=0))
    world("this encoder is not the one that filled space", "upgrade run g")


def test_after_a_lift(world):
    bowerbird("upgrade", "lift", "g", "--to", "vectors:new.npy", "--accept-poor-transform")
    bowerbird("upgrade", "finish", "g")
    world("were lifted to ... already", "upgrade lift g --to vectors:new.npy")
    world("have no images", "upgrade run g --to core:perceptron?image_size=8 --strategy compatible")


def test_too_few_queries_give_no_verdict_and_the_number_that_would(world):
    names = Path("old.ids.txt").read_text().split()
    rows = "".join(f"{name},{n % 4}\n" for n, name in enumerate(names))
    Path("labels.csv").write_text(f"id,label\n{rows}")
    bowerbird("gallery", "add", "g", "--vectors", "old.npy", "--existing", "update", "--metadata", "labels.csv")
    planned = bowerbird_json("upgrade", "plan", "g", "--to", "vectors:new.npy", "--label-key", "label",
                             "--num-queries", 12)  # fmt: skip
    advice = planned["recommendation"]
    assert advice["decision"] == "no-verdict"
    assert re.search(r"12 labelled queries are too few .* \d+ are needed", advice["reason"])


def test_python_refuses_the_same_with_one_kind_of_exception(world):
    with Gallery.open("g") as gallery:
        upgrade = Upgrade(gallery, load_vectors_encoder("vectors:new.npy"))
        for settings, message in (
            ({"strategy": "compatible"}, "needs a relation"),
            ({"order": "traffic"}, "needs a log"),
            ({"label_key": "label"}, "metadata key"),
            ({"stop_at_share": 2.0}, "at most 1"),
        ):
            with pytest.raises(BowerbirdError, match=message):
                upgrade.run(**settings)
        assert gallery.store.upgrade_state() is None
