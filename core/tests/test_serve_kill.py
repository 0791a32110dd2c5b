"""``kill -9`` of a service while clients upload: what was acknowledged is there, and nothing is half there."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from serve_world import gallery_path, old_encoder, photos, picture_bytes, running_server

from bowerbird.gallery import Gallery

__all__ = ["gallery_path", "old_encoder", "photos"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
CLIENTS = 4
PER_BATCH = 3


def upload_until_it_dies(url: str, client: int, acknowledged: dict[str, bytes], deleted: set[str]) -> None:
    """Batches of new pictures; every third batch takes the first picture of the one before away again."""
    with httpx.Client(base_url=url, timeout=20) as http:
        for batch in range(10_000):
            made = {
                f"{client}/{batch}/{n}": picture_bytes(1000 + (client * 10_000 + batch) * 10 + n)
                for n in range(PER_BATCH)
            }
            items = json.dumps([{"id": name, "metadata": {"client": client}} for name in made])
            files = [("files", ("p.png", data, "image/png")) for data in made.values()]
            try:
                answer = http.post("/v1/items", data={"items": items}, files=files)
                assert answer.status_code == 200, answer.text
                acknowledged.update(made)
                if batch % 3 == 2:
                    gone = f"{client}/{batch - 1}/0"
                    deleted.add(gone)  # whether it was answered for or not: it may be either
                    http.post("/v1/items/delete", json={"ids": [gone]})
            except httpx.TransportError:
                return


def test_a_killed_service_has_every_acknowledged_item_with_its_picture_and_no_item_without(gallery_path: Path) -> None:
    acknowledged: dict[str, bytes] = {}
    deleted: set[str] = set()
    with running_server(gallery_path, "--requests-per-minute", "0") as running:
        clients = [
            threading.Thread(target=upload_until_it_dies, args=(running.url, number, acknowledged, deleted))
            for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        deadline = time.monotonic() + 60
        while len(acknowledged) < 20 * CLIENTS and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(running.process.pid, signal.SIGKILL)
        for client in clients:
            client.join()
    assert len(acknowledged) >= 20 * CLIENTS

    with Gallery.open(gallery_path) as gallery:
        assert gallery.verify().ok
        there = {item.id: item for item in gallery.items()}
        uploaded = {name: item for name, item in there.items() if name.count("/") == 2}
        assert set(acknowledged) - deleted <= set(uploaded)
        for name, item in uploaded.items():
            content = Path(str(item.uri)).read_bytes()
            assert hashlib.sha256(content).hexdigest() == item.content_hash
            assert content == acknowledged.get(name, content)
        # A batch is there as a whole, but for what was deleted of it.
        for name in set(uploaded):
            batch = name.rpartition("/")[0]
            assert {f"{batch}/{n}" for n in range(PER_BATCH)} - deleted <= set(uploaded)

    with (
        running_server(gallery_path, "--requests-per-minute", "0") as running,
        httpx.Client(base_url=running.url) as http,
    ):
        name, data = next(iter(acknowledged.items()))
        items = json.dumps([{"id": name, "metadata": {"client": int(name[0])}}])
        answer = http.post("/v1/items", data={"items": items}, files=[("files", ("p.png", data))], timeout=20)
        assert answer.status_code == 200 and not answer.json()["failed"]
        # The uploads waited until the new service had removed what no item names.
        with Gallery.open(gallery_path, readonly=True) as gallery:
            named = {Path(str(item.uri)) for item in gallery.items() if item.id.count("/") == 2}
        kept = {file for file in (gallery_path / "contents").rglob("*") if file.is_file() and file.name != "owner.json"}
        assert kept == named
        assert running.stop() == 0
