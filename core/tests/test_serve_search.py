"""Searches of the service, before, during and after an upgrade, and what they refuse."""

# ruff: noqa: F811  # fixtures that are imported and asked for

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import serve_tasks
from PIL import Image
from serve_world import (
    PHOTOS,
    begin_upgrade,
    gallery_path,  # noqa: F401  # a fixture, as those below
    label_of,
    make_encoder,
    move,
    new_encoder,  # noqa: F401
    old_encoder,  # noqa: F401
    photo_id,
    photos,  # noqa: F401
    picture_bytes,
    served,
    settings_for,
    upload,
    world,  # noqa: F401
)

from bowerbird.data.images import Preprocessing, open_image
from bowerbird.encoders import load_encoder, save_encoder
from bowerbird.errors import DataError
from bowerbird.gallery import Gallery, Space
from bowerbird.gallery.images import add_images
from bowerbird.gallery.transform import VectorTransform
from bowerbird.registry import get_registry
from bowerbird.serve import decoding, encoders, engine
from bowerbird.serve.answering import SERVING, Query, answer
from bowerbird.serve.batching import Batcher
from bowerbird.serve.decoding import Decoders
from bowerbird.serve.problems import MEDIA_TYPE, ProblemError
from bowerbird.serve.schemas import Search, SearchResponse
from bowerbird.upgrade import finish, rollback
from bowerbird.upgrade.lift import begin_lift, lifter
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import SearchService

pytestmark = pytest.mark.usefixtures("world")
DIM = 24


def ids(answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [hit["id"] for hit in answer.json()["hits"]]


def by_picture(client, number, **form):
    return client.post("/v1/search/image", files=upload(number), data=form)


def by_item(client, number, **body):
    return client.post("/v1/search/item", json={"id": photo_id(number), **body})


def by_vector(client, vector, **body):
    return client.post("/v1/search/vector", json={"vector": [float(x) for x in vector], **body})


def refused(answer, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.json()["status"] == status
    return answer.json()["detail"]


# ----------------------------------------------------------------------------------------------- outside upgrades


def test_a_stored_picture_finds_itself_at_distance_0_and_its_neighbours_as_the_gallery_does(gallery_path, old_encoder):
    with served(gallery_path) as client:
        answer = by_picture(client, 7, k=5).json()
    loaded = load_encoder(old_encoder, device="cpu")
    with Gallery.open(gallery_path, readonly=True) as gallery:
        expected = gallery.search(loaded.encode([picture_bytes(7)]), 5)
        epoch = gallery.snapshot().epoch
    assert [hit["id"] for hit in answer["hits"]] == expected.ids[0]
    assert answer["hits"][0]["id"] == photo_id(7)
    assert answer["hits"][0]["distance"] == pytest.approx(0, abs=1e-6)
    for hit, distance in zip(answer["hits"], expected.distances[0], strict=True):
        assert hit["distance"] == pytest.approx(float(distance), abs=1e-6)
        assert hit["score"] == pytest.approx(1 - hit["distance"])
        assert (hit["side"], hit["space"], hit["has_picture"]) == ("new", loaded.fingerprint, True)
    assert answer["hits"][0]["metadata"] == {"label": label_of(7), "number": 7}
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3, 4, 5]
    assert (answer["epoch"], answer["share"]) == (epoch, 1.0)


def test_an_item_finds_what_its_picture_finds_but_for_itself(gallery_path):
    with served(gallery_path) as client:
        assert ids(by_item(client, 7, k=6)) == ids(by_picture(client, 7, k=7))[1:]
        assert ids(by_item(client, 7, k=5, offset=1)) == ids(by_item(client, 7, k=6))[1:]
        assert "no item" in refused(client.post("/v1/search/item", json={"id": "../../etc/passwd"}), 404)


def test_a_vector_need_not_have_length_1_and_may_be_sent_by_the_name_of_its_space(gallery_path, old_encoder):
    loaded = load_encoder(old_encoder, device="cpu")
    vector = loaded.encode([picture_bytes(3)])[0]
    with served(gallery_path) as client:
        expected = ids(by_vector(client, vector, k=8))
        assert expected[0] == photo_id(3)
        for factor in (1e-30, 1e-5, 7.5, 1e30, 1e300):
            assert ids(by_vector(client, vector.astype(float) * factor, k=8)) == expected
        rows = {loaded.fingerprint: vector.tolist(), "of an upgrade that is over": [1.0, 2.0]}
        assert ids(client.post("/v1/search/vector", json={"vectors": rows, "k": 8})) == expected


def test_pages_follow_each_other(gallery_path):
    with served(gallery_path) as client:
        whole = by_picture(client, 11, k=PHOTOS + 5)
        pages = [by_picture(client, 11, k=13, offset=offset) for offset in range(0, PHOTOS, 13)]
        assert [name for page in pages for name in ids(page)] == ids(whole)
        assert [page.json()["more"] for page in pages] == [True, True, True, True, False]
        assert [page.json()["hits"][0]["rank"] for page in pages] == [1, 14, 27, 40, 53]
        assert ids(by_picture(client, 11, k=5, offset=PHOTOS)) == []


def test_a_filter_keeps_what_matches_and_an_unknown_key_matches_nothing(gallery_path):
    with served(gallery_path) as client:
        rings = ids(by_item(client, 7, where={"label": "rings"}))
        assert len(rings) == PHOTOS // 6 - 1 and all(name.startswith("rings/") for name in rings)
        assert ids(by_picture(client, 7, k=50, where=json.dumps({"number": [1, 2, 3]}))) == ids(
            by_item(client, 7, where={"number": [1, 2, 3]})
        )
        assert ids(by_item(client, 7, where={"colour": "blue"})) == []
        assert ids(by_item(client, 7, where={"label": "rings' OR 1=1 --"})) == []
        assert ids(by_item(client, 7, where={})) == ids(by_item(client, 7))


@pytest.mark.parametrize(
    "where",
    [
        {'a"b': 1},
        {"a\\b": 1},
        {f"key {i}": 1 for i in range(40)},
        {"number": list(range(2000))},
        {"number": {"$gt": 3}},
        {"number": None},
        [],
        "label",
    ],
    ids=str,
)
def test_filters_that_cannot_be_used_are_refused(gallery_path, where):
    with served(gallery_path, read_only=True) as client:
        refused(by_item(client, 7, where=where), 422)
        refused(by_picture(client, 7, where=json.dumps(where)), 422)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"vector": [1, 2, 3]}', "width 3"),
        (json.dumps({"vector": [0] * DIM}), "zero"),
        ('{"vector": [NaN%s]}' % (", 1" * (DIM - 1)), "finite"),
        ('{"vector": [-Infinity%s]}' % (", 1" * (DIM - 1)), "finite"),
        ('{"vector": [1e999%s]}' % (", 1" * (DIM - 1)), "finite"),
        ('{"vector": ["a"]}', "vector"),
        ('{"vector": []}', "width 0"),
        ("{}", "exactly one"),
        ('{"vector": [1], "vectors": {}}', "exactly one"),
        ('{"vectors": {}}', "needs query vectors"),
        ('{"vectors": {"strange": [1, 2]}}', "needs query vectors"),
        ('{"vector": [1], "k": 0}', "k"),
        ('{"vector": [1], "k": 600, "offset": 600}', "at most 1000"),
        ('{"vector": [1], "kk": 3}', "kk"),
        ("{", "JSON"),
    ],
)
def test_vectors_that_cannot_be_searched_are_refused_and_harm_nobody_else(gallery_path, old_encoder, body, says):
    vector = load_encoder(old_encoder, device="cpu").encode([picture_bytes(3)])[0]
    with served(gallery_path, read_only=True) as client, ThreadPoolExecutor(4) as clients:
        headers = {"Content-Type": "application/json"}
        bad = clients.submit(client.post, "/v1/search/vector", content=body, headers=headers)
        good = [clients.submit(by_vector, client, vector, k=4) for _ in range(6)]
        answer = bad.result()
        assert answer.status_code in (409, 422)
        assert says in refused(answer, answer.status_code)
        assert {tuple(ids(each.result())) for each in good} == {tuple(ids(by_vector(client, vector, k=4)))}


def test_what_is_no_picture_is_refused(gallery_path):
    truncated = picture_bytes(3)[:100]
    with served(gallery_path, read_only=True, max_pixels=1000) as client:
        for data in (b"", b"not a picture", b"<svg/>", truncated):
            assert "gallery" not in refused(client.post("/v1/search/image", files={"file": ("a.png", data)}), 422)
        file = io.BytesIO()
        Image.new("RGB", (40, 30)).save(file, "PNG")
        assert "1,200 pixels" in refused(client.post("/v1/search/image", files={"file": file.getvalue()}), 413)
        refused(client.post("/v1/search/image", data={"k": 3}), 422)
        refused(client.post("/v1/search/image", data={"file": "text"}), 422)
        refused(by_picture(client, 3, k="many"), 422)
        refused(by_picture(client, 3, where="{"), 422)
        assert ids(by_picture(client, 3, k=1)) == [photo_id(3)]


def test_a_text_is_refused_where_the_encoder_takes_none_and_accepts_says_so(gallery_path):
    with served(gallery_path, read_only=True) as client:
        assert client.get("/v1/gallery").json()["accepts"] == {
            "image": True, "text": False, "video": False, "vector": True
        }  # fmt: skip
        assert "takes no texts" in refused(client.post("/v1/search/text", json={"text": "a ring"}), 422)
        refused(client.post("/v1/search/text", json={"text": ""}), 422)


def test_a_gallery_of_vectors_is_searched_by_vectors_and_items_and_tells_no_folders(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 8)).astype(np.float32)
    for name, encoder in (("free", "made by hand"), ("gone", "/srv/secret/models/gone")):
        with Gallery.create(tmp_path / name, Space(name, encoder, 8)) as gallery:
            gallery.add([f"item {i}" for i in range(20)], rows)
        with served(tmp_path / name) as client:
            assert client.get("/v1/gallery").json()["accepts"]["image"] is False
            assert ids(by_vector(client, rows[4], k=1)) == ["item 4"]
            assert ids(client.post("/v1/search/item", json={"id": "item 4", "k": 19})).count("item 4") == 0
            said = refused(by_picture(client, 1), 409)
            assert "log" in said and "secret" not in said and str(tmp_path) not in said


def test_an_empty_gallery_has_no_hits(tmp_path, old_encoder):
    with Gallery.create(tmp_path / "empty", load_encoder(old_encoder, device="cpu").space()):
        pass
    with served(tmp_path / "empty") as client:
        assert ids(by_picture(client, 1)) == []
        assert by_picture(client, 1).json()["more"] is False


# --------------------------------------------------------------------------------------------- during an upgrade


def test_searches_are_right_at_every_step_of_an_upgrade_and_none_is_dropped(gallery_path, old_encoder, new_encoder):
    old, new = (load_encoder(path, device="cpu") for path in (old_encoder, new_encoder))
    query = {loaded.fingerprint: loaded.encode([picture_bytes(9)]) for loaded in (old, new)}

    def expected(gallery, k=PHOTOS):
        wanted = {name: query[name] for name in gallery.counts() if gallery.counts()[name]}
        found = gallery.search(wanted, k)
        return list(zip(found.ids[0], found.sides[0].tolist(), strict=True))

    def asked(client):
        hits = by_picture(client, 9, k=PHOTOS).json()["hits"]
        return [(hit["id"], int(hit["side"] == "new")) for hit in hits]

    steps = []
    stop = threading.Event()
    seen: list[int] = []

    def all_the_time(client):
        while not stop.is_set():
            ask = (by_picture, by_item)[len(seen) % 2]
            seen.append(ask(client, len(seen) % PHOTOS, k=3).status_code)

    with served(gallery_path) as client, Gallery.open(gallery_path) as gallery:
        busy = threading.Thread(target=all_the_time, args=(client,))
        busy.start()
        try:
            before = asked(client)
            assert {side for _, side in before} == {1}
            begin_upgrade(gallery_path, new_encoder)
            for share in (0.0, 0.3, 0.7, 1.0):
                if share:
                    move(gallery_path, new_encoder, share=share)
                answer = by_picture(client, 9, k=3).json()
                assert answer["share"] == pytest.approx(share, abs=0.09)
                assert asked(client) == expected(gallery)
                steps.append({side for _, side in asked(client)})
            assert [name for name, _ in asked(client)] != [name for name, _ in before]
            finish(gallery)
            assert asked(client) == expected(gallery)
        finally:
            stop.set()
            busy.join()
        assert steps == [{0}, {0, 1}, {0, 1}, {1}]
        assert set(seen) == {200} and len(seen) > 5
        assert client.get("/v1/gallery").json()["accepts"]["image"] is True


def test_a_vector_of_the_serving_space_is_answered_as_long_as_it_suffices_then_the_needed_spaces_are_named(
    gallery_path, old_encoder, new_encoder
):
    old, new = (load_encoder(path, device="cpu") for path in (old_encoder, new_encoder))
    rows = {loaded.fingerprint: loaded.encode([picture_bytes(9)])[0].tolist() for loaded in (old, new)}
    with served(gallery_path) as client:
        begin_upgrade(gallery_path, new_encoder)
        assert ids(by_vector(client, rows[old.fingerprint], k=1)) == [photo_id(9)]
        move(gallery_path, new_encoder, share=0.5)
        answer = by_vector(client, rows[old.fingerprint], k=1)
        refused(answer, 409)
        assert set(answer.json()["needs"]) == {old.fingerprint, new.fingerprint}
        assert ids(client.post("/v1/search/vector", json={"vectors": rows, "k": 1})) == [photo_id(9)]
        move(gallery_path, new_encoder)
        with Gallery.open(gallery_path) as gallery:
            finish(gallery)
        assert ids(by_vector(client, rows[new.fingerprint], k=1)) == [photo_id(9)]
        assert ids(client.post("/v1/search/vector", json={"vectors": rows, "k": 1})) == [photo_id(9)]


def test_an_item_is_searched_by_on_both_sides_half_way(gallery_path, new_encoder):
    with served(gallery_path) as client:
        begin_upgrade(gallery_path, new_encoder)
        move(gallery_path, new_encoder, share=0.5)
        sides = {hit["id"]: hit["side"] for hit in by_picture(client, 0, k=PHOTOS).json()["hits"]}
        assert sorted(sides.values()) == ["new"] * (PHOTOS // 2) + ["old"] * (PHOTOS // 2)
        for number in (1, 2, 3, 4, 5, 6):
            assert ids(by_item(client, number, k=10)) == [
                name for name in ids(by_picture(client, number, k=11)) if name != photo_id(number)
            ]


def test_stacked_upgrades_are_searched_in_every_space(gallery_path, new_encoder, tmp_path):
    third = make_encoder(tmp_path / "third", seed=3, dim=20)
    with served(gallery_path) as client:
        begin_upgrade(gallery_path, new_encoder)
        move(gallery_path, new_encoder, share=0.6)
        begin_upgrade(gallery_path, third, on_top=True)
        move(gallery_path, third, share=0.1)  # the oldest items move first
        answer = by_picture(client, 9, k=PHOTOS).json()
        assert len({hit["space"] for hit in answer["hits"]}) == 3
        assert len({hit["id"] for hit in answer["hits"]}) == PHOTOS
        for hit in answer["hits"]:
            if hit["id"] == photo_id(9):
                assert hit["distance"] == pytest.approx(0, abs=1e-6)
        compared = client.post("/v1/compare/item", json={"id": photo_id(9), "k": PHOTOS}).json()
        spaces = {name: {hit["space"] for hit in compared[name]} for name in ("old", "new", "merged")}
        assert (len(spaces["old"]), len(spaces["new"]), len(spaces["merged"])) == (2, 1, 3)


def test_a_lifted_gallery_is_searched_by_the_new_encoders_pictures_and_by_its_own_vectors(
    gallery_path, old_encoder, new_encoder
):
    old, new = (load_encoder(path, device="cpu") for path in (old_encoder, new_encoder))
    pictures = [picture_bytes(number) for number in range(100, 250)]
    x, y = old.encode(pictures), new.encode(pictures)
    weight = np.linalg.solve(x.T @ x + 0.01 * np.eye(x.shape[1]), x.T @ y).T
    forward = VectorTransform.linear(old.fingerprint, new.fingerprint, weight, method="tests:ridge")

    def check(client, spaces):
        answer = by_picture(client, 9, k=PHOTOS)
        assert len(ids(answer)) == PHOTOS
        assert {hit["space"] for hit in answer.json()["hits"]} == spaces
        for number in (0, 9, 17):
            assert photo_id(number) in ids(by_picture(client, number, k=6))
            assert len(ids(by_item(client, number, k=PHOTOS))) == PHOTOS - 1

    with served(gallery_path) as client, Gallery.open(gallery_path) as gallery:
        begin_lift(gallery, forward, new.space(), strategy="world:two-queries", task_items=10, pairs=(x, y))
        lifted = gallery.snapshot().write_space.fingerprint
        check(client, {old.fingerprint})
        run(gallery, lifter(gallery), stop_at_share=0.5)
        check(client, {old.fingerprint, lifted})
        assert client.post("/v1/compare/item", json={"id": photo_id(9), "k": 3}).status_code == 200
        run(gallery, lifter(gallery))
        finish(gallery, encoder=lifter(gallery))
        check(client, {lifted})
        assert client.get("/v1/gallery").json()["accepts"]["image"] is True
        row = gallery.vectors_of([photo_id(9)])
        assert ids(by_item(client, 9, k=7)) == gallery.search(row, 8).ids[0][1:]
        assert (
            ids(client.post("/v1/search/vector", json={"vector": row[0].tolist(), "k": 8}))
            == (gallery.search(row, 8).ids[0])
        )


def test_the_old_encoder_is_forgotten_some_time_after_the_upgrade(gallery_path, old_encoder, new_encoder, monkeypatch):
    monkeypatch.setattr(encoders, "UNUSED_SECONDS", 0.3)
    monkeypatch.setattr(engine, "FOLLOW_SECONDS", 0.05)
    old, new = (load_encoder(path, device="cpu").fingerprint for path in (old_encoder, new_encoder))
    with served(gallery_path) as client:
        known = client.app.state.server.encoders.known
        begin_upgrade(gallery_path, new_encoder)
        _until(lambda: known(new))  # before anything is moved, so that no search waits for it
        time.sleep(0.6)
        assert known(old) and known(new)
        move(gallery_path, new_encoder)
        with Gallery.open(gallery_path) as gallery:
            finish(gallery)
        _until(lambda: not known(old))
        assert ids(by_picture(client, 9, k=1)) == [photo_id(9)]


def _until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ texts and videos


@pytest.fixture
def films(tmp_path: Path) -> Iterator[Path]:
    """A gallery of three films, three moments of a fourth and a still, under an encoder of videos and texts."""
    strips = pytest.importorskip("test_gallery_videos", reason="videos need PyAV")
    get_registry().register_module("strips", strips)
    folder = tmp_path / "films"
    folder.mkdir()
    for name in strips.COLOURS:
        strips.write(folder / f"{name}.mp4", strips.strip(name))
    strips.write(folder / "flag.mp4", strips.strip("red", "green", "blue"))
    Image.new("RGB", (9, 9), "blue").save(folder / "still.png")
    for name, config in (("old", {}), ("new", {"turned": True, "frames": 2})):
        save_encoder(
            strips.ColourEncoder(strips.ColourConfig(**config)), tmp_path / name, use="strips:colour", config=config
        )
    loaded = load_encoder(tmp_path / "old", device="cpu")
    sources = [*(folder / f"{name}.mp4" for name in strips.COLOURS), folder / "still.png"]
    sources += [f"{folder}/flag.mp4#t={second},{second + 1}" for second in range(3)]
    with Gallery.create(tmp_path / "gallery", loaded.space()) as gallery:
        add_images(gallery, loaded, sources, ids=[Path(source).name for source in map(str, sources)])
    yield tmp_path
    get_registry().unregister("strips")


def test_videos_are_found_by_texts_pictures_and_each_other_also_half_way_through_an_upgrade(films):
    def first(answer, count):
        return set(ids(answer)[:count])

    def ask(client):
        assert first(client.post("/v1/search/text", json={"text": "a green strip"}), 2) == {
            "green.mp4",
            "flag.mp4#t=1,2",
        }
        file = io.BytesIO()
        Image.new("RGB", (20, 10), "red").save(file, "PNG")
        red = client.post("/v1/search/image", files={"file": file.getvalue()})
        assert first(red, 2) == {"red.mp4", "flag.mp4#t=0,1"}
        for name in ("blue.mp4", "still.png", "flag.mp4#t=2,3"):  # whichever of them has been moved
            blue = client.post("/v1/search/item", json={"id": name})
            assert first(blue, 2) == {"blue.mp4", "still.png", "flag.mp4#t=2,3"} - {name}
        return {hit["side"] for hit in red.json()["hits"]}

    with served(films / "gallery") as client:
        assert client.get("/v1/gallery").json()["accepts"] == {
            "image": True, "text": True, "video": False, "vector": True
        }  # fmt: skip
        assert ask(client) == {"new"}
        refused(client.post("/v1/search/text", json={"text": " \n"}), 422)
        begin_upgrade(films / "gallery", films / "new", task_items=2)
        move(films / "gallery", films / "new", share=0.5)
        assert ask(client) == {"old", "new"}
        compared = client.post("/v1/compare/text", json={"text": "green", "k": 2}).json()
        assert {hit["id"] for hit in compared["merged"]} == {"green.mp4", "flag.mp4#t=1,2"}
        assert compared["flip"] is None


def test_the_thumbnail_of_a_moment_is_its_first_frame(films):
    async def story(decoders):
        source = films / "films" / "flag.mp4"
        return [
            Image.open(io.BytesIO(await decoders.thumbnail(f"{source}#t={start},3", 64))).getpixel((5, 5))
            for start in (0, 1, 2)
        ]

    assert [int(np.argmax(pixel)) for pixel in asyncio.run(_with_decoders(story))] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- compare


def test_there_is_nothing_to_compare_outside_an_upgrade(gallery_path, new_encoder):
    with served(gallery_path) as client:
        for answer in (
            client.post("/v1/compare/item", json={"id": photo_id(9)}),
            client.post("/v1/compare/image", files=upload(9)),
        ):
            assert "no upgrade is under way" in refused(answer, 409)


def test_the_comparison_shows_the_old_system_the_new_one_so_far_and_what_is_served(
    gallery_path, old_encoder, new_encoder, tmp_path
):
    old, new = (load_encoder(path, device="cpu") for path in (old_encoder, new_encoder))
    with served(gallery_path) as client:
        before = ids(by_item(client, 9, k=12))
        begin_upgrade(gallery_path, new_encoder)
        nothing_yet = client.post("/v1/compare/item", json={"id": photo_id(9), "k": 12}).json()
        assert [hit["id"] for hit in nothing_yet["old"]] == before == [hit["id"] for hit in nothing_yet["merged"]]
        assert (nothing_yet["new"], nothing_yet["kept"], nothing_yet["flip"]) == ([], 12, "none")
        move(gallery_path, new_encoder, share=0.5)
        for compared in (
            client.post("/v1/compare/item", json={"id": photo_id(9), "k": 12}).json(),
            client.post("/v1/compare/image", files=upload(9), data={"k": 13}).json(),
        ):
            own = compared["label"] is None  # the picture finds the item that it is, which has rank 1 then
            lists = {name: [hit["id"] for hit in compared[name]][own:] for name in ("old", "new", "merged")}
            assert lists["old"] == before
            if not own:
                assert lists["merged"] == ids(by_item(client, 9, k=12))
            with Gallery.open(gallery_path, readonly=True) as gallery:
                part = gallery.snapshot().new
                names = gallery.storage.names(part.nums.tolist())
                distance = 1 - part.vectors() @ new.encode([picture_bytes(9)])[0]
                nearest = [names[num] for num in part.nums[np.argsort(distance)].tolist() if names[num] != photo_id(9)]
                moved = set(names.values())
            if not own or photo_id(9) in moved:
                assert lists["new"] == nearest[:12]
            for name in ("old", "new", "merged"):
                for hit in compared[name]:
                    assert hit["moved"] == (hit["id"] in moved)
                    assert hit["space"] == (old if hit["side"] == "old" else new).fingerprint
                    if hit["id"] in lists["old"]:
                        assert hit["rank_before"] == lists["old"].index(hit["id"]) + 1 + own
            assert {hit["side"] for hit in compared["old"]} == {"old"}
            assert {hit["side"] for hit in compared["new"]} == {"new"}
            shown = {hit["id"] for hit in compared["merged"]}
            assert compared["kept"] == sum(hit["id"] in shown for hit in compared["old"])
            assert (compared["old_name"], compared["new_name"]) == ("old", "new")
        assert str(tmp_path) not in json.dumps(compared)


def test_flips_are_told_where_the_query_is_an_item_with_a_label(gallery_path, new_encoder):
    seen = set()
    with served(gallery_path) as client:
        begin_upgrade(gallery_path, new_encoder)
        move(gallery_path, new_encoder)
        for number in range(PHOTOS):
            compared = client.post("/v1/compare/item", json={"id": photo_id(number), "k": 3}).json()
            first = [compared[name][0]["metadata"]["label"] == label_of(number) for name in ("old", "merged")]
            assert compared["label"] == label_of(number)
            assert [compared[name][0]["right"] for name in ("old", "merged")] == first
            expected = {(True, False): "negative", (False, True): "positive"}.get(tuple(first), "none")
            assert compared["flip"] == expected
            seen.add(expected)
    with served(gallery_path, label_key=None) as client:
        compared = client.post("/v1/compare/item", json={"id": photo_id(1), "k": 3}).json()
        assert (compared["label"], compared["flip"], compared["old"][0]["right"]) == (None, None, None)
    assert "none" in seen


def test_a_comparison_ends_with_its_upgrade(gallery_path, new_encoder):
    with served(gallery_path) as client:
        begin_upgrade(gallery_path, new_encoder)
        move(gallery_path, new_encoder, share=0.5)
        assert client.post("/v1/compare/item", json={"id": photo_id(9)}).status_code == 200
        before = ids(by_picture(client, 9, k=PHOTOS))
        with Gallery.open(gallery_path) as gallery:
            rollback(gallery)
        refused(client.post("/v1/compare/item", json={"id": photo_id(9)}), 409)
        assert ids(by_picture(client, 9, k=PHOTOS)) != before


# ---------------------------------------------------------------------------------------- batches and processes


def test_requests_that_wait_together_are_one_call_and_those_who_went_away_are_left_out():
    calls: list[list[int]] = []
    gate = threading.Event()

    def call(numbers):
        calls.append(list(numbers))
        if len(calls) == 1:
            gate.wait(10)
        return [ValueError(str(number)) if number < 0 else number * 2 for number in numbers]

    async def story():
        with ThreadPoolExecutor(1) as thread:
            batcher: Batcher[int, int] = Batcher(call, thread, most=3, waiting=6)
            batcher.start()
            first = asyncio.create_task(batcher(1))
            while not calls:
                await asyncio.sleep(0.001)
            rest = [asyncio.create_task(batcher(number)) for number in (2, 3, -4, 5, 6, 7)]
            await asyncio.sleep(0)
            with pytest.raises(ProblemError) as full:
                await batcher(8)
            assert full.value.status == 503
            rest[1].cancel()
            gate.set()
            answers = await asyncio.gather(first, *rest, return_exceptions=True)
            await batcher.stop()
            with pytest.raises(ProblemError):
                await batcher(9)
        return answers

    answers = asyncio.run(story())
    assert calls == [[1], [2, -4, 5], [6, 7]]
    assert answers[:2] == [2, 4] and isinstance(answers[2], asyncio.CancelledError)
    assert isinstance(answers[3], ValueError) and answers[4:] == [10, 12, 14]


def test_many_clients_at_once_are_encoded_in_batches(gallery_path):
    with served(gallery_path, read_only=True) as client, ThreadPoolExecutor(16) as clients:
        alone = [ids(by_picture(client, number, k=5)) for number in range(16)]
        assert list(clients.map(lambda number: ids(by_picture(client, number, k=5)), range(16))) == alone
        counted = client.get("/metrics").text
        assert 'bowerbird_batch_size_count{of="encode"}' in counted
        assert 'bowerbird_searches_total{kind="image"} 32.0' in counted


def test_what_was_found_and_is_deleted_and_compacted_before_it_is_described_costs_no_request(gallery_path, monkeypatch):
    doomed = photo_id(13)
    with served(gallery_path) as client:
        gallery = client.app.state.server.gallery
        before = ids(by_picture(client, 7, k=PHOTOS))
        for step in ("names", "items"):  # in the search; and after it
            asked = getattr(gallery.storage, step)
            done: list[str] = []

            def afterwards(nums, asked=asked, done=done, doomed=doomed):
                nums = list(nums)
                if len(nums) > 1 and not done:
                    done.append(doomed)
                    with Gallery.open(gallery_path) as other:
                        other.delete([doomed])
                        other.compact()
                return asked(nums)

            monkeypatch.setattr(gallery.storage, step, afterwards)
            found = ids(by_picture(client, 7, k=PHOTOS))
            assert done and found == [name for name in before if name != doomed]
            before, doomed = found, photo_id(19)


def test_a_search_that_fails_in_a_way_that_nobody_foresaw_fails_alone(gallery_path, monkeypatch):
    with served(gallery_path, read_only=True) as client:
        server = client.app.state.server
        allowed = server.gallery.storage.allowed

        def broken(snapshot, where):
            if where == {"label": "bars"}:
                raise RuntimeError("a bug")
            return allowed(snapshot, where)

        monkeypatch.setattr(server.gallery.storage, "allowed", broken)
        vector = np.ones(DIM).tolist()
        queries = [
            Query("vector", {SERVING: vector}, Search(k=3, where=where), time.perf_counter())
            for where in (None, {"label": "bars"}, {"label": "rings"}, None)
        ]
        answers = answer(server.gallery, server.encoders, server.metrics, queries)
        assert [type(answer) for answer in answers] == [SearchResponse, RuntimeError, SearchResponse, SearchResponse]
        assert answers[0].hits == answers[3].hits != answers[2].hits


def test_searches_that_wait_together_find_what_each_finds_alone(gallery_path, old_encoder):
    loaded = load_encoder(old_encoder, device="cpu")
    rng = np.random.default_rng(11)
    asked = [
        {
            "k": int(rng.integers(1, 30)),
            "offset": int(rng.integers(0, 9)),
            "where": [None, {"label": "rings"}, {"number": [1, 2.0, "3", True]}, {"number": 7, "label": "rings"}][
                i % 4
            ],
        }
        for i in range(24)
    ]
    vectors = rng.standard_normal((len(asked), DIM)).astype(np.float32)
    with served(gallery_path, read_only=True) as client, Gallery.open(gallery_path, readonly=True) as gallery:
        service = SearchService(gallery, [loaded])
        server = client.app.state.server
        answers = answer(
            server.gallery,
            server.encoders,
            server.metrics,
            [
                Query("vector", {SERVING: vector.tolist()}, Search(**search), 0.0)
                for vector, search in zip(vectors, asked, strict=True)
            ],
        )
        for vector, search, found in zip(vectors, asked, answers, strict=True):
            last = search["offset"] + search["k"]
            alone = service.search(vectors={loaded.fingerprint: vector[None]}, k=last, where=search["where"])
            expected = list(zip(alone.ids[0], alone.distances[0].tolist(), strict=False))[search["offset"] :]
            assert [(hit.id, hit.distance) for hit in found.hits] == expected
            assert [hit.rank for hit in found.hits] == list(range(search["offset"] + 1, last + 1))[: len(expected)]


def test_a_batch_that_is_answered_wrongly_fails_and_the_next_one_is_answered():
    async def story():
        with ThreadPoolExecutor(1) as thread:
            batcher: Batcher[int, int] = Batcher(lambda asked: [] if 0 in asked else list(asked), thread, most=4)
            batcher.start()
            with pytest.raises(ValueError):
                await batcher(0)
            async with asyncio.timeout(10):
                assert await batcher(5) == 5
            await batcher.stop()

    asyncio.run(story())


@pytest.mark.parametrize(
    "text",
    ["\ud800", "\x00", "\u202e\u0000", "e\u0301" * 2000, "\U0001f99c", "'; DROP TABLE item; --", "\ufeff", '"\\'],
)
def test_whatever_a_text_is_made_of_it_is_found_or_refused(gallery_path, text):
    with served(gallery_path, read_only=True) as client:
        headers = {"Content-Type": "application/json"}
        bodies = {"/v1/search/item": [{"id": text}], "/v1/search/text": [{"text": text}]}
        bodies["/v1/search/vector"] = [
            {"vector": [1.0] * DIM, "where": {"label": text}},
            {"vector": [1.0] * DIM, "where": {text: "label"}},
            {"vectors": {text: [1.0] * DIM}},
        ]
        for path, asked in bodies.items():
            for body in asked:
                answer = client.post(path, content=json.dumps(body), headers=headers)
                if answer.status_code != 200:
                    assert answer.status_code in (404, 409, 422), (path, answer.text)
                    refused(answer, answer.status_code)
                else:
                    assert answer.json()["hits"] == []


async def _with_decoders(story, **settings):
    async with Decoders(settings_for("nowhere", **settings)) as decoders:
        return await story(decoders)


def test_a_prepared_picture_is_to_the_bit_what_the_encoder_would_have_read(tmp_path):
    wanted = (
        Preprocessing(size=16, interpolation="bilinear"),
        Preprocessing(size=12, resize="crop", crop_pct=0.9, background=(0, 0, 0)),
    )
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 255, (37, 53, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = tmp_path / "a.png"

    async def story(decoders):
        part = await decoders.prepare(f"{source}#xywh=5,6,20,10", wanted[:1])
        thumbnail = Image.open(io.BytesIO(await decoders.thumbnail(str(source), 32)))
        return await decoders.prepare(source.read_bytes(), wanted), part[0], thumbnail

    prepared, part, thumbnail = asyncio.run(_with_decoders(story))
    for array, how in zip(prepared, wanted, strict=True):
        assert array.tobytes() == how(open_image(source, background=how.background)).tobytes()
    assert part.tobytes() == wanted[0](open_image(f"{source}#xywh=5,6,20,10")).tobytes()
    assert (thumbnail.format, max(thumbnail.size)) == ("WEBP", 32)


def test_a_decoder_that_takes_too_long_or_is_killed_costs_one_request(tmp_path):
    how = Preprocessing(size=8)

    async def story(decoders):
        with pytest.raises(DataError, match="longer than"):
            await decoders._run(serve_tasks.sleep, b"forever")
        with pytest.raises(DataError, match="memory"):
            await decoders._run(serve_tasks.die, b"now")
        with pytest.raises(DataError, match="memory"):
            await decoders._run(serve_tasks.fill_memory, b"up")
        before = await decoders._call(os.getpid)
        os.kill(before, signal.SIGKILL)  # while it has nothing to do
        await asyncio.sleep(0.5)
        return [await decoders.prepare(picture_bytes(number), [how]) for number in range(3)]

    assert decoding.BASE_MEMORY < 4 << 30
    found = asyncio.run(_with_decoders(story, decode_seconds=3.0, max_pixels=10_000))
    for number, (array,) in enumerate(found):
        assert array.tobytes() == how(open_image(picture_bytes(number))).tobytes()


def test_a_decoder_that_takes_nothing_any_more_is_replaced(monkeypatch):
    how = Preprocessing(size=8)

    async def story(decoders):
        hanging = await decoders._call(os.getpid)
        os.kill(hanging, signal.SIGSTOP)
        monkeypatch.setattr(decoding, "START_SECONDS", 0.0)
        async with asyncio.timeout(60):
            return await decoders.prepare(picture_bytes(1), [how])

    (array,) = asyncio.run(_with_decoders(story, decode_seconds=2.0))
    assert array.tobytes() == how(open_image(picture_bytes(1))).tobytes()


def test_pictures_that_cannot_wait_are_told_to_come_again(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_WAITING", 2)

    async def story(decoders):
        busy = [asyncio.create_task(decoders._run(serve_tasks.sleep, b"")) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(ProblemError) as full:
            await decoders.prepare(picture_bytes(1), [Preprocessing(size=8)])
        for task in busy:
            task.cancel()  # their clients went away: the work is stopped, and its place is free
        await asyncio.gather(*busy, return_exceptions=True)
        start = time.monotonic()
        await decoders.prepare(picture_bytes(1), [Preprocessing(size=8)])
        return full.value, time.monotonic() - start

    problem, seconds = asyncio.run(_with_decoders(story, decode_seconds=30.0))
    assert (problem.status, problem.headers) == (503, {"Retry-After": "1"})
    assert seconds < 10


def test_the_content_of_an_item_that_is_gone_tells_no_folder(tmp_path: Path):
    async def story(decoders):
        for name in ("gone.png", "gone.mp4", "gone.mp4#t=1,2", "gone.png#xywh=1,2,3,4"):
            with pytest.raises(DataError) as error:
                await decoders.thumbnail(str(tmp_path / name), 64)
            assert str(tmp_path) not in str(error.value)

    asyncio.run(_with_decoders(story))
