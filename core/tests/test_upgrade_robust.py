"""A run when things around it go wrong: clocks that jump, a store that goes away, workers that die elsewhere."""

from __future__ import annotations

import signal
import sqlite3
import time

import numpy as np
import pytest
import upgrade_world
from upgrade_world import by_item, item_id, make_gallery, new_encoder, stored

from bowerbird.errors import GalleryLockedError, InputError, StoreUnavailableError
from bowerbird.gallery import Gallery
from bowerbird.gallery.tasks import LeaseLostError
from bowerbird.registry import get_registry
from bowerbird.upgrade import ItemEncoder, begin, status
from bowerbird.upgrade.patience import Patience, may_pass
from bowerbird.upgrade.run import run

STRATEGY = "world:two-queries"
ITEMS = 120
ELSEWHERE = "another-host:4711:ab12"


@pytest.fixture(autouse=True)
def world():
    get_registry().register_module("world", upgrade_world)
    yield
    get_registry().unregister("world")


@pytest.fixture
def gallery(tmp_path):
    with make_gallery(tmp_path / "g", ITEMS) as gallery:
        begin(gallery, new_encoder().space(), strategy=STRATEGY, task_items=20)
        yield gallery


@pytest.fixture
def clock(monkeypatch):
    """The wall clock of leases, which a test may set; monotonic clocks go on."""

    class Clock:
        ahead = 0.0

        def time(self):
            return time.time() + self.ahead

    own = Clock()
    monkeypatch.setattr("bowerbird.gallery.store.time", own)
    return own


def all_new(gallery) -> bool:
    vectors = gallery.vectors_of([item_id(n) for n in range(ITEMS)])
    return status(gallery).share == 1 and np.array_equal(vectors, new_encoder().vectors(range(ITEMS)))


class TestClocks:
    def test_a_jump_forward_gives_a_task_to_a_second_worker_and_only_one_of_them_commits(self, gallery, clock):
        with Gallery.open(gallery.path) as other:
            first = gallery.store.lease_task("host-a:1:aa", 120)
            clock.ahead = 86_400.0  # the second worker's clock is a day ahead: the lease looks long expired
            second = other.store.lease_task("host-b:1:bb", 120)
            assert (second.id, second.token) == (first.id, first.token + 1)
            other.store.commit_task(second, second.nums, new_encoder()(second.items))
            with pytest.raises(LeaseLostError):
                gallery.store.commit_task(first, first.nums, -new_encoder()(first.items))
        assert run(gallery, by_item(new_encoder())).share == 1
        assert all_new(gallery)
        assert gallery.verify().ok

    def test_a_worker_whose_clock_jumps_while_it_encodes_commits_once(self, gallery, clock):
        def encode(items):
            clock.ahead += 86_400.0
            return new_encoder()(items)

        report = run(gallery, ItemEncoder(encode, space=new_encoder().space()))
        assert (report.encoded, report.reason) == (ITEMS, "complete")
        assert all_new(gallery)

    def test_a_jump_back_does_not_hang_on_a_lease_far_in_the_future(self, gallery, clock, monkeypatch):
        monkeypatch.setattr("bowerbird.upgrade.run.LEASE_SECONDS", 0.3)
        clock.ahead = 365 * 86_400.0
        gallery.store.lease_task(ELSEWHERE, 120)  # and its owner dies
        clock.ahead = 0.0
        started = time.monotonic()
        assert run(gallery, by_item(new_encoder())).share == 1
        assert 0.3 < time.monotonic() - started < 10
        assert all_new(gallery)


class TestWorkersElsewhere:
    def test_a_dead_workers_task_comes_back_when_its_lease_runs_out(self, gallery):
        gallery.store.lease_task(ELSEWHERE, 0.4)
        started = time.monotonic()
        assert run(gallery, by_item(new_encoder())).share == 1
        assert time.monotonic() - started >= 0.3, "until then its owner may be alive"

    def test_a_run_says_what_it_waits_for(self, gallery, monkeypatch):
        monkeypatch.setattr("bowerbird.upgrade.run.LEASE_SECONDS", 0.8)
        monkeypatch.setattr("bowerbird.upgrade.run.TOLD_SECONDS", 0.2)
        gallery.store.lease_task(ELSEWHERE, 3600)
        said = f"waiting for the last tasks .*{ELSEWHERE}.* no sign for 0.8 s"
        with pytest.warns(RuntimeWarning, match=said) as told:
            assert run(gallery, by_item(new_encoder())).reason == "complete"
        assert len(told) == 1 and all_new(gallery)

    @pytest.mark.filterwarnings("ignore:the store of:RuntimeWarning")
    def test_a_lease_whose_answer_was_lost_on_its_way_is_not_waited_for(self, gallery, monkeypatch):
        lease_task, lost = gallery.store.lease_task, []

        def lose_one_answer(*given, **options):
            task = lease_task(*given, **options)
            if task is not None and not lost:
                lost.append(task.id)
                raise StoreUnavailableError("the connection was cut")
            return task

        monkeypatch.setattr(gallery.store, "lease_task", lose_one_answer)
        began = time.monotonic()
        report = run(gallery, by_item(new_encoder()))
        assert report.reason == "complete" and lost and all_new(gallery)
        assert time.monotonic() - began < 30  # not the two minutes of a lease

    def test_a_living_worker_elsewhere_that_renews_its_lease_keeps_its_task(self, gallery, monkeypatch):
        monkeypatch.setattr("bowerbird.upgrade.run.LEASE_SECONDS", 0.5)
        with Gallery.open(gallery.path) as other:
            task = other.store.lease_task(ELSEWHERE, 120)
            done = []

            def look_in_between(seconds):
                if len(done) < 8:
                    other.store.renew(task, 120)
                    done.append(seconds)
                elif len(done) == 8:
                    other.store.commit_task(task, task.nums, new_encoder()(task.items))
                    done.append(seconds)
                real_sleep(seconds)

            real_sleep = time.sleep
            monkeypatch.setattr("bowerbird.upgrade.run.time.sleep", look_in_between)
            report = run(gallery, by_item(new_encoder()))
        assert len(done) == 9
        assert (report.encoded, report.share) == (ITEMS - 20, 1)

    def test_a_freed_lease_is_refused_at_the_commit_and_a_renewed_one_is_not_freed(self, gallery):
        task = gallery.store.lease_task(ELSEWHERE, 60)
        (seen,) = gallery.store.leases()
        assert (seen.owner, seen.task, seen.token) == (ELSEWHERE, task.id, task.token)
        gallery.store.renew(task, 600)
        assert not gallery.store.free_lease(seen)
        assert gallery.store.free_lease(gallery.store.leases()[0])
        assert gallery.store.leases() == []
        with pytest.raises(LeaseLostError):
            gallery.store.commit_task(task, task.nums, new_encoder()(task.items))


class Failing:
    """A store's method that fails so many times, and then works."""

    def __init__(self, real, error, times):
        self.real, self.error, self.left = real, error, times

    def __call__(self, *args, **options):
        if self.left > 0:
            self.left -= 1
            raise self.error
        return self.real(*args, **options)


AWAY = [
    GalleryLockedError("the catalogue stayed locked for 120 s"),
    StoreUnavailableError("the disk is full"),
    sqlite3.OperationalError("disk I/O error"),
    ConnectionResetError("the server closed the connection"),
    type("OperationalError", (Exception,), {})("terminating connection due to administrator command"),
]


class TestStores:
    @pytest.mark.parametrize("operation", ["lease_task", "commit_task", "progress"])
    @pytest.mark.parametrize("error", AWAY, ids=lambda error: type(error).__name__)
    def test_one_that_comes_back_costs_nothing_but_time(self, gallery, monkeypatch, operation, error):
        monkeypatch.setattr("bowerbird.upgrade.patience.FIRST_WAIT", 0.001)
        failing = Failing(getattr(gallery.store, operation), error, 0)
        monkeypatch.setattr(gallery.store, operation, failing)

        def go_away(count, now):
            if now.new_items == 40 and count == 0:
                failing.left = 3

        with pytest.warns(RuntimeWarning, match="does not answer"):
            report = run(gallery, by_item(new_encoder()), progress=go_away)
        assert (report.encoded, report.reason) == (ITEMS, "complete")
        assert failing.left == 0
        assert all_new(gallery)

    def test_one_that_stays_away_ends_the_run_cleanly_and_it_resumes(self, gallery, monkeypatch):
        with monkeypatch.context() as patch:
            real = gallery.store.commit_task
            failing = Failing(real, sqlite3.OperationalError("database is locked"), 0)
            patch.setattr(gallery.store, "commit_task", failing)

            def go_away(count, now):
                if now.new_items == 40 and count == 0:
                    failing.left = 10**9

            started = time.monotonic()
            with (
                pytest.warns(RuntimeWarning, match="for up to 0.5 s"),
                pytest.raises(
                    StoreUnavailableError, match=r"did not answer for 0.5 s .*upgrade run .* goes on"
                ) as told,
            ):
                run(gallery, by_item(new_encoder()), progress=go_away, store_patience=0.5)
            assert time.monotonic() - started >= 0.5
            assert told.value.exit_code == 75
        assert status(gallery).new_items == 40
        assert run(gallery, by_item(new_encoder())).encoded == ITEMS - 40
        assert all_new(gallery)

    def test_a_catalogue_that_another_process_holds_locked_is_waited_for(self, gallery, monkeypatch):
        monkeypatch.setattr("bowerbird.gallery.catalog.BUSY_SECONDS", 0.05)
        with Gallery.open(gallery.path) as impatient:
            holder = sqlite3.connect(gallery.path / "catalog.db", isolation_level=None, check_same_thread=False)
            holder.execute("BEGIN IMMEDIATE")
            real_sleep = time.sleep

            def let_go(seconds):
                if holder.in_transaction:
                    holder.execute("ROLLBACK")
                real_sleep(min(seconds, 0.01))

            monkeypatch.setattr("bowerbird.upgrade.patience.time.sleep", let_go)
            with pytest.warns(RuntimeWarning, match="locked"):
                assert run(impatient, by_item(new_encoder())).share == 1
            holder.close()

    def test_a_commit_whose_answer_was_lost_is_not_made_twice(self, gallery, monkeypatch):
        real, lost = gallery.store.commit_task, []

        def commit(*args, **options):
            real(*args, **options)
            if not lost:
                lost.append(True)
                raise ConnectionResetError("after the commit")

        monkeypatch.setattr("bowerbird.upgrade.patience.FIRST_WAIT", 0.001)
        monkeypatch.setattr(gallery.store, "commit_task", commit)
        with pytest.warns(RuntimeWarning, match="after the commit"):
            assert run(gallery, by_item(new_encoder())).share == 1
        assert all_new(gallery)
        assert gallery.verify().ok

    def test_an_interrupt_while_the_store_is_away_is_obeyed(self, gallery, monkeypatch, request):
        def away(*args, **options):
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(gallery.store, "commit_task", away)
        monkeypatch.setattr(gallery.store, "release_task", away)
        # The default handler: a test run that was started with `&` has none.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
        monkeypatch.setattr("bowerbird.upgrade.patience.time.sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
        with pytest.warns(RuntimeWarning), pytest.raises(KeyboardInterrupt):
            run(gallery, by_item(new_encoder()))

    def test_errors_that_waiting_does_not_mend_are_raised_at_once(self):
        for error in (InputError("no"), LeaseLostError("no"), ValueError("no"), sqlite3.IntegrityError("no")):
            assert not may_pass(error)
            with pytest.raises(type(error)):
                Patience("g", 60)(Failing(None, error, 1))
        with pytest.raises(InputError, match="store_patience is -1"):
            Patience("g", -1)


class TestHooks:
    @pytest.mark.parametrize("moment", ["batch", "commit"])
    def test_a_progress_function_that_fails_is_dropped_and_loses_no_task(self, gallery, moment):
        calls = []

        def progress(count, now):
            calls.append(count)
            if (count > 0) == (moment == "batch"):
                raise RuntimeError("the terminal is gone")

        with pytest.warns(RuntimeWarning, match="the terminal is gone"):
            report = run(gallery, by_item(new_encoder()), progress=progress)
        assert (report.encoded, report.share) == (ITEMS, 1)
        assert len(calls) == (1 if moment == "batch" else 2)
        assert set(stored(gallery)) == {new_encoder().fingerprint}

    def test_a_stop_in_the_middle_of_a_task_gives_it_back(self, gallery):
        asked = []

        def stop():
            asked.append(True)
            return len(asked) > 8

        report = run(gallery, by_item(new_encoder(), batch_size=5), stop=stop)
        assert report.reason == "stopped"
        assert status(gallery).tasks == {"done": 1, "free": 5}
        assert run(gallery, by_item(new_encoder())).share == 1
