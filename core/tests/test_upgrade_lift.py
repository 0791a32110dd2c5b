"""Lifting a gallery: an upgrade that maps stored vectors and reads no image."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import upgrade_world
from click.testing import CliRunner
from upgrade_world import by_item, item_id, make_gallery, new_encoder, old_encoder, query_vectors, stored

from bowerbird.cli import main
from bowerbird.errors import InputError, SpaceError, UpgradeError
from bowerbird.gallery import Gallery
from bowerbird.gallery.transform import VectorTransform
from bowerbird.registry import get_registry
from bowerbird.upgrade import ItemEncoder, Upgrade, begin
from bowerbird.upgrade.lift import begin_lift, lifted_space, lifter
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import serve
from bowerbird.upgrade.state import finish, rollback, status

OLD, NEW = old_encoder().space(), new_encoder().space()
COUNT = 200


@pytest.fixture(autouse=True)
def world():
    registry = get_registry()
    registry.register_module("world", upgrade_world)
    yield
    registry.unregister("world")


def fitted(source=None, target=None):
    """A ridge map from old to new vectors, fitted on items that are in no gallery."""
    source, target = source or old_encoder(), target or new_encoder()
    numbers = range(50_000, 50_400)
    x, y = source.vectors(numbers), target.vectors(numbers)
    weight = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y).T
    return VectorTransform.linear(source.fingerprint, target.fingerprint, weight, method="tests:ridge",
                                  evidence={"encoder": f"fake:{target.name}"})  # fmt: skip


@pytest.fixture
def gallery(tmp_path):
    with make_gallery(tmp_path / "g", COUNT) as opened:
        yield opened


def nearest(vectors, queries, k):
    """Rows of the nearest of ``vectors``, as an exact search finds them."""
    unit = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    distance = (1 - unit.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


def pairs_of(source=None, target=None):
    """Vectors of both spaces of items that are in no gallery."""
    numbers = range(70_000, 70_100)
    return (source or old_encoder()).vectors(numbers), (target or new_encoder()).vectors(numbers)


def start(gallery, **more):
    return begin_lift(gallery, fitted(), NEW, strategy="world:two-queries", pairs=pairs_of(), **more)


def test_a_lift_starts_at_the_old_system_and_ends_at_the_lifted_one_without_an_image(gallery):
    before = gallery.search(query_vectors()[OLD.fingerprint], 10)
    start(gallery, task_items=64)
    service = serve(gallery)
    both = query_vectors()
    at_start = service.search(vectors=both, k=10)
    assert at_start.ids == before.ids and np.array_equal(at_start.distances, before.distances)
    report = run(gallery, lifter(gallery))
    assert (report.reason, report.encoded) == ("complete", COUNT)
    finish(gallery, encoder=lifter(gallery))
    new_only = {NEW.fingerprint: both[NEW.fingerprint]}
    found = gallery.search(new_only, 10)
    lifted = fitted()(old_encoder().vectors(range(COUNT)))
    expected = nearest(lifted, new_only[NEW.fingerprint], 10)
    assert found.ids == [[item_id(n) for n in row] for row in expected.tolist()]
    assert serve(gallery).search(vectors=new_only, k=10).ids == found.ids


def test_lifting_makes_new_queries_useful(gallery):
    start(gallery)
    run(gallery, lifter(gallery))
    finish(gallery)
    numbers = range(10_000, 10_060)
    found = gallery.search({NEW.fingerprint: new_encoder().vectors(numbers)}, 1)
    right = [int(ids[0][-5:]) % 12 == n % 12 for ids, n in zip(found.ids, numbers, strict=True)]
    assert np.mean(right) > 0.25  # one in twelve is chance


def test_a_half_lifted_gallery_is_searched_in_both_parts_and_equals_brute_force(gallery):
    start(gallery, task_items=20)
    run(gallery, lifter(gallery), stop_after=100)
    now = status(gallery)
    assert (now.old_items, now.new_items) == (100, 100)
    both = query_vectors()
    found = serve(gallery).search(vectors=both, k=8)
    numbers = np.arange(COUNT)
    lifted = np.isin(numbers, gallery.snapshot().new.nums)
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in both.items()}
    old_distance = 1 - unit[OLD.fingerprint].astype(float) @ old_encoder().vectors(numbers).astype(float).T
    new_distance = 1 - unit[NEW.fingerprint].astype(float) @ fitted()(old_encoder().vectors(numbers)).astype(float).T
    distance = np.where(lifted, new_distance, old_distance)
    assert found.ids == [[item_id(n) for n in row] for row in np.argsort(distance, axis=1)[:, :8].tolist()]


def test_rollback_of_a_lift_is_exact_and_needs_no_encoder(gallery):
    before = stored(gallery)
    start(gallery, task_items=30)
    run(gallery, lifter(gallery), stop_after=60)
    gallery.add(["item-90000"], old_encoder().vectors([90_000]), space=OLD.fingerprint)
    assert rollback(gallery) == 0
    after = stored(gallery)
    assert {n: row for n, row in after[OLD.fingerprint].items() if n < COUNT} == before[OLD.fingerprint]
    assert len(gallery) == COUNT + 1 and list(after) == [OLD.fingerprint]


def test_old_vectors_that_come_during_and_after_a_lift_are_lifted(gallery):
    start(gallery)
    gallery.add(["item-90000"], old_encoder().vectors([90_000]), space=OLD.fingerprint)
    run(gallery, lifter(gallery))
    finish(gallery)
    gallery.add(["item-90001"], old_encoder().vectors([90_001]), space=OLD.fingerprint)
    expected = fitted()(old_encoder().vectors([90_000, 90_001]))
    assert np.allclose(gallery.vectors_of(["item-90000", "item-90001"]), expected, atol=1e-6)
    with pytest.raises(SpaceError, match=r"is lifted.*no space was named"):
        gallery.add(["item-90002"], new_encoder().vectors([90_002]))
    with pytest.raises(SpaceError, match=r"is lifted.*these are of space"):
        gallery.add(["item-90002"], new_encoder().vectors([90_002]), space=NEW.fingerprint)


def test_after_a_lift_the_images_are_backfilled_on_top(gallery):
    start(gallery)
    run(gallery, lifter(gallery))
    run(gallery, by_item(new_encoder()), strategy="core:compatible", on_top=True, task_items=16, stop_after=96)
    assert [part["items"] for part in status(gallery).parts] == [0, COUNT - 96, 96]
    new_only = {NEW.fingerprint: query_vectors()[NEW.fingerprint]}
    found = serve(gallery).search(vectors=new_only, k=7)
    numbers = np.arange(COUNT)
    real = np.isin(numbers, gallery.snapshot().new.nums)
    rows = np.where(real[:, None], new_encoder().vectors(numbers), fitted()(old_encoder().vectors(numbers)))
    assert found.ids == [[item_id(n) for n in row] for row in nearest(rows, new_only[NEW.fingerprint], 7).tolist()]
    run(gallery, by_item(new_encoder()))
    finish(gallery, encoder=by_item(new_encoder()))
    assert gallery.snapshot().serving == NEW.fingerprint and gallery.verify().ok


def test_queries_that_are_images_are_encoded_by_the_encoder_that_the_lifted_space_stands_for(gallery, tmp_path):
    from upgrade_world import write_image

    start(gallery)
    run(gallery, lifter(gallery))
    finish(gallery)
    image = write_image(tmp_path, 7)
    service = serve(gallery, [ItemEncoder(old_encoder()), ItemEncoder(new_encoder())])
    expected = gallery.search({NEW.fingerprint: new_encoder().vectors([7])}, 5)
    assert service.search([image], k=5).ids == expected.ids
    assert service.state().needs == (NEW.fingerprint,)


@pytest.mark.parametrize("turned", ["source is new", "pairs"])
def test_a_transform_in_the_wrong_direction_is_refused(gallery, turned):
    wrong = fitted(new_encoder(), old_encoder())
    numbers = range(60_000, 60_040)
    if turned == "source is new":
        with pytest.raises(SpaceError, match="goes the other way"):
            begin_lift(gallery, wrong, NEW)
    else:
        mislabelled = VectorTransform.linear(
            OLD.fingerprint, NEW.fingerprint, np.random.default_rng(0).normal(size=(NEW.dim, OLD.dim))
        )
        stored_rows = old_encoder().vectors(numbers)
        with pytest.raises(SpaceError, match=r"does not fit: mean cosine -1\.000"):
            begin_lift(gallery, mislabelled, NEW, pairs=(stored_rows, -mislabelled(stored_rows)))
        with pytest.raises(SpaceError, match="does not fit"):
            begin_lift(gallery, mislabelled, by_item(new_encoder()), strategy="world:two-queries")
    assert gallery.snapshot().upgrade is None and gallery.transforms() == []


def test_a_transform_of_other_spaces_is_refused(gallery):
    foreign = VectorTransform.linear("f" * 64, NEW.fingerprint, np.ones((NEW.dim, OLD.dim)))
    with pytest.raises(SpaceError, match="takes vectors of another space"):
        begin_lift(gallery, foreign, NEW)
    with pytest.raises(SpaceError, match="is to be reached"):
        begin_lift(gallery, fitted(), OLD)
    with pytest.raises(UpgradeError, match="is not being lifted"):
        lifter(gallery)


def test_the_lifted_space_is_another_for_every_transform_and_new_space():
    one = lifted_space(fitted(), NEW)
    other = VectorTransform.linear(OLD.fingerprint, NEW.fingerprint, np.ones((NEW.dim, OLD.dim)))
    assert one == lifted_space(fitted(), NEW) and one.lifted and one.dim == NEW.dim
    assert one.fingerprint not in (NEW.fingerprint, lifted_space(other, NEW).fingerprint)


def test_stored_vectors_that_the_transform_does_not_reproduce_stop_finish(gallery):
    start(gallery)
    task = gallery.store.lease_task("liar")
    gallery.store.commit_task(task, task.nums, -fitted()(old_encoder().vectors(task.nums.tolist())))
    with pytest.raises(SpaceError, match="not the one that filled space"):
        finish(gallery, encoder=lifter(gallery))
    assert gallery.snapshot().upgrade is not None


def test_an_encoder_that_reads_images_is_refused_where_there_are_none(gallery):
    with pytest.raises(UpgradeError, match=r"have no images.*upgrade lift"):
        run(gallery, ItemEncoder(new_encoder()), strategy="world:two-queries")
    assert gallery.snapshot().upgrade is None
    begin(gallery, NEW, strategy="world:two-queries")  # without an encoder nothing is known of images
    rollback(gallery)


def test_three_versions_with_lifted_and_backfilled_vectors_in_one_gallery(gallery):
    """v1 -> lifted to v2 -> v2 -> v3: four parts, one query of v3 reaches them all by registered relations."""
    third = upgrade_world.FakeEncoder("third", 20, 0.8)
    start(gallery, task_items=20)
    run(gallery, lifter(gallery), stop_after=60)
    run(gallery, by_item(new_encoder()), strategy="core:compatible", on_top=True, task_items=20, stop_after=40)
    run(gallery, by_item(third), strategy="world:two-queries", on_top=True, task_items=20, stop_after=20)
    back, oldest = fitted(third, new_encoder()), fitted(new_encoder(), old_encoder())
    gallery.register_transform(back, pairs=pairs_of(third, new_encoder()))
    gallery.register_transform(oldest, pairs=pairs_of(new_encoder(), old_encoder()))
    parts = gallery.snapshot().parts
    assert [part.count for part in parts] == [80, 60, 40, 20]
    given = third.vectors(range(10_000, 10_020))
    second = back(given)
    lifted = lifted_space(fitted(), NEW).fingerprint
    queries = {OLD.fingerprint: oldest(second), lifted: second, NEW.fingerprint: second, third.fingerprint: given}
    distances = np.full((len(given), COUNT), np.inf)
    for part in parts:
        rows = part.vectors_of(part.nums).astype(float)
        distances[:, part.nums] = 1 - queries[part.space.fingerprint].astype(float) @ rows.T
    found = gallery.search({third.fingerprint: given}, 9)
    assert found.ids == [[item_id(n) for n in row] for row in np.argsort(distances, axis=1)[:, :9].tolist()]
    run(gallery, by_item(third))
    finish(gallery, encoder=by_item(third))
    assert [part.count for part in gallery.snapshot().parts] == [COUNT] and gallery.verify().ok


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
import test_upgrade_lift as lift
from bowerbird.gallery import Gallery
from bowerbird.upgrade.lift import lifter
from bowerbird.upgrade.run import run
lift.get_registry().register_module("world", lift.upgrade_world)
gallery = Gallery.open({path!r})
done = 0
def progress(count, status):
    global done
    done += count
    if done >= 60:
        os._exit(9)
run(gallery, lifter(gallery), progress=progress)
"""


def test_a_killed_lift_goes_on_where_it_was(gallery, tmp_path):
    start(gallery, task_items=20)
    code = KILLED.format(tests=str(upgrade_world.__file__).rsplit("/", 1)[0], path=str(gallery.path))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with Gallery.open(gallery.path) as again:
        assert 0 < status(again).new_items < COUNT
        assert run(again, lifter(again)).reason == "complete"
        assert np.allclose(again.snapshot().new.vectors_of(np.arange(COUNT)),
                           fitted()(old_encoder().vectors(range(COUNT))), atol=1e-6)  # fmt: skip
        assert again.verify().ok


def test_a_lift_on_top_needs_a_way_for_every_part(gallery):
    third = upgrade_world.FakeEncoder("third", 20, 0.8)
    run(gallery, by_item(new_encoder()), strategy="world:two-queries", task_items=20, stop_after=60)
    settings = {"strategy": "world:two-queries", "on_top": True, "pairs": pairs_of(new_encoder(), third)}
    with pytest.raises(UpgradeError, match="no registered transform leads"):
        begin_lift(gallery, fitted(new_encoder(), third), third.space(), **settings)
    gallery.register_transform(fitted(), pairs=pairs_of())
    begin_lift(gallery, fitted(new_encoder(), third), third.space(), **settings)
    run(gallery, lifter(gallery))
    numbers = np.arange(COUNT)
    with pytest.raises(InputError):
        gallery.store.begin_upgrade(third.space(), strategy="x", order_name="x", task_items=0)
    assert [part.count for part in gallery.snapshot().parts] == [0, 0, COUNT]
    rollback(gallery)
    assert [part["items"] for part in status(gallery).parts] == [COUNT - 60, 60]
    assert len(numbers) == COUNT


def test_the_whole_way_on_one_object(gallery):
    with Upgrade(gallery, by_item(new_encoder())) as upgrade:
        assert upgrade.lift(fitted(), strategy="world:two-queries", task_items=50, stop_after=100).encoded == 100
        assert upgrade.lift().reason == "complete"
        assert upgrade.run(strategy="compatible", on_top=True).reason == "complete"
        upgrade.finish()
    assert gallery.counts() == {NEW.fingerprint: COUNT}


def test_several_processes_share_a_lift(gallery, tmp_path):
    """Through the command line: the map and the vectors are all that a worker needs."""
    map_file = tmp_path / "forward.safetensors"
    fitted().save(map_file)
    command = ["upgrade", "lift", str(gallery.path), "--transform", str(map_file), "--strategy", "world:two-queries"]
    for side, rows in zip(("old", "new"), pairs_of(), strict=True):
        np.save(tmp_path / f"{side}.npy", rows)
        command += [f"--{side}-pairs", str(tmp_path / f"{side}.npy")]
    done = CliRunner().invoke(main, [*command, "--workers", "2", "--task-items", "20", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["reason"], report["encoded"]) == ("complete", COUNT)
    assert len(report["workers"]) == 2
    finish(gallery, encoder=lifter(gallery))
    assert np.allclose(
        gallery.vectors_of([item_id(n) for n in range(COUNT)]), fitted()(old_encoder().vectors(range(COUNT))), atol=1e-6
    )
