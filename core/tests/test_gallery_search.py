"""Create, add, delete, search, filter: what a gallery returns is what a loop over all vectors returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gallery_world import NEW, OLD, encode, queries, vector, vectors

from bowerbird.errors import DataError, GalleryError, InputError, SpaceError, UnknownNameError
from bowerbird.gallery import Gallery, Space

NAMES = [f"item-{i:04d}" for i in range(300)]
QUERIES = queries()[OLD.fingerprint]


def expected(names: list[str], query: np.ndarray, k: int, space: Space = OLD) -> list[str]:
    unit = query.astype(np.float64) / np.linalg.norm(query)
    distance = [np.float32(1 - vector(name, space).astype(np.float64) @ unit) for name in names]
    return [names[i] for i in np.lexsort((np.arange(len(names)), distance))[:k]]


@pytest.fixture
def gallery(tmp_path: Path):
    with Gallery.create(tmp_path / "gallery", OLD) as made:
        made.add(
            NAMES,
            vectors(NAMES, OLD),
            uris=[f"/photos/{name}.jpg" for name in NAMES],
            metadata=[{"year": 2000 + i % 5, "tag": f"t{i % 3}", "good": i % 2 == 0} for i in range(len(NAMES))],
        )
        yield made


@pytest.mark.parametrize("k", [1, 7, 300, 1000])
def test_search_is_the_exact_nearest_neighbours_in_order(gallery: Gallery, k: int) -> None:
    result = gallery.search(QUERIES, k)
    for found, query in zip(result.ids, QUERIES, strict=True):
        assert found == expected(NAMES, query, k)
    assert result.distances.shape == (len(QUERIES), k) and (np.diff(result.distances[:, :300]) >= 0).all()
    if k > 300:
        assert np.isinf(result.distances[:, 300:]).all() and (result.sides[:, 300:] == -1).all()


def test_one_vector_is_a_batch_of_one(gallery: Gallery) -> None:
    assert gallery.search(QUERIES[0], 3).ids == gallery.search(QUERIES, 3).ids[:1]


def test_a_stored_vector_finds_itself_at_distance_zero(gallery: Gallery) -> None:
    result = gallery.search(gallery.vectors_of(["item-0042"]), 1)
    assert result.ids == [["item-0042"]] and result.distances[0, 0] == pytest.approx(0, abs=1e-6)


def test_equal_distances_come_in_the_order_of_adding_also_beyond_k(tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        copies = [f"copy-{i:03d}" for i in range(100)]
        gallery.add(copies, np.tile(vector("x", OLD), (100, 1)))
        gallery.add(["other"], vectors(["other"], OLD))
        assert gallery.search(vector("x", OLD), 5).ids == [copies[:5]]


def test_deleted_items_are_never_found_even_when_they_were_the_nearest_hundred(tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        near = [f"near-{i}" for i in range(100)]
        gallery.add(near + NAMES, np.concatenate([np.tile(vector("x", OLD), (100, 1)), vectors(NAMES, OLD)]))
        assert gallery.delete(near) == 100
        assert gallery.search(vector("x", OLD), 5).ids == [expected(NAMES, vector("x", OLD), 5)]
        assert len(gallery) == 300 and "near-3" not in gallery
        gallery.add(["near-3"], vectors(["near-3"], OLD))  # an id may come back
        assert "near-3" in gallery


@pytest.mark.parametrize(
    "where",
    [
        {"year": 2001},
        {"year": [2001, 2003]},
        {"tag": "t1", "year": 2002},
        {"good": True},
        {"missing": None},
        {"tag": "nobody"},
        {"year": []},
    ],
)
@pytest.mark.parametrize("migrated", [False, True])
def test_a_filter_gives_the_nearest_k_among_the_items_that_match(gallery: Gallery, where: dict, migrated: bool) -> None:
    def matches(item) -> bool:
        return all(
            item.metadata.get(key) in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in where.items()
        )

    names = [item.id for item in gallery.items() if matches(item)]
    if not migrated:
        for found, query in zip(gallery.search(QUERIES, 6, where=where).ids, QUERIES, strict=True):
            assert found == expected(names, query, 6)
        return
    gallery.store.begin_upgrade(NEW, strategy="test", order_name="core:random", task_items=100)
    task = gallery.store.lease_task("worker")
    gallery.store.commit_task(task, task.nums, encode(task.items, NEW))
    moved = {item.id for item in task.items}
    both = queries()
    result = gallery.search(both, 6, where=where)
    for row in range(len(QUERIES)):
        pairs = []
        for name in names:
            space = NEW if name in moved else OLD
            query = both[space.fingerprint][row].astype(np.float64)
            distance = np.float32(1 - vector(name, space).astype(np.float64) @ (query / np.linalg.norm(query)))
            pairs.append((distance, name not in moved, name))
        assert result.ids[row] == [name for _, _, name in sorted(pairs)[:6]]


def test_metadata_and_uris_come_back_as_they_were_given(gallery: Gallery) -> None:
    item = gallery.get("item-0007")
    assert item.uri == "/photos/item-0007.jpg" and item.metadata == {"year": 2002, "tag": "t1", "good": False}
    assert [found and found.id for found in gallery.get_many(["item-0001", "nobody"])] == ["item-0001", None]
    with pytest.raises(UnknownNameError, match="nobody"):
        gallery.get("nobody")


def test_replacing_an_item_replaces_its_vector_and_content(gallery: Gallery) -> None:
    gallery.add(["item-0000"], vectors(["fresh"], OLD), content_hashes=["h2"], replace=True)
    assert len(gallery) == 300 and gallery.get("item-0000").content_hash == "h2"
    assert np.array_equal(gallery.vectors_of(["item-0000"]), vectors(["fresh"], OLD))
    assert gallery.search(vector("fresh", OLD), 1).ids == [["item-0000"]]


def test_compacting_drops_dead_rows_and_changes_no_result(gallery: Gallery) -> None:
    gallery.delete(NAMES[50:250])
    before = gallery.search(QUERIES, 20)
    assert gallery.compact() == 200
    after = gallery.search(QUERIES, 20)
    assert after.ids == before.ids and np.array_equal(after.distances, before.distances)
    assert gallery.stats()["dead_rows"] == 0 and gallery.verify().ok


def test_float16_halves_the_bytes_and_still_ranks(tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", OLD, dtype="float16") as gallery:
        gallery.add(NAMES, vectors(NAMES, OLD))
        sizes = [file.stat().st_size for file in (tmp_path / "g" / "seg").glob("*.f16")]
        assert sum(sizes) == 300 * OLD.dim * 2
        assert gallery.search(vector("item-0010", OLD), 1).ids == [["item-0010"]]


def test_vectors_of_any_length_are_stored_with_length_one_and_unit_ones_bit_for_bit(tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        unit = vectors(["a"], OLD)
        gallery.add(["a", "b"], np.concatenate([unit, 1e30 * unit]).astype(np.float32))
        stored = gallery.vectors_of(["a", "b"])
        assert np.array_equal(stored[0], unit[0]) and np.allclose(stored[1], unit[0], atol=1e-6)


def test_a_reopened_gallery_is_the_same_gallery(gallery: Gallery) -> None:
    gallery.delete(NAMES[:10])
    before = gallery.search(QUERIES, 10)
    with Gallery.open(gallery.path, readonly=True) as again:
        after = again.search(QUERIES, 10)
        assert after.ids == before.ids and np.array_equal(after.distances, before.distances)
        with pytest.raises(GalleryError, match="readonly"):
            again.delete(["item-0100"])


def test_an_empty_gallery_finds_nothing(tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        result = gallery.search(QUERIES, 4)
        assert result.ids == [[]] * 5 and len(gallery) == 0 and gallery.verify().ok


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("bad", "message"),
    [(np.nan, "row 2 has NaN or infinity"), (np.inf, "row 2 has NaN or infinity"), (0.0, "row 2 is a zero")],
)
def test_a_bad_row_is_named_and_nothing_is_added(gallery: Gallery, bad: float, message: str) -> None:
    rows = vectors(["a", "b", "c"], OLD)
    rows[2] = bad
    with pytest.raises(DataError, match=message):
        gallery.add(["a", "b", "c"], rows)
    assert len(gallery) == 300 and "a" not in gallery and gallery.verify().ok


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "a"], "'a' is given twice"),
        (["item-0001", "b"], r"1 ids are in the gallery already \('item-0001'\)"),
        ([1, "b"], "row 0 is 1"),
        (["a", ""], "row 1 has 0 characters"),
        (["a", "x" * 1025], "row 1 has 1025 characters"),
        (["a", "b\0"], "row 1 has a NUL"),
        (["a", "\ud800"], "UTF-8"),
        ("ab", "must be a list"),
        (["a"], "1 ids need vectors"),
    ],
)
def test_bad_ids_are_named_and_nothing_is_added(gallery: Gallery, ids: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gallery.add(ids, vectors(["a", "b"], OLD))
    assert len(gallery) == 300 and gallery.verify().ok


def test_a_wrong_width_and_a_foreign_space_are_refused(gallery: Gallery) -> None:
    with pytest.raises(SpaceError, match=r"width 20; space .* width 12"):
        gallery.add(["a"], vectors(["a"], NEW))
    with pytest.raises(SpaceError, match="width 20"):
        gallery.search(np.ones(20))
    with pytest.raises(SpaceError, match="does not know"):
        gallery.search({NEW.fingerprint: np.ones((1, 20))})
    with pytest.raises(SpaceError, match="cannot be added"):
        gallery.add(["a"], vectors(["a"], NEW), space=NEW.fingerprint)


@pytest.mark.parametrize("k", [0, -3, 1.5, "ten"])
def test_k_below_one_is_refused(gallery: Gallery, k: object) -> None:
    with pytest.raises(InputError, match="k is"):
        gallery.search(QUERIES, k)  # type: ignore[arg-type]


def test_k_far_beyond_the_items_is_refused_before_there_is_a_place_for_each(gallery: Gallery) -> None:
    with pytest.raises(InputError, match=r"k is 1099511627776, and .* has 300 items"):
        gallery.search(QUERIES, 2**40)
    found = gallery.search(QUERIES, 5000)
    assert found.distances.shape[1] == 5000 and {len(ids) for ids in found.ids} == {300}


def test_deleting_an_unknown_id_suggests_a_close_one_and_deletes_nothing(gallery: Gallery) -> None:
    with pytest.raises(UnknownNameError, match=r"'item-00444'.*nothing was deleted.*Did you mean 'item-0044'"):
        gallery.delete(["item-0001", "item-00444"])
    assert len(gallery) == 300


@pytest.mark.parametrize("where", [{'a"b': 1}, {"year": {"gt": 3}}, {1: 2}])
def test_a_filter_that_cannot_be_understood_is_refused(gallery: Gallery, where: dict) -> None:
    with pytest.raises(InputError, match=r"filter|metadata key"):
        gallery.search(QUERIES, where=where)


def test_a_filter_for_a_number_of_more_than_64_bits_is_refused(gallery: Gallery) -> None:
    with pytest.raises(InputError, match="keep them as text"):
        gallery.search(QUERIES, 3, where={"n": 2**63})


@pytest.mark.parametrize("metadata", [[{"x": object()}], ["text"], [{"x": float("nan")}], [{'"': 1}]])
def test_metadata_that_is_not_json_is_refused(gallery: Gallery, metadata: list) -> None:
    with pytest.raises(InputError, match="metadata"):
        gallery.add(["a"], vectors(["a"], OLD), metadata=metadata)


# ---------------------------------------------------------------------------------------------------------- spaces


def test_the_canary_tells_a_swapped_model_of_the_same_size(gallery: Gallery) -> None:
    assert gallery.check_canary(lambda items: encode(items, OLD)) == pytest.approx(1, abs=1e-6)
    swapped = Space("swapped" * 4, "tests:swapped", OLD.dim)
    with pytest.raises(SpaceError, match="not the one that filled"):
        gallery.check_canary(lambda items: encode(items, swapped))


def test_a_few_edited_files_do_not_raise_the_canary(gallery: Gallery) -> None:
    def some_edited(items):
        rows = encode(items, OLD)
        rows[::5] = encode(items[::5], Space("x", "x", OLD.dim))
        return rows

    assert gallery.check_canary(some_edited) > 0.999


def test_queries_of_a_compatible_space_may_search_old_vectors_once_the_relation_is_registered(gallery: Gallery) -> None:
    sibling = Space("sibling" * 3, "tests:sibling", OLD.dim)
    gallery.register_space(sibling)
    with pytest.raises(SpaceError, match="no registered relation leads"):
        gallery.search({sibling.fingerprint: QUERIES})
    gallery.relate(sibling.fingerprint, OLD.fingerprint, evidence={"recall@1": 0.71})
    assert gallery.search({sibling.fingerprint: QUERIES}, 3).ids == gallery.search(QUERIES, 3).ids
    assert gallery.compatible(sibling.fingerprint, OLD.fingerprint)
    assert not gallery.compatible(OLD.fingerprint, sibling.fingerprint)
    assert gallery.relations()[0].evidence == {"recall@1": 0.71}
