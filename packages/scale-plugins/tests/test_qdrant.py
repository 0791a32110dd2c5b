"""What is particular to galleries whose vectors are in Qdrant (local mode, or BOWERBIRD_TEST_QDRANT_URL)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import bowerbird_scale.qdrant as qdrant
from bowerbird.errors import InputError, StoreUnavailableError
from bowerbird.gallery import Gallery, create_gallery, open_gallery
from bowerbird.gallery.copy import copy_gallery
from bowerbird.gallery.open import safe_url
from bowerbird.testing.store_contract import QUERIES, fill, same
from bowerbird.testing.store_world import FIRST, SECOND, begin, vectors, work
from bowerbird_scale.postgres.connection import Address

TWO = {space.fingerprint: QUERIES[space.fingerprint] for space in (FIRST, SECOND)}


@pytest.fixture
def url(postgres_url: Callable[[], str], tmp_path: Path) -> str:
    place = os.environ.get("BOWERBIRD_TEST_QDRANT_URL") or str(tmp_path / "qdrant")
    return f"qdrant+{postgres_url()}&qdrant={quote(place, safe='/:')}"


def test_searches_among_points_that_do_not_count_find_what_the_embedded_gallery_finds(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant, "FEW", 0)  # never fetch a small part by its numbers: search the collection
    with create_gallery(url, FIRST) as there, Gallery.create(tmp_path / "folder", FIRST) as folder:
        for gallery in (there, folder):
            fill(gallery)
            gallery.add([f"copy-{n}" for n in range(30)], np.repeat(vectors(["copy"], FIRST), 30, axis=0))
            gallery.delete([f"id-{n:03}" for n in range(0, 20, 2)])
            begin(gallery, SECOND, seed=5)
        for _ in range(8):
            for where in (None, {"year": [1, 2]}, {"kind": "even", "year": 0}):
                first, second = (gallery.search(TWO, 12, where=where) for gallery in (there, folder))
                assert first.ids == second.ids
                assert np.array_equal(first.distances, second.distances)
            for gallery in (there, folder):
                work(gallery, tasks=1)
        there.store.finish_upgrade(verified=True)
        assert there.stats()["rows"] == 60
        collections = there.storage.db.vectors
        with there.storage.db.reading() as db:
            assert not collections.client.collection_exists(collections._name(db, 1))  # the old vectors are swept


def test_a_gallery_moves_from_a_folder_through_qdrant_and_back_bit_for_bit(url: str, tmp_path: Path) -> None:
    with Gallery.create(tmp_path / "folder", FIRST, dtype="float16") as folder:
        fill(folder)
        copied = copy_gallery(folder, url)
        with open_gallery(url) as there:
            same(there, folder, FIRST)
            assert copy_gallery(there, str(tmp_path / "back")).digest == copied.digest


def test_vectors_that_qdrant_has_lost_are_named(url: str) -> None:
    with create_gallery(url, FIRST) as gallery:
        fill(gallery)
        collections = gallery.storage.db.vectors
        with gallery.storage.db.outside() as db:
            collections.delete(db, 1, [gallery.get("id-004").num])
        assert gallery.verify().damaged_ids == ["id-004"]
        with pytest.raises(StoreUnavailableError, match="has lost 1 vectors"):
            gallery.vectors_of(["id-004"])


def test_what_a_transaction_left_that_died_with_its_server_is_in_nobodys_way(url: str) -> None:
    """PostgreSQL gives the number of the space again, and Qdrant has a collection of it."""
    with create_gallery(url, FIRST) as gallery:
        fill(gallery)
        collections = gallery.storage.db.vectors
        with gallery.storage.db.reading() as db:
            name = collections._name(db, 2)
        left = qdrant.models.VectorParams(size=3, distance=qdrant.models.Distance.DOT)
        collections.client.create_collection(name, vectors_config=left)
        begin(gallery, SECOND)
        work(gallery)
        gallery.store.finish_upgrade(verified=True)
        assert gallery.verify().ok


def test_a_place_is_needed_and_a_key_is_never_shown(postgres_url: Callable[[], str]) -> None:
    with pytest.raises(InputError, match="does not say where Qdrant is"):
        create_gallery(f"qdrant+{postgres_url()}", FIRST)
    url = "qdrant+postgresql://me:secret@db/images?gallery=photos&qdrant=http://q:6333&qdrant_api_key=hidden"
    address = Address.parse(url)
    assert address.name == "qdrant+postgresql://me@db/images?qdrant=http://q:6333&gallery=photos"
    assert address.options["qdrant_api_key"] == "hidden"
    assert "hidden" not in safe_url(url) and "secret" not in safe_url(url)
    for place in ("nonsense://q:6333", "/proc/nowhere"):
        with pytest.raises(InputError, match="Qdrant cannot be used there"):
            create_gallery(f"qdrant+{postgres_url()}&qdrant={place}", FIRST)
    dead = f"qdrant+{postgres_url()}&qdrant=http://127.0.0.1:1"
    with pytest.raises(StoreUnavailableError, match="Qdrant does not answer"):
        create_gallery(dead, FIRST)
    with pytest.raises(Exception, match="there is no gallery"):
        open_gallery(dead)
