"""What is particular to galleries in PostgreSQL, against a real server."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner

from bowerbird.cli import main
from bowerbird.errors import (
    GalleryError,
    GalleryLockedError,
    InputError,
    SnapshotGoneError,
    SpaceError,
    StoreUnavailableError,
    UnknownNameError,
    UpgradeError,
)
from bowerbird.gallery import Gallery, Space, create_gallery, open_gallery
from bowerbird.gallery.copy import copy_gallery
from bowerbird.testing.store_contract import NAMES, QUERIES, fill, same
from bowerbird.testing.store_world import FIRST, SECOND, begin, encode, vectors, work
from bowerbird.upgrade import ItemEncoder, Upgrade
from bowerbird.upgrade.plan import plan
from bowerbird_scale.postgres import tasks
from bowerbird_scale.postgres.connection import Address

Url = Callable[[], str]


@pytest.fixture
def url(postgres_url: Url) -> str:
    return postgres_url()


@pytest.fixture
def gallery(url: str):
    with create_gallery(url, FIRST) as gallery:
        fill(gallery)
        yield gallery


# -------------------------------------------------------------------------------------------------------- addresses


def test_a_password_is_given_to_the_server_and_to_nobody_else() -> None:
    for url in (
        "postgresql://me:se%40cret@db.example:5433/images?gallery=photos&sslmode=require",
        "postgres://me@db.example:5433/images?password=se%40cret&gallery=photos&sslmode=require",
    ):
        address = Address.parse(url)
        assert psycopg.conninfo.conninfo_to_dict(address.conninfo)["password"] == "se@cret"
        assert address.name == "postgresql://me@db.example:5433/images?sslmode=require&gallery=photos"
        assert address.schema == "bowerbird_photos"
    assert Address.parse("postgresql:///images").schema == "bowerbird_main"
    assert Address.parse("postgresql:///images").conninfo == "postgresql:///images?"
    with pytest.raises(InputError, match="gallery's name"):
        Address.parse("postgresql:///images?gallery=Fo%22o")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:se/cret@db/x",
        "postgresql://me:12/cret@db/x",
        "postgresql://me:se?cret@db/x",
        "postgresql://me:se#cret@db/x",
        "postgresql://me:100%secret@db/x",
        "postgresql://me:se%00cret@db/x",
        "postgresql://me:secret@[::1/x",
        "postgresql://me:secret@db:port/x",
        "postgresql://me:secret@db/x?gallry=photos",
        "postgresql://me:secret@db/x?connect_timeout=soon",
        "postgres:secret",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_a_piece_of_its_password(url: str) -> None:
    with pytest.raises(InputError, match=r"cannot be (read|used)") as caught:
        open_gallery(url)
    assert "cret" not in str(caught.value) and "se/" not in str(caught.value)
    assert "12" not in str(caught.value) and "100" not in str(caught.value)


def test_an_address_that_is_printed_has_no_password_in_it() -> None:
    url = "qdrant+postgresql://me:secret@db/x?qdrant=http://me:secret@q:6333&qdrant_api_key=secret&gallery=g"
    address = Address.parse(url)
    assert address.name == "qdrant+postgresql://me@db/x?qdrant=http://me:***@q:6333&gallery=g"
    assert "secret" not in repr(address)


def test_the_first_galleries_of_a_database_can_be_created_at_once(postgres_server: str, url: str) -> None:
    parts = urlsplit(postgres_server)
    name = f"bowerbird_fresh_{os.getpid()}"
    with psycopg.connect(postgres_server, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            fresh = f"postgresql://{parts.netloc}/{name}?{parts.query}"
            with psycopg.connect(fresh) as slow, ThreadPoolExecutor(3) as pool:
                slow.execute("SELECT pg_advisory_xact_lock(hashtext('bowerbird pgvector'))")
                made = [pool.submit(create_gallery, f"{fresh}&gallery=g{n}", FIRST) for n in range(3)]
                time.sleep(0.3)  # all of them have seen that the extension is missing
                slow.commit()
                for one in made:
                    one.result().close()
        finally:
            db.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_a_server_that_does_not_answer_is_said_to_be_away_without_the_password() -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        open_gallery("postgresql://me:secret@127.0.0.1:1/images?connect_timeout=1")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1:1/images" in str(caught.value)


def test_galleries_in_one_database_do_not_see_each_other(gallery: Gallery, postgres_url: Url) -> None:
    with create_gallery(postgres_url(), SECOND) as other:
        fill(other, SECOND)
        gallery.delete(NAMES[:5])
        assert (len(gallery), len(other)) == (35, 40)


# ------------------------------------------------------------------------------------------------ equal to a folder


def test_lists_and_distances_are_those_of_the_embedded_gallery_at_every_moment(
    gallery: Gallery, tmp_path: Path
) -> None:
    with Gallery.create(tmp_path / "folder", FIRST) as folder:
        fill(folder)
        for one in (gallery, folder):
            begin(one, SECOND, seed=5)
        for _ in range(5):
            for one in (gallery, folder):
                work(one, tasks=1)
            for where in (None, {"year": [1, 2]}, {"kind": "even", "year": 0}):
                first, second = (one.search(QUERIES_OF_TWO, 12, where=where) for one in (gallery, folder))
                assert first.ids == second.ids
                assert np.array_equal(first.distances, second.distances)
                assert np.array_equal(first.sides, second.sides)
        assert gallery.counts() == folder.counts()


def test_many_queries_together_find_what_each_finds_alone(gallery: Gallery, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    many = rng.standard_normal((300, FIRST.dim)).astype(np.float32)
    gallery.add([f"copy-{n}" for n in range(70)], np.repeat(vectors(["copy"], FIRST), 70, axis=0))
    many[:5] = vectors(["copy"], FIRST)
    for where in (None, {"year": [0, 3]}):
        together = gallery.search(many, 9, where=where)
        for row in (0, 4, 5, 255, 256, 299):
            alone = gallery.search(many[row], 9, where=where)
            assert together.ids[row] == alone.ids[0]
            assert np.array_equal(together.distances[row], alone.distances[0])
    assert gallery.search(many, 200).ids[7] == gallery.search(many[7], 200).ids[0]


def test_plan_run_watch_and_finish_on_a_server(gallery: Gallery) -> None:
    gallery.register_space(SECOND)
    gallery.relate(SECOND.fingerprint, FIRST.fingerprint)
    with Upgrade(
        gallery, lambda items: encode(items, SECOND), old=lambda items: encode(items, FIRST), space=SECOND
    ) as upgrade:
        plan = upgrade.plan(label_key="year", sample=20)
        assert plan.items == 40
        report = upgrade.run(strategy="core:compatible", label_key="year", stop_at_share=0.4, watch_every=0.2)
        assert report.reason == "stop-at-share"
        assert len(report.watched) == len(upgrade.history()) >= 1
        assert 0.4 <= upgrade.status().share < 0.6
        assert upgrade.run().reason == "complete"
        assert upgrade.watch().share == 1.0
        assert upgrade.finish()["pending"] == 0
    assert gallery.snapshot().serving == SECOND.fingerprint


QUERIES_OF_TWO = {space.fingerprint: QUERIES[space.fingerprint] for space in (FIRST, SECOND)}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gallery_moves_to_postgres_and_back_bit_for_bit(tmp_path: Path, url: str, dtype: str) -> None:
    with Gallery.create(tmp_path / "folder", FIRST, dtype=dtype) as folder:
        fill(folder)
        folder.add(["numbers"], vectors(["numbers"], FIRST), metadata=[{"west": -0.0, "ns": 1.7e18}])
        copied = copy_gallery(folder, url)
        with open_gallery(url) as there:
            assert there.storage.dtype == dtype
            same(there, folder, FIRST)
            back = copy_gallery(there, str(tmp_path / "back"))
            assert (back.digest, back.items) == (copied.digest, 41)


def test_vectors_of_many_widths_are_kept_exactly_and_too_wide_ones_are_refused_before_anything_is_made(
    postgres_url: Url, gallery: Gallery
) -> None:
    rng = np.random.default_rng(0)
    for dim in (1, 1999, 2500):
        space = Space(f"wide-{dim}", "test", dim)
        rows = rng.standard_normal((5, dim)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        with create_gallery(postgres_url(), space) as one:
            one.add(list("abcde"), rows)
            assert np.array_equal(one.vectors_of(list("abcde")), rows)
    wide = Space("wide", "test", 16_001)
    with pytest.raises(SpaceError, match="at most 16000"):
        create_gallery(postgres_url(), wide)
    with pytest.raises(SpaceError, match="at most 16000"):
        begin(gallery, wide)

    def encode_nothing(items: object) -> np.ndarray:
        raise AssertionError("it is refused before an item is encoded")

    with pytest.raises(SpaceError, match="at most 16000"):
        plan(gallery, ItemEncoder(encode_nothing, space=wide), label_key="kind")
    assert gallery.store.upgrade_state() is None and gallery.spaces() == [FIRST]


# ----------------------------------------------------------------------------------------------------- the server


def test_a_transaction_that_the_server_ended_for_its_idleness_is_a_store_that_is_away(gallery: Gallery) -> None:
    """So that a worker on a machine that stood still tries again."""
    with pytest.raises(StoreUnavailableError, match="idle-in-transaction"), gallery.storage.db.writing("test") as db:
        db.execute("SET LOCAL idle_in_transaction_session_timeout = '20ms'")
        time.sleep(0.2)
        db.execute("SELECT 1")
    assert len(gallery) == len(NAMES)


def cut_off(gallery: Gallery, server: str) -> None:
    """End every connection of the gallery, as a server that restarts does."""
    pids = [connection.info.backend_pid for connection in gallery.storage.db._connections.values()]
    with psycopg.connect(server, autocommit=True) as db:
        db.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", (pids,))


def losing_the_server(gallery: Gallery, server: str, monkeypatch: pytest.MonkeyPatch, at: tuple[int, ...]) -> None:
    """The server ends its connections in the middle of the commits with these numbers, of 1, 2, 3, ..."""
    check_lease, commits = tasks.check_lease, []

    def cutting(db, task):
        commits.append(task)
        if len(commits) in at:
            cut_off(gallery, server)
        check_lease(db, task)

    monkeypatch.setattr(tasks, "check_lease", cutting)


def test_after_the_server_was_away_the_next_call_connects_again(
    gallery: Gallery, postgres_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(gallery, SECOND)
    task = gallery.store.lease_task("worker")
    losing_the_server(gallery, postgres_server, monkeypatch, at=(1,))
    with pytest.raises(StoreUnavailableError):
        gallery.store.commit_task(task, task.nums, encode(task.items, SECOND))
    gallery.store.commit_task(task, task.nums, encode(task.items, SECOND))
    assert gallery.counts()[SECOND.fingerprint] == 8


def test_run_is_patient_with_a_server_that_goes_away_in_the_middle(
    gallery: Gallery, postgres_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.register_space(SECOND)
    gallery.relate(SECOND.fingerprint, FIRST.fingerprint)
    encoded: list[int] = []

    def encode_and_count(items):
        encoded.append(len(items))
        return encode(items, SECOND)

    losing_the_server(gallery, postgres_server, monkeypatch, at=(2, 4))
    upgrade = Upgrade(gallery, encode_and_count, space=SECOND)
    with pytest.warns(RuntimeWarning, match="does not answer"):
        report = upgrade.run(strategy="core:compatible", task_items=8)
    assert report.reason == "complete"
    assert sum(encoded) == 40  # nothing was encoded twice: only the operation that failed is repeated
    assert upgrade.finish()["items"] == 40


def test_a_second_writer_waits_and_is_told_who_writes(gallery: Gallery, url: str) -> None:
    with open_gallery(url, lock_timeout=0.3) as impatient, open_gallery(url, lock_timeout=20) as patient:
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with gallery.storage.db.writing("hold the gallery"):
                entered.set()
                leave.wait(20)

        holder = threading.Thread(target=hold)
        holder.start()
        entered.wait(10)
        with pytest.raises(GalleryLockedError, match="bowerbird hold the gallery"):
            impatient.delete(["id-000"])
        threading.Timer(0.3, leave.set).start()
        patient.delete(["id-000"])
        holder.join()
    assert len(gallery) == 39


def test_the_lease_of_a_worker_is_measured_by_the_clock_of_the_server(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(gallery, SECOND, task_items=40)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the worker's own clock jumps back by half a century
    task = gallery.store.lease_task("worker", 60)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert gallery.store.lease_task("other", 60) is None
    gallery.store.commit_task(task, task.nums, encode(task.items, SECOND))


def test_a_snapshot_from_before_a_finish_is_refused_and_a_new_search_goes_on(gallery: Gallery) -> None:
    begin(gallery, SECOND)
    work(gallery)
    before = gallery.snapshot()
    gallery.store.finish_upgrade(verified=True)
    with pytest.raises(SnapshotGoneError, match="Take a new snapshot"):
        gallery.search(QUERIES_OF_TWO, 3, snapshot=before)
    assert len(gallery.search(QUERIES[SECOND.fingerprint], 3).ids[0]) == 3


def test_a_search_that_an_end_of_the_upgrade_overtakes_is_refused_and_never_empty(gallery: Gallery, url: str) -> None:
    """The old vectors are dropped between the moment in which a search chose its epoch and its first look at them."""
    begin(gallery, SECOND)
    with open_gallery(url) as searching:
        taken = searching.snapshot()
        work(gallery)
        with pytest.raises(SnapshotGoneError), searching.storage.db.reading() as db:
            assert db.value("SELECT floor FROM head") == 0  # this transaction keeps to the present state from here on
            gallery.store.finish_upgrade(verified=True)
            searching.search(QUERIES_OF_TWO, 5, snapshot=taken)


def test_items_that_are_deleted_while_a_rollback_encodes_them_stay_deleted_and_later_ones_are_encoded_too(
    gallery: Gallery, url: str
) -> None:
    begin(gallery, SECOND)
    gallery.add(["late", "later"], vectors(["late", "later"], SECOND), space=SECOND.fingerprint)
    seen: list[str] = []

    def slowly(items):
        if not seen:  # another program goes on meanwhile: a rollback keeps nobody from writing while it encodes
            with open_gallery(url) as other:
                other.delete(["late"])
                other.add(["last"], vectors(["last"], SECOND), space=SECOND.fingerprint)
        seen.extend(item.id for item in items)
        return encode(items, FIRST)

    assert gallery.store.rollback(encode_old=slowly) == 0
    assert seen == ["late", "later", "last"]
    assert [item.id for item in gallery.items()] == [*NAMES, "later", "last"]
    assert sorted(gallery.search(QUERIES[FIRST.fingerprint], 50).ids[0]) == sorted([*NAMES, "later", "last"])
    assert gallery.counts() == {FIRST.fingerprint: 42}
    assert gallery.verify().ok


def test_two_that_roll_back_at_once_encode_twice_and_write_once(gallery: Gallery, url: str) -> None:
    begin(gallery, SECOND)
    gallery.add(["late"], vectors(["late"], SECOND), space=SECOND.fingerprint)
    both = threading.Barrier(2)

    def roll_back() -> str:
        with open_gallery(url) as mine:
            try:
                mine.store.rollback(encode_old=lambda items: both.wait(20) * 0 + encode(items, FIRST))
            except UpgradeError as exc:
                return str(exc)
            return "done"

    with ThreadPoolExecutor(2) as pool:
        said = sorted(one.result() for one in [pool.submit(roll_back), pool.submit(roll_back)])
    assert said[0] == "done"
    assert said[1] == "done" or "by another process" in said[1] or "no upgrade" in said[1]
    assert gallery.verify().ok
    assert np.array_equal(gallery.vectors_of(["late"]), vectors(["late"], FIRST))


def test_a_rollback_that_another_upgrade_overtakes_leaves_that_one_alone(gallery: Gallery, url: str) -> None:
    same_width = Space("contract-space-4", "contract:fourth", FIRST.dim)
    begin(gallery, same_width)
    gallery.add(["late"], vectors(["late"], same_width), space=same_width.fingerprint)
    work(gallery)

    def slowly(items):
        with open_gallery(url) as other:
            other.store.finish_upgrade(verified=True)
            begin(other, SECOND)
        return encode(items, FIRST)

    with pytest.raises(UpgradeError, match="by another process"):
        gallery.store.rollback(encode_old=slowly)
    assert gallery.store.upgrade_state().new == SECOND.fingerprint
    assert np.array_equal(gallery.vectors_of(["late"], same_width.fingerprint), vectors(["late"], same_width))


def test_pending_items_that_another_process_filled_are_not_filled_again(gallery: Gallery) -> None:
    begin(gallery, SECOND)
    gallery.add(["late"], vectors(["late"], SECOND), space=SECOND.fingerprint)
    gallery.store.rollback(leave_pending=True)
    nums = np.array([gallery.get("late").num])
    gallery.store.fill(nums, vectors(["late"], FIRST))
    with pytest.raises(UnknownNameError, match="not pending any more: 'late'"):
        gallery.store.fill(nums, vectors(["other"], FIRST))
    assert np.array_equal(gallery.vectors_of(["late"]), vectors(["late"], FIRST))


def test_a_nul_is_refused_and_what_only_looks_like_one_is_kept(gallery: Gallery) -> None:
    gallery.add(["y"], vectors(["y"], FIRST), metadata=[{"a": "\\u0000"}])
    assert gallery.get("y").metadata == {"a": "\\u0000"}
    with pytest.raises(InputError, match="NUL"):
        gallery.add(["x"], vectors(["x"], FIRST), metadata=[{"a": "\\\0"}])
    assert "x" not in gallery


def test_lost_and_damaged_rows_are_found_by_verify(gallery: Gallery, url: str) -> None:
    address = Address.parse(url)
    with psycopg.connect(address.conninfo, autocommit=True) as db:
        db.execute(f'SET search_path = "{address.schema}", public')
        nums = [gallery.get(name).num for name in ("id-003", "id-004")]
        db.execute("DELETE FROM vec_1 WHERE num = %s", (nums[0],))
        db.execute("UPDATE vec_1 SET vec = vec + vec WHERE num = %s", (nums[1],))
    report = gallery.verify()
    assert not report.ok
    assert report.damaged_ids == ["id-003", "id-004"]


def test_an_exact_search_uses_no_index_that_happens_to_be_there(gallery: Gallery) -> None:
    """A build that was killed leaves its index behind."""
    with gallery.storage.db.outside() as db:
        db.execute("CREATE INDEX ON vec_1 USING ivfflat (vec vector_ip_ops) WITH (lists = 20)")
    with gallery.storage.db.reading() as db:
        db.execute("SET LOCAL enable_seqscan = off")
        db.execute("SET LOCAL enable_sort = off")
        found = gallery.search(QUERIES[FIRST.fingerprint], 40)  # one list of twenty is looked at by default
        assert sorted(found.ids[0]) == NAMES


# ----------------------------------------------------------------------------------------------------- the command


def test_the_commands_of_a_gallery_take_a_url(url: str, tmp_path: Path) -> None:
    def bowerbird(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    np.save(tmp_path / "v.npy", vectors(NAMES, FIRST))
    (tmp_path / "ids.txt").write_text("\n".join(NAMES))
    bowerbird("gallery", "create", url, "--dim", "12", "--name", "contract")
    added = bowerbird("gallery", "add", url, "--vectors", str(tmp_path / "v.npy"), "--ids", str(tmp_path / "ids.txt"))
    assert "added 40" in added
    assert json.loads(bowerbird("gallery", "info", url, "--json"))["items"] == 40
    assert "id-007" in bowerbird("gallery", "search", url, "--id", "id-007", "-k", "1")
    assert "ok" in bowerbird("gallery", "verify", url)
    assert "40 items" in bowerbird("gallery", "stats", url)
    assert "deleted 1" in bowerbird("gallery", "delete", url, "id-007")
    assert "39 items" in bowerbird("gallery", "copy", url, "--to", str(tmp_path / "copy"))
    with pytest.raises(GalleryError, match="there is no gallery"):
        open_gallery(f"{url}-not")
