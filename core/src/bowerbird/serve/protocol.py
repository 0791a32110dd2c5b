"""HTTP/1.1 of uvicorn, with ends to its patience, and errors of the parser as problems.

What a client may hold is bounded before a request exists: connections, bytes of a head, seconds for a head, seconds in
which a response is not fetched. What a request may hold is the matter of ``guard``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bowerbird.serve import problems
from bowerbird.serve.guard import HEADERS, MAX_HEAD, NO_STORE

MAX_CONNECTIONS = 512  # half of the files that a process may usually open
TICK = 5.0  # seconds between two looks at a connection
HEAD_SECONDS = 15.0  # for the lines before a body
FETCH_SECONDS = 30.0  # without a byte of the response being taken


class Protocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_since: float | None = self.loop.time()  # None: no head is awaited
        self._head_bytes = 0
        self._body_comes = False
        self._unread_ticks = 0
        self._stalled_since: float | None = None
        self._timer = self.loop.call_later(TICK, self._tick)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "too many connections; try again")

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._head_since is None and not self._body_comes:  # the first bytes of another request
            self._head_since, self._head_bytes = self.loop.time(), 0
        super().data_received(data)
        if self._head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self._refuse(431, f"the headers have more than {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head_since, self._body_comes, self._unread_ticks = None, True, 0

    def on_message_complete(self) -> None:
        self._body_comes = False
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._stalled_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled_since = None
        super().resume_writing()

    def _tick(self) -> None:
        now = self.loop.time()
        if self._stalled_since is not None and now - self._stalled_since > FETCH_SECONDS:
            self.transport.abort()
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and self._head_since is not None and now - self._head_since > HEAD_SECONDS:
            self._refuse(408, "the head of the request came too slowly")
        elif not answering and self._body_comes:
            # Answered already, as too large for one. A client that is still sending gets a while to read why.
            self._unread_ticks += 1
            if self._unread_ticks > 2:
                self.transport.abort()
        if not self.transport.is_closing():
            self._timer = self.loop.call_later(TICK, self._tick)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not a request of HTTP/1.1")

    def _refuse(self, status: int, detail: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # in the midst of an answer there is no place for another one
            return
        response = problems.problem(status, detail)
        head: list[Any] = [*response.raw_headers, *HEADERS, NO_STORE, (b"connection", b"close")]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in head)
        self.transport.write(STATUS_LINE[status] + lines + b"\r\n" + bytes(response.body))
        self.transport.close()
