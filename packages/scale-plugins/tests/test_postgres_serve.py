"""`bowerbird serve` of a gallery in a real PostgreSQL: searches, writes, an upgrade under it, broken connections."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

psycopg = pytest.importorskip("psycopg")
pytest.importorskip("fastapi")
sys.path.insert(0, str(Path(__file__).parent))

from ray_world import NEW, OLD, vectors  # noqa: E402

from bowerbird.gallery.open import create_gallery, open_gallery  # noqa: E402
from bowerbird.upgrade import ItemEncoder  # noqa: E402
from bowerbird.upgrade.run import run  # noqa: E402

NAMES = [f"item-{n:03d}" for n in range(60)]
QUERY = {space.fingerprint: vectors(["query"], space) for space in (OLD, NEW)}


@contextmanager
def service(url: str, contents: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "bowerbird", "serve", url, "--port", "0", "--contents", str(contents)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://[\w.:]+", process.stdout.readline())
            assert address is not None
            yield address[0]
        finally:
            process.terminate()


def ask(address: str, path: str, body: Any = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def search(address: str) -> list[str]:
    body = {"vectors": {name: rows[0].tolist() for name, rows in QUERY.items()}, "k": 60}
    return [hit["id"] for hit in ask(address, "/v1/search/vector", body)["hits"]]


def break_connections(server: str) -> int:
    """End all sessions of clients, as a restart of the server does; how many there were."""
    with psycopg.connect(server, autocommit=True) as db:
        rows = db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
    return len(rows)


def test_a_gallery_in_postgresql_is_served_while_it_is_upgraded_and_connections_break(
    postgres_server, postgres_url, tmp_path
):
    url = postgres_url()
    with create_gallery(url, OLD) as gallery:
        gallery.add(NAMES[:-1], vectors(NAMES[:-1], OLD))
    with service(url, tmp_path) as address, open_gallery(url) as gallery:
        row = {"id": NAMES[-1], "vector": vectors(NAMES[-1:], OLD)[0].tolist()}
        assert ask(address, "/v1/items/vectors", {"items": [row]})["added"] == [NAMES[-1]]
        assert sorted(search(address)) == NAMES
        gallery.store.begin_upgrade(NEW, strategy="core:full", order_name="core:random", task_items=10)
        encoder = ItemEncoder(lambda items: vectors([item.id for item in items], NEW), space=NEW, batch_size=10)
        run(gallery, encoder, stop_at_share=0.5)
        assert ask(address, "/v1/upgrade")["share"] == pytest.approx(0.5, abs=0.1)
        half = search(address)
        assert sorted(half) == NAMES

        assert break_connections(postgres_server) >= 1
        assert search(address) == half, "a search finds a new connection by itself"
        assert ask(address, "/v1/items/delete", {"ids": half[:1]})["deleted"] == half[:1]
        assert search(address) == half[1:]

        run(gallery, encoder)
        after = gallery.search(QUERY, 60).ids[0]
        assert search(address) == after and after != half[1:]


def test_rows_of_the_service_are_exact(postgres_url, tmp_path):
    url = postgres_url()
    with create_gallery(url, OLD) as gallery:
        gallery.add(NAMES, vectors(NAMES, OLD))
    with service(url, tmp_path) as address:
        hits = ask(address, "/v1/search/vector", {"vector": QUERY[OLD.fingerprint][0].tolist(), "k": 60})["hits"]
    distances = 1 - vectors([hit["id"] for hit in hits], OLD).astype(np.float64) @ QUERY[OLD.fingerprint][0]
    assert [hit["distance"] for hit in hits] == pytest.approx(distances.tolist(), abs=1e-6)
