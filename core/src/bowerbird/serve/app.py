"""``create_app``: the ASGI application of one gallery."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

import bowerbird
from bowerbird.serve import problems
from bowerbird.serve.guard import guard
from bowerbird.serve.page import mount_page
from bowerbird.serve.routes import events, health, items, look, metrics, search, upgrade
from bowerbird.serve.schemas import Problem
from bowerbird.serve.server import Server
from bowerbird.serve.settings import ServeSettings

DESCRIPTION = "Search a gallery by pictures, texts, items and vectors, and move it to a better model while it serves."
TOKEN = {
    "type": "http",
    "description": "A token of the service's token file; none on a loopback service.",
    "scheme": "bearer",
}
PROBLEMS = {
    status: {
        "description": text,
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status, text in {
        400: "Not a request that this service understands.",
        401: "No token, or one that is not known.",
        403: "A token that may not do this, or a request of another site.",
        404: "Not there.",
        408: "The body came too slowly.",
        409: "Not possible in the present state.",
        413: "Too large.",
        414: "The address is too long.",
        415: "Of a type that is not taken.",
        421: "Asked for under a name that this service does not have.",
        422: "A value that cannot be used.",
        429: "Too many requests.",
        431: "The headers are too large.",
        503: "Not possible at the moment; try again.",
    }.items()
}


def create_app(settings: ServeSettings) -> FastAPI:
    """The application. Opens the gallery when it starts, closes it when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Server(settings) as server:
            app.state.server = server
            yield

    app = FastAPI(
        title="Bowerbird",
        version=bowerbird.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # it would load scripts of a foreign host
        redoc_url=None,
        redirect_slashes=False,  # an address is right or it is not there
        responses=PROBLEMS,  # type: ignore[arg-type]
    )
    problems.install(app)
    for part in (search, health, metrics, look, items, upgrade, events):  # tried in this order: searches first
        app.include_router(part.router)
    mount_page(app)
    guard(app, settings)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI would say of a response's model that it is sent as ``application/json``; problems are not. And it knows
    of tokens only where they are a dependency of each route, which every request pays for."""
    schema = FastAPI.openapi(app)
    schema["components"]["schemas"]["Problem"] = Problem.model_json_schema()
    schema["components"]["securitySchemes"] = {"HTTPBearer": TOKEN}
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation.setdefault("security", [{"HTTPBearer": []}])
    return schema
