"""Copying a gallery to another place or another store: streaming, resumable, and verified item by item at the end.

The copy has the same items in the same order with the same vectors, so that its searches give the same lists. What is
not copied: the numbers of items and epochs, the history of upgrades and what they watched, and approximate indexes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np

from bowerbird.errors import GalleryError, InputError
from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.open import create_gallery, folder_of, open_gallery, safe_url
from bowerbird.gallery.space import Item, Space

MARKER = "copy/source.json"  # in the target: where it comes from, and whether it is complete
BATCH_BYTES = 16 << 20
BATCH_ITEMS = 5000


@dataclass(frozen=True)
class Copied:
    """What a copy did.

    Attributes:
        items: In the copy, which are those of the source.
        added, replaced, deleted, unchanged: What this call did to them; an interrupted copy goes on where it was.
        digest: Of ids, vectors, uris, content hashes and metadata of all items, whatever their order; it was computed
            of both galleries and is equal.
    """

    items: int
    added: int
    replaced: int
    deleted: int
    unchanged: int
    digest: str


def copy_gallery(
    source: Gallery, url: str, *, progress: Callable[[str, int], None] | None = None, lock_timeout: float = 10.0
) -> Copied:
    """Copy every item of one epoch of ``source`` to a new gallery, or go on with a copy that was interrupted.

    Args:
        url: Path or URL of the copy.
        progress: Called with ``copying`` or ``verifying`` and a number of items.

    Raises:
        InputError: If ``url`` is a folder in a folder that is not there.
        GalleryError: If the source is being upgraded or has items without a vector, or there is another gallery at
            ``url``, or the two differ at the end.
    """
    folder = folder_of(url)
    if folder is not None and not folder.parent.is_dir():
        raise InputError(
            f"no gallery can be copied to {folder}: there is no folder {folder.parent}. Make it first, or "
            "choose another place"
        )
    snapshot = source.snapshot()
    if snapshot.upgrade is not None:
        raise GalleryError(
            f"gallery {source.path} is being upgraded to {snapshot.write_space}, and half an upgrade cannot be copied: "
            "finish it or roll it back first, then copy, and upgrade the copy"
        )
    if snapshot.new.count != snapshot.live:
        raise GalleryError(
            f"{snapshot.live - snapshot.new.count} items of {source.path} have no readable vector (see `bowerbird "
            "gallery stats` and `verify`): give them one, or delete them, then copy"
        )
    space = snapshot.spaces[snapshot.serving]
    with _target(source, url, space, lock_timeout) as target:
        _copy_spaces(source, target)
        counts = _copy_items(source, target, snapshot, progress)
        digests = [_digest(gallery, shot, progress) for gallery, shot in ((source, snapshot), (target, None))]
        if digests[0] != digests[1] or len(target) != snapshot.live:
            raise GalleryError(
                f"the copy at {target.path} differs from {source.path}: {len(target)} items with digest {digests[1]}, "
                f"expected {snapshot.live} with {digests[0]}. Was it written by somebody else? Repeat the command to "
                "bring it up to date"
            )
        _mark(target, source, space, complete=True)
        return Copied(snapshot.live, *counts, digests[0])


def _target(source: Gallery, url: str, space: Space, lock_timeout: float) -> Gallery:
    """The gallery at ``url``: created, or the beginning of this copy, or empty and of the same kind."""
    try:
        target = create_gallery(url, space, dtype=source.storage.dtype, lock_timeout=lock_timeout)
    except GalleryError as occupied:
        try:
            target = open_gallery(url, lock_timeout=lock_timeout)
        except GalleryError:
            raise occupied from None
        marker = target.storage.read_file(MARKER)
        if marker is None and _untouched(target, space, source.storage.dtype):
            # Also what a copy leaves that was killed between its first two steps.
            _mark(target, source, space, complete=False)
            return target
        known = json.loads(marker) if marker else {}
        if known.get("source") != str(source.path) or known.get("space") != space.fingerprint:
            whose = f"a copy of {known['source']}" if "source" in known else "no copy"
            if known.get("source") == str(source.path):
                whose += f" from before it was upgraded to {space}"
            target.close()
            raise GalleryError(
                f"there is a gallery at {safe_url(url)} already, and it is {whose}: choose another place"
            ) from None
        if target.store.upgrade_state() is not None or target.snapshot().serving != space.fingerprint:
            target.close()
            raise GalleryError(f"the copy at {safe_url(url)} has been upgraded since; choose another place") from None
    else:
        _mark(target, source, space, complete=False)
    return target


def _untouched(target: Gallery, space: Space, dtype: str) -> bool:
    """Whether a gallery is as `gallery create` makes one for what is to be copied."""
    snapshot = target.snapshot()
    fresh = snapshot.num_limit == 0 and snapshot.upgrade is None
    return fresh and snapshot.serving == space.fingerprint and target.storage.dtype == dtype


def _mark(target: Gallery, source: Gallery, space: Space, *, complete: bool) -> None:
    text = json.dumps({"source": str(source.path), "space": space.fingerprint, "complete": complete})
    target.storage.write_file(MARKER, text.encode())


def _copy_spaces(source: Gallery, target: Gallery) -> None:
    """Spaces, relations and transforms: small, and idempotent."""
    for space in source.spaces():
        target.register_space(space)
    for relation in source.relations():
        if relation.kind == "compatible":
            target.relate(relation.new, relation.old, evidence=relation.evidence)
    for transform in source.transforms():
        target.register_transform(transform, accept_unmeasured=True)  # as it is used where it comes from


def _copy_items(
    source: Gallery, target: Gallery, snapshot: Any, progress: Callable[[str, int], None] | None
) -> tuple[int, int, int, int]:
    """Add what is missing, replace what differs, delete what is gone; ``(added, replaced, deleted, unchanged)``."""
    added = replaced = unchanged = 0
    for items in _batches(source, snapshot):
        rows = snapshot.new.vectors_of(np.array([item.num for item in items], np.int64))
        there = target.get_many([item.id for item in items]) if len(target) else [None] * len(items)
        known = [item for item in there if item is not None]
        kept = dict(zip([item.id for item in known], target.vectors_of([i.id for i in known]), strict=True))
        todo = [
            position
            for position, (item, old) in enumerate(zip(items, there, strict=True))
            if old is None or _content(item, rows[position]) != _content(old, kept[old.id])
        ]
        again = sum(there[position] is not None for position in todo)
        if todo:
            chosen = [items[position] for position in todo]
            target.add(
                [item.id for item in chosen],
                rows[todo].astype(source.storage.dtype, copy=False),
                uris=[item.uri for item in chosen],
                metadata=[item.metadata for item in chosen],
                content_hashes=[item.content_hash for item in chosen],
                replace=True,
            )
        added, replaced = added + len(todo) - again, replaced + again
        unchanged += len(items) - len(todo)
        if progress is not None:
            progress("copying", len(items))
    return added, replaced, _delete_the_rest(source, target, snapshot), unchanged


def _delete_the_rest(source: Gallery, target: Gallery, snapshot: Any) -> int:
    """Items that the source has lost since the copy began."""
    if len(target) == snapshot.live:
        return 0
    gone = []
    for items in _batches(target, target.snapshot()):
        found = source.get_many([item.id for item in items])
        gone += [item.id for item, there in zip(items, found, strict=True) if there is None]
    return target.delete(gone) if gone else 0


def _batches(gallery: Gallery, snapshot: Any) -> Iterator[list[Item]]:
    size = max(1, min(BATCH_ITEMS, BATCH_BYTES // (4 * snapshot.write_space.dim)))
    items = (item for item in gallery.items(batch=size, snapshot=snapshot))
    while batch := list(islice(items, size)):
        yield batch


def _content(item: Item, row: np.ndarray) -> bytes:
    """Digest of everything that is copied of an item."""
    about = json.dumps([item.id, item.uri, item.content_hash, dict(item.metadata)], sort_keys=True)
    if "-0.0" in about:  # which is 0.0 in a store that keeps decimal numbers
        about = json.dumps(json.loads(about, parse_float=lambda text: float(text) + 0.0), sort_keys=True)
    return blake2b(about.encode() + b"\0" + np.ascontiguousarray(row, "<f4").tobytes(), digest_size=16).digest()


def _digest(gallery: Gallery, snapshot: Any, progress: Callable[[str, int], None] | None) -> str:
    """Sum of the digests of all items: the same for the same items in any order."""
    snapshot = snapshot or gallery.snapshot()
    total = 0
    for items in _batches(gallery, snapshot):
        rows = snapshot.new.vectors_of(np.array([item.num for item in items], np.int64))
        total += sum(int.from_bytes(_content(item, row), "big") for item, row in zip(items, rows, strict=True))
        if progress is not None:
            progress("verifying", len(items))
    return f"{total % (1 << 128):032x}"
