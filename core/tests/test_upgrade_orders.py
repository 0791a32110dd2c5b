"""Orders by class distance and by traffic, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upgrade_world import by_item, item_id, make_gallery, new_encoder

from bowerbird.errors import DataError, InputError
from bowerbird.upgrade import begin
from bowerbird.upgrade.backfill import backfill_plan
from bowerbird.upgrade.orders import class_distance_order, class_means, read_traffic, traffic_order
from bowerbird.upgrade.plan import plan


@given(n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_class_distance_sorts_by_the_distance_to_the_own_class_mean_from_either_end(n, seed):
    rng = np.random.default_rng(seed)
    old, labels = rng.normal(size=(n, 5)), [f"c{i}" for i in rng.integers(0, 3, n)]
    unit = old / np.linalg.norm(old, axis=1, keepdims=True)
    means = class_means(old, labels)
    names = sorted(set(labels))
    distance = np.array(
        [
            1 - u @ means[names.index(c)] / np.linalg.norm(means[names.index(c)])
            for u, c in zip(unit, labels, strict=True)
        ]
    )
    far = class_distance_order(range(n), old, labels=labels)
    assert sorted(far.tolist()) == list(range(n))
    assert (np.diff(distance[far]) <= 1e-9).all()
    near = class_distance_order(range(n), old, labels=labels, first="near")
    assert (np.diff(distance[near]) >= -1e-9).all()


def test_class_distance_without_labels_uses_centres_or_clusters():
    centers = np.eye(2)
    old = np.array([[1.0, 0.0], [1.0, 0.9], [0.0, 1.0], [0.3, 1.0]])
    assert class_distance_order(range(4), old, centers=centers).tolist()[:2] == [1, 3]
    assert sorted(class_distance_order(range(4), old).tolist()) == [0, 1, 2, 3]
    with pytest.raises(InputError, match="far"):
        class_distance_order(range(4), old, first="middle")


def test_class_distance_of_a_gallery_reads_the_labels(tmp_path):
    with make_gallery(tmp_path / "g", 60) as gallery:
        vectors = gallery.vectors_of([item_id(n) for n in range(60)])
        labels = [gallery.get(item_id(n)).metadata["label"] for n in range(60)]
        expected = class_distance_order(range(60), vectors, labels=labels, first="near")
        found = backfill_plan(gallery, "class-distance", label_key="label", settings={"first": "near"})
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "rows.csv", "parquet"])
def test_traffic_moves_what_is_requested_most_first_whatever_the_log_looks_like(tmp_path, kind):
    counts = {item_id(3): 5, item_id(1): 2, item_id(7): 9, "deleted": 4}
    log = tmp_path / f"log.{kind}"
    if kind == "csv":
        log.write_text("id,count\n" + "".join(f"{name},{count}\n" for name, count in counts.items()))
    elif kind == "rows.csv":
        log.write_text("when,item_id\n" + "".join(f"1,{name}\n" * count for name, count in counts.items()))
    elif kind == "jsonl":
        log.write_text("".join(json.dumps({"item": n, "hits": c}) + "\n" for n, c in counts.items()))
    elif kind == "json":
        log.write_text(json.dumps(counts))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"id": list(counts), "count": list(counts.values())}), log)
    assert read_traffic(str(log)) == counts
    names = [item_id(n) for n in range(10)]
    order = traffic_order(range(10), names=names, log=str(log))
    assert order.tolist()[:3] == [7, 3, 1] and sorted(order.tolist()) == list(range(10))
    assert traffic_order(range(10), names=names, log=str(log), first="least").tolist()[-3:] == [1, 3, 7]


def test_traffic_without_a_log_is_refused_at_plan_and_begin_with_what_to_give(tmp_path):
    with make_gallery(tmp_path / "g", 40) as gallery:
        encoder = by_item(new_encoder())
        for refused in (
            lambda: plan(gallery, encoder, label_key="label", order="traffic"),
            lambda: begin(gallery, encoder.space, strategy="core:full", order="traffic"),
        ):
            with pytest.raises(InputError, match="--set log=FILE"):
                refused()
        assert gallery.store.upgrade_state() is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,count\nx,1\n", "row 1: no column id"),
        ("a.csv", "id,count\nx,many\n", "row 1: count is 'many'"),
        ("a.json", "{", "cannot be read"),
        ("a.csv", "id,count\nother,3\n", "names none of the 3 items"),
        ("a.txt", "", "accepted: .csv"),
    ],
)
def test_a_log_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises((DataError, InputError), match=message):
        traffic_order(range(3), names=["a", "b", "c"], log=str(tmp_path / name))
