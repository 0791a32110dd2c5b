"""The promise of ``plan``: from a sample, the area of the curve that a backfill of the whole gallery will have."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from bowerbird.gallery import Gallery, Space
from bowerbird.registry import get_registry
from bowerbird.retrieval.index import unit_rows
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision
from bowerbird.upgrade import ItemEncoder, begin
from bowerbird.upgrade.backfill import backfill_plan
from bowerbird.upgrade.estimate import average_precision_of_sample
from bowerbird.upgrade.forecast import Forecaster, PairedVectors
from bowerbird.upgrade.plan import plan
from bowerbird.upgrade.run import run
from bowerbird.upgrade.sample import draw
from bowerbird.upgrade.serve import serve

TOLERANCE = 0.03
MERGERS = ["core:distance", "core:zscore", "core:proportional"]


class OldQueries:
    """Rank merge, as the strategies package has it: core's tests have core only."""

    needs_old_encoder = True
    merger = "core:distance"

    def check(self, gallery, old, new):
        return None

    def old_part_queries(self, queries, old, new):
        return queries[old.fingerprint]


class LeastSquares:
    """The smallest strategy that fits a map: new queries into the old space, by least squares."""

    needs_old_encoder = False
    merger = "core:distance"
    transform_direction = "query"

    def check(self, gallery, old, new):
        return None

    def fit(self, pairs, *, seed=0):
        from bowerbird.gallery.transform import VectorTransform

        weight = np.linalg.lstsq(pairs.new, pairs.old, rcond=None)[0].T
        return VectorTransform.linear(pairs.new_space.fingerprint, pairs.old_space.fingerprint, weight, method="ls")

    def old_part_queries(self, queries, old, new, transform):
        return transform(queries[new.fingerprint])


@pytest.fixture(autouse=True)
def strategies():
    from types import ModuleType

    from bowerbird.hookspecs import hookimpl
    from bowerbird.records import RetrieverRecord

    module = ModuleType("forecast_plugin")
    module.BOWERBIRD_API = "1.0"

    @hookimpl
    def bowerbird_retrievers():
        for name, target in (("merge", "OldQueries"), ("fitted", "LeastSquares")):
            yield RetrieverRecord(
                name=f"forecast:{name}", role="upgrade", target=f"test_upgrade_forecast:{target}", summary="For tests."
            )

    module.bowerbird_retrievers = bowerbird_retrievers
    get_registry().register_module("forecast", module)
    yield
    get_registry().unregister("forecast")


def linear_encoder(pixels: np.ndarray, dim: int):
    """Principal components of some pictures."""
    mean = pixels.mean(axis=0)
    directions = np.linalg.svd(pixels - mean, full_matrices=False)[2][:dim]
    return lambda x: unit_rows(((x - mean) @ directions.T).astype(np.float32))


def trained_encoder(pixels: np.ndarray, labels: np.ndarray):
    """Ridge regression to the classes."""
    mean, classes = pixels.mean(axis=0), np.eye(labels.max() + 1)[labels]
    x = pixels - mean
    weight = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ (classes - classes.mean(axis=0)))
    return lambda z: unit_rows(((z - mean) @ weight).astype(np.float32))


def scenario(name: str):
    """``(pictures, labels, positions of: training, gallery, held-out queries)``."""
    if name == "core:digits":
        pytest.importorskip("sklearn")
        from sklearn.datasets import load_digits

        loaded = load_digits()
        pictures, labels, sizes = loaded.data / 16, loaded.target, (300, 1000, 497)
    else:
        from bowerbird.data.fashion_mnist import FashionMnist
        from bowerbird.errors import DataError

        try:
            dataset = FashionMnist.build(None, "test")
        except DataError as exc:
            pytest.skip(f"no Fashion-MNIST here: {exc}")
        pictures, labels = dataset.images.reshape(-1, 28 * 28)[:5000] / 255, np.asarray(dataset.labels())[:5000]
        sizes = (800, 3000, 500)
    shuffled = np.random.default_rng(0).permutation(len(pictures))
    return pictures, labels, np.split(shuffled[: sum(sizes)], np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("name", ["core:digits", "core:fashion-mnist"])
def test_the_forecast_area_is_within_003_of_what_held_out_queries_measure_on_the_whole_gallery(name):
    pictures, labels, (training, items, asked) = scenario(name)
    encode = {
        "old": linear_encoder(pictures[training[:100]], 5),
        "new": trained_encoder(pictures[training], labels[training]),
    }
    vectors = {version: function(pictures) for version, function in encode.items()}
    old, new = (Space(letter * 64, letter, vectors[v].shape[1]) for letter, v in (("a", "old"), ("b", "new")))
    encoder = ItemEncoder(lambda batch: vectors["new"][[int(item.id) for item in batch]], space=new)
    with tempfile.TemporaryDirectory() as folder, Gallery.create(Path(folder) / "g", old) as gallery:
        gallery.add([str(i) for i in items], vectors["old"][items], metadata=[{"label": int(labels[i])} for i in items])
        made = plan(
            gallery, encoder, label_key="label", sample=1000, strategies=["forecast:merge", "forecast:fitted"], seed=3
        )
        moved = np.empty(len(items))
        moved[backfill_plan(gallery, "core:random", seed=3)] = (np.arange(len(items)) + 1) / len(items)
    whole = Forecaster(
        PairedVectors(
            vectors["old"][items], vectors["new"][items], vectors["old"][asked], vectors["new"][asked],
            labels[items], labels[asked],
        )
    )  # fmt: skip
    registry = get_registry()
    errors = {}
    for curve in made.curves:
        if curve.name.startswith("forecast:"):
            assert not curve.unavailable
            queries = whole.paired.query_old
            if curve.name == "forecast:fitted":
                queries = made.transforms[curve.name](whole.paired.query_new)
            merger = registry.load(registry.get("retriever", curve.merger, role="merger"))
            true = whole.curve(curve.name, queries, moved, (0, 0.2, 0.4, 0.6, 0.8, 1), merger=merger)
            errors[curve.name, curve.merger] = round(curve.area - true.area, 4)
    assert {merger for _, merger in errors} == set(MERGERS) and len(errors) == 6
    assert max(abs(error) for error in errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("merger", MERGERS)
def test_on_every_item_the_forecast_is_what_the_gallery_serves_at_every_share(tmp_path, merger):
    rng = np.random.default_rng(1)
    labels, asked_labels = rng.integers(0, 8, 200), rng.integers(0, 8, 25)
    centres = rng.normal(size=(8, 12))
    items, asked = centres[labels] + rng.normal(size=(200, 12)), centres[asked_labels] + rng.normal(size=(25, 12))
    project = {"old": rng.normal(size=(12, 6)), "new": rng.normal(size=(12, 9))}
    g, q = ({v: unit_rows((x @ p).astype(np.float32)) for v, p in project.items()} for x in (items, asked))
    old, new = Space("a" * 64, "a", 6), Space("b" * 64, "b", 9)
    encoder = ItemEncoder(lambda batch: g["new"][[int(item.id) for item in batch]], space=new)
    relevance = Relevance.from_labels(asked_labels, labels)
    with Gallery.create(tmp_path / "g", old) as gallery:
        gallery.add([str(i) for i in range(200)], g["old"])
        order = backfill_plan(gallery, "core:random", seed=4)
        begin(gallery, new, strategy="forecast:merge", merger=merger, task_items=50, seed=4)
        service, served = serve(gallery), []

        def measure(count=0, now=None):
            if count == 0:
                found = service.search(vectors={old.fingerprint: q["old"], new.fingerprint: q["new"]}, k=200)
                served.append(average_precision(RankedList(found.nums), relevance).mean())

        measure()
        run(gallery, encoder, progress=measure)
    paired = PairedVectors(g["old"], g["new"], q["old"], q["new"], labels, asked_labels)
    registry = get_registry()
    target = registry.load(registry.get("retriever", merger, role="merger"))
    made = Forecaster(paired).curve("x", paired.query_old, order, (0, 0.25, 0.5, 0.75, 1), merger=target)
    np.testing.assert_allclose(made.quality, served, atol=2e-3)


def test_a_sample_of_a_gallery_of_many_small_classes_gives_the_level_of_the_gallery():
    rng = np.random.default_rng(0)
    classes, members = 1500, 6
    labels = np.repeat(np.arange(classes), members)
    items = rng.normal(size=(classes, 24))[labels] + 0.8 * rng.normal(size=(len(labels), 24))
    drawn = draw({num: str(label) for num, label in enumerate(labels)}, 900, seed=2)
    assert len(drawn.gallery) <= 900 and drawn.weights.min() >= 1
    assert drawn.weights.sum() == pytest.approx(len(labels), rel=0.02)

    def level(gallery, weights=None):
        ids = [str(i) for i in gallery]
        asked = drawn.queries
        paired = PairedVectors(
            items[gallery], items[gallery], items[asked], items[asked], labels[gallery], labels[asked], ids,
            [str(i) for i in asked], weights,
        )  # fmt: skip
        return Forecaster(paired).old_old.mean()

    true = level(np.arange(len(labels)))
    assert level(drawn.gallery) > true + 0.1, "a smaller gallery is an easier one"
    assert abs(level(drawn.gallery, drawn.weights) - true) < 0.06


def test_distances_that_differ_by_rounding_alone_are_equal_to_the_estimate():
    """Divided by that rounding they would look like the widest of all, and stand for those of other queries."""
    rng = np.random.default_rng(5)
    right = np.zeros((6, 200), bool)
    right[:, 100:102] = True  # far fewer than wrong ones: what is pooled over the queries counts
    keys = rng.normal(1.0, 0.1, (6, 200))
    keys[:3] = 0.5
    keys[right] = 0.3  # before all others of its query
    order = np.argsort(keys, axis=1, kind="stable")
    weights = np.where(right[0], 1.0, 40.0)

    def estimate(rounding):
        return average_precision_of_sample(keys + rounding, order, right, np.zeros_like(right), weights)

    noise = np.where(right, 0, 3e-8 * rng.integers(0, 2, keys.shape))
    np.testing.assert_allclose(estimate(noise), estimate(0.0), rtol=1e-3)


def test_with_all_weights_one_the_estimate_is_average_precision():
    rng = np.random.default_rng(5)
    keys, right = rng.random((7, 30)), rng.random((7, 30)) < 0.3
    right[:, 0] = True
    order = np.argsort(keys, axis=1)
    found = average_precision_of_sample(keys, order, right, np.zeros_like(right), np.ones(30))
    relevance = Relevance([np.flatnonzero(row) for row in right])
    np.testing.assert_allclose(found, average_precision(RankedList(order), relevance).values)
    at_ten = average_precision_of_sample(keys, order, right, np.zeros_like(right), np.ones(30), depth=10)
    np.testing.assert_allclose(at_ten, average_precision(RankedList(order), relevance, "at_k", 10).values)
