"""Several worker processes on one upgrade: they share it, survive each other, and end where one process would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import upgrade_world
import workers_world
from click.testing import CliRunner
from test_upgrade_cli import ENCODERS
from upgrade_world import by_item, item_id, make_gallery, new_encoder, query_vectors, stored
from workers_world import job

from bowerbird.cli import main
from bowerbird.errors import InputError, UnknownNameError, UpgradeError
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import QuerySet, Upgrade, begin, pause, status
from bowerbird.upgrade.engines import load_executor, make_job, run_workers
from bowerbird.upgrade.executors import LocalExecutor, TorchrunExecutor, thread_environment, threads_per_worker
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import serve

STRATEGY = "world:two-queries"
ITEMS = 600


@pytest.fixture(autouse=True)
def world(monkeypatch):
    get_registry().register_module("world", upgrade_world)
    monkeypatch.setenv("PYTHONPATH", workers_world.HERE)
    yield
    get_registry().unregister("world")


@pytest.fixture
def gallery(tmp_path):
    with make_gallery(tmp_path / "g", ITEMS) as gallery:
        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=20)
        yield gallery


def work(gallery, workers=2, *, progress=None, watch_every=None, max_nfr=None, max_restarts=3, **settings):
    executor = LocalExecutor(workers, max_restarts=max_restarts)
    return run_workers(
        gallery, lambda: job(gallery, **settings), executor, progress=progress, watch_every=watch_every, max_nfr=max_nfr
    )


def test_workers_share_an_upgrade_and_end_at_the_gallery_of_one_process(gallery, tmp_path):
    with make_gallery(tmp_path / "alone", ITEMS) as alone:
        run(alone, by_item(new_encoder()), strategy=STRATEGY, task_items=20)
        expected, results = stored(alone), serve(alone).search(vectors=query_vectors())
    seen = []
    report = work(gallery, delay=0.002, progress=lambda count, now: seen.append((count, now.new_items)))
    assert (report.reason, report.encoded, report.share) == ("complete", ITEMS, 1)
    assert sum(share.encoded for share in report.workers) == ITEMS
    assert all(share.encoded > 0 and share.reason == "complete" for share in report.workers)
    assert stored(gallery) == expected
    found = serve(gallery).search(vectors=query_vectors())
    assert found.ids == results.ids and np.array_equal(found.distances, results.distances)
    assert gallery.verify().ok
    assert sum(count for count, _ in seen) == ITEMS, "one bar can be drawn of what all of them say"
    assert [moved for _, moved in seen][-1] == ITEMS


def test_a_worker_that_is_killed_is_started_again_and_its_task_is_done_by_another(gallery, tmp_path):
    report = work(gallery, die_on=33, once=str(tmp_path / "died"))
    assert (report.reason, report.share) == ("complete", 1)
    assert [share.restarts for share in report.workers] in ([1, 0], [0, 1])
    assert np.array_equal(gallery.vectors_of([item_id(n) for n in range(ITEMS)]), new_encoder().vectors(range(ITEMS)))


def test_an_item_that_kills_every_process_ends_the_run_after_a_bounded_number_of_starts(gallery):
    report = work(gallery, max_restarts=1, die_on=33)
    assert report.reason == "failed"
    assert [(share.reason, share.restarts, share.exit_code) for share in report.workers] == [("failed", 1, 1)] * 2
    assert "SIGKILL" in report.workers[0].error
    assert not gallery.store.progress().complete
    assert run(gallery, by_item(new_encoder())).share == 1, "another process goes on"


def test_an_error_of_the_encoder_is_reported_and_gives_the_task_back(gallery):
    report = work(gallery, max_restarts=0, wrong=True)
    assert report.reason == "failed"
    assert "ZeroDivisionError: a bug in the encoder" in report.workers[0].error
    assert status(gallery).tasks == {"free": 30}


def test_limits_hold_for_all_workers_together(gallery):
    state = gallery.store.upgrade_state()
    limited = make_job(gallery, str(gallery.path), state, "workers_world:load", {"delay": 0.001}, stop_after=100)
    report = run_workers(gallery, lambda: limited, LocalExecutor(2))
    assert (report.reason, report.encoded) == ("stop-after", 100)
    report = work(gallery, stop_at_share=0.5, delay=0.001)
    assert report.reason == "stop-at-share"
    assert report.share == pytest.approx(0.5, abs=20 / ITEMS)
    started = time.monotonic()
    report = work(gallery, rate=400, stop_at_items=400, batch=20)
    assert time.monotonic() - started >= 0.6 * 100 / 400, "the rate is of all of them together"
    assert status(gallery).new_items == pytest.approx(400, abs=20)
    with pytest.raises(InputError, match="rate is -1"):
        make_job(gallery, str(gallery.path), state, "workers_world:load", {}, rate=-1)


def test_a_stop_rule_stops_every_worker(tmp_path):
    worse = upgrade_world.FakeEncoder("new", 24, 1.0, flavour="worse")
    with make_gallery(tmp_path / "g", ITEMS) as gallery:
        watched = Upgrade(gallery, by_item(worse), old=by_item(upgrade_world.old_encoder()))
        watched.join(
            watch=True, strategy=STRATEGY, task_items=20, queries=QuerySet.from_gallery(gallery, "label"),
            label_key="label",
        )  # fmt: skip
        report = work(gallery, delay=0.002, watch_every=0.1, max_nfr=0.0)
        assert report.reason == "stop-rule"
        assert report.watched[-1].stopped and report.share < 1
        assert status(gallery).state == "paused"
        assert status(gallery).tasks.get("leased", 0) == 0


@pytest.mark.parametrize("started_with", [signal.SIG_DFL, signal.SIG_IGN])
def test_ctrl_c_makes_every_worker_give_its_task_back(gallery, request, started_with):
    # A shell starts `command &` with SIGINT ignored, which processes inherit; a launcher still ends it so.
    before = signal.signal(signal.SIGINT, started_with)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def press(count, now):
        if now.new_items > 60:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work(gallery, delay=0.005, batch=10, progress=press)
    assert time.monotonic() - started < 20, "not after the grace of those that do not answer"
    now = status(gallery)
    assert "leased" not in now.tasks
    assert 0 < now.new_items < ITEMS


def test_workers_stop_by_themselves_when_the_process_that_started_them_is_killed(gallery):
    script = (
        "import sys, workers_world\n"
        "from bowerbird.gallery import Gallery\n"
        "from bowerbird.upgrade.engines import run_workers\n"
        "from bowerbird.upgrade.executors import LocalExecutor\n"
        "gallery = Gallery.open(sys.argv[1])\n"
        "said = lambda count, now: print(count, flush=True)\n"
        "job = workers_world.job(gallery, delay=0.02, batch=5)\n"
        "run_workers(gallery, lambda: job, LocalExecutor(2), progress=said)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(gallery.path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while gallery.store.leases() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gallery.store.leases() == [], "what they had in hand is given back"
    assert status(gallery).new_items < ITEMS


def test_a_broken_progress_function_costs_nothing(gallery):
    def broken(count, now):
        raise ValueError("no terminal")

    with pytest.warns(RuntimeWarning, match="progress function failed"):
        assert work(gallery, progress=broken).share == 1


def test_workers_of_a_paused_or_ended_upgrade_do_nothing(gallery):
    waiting = job(gallery)
    pause(gallery)
    assert run_workers(gallery, lambda: waiting, LocalExecutor(2)).reason == "paused"
    gallery.store.rollback()
    begin(gallery, new_encoder().space(), strategy=STRATEGY)
    report = run_workers(gallery, lambda: waiting, LocalExecutor(1))
    assert (report.reason, report.encoded, status(gallery).new_items) == ("ended", 0, 0)


def test_each_worker_gets_its_part_of_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [threads_per_worker(n) for n in (1, 2, 3, 8, 16)] == [8, 4, 2, 1, 1]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    assert thread_environment(4)["OMP_NUM_THREADS"] == "4"
    assert thread_environment(4)["MKL_NUM_THREADS"] == "1", "what the user asked for stays"


def test_executors_are_records_and_wrong_ones_are_named():
    assert load_executor("local") is LocalExecutor
    with pytest.raises(UnknownNameError, match="local"):
        load_executor("locol")
    with pytest.raises(InputError, match="at least 1"):
        LocalExecutor(0)
    pytest.importorskip("torch")
    assert load_executor("core:torchrun") is TorchrunExecutor


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def encoders(self, monkeypatch):
        monkeypatch.setattr("bowerbird.cli.upgrade_parts.load", lambda ref, device: ENCODERS[ref]())
        monkeypatch.setattr("bowerbird.cli.upgrade.WORKER_LOADER", "workers_world:load")

    def make(self, folder, count):
        (folder / "images").mkdir()
        make_gallery(folder / "g", count, images=folder / "images").close()

    def invoke(self, *arguments, code=0):
        result = CliRunner().invoke(main, ["upgrade", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    def test_begins_once_and_reports_each_share(self, tmp_path):
        self.make(tmp_path, 200)
        said = self.invoke("run", tmp_path / "g", "--to", "fake:new", "--strategy", "two-queries", "--task-items", 10,
                           "--stop-at-share", 0.5, "--workers", 2, "--json").stdout  # fmt: skip
        report = json.loads(said)
        assert report["reason"] == "stop-at-share"
        assert [share["index"] for share in report["workers"]] == [0, 1]
        text = self.invoke("run", tmp_path / "g", "--workers", 2).stdout
        assert "100.0% of the gallery is new" in text
        assert "worker 1: " in text
        with Gallery.open(tmp_path / "g") as gallery:
            assert len(gallery.store.history()) == 1
            assert status(gallery).share == 1

    def test_torchrun_without_torchrun_says_how_to_start_it(self, tmp_path, monkeypatch):
        pytest.importorskip("torch")
        monkeypatch.delenv("RANK", raising=False)
        self.make(tmp_path, 20)
        refused = self.invoke("run", tmp_path / "g", "--to", "fake:new", "--engine", "torchrun", "--workers", 3, code=2)
        assert "torchrun --nproc-per-node 3 -m bowerbird upgrade run" in refused.stderr

    def test_a_run_that_failed_has_an_exit_code(self, tmp_path, monkeypatch):
        monkeypatch.setattr("bowerbird.cli.upgrade.WORKER_LOADER", "workers_world:nothing")
        self.make(tmp_path, 20)
        failed = self.invoke("run", tmp_path / "g", "--to", "fake:new", "--strategy", "two-queries", "--workers", 2,
                             code=1)  # fmt: skip
        assert "worker 0 failed: AttributeError" in failed.stderr

    def test_sigterm_gives_the_task_back_as_ctrl_c_does(self, tmp_path, monkeypatch):
        self.make(tmp_path, 100)

        class Terminated(upgrade_world.FakeEncoder):
            def encode(self, images, **options):
                if len(images) == 10 and self.calls > 2:
                    signal.raise_signal(signal.SIGTERM)
                return super().encode(images, **options)

        monkeypatch.setitem(ENCODERS, "fake:new", lambda: Terminated("new", 24, 1.0))
        self.invoke("run", tmp_path / "g", "--to", "fake:new", "--strategy", "two-queries", "--task-items", 10,
                    code=130)  # fmt: skip
        with Gallery.open(tmp_path / "g") as gallery:
            now = status(gallery)
        assert "leased" not in now.tasks and 0 < now.new_items < 100


def test_a_paused_upgrade_is_refused_before_any_worker_is_started(gallery):
    pause(gallery)
    with pytest.raises(UpgradeError, match="is paused"):
        run_workers(gallery, lambda: Upgrade(gallery, by_item(new_encoder())).join(), LocalExecutor(2))


def test_several_runs_in_several_threads_and_processes_are_workers_too(gallery):
    other = threading.Thread(target=lambda: work(gallery, delay=0.001))
    with Gallery.open(gallery.path) as again:
        other.start()
        run(again, by_item(new_encoder()))
        other.join()
    assert status(gallery).share == 1
    assert gallery.verify().ok


TORCHRUN = """
import json, sys
import upgrade_world
from workers_world import job
from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import begin
from bowerbird.upgrade.engines import load_executor, run_workers

get_registry().register_module("world", upgrade_world)

def begin_once():
    begin(gallery, upgrade_world.new_encoder().space(), strategy="world:two-queries", task_items=20)
    return job(gallery, delay=0.005)

with Gallery.open(sys.argv[1]) as gallery:
    executor = load_executor("torchrun")()
    report = run_workers(gallery, begin_once, executor)
if executor.speaks:
    print(json.dumps(report.to_dict()))
"""


@pytest.mark.slow
def test_under_torchrun_every_rank_is_a_worker_and_rank_0_begins_and_speaks(tmp_path):
    pytest.importorskip("torch")
    make_gallery(tmp_path / "g", ITEMS).close()
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*launcher, str(script), str(tmp_path / "g")], capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (said,) = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    report = json.loads(said)
    assert (report["reason"], report["encoded"], report["share"]) == ("complete", ITEMS, 1)
    assert [share["index"] for share in report["workers"]] == [0, 1]
    assert all(share["encoded"] > 0 for share in report["workers"])
    with Gallery.open(tmp_path / "g") as gallery:
        names = [item_id(n) for n in range(ITEMS)]
        assert np.array_equal(gallery.vectors_of(names), new_encoder().vectors(range(ITEMS)))
