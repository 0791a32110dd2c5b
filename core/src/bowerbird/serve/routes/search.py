"""Searching, and comparing the old with the new during an upgrade."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Form, Response, UploadFile
from pydantic import BaseModel, TypeAdapter, ValidationError

from bowerbird.serve import schemas
from bowerbird.serve.depends import Reader, ServerOf
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import (
    MOST_RESULTS,
    CompareResponse,
    ItemSearch,
    Search,
    SearchResponse,
    TextSearch,
    VectorSearch,
)

router = APIRouter(prefix="/v1", tags=["search"])

_WHERE: TypeAdapter[schemas.Where | None] = TypeAdapter(schemas.Where | None)

Picture = Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, AVIF, TIFF...: what it is is looked at.")]
K = Annotated[int, Form(ge=1, le=MOST_RESULTS, description="Results.")]
Offset = Annotated[int, Form(ge=0, lt=MOST_RESULTS, description="Results to leave out at the beginning.")]
Where = Annotated[str | None, Form(description='JSON, as in the other searches: `{"year": [2024, 2025]}`.')]


# Routes are tried in their order: the one whose answers cost the least is the first.
@router.post(
    "/search/vector",
    operation_id="searchVector",
    summary="Items near a vector",
    response_model=SearchResponse,
)
async def by_vector(server: ServerOf, _: Reader, search: VectorSearch) -> Response:
    """During an upgrade one vector per space may be needed; a 409 names the spaces in `needs`."""
    return _json(await server.engine.vector(search))


@router.post(
    "/search/image",
    operation_id="searchImage",
    summary="Items like an uploaded picture",
    response_model=SearchResponse,
)
async def by_image(
    server: ServerOf, _: Reader, file: Picture, k: K = 20, offset: Offset = 0, where: Where = None
) -> Response:
    search = _form(k, offset, where)
    return _json(await server.engine.picture(await file.read(), search))


@router.post(
    "/search/text",
    operation_id="searchText",
    summary="Items that a text describes, where the encoder has a text side",
    response_model=SearchResponse,
)
async def by_text(server: ServerOf, _: Reader, search: TextSearch) -> Response:
    return _json(await server.engine.text(search))


@router.post(
    "/search/item",
    operation_id="searchItem",
    summary="Items like one of the gallery",
    response_model=SearchResponse,
)
async def by_item(server: ServerOf, _: Reader, search: ItemSearch) -> Response:
    return _json(await server.engine.item(search))


@router.post(
    "/compare/image",
    operation_id="compareImage",
    summary="What the old system, the new one and the service find for a picture",
    response_model=CompareResponse,
)
async def compare_image(
    server: ServerOf, _: Reader, file: Picture, k: K = 20, offset: Offset = 0, where: Where = None
) -> Response:
    """During an upgrade only: 409 otherwise."""
    search = _form(k, offset, where)
    return _json(await server.engine.compare_picture(await file.read(), search))


@router.post(
    "/compare/text",
    operation_id="compareText",
    summary="What the old system, the new one and the service find for a text",
    response_model=CompareResponse,
)
async def compare_text(server: ServerOf, _: Reader, search: TextSearch) -> Response:
    """During an upgrade only: 409 otherwise."""
    return _json(await server.engine.compare_text(search))


@router.post(
    "/compare/item",
    operation_id="compareItem",
    summary="What the old system, the new one and the service find for an item",
    response_model=CompareResponse,
)
async def compare_item(server: ServerOf, _: Reader, search: ItemSearch) -> Response:
    """During an upgrade only: 409 otherwise. Right, wrong and flips where the service knows the key of the label."""
    return _json(await server.engine.compare_item(search))


def _form(k: int, offset: int, where: str | None) -> Search:
    """A form holds texts; the filter among them is JSON."""
    try:
        return Search(k=k, offset=offset, where=_WHERE.validate_json(where) if where and where.strip() else None)
    except ValidationError as error:
        raise ProblemError(422, f"where: {error.errors()[0]['msg']}") from error


def _json(made: BaseModel) -> Response:
    # Already a model of the right type: it is written once, by pydantic, and not checked a second time.
    return Response(made.model_dump_json(), media_type="application/json")
