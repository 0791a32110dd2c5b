"""Items over HTTP: pictures and vectors in, again, out; bad pictures; what a batch is when something goes wrong."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serve_world import (
    begin_upgrade,
    fill,
    gallery_path,
    make_photos,
    move,
    new_encoder,
    old_encoder,
    photo_id,
    photos,
    picture,
    picture_bytes,
    running_server,
    served,
    world,
)

from bowerbird.errors import GalleryLockedError, InputError, SpaceError, StoreUnavailableError
from bowerbird.gallery import Gallery
from bowerbird.serve.uploads import Uploads, suffix_of

__all__ = ["gallery_path", "new_encoder", "old_encoder", "photos", "world"]
OTHER = 100  # pictures from this number on are not in the gallery


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, old_encoder: Path, photos: Path) -> Iterator[TestClient]:
    """One service for the tests that leave the gallery as they found it, or add ids of their own."""
    path = fill(tmp_path_factory.mktemp("items") / "gallery", old_encoder, photos)
    with served(path) as found:
        yield found


def add(client: Any, items: list[dict[str, Any]], files: list[bytes], *, on_error: str = "raise") -> Any:
    parts = [("items", (None, json.dumps(items)))]
    parts += [("files", (f"{number}.png", data, "image/png")) for number, data in enumerate(files)]  # type: ignore[misc]
    answer: Any = client.post("/v1/items", params={"on_error": on_error}, files=parts)
    return answer


def ok(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def problem(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    detail: str = answer.json()["detail"]
    return detail


def gallery_of(client: TestClient) -> Gallery:
    found: Gallery = client.app.state.server.gallery  # type: ignore[attr-defined]
    return found


def contents_of(client: TestClient) -> Path:
    return Path(gallery_of(client).path) / "contents"


def kept(client: TestClient) -> set[Path]:
    """The uploaded pictures on the disk."""
    return {file for file in contents_of(client).rglob("*") if file.is_file() and file.name != "owner.json"}


def count(client: TestClient) -> int:
    items: int = client.get("/v1/gallery").json()["items"]
    return items


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def nearest(client: TestClient, data: bytes) -> tuple[str, float]:
    hit = ok(client.post("/v1/search/image", files={"file": ("q", data)}, data={"k": "1"}))["hits"][0]
    return hit["id"], hit["distance"]


# ---------------------------------------------------------------------------------------------------- adding


def test_an_added_picture_is_found_and_its_file_is_kept_as_it_was_sent(client: TestClient) -> None:
    data = picture_bytes(OTHER)
    added = ok(add(client, [{"id": "new", "metadata": {"label": "dots", "year": 2026}}], [data]))
    assert (added["added"], added["replaced"], added["unchanged"], added["failed"]) == (["new"], [], [], {})
    name, distance = nearest(client, data)
    assert name == "new" and distance == pytest.approx(0, abs=1e-6)
    item = ok(client.get("/v1/item", params={"id": "new"}))
    assert item["metadata"] == {"label": "dots", "year": 2026}
    assert item["content_hash"] == hashlib.sha256(data).hexdigest()
    assert item["has_picture"] and item["side"] == "new"
    file = Path(str(gallery_of(client).get("new").uri))
    assert file.read_bytes() == data and file.is_relative_to(contents_of(client))


def test_uploaded_pictures_move_with_the_folder_of_the_gallery(gallery_path: Path) -> None:
    data = picture_bytes(OTHER)
    with served(gallery_path) as client:
        ok(add(client, [{"id": "new"}], [data]))
    moved = gallery_path.rename(gallery_path.with_name("moved"))
    with served(moved) as client:
        file = Path(str(gallery_of(client).get("new").uri))
        assert file.is_relative_to(moved) and file.read_bytes() == data
        assert client.get("/v1/thumbnail", params={"id": "new"}).status_code == 200
        assert ok(add(client, [{"id": "new"}], [data]))["unchanged"] == ["new"]
        ok(client.post("/v1/items/delete", json={"ids": ["new"]}))
        assert not file.exists()


def test_sending_a_batch_again_changes_nothing(client: TestClient) -> None:
    items = [{"id": "again/a"}, {"id": "again/b", "metadata": {"n": 1}}]
    data = [picture_bytes(OTHER + 1), picture_bytes(OTHER + 2)]
    first = ok(add(client, items, data))
    second = ok(add(client, items, data))
    assert second["unchanged"] == ["again/a", "again/b"] and not second["added"] and not second["replaced"]
    assert second["epoch"] == first["epoch"]


def test_another_picture_or_other_metadata_replace_an_item(client: TestClient) -> None:
    ok(add(client, [{"id": "r", "metadata": {"n": 1}}], [picture_bytes(OTHER + 3)]))
    before = Path(str(gallery_of(client).get("r").uri))
    assert ok(add(client, [{"id": "r", "metadata": {"n": 2}}], [picture_bytes(OTHER + 3)]))["replaced"] == ["r"]
    assert before.is_file()  # the picture is the same
    assert ok(client.get("/v1/item", params={"id": "r"}))["metadata"] == {"n": 2}
    assert ok(add(client, [{"id": "r", "metadata": {"n": 2}}], [picture_bytes(OTHER + 4)]))["replaced"] == ["r"]
    assert not before.exists()
    assert nearest(client, picture_bytes(OTHER + 4))[0] == "r"


def test_metadata_that_only_looks_the_same_replaces_an_item(client: TestClient) -> None:
    for value in (1, True, 1.5, "1", None):
        ok(add(client, [{"id": "typed", "metadata": {"n": value}}], [picture_bytes(OTHER + 8)]))
        found = ok(client.get("/v1/item", params={"id": "typed"}))["metadata"]["n"]
        assert (found, type(found)) == (value, type(value))


def test_a_picture_whose_file_was_lost_is_kept_again_when_it_is_sent_again(client: TestClient) -> None:
    ok(add(client, [{"id": "lost"}], [picture_bytes(OTHER + 5)]))
    Path(str(gallery_of(client).get("lost").uri)).unlink()
    assert ok(add(client, [{"id": "lost"}], [picture_bytes(OTHER + 5)]))["unchanged"] == ["lost"]
    assert Path(str(gallery_of(client).get("lost").uri)).is_file()


def test_two_items_may_have_the_same_picture_and_one_of_them_may_go(client: TestClient) -> None:
    data = picture_bytes(OTHER + 6)
    ok(add(client, [{"id": "twin 1"}, {"id": "twin 2"}], [data, data]))
    ok(client.post("/v1/items/delete", json={"ids": ["twin 1"]}))
    assert ok(client.get("/v1/item", params={"id": "twin 2"}))["has_picture"]
    assert client.get("/v1/thumbnail", params={"id": "twin 2"}).status_code == 200


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/", "a\nb", "<script>alert(1)</script>", "é💥", "a?b#c&d=e", "%00"]
)
def test_an_id_may_be_any_text_and_is_in_no_path(client: TestClient, name: str) -> None:
    ok(add(client, [{"id": name, "metadata": {"note": name}}], [picture_bytes(OTHER + 7)]))
    item = ok(client.get("/v1/item", params={"id": name}))
    assert (item["id"], item["metadata"]) == (name, {"note": name})
    assert client.get("/v1/thumbnail", params={"id": name}).status_code == 200
    file = Path(str(gallery_of(client).get(name).uri))
    assert file.parent.parent == contents_of(client)
    assert ok(client.post("/v1/items/delete", json={"ids": [name]}))["deleted"] == [name]
    assert not file.exists()


def test_many_clients_at_once_lose_nothing(client: TestClient) -> None:
    def one(number: int) -> dict[str, Any]:
        return ok(add(client, [{"id": f"many/{number % 20}"}], [picture_bytes(OTHER + 20 + number % 20)]))

    before = gallery_of(client).snapshot().epoch
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(40)))  # every picture twice
    assert sorted(name for answer in answers for name in answer["added"]) == sorted(f"many/{n}" for n in range(20))
    assert all(len(answer["added"]) + len(answer["unchanged"]) == 1 for answer in answers)
    assert gallery_of(client).snapshot().epoch <= before + 20
    assert gallery_of(client).verify().ok


# ---------------------------------------------------------------------------------------------------- pictures


def animated() -> bytes:
    frames = [picture(OTHER + 50), picture(3), picture(4)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(OTHER + 51).resize((48, 24)), "JPEG", exif=exif, quality=95)


def deep() -> bytes:
    grey = np.asarray(picture(OTHER + 52).convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def transparent() -> bytes:
    image = picture(OTHER + 53).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return encoded(image, "PNG")


UNUSUAL = {
    "animated GIF": animated,
    "JPEG with an EXIF rotation": turned,
    "CMYK JPEG": lambda: encoded(picture(OTHER + 54).convert("CMYK"), "JPEG"),
    "16-bit PNG": deep,
    "transparent PNG": transparent,
    "palette PNG": lambda: encoded(picture(OTHER + 55).convert("P"), "PNG"),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG"),
    "WebP": lambda: encoded(picture(OTHER + 56), "WEBP"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_pictures_are_read_as_everywhere_else(client: TestClient, old_encoder: Path, kind: str) -> None:
    from bowerbird.encoders import load_encoder

    data = UNUSUAL[kind]()
    ok(add(client, [{"id": kind}], [data]))
    stored = gallery_of(client).vectors_of([kind])[0]
    expected = load_encoder(old_encoder, device="cpu").encode([data])[0]
    assert np.allclose(stored, expected, atol=1e-5)
    shown = client.get("/v1/thumbnail", params={"id": kind, "size": 64})
    assert shown.headers["content-type"] == "image/webp"
    image = Image.open(io.BytesIO(shown.content))
    assert image.mode == "RGB" or image.getextrema()[-1] == (255, 255)
    if "EXIF" in kind:
        assert image.height == 2 * image.width  # upright: it was 48 x 24 on its side


BAD = {
    "no image": (b"GET / HTTP/1.1\r\n\r\n" * 20, 422, "not an image"),
    "an empty file": (b"", 422, "empty"),
    "a 100-megapixel PNG": (encoded(Image.new("1", (10_000, 10_000)), "PNG"), 413, "pixels"),
    "a truncated JPEG": (encoded(picture(1).resize((200, 200)), "JPEG")[:900], 422, "truncated"),
    "HTML that claims to be a picture": (b"<html><script>alert(1)</script></html>", 422, "not an image"),
    "a picture format that is not read": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "not an image"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_refuses_its_batch_and_leaves_nothing(client: TestClient, kind: str) -> None:
    data, status, why = BAD[kind]
    before, files = count(client), kept(client)
    batch = [{"id": "good"}, {"id": "the bad one"}, {"id": "also good"}]
    answer = add(client, batch, [picture_bytes(OTHER + 60), data, picture_bytes(OTHER + 61)])
    detail = problem(answer, status)
    assert "'the bad one'" in detail and why in detail
    assert (count(client), kept(client)) == (before, files)


def test_bad_pictures_are_left_out_and_named_where_the_client_asks_for_it(client: TestClient) -> None:
    batch = [{"id": f"mixed/{kind}"} for kind in BAD] + [{"id": "mixed/good"}]
    answer = add(client, batch, [data for data, _, _ in BAD.values()] + [picture_bytes(OTHER + 62)], on_error="skip")
    added = ok(answer)
    assert added["added"] == ["mixed/good"]
    assert set(added["failed"]) == {f"mixed/{kind}" for kind in BAD}
    for kind, (_, _, why) in BAD.items():
        assert why in added["failed"][f"mixed/{kind}"]


def test_the_suffix_of_a_file_is_that_of_its_content() -> None:
    assert [suffix_of(encoded(picture(0), kind)) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")] == [
        "png",
        "jpg",
        "gif",
        "webp",
        "bmp",
        "tif",
    ]


# ---------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("items", "files", "why"),
    [
        ([], 0, "items"),
        ([{"id": "a"}], 0, "1 items need 1 files"),
        ([{"id": "a"}], 2, "1 items need 1 files"),
        ([{"id": ""}], 1, "at least 1 character"),
        ([{"id": "a" * 1025}], 1, "at most 1024"),
        ([{"id": "a"}, {"id": "a"}], 2, "'a' is given twice"),
        ([{"id": "a\0b"}], 1, "NUL"),
        ([{"id": 7}], 1, "valid string"),
        ([{"name": "a"}], 1, "id"),
        ([{"id": "a", "metdata": {}}], 1, "metdata"),
        ([{"id": "a", "metadata": {"list": [1, 2]}}], 1, "metadata"),
        ([{"id": "a", "metadata": {"deep": {"er": 1}}}], 1, "metadata"),
        ([{"id": "a", "metadata": {"nan": float("nan")}}], 1, "finite"),
        ([{"id": "a", "metadata": {'quo"te': 1}}], 1, "metadata key"),
        ({"id": "a"}, 1, "array"),
    ],
)
def test_a_batch_that_is_none_is_refused(client: TestClient, items: Any, files: int, why: str) -> None:
    before, there = count(client), kept(client)
    answer = add(client, items, [picture_bytes(OTHER + 70 + number) for number in range(files)])
    assert why in problem(answer, 422) + json.dumps(answer.json().get("errors", ""))
    assert (count(client), kept(client)) == (before, there)


def test_items_that_are_no_json_are_refused(client: TestClient) -> None:
    for text in ("", "{", "[{]", "null", '[{"id": "\\ud83d"}]'):
        answer = client.post("/v1/items", data={"items": text}, files=[("files", ("a", b"x"))])
        assert answer.status_code == 422
    assert problem(client.post("/v1/items", json={"items": []}), 415)
    assert "items" in problem(client.post("/v1/items", files=[("files", ("a", b"x"))]), 422)
    assert "file name" in problem(
        client.post("/v1/items", files={"items": (None, '[{"id": "a"}]'), "files": (None, "x")}), 422
    )


def test_more_pictures_than_a_request_may_have_are_refused(gallery_path: Path) -> None:
    with served(gallery_path, max_files=2) as client:
        answer = add(client, [{"id": str(n)} for n in range(3)], [picture_bytes(OTHER + n) for n in range(3)])
        assert answer.status_code in (400, 413)
        assert count(client) == 60


def test_too_large_a_request_is_refused(gallery_path: Path) -> None:
    with served(gallery_path, max_upload_bytes=50_000) as client:
        problem(add(client, [{"id": "a"}], [b"\x89PNG" + bytes(60_000)]), 413)
        ok(add(client, [{"id": "a"}], [picture_bytes(OTHER)]))


# ---------------------------------------------------------------------------------------------------- vectors


def test_vectors_are_added_without_a_picture(client: TestClient) -> None:
    body = {"items": [{"id": "v", "vector": [3.0] + [0.0] * 23, "metadata": {"n": 1}}]}
    assert ok(client.post("/v1/items/vectors", json=body))["added"] == ["v"]
    assert ok(client.post("/v1/items/vectors", json=body))["unchanged"] == ["v"]
    body["items"][0]["vector"] = [0.0] * 23 + [0.5]
    assert ok(client.post("/v1/items/vectors", json=body))["replaced"] == ["v"]
    assert gallery_of(client).vectors_of(["v"])[0].tolist() == [0.0] * 23 + [1.0]
    assert not ok(client.get("/v1/item", params={"id": "v"}))["has_picture"]
    assert "no picture" in problem(client.get("/v1/thumbnail", params={"id": "v"}), 404)


def same_numbers(number: str) -> str:
    return f'{{"items": [{{"id": "w", "vector": [{", ".join([number] * 24)}]}}]}}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"items": []}', "at least 1"),
        ('{"items": [{"id": "w", "vector": [1.0]}]}', "width 1"),
        (same_numbers("0"), "zero"),
        (same_numbers("NaN"), ""),
        (same_numbers("1e300"), "infinity"),
        (same_numbers("1")[:-1] + ', "space": "x"}', "no space 'x'"),
        ('{"items": [{"id": "w", "vector": ["a"]}]}', "number"),
    ],
)
def test_vectors_that_are_none_are_refused(client: TestClient, text: str, why: str) -> None:
    answer = client.post("/v1/items/vectors", content=text, headers={"content-type": "application/json"})
    assert why in problem(answer, 422) + json.dumps(answer.json().get("errors", ""))
    assert client.get("/v1/item", params={"id": "w"}).status_code == 404


# ---------------------------------------------------------------------------------------------------- deleting, reading


def test_deleting_is_idempotent_and_takes_the_picture_with_it(client: TestClient) -> None:
    ok(add(client, [{"id": "gone 1"}, {"id": "gone 2"}], [picture_bytes(OTHER + 80), picture_bytes(OTHER + 81)]))
    files = [Path(str(gallery_of(client).get(name).uri)) for name in ("gone 1", "gone 2")]
    deleted = ok(client.post("/v1/items/delete", json={"ids": ["gone 1", "never", "gone 1", "gone 2"]}))
    assert (deleted["deleted"], deleted["absent"]) == (["gone 1", "gone 2"], ["never"])
    assert not any(file.exists() for file in files)
    again = ok(client.post("/v1/items/delete", json={"ids": ["gone 1", "gone 2"]}))
    assert (again["deleted"], again["absent"], again["epoch"]) == ([], ["gone 1", "gone 2"], deleted["epoch"])
    assert ok(add(client, [{"id": "gone 1"}], [picture_bytes(OTHER + 80)]))["added"] == ["gone 1"]
    problem(client.post("/v1/items/delete", json={"ids": []}), 422)


def test_deleting_an_item_of_a_folder_leaves_its_file_alone(tmp_path: Path, old_encoder: Path) -> None:
    mine = make_photos(tmp_path / "mine", 3)
    with served(fill(tmp_path / "gallery", old_encoder, mine)) as client:
        ok(client.post("/v1/items/delete", json={"ids": [photo_id(0)]}))
        ok(add(client, [{"id": photo_id(1)}], [picture_bytes(OTHER)]))
    assert len(list(mine.rglob("*.png"))) == 3


def test_pages_of_items_are_all_items_once(gallery_path: Path) -> None:
    with served(gallery_path) as client:
        ids: list[str] = []
        after: int | None = -1
        while after is not None:
            page = ok(client.get("/v1/items", params={"after": after, "limit": 25}))
            ids += [item["id"] for item in page["items"]]
            after = page["next"]
        assert ids == sorted(photo_id(number) for number in range(60))
        assert ok(client.get("/v1/items", params={"limit": 1}))["items"][0]["metadata"]["label"] == "bars"
        for bad in ({"limit": 0}, {"limit": 1001}, {"after": "x"}, {"after": 2**70}):
            problem(client.get("/v1/items", params=bad), 422)


def test_an_item_that_is_not_there_is_a_404_with_a_suggestion(client: TestClient) -> None:
    detail = problem(client.get("/v1/item", params={"id": "dots/000.pgn"}), 404)
    assert "no item" in detail and str(gallery_of(client).path) not in detail
    problem(client.get("/v1/thumbnail", params={"id": "nothing"}), 404)
    problem(client.get("/v1/item", params={"id": ""}), 422)
    problem(client.get("/v1/thumbnail", params={"id": photo_id(0), "size": 4096}), 422)


def test_a_thumbnail_is_small_keeps_its_shape_and_is_made_once(client: TestClient, monkeypatch: Any) -> None:
    ok(add(client, [{"id": "wide"}], [encoded(Image.effect_noise((900, 300), 50), "PNG")]))
    first = client.get("/v1/thumbnail", params={"id": "wide", "size": 128})
    assert Image.open(io.BytesIO(first.content)).size in ((128, 43), (128, 42))
    server = client.app.state.server  # type: ignore[attr-defined]
    monkeypatch.setattr(server.decoders, "thumbnail", None)  # would be a TypeError
    again = client.get("/v1/thumbnail", params={"id": "wide", "size": 128})
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])
    known = {"If-None-Match": first.headers["etag"]}
    same = client.get("/v1/thumbnail", params={"id": "wide", "size": 128}, headers=known)
    assert (same.status_code, same.content) == (304, b"")


def test_a_thumbnail_of_a_replaced_item_is_another_one(client: TestClient) -> None:
    ok(add(client, [{"id": "changing"}], [picture_bytes(OTHER + 82)]))
    first = client.get("/v1/thumbnail", params={"id": "changing"})
    ok(add(client, [{"id": "changing"}], [picture_bytes(OTHER + 83)]))
    known = {"If-None-Match": first.headers["etag"]}
    second = client.get("/v1/thumbnail", params={"id": "changing"}, headers=known)
    assert second.status_code == 200 and second.content != first.content


def test_a_picture_that_is_gone_is_a_404_that_names_no_path(client: TestClient) -> None:
    ok(add(client, [{"id": "vanished"}], [picture_bytes(OTHER + 84)]))
    file = Path(str(gallery_of(client).get("vanished").uri))
    file.unlink()
    assert file.name not in problem(client.get("/v1/thumbnail", params={"id": "vanished"}), 404)


def test_thumbnails_are_kept_up_to_a_number_of_bytes() -> None:
    import asyncio

    from bowerbird.gallery.space import Item
    from bowerbird.serve.settings import ServeSettings
    from bowerbird.serve.thumbnails import Thumbnails

    class Made:
        calls = 0

        async def thumbnail(self, source: str, size: int) -> bytes:
            self.calls += 1
            return bytes(400)

    async def ask() -> list[int]:
        made = Made()
        thumbnails = Thumbnails(ServeSettings(gallery="x"), made, most_bytes=1000)  # type: ignore[arg-type]
        calls = []
        for num in (1, 2, 1, 3, 1, 2):  # two fit; the least recently used is forgotten
            await thumbnails.get(Item(str(num), num, uri="x"), 64)
            calls.append(made.calls)
        return calls

    assert asyncio.run(ask()) == [1, 2, 2, 3, 3, 4]


# ---------------------------------------------------------------------------------------------------- states


def test_new_items_go_into_the_space_that_is_written_while_an_upgrade_is_under_way(
    gallery_path: Path, new_encoder: Path, old_encoder: Path, world: None
) -> None:
    from bowerbird.encoders import load_encoder

    with served(gallery_path) as client:
        begin_upgrade(gallery_path, new_encoder)
        move(gallery_path, new_encoder, share=0.5)
        new = load_encoder(new_encoder, device="cpu")
        data = picture_bytes(OTHER)
        ok(add(client, [{"id": "during"}, {"id": photo_id(0)}], [data, picture_bytes(OTHER + 1)]))
        for name, content in (("during", data), (photo_id(0), picture_bytes(OTHER + 1))):
            item = ok(client.get("/v1/item", params={"id": name}))
            assert (item["spaces"], item["side"]) == ([new.fingerprint], "new")
            stored = gallery_of(client).vectors_of([name], new.fingerprint)
            assert np.allclose(stored, new.encode([content]), atol=1e-5)
        vector = {"id": "v", "vector": [1.0] * 24}
        assert "say of which `space`" in problem(client.post("/v1/items/vectors", json={"items": [vector]}), 422)
        old = load_encoder(old_encoder, device="cpu").fingerprint
        ok(client.post("/v1/items/vectors", json={"items": [vector], "space": old}))
        assert ok(client.get("/v1/item", params={"id": "v"}))["side"] == "old"
        assert ok(client.post("/v1/items/delete", json={"ids": [photo_id(1), "during"]}))["absent"] == []
        assert gallery_of(client).verify().ok


def test_a_batch_that_was_encoded_before_an_upgrade_ended_is_encoded_again(
    gallery_path: Path, new_encoder: Path, world: None, monkeypatch: Any
) -> None:
    from bowerbird.encoders import load_encoder

    with served(gallery_path) as client:
        begin_upgrade(gallery_path, new_encoder)
        server = client.app.state.server  # type: ignore[attr-defined]
        encode = server.encoders.encode

        async def encode_and_roll_back(*given: Any) -> Any:
            vector = await encode(*given)
            monkeypatch.setattr(server.encoders, "encode", encode)
            with Gallery.open(gallery_path) as other:
                other.store.rollback()
            return vector

        monkeypatch.setattr(server.encoders, "encode", encode_and_roll_back)
        ok(add(client, [{"id": "late"}], [picture_bytes(OTHER)]))
        serving = gallery_of(client).snapshot().serving
        assert serving != load_encoder(new_encoder, device="cpu").fingerprint
        assert ok(client.get("/v1/item", params={"id": "late"}))["spaces"] == [serving]


def test_a_batch_is_encoded_again_also_where_an_upgrade_ended_and_the_same_one_began(
    gallery_path: Path, monkeypatch: Any
) -> None:
    with served(gallery_path) as client:
        commits = client.app.state.server.contents.commits  # type: ignore[attr-defined]
        commit = commits.add

        async def refused_once(*arguments: Any) -> Any:
            monkeypatch.setattr(commits, "add", commit)
            commits.uploads.release(arguments[2])
            raise SpaceError("another space is written now")  # and by the time of the answer the first one again

        monkeypatch.setattr(commits, "add", refused_once)
        assert ok(add(client, [{"id": "a"}], [picture_bytes(OTHER)]))["added"] == ["a"]
        assert kept(client) == {Path(str(gallery_of(client).get("a").uri))}


def test_a_lifted_gallery_takes_pictures_by_the_encoder_that_its_vectors_came_from(
    gallery_path: Path, old_encoder: Path, world: None
) -> None:
    from bowerbird.encoders import load_encoder
    from bowerbird.gallery import Space
    from bowerbird.gallery.transform import VectorTransform
    from bowerbird.upgrade.lift import begin_lift, lifter
    from bowerbird.upgrade.run import run
    from bowerbird.upgrade.state import finish

    old = load_encoder(old_encoder, device="cpu")
    target = Space("new " * 4, "a new encoder", 8)
    weight = np.random.default_rng(0).normal(size=(8, old.dim))
    transform = VectorTransform.linear(old.fingerprint, target.fingerprint, weight)
    data = [picture_bytes(OTHER), picture_bytes(OTHER + 1)]
    with served(gallery_path) as client:
        with Gallery.open(gallery_path) as other:
            begin_lift(other, transform, target, strategy="world:two-queries", accept_poor=True)
            ok(add(client, [{"id": "during"}], data[:1]))
            run(other, lifter(other))
            finish(other, encoder=lifter(other))
        ok(add(client, [{"id": "after"}], data[1:]))
        assert np.allclose(gallery_of(client).vectors_of(["during", "after"]), transform(old.encode(data)), atol=1e-5)


def test_clients_that_go_away_leave_items_with_their_pictures_or_nothing(gallery_path: Path) -> None:
    import asyncio

    from serve_world import settings_for
    from starlette.datastructures import UploadFile

    from bowerbird.serve.schemas import NewItem
    from bowerbird.serve.server import Server

    async def upload(server: Server, number: int, seconds: float) -> bool:
        files = [UploadFile(io.BytesIO(picture_bytes(OTHER + number))) for _ in "xy"]
        call = server.contents.add([NewItem(id=f"x/{number}"), NewItem(id=f"y/{number}")], files)
        task = asyncio.create_task(call)
        done, _ = await asyncio.wait([task], timeout=seconds)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # as a service does that stops while a client goes away
        await asyncio.wait([task])
        return bool(done)

    async def everybody() -> list[bool]:
        async with Server(settings_for(gallery_path)) as server:
            assert await upload(server, 0, 60)
            return list(await asyncio.gather(*(upload(server, n, 0.004 * n) for n in range(1, 60))))

    stayed = asyncio.run(everybody())
    with Gallery.open(gallery_path) as gallery:
        assert gallery.verify().ok
        uris = {item.id: Path(str(item.uri)) for item in gallery.items() if item.id[:2] in ("x/", "y/")}
    assert {f"{side}/{n}" for n, stays in enumerate(stayed, 1) if stays for side in "xy"} <= set(uris)
    assert {name[1:] for name in uris if name[0] == "x"} == {name[1:] for name in uris if name[0] == "y"}
    kept = {file for file in (gallery_path / "contents").rglob("*") if file.is_file() and file.name != "owner.json"}
    assert kept == set(uris.values())


def test_a_read_only_service_refuses_changes(gallery_path: Path) -> None:
    with served(gallery_path, read_only=True) as client:
        problem(add(client, [{"id": "a"}], [picture_bytes(OTHER)]), 403)
        problem(client.post("/v1/items/vectors", json={"items": [{"id": "a", "vector": [1.0] * 24}]}), 403)
        problem(client.post("/v1/items/delete", json={"ids": [photo_id(0)]}), 403)
        assert client.get("/v1/thumbnail", params={"id": photo_id(0)}).status_code == 200
    assert not (gallery_path / "contents").exists()


def test_changes_wait_for_another_writer_and_are_told_to_come_again(gallery_path: Path) -> None:
    with served(gallery_path) as client, Gallery.open(gallery_path) as other:
        gallery_of(client).storage.catalog.lock_timeout = 0.1  # type: ignore[attr-defined]
        with other.storage.catalog.exclusive("count the stars"):  # type: ignore[attr-defined]
            answer = add(client, [{"id": "a"}], [picture_bytes(OTHER)])
            assert str(gallery_path) not in problem(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1
            problem(client.post("/v1/items/delete", json={"ids": [photo_id(0)]}), 503)
        assert kept(client) == set()
        ok(add(client, [{"id": "a"}], [picture_bytes(OTHER)]))


@pytest.mark.parametrize("where", ["file", "commit"])
def test_a_full_disk_refuses_the_batch_and_leaves_nothing(gallery_path: Path, monkeypatch: Any, where: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        if where == "file":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise StoreUnavailableError(f"the disk of {gallery_path} is full")

    with served(gallery_path) as client:
        with monkeypatch.context() as patch:
            if where == "file":
                patch.setattr("bowerbird.serve.uploads.write_atomically", full)
            else:
                patch.setattr(gallery_of(client), "add", full)
            answer = add(client, [{"id": "a"}, {"id": "b"}], [picture_bytes(OTHER), picture_bytes(OTHER + 1)])
            assert str(gallery_path) not in problem(answer, 503)
        assert kept(client) == set() and count(client) == 60
        ok(add(client, [{"id": "a"}], [picture_bytes(OTHER)]))


def test_what_a_killed_service_left_is_removed_by_the_next_and_nothing_else(gallery_path: Path) -> None:
    with served(gallery_path) as client:
        ok(add(client, [{"id": "kept"}, {"id": "deleted elsewhere"}], [picture_bytes(OTHER), picture_bytes(OTHER + 1)]))
        mine = Path(str(gallery_of(client).get("kept").uri))
    with Gallery.open(gallery_path) as other:
        other.delete(["deleted elsewhere"])
    forgotten = mine.with_name("ab" + mine.name[2:])
    unfinished = mine.with_name(f".{mine.name}.x8_1aaaa")
    foreign = mine.with_name("holiday.png")
    for file in (forgotten, unfinished, foreign):
        file.write_bytes(b"x")
    with served(gallery_path) as client:
        ok(add(client, [{"id": "more"}], [picture_bytes(OTHER + 2)]))  # uploads wait until it is done
        more = Path(str(gallery_of(client).get("more").uri))
        assert kept(client) == {mine, foreign, more}


def test_a_file_that_one_request_gives_up_while_another_commits_it_stays(gallery_path: Path, monkeypatch: Any) -> None:
    with Gallery.open(gallery_path) as gallery:
        uploads = Uploads(gallery_path / "contents", gallery)
        uploads.folder.mkdir()
        data = picture_bytes(OTHER)
        path = uploads.place("a", hashlib.sha256(data).hexdigest(), data)
        uploads.write(path, data)
        look, others = gallery.get_many, []

        def commit() -> None:
            uploads.write(path, data)
            gallery.add(["a"], np.ones((1, 24)), uris=[str(path)])
            uploads.release([("a", path)])

        def slow_look(ids: Any) -> Any:
            found = look(ids)
            monkeypatch.setattr(gallery, "get_many", look)
            others.append(threading.Thread(target=commit))
            others[0].start()
            others[0].join(0.5)  # what was found is old by now, where nothing keeps the other one waiting
            return found

        monkeypatch.setattr(gallery, "get_many", slow_look)
        uploads.release([("a", path)])
        others[0].join()
        assert gallery.get("a").uri == str(path)
        assert path.read_bytes() == data


def test_an_item_that_names_the_upload_of_another_one_goes_without_it(client: TestClient) -> None:
    ok(add(client, [{"id": "a"}], [picture_bytes(OTHER)]))
    uri = str(gallery_of(client).get("a").uri)
    gallery_of(client).add(["b"], np.ones((1, 24)), uris=[uri])
    ok(client.post("/v1/items/delete", json={"ids": ["b"]}))
    assert Path(uri).is_file()


def test_a_folder_that_does_not_say_whose_it_is_is_refused(gallery_path: Path) -> None:
    (gallery_path / "contents").mkdir()
    (gallery_path / "contents" / "owner.json").write_text('{"gal')
    with pytest.raises(InputError, match="is damaged"), served(gallery_path):
        pass


def test_pictures_may_be_kept_in_another_folder_which_belongs_to_one_gallery(
    gallery_path: Path, tmp_path: Path, old_encoder: Path, photos: Path
) -> None:
    place = tmp_path / "uploads"
    with served(gallery_path, contents=place) as client:
        ok(add(client, [{"id": "a"}], [picture_bytes(OTHER)]))
        assert Path(str(gallery_of(client).get("a").uri)).is_relative_to(place)
        with pytest.raises(GalleryLockedError, match="another service"), served(gallery_path, contents=place):
            pass
    other = fill(tmp_path / "other", old_encoder, photos)
    with pytest.raises(InputError, match="another folder"), served(other, contents=place):
        pass
    with served(gallery_path, contents=place) as client:
        assert client.get("/v1/thumbnail", params={"id": "a"}).status_code == 200


def test_a_gallery_without_a_folder_takes_vectors_and_says_what_pictures_need(
    gallery_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("bowerbird.serve.uploads.folder_of", lambda url: None)  # as of postgresql://...
    with served(gallery_path) as client:
        detail = problem(add(client, [{"id": "a"}], [picture_bytes(OTHER)]), 409)
        assert "--contents" in detail
        ok(client.post("/v1/items/vectors", json={"items": [{"id": "v", "vector": [1.0] * 24}]}))
        ok(client.post("/v1/items/delete", json={"ids": ["v"]}))


def test_the_gallery_s_own_tools_do_not_mind_the_uploads(gallery_path: Path, tmp_path: Path) -> None:
    from bowerbird.gallery.copy import copy_gallery

    with served(gallery_path) as client:
        ok(add(client, [{"id": "a"}], [picture_bytes(OTHER)]))
    with Gallery.open(gallery_path) as gallery:
        assert gallery.verify().ok and not gallery.verify().notes
        gallery.delete([photo_id(3)])
        gallery.compact()
        assert gallery.storage.collect_garbage() == []  # type: ignore[attr-defined]
        assert copy_gallery(gallery, str(tmp_path / "copy")).items == 60
        assert Path(str(gallery.get("a").uri)).is_file()


# ---------------------------------------------------------------------------------------------------- health


def test_health_and_readiness(gallery_path: Path) -> None:
    with served(gallery_path) as client:
        assert ok(client.get("/health")) == {"status": "ok"}
        assert ok(client.get("/ready")) == {"ready": True, "reasons": []}
        client.app.state.server.stopping.set()  # type: ignore[attr-defined]
        answer = client.get("/ready")
        assert answer.status_code == 503 and answer.json()["reasons"] == ["the service is stopping"]


def test_help_teaches_by_examples() -> None:
    from click.testing import CliRunner

    from bowerbird.cli import main

    shown = CliRunner().invoke(main, ["serve", "--help"]).output
    for part in ("bowerbird serve photos --open", "--candidate new=runs/new", "--tokens", "--contents", "curl"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "say which gallery"),
        (["nowhere"], "no such folder"),
        (["nowhere", "--candidate", "runs/new"], "NAME=ENCODER"),
        (["nowhere", "--candidate", "a=x", "--candidate", "a=y"], "given twice"),
        (["nowhere", "--candidate", "new=runs/nwe"], "no folder 'runs/nwe'"),
        (["nowhere", "--candidate", "new=vectors:gone.parquet"], "gone.parquet: there is no such file"),
        (["nowhere", "--candidate", "new=core:perceptorn?image_size=16"], "core:perceptron"),
        (["nowhere", "--host", "0.0.0.0"], "--tokens"),
        (["nowhere", "--host", "host.invalid"], "--host"),
        (["nowhere", "--port", "70000"], "70000"),
        (["nowhere", "--token-name", "ada"], "--new-token"),
    ],
)
def test_a_service_that_cannot_start_says_why(tmp_path: Path, monkeypatch: Any, arguments: list[str], why: str) -> None:
    from click.testing import CliRunner

    from bowerbird.cli import main

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["serve", *arguments, *(["--port", "0"] if "--port" not in arguments else [])])
    assert result.exit_code == 2, result.output
    assert why in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_new_token_is_printed_with_its_lines_for_the_file() -> None:
    from click.testing import CliRunner

    from bowerbird.cli import main

    result = CliRunner().invoke(main, ["serve", "--new-token", "write", "--token-name", "ada"])
    assert result.exit_code == 0
    assert 'name = "ada"' in result.output and 'role = "write"' in result.output and "[[token]]" in result.output


def test_the_command_serves_until_it_is_told_to_stop(gallery_path: Path) -> None:
    import httpx

    with running_server(gallery_path, "--read-only") as running:
        assert httpx.get(f"{running.url}/ready").json()["ready"]
        assert httpx.get(running.url).headers["content-type"].startswith("text/html")
        with contextlib.suppress(httpx.HTTPError), httpx.stream("GET", f"{running.url}/v1/events", timeout=5) as stream:
            next(stream.iter_lines())
            assert running.stop() == 0  # an open stream does not keep it
        assert any("read-only" in line for line in running.lines)


def test_a_port_that_is_taken_is_named(gallery_path: Path) -> None:
    import socket

    from click.testing import CliRunner

    from bowerbird.cli import main

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = CliRunner().invoke(main, ["serve", str(gallery_path), "--port", str(other.getsockname()[1])])
    assert taken.exit_code == 2 and "--port 0" in taken.output
