"""The web page of the service: plain modules, a style sheet and an icon, served as they lie here.

Nothing is built and nothing is loaded from elsewhere, so that the content security policy can be as strict as it gets:
no inline script, no inline style, no foreign host.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import lru_cache
from importlib import resources

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

# Said here, not asked of the machine: its registry may call a module text/plain, and then no browser runs it.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def mount_page(app: FastAPI) -> None:
    """Add ``/`` and ``/page/{name}`` to ``app``; neither is part of the API's schema.

    Browsers ask again each time (``no-cache``) and get a 304 for what they have: after an update of the package nobody
    sees a mixture of two pages.
    """
    folder = resources.files(__name__)
    types = {file.name: TYPES[suffix] for file in folder.iterdir() for suffix in TYPES if file.name.endswith(suffix)}

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in types:  # the names are known, so that no path is ever made of what a client sent
            raise HTTPException(404, "the page has no such file")
        body = folder.joinpath(name).read_bytes()
        # Weak tags: one for the file as it is and packed.
        headers = {
            "ETag": f'W/"{hashlib.sha256(body).hexdigest()[:32]}"',
            "Cache-Control": "no-cache",
            "Vary": "Accept-Encoding",
        }
        known = request.headers.get("if-none-match", "").replace("W/", "").split(",")
        if headers["ETag"].removeprefix("W/") in (tag.strip() for tag in known):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            body = _packed(body)
        return Response(body, media_type=types[name], headers=headers)

    app.add_route("/", page, methods=["GET"], include_in_schema=False)
    app.add_route("/page/{name}", page, methods=["GET"], include_in_schema=False)


@lru_cache(maxsize=64)
def _packed(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)
