"""``kill -9`` of a service while clients upload: what was acknowledged is there, and nothing is half there. And while
it upgrades its gallery: the next service ends at the gallery that would have been.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serve_world import gallery_path, old_encoder, photos, picture_bytes, running_server
from test_serve_upgrade import World, act, children, gone, light, start, until

from bowerbird.gallery import Gallery
from bowerbird.upgrade import begin
from bowerbird.upgrade.run import run
from bowerbird.upgrade.state import finish
from bowerbird.upgrade.vectors_encoder import load_vectors_encoder

__all__ = ["gallery_path", "light", "old_encoder", "photos"]
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


def final_state(gallery: Gallery, world: World) -> Any:
    """What there is, and what searches find: ids, numbers and exact distances."""
    assert gallery.verify().ok
    names = [item.id for item in gallery.items()]
    found = gallery.search(np.load(world.folder / "new.npy")[:9], 100)
    return names, gallery.vectors_of(names).tobytes(), gallery.counts(), found.ids, found.nums.tobytes()


def without_a_kill(world: World, place: Path) -> Any:
    new = load_vectors_encoder(world.ref("new"))
    with Gallery.open(shutil.copytree(world.path, place)) as gallery:
        begin(gallery, new, strategy="core:compatible")
        gallery.delete(["item-7"])
        run(gallery, new)
        finish(gallery, encoder=new)
        return final_state(gallery, world)


def until_in_gallery(path: Path, holds: Any) -> None:
    deadline = time.monotonic() + 60
    with Gallery.open(path, readonly=True) as gallery:
        while not holds(gallery.snapshot()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("moment", "later"),
    [("it begins", 0.0), ("it begins", 0.4), ("it has begun", 0.0), ("moving", 0.2), ("paused", 0.0)],
)
def test_a_service_that_is_killed_amid_its_upgrade_costs_nothing(light: World, tmp_path: Path, moment, later) -> None:
    expected = without_a_kill(light, tmp_path / "undisturbed")
    options = ("--candidate", f"new={light.ref('new')}", "--backfill-nice", "0", "--requests-per-minute", "0")

    def ask() -> None:
        with suppress(httpx.TransportError):  # its answer never comes where the service dies first
            start(http, rate=20)

    with running_server(light.path, *options) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        asking = threading.Thread(target=ask)
        asking.start()
        while not (workers := children(running.process.pid)):
            assert asking.is_alive()
            time.sleep(0.005)
        if moment != "it begins":
            until_in_gallery(light.path, lambda now: now.upgrade is not None)
        if moment in ("moving", "paused"):
            until_in_gallery(light.path, lambda now: now.new.count > 0)
        if moment == "paused":
            asking.join()
            assert act(http, "pause").status_code == 200
        time.sleep(later)
        running.process.kill()
        asking.join()
        killed = time.monotonic()
        while not all(gone(pid) for pid in workers):
            assert time.monotonic() < killed + 20, "a worker outlives its service"
            time.sleep(0.02)

    with Gallery.open(light.path) as gallery:
        left = gallery.snapshot()
        if left.upgrade is not None:
            assert left.upgrade.state == ("paused" if moment == "paused" else "running")
            assert 0 <= left.new.count < len(gallery)
        time.sleep(0.5)
        assert gallery.snapshot().epoch == left.epoch, "nobody writes any more"
        gallery.delete(["item-7"])

    with running_server(light.path, *options) as running, httpx.Client(base_url=running.url, timeout=60) as http:
        if moment == "paused":
            assert act(http, "resume").status_code == 200
        elif left.upgrade is None:
            start(http)
        until(http, lambda now: now["state"] == "complete" and now["worker"]["state"] == "done")
        assert act(http, "finish").status_code == 200
    with Gallery.open(light.path) as gallery:
        assert final_state(gallery, light) == expected
