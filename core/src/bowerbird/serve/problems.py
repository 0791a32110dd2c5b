"""Errors over HTTP: RFC 9457 problems. What a client did wrong is a 4xx that says what to do; nothing shows the inside.

The text of an error may name files of the server (an item whose picture is gone). Clients see no paths of the server;
the log has them.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bowerbird.errors import (
    BowerbirdError,
    GalleryError,
    GalleryLockedError,
    InputError,
    StoreUnavailableError,
    UnknownNameError,
    UpgradeError,
)

log = logging.getLogger("bowerbird.serve")

# Absolute paths of two parts or more, up to a quote or another mark that ends one in a message. A space ends one, too,
# unless what follows has a slash: "/srv/my photos/cat.jpg".
_PART = r"[^\s/\\'\"`<>|:;,()\[\]]"
_PATH = re.compile(
    rf"(?<![\w.~/\\\]])(?:~|[A-Za-z]:)?[/\\](?!v1/|page/){_PART}+[/\\]"
    rf"(?:(?:[/\\]|{_PART})+(?: (?={_PART}+[/\\]))?)*"
)
_ADDRESS = re.compile(r"\b(?!https?://)[a-z][a-z0-9+.-]*://[^\s'\"`<>]*", re.IGNORECASE)
LONGEST = 2000  # characters of a detail: it may quote what a client sent
MEDIA_TYPE = "application/problem+json"
# The first class that fits decides.
STATUS_OF = (
    (UnknownNameError, 404),
    (UpgradeError, 409),
    (GalleryLockedError, 503),
    (StoreUnavailableError, 503),
    (InputError, 422),
    (GalleryError, 409),
    (BowerbirdError, 422),
)


class ProblemError(Exception):
    """Raised by routes: a problem with a status of its own."""

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers, self.more = status, detail, headers, more


def problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """The response of a problem. ``more``: further members, such as ``errors``."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": scrubbed(detail[:LONGEST]),
        **more,
    }
    return Ascii(body, status, headers, MEDIA_TYPE)


def bug(method: str, path: str, error: Exception) -> JSONResponse:
    """The response to an error that nobody foresaw. The log has it whole; the client gets the number of the entry."""
    instance = secrets.token_hex(8)
    log.error("%s %s failed (%s)", method, _line(path), instance, exc_info=error)
    return problem(500, f"a bug of the service; its log has the details under {instance}", instance=instance)


class Ascii(JSONResponse):
    """Details quote what clients sent, which may hold characters that UTF-8 cannot write (lone surrogates)."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def scrubbed(text: str) -> str:
    """``text`` without paths of the server and without addresses of stores. Paths of this API stay.

    An id that looks like a path is hidden, too: whether a file is there must not decide it, or an answer would tell.
    """
    return _PATH.sub("[path]", _ADDRESS.sub("[address]", text))


def install(app: FastAPI) -> None:
    """Make every error of ``app`` a problem."""

    @app.exception_handler(ProblemError)
    async def _own(_: Request, error: ProblemError) -> JSONResponse:
        return problem(error.status, error.detail, headers=error.headers, **error.more)

    @app.exception_handler(BowerbirdError)
    async def _bowerbird(request: Request, error: BowerbirdError) -> JSONResponse:
        status = next(status for kind, status in STATUS_OF if isinstance(error, kind))
        log.info("%s %s: %d %s", request.method, _line(request.url.path), status, _line(str(error)))
        headers = {"Retry-After": "1"} if status == 503 else None
        return problem(status, str(error), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # The value itself is left out: it may be large, and it may hold what JSON cannot (NaN).
        errors = [{"loc": [_short(part) for part in e["loc"]], "msg": e["msg"]} for e in error.errors()[:20]]
        first = errors[0] if errors else {"loc": ["body"], "msg": "is not valid"}
        where = ".".join(map(str, first["loc"]))
        return problem(422, f"{where}: {first['msg']}", errors=errors)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _line(text: str) -> str:
    """For the log: what a client sent forges no line of it, and no colours."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:2000])


def _short(part: str | int) -> str | int:
    """Of a location: its parts may be keys that the client chose."""
    return part[:100] if isinstance(part, str) else part
