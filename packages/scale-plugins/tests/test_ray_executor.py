"""Workers of an upgrade as actors of a local Ray: they share the work, die and come back, and give tasks back."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

ray = pytest.importorskip("ray")
HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)

from ray_world import NEW, OLD, vectors  # noqa: E402

from bowerbird.errors import InputError  # noqa: E402
from bowerbird.gallery import Gallery  # noqa: E402
from bowerbird.upgrade.engines import load_executor, run_workers  # noqa: E402
from bowerbird.upgrade.worker import Job  # noqa: E402
from bowerbird_scale.ray_executor import _connect  # noqa: E402

# Ray leaves sockets to the end of the process.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
NAMES = [f"item-{n:03d}" for n in range(300)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]))
        patch.delenv("RAY_ADDRESS", raising=False)
        _connect(2)
        yield
        ray.shutdown()


@pytest.fixture
def gallery(tmp_path):
    with Gallery.create(tmp_path / "g", OLD) as gallery:
        gallery.add(NAMES, vectors(NAMES, OLD))
        gallery.store.begin_upgrade(NEW, strategy="core:full", order_name="core:random", task_items=20)
        yield gallery


def job(gallery, **settings) -> Job:
    return Job(str(gallery.path), gallery.store.upgrade_state().id, "ray_world:load", settings)


def test_two_workers_give_the_gallery_of_one_process_also_when_one_is_killed(gallery, tmp_path):
    executor = load_executor("ray")(2)
    died = tmp_path / "died"
    seen = []
    report = run_workers(
        gallery, lambda: job(gallery, delay=0.002, die_once=str(died), die_on="item-100"), executor,
        progress=lambda count, now: seen.append(now.new_items),
    )  # fmt: skip
    assert (report.reason, report.share) == ("complete", 1)
    assert died.exists()
    assert sum(share.restarts for share in report.workers) == 1
    assert len(report.workers) == 2
    assert np.array_equal(gallery.vectors_of(NAMES), vectors(NAMES, NEW))
    assert gallery.verify().ok
    assert seen[-1] == len(NAMES)


def test_ctrl_c_makes_actors_give_their_tasks_back(gallery):
    def press(count, now):
        if now.new_items > 40:
            raise KeyboardInterrupt  # not the signal: what a shell starts with `&` ignores it

    with pytest.raises(KeyboardInterrupt):
        run_workers(gallery, lambda: job(gallery, delay=0.05), load_executor("scale:ray")(2), progress=press)
    assert gallery.store.leases() == []
    assert 0 < gallery.counts()[NEW.fingerprint] < len(NAMES)


def test_a_cluster_that_is_too_small_is_refused(gallery):
    with pytest.raises(InputError, match=r"50 workers need as many CPUs, and the Ray cluster has"):
        run_workers(gallery, lambda: job(gallery), load_executor("ray")(50))
    with pytest.raises(InputError, match="at least 1"):
        load_executor("ray")(0)


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    def silent(**settings):
        raise ConnectionError("ray client connection timeout")  # what Ray says, after 30 seconds

    monkeypatch.setenv("RAY_ADDRESS", "ray://me:secret@head:10001")
    monkeypatch.setattr("bowerbird_scale.ray_executor.ray.init", silent)
    with pytest.raises(InputError, match=r"no Ray cluster at RAY_ADDRESS=ray://me:\*\*\*@head:10001: ray client"):
        _connect(2)


def test_a_folder_cannot_be_reached_from_other_machines(gallery, monkeypatch):
    monkeypatch.setattr("bowerbird_scale.ray_executor.ray.nodes", lambda: [{"Alive": True}, {"Alive": True}])
    with pytest.raises(InputError, match="gallery copy"):
        run_workers(gallery, lambda: job(gallery), load_executor("ray")(2))
