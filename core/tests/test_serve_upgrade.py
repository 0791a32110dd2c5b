"""An upgrade over HTTP: begun, watched, paused, taken back and finished, while processes die.

Most tests know their encoders by files of vectors, so that workers start without torch.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from serve_world import (
    gallery_path,  # noqa: F401  # a fixture, as those below
    new_encoder,  # noqa: F401
    old_encoder,  # noqa: F401
    photos,  # noqa: F401
    running_server,
    served,
    settings_for,
    upload,
)

from bowerbird.gallery import Gallery
from bowerbird.gallery.open import open_gallery
from bowerbird.serve import backfill
from bowerbird.serve.control import Control
from bowerbird.serve.encoders import Encoders
from bowerbird.serve.metrics import Metrics
from bowerbird.upgrade import begin
from bowerbird.upgrade.executors import WorkerProcess
from bowerbird.upgrade.run import run
from bowerbird.upgrade.vectors_encoder import load_vectors_encoder

ITEMS, CLASSES, DIM = 60, 6, 16
SECONDS = 60.0


@dataclass(frozen=True)
class World:
    """A gallery of 60 items of 6 classes under `old`; `new` is compatible with it and better, `bad` is worse."""

    path: Path
    folder: Path

    def ref(self, name: str) -> str:
        return f"vectors:{self.folder / name}.npy"

    def space(self, name: str) -> str:
        return load_vectors_encoder(self.ref(name)).space.fingerprint

    def served(self, **settings: Any) -> Any:
        names = ("new", "bad", "old")
        return served(self.path, candidates={n: self.ref(n) for n in names}, **{"backfill_nice": 0, **settings})


@pytest.fixture
def light(tmp_path: Path) -> World:
    rng = np.random.default_rng(3)
    centers = rng.normal(size=(CLASSES, DIM))[np.arange(ITEMS) % CLASSES]
    ids = [f"item-{number}" for number in range(ITEMS)]
    for name, noise in (("old", 1.2), ("new", 0.5), ("bad", 30.0)):
        np.save(tmp_path / f"{name}.npy", (centers + noise * rng.normal(size=centers.shape)).astype(np.float32))
        (tmp_path / f"{name}.ids.txt").write_text("\n".join(ids))
    world = World(tmp_path / "gallery", tmp_path)
    old = load_vectors_encoder(world.ref("old"))
    with Gallery.create(world.path, old.space) as gallery:
        metadata = [{"label": f"class-{number % CLASSES}"} for number in range(ITEMS)]
        gallery.add(ids, np.load(tmp_path / "old.npy"), uris=[f"/pictures/{name}" for name in ids], metadata=metadata)
        for name in ("new", "bad"):
            space = load_vectors_encoder(world.ref(name)).space
            gallery.register_space(space)
            gallery.relate(space.fingerprint, old.space.fingerprint)
    return world


def view(client: TestClient) -> dict[str, Any]:
    answer = client.get("/v1/upgrade")
    assert answer.status_code == 200, answer.text
    return answer.json()


def until(client: TestClient, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while not holds(now := view(client)):
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return now


def start(client: TestClient, candidate: str = "new", **settings: Any) -> dict[str, Any]:
    answer = client.post(
        "/v1/upgrade/start", json={"candidate": candidate, "strategy": "compatible", "watch_every": 0.2, **settings}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def act(client: TestClient, verb: str, upgrade: int = 1, **more: Any) -> Any:
    return client.post(f"/v1/upgrade/{verb}", json={"id": upgrade, **more})


def results(client: TestClient, world: World) -> list[Any]:
    """What searches by vectors of the first nine items find: ids and exact distances."""
    found = []
    for number in range(9):
        rows = {world.space(name): np.load(world.folder / f"{name}.npy")[number].tolist() for name in ("old", "new")}
        answer = client.post("/v1/search/vector", json={"vectors": rows, "k": ITEMS})
        assert answer.status_code == 200, answer.text
        found.append([(hit["id"], hit["distance"]) for hit in answer.json()["hits"]])
    return found


def children(of: int) -> list[int]:
    """Background processes of a service."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            named = b"bowerbird.serve.worker" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == of and named:
            found.append(int(folder.name))
    return found


def gone(pid: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True


class TestFromStartToEnd:
    def test_pictures_are_found_at_every_moment_and_the_curve_is_drawn(self, gallery_path, new_encoder):  # noqa: F811
        from bowerbird.encoders import load_encoder

        space = load_encoder(new_encoder, device="cpu").space()
        with open_gallery(gallery_path) as gallery:
            gallery.register_space(space)
            gallery.relate(space.fingerprint, gallery.snapshot().serving)
        with served(gallery_path, candidates={"new": str(new_encoder)}, backfill_nice=0) as client:
            assert view(client)["state"] == "none"
            begun = start(client, rate=40)
            assert (begun["state"], begun["strategy"], begun["new"]["encoder"]) == (
                "running", "core:compatible", new_encoder.name,
            )  # fmt: skip
            assert act(client, "finish").status_code == 409
            shares = []
            while (now := view(client))["state"] == "running":
                assert client.post("/v1/search/image", files=upload(7)).status_code == 200
                shares.append(now["share"])
            assert shares == sorted(shares)
            done = until(client, lambda now: now["worker"]["state"] == "done")
            assert (done["state"], done["new_items"], done["worker"]["moved"]) == ("complete", 60, 60)
            assert [round(point["share"], 1) for point in done["curve"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
            assert all(0 <= point["quality"] <= 1 for point in done["curve"])
            assert 0 < done["level_before"] <= 1
            ended = act(client, "finish")
            assert ended.status_code == 200, ended.text
            assert (ended.json()["state"], ended.json()["last"]) == ("none", "finished")
            assert ended.json()["curve"] == done["curve"]
            gallery = client.get("/v1/gallery").json()
            assert gallery["serving"] == space.fingerprint
            answer = client.post("/v1/search/image", files=upload(7))
            assert answer.json()["hits"][0]["distance"] == pytest.approx(0, abs=1e-5)

    def test_the_labels_of_items_show_that_the_new_encoder_is_better(self, light):
        with light.served() as client:
            start(client)
            done = until(client, lambda now: now["worker"]["state"] == "done")
            assert done["curve"][-1]["quality"] > done["level_before"]

    def test_without_labels_churn_is_measured(self, light):
        with light.served(label_key=None) as client:
            start(client)
            done = until(client, lambda now: now["worker"]["state"] == "done")
            assert done["level_before"] is None
            assert all(point["quality"] is None and point["churn"] > 0 for point in done["curve"])

    def test_what_cannot_be_is_refused_with_the_reason(self, light):
        with light.served() as client:
            refusals = [
                ("start", {"candidate": "nwe"}, 404, "Did you mean 'new'"),
                ("start", {"candidate": light.ref("new")}, 404, "is no candidate"),
                ("start", {"candidate": "old"}, 409, "already"),
                ("start", {"candidate": "new", "strategy": "compatibel"}, 404, "Did you mean"),
                ("start", {"candidate": "new", "strategy": "compatible", "label_key": "colour"}, 422, "metadata key"),
                ("start", {"candidate": "new", "encoder": "/etc"}, 422, "encoder"),
                ("plan", {"candidate": "nwe"}, 404, "Did you mean 'new'"),
                ("pause", {"id": 1}, 409, "no upgrade is under way"),
                ("rollback", {"id": 1}, 409, "no upgrade is under way"),
            ]
            for verb, body, status, text in refusals:
                answer = client.post(f"/v1/upgrade/{verb}", json=body)
                assert (answer.status_code, text in answer.json()["detail"]) == (status, True), answer.text
                assert str(light.folder) not in answer.text
            assert view(client)["state"] == "none"
            start(client, rate=1000)
            until(client, lambda now: now["worker"]["state"] == "done")
            for verb in ("pause", "resume", "finish", "rollback"):
                other = act(client, verb, 7)
                assert (other.status_code, "upgrade 7 is over" in other.text) == (409, True)
            answer = client.post("/v1/upgrade/start", json={"candidate": "bad"})
            assert (answer.status_code, "another upgrade" in answer.text) == (409, True)
            answer = client.post("/v1/upgrade/plan", json={"candidate": "bad"})
            assert (answer.status_code, "under way" in answer.text) == (409, True)

    def test_an_item_that_cannot_be_encoded_is_named_and_its_worker_is_done(self, light):
        with open_gallery(light.path) as gallery:  # the file of the new vectors has none of it
            gallery.add(["unknown"], np.ones((1, DIM), np.float32), uris=["/pictures/unknown"])
        with light.served(label_key=None) as client:
            start(client)
            done = until(client, lambda now: now["worker"]["state"] == "done")
            assert (done["state"], done["new_items"], done["failed"]) == ("complete", ITEMS, 1)
            assert done["failures"][0]["id"] == "unknown"
            assert act(client, "finish").status_code == 409
            assert act(client, "finish", accept_failed=True).status_code == 200

    def test_a_start_while_it_is_under_way_changes_the_worker_and_nothing_that_it_was_begun_with(self, light):
        with light.served() as client:
            start(client, rate=0.5, max_nfr=0.5)
            [first] = children(os.getpid())
            for other in ({"order": "uncertainty"}, {"strategy": "full"}, {"label_key": "number"}):
                answer = client.post("/v1/upgrade/start", json={"candidate": "new", **other})
                assert (answer.status_code, "cannot replace" in answer.text) == (409, True), answer.text
            answer = client.post("/v1/upgrade/start", json={"candidate": "new"})  # by somebody who asks for nothing
            assert (answer.status_code, children(os.getpid())) == (200, [first])
            begun = time.monotonic()
            start(client, rate=1000)
            until(client, lambda now: now["worker"]["state"] == "done")
            assert time.monotonic() - begun < ITEMS / 0.5 / 2
            assert client.app.state.server.control.backfill.job.max_nfr == 0.5

    def test_a_rule_about_flips_needs_watched_queries(self, light):
        with open_gallery(light.path) as gallery:
            begin(gallery, load_vectors_encoder(light.ref("new")).space, strategy="compatible", task_items=5)
        with light.served() as client:
            answer = client.post("/v1/upgrade/start", json={"candidate": "new", "max_nfr": 0.1})
            assert (answer.status_code, "without watched queries" in answer.text) == (409, True)
            start(client)
            until(client, lambda now: now["worker"]["state"] == "done")

    def test_a_read_only_service_changes_nothing(self, light):
        with light.served(read_only=True) as client:
            for verb, body in (("start", {"candidate": "new"}), ("plan", {"candidate": "new"}), ("pause", {"id": 1})):
                assert client.post(f"/v1/upgrade/{verb}", json=body).status_code == 403
            assert view(client)["state"] == "none"


class TestPauseAndRollback:
    def test_a_rollback_gives_the_exact_old_results(self, light):
        with light.served() as client:
            before = results(client, light)
            start(client, rate=20)
            until(client, lambda now: now["share"] > 0)
            assert act(client, "pause").json()["state"] == "paused"
            paused = until(client, lambda now: now["worker"]["state"] == "paused")
            assert 0 < paused["share"] < 1
            assert results(client, light) != before
            time.sleep(0.5)
            assert view(client)["share"] == paused["share"]
            assert act(client, "resume").json()["state"] == "running"
            until(client, lambda now: now["share"] > paused["share"])
            until(client, lambda now: now["worker"]["rate"])
            assert "\nbowerbird_upgrade_rate 0.0\n" not in client.get("/metrics").text
            answer = act(client, "rollback")
            assert "\nbowerbird_upgrade_rate 0.0\n" in client.get("/metrics").text
            assert (answer.status_code, answer.json()["last"]) == (200, "rolled back")
            assert results(client, light) == before
            assert until(client, lambda now: now["worker"]["state"] == "none")["state"] == "none"
            assert not children(os.getpid())

    def test_items_that_came_meanwhile_need_the_old_encoder_or_stay_without_a_vector(self, light):
        with light.served() as client:
            start(client, rate=20)
            act(client, "pause")
            with open_gallery(light.path) as gallery:
                space = gallery.snapshot().write_space.fingerprint
                gallery.add(["late"], np.ones((1, DIM), np.float32), space=space)
            answer = act(client, "rollback")
            assert (answer.status_code, view(client)["state"]) == (409, "paused")
            assert "late" in answer.json()["detail"]
            assert act(client, "rollback", leave_pending=True).status_code == 200
            assert client.get("/v1/gallery").json()["pending"] == 1

    def test_flips_above_the_rule_pause_it_and_are_shown(self, light):
        with light.served() as client:
            start(client, "bad", max_nfr=0.05)
            now = until(client, lambda now: now["worker"]["state"] == "paused")
            assert now["state"] == "paused"
            assert "more than the 5.00% that are accepted" in now["stopped_by"]
            assert now["curve"][-1]["nfr"] > 0.05
            assert now["share"] < 1

    def test_the_rate_and_the_priority_are_kept(self, light):
        nice = max(6, os.getpriority(os.PRIO_PROCESS, 0))
        with light.served(backfill_rate=25.0, backfill_nice=nice) as client:
            start(client, rate=1000)
            begun = time.monotonic()
            [pid] = children(os.getpid())
            assert os.getpriority(os.PRIO_PROCESS, pid) == nice
            until(client, lambda now: now["state"] == "complete")
            assert time.monotonic() - begun >= (ITEMS - 10) / 25


class TestWhenProcessesDie:
    def test_a_worker_that_is_killed_is_followed_by_another(self, light, monkeypatch):
        monkeypatch.setattr(backfill, "FIRST_PAUSE", 0.05)
        with light.served() as client:
            start(client, rate=20)
            until(client, lambda now: now["share"] > 0)
            [pid] = children(os.getpid())
            os.kill(pid, signal.SIGKILL)
            done = until(client, lambda now: now["worker"]["state"] == "done")
            assert (done["share"], done["failed"]) == (1, 0)

    def test_an_error_that_will_not_pass_is_shown_until_somebody_resumes(self, light, monkeypatch):
        monkeypatch.setattr(backfill, "FIRST_PAUSE", 0.05)
        with light.served() as client:
            start(client, rate=20)
            vectors = light.folder / "new.npy"
            away = vectors.rename(light.folder / "away.npy")
            os.kill(children(os.getpid())[0], signal.SIGKILL)
            failed = until(client, lambda now: now["worker"]["state"] == "failed")
            assert failed["state"] == "running"
            assert "there is no such file" in failed["worker"]["error"]
            assert str(light.folder) not in failed["worker"]["error"]
            away.rename(vectors)
            assert act(client, "resume").status_code == 200
            until(client, lambda now: now["worker"]["state"] == "done")

    def test_a_process_that_dies_before_it_has_begun_leaves_nothing_begun(self, light, monkeypatch):
        monkeypatch.setattr(backfill, "start_child", lambda task, settings, line: WorkerProcess("this", line, {}))
        with light.served() as client:
            answer = client.post("/v1/upgrade/start", json={"candidate": "new"})
            assert (answer.status_code, "ended with code 0" in answer.text) == (503, True)
            now = view(client)
            assert (now["state"], now["worker"]["state"]) == ("none", "none")

    def test_a_worker_that_always_dies_is_given_up(self, light, monkeypatch):
        monkeypatch.setattr(backfill, "FIRST_PAUSE", 0.02)
        monkeypatch.setattr(backfill, "MOST_STARTS", 3)
        with light.served() as client:
            start(client, rate=10)
            started = []

            def start_child(task: str, settings: Any, line: Any) -> WorkerProcess:
                started.append(task)
                return WorkerProcess("this", line, {})  # says something else, and ends

            monkeypatch.setattr(backfill, "start_child", start_child)
            os.kill(children(os.getpid())[0], signal.SIGKILL)
            failed = until(client, lambda now: now["worker"]["state"] == "failed")
            assert "ended with code 0" in failed["worker"]["error"]
            assert 2 <= len(started) <= 3

    def test_a_killed_service_takes_its_worker_along_and_the_next_one_goes_on(self, light):
        options = ("--candidate", f"new={light.ref('new')}", "--label-key", "label", "--backfill-nice", "0")
        with running_server(light.path, *options) as running, httpx.Client(base_url=running.url, timeout=60) as client:
            told = Listener(running.url)
            start(client, rate=4)
            told.until(lambda now: now["state"] == "running" and now["share"] > 0)
            with open_gallery(light.path) as gallery:  # as `bowerbird upgrade pause` does
                gallery.store.pause()
                began = time.monotonic()
                told.until(lambda now: now["state"] == "paused")
                assert time.monotonic() - began < 5  # a second, on an idle machine
                gallery.store.resume()
            told.until(lambda now: now["worker"]["state"] == "working")
            [pid] = children(running.process.pid)
            running.process.kill()
            deadline = time.monotonic() + SECONDS
            while not gone(pid):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with open_gallery(light.path) as gallery:
            state = gallery.store.upgrade_state()
            assert state is not None and state.state == "running"
            assert not gallery.store.progress().complete
        with light.served(backfill_rate=100.0) as client:
            until(client, lambda now: now["worker"]["state"] in ("starting", "working"))
            act(client, "pause")
            act(client, "resume")
            until(client, lambda now: now["worker"]["state"] == "done")
            assert act(client, "finish").status_code == 200


class TestUpgradesOfCommands:
    def test_are_shown_from_begin_to_end_and_no_worker_of_the_service_joins(self, light):
        with light.served() as client, open_gallery(light.path) as gallery:
            new = load_vectors_encoder(light.ref("new"))
            begin(gallery, new, strategy="core:compatible", task_items=10)
            assert view(client)["state"] == "running"
            run(gallery, new, stop_after=30)
            now = until(client, lambda now: now["share"] == 0.5)
            assert now["worker"]["state"] == "none"
            assert not children(os.getpid())
            gallery.store.rollback()
            assert until(client, lambda now: now["state"] == "none")["last"] == "rolled back"

    def test_are_joined_by_a_start_or_a_resume_that_somebody_asks_for(self, light):
        with light.served() as client, open_gallery(light.path) as gallery:
            begin(gallery, load_vectors_encoder(light.ref("new")), strategy="core:compatible", task_items=10)
            act(client, "pause")
            answer = client.post("/v1/upgrade/start", json={"candidate": "new"})
            assert (answer.status_code, "paused" in answer.text) == (409, True)
            act(client, "resume")
            until(client, lambda now: now["worker"]["state"] == "done")
            assert act(client, "finish").status_code == 200


class TestPlans:
    def test_a_plan_can_be_cancelled_made_again_and_followed(self, light):
        with light.served() as client:
            job = client.post("/v1/upgrade/plan", json={"candidate": "new"})
            assert (job.status_code, job.json()["state"]) == (202, "running")
            again = client.post("/v1/upgrade/plan", json={"candidate": "new"})
            assert (again.status_code, "is being made" in again.text) == (409, True)
            assert client.post("/v1/upgrade/start", json={"candidate": "new"}).status_code == 409
            assert client.post("/v1/upgrade/plan/cancel", json={}).json()["state"] == "none"
            assert not children(os.getpid())

            client.post("/v1/upgrade/plan", json={"candidate": "new"})
            steps = set()
            deadline = time.monotonic() + SECONDS
            while (job := client.get("/v1/upgrade/plan").json())["state"] == "running":
                assert time.monotonic() < deadline
                steps.add(job["step"])
                time.sleep(0.02)
            assert job["state"] == "done", job
            assert all(steps)  # which of them are seen is a matter of speed
            plan = job["plan"]
            assert plan["candidate"] == "new"
            assert plan["new_quality"] > plan["old_quality"]
            chosen = [line for line in plan["lines"] if line["recommended"]]
            assert (plan["recommendation"], len(chosen)) == ("upgrade", 1), plan["reason"]
            for line in plan["lines"]:
                assert len(line["shares"]) == len(line["quality"]) == len(line["low"]) == len(line["high"])
                assert all(
                    low <= q <= high for low, q, high in zip(line["low"], line["quality"], line["high"], strict=True)
                )
            assert view(client)["plan"] == plan
            begun = client.post("/v1/upgrade/start", json={"candidate": "new"})
            assert begun.json()["strategy"] == chosen[0]["strategy"]
            assert begun.json()["plan"] == plan

    def test_a_plan_that_cannot_be_made_says_why(self, light):
        (light.folder / "new.npy").unlink()
        with light.served() as client:
            client.post("/v1/upgrade/plan", json={"candidate": "new"})
            deadline = time.monotonic() + SECONDS
            while (job := client.get("/v1/upgrade/plan").json())["state"] == "running":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert job["state"] == "failed"
            assert "there is no such file" in job["error"]
            assert str(light.folder) not in job["error"]


class TestEvents:
    def test_a_slow_reader_is_told_the_newest_state_and_one_that_leaves_is_forgotten(self, light):
        async def scenario() -> None:
            settings = settings_for(light.path)
            with open_gallery(light.path) as gallery:
                metrics = Metrics(gallery)
                async with Control(settings, gallery, Encoders(settings, gallery, metrics), metrics) as control:
                    stop = asyncio.Event()
                    slow = control.changes(stop, beat=0.3)
                    first = await anext(slow)
                    assert first is not None and control.streams == 1
                    seen = [first]
                    for number in range(4):
                        gallery.add([f"more-{number}"], np.ones((1, DIM), np.float32))
                        await asyncio.sleep(0.3)  # each is seen by a look of its own
                    seen.append(await anext(slow))
                    assert seen[1] is not None and seen[1] > first
                    assert await anext(slow) is None  # nothing is left over from the four
                    await slow.aclose()
                    assert control.streams == 0
                    other = control.changes(stop, beat=60)
                    await anext(other)
                    asyncio.get_running_loop().call_later(0.1, stop.set)
                    assert [number async for number in other] == []

        asyncio.run(scenario())

    def test_a_stream_tells_the_gallery_and_the_upgrade_and_its_client_may_go(self, light):
        with running_server(light.path) as running:
            with httpx.stream("GET", f"{running.url}/v1/events", timeout=SECONDS) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                events = _events(answer.iter_lines())
                first = dict(next(events) for _ in range(2))
                assert first["gallery"]["items"] == ITEMS
                assert first["upgrade"]["state"] == "none"
                with open_gallery(light.path) as gallery:
                    gallery.delete(["item-3"])
                assert next(events)[1]["items"] == ITEMS - 1
            assert running.stop() == 0


class Listener:
    """Reads a stream of events in a thread."""

    def __init__(self, url: str) -> None:
        self.told: list[dict[str, Any]] = []
        self._url = url
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            with httpx.stream("GET", f"{self._url}/v1/events", timeout=SECONDS) as answer:
                for name, data in _events(answer.iter_lines()):
                    if name == "upgrade":
                        self.told.append(data)
        except httpx.HTTPError:  # the service was killed
            return

    def until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not (self.told and holds(self.told[-1])):
            assert time.monotonic() < deadline, self.told[-1:]
            time.sleep(0.02)


def _events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in lines:
        key, _, value = line.partition(": ")
        if key == "event":
            name = value
        elif key == "data":
            yield name, json.loads(value)
