"""``GET /metrics``: what the service counts, as Prometheus reads it."""

from __future__ import annotations

from fastapi import APIRouter, Response

from bowerbird.serve.depends import Reader, ServerOf

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Counters for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "Text in the format of Prometheus."}},
)
def metrics(server: ServerOf, _: Reader) -> Response:
    return Response(server.metrics.render(), headers={"Content-Type": server.metrics.content_type})
