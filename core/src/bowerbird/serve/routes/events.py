"""Server-sent events: what has changed, as soon as it has.

A stream carries states, not steps. Whoever reads slowly misses some and is told the newest; nothing waits for them in
memory. What everybody with one role is told is made once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from bowerbird.serve.depends import Reader, ServerOf
from bowerbird.serve.problems import ProblemError

if TYPE_CHECKING:
    from bowerbird.serve.schemas import Role
    from bowerbird.serve.server import Server

router = APIRouter(prefix="/v1", tags=["upgrade"])

BEAT_SECONDS = 15.0  # between two comments on a quiet stream: proxies end connections that seem dead
MOST_STREAMS = 200


@router.get(
    "/events",
    operation_id="getEvents",
    summary="Changes of the gallery and of its upgrade, as server-sent events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "`gallery` and `upgrade` events."}},
)
async def events(server: ServerOf, caller: Reader) -> StreamingResponse:
    """`gallery` has what `getGallery` answers, and the epoch as its id; `upgrade` what `getUpgrade` answers.

    Both come at once, and again whenever they changed, at most twice a second.
    """
    if server.control.streams >= MOST_STREAMS:
        raise ProblemError(503, f"{MOST_STREAMS} streams of events are open", headers={"Retry-After": "30"})
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(server, caller.role), media_type="text/event-stream", headers=headers)


async def _stream(server: Server, role: Role) -> AsyncIterator[str]:
    told: tuple[str, ...] = ()
    async with aclosing(server.control.changes(server.stopping, BEAT_SECONDS)) as changes:
        async for version in changes:
            if version is None:
                yield ": still here\n\n"
                continue
            now = await server.control.events(role, version)
            changed = "".join(event for event in now if event not in told)
            told = now
            if changed:
                yield changed
