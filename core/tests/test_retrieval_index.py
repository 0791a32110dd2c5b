"""Indexes: what they find, how they are kept on disk, what they refuse."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bowerbird.errors import CorruptionError, InputError, PluginError
from bowerbird.retrieval import faiss_index
from bowerbird.retrieval.faiss_index import FaissIndex, load_faiss
from bowerbird.retrieval.index import ExactIndex, Hits, exact_search
from bowerbird.testing import IndexContract

faiss_missing = importlib.util.find_spec("faiss") is None
needs_faiss = pytest.mark.skipif(faiss_missing, reason="faiss is not installed")


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def by_loops(vectors: np.ndarray, ids: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    """The definition: sort all (distance, id) pairs. Scores are small integers here, so that they are exact."""
    pairs = sorted((1 - float(np.dot(v, query)), int(i)) for v, i in zip(vectors, ids, strict=True))
    return [i for _, i in pairs[:k]] + [-1] * (k - len(pairs))


class TestExactIndexContract(IndexContract):
    name = "core:exact"


if not faiss_missing:

    class TestFaissFlatContract(IndexContract):
        name = "core:faiss"
        config = {"kind": "flat"}

    class TestFaissIvfContract(IndexContract):
        name = "core:faiss"
        config = {"kind": "ivf"}
        recall = 0.8

    class TestFaissHnswContract(IndexContract):
        name = "core:faiss"
        config = {"kind": "hnsw"}
        recall = 0.8


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 3000),
    q=st.integers(1, 40),
    k=st.integers(1, 60),
    masked=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_exact_search_is_a_sort_by_distance_and_id_whatever_the_shape(n, q, k, masked, seed):
    # Axis-parallel vectors: all scores are -1, 0 or 1, so that nearly everything is tied, also across the cut after k.
    rng = np.random.default_rng(seed)
    axes = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    vectors, queries = axes[rng.integers(8, size=n)], axes[rng.integers(8, size=q)]
    ids = rng.permutation(10 * n)[:n].astype(np.int64)
    valid = rng.random(n) < 0.6 if masked else None
    hits = exact_search(vectors, queries, k, ids=ids, valid=valid)
    kept = np.ones(n, bool) if valid is None else valid
    for row in range(0, q, 7):
        assert hits.ids[row].tolist() == by_loops(vectors[kept], ids[kept], queries[row], k)
    assert (np.diff(np.where(np.isinf(hits.distances), 9, hits.distances), axis=1) >= 0).all()


def test_exact_search_finds_the_true_neighbours_over_many_blocks_and_queries():
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 40_000, 8), unit(rng, 70, 8)
    hits = exact_search(vectors, queries, 15)
    distances = 1 - queries.astype(np.float64) @ vectors.astype(np.float64).T
    truth = np.sort(distances, axis=1)[:, :15]
    assert np.allclose(hits.distances, truth, atol=1e-6)
    assert np.allclose(np.take_along_axis(distances, hits.ids, axis=1), hits.distances, atol=1e-6)


def test_exact_search_reads_half_precision_and_memory_mapped_files_where_they_lie(tmp_path):
    rng = np.random.default_rng(0)
    vectors = unit(rng, 500, 8).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    queries = unit(rng, 3, 8)
    assert np.array_equal(
        exact_search(mapped, queries, 5).ids, exact_search(vectors.astype(np.float32), queries, 5).ids
    )


def test_one_query_gives_one_row_and_vectors_of_any_length_mean_their_direction():
    rng = np.random.default_rng(0)
    vectors = unit(rng, 50, 8)
    one = exact_search(vectors, 3.5 * vectors[7], 3)
    assert one.ids.shape == (3,)
    assert one.ids[0] == 7
    index = ExactIndex()
    index.add(np.arange(50), 2 * vectors)
    assert index.search(vectors[7], 1).distances[0] == pytest.approx(0, abs=1e-6)


def test_masked_items_never_come_back_even_if_nothing_is_left():
    vectors = unit(np.random.default_rng(0), 20, 4)
    hits = exact_search(vectors, vectors[:2], 3, valid=np.zeros(20, bool))
    assert (hits.ids == -1).all()
    assert np.isinf(hits.distances).all()


@needs_faiss
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 300), q=st.integers(1, 12), k=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_flat_faiss_breaks_ties_by_lower_id_like_the_exact_index(n, q, k, seed):
    rng = np.random.default_rng(seed)
    axes = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    vectors, queries = axes[rng.integers(8, size=n)], axes[rng.integers(8, size=q)]
    ids = rng.permutation(10 * n)[:n]
    flat, exact = FaissIndex("flat"), ExactIndex()
    flat.add(ids, vectors)
    exact.add(ids, vectors)
    assert np.array_equal(flat.search(queries, k).ids, exact.search(queries, k).ids)


def every_index() -> list:
    kinds = (
        [ExactIndex] if faiss_missing else [ExactIndex, *(lambda k=k: FaissIndex(k) for k in ("flat", "ivf", "hnsw"))]
    )
    return [pytest.param(make, id=name) for make, name in zip(kinds, ("exact", "flat", "ivf", "hnsw"), strict=False)]


@pytest.mark.parametrize("make", every_index())
def test_an_empty_index_answers_with_padding_and_can_be_saved(make, tmp_path):
    index = make()
    assert index.search(np.ones((2, 3)), 4).ids.tolist() == [[-1] * 4] * 2
    index.save(tmp_path / "i")
    assert len(type(index).load(tmp_path / "i")) == 0
    index.add(np.array([5]), np.ones((1, 3)))
    assert index.remove([5, 6]) == 1
    assert index.search(np.ones(3), 2).ids.tolist() == [-1, -1]


@pytest.mark.parametrize("make", every_index())
def test_a_loaded_index_can_grow_and_shrink(make, tmp_path):
    rng = np.random.default_rng(0)
    vectors = unit(rng, 200, 8)
    index = make()
    index.add(np.arange(100), vectors[:100])
    index.save(tmp_path / "i")
    loaded = type(index).load(tmp_path / "i")
    loaded.add(np.arange(100, 200), vectors[100:])
    assert loaded.remove(np.arange(50)) == 50
    assert len(loaded) == 150
    found = loaded.search(vectors, 1).ids[:, 0]
    assert (found[50:] == np.arange(50, 200)).mean() > 0.9
    assert not np.isin(found, np.arange(50)).any()


@pytest.mark.parametrize("make", every_index())
@pytest.mark.parametrize("damage", ["flip", "cut", "header"])
def test_a_damaged_file_is_named_and_not_read(make, damage, tmp_path):
    index, path = make(), tmp_path / "gallery.index"
    index.add(np.arange(40), unit(np.random.default_rng(0), 40, 8))
    index.save(path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-20] ^= 4
    elif damage == "cut":
        del data[-20:]
    else:
        data[30] ^= 255
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"gallery\.index"):
        type(index).load(path)


def test_a_file_of_another_kind_or_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="no index file"):
        ExactIndex.load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CorruptionError, match="not an index file"):
        ExactIndex.load(tmp_path / "text")
    ExactIndex().save(tmp_path / "exact")
    with pytest.raises(InputError, match="kind 'exact'"):
        FaissIndex.load(tmp_path / "exact")


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "i"
    program = (
        "import sys, numpy as np; from bowerbird.retrieval.index import ExactIndex\n"
        "x = np.random.default_rng(0).standard_normal((20000, 64)).astype(np.float32)\n"
        "a, b = ExactIndex(), ExactIndex(); a.add(np.arange(10000), x[:10000]); b.add(np.arange(20000), x)\n"
        "a.save(sys.argv[1]); print('ready', flush=True)\n"
        "while True: b.save(sys.argv[1]); a.save(sys.argv[1])"
    )
    for delay in (0.0, 0.013, 0.05):
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            process.kill()
        assert len(ExactIndex.load(path)) in (10_000, 20_000)


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "i"
    index = ExactIndex()
    index.add(np.arange(3), np.eye(3))
    index.save(path)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    index.add(np.array([9]), np.ones((1, 3)))
    with pytest.raises(OSError, match="No space"):
        index.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["i"]
    assert len(ExactIndex.load(path)) == 3


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([0], [[np.nan, 1.0]], "row 0 holds NaN"),
        ([0, 1], [[1.0, 0.0], [0.0, 0.0]], "row 1 has norm 0"),
        ([0], [1.0, 0.0], "shape"),
        ([0, 0], np.eye(2), "unique"),
        ([7], [[1.0, 0.0]], "unique"),
        ([0], [[1.0, 0.0, 0.0]], "3 dimensions"),
        ([0, 1], [[1.0, 0.0]], "one per vector"),
        ([-1], [[1.0, 0.0]], "0 or more"),
        ([0.5], [[1.0, 0.0]], "integers"),
    ],
)
@pytest.mark.parametrize("make", every_index()[:2])
def test_bad_vectors_and_ids_are_refused_with_the_reason(make, ids, vectors, message):
    index = make()
    index.add(np.array([7]), np.array([[0.6, 0.8]]))
    with pytest.raises(InputError, match=message):
        index.add(np.array(ids), np.array(vectors))
    assert len(index) == 1


def test_bad_searches_are_refused_with_the_reason():
    vectors = np.eye(3, dtype=np.float32)
    with pytest.raises(InputError, match="at least 1"):
        exact_search(vectors, vectors, 0)
    with pytest.raises(InputError, match="4 dimensions"):
        exact_search(vectors, np.ones((1, 4)), 1)
    with pytest.raises(InputError, match="queries: row 0 has norm 0"):
        exact_search(vectors, np.zeros((1, 3)), 1)
    with pytest.raises(InputError, match="valid must have shape"):
        exact_search(vectors, vectors, 1, valid=np.ones(2, bool))
    with pytest.raises(InputError, match="two arrays"):
        Hits(np.zeros((2, 3), np.int64), np.zeros((2, 2)))


@needs_faiss
def test_faiss_settings_are_checked():
    with pytest.raises(InputError, match="Did you mean 'hnsw'"):
        FaissIndex("hsnw")
    with pytest.raises(InputError, match="target_recall"):
        FaissIndex("ivf", target_recall=1.5)
    with pytest.raises(InputError, match="nlist 64 needs"):
        FaissIndex("ivf", nlist=64).add(np.arange(10), unit(np.random.default_rng(0), 10, 4))


@needs_faiss
def test_the_effort_of_a_graph_is_bounded_where_nothing_leads_to_some_items() -> None:
    centres = np.random.default_rng(0).standard_normal((60, 16))
    items = np.repeat(centres, 50, axis=0) + 1e-3 * np.random.default_rng(1).standard_normal((3000, 16))
    index = FaissIndex("hnsw", m=2, ef_construction=2, target_recall=1.0)
    index.add(np.arange(3000), items)
    index.measure()
    assert index.measured_recall is not None and index.measured_recall < 1
    effort = index._index.hnsw.efSearch
    index._set_effort(2048)
    best = [set(row) for row in index.search(items[:200], 10).ids]
    index._set_effort(effort)
    assert effort < 2048
    assert np.mean([len(a & set(b)) for a, b in zip(best, index.search(items[:200], 10).ids, strict=True)]) > 9


@needs_faiss
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_effort_of_an_approximate_index_follows_the_recall_that_is_asked_for(kind):
    rng = np.random.default_rng(0)
    vectors, queries = unit(rng, 4000, 16), unit(rng, 100, 16)
    truth = exact_search(vectors, queries, 10).ids
    recall, effort = [], []
    for target in (0.5, 0.95):
        index = FaissIndex(kind, target_recall=target)
        index.add(np.arange(4000), vectors)
        found = index.search(queries, 10).ids
        recall.append(np.mean([len(set(f) & set(t)) / 10 for f, t in zip(found, truth, strict=True)]))
        effort.append(index._index.nprobe if kind == "ivf" else index._index.hnsw.efSearch)
        assert index.measured_recall >= target
    assert effort[1] > effort[0] or kind == "hnsw"  # the least effort of a small graph may reach both
    assert recall[1] >= recall[0]
    assert recall[1] > 0.85


@needs_faiss
def test_the_effort_is_measured_with_items_of_all_that_was_added_not_with_the_first_ones():
    rng = np.random.default_rng(0)
    near = np.eye(32)[rng.integers(8, size=2000)] + 0.01 * rng.standard_normal((2000, 32))  # easy to find
    blocks = [*np.split(near, 2), *unit(rng, 8000, 32).reshape(8, 1000, 32)]
    vectors, queries = np.concatenate(blocks), unit(rng, 200, 32)
    index = FaissIndex("ivf", nlist=32)
    index.train(vectors, 10_000)
    for number, block in enumerate(blocks):
        index.add(np.arange(1000) + 1000 * number, block)
    truth, found = exact_search(vectors, queries, 10).ids, index.search(queries, 10).ids
    assert (found[:, :, None] == truth[:, None, :]).any(axis=1).mean() > 0.92  # 0.88 if the first blocks count double


@needs_faiss
def test_a_search_leaves_the_thread_count_of_faiss_as_it_was():
    faiss = load_faiss()
    before = faiss.omp_get_max_threads()
    index = FaissIndex("flat", threads=1)
    index.add(np.arange(3), np.eye(3))
    index.search(np.eye(3), 1)
    assert faiss.omp_get_max_threads() == before


def test_two_faiss_wheels_are_refused_with_the_command_that_repairs_it(monkeypatch):
    load_faiss.cache_clear()
    monkeypatch.setattr(faiss_index, "_installed", lambda distribution: True)
    try:
        with pytest.raises(PluginError, match="pip uninstall -y faiss-cpu faiss-gpu"):
            load_faiss()
    finally:
        load_faiss.cache_clear()


def test_exact_search_imports_neither_faiss_nor_torch():
    program = (
        "import sys, numpy as np; from bowerbird import retrieval as R\n"
        "R.exact_search(np.eye(3, dtype=np.float32), np.eye(3), 2)\n"
        "print([m for m in ('faiss', 'torch', 'pydantic', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "[]"


@needs_faiss
def test_inverted_lists_take_new_items_after_removals_under_any_id(tmp_path):
    rng = np.random.default_rng(0)
    vectors = unit(rng, 300, 8)
    index = FaissIndex("ivf", nprobe=1000)  # all lists: exact
    index.add(np.arange(200), vectors[:200])
    index.remove(np.arange(0, 200, 3))
    index.add(np.arange(0, 30, 3), vectors[290:])  # ids that were removed are free again
    index.add(np.arange(1000, 1090), vectors[200:290])
    index.save(tmp_path / "i")
    for each in (index, FaissIndex.load(tmp_path / "i")):
        exact = ExactIndex()
        kept = np.arange(200)[np.arange(200) % 3 > 0]
        exact.add(kept, vectors[kept])
        exact.add(np.arange(0, 30, 3), vectors[290:])
        exact.add(np.arange(1000, 1090), vectors[200:290])
        assert len(each) == len(exact) == len(each.ids)
        assert sorted(each.ids) == sorted(exact.ids)
        assert np.array_equal(each.search(vectors, 5).ids, exact.search(vectors, 5).ids)
