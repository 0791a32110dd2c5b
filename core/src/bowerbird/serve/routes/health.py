"""Whether the service lives, and whether it is ready."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response

from bowerbird.errors import BowerbirdError
from bowerbird.serve.depends import ServerOf
from bowerbird.serve.schemas import Health, Ready

router = APIRouter(tags=["health"])


@router.get("/health", operation_id="getHealth", summary="Whether the process answers", openapi_extra={"security": []})
async def health() -> Health:
    """For whoever starts it again when it does not. Asks nobody who they are."""
    return Health(status="ok")


@router.get(
    "/ready",
    operation_id="getReady",
    summary="Whether requests can be answered",
    responses={503: {"model": Ready, "description": "Not now."}},
    openapi_extra={"security": []},
)
async def ready(server: ServerOf, response: Response) -> Ready:
    """For load balancers: 503 while the gallery cannot be read, or the service is about to stop. Asks nobody who they
    are."""
    reasons = ["the service is stopping"] if server.stopping.is_set() else []
    try:
        await asyncio.to_thread(lambda: len(server.gallery))
    except BowerbirdError:
        reasons.append("the gallery cannot be read; the log of the service has the reason")
    if reasons:
        response.status_code = 503
    return Ready(ready=not reasons, reasons=reasons)
