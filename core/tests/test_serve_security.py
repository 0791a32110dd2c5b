"""What stands before every route of a service: who may do what, what is refused unread, what never comes out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import FastAPI, Form, UploadFile
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bowerbird.errors import DataError, InputError, StoreUnavailableError
from bowerbird.serve import guard as guard_module
from bowerbird.serve import problems, protocol
from bowerbird.serve.access import Access, Caller, new_token, read_tokens
from bowerbird.serve.app import create_app
from bowerbird.serve.depends import Admin, Reader, Writer
from bowerbird.serve.guard import POLICY, guard
from bowerbird.serve.metrics import Metrics
from bowerbird.serve.protocol import Protocol
from bowerbird.serve.schemas import NewVectors, TextSearch
from bowerbird.serve.settings import ServeSettings

TOKEN_FILE = """
[users]
"ada@example.org" = "admin"

[proxy]
addresses = ["10.1.0.0/16"]
"""


class _Gallery:
    """As much of a gallery as the counters ask for."""

    def __len__(self) -> int:
        return 7

    def snapshot(self) -> Any:
        return SimpleNamespace(epoch=3, upgrade=None, parts=())


class _Lines:
    """As much of a store as the audit log asks for."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error, self.lines = error, list[tuple[str, str]]()

    def append_line(self, name: str, line: str) -> None:
        if self.error is not None:
            raise self.error
        self.lines.append((name, line))


def small_app(gone: list[str] | None = None, **values: Any) -> FastAPI:
    """An application with the real guard, the real access and routes that show what came through."""
    settings = ServeSettings(gallery="unused", **values)
    app = FastAPI()
    problems.install(app)
    guard(app, settings)
    app.state.server = SimpleNamespace(access=Access(settings), metrics=Metrics(_Gallery()))  # type: ignore[arg-type]

    @app.get("/v1/who")
    async def who(caller: Reader) -> dict[str, str]:
        return {"name": caller.name, "role": caller.role}

    @app.post("/v1/write")
    async def write(caller: Writer) -> str:
        return caller.name

    @app.post("/v1/admin")
    async def admin(caller: Admin) -> str:
        return caller.name

    @app.post("/v1/text")
    async def text(body: TextSearch, _: Reader) -> str:
        return body.text

    @app.post("/v1/vectors")
    async def vectors(body: NewVectors, _: Reader) -> int:
        return len(body.items)

    @app.post("/v1/upload")
    async def upload(file: UploadFile, _: Reader, k: Annotated[int, Form()] = 1) -> int:
        return len(await file.read())

    @app.get("/v1/slow")
    async def slow(_: Reader) -> str:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            (gone if gone is not None else []).append("cancelled")
            raise
        return "late"

    @app.get("/v1/item/{name}")
    async def item(name: str, _: Reader) -> str:
        raise DataError(f"cannot read /srv/photos/{name}.jpg: it is no picture")

    @app.get("/v1/bug")
    async def bug(_: Reader) -> str:
        raise RuntimeError("secret of the inside at /srv/photos")

    @app.get("/page/x")
    async def page() -> str:
        return "page"

    return app


def client_of(app: FastAPI, address: str = "127.0.0.1", **headers: str) -> TestClient:
    return TestClient(app, base_url="http://localhost", client=(address, 5000), headers=headers)


def token_file(tmp_path: Path, **roles: str) -> tuple[Path, dict[str, str]]:
    tokens, lines = {}, ""
    for name, role in roles.items():
        tokens[name], line = new_token(role, name)  # type: ignore[arg-type]
        lines += line
    file = tmp_path / "tokens.toml"
    file.write_text(lines + TOKEN_FILE)
    return file, tokens


def is_problem(response: Any, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"] and body["detail"] and body["type"]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# ----------------------------------------------------------------------------------------------------- who may call


def test_a_service_that_others_can_reach_does_not_start_without_saying_who_may_use_it() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "photos.example.org", ""):
        with pytest.raises(InputError, match="--tokens"):
            Access(ServeSettings(gallery="g", host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_a_loopback_service_without_tokens_trusts_whoever_reaches_it(host: str) -> None:
    app = small_app(host=host)
    assert client_of(app).get("/v1/who").json() == {"name": "local", "role": "admin"}


def test_roles_are_read_then_write_then_admin(tmp_path: Path) -> None:
    file, tokens = token_file(tmp_path, r="read", w="write", a="admin")
    client = client_of(small_app(tokens=file, host="0.0.0.0"))
    for name, allowed in (("r", 1), ("w", 2), ("a", 3)):
        answers = [
            client.get("/v1/who", headers=bearer(tokens[name])),
            client.post("/v1/write", headers=bearer(tokens[name])),
            client.post("/v1/admin", headers=bearer(tokens[name])),
        ]
        assert [answer.status_code for answer in answers] == [200] * allowed + [403] * (3 - allowed)
        for refused in answers[allowed:]:
            is_problem(refused, 403)


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic YTpi", "bearer \xff\xfe", "Bearer " + "a" * 9000],
)
def test_strangers_get_401_before_their_body_is_read(tmp_path: Path, authorization: str | None) -> None:
    file, _ = token_file(tmp_path, r="read")
    client = client_of(small_app(tokens=file))
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}

    def never() -> Iterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    answer = client.post("/v1/text", content=never(), headers=headers)  # type: ignore[arg-type]
    is_problem(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_tokens_are_compared_in_constant_time_with_every_known_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tokens = token_file(tmp_path, a="read", b="read", c="read")
    app, compared = small_app(tokens=file), []
    from bowerbird.serve import access

    real = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    for token in (tokens["a"], tokens["c"], "unknown"):
        compared.clear()
        client_of(app).get("/v1/who", headers=bearer(token))
        assert len(compared) == 3


def test_the_token_file_holds_no_token(tmp_path: Path) -> None:
    file, tokens = token_file(tmp_path, a="admin")
    assert tokens["a"] not in file.read_text()
    assert len(tokens["a"]) > 40
    assert new_token("read")[0] != new_token("read")[0]


def test_unknown_tokens_are_limited_by_their_address(tmp_path: Path) -> None:
    file, tokens = token_file(tmp_path, a="read")
    app = small_app(tokens=file)
    answers = [client_of(app, "192.0.2.1").get("/v1/who", headers=bearer(f"x{i}")).status_code for i in range(40)]
    assert set(answers[:30]) == {401} and set(answers[30:]) == {429}
    assert client_of(app, "192.0.2.2").get("/v1/who", headers=bearer("x")).status_code == 401
    assert client_of(app, "192.0.2.1").get("/v1/who", headers=bearer(tokens["a"])).status_code == 200


def test_more_requests_than_allowed_get_429_and_how_long_to_wait(tmp_path: Path) -> None:
    file, tokens = token_file(tmp_path, a="read", b="read")
    client = client_of(small_app(tokens=file, requests_per_minute=5))
    statuses = [client.get("/v1/who", headers=bearer(tokens["a"])).status_code for _ in range(5)]
    refused = client.get("/v1/who", headers=bearer(tokens["a"]))
    assert statuses == [200] * 5
    is_problem(refused, 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert client.get("/v1/who", headers=bearer(tokens["b"])).status_code == 200, "of another token"
    assert client.get("/page/x").status_code == 200, "the page is not counted"


def test_a_read_only_service_refuses_changes_of_administrators_too(tmp_path: Path) -> None:
    file, tokens = token_file(tmp_path, a="admin")
    client = client_of(small_app(tokens=file, read_only=True))
    assert client.get("/v1/who", headers=bearer(tokens["a"])).json()["role"] == "read"
    refused = client.post("/v1/write", headers=bearer(tokens["a"]))
    is_problem(refused, 403)
    assert "read-only" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[[token]\n", "not TOML"),
        ("[[tokens]]\nname='a'\n", "Did you mean 'token'"),
        ("[[token]]\nname='a'\nrole='read'\n", "exactly name, role and sha256"),
        (f"[[token]]\nname='a'\nrole='reed'\nsha256='{'0' * 64}'\n", "Did you mean 'read'"),
        ("[[token]]\nname='a'\nrole='read'\nsha256='secret'\n", "64 hexadecimal digits"),
        (f"[[token]]\nname=''\nrole='read'\nsha256='{'0' * 64}'\n", "name of its own"),
        ("token = 3\n", r"write \[\[token\]\]"),
        ("[users]\nada='root'\n", "user 'ada'"),
        ("[proxy]\naddresses=['10.0.0.0/99']\n", r"\[proxy\]"),
        ("", "has no token"),
    ],
)
def test_a_wrong_token_file_is_refused_with_what_is_wrong(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(content)
    with pytest.raises(InputError, match=says) as error:
        Access(ServeSettings(gallery="g", tokens=file))
    assert str(file) in str(error.value)


def test_a_token_file_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    file, _ = token_file(tmp_path, a="read")
    file.chmod(0o666)
    with pytest.raises(InputError, match="chmod"):
        read_tokens(file)


OPEN = ("/health", "/ready")  # nobody is asked who they are


def needed_role(method: str, path: str) -> str:
    """As the interface promises: looking and searching, changing items, deciding about upgrades."""
    if method == "GET" or path.startswith(("/v1/search/", "/v1/compare/")):
        return "read"
    return "write" if path.startswith("/v1/items") else "admin"


def whole_app(tmp_path: Path, **parts: Any) -> tuple[FastAPI, dict[str, str]]:
    """The application itself, not started: enough for what is refused. With it a token of every role."""
    file, tokens = token_file(tmp_path, read="read", write="write", admin="admin")
    settings = ServeSettings(gallery="unused", tokens=file, requests_per_minute=0)
    app = create_app(settings)
    app.state.server = SimpleNamespace(
        settings=settings,
        access=Access(settings),
        metrics=Metrics(_Gallery()),  # type: ignore[arg-type]
        **parts,
    )
    return app, tokens


def test_every_operation_asks_for_its_role(tmp_path: Path) -> None:
    app, tokens = whole_app(tmp_path)
    client = client_of(app)
    operations = [
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
        if path not in OPEN
    ]
    assert len(operations) > 20
    for method, path in operations:
        body: dict[str, Any] = {} if method == "GET" else {"json": {}}
        is_problem(client.request(method, path, **body), 401)
        needed = needed_role(method, path)
        for role in ("read", "write", "admin"):
            if role == needed:
                break
            is_problem(client.request(method, path, headers=bearer(tokens[role]), **body), 403)


def test_every_act_of_an_administrator_is_noted_before_it_is_done(tmp_path: Path) -> None:
    class Refusing:
        """A ``Control`` that does nothing."""

        def __getattr__(self, name: str) -> Any:
            async def refuse(*_: Any) -> None:
                raise problems.ProblemError(409, f"{len(store.lines)} acts are noted")

            return refuse

    store = _Lines()
    app, tokens = whole_app(tmp_path, control=Refusing())
    app.state.server.access.storage = store
    client, noted = client_of(app), 0
    for path, methods in app.openapi()["paths"].items():
        if "post" in methods and needed_role("POST", path) == "admin":
            noted += 1
            answer = client.post(path, json=BODIES.get(path, {"id": 7}), headers=bearer(tokens["admin"]))
            is_problem(answer, 409)
            assert answer.json()["detail"] == f"{noted} acts are noted"
    assert noted == 7
    acts = [json.loads(line) for _, line in store.lines]
    assert {entry["caller"] for entry in acts} == {"admin"}
    assert [entry["act"] for entry in acts].count("finish") == 1


BODIES = {"/v1/upgrade/plan": {"candidate": "new"}, "/v1/upgrade/start": {"candidate": "new"}}


# --------------------------------------------------------------------------------------------------- behind a proxy


def test_a_user_that_the_proxy_names_has_the_role_of_the_file_or_may_read(tmp_path: Path) -> None:
    file, tokens = token_file(tmp_path, robot="write")
    client = client_of(small_app(tokens=file, proxy_header="X-User"), "10.1.2.3")
    assert client.get("/v1/who", headers={"X-User": "ada@example.org"}).json()["role"] == "admin"
    assert client.get("/v1/who", headers={"X-User": "eve@example.org"}).json()["role"] == "read"
    assert client.get("/v1/who", headers=bearer(tokens["robot"])).json() == {"name": "robot", "role": "write"}
    is_problem(client.get("/v1/who"), 401)
    is_problem(client.get("/v1/who", headers=[("X-User", "eve"), ("X-User", "ada@example.org")]), 400)


def test_the_proxy_header_is_believed_from_the_proxy_alone(tmp_path: Path) -> None:
    file, _ = token_file(tmp_path)
    app = small_app(tokens=file, proxy_header="X-User", host="0.0.0.0")
    believed = ("10.1.2.3", "127.0.0.1", "::1", "::ffff:10.1.2.3", "::ffff:127.0.0.1")
    others = ("10.2.0.1", "203.0.113.9", "::ffff:10.2.0.1", "fe80::1", "testclient")
    for address, status in [*((one, 200) for one in believed), *((one, 401) for one in others)]:
        answer = client_of(app, address).get("/v1/who", headers={"X-User": "ada@example.org"})
        assert answer.status_code == status, address


def test_the_proxy_header_means_nothing_where_it_was_not_stated(tmp_path: Path) -> None:
    file, _ = token_file(tmp_path, a="read")
    assert client_of(small_app(tokens=file)).get("/v1/who", headers={"X-User": "ada@example.org"}).status_code == 401


# ------------------------------------------------------------------------------------------------ pages of other sites


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "169.254.1.1"]
)
def test_a_request_under_a_foreign_name_is_refused(host: str) -> None:
    is_problem(client_of(small_app()).get("/v1/who", headers={"Host": host}), 421)


def test_names_can_be_added(tmp_path: Path) -> None:
    client = client_of(small_app(allowed_hosts=("photos.example.org",)))
    for host in ("photos.example.org", "photos.example.org:8000", "PHOTOS.example.org", "localhost:1", "[::1]:8"):
        assert client.get("/v1/who", headers={"Host": host}).status_code == 200
    file, tokens = token_file(tmp_path, a="read")
    answer = client_of(small_app(tokens=file, host="0.0.0.0")).get(
        "/v1/who", headers={"Host": "any.example", **bearer(tokens["a"])}
    )
    assert answer.status_code == 200, "with tokens a foreign name gains nothing"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "file://localhost"},
        {"Origin": "http://localhost:9999"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "https://evil.example", "Sec-Fetch-Site": "none"},
    ],
)
def test_what_pages_of_other_sites_ask_for_is_refused(headers: dict[str, str]) -> None:
    client = client_of(small_app())
    is_problem(client.post("/v1/write", headers=headers), 403)
    is_problem(client.get("/v1/who", headers=headers), 403)


@pytest.mark.parametrize("headers", [{}, {"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}])
def test_what_our_page_and_programs_ask_for_is_done(headers: dict[str, str]) -> None:
    assert client_of(small_app()).post("/v1/write", headers=headers).status_code == 200


def test_a_link_of_another_site_may_lead_to_the_page() -> None:
    assert client_of(small_app()).get("/page/x", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


@pytest.mark.parametrize("path", ["/page/x", "/v1/who", "/nothing", "/v1/bug", "/v1/text"])
def test_every_response_has_the_security_headers(path: str) -> None:
    answer = client_of(small_app()).get(path)
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY and POLICY.startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in answer.headers
    assert "set-cookie" not in answer.headers


# ---------------------------------------------------------------------------------------------------- bodies and heads


def test_a_body_that_is_announced_too_large_is_refused_unread() -> None:
    client = client_of(small_app(max_upload_bytes=1000))
    is_problem(client.post("/v1/upload", files={"file": b"x" * 2000}), 413)
    assert client.post("/v1/upload", files={"file": b"x" * 500}).json() == 500


def test_a_body_that_grows_too_large_is_refused_while_it_comes() -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(1)
            yield b"x" * 100

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = client_of(small_app(max_upload_bytes=1000)).post("/v1/upload", content=endless(), headers=headers)
    is_problem(answer, 413)


def test_bodies_of_all_requests_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "BODIES", 1)
    app = small_app(max_upload_bytes=1000)
    client = client_of(app)
    assert client.post("/v1/upload", files={"file": b"x" * 500}).status_code == 200
    own = next(layer for layer in _layers(app) if isinstance(layer, guard_module.Guard))
    assert own.held == 0, "what is answered holds nothing"
    own.held = 600
    refused = client.post("/v1/upload", files={"file": b"x" * 500})
    is_problem(refused, 503)
    assert int(refused.headers["retry-after"]) >= 1


def _layers(app: FastAPI) -> Iterator[Any]:
    layer: Any = app.middleware_stack
    while layer is not None:
        yield layer
        layer = getattr(layer, "app", None)


def test_compressed_bodies_are_not_unpacked() -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    is_problem(client_of(small_app()).post("/v1/text", content=b"\x1f\x8b\x08", headers=headers), 415)


def test_heads_have_a_size_limit() -> None:
    client = client_of(small_app())
    is_problem(client.get("/v1/who", headers={"X-Long": "a" * 70_000}), 431)
    is_problem(client.get("/v1/who?" + "a" * 20_000), 414)


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "٣", "0x10", "1" * 400])
def test_a_length_that_is_no_number_is_refused(length: str) -> None:
    headers = {b"Content-Length": length.encode(), b"Content-Type": b"application/json"}
    answer = client_of(small_app()).post("/v1/text", content=b"{}", headers=headers)  # type: ignore[arg-type]
    is_problem(answer, 413 if length.isascii() and length.isdigit() else 400)


JSON_OF_STRANGERS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b'{"text": NaN}',
    b'{"text": "a", "k": 1e999}',
    b'{"text": "a", "k": NaN}',
    b'{"text": "a", "k": ' + b"9" * 5000 + b"}",
    b'{"text": "\\ud800"}',
    b'{"text": "a", "where": {"\\ud800": 1}}',
    b'{"text": "a", "where": {"a": "\\ud800"}}',
    b'{"text": "a", "where": {"a": NaN}}',
    b'{"text": "a", "where": {"a": ["x", Infinity]}}',
    b'{"text": "a", "\\ud800": 1}',
    b'{"text": "a", "other": 1}',
    b"[" * 100_000,
    b'{"where":' * 5000 + b"1" + b"}" * 5000,
    b'{"text": ""}',
    b'{"text": "a", "k": 0}',
    b'{"text": "a", "offset": -1}',
]


@pytest.mark.parametrize("body", JSON_OF_STRANGERS, ids=lambda body: ascii(body[:30]))
def test_json_that_cannot_be_used_is_a_problem(body: bytes) -> None:
    answer = client_of(small_app()).post("/v1/text", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    is_problem(answer, answer.status_code)
    assert len(answer.content) < 20_000


MANY = dict.fromkeys(map(str, range(200_000)))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/text", MANY),
        ("/v1/text", {"text": "a", "where": MANY}),
        ("/v1/text", {"text": "a", "where": {"a": [None] * 200_000}}),
        ("/v1/vectors", {"items": [{"id": "a", "vector": [1.0], "metadata": MANY}]}),
        ("/v1/vectors", {"items": [{"id": "a", "vector": ["x"] * 60_000}] * 4}),
        ("/v1/vectors", {"items": [{}] * 200_000}),
    ],
    ids=["keys", "where", "values", "metadata", "vectors", "items"],
)
def test_a_body_full_of_mistakes_is_refused_at_the_first_ones(path: str, body: dict[str, Any]) -> None:
    """Telling each of a million mistakes takes seconds, in which nobody else is answered."""
    sent = json.dumps(body)
    began = time.thread_time()
    models = {"/v1/text": TextSearch, "/v1/vectors": NewVectors}
    with pytest.raises(ValidationError) as error:
        models[path].model_validate(json.loads(sent))
    assert error.value.error_count() < 20
    assert time.thread_time() - began < 2
    is_problem(client_of(small_app()).post(path, content=sent, headers={"Content-Type": "application/json"}), 422)


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b'"a"', b"null", b"[]", b"9" * 5000])
def test_vectors_hold_finite_numbers(value: bytes) -> None:
    body = b'{"items": [{"id": "a", "vector": [1.0, ' + value + b"]}]}"
    answer = client_of(small_app()).post("/v1/vectors", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    is_problem(answer, answer.status_code)


def test_of_a_key_that_is_there_twice_the_last_one_counts() -> None:
    body = b'{"text": "a", "text": "b"}'
    assert (
        client_of(small_app()).post("/v1/text", content=body, headers={"Content-Type": "application/json"}).json()
        == "b"
    )


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "garbage", "multipart/form-data"]
)
def test_json_under_another_type_is_refused_so_that_no_form_of_a_page_can_send_it(kind: str) -> None:
    answer = client_of(small_app()).post("/v1/text", content=b'{"text": "a"}', headers={"Content-Type": kind})
    is_problem(answer, 422)


PART = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n1\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"--b\r\n"),
        ("multipart/form-data; boundary=", b"--b\r\n"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"--b"),
        ("multipart/form-data; boundary=b", b"--c\r\n\r\n--c--"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\n\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="k"\r\n\r\nx\r\n--b--\r\n'),
        ("multipart/form-data; boundary=b", PART % b"x" * 3000 + b"--b--\r\n"),
        ("multipart/form-data; boundary=b", PART % b'f"; filename="f' * 3000 + b"--b--\r\n"),
        ("multipart/form-data; boundary=b; charset=punycode", PART % b"k" + b"\xff\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b; charset=rot13", PART % b"k" + b"\xff\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n1\r\n--b--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"--b\r\n"),
        ("multipart/form-data; boundary=\xff", b"--b\r\n"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_read_is_a_problem(kind: str, body: bytes) -> None:
    answer = client_of(small_app()).post(
        "/v1/upload",
        content=body,
        headers={"Content-Type": kind.encode("latin-1")},  # type: ignore[dict-item]
    )
    assert answer.status_code in (400, 422), answer.text
    is_problem(answer, answer.status_code)


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["/v1/text", "/v1/vectors", "/v1/upload"]), st.sampled_from(
    ["application/json", "multipart/form-data; boundary=b", "application/vnd.x+json", "text/plain"]
))  # fmt: skip
def test_any_bytes_are_answered_with_a_problem(body: bytes, path: str, kind: str) -> None:
    answer = _ANY.post(path, content=body, headers={"Content-Type": kind})
    assert 400 <= answer.status_code < 500
    is_problem(answer, answer.status_code)


_ANY = client_of(small_app(requests_per_minute=0))


# -------------------------------------------------------------------------------------------------- what comes out


def test_paths_outside_the_routes_and_other_methods_are_problems() -> None:
    client = client_of(small_app())
    is_problem(client.get("/nothing"), 404)
    is_problem(client.get("/v1/../../etc/passwd"), 404)
    is_problem(client.get("/v1/%00"), 404)
    is_problem(client.delete("/v1/who"), 405)
    assert client.delete("/v1/who").headers["allow"] == "GET"


def test_a_bug_tells_the_client_a_number_and_the_log_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        answer = client_of(small_app()).get("/v1/bug")
    is_problem(answer, 500)
    assert "secret" not in answer.text and "RuntimeError" not in answer.text
    assert answer.json()["instance"] in caplog.text
    assert "secret of the inside" in caplog.text


def test_an_error_names_no_file_of_the_server() -> None:
    answer = client_of(small_app()).get("/v1/item/cat")
    is_problem(answer, 422)
    assert answer.json()["detail"] == "cannot read [path]: it is no picture"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("gallery /srv/a/b was opened readonly", "gallery [path] was opened readonly"),
        ("cannot read '/srv/my photos/b.jpg'", "cannot read '[path]'"),
        ("cannot read /srv/a/my photos/ada.jpg now", "cannot read [path] now"),
        ("/srv/a/b and /srv/c/d, 1/2", "[path] and [path], 1/2"),
        (r"no file C:\Users\ada\cat.jpg here", "no file [path] here"),
        ("at file:///srv/photos/cat.jpg#xywh=1,2,3,4", "at [address]"),
        ("at ~/photos/cat.jpg", "at [path]"),
        ("postgresql://ada:secret@host/db?gallery=g is away", "[address] is away"),
        ("s3://bucket/key is away", "[address] is away"),
        ("ask GET /v1/upgrade/plan for it", "ask GET /v1/upgrade/plan for it"),
        ("1/2 of the items, 3 and/or 4", "1/2 of the items, 3 and/or 4"),
        ("item 'cats/1.jpg' is not there", "item 'cats/1.jpg' is not there"),
    ],
)
def test_paths_and_addresses_are_taken_out_of_messages(text: str, seen: str) -> None:
    scrubbed = problems.scrubbed(text)
    assert seen in scrubbed
    assert "/srv" not in scrubbed and "ada" not in scrubbed and "bucket" not in scrubbed


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.text(max_size=50))
def test_a_problem_can_be_sent_whatever_it_quotes(text: str) -> None:
    assert json.loads(bytes(problems.problem(422, text + "\ud800", errors=[{"loc": [text]}]).body))["status"] == 422


# ----------------------------------------------------------------------------------------------------------- audit log


def test_acts_of_administrators_are_one_line_each_whatever_they_quote(caplog: pytest.LogCaptureFixture) -> None:
    access = Access(ServeSettings(gallery="g"))
    access.storage = store = _Lines()  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "bowerbird.serve.audit"):
        access.audit(Caller("ada\n{}", "admin"), "start", {"candidate": 'a"\r\n\u2028\ud800', "rate": 3})
    [(name, line)] = store.lines
    assert name == "serve/audit.jsonl"
    assert len(line.splitlines()) == 1 and line.isascii()
    entry = json.loads(line)
    assert entry["caller"] == "ada\n{}" and entry["act"] == "start" and entry["detail"]["rate"] == 3
    assert re.match(r"\d{4}-\d\d-\d\dT.*\+00:00", entry["time"])
    assert line in caplog.text


def test_an_act_that_cannot_be_noted_is_not_done() -> None:
    access = Access(ServeSettings(gallery="g"))
    access.storage = _Lines(OSError(28, "No space left on device"))  # type: ignore[assignment]
    with pytest.raises(StoreUnavailableError, match="No space left"):
        access.audit(Caller("ada", "admin"), "finish")


# ------------------------------------------------------------------------------------------------------------- counters


def test_requests_are_counted_by_their_route_and_never_by_what_clients_sent() -> None:
    app = small_app()
    client = client_of(app)
    for name in ("a", "b"):
        client.get(f"/v1/item/{name}")
    client.get("/nothing/at/all")
    client.request("BREW", "/v1/who")
    text = app.state.server.metrics.render().decode()
    assert 'bowerbird_http_requests_total{method="GET",route="/v1/item/{name}",status="422"} 2.0' in text
    assert 'bowerbird_http_requests_total{method="GET",route="other",status="404"} 1.0' in text
    assert "nothing" not in text and "BREW" not in text
    assert "bowerbird_items 7.0" in text and "bowerbird_http_requests_in_flight 0.0" in text


def test_a_value_that_cannot_be_had_does_not_cost_the_others() -> None:
    metrics = Metrics(_Gallery())  # type: ignore[arg-type]
    metrics.gauge("bowerbird_broken", "Fails.", lambda: 1 / 0)
    metrics.batch("encode", 5)
    metrics.searched("image", 0.01)
    text = metrics.render().decode()
    assert "bowerbird_broken NaN" in text and "bowerbird_items 7.0" in text
    assert 'bowerbird_searches_total{kind="image"} 1.0' in text
    assert 'bowerbird_batch_size_sum{of="encode"} 5.0' in text


# -------------------------------------------------------------------------------------------------- a real connection


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    """``app`` on uvicorn with our protocol, in a thread; gives the port."""
    config = uvicorn.Config(app, port=0, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 10
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def talk(port: int, *parts: bytes, wait: float = 0.0, seconds: float = 5.0) -> bytes:
    """What a server answers to these bytes, until it ends the connection or says nothing for a second."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        for part in parts:
            with contextlib.suppress(OSError):
                connection.sendall(part)
            time.sleep(wait)
        answer = b""
        with contextlib.suppress(OSError):
            while piece := connection.recv(65536):
                answer += piece
                if re.search(rb"content-length: (\d+)\r\n", answer) and b"\r\n\r\n" in answer and answer.endswith(b"}"):
                    break
        return answer


def is_raw_problem(answer: bytes, status: int) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"content-type: application/problem+json" in head
    assert json.loads(body)["status"] == status


OK = b"GET /v1/who HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_real_connection_is_refused_politely_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "TICK", 0.1)
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(guard_module, "PATIENCE", 0.5)
    gone: list[str] = []
    post = b"POST /v1/text HTTP/1.1\r\nHost: localhost\r\n"
    with listening(small_app(gone, max_upload_bytes=5_000_000)) as port:
        assert talk(port, OK).startswith(b"HTTP/1.1 200")
        # Not HTTP at all, or not in a way that can be trusted.
        for nonsense in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET /\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /v1/who HTTP/1.1\r\nHost localhost\r\n\r\n",
            post + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            post + b"Content-Length: -3\r\n\r\n",
            post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /v1/who HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
            b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            answer = talk(port, nonsense)
            assert re.match(rb"HTTP/1\.1 4\d\d ", answer), (nonsense, answer[:200])
            is_raw_problem(answer, int(answer[9:12]))
            assert b"content-security-policy" in answer
        is_raw_problem(talk(port, b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000), 431)
        # Slow: a head that does not end, a body that does not end, a client that sends nothing.
        is_raw_problem(talk(port, b"GET /v1/who HTTP/1.1\r\nHost:"), 408)
        is_raw_problem(talk(port, b""), 408)
        head = post + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        is_raw_problem(talk(port, head + b"{"), 408)
        began = time.monotonic()
        dripped = talk(port, head, *[b" "] * 12, wait=0.1)
        assert b" 408 " in dripped and time.monotonic() - began < 5
        # Announced too large: said at once, without the body.
        large = b"POST /v1/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000000\r\n\r\n"
        is_raw_problem(talk(port, large), 413)
        # A client that goes away ends its handler.
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET /v1/slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.3)
        until = time.monotonic() + 5
        while not gone and time.monotonic() < until:
            time.sleep(0.02)
        assert gone == ["cancelled"]
        assert talk(port, OK).startswith(b"HTTP/1.1 200"), "and all others are served as before"


def test_connections_are_bounded_and_the_next_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 3)
    with listening(small_app()) as port, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        time.sleep(0.1)
        is_raw_problem(talk(port, OK), 503)
        stack.close()
        time.sleep(0.1)
        assert talk(port, OK).startswith(b"HTTP/1.1 200")
