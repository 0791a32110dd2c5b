"""What there is to see: the gallery in numbers, its spaces, its map."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from bowerbird.serve.depends import Reader, ServerOf
from bowerbird.serve.describe import gallery_info
from bowerbird.serve.mapping import MOST_POINTS
from bowerbird.serve.schemas import GalleryInfo, MapView, SpacesView

router = APIRouter(prefix="/v1", tags=["look"])


@router.get("/gallery", operation_id="getGallery", summary="The gallery in numbers, and what the caller may do")
async def gallery(server: ServerOf, caller: Reader) -> GalleryInfo:
    accepts = server.encoders.accepts()
    return await asyncio.to_thread(gallery_info, server.settings, server.gallery, accepts, caller.role)


@router.get("/spaces", operation_id="getSpaces", summary="Spaces, their relations, and which reach which")
async def spaces(server: ServerOf, _: Reader) -> SpacesView:
    """Measured shares are at most half a minute old."""
    return await server.spaces.view()


@router.get(
    "/map", operation_id="getMap", summary="The items on a plane, similar ones near each other", response_model=MapView
)
async def map_(
    server: ServerOf,
    _: Reader,
    method: Annotated[Literal["pca", "umap"], Query(description="`umap` where umap-learn is installed.")] = "pca",
    limit: Annotated[int, Query(ge=1, le=MOST_POINTS, description="Most points; a sample where there are more.")] = (
        MOST_POINTS
    ),
    space: Annotated[
        str | None, Query(max_length=200, description="Fingerprint. Default: where most items have a vector.")
    ] = None,
) -> Response:
    """Computed in a process of low priority, one at a time: PCA of 50 000 items takes seconds, UMAP minutes."""
    return Response(await server.maps.view(method, limit, space), media_type="application/json")
