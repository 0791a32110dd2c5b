"""What routes ask for: the server, and a caller who may do this."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from bowerbird.serve.access import Caller
from bowerbird.serve.server import Server

bearer = HTTPBearer(auto_error=False, description="A token of the service's token file; none on a loopback service.")


# All of them coroutines: FastAPI would send plain functions through its pool of threads, three hops per request.


async def server_of(request: Request) -> Server:
    return _server(request)


def _server(request: Request) -> Server:
    found: Server = request.app.state.server
    return found


ServerOf = Annotated[Server, Depends(server_of)]


async def _reader(request: Request, _: Annotated[object, Security(bearer)] = None) -> Caller:
    return _server(request).access.caller(request, "read")


async def _writer(request: Request, _: Annotated[object, Security(bearer)] = None) -> Caller:
    return _server(request).access.caller(request, "write")


async def _admin(request: Request, _: Annotated[object, Security(bearer)] = None) -> Caller:
    return _server(request).access.caller(request, "admin")


Reader = Annotated[Caller, Depends(_reader)]
Writer = Annotated[Caller, Depends(_writer)]
Admin = Annotated[Caller, Depends(_admin)]
