"""Objects in: a vector for every object that a detector finds in pictures. Imports no torch; detector and encoder do.

``finder`` is a ``bowerbird.detect.ObjectFinder`` (``find``, ``classes`` and ``identity`` are used), ``encoder`` a
``LoadedEncoder``. An object's item is the region of its box: id and uri are those of the picture with ``#xywh=...``
(``bowerbird.data.regions``), so that upgrades encode it again as any other item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.data.regions import MARK, Region, region_around, region_uri, split_region
from bowerbird.errors import DataError, InputError
from bowerbird.gallery.images import COMMIT_ITEMS, Added, check_arguments, check_encoder, part_hashes, uri_of

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery

COMMIT_PICTURES = 128  # an interrupted run repeats at most this many, or COMMIT_ITEMS objects
CROPPED_PIXELS = 64_000_000  # of objects that wait to be encoded together


@dataclass
class AddedObjects(Added):
    """``Added`` counts objects. ``pictures`` were looked at, in ``empty`` of them nothing was found; ``removed``
    objects of changed pictures are gone."""

    pictures: int = 0
    empty: int = 0
    removed: int = 0


@dataclass
class _Batch:
    """Objects that are found and not written yet, and what they take the place of. ``crops`` have no vector yet."""

    ids: list[str] = field(default_factory=list)
    uris: list[str | None] = field(default_factory=list)
    hashes: list[str | None] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    crops: list[Any] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)


def add_objects(
    gallery: Gallery,
    encoder: Any,
    finder: Any,
    images: Sequence[Any],
    *,
    ids: Sequence[str],
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    existing: str = "error",
    on_error: str = "raise",
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> AddedObjects:
    """Find the objects of pictures and add a vector for each: its box, cut out and encoded.

    Besides its picture's metadata an item has ``image`` (id of the picture), ``label`` (name of the class), ``score``,
    ``box`` (x1, y1, x2, y2 in pixels, as it was found) and ``detector`` (what found it). Of several objects in the same
    whole pixels the surest is kept. The objects of a picture are added together or not at all; an interrupted call goes
    on where it was with ``existing="update"``: pictures whose objects are there are neither looked at nor encoded
    again, but for those in which nothing was found.

    Args:
        images: Paths or addresses of data set items, N of them, without regions.
        ids: N distinct ids of the pictures.
        existing: What to do with pictures that have objects in the gallery: ``error``, ``skip``, or ``update``: replace
            the objects where the picture or the detector changed.
        on_error: ``raise`` or ``skip`` pictures that cannot be read; the skipped ones are listed in the result.
        batch_size: Objects per forward pass of the encoder.
        progress: Called with the number of pictures that are done.

    Raises:
        SpaceError: ``encoder`` is not the gallery's.
        DataError: A picture cannot be read and ``on_error`` is ``raise``; names it.
        InputError: Numbers that do not fit, or an image that is a region.
    """
    check_arguments(images, ids, metadata, existing, on_error)
    for image in images:
        if not isinstance(image, str | Path) or split_region(image)[1] is not None:
            raise InputError(f"objects are found in whole pictures, given by their paths; {str(image)!r} is none")
    check_encoder(gallery, encoder)
    result = AddedObjects()
    known = _objects_of(gallery, ids)
    if existing == "error" and any(known.values()):
        name = next(name for name, items in known.items() if items)
        raise InputError(
            f"{sum(map(bool, known.values()))} pictures have objects in the gallery already (the first is {name!r}). "
            "Say what to do with them: skip them, or update those that changed (--existing)."
        )
    wanted = []
    for position, name in enumerate(ids):
        items = known[name]
        if items and (existing == "skip" or _unchanged(images[position], items, finder.identity)):
            result.unchanged += len(items)
        else:
            wanted.append(position)
    if progress is not None and len(wanted) < len(ids):
        progress(len(ids) - len(wanted))

    def bad(position: int, error: DataError) -> None:
        if on_error == "raise":
            done = result.added + result.replaced
            raise DataError(
                f"{error} {done} objects were written before and stay. Repair or remove it and repeat the call, or "
                "leave such images out: --on-error skip (on_error='skip')."
            ) from error
        result.skipped[ids[wanted[position]]] = str(error)
        if progress is not None:
            progress(1)

    batch, waiting = _Batch(), 0
    for found in finder.find([images[position] for position in wanted], on_error=bad):
        position = wanted[found.position]
        own = dict((metadata[position] if metadata is not None else None) or {})
        count = len(batch.ids)
        _collect(batch, found, finder, images[position], ids[position], own)
        fresh = set(batch.ids[count:])
        batch.stale += [item.id for item in known[ids[position]] if item.id not in fresh]
        if len(batch.crops) >= batch_size or sum(crop.width * crop.height for crop in batch.crops) > CROPPED_PIXELS:
            _encode(batch, encoder, batch_size)
        result.pictures += 1
        result.empty += not fresh
        waiting += 1
        if len(batch.ids) >= COMMIT_ITEMS or waiting >= COMMIT_PICTURES:
            _commit(gallery, encoder, batch, existing, batch_size, result)
            batch, waiting = _Batch(), 0
        if progress is not None:
            progress(1)
    _commit(gallery, encoder, batch, existing, batch_size, result)
    return result


def _objects_of(gallery: Gallery, ids: Sequence[str]) -> dict[str, list[Any]]:
    """The items that ``add_objects`` made of the pictures ``ids``. Reads the whole list of items, once."""
    found: dict[str, list[Any]] = {name: [] for name in ids}
    if len(found) < len(ids):
        twice = next(name for name in found if list(ids).count(name) > 1)
        raise InputError(f"id {twice!r} is given more than once")
    for item in gallery.items():
        image = item.metadata.get("image")
        if isinstance(image, str) and image in found and "detector" in item.metadata and MARK in item.id:
            found[image].append(item)
    return found


def _unchanged(image: Any, items: Sequence[Any], identity: str) -> bool:
    """Whether ``items`` are what ``identity`` found in this content of the picture, at this place."""
    regions = [split_region(item.id)[1] for item in items]
    uri = str(uri_of(image))
    same = all(
        item.metadata.get("detector") == identity and region is not None and item.uri == region_uri(uri, region)
        for item, region in zip(items, regions, strict=True)
    )
    return same and part_hashes(image, regions) == [item.content_hash for item in items]


def _collect(batch: _Batch, found: Any, finder: Any, image: Any, name: str, own: Mapping[str, Any]) -> None:
    """Add the objects of one picture to ``batch``."""
    width, height = found.image.size
    objects = found.objects
    regions: dict[Region, int] = {}  # region -> row; the first is the surest
    for row, box in enumerate(objects.boxes.tolist()):
        region = region_around(box, width=width, height=height)
        if region is not None:
            regions.setdefault(region, row)
    uri = str(uri_of(image))
    batch.hashes += part_hashes(image, list(regions))
    for region, row in regions.items():
        batch.ids.append(region_uri(name, region))
        batch.uris.append(region_uri(uri, region))
        batch.crops.append(found.image.crop(region.box(width, height)))
        batch.metadata.append(
            {
                **own,
                "image": name,
                "label": finder.classes[int(objects.labels[row])],
                "score": round(float(objects.scores[row]), 4),
                "box": [round(side, 2) for side in objects.boxes[row].tolist()],
                "detector": finder.identity,
            }
        )


def _encode(batch: _Batch, encoder: Any, batch_size: int) -> None:
    """The vectors of the crops, which are let go: those of large photographs would fill the memory."""
    batch.vectors += [rows for _, rows in encoder.encode_batches(batch.crops, batch_size=batch_size)]
    batch.crops = []


def _commit(
    gallery: Gallery, encoder: Any, batch: _Batch, existing: str, batch_size: int, result: AddedObjects
) -> None:
    if batch.ids:
        _encode(batch, encoder, batch_size)
        replaced = sum(item is not None for item in gallery.get_many(batch.ids))
        gallery.add(
            batch.ids, np.concatenate(batch.vectors), uris=batch.uris, metadata=batch.metadata,
            content_hashes=batch.hashes, space=encoder.fingerprint, replace=existing == "update",
        )  # fmt: skip
        result.replaced += replaced
        result.added += len(batch.ids) - replaced
    if batch.stale:  # after the new ones are there: an interrupted call finds that the picture is not done
        result.removed += gallery.delete(batch.stale)
