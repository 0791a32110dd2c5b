"""Worker processes that lease from a PostgreSQL catalogue, as they would from any host: the gallery of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("psycopg")
HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)

from ray_world import NEW, OLD, load, vectors  # noqa: E402

from bowerbird.gallery.open import create_gallery  # noqa: E402
from bowerbird.upgrade.engines import make_job, run_workers  # noqa: E402
from bowerbird.upgrade.executors import LocalExecutor  # noqa: E402
from bowerbird.upgrade.run import run  # noqa: E402

NAMES = [f"item-{n:03d}" for n in range(200)]
QUERIES = {space.fingerprint: vectors([f"query-{n}" for n in range(10)], space) for space in (OLD, NEW)}


def begun(url: str):
    gallery = create_gallery(url, OLD)
    gallery.add(NAMES, vectors(NAMES, OLD))
    state = gallery.store.begin_upgrade(NEW, strategy="core:full", order_name="core:random", task_items=10)
    return gallery, state


def outcome(gallery):
    assert gallery.verify().ok
    found = gallery.search(QUERIES, 20)
    return gallery.vectors_of(NAMES).tobytes(), found.ids, found.distances.tobytes()


def test_two_processes_one_of_them_killed_end_at_the_gallery_of_one(postgres_url, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    with begun(postgres_url())[0] as alone:
        run(alone, load({}, alone, NEW, 0))
        expected = outcome(alone)
    url = postgres_url()
    gallery, state = begun(url)
    with gallery:
        died = tmp_path / "died"
        faults = {"delay": 0.002, "die_once": str(died), "die_on": "item-100"}
        job = make_job(gallery, url, state, "ray_world:load", faults)
        report = run_workers(gallery, lambda: job, LocalExecutor(2))
        assert (report.reason, report.share) == ("complete", 1)
        assert died.exists() and sum(share.restarts for share in report.workers) == 1
        assert all(share.encoded > 0 for share in report.workers)
        assert outcome(gallery) == expected
        assert np.array_equal(gallery.vectors_of(NAMES), vectors(NAMES, NEW))


def test_limits_and_a_lease_of_another_host_hold_here_too(postgres_url, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    url = postgres_url()
    gallery, state = begun(url)
    with gallery:
        job = make_job(gallery, url, state, "ray_world:load", {"delay": 0.001}, stop_after=60)
        report = run_workers(gallery, lambda: job, LocalExecutor(2))
        # Tasks have 10 items; a worker whose view is a moment old may finish one more.
        assert report.reason == "stop-after" and 60 <= report.encoded <= 70
        gallery.store.lease_task("another-host:1:ab", 0.3)  # dies
        assert run(gallery, load({}, gallery, NEW, 0)).share == 1


def cut_all_connections(server):
    import psycopg

    with psycopg.connect(server, autocommit=True) as db:
        (number,) = db.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        ).fetchone()
    return number


@pytest.mark.filterwarnings("ignore:the store of:RuntimeWarning")  # where the server's farewell comes during a call
def test_a_server_that_drops_its_connections_in_the_middle_costs_nothing_but_time(postgres_url, postgres_server):
    gallery, _ = begun(postgres_url())
    cut: list[int] = []

    def cut_once(count, now):
        if now.new_items >= 50 and count and not cut:
            cut.append(cut_all_connections(postgres_server))

    with gallery:
        report = run(gallery, load({}, gallery, NEW, 0), progress=cut_once)
        assert cut[0] >= 1
        assert (report.reason, report.share) == ("complete", 1)
        assert gallery.verify().ok
        assert np.array_equal(gallery.vectors_of(NAMES), vectors(NAMES, NEW))


@pytest.mark.filterwarnings("ignore:the store of:RuntimeWarning")  # where the server's farewell comes during a call
def test_the_process_that_started_workers_waits_for_its_server_too(postgres_url, postgres_server, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", HERE)
    url = postgres_url()
    gallery, state = begun(url)
    cut: list[int] = []

    def cut_once(count, now):
        if now.new_items >= 50 and not cut:
            cut.append(cut_all_connections(postgres_server))

    with gallery:
        job = make_job(gallery, url, state, "ray_world:load", {"delay": 0.002})
        report = run_workers(gallery, lambda: job, LocalExecutor(2), progress=cut_once)
        assert cut[0] >= 2
        assert (report.reason, report.share) == ("complete", 1)
        assert np.array_equal(gallery.vectors_of(NAMES), vectors(NAMES, NEW))
