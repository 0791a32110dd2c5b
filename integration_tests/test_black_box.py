"""Two encoders that are known by files of vectors alone: a gallery without an image, from `create` to `finish`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from black_box_world import bowerbird, bowerbird_json, npy, parquet, safetensors

from bowerbird.gallery import Gallery
from bowerbird.upgrade.vectors_encoder import read_vectors

CLASSES, ITEMS, QUERIES = 8, 640, 120
OLD_DIM, NEW_DIM = 12, 20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Items of classes in a latent space. The old encoder sees it through noise, the new one nearly as it is."""
    folder = tmp_path_factory.mktemp("black-box")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, ITEMS + QUERIES)
    latent = rng.standard_normal((CLASSES, 10))[labels] + 0.6 * rng.standard_normal((len(labels), 10))
    old = np.tanh(latent @ rng.standard_normal((10, OLD_DIM))) + 0.7 * rng.standard_normal((len(labels), OLD_DIM))
    new = latent @ rng.standard_normal((10, NEW_DIM)) + 0.3 * rng.standard_normal((len(labels), NEW_DIM))
    old, new = old.astype(np.float32), new.astype(np.float32)
    ids, asked = [f"item-{n}" for n in range(ITEMS)], [f"query-{n}" for n in range(QUERIES)]
    names = [f"class {label}" for label in labels]
    parquet(folder / "old.parquet", ids, old[:ITEMS], names[:ITEMS])
    npy(folder / "new.npy", ids[::-1], new[:ITEMS][::-1])  # rows in any order: ids pair them
    parquet(folder / "asked-old.parquet", asked, old[ITEMS:], names[ITEMS:])
    safetensors(folder / "asked-new.safetensors", asked, new[ITEMS:])
    return folder


@pytest.fixture
def gallery(files, tmp_path):
    path = tmp_path / "gallery"
    bowerbird("gallery", "create", path, "--encoder", f"vectors:{files / 'old.parquet'}")
    assert f"added {ITEMS}" in bowerbird("gallery", "add", path, "--vectors", files / "old.parquet").stdout
    return path


@pytest.fixture
def new(files):
    return f"vectors:{files / 'new.npy'}"


@pytest.fixture
def both(files):
    return f"vectors:{files / 'asked-old.parquet'},{files / 'asked-new.safetensors'}"


def served(path, queries):
    """Ids of the ten nearest items of each query, as `serve` finds them."""
    results = json.loads(bowerbird("upgrade", "serve", path, "--queries", queries, "--json").stdout)
    return [[hit["id"] for hit in query["results"]] for query in results]


def nearest(items, queries):
    """By numpy: ids of the ten items at the smallest angle."""
    order = np.argsort(-(queries.vectors @ items.vectors.T), axis=1, kind="stable")[:, :10]
    return [[items.ids[row] for row in rows] for rows in order.tolist()]


def right_at_1(found, queries, items):
    label = dict(zip(items.ids, items.labels, strict=True))
    return np.mean([label[ids[0]] == wanted for ids, wanted in zip(found, queries.labels, strict=True)])


@pytest.mark.parametrize("strategy", ["adapter", "rank-merge", "reverse-transform"])
def test_an_upgrade_between_two_files_of_vectors(files, gallery, new, both, tmp_path, strategy):
    items, asked = read_vectors(files / "old.parquet"), read_vectors(files / "asked-old.parquet")
    new_items, new_asked = read_vectors(files / "new.npy"), read_vectors(files / "asked-new.safetensors")
    old_lists, new_lists = nearest(items, asked), nearest(new_items, new_asked)
    assert served(gallery, both) == old_lists

    planned = bowerbird_json(
        "upgrade", "plan", gallery, "--to", new, "--label-key", "label", "--queries", both, "--strategy", strategy,
        "--merger", "core:distance", "--out", tmp_path / "plan.json",
    )  # fmt: skip
    assert planned["old"]["canary"] == pytest.approx(1, abs=1e-5), "the old file made the stored vectors"
    assert planned["gain"]["low"] > 0
    curve = next(curve for curve in planned["curves"] if curve["name"] == f"compat:{strategy}")
    report = bowerbird_json(
        "upgrade", "run", gallery, "--to", new, "--strategy", strategy, "--label-key", "label", "--queries", both,
        "--merger", "core:distance", "--stop-at-share", 0.4, "--watch-every", 0.2, "--task-items", 32,
    )  # fmt: skip
    assert report["reason"] == "stop-at-share" and [round(w["share"], 1) for w in report["watched"]] == [0.2, 0.4]

    one_file = f"vectors:{files / 'asked-new.safetensors'}"
    if strategy == "rank-merge":
        assert "space" in bowerbird("upgrade", "serve", gallery, "--queries", one_file, code=2).stderr
    else:  # the old encoder is not needed any more
        assert served(gallery, one_file) == served(gallery, both)
    half = right_at_1(served(gallery, both), asked, items)
    assert half > 0.6, f"chance is {1 / CLASSES:.2f}; forecast were {curve['quality']}"
    assert "40.0%" in bowerbird("upgrade", "watch", gallery).stdout
    assert "are not in the new space yet" in bowerbird("upgrade", "finish", gallery, code=2).stderr

    bowerbird("upgrade", "rollback", gallery)
    assert served(gallery, both) == old_lists
    bowerbird("upgrade", "run", gallery, "--to", new, "--strategy", strategy)
    assert served(gallery, both) == new_lists
    assert "finished" in bowerbird("upgrade", "finish", gallery).stdout
    assert served(gallery, both) == new_lists
    assert "cannot be undone" in bowerbird("upgrade", "rollback", gallery, code=2).stderr


def test_a_lift_between_two_files_of_vectors_and_then_the_real_ones(files, gallery, new, both):
    items, asked = read_vectors(files / "old.parquet"), read_vectors(files / "asked-old.parquet")
    old_lists = nearest(items, asked)
    said = bowerbird("upgrade", "run", gallery, "--to", new, "--strategy", "lift", code=2).stderr
    assert "bowerbird upgrade lift" in said
    bowerbird("upgrade", "lift", gallery, "--to", new, "--label-key", "label", "--stop-at-share", 0.5,
              "--task-items", 80)  # fmt: skip
    bowerbird("upgrade", "rollback", gallery)
    assert served(gallery, both) == old_lists
    bowerbird("upgrade", "lift", gallery, "--to", new, "--label-key", "label")
    bowerbird("upgrade", "finish", gallery)
    lifted = served(gallery, both)
    assert right_at_1(lifted, asked, items) >= right_at_1(old_lists, asked, items) - 0.02
    assert "lifted" in bowerbird("upgrade", "lift", gallery, "--to", new, code=2).stderr, "once is enough"
    bowerbird("upgrade", "run", gallery, "--to", new, "--strategy", "compatible", "--stop-at-share", 0.5)
    assert right_at_1(served(gallery, f"vectors:{files / 'asked-new.safetensors'}"), asked, items) > 0.6
    bowerbird("upgrade", "run", gallery)
    bowerbird("upgrade", "finish", gallery)
    assert served(gallery, both) == nearest(
        read_vectors(files / "new.npy"), read_vectors(files / "asked-new.safetensors")
    )


def test_vectors_that_came_later_join_both_sides(files, gallery, new, both, tmp_path):
    bowerbird("upgrade", "run", gallery, "--to", new, "--strategy", "adapter", "--stop-at-share", 0.5)
    with Gallery.open(gallery) as opened:
        newest = opened.snapshot().write_space.fingerprint
    vector = read_vectors(files / "asked-new.safetensors").vectors[:1]
    np.save(tmp_path / "late.npy", vector)
    (tmp_path / "late.ids.txt").write_text("late\n")
    late = ["gallery", "add", gallery, "--vectors", tmp_path / "late.npy"]
    assert "--space" in bowerbird(*late, code=2).stderr, "during an upgrade a file must say whose vectors it has"
    bowerbird(*late, "--space", newest[:12])
    assert served(gallery, both)[0][0] == "late"
