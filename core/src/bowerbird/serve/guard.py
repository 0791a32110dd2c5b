"""What stands before every route: one ASGI middleware.

It answers, before a body is read: requests under a foreign name (DNS rebinding), changes asked for by pages of other
sites, compressed bodies, too large heads and bodies, strangers. It gives up bodies that come too slowly and handlers
whose client went away, puts the security headers on every response, and counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from bowerbird.serve import problems
from bowerbird.serve.access import is_loopback
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.settings import ServeSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
NO_STORE = (b"cache-control", b"no-store")
SAFE = ("GET", "HEAD", "OPTIONS")
METHODS = (*SAFE, "POST", "PUT", "PATCH", "DELETE")
ASKED = ("/v1/", "/metrics")  # where callers are asked who they are before their body is read
MAX_HEAD = 64 * 1024  # bytes of all header lines
MAX_QUERY = 16 * 1024
MAX_JSON = 16 * 2**20  # bytes of a body that is not multipart
BODIES = 16  # times `max_upload_bytes`: what the bodies of all requests in flight may hold together
PATIENCE = 20.0  # seconds that a body may take,
LEAST_RATE = 16 * 1024  # and one more for so many bytes of it
WATCH_AFTER = 0.1  # seconds after which a request is worth looking whether its client is still there


def guard(app: FastAPI, settings: ServeSettings) -> None:
    app.add_middleware(Guard, settings=settings)


class Guard:
    def __init__(self, app: Any, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self.allowed = {name.lower() for name in settings.allowed_hosts}
        self.hosts = {"localhost", "127.0.0.1", "[::1]", *self.allowed}
        if not _is_any(settings.host):
            self.hosts.add(_bracketed(settings.host.lower()))
        # Where callers show tokens, a page under a foreign name has none, and names need not be known.
        self.any_host = settings.tokens is not None and settings.proxy_header is None and not settings.allowed_hosts
        self.held = 0  # bytes of bodies of requests in flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        else:
            await send({"type": "websocket.close", "code": 1008})

    def most(self, scope: Scope) -> int:
        """Bytes that the body of this request may have. JSON is read in the event loop, and all others wait for it."""
        kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        files = kind.lstrip().lower().startswith(b"multipart/")
        return self.settings.max_upload_bytes if files else min(self.settings.max_upload_bytes, MAX_JSON)

    def check(self, scope: Scope, most: int) -> int:
        """Raises a problem for a request that is refused for what its head says; else the bytes that it announces."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
            raise ProblemError(431, f"the headers have more than {MAX_HEAD} bytes")
        if len(scope["query_string"]) + len(scope.get("raw_path") or b"") > MAX_QUERY:
            raise ProblemError(414, f"the address has more than {MAX_QUERY} bytes")
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self.any_host and _name(host) not in self.hosts:
            raise ProblemError(
                421, f"this service is not called {host[:100]!r}; the operator adds names with --allowed-host"
            )
        if scope["method"] not in SAFE or scope["path"].startswith(ASKED):
            self._check_origin(headers, host)
        if headers.get("content-encoding", "identity") != "identity":
            raise ProblemError(415, "compressed bodies are not taken; send the body as it is")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise ProblemError(400, "Content-Length is not a number")
        announced = int(length[:20])
        self.check_size(announced, most)
        return announced

    def hold(self, size: int) -> None:
        """So many bytes of a body are there or will come. Raises 503 where they are too many of all requests."""
        if self.held + size > BODIES * self.settings.max_upload_bytes:
            raise ProblemError(503, "too many uploads at once; try again", headers={"Retry-After": "2"})
        self.held += size

    def check_size(self, size: int, most: int) -> None:
        if size > most:
            raise ProblemError(413, f"the body has more than {most} bytes, which is the most that is taken here")

    def _check_origin(self, headers: Headers, host: str) -> None:
        """What a browser asks for, our page asks for. Programs send neither header."""
        origin = headers.get("origin")
        if origin is not None:
            scheme, _, authority = origin.lower().partition("://")
            same = authority == host.lower() or _name(authority) in self.allowed
            if scheme not in ("http", "https") or not same:
                raise ProblemError(403, f"requests of the site {origin[:100]!r} are refused")
        elif headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ProblemError(403, "requests of other sites are refused")


class _Exchange:
    """One request and its response."""

    def __init__(self, owner: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.owner, self.scope, self._receive, self._send = owner, scope, receive, send
        self.began = time.monotonic()
        self.size, self.most = 0, owner.most(scope)
        names = {name for name, _ in scope["headers"]}
        self.empty = not names & {b"content-length", b"transfer-encoding"}  # no body comes: nothing to wait for
        self.held = 0  # bytes
        self.body_read = False
        self.status = 0
        self.done = False
        self.gone = asyncio.Event()
        self.task = cast("asyncio.Task[Any]", asyncio.current_task())
        self.watch: asyncio.Task[None] | None = None

    async def run(self) -> None:
        server = getattr(self.scope["app"].state, "server", None)
        metrics = server.metrics if server is not None else None
        if metrics is not None:
            metrics.in_flight.inc()
        timer = asyncio.get_running_loop().call_later(WATCH_AFTER, self._start_watch)
        try:
            self._hold(self.owner.check(self.scope, self.most))
            if server is not None and self.scope["path"].startswith(ASKED):
                server.access.identify(HTTPConnection(self.scope))
            await self.owner.app(self.scope, self.receive, self.send)
        except ProblemError as error:
            response = problems.problem(error.status, error.detail, headers=error.headers)
            await response(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            if not self.gone.is_set():
                raise  # the service stops
            self.task.uncancel()
            if metrics is not None:
                metrics.client_gone()
        except Exception as error:
            if self.gone.is_set():
                if metrics is not None:
                    metrics.client_gone()
                return  # nobody is there to be told
            if self.status:
                raise  # too late for an answer; the server ends the connection
            response = problems.bug(self.scope["method"], self.scope["path"], error)
            await response(self.scope, self.receive, self.send)
        finally:
            timer.cancel()
            if self.watch is not None:
                self.watch.cancel()
            self.owner.held -= self.held
            if metrics is not None:
                metrics.in_flight.dec()

    # ------------------------------------------------------------------------------------------------- the request

    async def receive(self) -> Message:
        if self.body_read:
            self._start_watch()
            await self.gone.wait()
            return {"type": "http.disconnect"}
        if self.empty:
            self.body_read = True
            return {"type": "http.request", "body": b"", "more_body": False}
        patience = PATIENCE + self.size / LEAST_RATE - (time.monotonic() - self.began)
        try:
            async with asyncio.timeout(max(0.0, patience)):
                message = await self._receive()
        except TimeoutError:
            raise _refusal(408, "the body came too slowly") from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            try:
                self.owner.check_size(self.size, self.most)
                self._hold(self.size)
            except ProblemError as error:
                raise _refusal(error.status, error.detail) from None
            self.body_read = not message.get("more_body", False)
        elif message["type"] == "http.disconnect":
            self.gone.set()
        return message

    def _hold(self, size: int) -> None:
        if size > self.held:
            self.owner.hold(size - self.held)
            self.held = size

    def _start_watch(self) -> None:
        if self.watch is None and not self.done:
            self.watch = asyncio.create_task(self._watch(self.task))

    async def _watch(self, task: asyncio.Task[Any]) -> None:
        """Stop the handler when its client goes away."""
        while not (self.body_read or self.empty):  # while the body comes, the handler itself is told
            await asyncio.sleep(WATCH_AFTER)
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()
        if not self.done:
            task.cancel()

    # ------------------------------------------------------------------------------------------------ the response

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *HEADERS]
            if not any(name == b"cache-control" for name, _ in headers):
                headers.append(NO_STORE)
            message = {**message, "headers": headers}
            self._count()
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.done = True
        await self._send(message)

    def _count(self) -> None:
        server = getattr(self.scope["app"].state, "server", None)
        if server is not None:
            route = getattr(self.scope.get("route"), "path", "other")
            method = self.scope["method"] if self.scope["method"] in METHODS else "other"
            server.metrics.request(route, method, self.status, time.monotonic() - self.began)


def _refusal(status: int, detail: str) -> HTTPException:
    """As an exception that the parsers of bodies let through."""
    return HTTPException(status, detail)


def _name(host: str) -> str:
    """``Host`` without its port, in lower case."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _is_any(host: str) -> bool:
    return host in ("", "0.0.0.0", "::", "[::]") and not is_loopback(host)
