"""What routes ask for: the server, and a caller who may do this."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from bowerbird.serve.access import Caller
from bowerbird.serve.server import Server

# All of them coroutines: FastAPI would send plain functions through its pool of threads, three hops per request. And
# none that asks for another: each is resolved anew for every request. That a token is asked for is said in the schema
# once, see ``app``.


async def server_of(request: Request) -> Server:
    found: Server = request.app.state.server
    return found


ServerOf = Annotated[Server, Depends(server_of)]


async def _reader(request: Request) -> Caller:
    return (await server_of(request)).access.caller(request, "read")


async def _writer(request: Request) -> Caller:
    return (await server_of(request)).access.caller(request, "write")


async def _admin(request: Request) -> Caller:
    return (await server_of(request)).access.caller(request, "admin")


Reader = Annotated[Caller, Depends(_reader)]
Writer = Annotated[Caller, Depends(_writer)]
Admin = Annotated[Caller, Depends(_admin)]
