"""What routes ask for: the server, and a caller who may do this."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from bowerbird.serve.access import Caller
from bowerbird.serve.server import Server

bearer = HTTPBearer(auto_error=False, description="A token of the service's token file; none on a loopback service.")


def server_of(request: Request) -> Server:
    found: Server = request.app.state.server
    return found


def _reader(request: Request, _: Annotated[object, Security(bearer)] = None) -> Caller:
    return server_of(request).access.caller(request, "read")


def _writer(request: Request, _: Annotated[object, Security(bearer)] = None) -> Caller:
    return server_of(request).access.caller(request, "write")


def _admin(request: Request, _: Annotated[object, Security(bearer)] = None) -> Caller:
    return server_of(request).access.caller(request, "admin")


ServerOf = Annotated[Server, Depends(server_of)]
Reader = Annotated[Caller, Depends(_reader)]
Writer = Annotated[Caller, Depends(_writer)]
Admin = Annotated[Caller, Depends(_admin)]
