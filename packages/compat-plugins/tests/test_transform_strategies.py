"""``compat:adapter``, ``compat:reverse-transform`` and ``compat:lift`` as strategies of an upgrade."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bowerbird.errors import InputError, SpaceError, UpgradeError
from bowerbird.gallery.merge import merge_by_distance
from bowerbird.gallery.space import Space
from bowerbird.gallery.transform import VectorTransform
from bowerbird.retrieval.index import ExactIndex
from bowerbird.testing import UpgradeContract
from bowerbird.upgrade.strategies import TrainingPairs, load_strategy
from bowerbird_compat.adapter_maps import unit

OLD = Space(fingerprint="a" * 64, encoder="old", dim=12)
NEW = Space(fingerprint="b" * 64, encoder="new", dim=16)


class TestAdapterContract(UpgradeContract):
    name = "compat:adapter"


class TestReverseTransformContract(UpgradeContract):
    name = "compat:reverse-transform"


class TestLiftContract(UpgradeContract):
    name = "compat:lift"


def related(count: int, *, seed: int = 0, labels: bool = True) -> TrainingPairs:
    """Pairs of two encoders that see one content of eight classes; the old one sees it with more noise."""
    world = np.random.default_rng(9)
    centres, to_old, to_new = world.normal(size=(8, 10)), world.normal(size=(10, 12)), world.normal(size=(10, 16))
    rng = np.random.default_rng(seed)
    classes = rng.integers(8, size=count)
    content = centres[classes] + 0.7 * rng.normal(size=(count, 10))
    old = content @ to_old + 1.5 * rng.normal(size=(count, 12))
    new = content @ to_new + 0.5 * rng.normal(size=(count, 16))
    return TrainingPairs(old, new, classes.tolist() if labels else None, OLD, NEW)


@pytest.mark.parametrize("name", ["compat:adapter", "compat:reverse-transform"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_query_strategy_fits_from_new_to_old_and_reports_what_it_is_worth(name, labels):
    _, strategy = load_strategy(name)
    made = strategy.fit(related(400, labels=labels), seed=3)
    assert (made.source, made.target, made.method) == (NEW.fingerprint, OLD.fingerprint, name)
    assert made.evidence["direction"] == "query"
    assert made.evidence["pairs"] == 100
    assert made.evidence["usable"], made.evidence["sentence"]
    assert (made.evidence["quality"] is not None) == labels
    assert strategy.fit(related(400, labels=labels), seed=3).fingerprint == made.fingerprint


@pytest.mark.parametrize("labels", [True, False])
def test_lift_fits_from_old_to_new_and_reports_what_it_is_worth(labels):
    _, strategy = load_strategy("compat:lift")
    made = strategy.fit(related(400, labels=labels), seed=3, steps=150)
    assert (made.source, made.target, made.method) == (OLD.fingerprint, NEW.fingerprint, "compat:lift")
    assert made.evidence["direction"] == "gallery"
    assert made.evidence["usable"], made.evidence["sentence"]
    linear = strategy.fit(related(400, labels=labels), kind="ridge")
    assert linear.method == "compat:lift"
    assert linear.evidence["kind"] == "ridge"


def test_labels_make_the_reverse_transform_find_more_than_regression():
    _, strategy = load_strategy("compat:reverse-transform")
    with_labels, without = (strategy.fit(related(600, labels=labels), steps=300) for labels in (True, False))
    held_out = related(300, seed=5)

    def right(transform: VectorTransform) -> float:
        scores = transform(held_out.new) @ held_out.old.T
        np.fill_diagonal(scores, -2)
        labels = np.array(held_out.labels)
        return float((labels[np.argsort(-scores, axis=1)[:, :10]] == labels[:, None]).mean())

    assert right(with_labels) > right(without)


def test_half_way_one_encoder_pass_serves_both_parts():
    """Items 0..149 are new, the others old; new queries reach both, nearly as well as two encoders would."""
    _, strategy = load_strategy("compat:adapter")
    transform = strategy.fit(related(600))
    items, queries = related(300, seed=1), related(100, seed=2)
    old_index, new_index = ExactIndex(), ExactIndex()
    old_index.add(np.arange(150, 300), items.old[150:])
    new_index.add(np.arange(150), items.new[:150])
    labels = np.array(items.labels)

    def right(old_queries: np.ndarray) -> float:
        hits = merge_by_distance(old_index.search(old_queries, 10), new_index.search(queries.new, 10), 10)
        return float((labels[hits.ids] == np.array(queries.labels)[:, None]).mean())

    one_pass = strategy.old_part_queries({NEW.fingerprint: queries.new}, OLD, NEW, transform)
    assert one_pass.shape == (100, OLD.dim)
    assert right(one_pass) > right(queries.old) - 0.05
    assert right(one_pass) > right(unit(np.random.default_rng(0).normal(size=(100, 12)))) + 0.03


def test_a_transform_of_another_direction_and_a_missing_one_are_refused():
    _, strategy = load_strategy("compat:adapter")
    strategy.check(None, OLD, NEW)
    queries = {NEW.fingerprint: np.eye(16, dtype=np.float32)}
    back = VectorTransform.linear(OLD.fingerprint, NEW.fingerprint, np.eye(16, 12))
    with pytest.raises(SpaceError, match=r"needs a transform b{12} -> a{12} \(new to old\); transform aaa"):
        strategy.old_part_queries(queries, OLD, NEW, back)
    with pytest.raises(UpgradeError, match="needs its transform from bbbbbbbbbbbb"):
        strategy.old_part_queries(queries, OLD, NEW)
    with pytest.raises(SpaceError, match="got spaces aaaaaaaaaaaa"):
        strategy.old_part_queries({OLD.fingerprint: np.eye(12)}, OLD, NEW, replace_ends(back))


def replace_ends(transform: VectorTransform) -> VectorTransform:
    return VectorTransform.linear(transform.target, transform.source, np.eye(12, 16))


@pytest.mark.parametrize("name", ["compat:adapter", "compat:reverse-transform", "compat:lift"])
def test_what_cannot_be_bridged_is_refused(name):
    _, strategy = load_strategy(name)
    with pytest.raises(UpgradeError, match="maps between two spaces; old and new are both"):
        strategy.check(None, OLD, OLD)
    other = replace(NEW)
    object.__setattr__(other, "metric", "l2")
    with pytest.raises(UpgradeError, match="old uses cosine and new uses l2"):
        strategy.check(None, OLD, other)
    with pytest.raises(InputError, match=r"49 pairs are too few.*50"):
        strategy.fit(related(49))


def test_unlabelled_items_are_left_out_where_most_have_labels():
    _, strategy = load_strategy("compat:reverse-transform")
    pairs = related(200)
    some = replace(pairs, labels=[None if i % 5 == 0 else label for i, label in enumerate(pairs.labels)])
    few = replace(pairs, labels=[label if i % 5 == 0 else None for i, label in enumerate(pairs.labels)])
    assert strategy.fit(some, steps=20).evidence["labels"] is True
    assert strategy.fit(few, steps=20).evidence["labels"] is False


def test_a_process_that_serves_needs_no_torch():
    code = (
        "import sys, bowerbird_compat.transform_strategies, bowerbird_compat.adapters\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
