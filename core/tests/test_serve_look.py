"""What there is to see of a gallery over HTTP: its numbers, its spaces and their relations, and its map."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from serve_world import begin_upgrade, fill, move, served, settings_for
from serve_world import new_encoder as new_encoder  # fixtures
from serve_world import old_encoder as old_encoder
from serve_world import photos as photos
from serve_world import world as world

from bowerbird.errors import InputError, UnknownNameError
from bowerbird.gallery import Gallery, Space
from bowerbird.serve import aside, mapping, spaces
from bowerbird.serve.describe import encoder_name, gallery_name
from bowerbird.serve.mapping import GROUPS, SIDE, Maps, group_by, place, principal, sample, telling_key
from bowerbird.serve.schemas import MapView, SpacesView
from bowerbird.serve.spaces import Spaces

OLD, NEW = Space("a" * 64, "models/old", 8), Space("b" * 64, "/srv/models/new", 12)


def vectors(numbers: range, dim: int) -> np.ndarray:
    """Three clouds, seen by an encoder of width ``dim``."""
    made = [np.random.default_rng([dim, n % 3]).normal(size=dim) for n in numbers]
    noise = [0.2 * np.random.default_rng([dim, 9, n]).normal(size=dim) for n in numbers]
    rows = np.array(made) + np.array(noise)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    """90 items in three clouds."""
    with Gallery.create(tmp_path / "gallery", OLD) as made:
        made.add(
            [f"item/{n}" for n in range(90)],
            vectors(range(90), OLD.dim),
            metadata=[{"label": "abc"[n % 3]} for n in range(90)],
        )
        yield made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps and matrices are made in this process, which saves starting one; the tests over HTTP do start it."""

    async def directly(task: str, *, seconds: float, **request: Any) -> Any:
        return {"map": mapping.make_layout, "matrix": spaces.make_matrix}[task](**request)

    monkeypatch.setattr(mapping, "aside", directly)
    monkeypatch.setattr(spaces, "aside", directly)


def upgrade(gallery: Gallery, *, moved: int) -> None:
    """Begin the upgrade to ``NEW`` and move that many items."""
    gallery.store.begin_upgrade(NEW, strategy="core:full", order_name="core:random", task_items=10)
    while moved > 0:
        task = gallery.store.lease_task("test")
        assert task is not None
        gallery.store.commit_task(
            task, task.nums, vectors(range(90), NEW.dim)[[int(item.id[5:]) for item in task.items]]
        )
        moved -= len(task.items)


def map_of(gallery: Gallery, method: str = "pca", limit: int = 1000, space: str | None = None) -> MapView:
    made = asyncio.run(Maps(settings_for(str(gallery.path)), gallery).view(method, limit, space))
    return MapView.model_validate_json(made)


def spaces_of(gallery: Gallery) -> SpacesView:
    return asyncio.run(Spaces(settings_for(str(gallery.path)), gallery).view())


# -------------------------------------------------------------------------------------------------- the map's numbers


@pytest.mark.parametrize(("rows", "dim"), [(60, 8), (9, 30), (4, 2), (1, 5)])
def test_pca_gives_the_coordinates_of_a_singular_value_decomposition(rows: int, dim: int) -> None:
    data = np.random.default_rng(rows).normal(size=(rows, dim)).astype(np.float32)
    found = principal([data[:3], data[3:]], 2)
    centred = data - data.mean(axis=0)
    left, values, _ = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    expected = np.zeros((rows, 2))
    real = min(2, len(values), max(0, rows - 1))
    expected[:, :real] = (left * values)[:, :real]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5)


def test_pca_of_the_same_rows_in_other_blocks_is_the_same() -> None:
    data = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    np.testing.assert_allclose(principal([data], 2), principal([data[:7], data[7:20], data[20:]], 2), atol=1e-9)


def test_pca_of_more_rows_than_its_basis_still_finds_the_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(1).normal(size=(4000, 5)) * [9, 4, 1, 1, 1]
    exact = principal([data], 2)
    monkeypatch.setattr(mapping, "BASIS_ROWS", 500)
    near = principal([data[:1500], data[1500:]], 2)
    for axis in range(2):
        assert abs(np.corrcoef(exact[:, axis], near[:, axis])[0, 1]) > 0.98


@settings(max_examples=25, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.floats(-4, 4, width=32)))
def test_positions_are_on_the_map_and_both_axes_have_one_scale(rows: np.ndarray) -> None:
    places = place([rows], "pca")
    assert places.shape == (len(rows), 2)
    assert places.min() >= 0
    assert places.max() <= SIDE
    spread = np.ptp(places, axis=0)
    if np.ptp(rows, axis=0).max() < 1e-3:
        return
    assert spread.max() >= SIDE - 1
    plane = np.ptp(principal([rows], 2), axis=0)
    np.testing.assert_allclose(spread / SIDE, plane / plane.max(), atol=2e-3)


def test_a_map_of_nothing_is_empty_and_equal_vectors_are_one_place_in_the_middle() -> None:
    assert place([], "pca").shape == (0, 2)
    assert place([np.ones((3, 4), np.float32)], "pca").tolist() == [[SIDE // 2] * 2] * 3


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=200), st.integers(1, 60), st.randoms())
def test_a_sample_stays_as_it_is_but_for_the_items_that_go(nums: set[int], limit: int, random: Any) -> None:
    every = np.array(sorted(nums), np.int64)
    chosen = sample(every, limit)
    assert len(chosen) == min(limit, len(every))
    assert (np.diff(chosen) > 0).all()
    assert set(chosen.tolist()) <= nums
    gone = set(random.sample(sorted(nums), len(nums) // 3))
    left = np.array(sorted(nums - gone), np.int64)
    assert set(sample(left, limit).tolist()) >= set(chosen.tolist()) - gone


def test_a_map_is_coloured_by_the_label_or_by_what_tells_more_where_labels_are_many() -> None:
    def items(labels: int) -> list[dict[str, object]]:
        return [{"label": f"{n % labels}", "half": n % 2, "third": n % 3, "one": 1, "id": n} for n in range(120)]

    assert telling_key(items(2), "label") == "label"
    assert telling_key(items(60), "label") == "third"  # ten of sixty labels hold a sixth of the items
    assert telling_key(items(60), None) == "third"
    assert telling_key([{"label": n} for n in range(120)], "label") == "label"  # nothing tells more
    assert telling_key([{"one": 1}] * 5, None) is None
    assert telling_key([], "label") == "label"


def test_groups_are_the_most_frequent_labels_and_the_rest_has_none() -> None:
    labels = ["b", "a", "b", None, ["a list"], 3, 3, 3]
    assert group_by(labels) == ([1, 2, 1, -1, -1, 0, 0, 0], ["3", "b", "a"])
    group, groups = group_by([f"{n:02}" for n in range(GROUPS + 5)])
    assert groups == [f"{n:02}" for n in range(GROUPS)]
    assert group == [*range(GROUPS), *[-1] * 5]


# ---------------------------------------------------------------------------------------------------------- the map


@pytest.mark.usefixtures("here")
def test_the_map_has_every_item_with_its_label_and_separates_clouds(gallery: Gallery) -> None:
    view = map_of(gallery)
    assert view.ids == [f"item/{n}" for n in range(90)]
    assert (view.total, view.space, view.groups) == (90, OLD.fingerprint, ["a", "b", "c"])
    assert view.group == [n % 3 for n in range(90)]
    assert all(view.moved)
    places = np.column_stack([view.x, view.y]).astype(float)
    centres = np.array([places[c::3].mean(axis=0) for c in range(3)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == np.arange(90) % 3).mean() > 0.9


@pytest.mark.usefixtures("here")
def test_the_same_items_have_the_same_places_in_another_service(gallery: Gallery) -> None:
    one, other = map_of(gallery), map_of(gallery)
    assert (one.x, one.y) == (other.x, other.y)


@pytest.mark.usefixtures("here")
def test_a_larger_gallery_is_shown_by_a_sample_and_says_so(gallery: Gallery) -> None:
    view = map_of(gallery, limit=20)
    assert len(view.ids) == len(view.x) == len(view.y) == len(view.group) == len(view.moved) == 20
    assert view.total == 90


@pytest.mark.usefixtures("here")
def test_during_an_upgrade_the_map_shows_the_old_space_until_every_item_is_in_the_new_one(gallery: Gallery) -> None:
    upgrade(gallery, moved=40)
    view = map_of(gallery)
    assert view.space == OLD.fingerprint
    assert len(view.ids) == 90
    assert sum(view.moved) == 40
    new = map_of(gallery, space=NEW.fingerprint)
    assert new.total == len(new.ids) == 40
    assert all(new.moved)
    assert {name for name, moved in zip(view.ids, view.moved, strict=True) if moved} == set(new.ids)


@pytest.mark.usefixtures("here")
def test_a_kept_layout_follows_what_moves_without_being_made_again(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = Maps(settings_for(str(gallery.path)), gallery)

    async def twice() -> list[bytes]:
        first = await maps.view("pca", 1000)
        upgrade(gallery, moved=30)
        monkeypatch.setattr(mapping, "aside", None)  # a second process would fail
        return [first, await maps.view("pca", 1000)]

    before, after = map(MapView.model_validate_json, asyncio.run(twice()))
    assert (before.x, before.y, before.ids) == (after.x, after.y, after.ids)
    assert (sum(before.moved), sum(after.moved)) == (90, 30)
    assert after.epoch > before.epoch


@pytest.mark.usefixtures("here")
def test_when_all_is_moved_the_map_shows_the_new_space(gallery: Gallery) -> None:
    upgrade(gallery, moved=90)
    assert map_of(gallery).space == NEW.fingerprint


@pytest.mark.usefixtures("here")
def test_an_item_that_is_deleted_leaves_the_map(gallery: Gallery) -> None:
    gallery.delete(["item/7"])
    view = map_of(gallery)
    assert view.total == 89
    assert "item/7" not in view.ids


def test_an_unknown_space_and_a_method_that_is_not_installed_are_refused(
    gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="no space 'nowhere'"):
        map_of(gallery, space="nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="bowerbird-core\\[umap\\]"):
        map_of(gallery, method="umap")


@pytest.mark.usefixtures("here")
def test_umap_is_the_same_twice_and_keeps_clouds_apart(gallery: Gallery) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    one, other = map_of(gallery, method="umap"), map_of(gallery, method="umap")
    assert (one.x, one.y) == (other.x, other.y)
    places = np.column_stack([one.x, one.y]).astype(float)
    far = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(far, np.inf)
    assert (far.argmin(axis=1) % 3 == np.arange(90) % 3).mean() > 0.9


def test_a_map_that_nobody_waits_for_any_more_is_not_made(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def noted(*line: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await start(*line, **options))
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)

    async def leave() -> None:
        task = asyncio.create_task(Maps(settings_for(str(gallery.path)), gallery).view("pca", 1000))
        while not started:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert started[0].returncode is not None

    asyncio.run(leave())


def test_what_goes_wrong_in_the_other_process_is_the_same_error_here(tmp_path: Path) -> None:
    from bowerbird.errors import GalleryError

    with pytest.raises(GalleryError, match="is not a gallery"):
        asyncio.run(aside.aside("matrix", seconds=60, gallery=str(tmp_path / "nothing"), label_key=None))


# -------------------------------------------------------------------------------------------------------- the spaces


@pytest.mark.usefixtures("here")
def test_queries_reach_their_own_space_and_no_other_without_a_relation(gallery: Gallery) -> None:
    upgrade(gallery, moved=90)
    view = spaces_of(gallery)
    assert [(space.encoder, space.items) for space in view.spaces] == [("old", 0), ("new", 90)]
    cells = {(cell.source[0], cell.target[0]): cell for cell in view.cells}
    assert {pair: cell.kind for pair, cell in cells.items()} == {
        ("a", "a"): "own", ("a", "b"): "none", ("b", "a"): "none", ("b", "b"): "own",
    }  # fmt: skip
    assert cells["b", "b"].quality is not None
    assert cells["b", "b"].quality > 0.8  # three clouds, three labels
    assert cells["a", "b"].quality is None
    assert view.relations == []


@pytest.mark.usefixtures("here")
def test_a_relation_that_is_registered_is_there_at_once_with_its_evidence_and_without_folders(gallery: Gallery) -> None:
    upgrade(gallery, moved=90)
    looked = Spaces(settings_for(str(gallery.path)), gallery)

    async def twice() -> SpacesView:
        assert (await looked.view()).relations == []
        evidence = {"map": 0.5, "made of": {"file": "/srv/secret/pairs.parquet"}}
        gallery.relate(NEW.fingerprint, OLD.fingerprint, evidence=evidence)
        return await looked.view()

    view = asyncio.run(twice())
    (relation,) = view.relations
    assert (relation.kind, relation.new, relation.old) == ("compatible", NEW.fingerprint, OLD.fingerprint)
    assert relation.evidence == {"map": 0.5, "made of": {"file": "pairs.parquet"}}
    (cell,) = [cell for cell in view.cells if (cell.source, cell.target) == (NEW.fingerprint, OLD.fingerprint)]
    assert cell.kind == "compatible"
    assert "as they are" in cell.note
    assert cell.quality is not None


# ------------------------------------------------------------------------------------------------------- over HTTP


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("/srv/models/new", "new"),
        ("runs/new/", "new"),
        ("core:timm?model=resnet18&weights=/srv/w/r18.safetensors", "core:timm?model=resnet18&weights=r18.safetensors"),
        ("lifted:/srv/models/new", "lifted:new"),
        ("vectors:/data/new.parquet", "vectors:new.parquet"),
        ("free text, with a comma", "free text, with a comma"),
    ],
)
def test_an_encoder_is_named_without_the_folders_of_the_server(reference: str, name: str) -> None:
    assert encoder_name(reference) == name


def test_a_gallery_is_named_by_its_folder_or_by_its_url(tmp_path: Path) -> None:
    assert gallery_name(str(tmp_path / "photos")) == "photos"
    assert gallery_name("postgresql://somebody:secret@host/db?gallery=photos") == "photos"
    assert gallery_name("qdrant://host:6333/photos") == "photos"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, old_encoder: Path, photos: Path) -> Iterator[TestClient]:
    path = fill(tmp_path_factory.mktemp("look") / "gallery", old_encoder, photos)
    with served(path, candidates={"better": "/srv/models/better"}) as client:
        yield client


def test_the_gallery_in_numbers(client: TestClient) -> None:
    info = client.get("/v1/gallery").json()
    assert (info["name"], info["items"], info["pending"], info["upgrade"]) == ("gallery", 60, 0, None)
    assert [(space["encoder"], space["items"]) for space in info["spaces"]] == [("old", 60)]
    assert info["candidates"] == ["better"]
    assert (info["label_key"], info["metadata_keys"]) == ("label", ["label", "number"])
    assert info["accepts"]["image"]


def test_the_map_and_the_spaces_are_answered_and_no_answer_names_a_folder(client: TestClient, tmp_path: Path) -> None:
    view = client.get("/v1/map?limit=50")
    assert view.status_code == 200
    assert len(MapView.model_validate_json(view.content).ids) == 50
    spaces = client.get("/v1/spaces")
    assert [cell["kind"] for cell in SpacesView.model_validate_json(spaces.content).model_dump()["cells"]] == ["own"]
    root = str(tmp_path.parent)
    assert all(root not in client.get(path).text for path in ("/v1/gallery", "/v1/map?limit=50", "/v1/spaces"))
    assert "/srv" not in client.get("/v1/gallery").text


@pytest.mark.parametrize(
    ("query", "status"),
    [("method=tsne", 422), ("limit=0", 422), ("limit=50001", 422), ("space=nowhere", 404), ("space=" + "x" * 201, 422)],
)
def test_a_map_that_cannot_be_drawn_is_a_problem_that_says_why(client: TestClient, query: str, status: int) -> None:
    answer = client.get(f"/v1/map?{query}")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]


def test_an_upgrade_that_another_process_began_is_seen(
    tmp_path: Path, old_encoder: Path, new_encoder: Path, photos: Path, world: None
) -> None:
    path = fill(tmp_path / "gallery", old_encoder, photos)
    begin_upgrade(path, new_encoder)
    move(path, new_encoder, share=0.5)
    with served(path) as client:
        info = client.get("/v1/gallery").json()
        assert info["upgrade"]["state"] == "running"
        assert 0.4 < info["upgrade"]["share"] < 0.7
        assert [space["encoder"] for space in info["spaces"]] == ["old", "new"]
        assert sum(space["items"] for space in info["spaces"]) == 60
