"""Items: list, look at, add and delete. Ids may hold anything, so that they are never part of a path."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from bowerbird.errors import InputError
from bowerbird.serve.depends import Reader, ServerOf, Writer
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import Added, Delete, Deleted, ItemId, ItemInfo, ItemPage, NewItem, NewVectors
from bowerbird.serve.thumbnails import etag_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item
    from bowerbird.serve.server import Server

router = APIRouter(prefix="/v1", tags=["items"])

MOST_JSON = 8 * 2**20  # bytes of the field `items`
IdQuery = Annotated[ItemId, Query(alias="id", description="Of the item, whatever it contains.")]
OnError = Annotated[
    Literal["raise", "skip"],
    Query(description="`skip` leaves out pictures that cannot be used and names them; `raise` refuses the batch."),
]

new_items = TypeAdapter(Annotated[list[NewItem], Field(min_length=1, max_length=10_000, fail_fast=True)])
MULTIPART: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["items", "files"],
                    "properties": {
                        # Written out: a schema with definitions of its own would refer to the root of OpenAPI's.
                        "items": {"type": "array", "minItems": 1, "items": NewItem.model_json_schema()},
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "items": {"type": "string", "format": "binary"},
                            "description": "A picture for each item, in the same order.",
                        },
                    },
                },
                "encoding": {"items": {"contentType": "application/json"}},
            }
        },
    }
}
WEBP: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/webp": {"schema": {"type": "string", "format": "binary"}}}, "description": "The picture."},
    304: {"description": "The one that the client has is the right one."},
}


@router.get("/items", operation_id="listItems", summary="Items in the order in which they were added, in pages")
async def list_items(
    server: ServerOf,
    _: Reader,
    after: Annotated[int, Query(ge=-1, le=2**62, description="`next` of the page before.")] = -1,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ItemPage:
    def page() -> ItemPage:
        snapshot = server.gallery.snapshot()
        found = server.gallery.storage.scan(snapshot.epoch, after, limit)
        following = found[-1].num if len(found) == limit else None
        return ItemPage(items=described(server.gallery, snapshot, found), next=following)

    return await asyncio.to_thread(page)


@router.get("/item", operation_id="getItem", summary="One item")
async def get_item(server: ServerOf, _: Reader, item_id: IdQuery) -> ItemInfo:
    def one() -> ItemInfo:
        return described(server.gallery, server.gallery.snapshot(), [_item(server, item_id)])[0]

    return await asyncio.to_thread(one)


@router.get(
    "/thumbnail",
    operation_id="getThumbnail",
    summary="A small picture of an item",
    response_class=Response,
    responses=WEBP,
)
async def thumbnail(
    server: ServerOf,
    _: Reader,
    item_id: IdQuery,
    size: Annotated[int, Query(ge=64, le=512, description="Most pixels of width and height.")] = 256,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Of a video, or a moment of one, the first frame; of a part of a picture that part."""
    item = await asyncio.to_thread(_item, server, item_id)
    headers = {"ETag": etag_of(item, size), "Cache-Control": "private, no-cache"}  # ask again: an id can be replaced
    known = [part.strip().removeprefix("W/") for part in (if_none_match or "").split(",")]
    if headers["ETag"] in known:
        return Response(status_code=304, headers=headers)
    made = await server.thumbnails.get(item, size)
    return Response(made.data, media_type="image/webp", headers=headers)


@router.post("/items", operation_id="addItems", summary="Add pictures, or replace them", openapi_extra=MULTIPART)
async def add_items(server: ServerOf, _: Writer, request: Request, on_error: OnError = "raise") -> Added:
    """`multipart/form-data`: the field `items` is a JSON list of `{"id": ..., "metadata": {...}}`, and for each item
    there is one file `files`, in the same order.

    Atomic and idempotent: the batch is there as a whole when this is answered, and sending it again changes nothing.
    An id that is there with another picture or other metadata is replaced. During an upgrade new items go into the new
    space at once.
    """
    async with _form(request, most_files=server.settings.max_files) as form:
        items = await _items_field(form)
        files = form.getlist("files")
        if not all(isinstance(file, UploadFile) for file in files):
            raise InputError("`files` must be files: parts of the form with a file name")
        return await server.contents.add(items, files, on_error=on_error)


@router.post("/items/vectors", operation_id="addVectors", summary="Add items by their vectors, without a picture")
async def add_vectors(server: ServerOf, _: Writer, body: NewVectors) -> Added:
    """Atomic and idempotent, as for pictures. Vectors need not have length 1. An upgrade cannot encode such items
    again: they have no picture."""
    return await server.contents.add_vectors(body)


@router.post("/items/delete", operation_id="deleteItems", summary="Delete items by id")
async def delete_items(server: ServerOf, _: Writer, body: Delete) -> Deleted:
    """Idempotent: ids that are not there are no error. Uploaded pictures are removed with their items."""
    return await server.contents.delete(body.ids)


def described(gallery: Gallery, snapshot: Any, items: Sequence[Item]) -> list[ItemInfo]:
    """Items as clients see them. ``spaces``: the one in which each is searched."""
    nums = np.array([item.num for item in items], np.int64)
    inside = np.minimum(nums, max(snapshot.num_limit - 1, 0))  # what was added after the snapshot is in no part of it
    places = [("", False)] * len(items)
    for part in snapshot.parts:
        newest = part.space.fingerprint == snapshot.write_space.fingerprint
        for position in np.flatnonzero(part.contains(inside) & (nums < snapshot.num_limit)) if len(nums) else ():
            places[position] = (part.space.fingerprint, newest)
    return [
        ItemInfo(
            id=item.id,
            metadata=dict(item.metadata),
            content_hash=item.content_hash,
            spaces=[space] if space else [],
            side="new" if newest else "old",
            has_picture=item.uri is not None,
        )
        for item, (space, newest) in zip(items, places, strict=True)
    ]


def _item(server: Server, item_id: str) -> Item:
    found = server.gallery.get_many([item_id])[0]
    if found is None:
        raise ProblemError(404, f"there is no item {item_id!r}.{server.gallery.storage.close_id(item_id)}")
    return found


@asynccontextmanager
async def _form(request: Request, *, most_files: int) -> AsyncIterator[Any]:
    """The form of a request; its files are gone when the block ends."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ProblemError(415, "send multipart/form-data with a field `items` (JSON) and a file `files` for each item")
    try:
        form = await request.form(max_files=most_files, max_fields=10, max_part_size=MOST_JSON)
    except UnicodeError as error:
        raise ProblemError(400, "the form is not of the character set that its Content-Type names") from error
    except OSError as error:  # larger files lie in the temporary folder until they are looked at
        raise ProblemError(
            503, f"the upload cannot be received ({error.strerror})", headers={"Retry-After": "60"}
        ) from error
    try:
        yield form
    finally:
        await form.close()


async def _items_field(form: Any) -> list[NewItem]:
    given = form.get("items")
    if given is None:
        raise InputError('the form has no field `items`, a JSON list of the items: [{"id": "cat"}]')
    if isinstance(given, UploadFile):  # as some clients send a part that has a type
        given = await given.read(MOST_JSON)
    try:
        return new_items.validate_json(given)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        raise RequestValidationError([{**e, "loc": ("body", "items", *e["loc"])} for e in errors]) from error
