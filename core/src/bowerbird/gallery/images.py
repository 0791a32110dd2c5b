"""Images and videos in, these and texts as queries: what an encoder adds to a gallery of vectors. Imports no torch; the
encoder brings it.

``encoder`` is a ``bowerbird.encoders.LoadedEncoder``: ``encode``, ``encode_batches``, ``fingerprint`` and ``name`` are
used, and of encoders of videos and texts ``frames`` and ``encode_texts``.
"""

from __future__ import annotations

import functools
import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.data.moments import Moment, moment_uri, split_moment
from bowerbird.data.regions import Region, region_uri, split_region
from bowerbird.data.uris import dataset_item, is_dataset_uri
from bowerbird.errors import DataError, InputError, SpaceError

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery, SearchResult
    from bowerbird.gallery.space import Item

COMMIT_ITEMS = 512  # an interrupted run repeats at most this many
EXISTING = ("error", "skip", "update")


@dataclass
class Added:
    """``added`` new items, ``replaced`` edited ones, ``unchanged`` ones that were there; ``skipped``: id -> reason."""

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


class _Chosen(Sequence[Any]):
    """Some positions of a sequence of images, looked at when they are decoded (a data set makes them one by one)."""

    def __init__(self, images: Sequence[Any], positions: Sequence[int]) -> None:
        self.images, self.positions = images, positions
        self.given = isinstance(images, list | tuple)  # paths or bytes that cost nothing to look at

    def only(self, chosen: Sequence[int]) -> _Chosen:
        return _Chosen(self.images, [self.positions[position] for position in chosen])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, position: Any) -> Any:
        return self.images[self.positions[position]]


def check_encoder(gallery: Gallery, encoder: Any, *, fingerprint: str | None = None) -> None:
    """Refuse an encoder that is not the one of the space that is written now (or of ``fingerprint``).

    The fingerprint is compared every time. The canary, stored items encoded again, is run when a gallery meets this
    encoder on this machine for the first time: a library that computes something else does not change the fingerprint.

    Raises:
        SpaceError: If it is another encoder; says which one is needed.
    """
    snapshot = gallery.snapshot()
    space = snapshot.spaces[fingerprint] if fingerprint else snapshot.write_space
    if encoder.fingerprint != space.fingerprint:
        raise SpaceError(
            f"the encoder {encoder.name} (fingerprint {encoder.fingerprint[:12]}) is not the one of this gallery, "
            f"{space}. "
            "Load that one, or upgrade the gallery: `bowerbird upgrade plan`."
        )
    passed = f"{encoder.fingerprint} on {socket.gethostname()}"
    if gallery.storage.canary_passed(space.fingerprint) == passed:
        return

    def encode(items: list[Item]) -> np.ndarray:
        rows = np.full((len(items), space.dim), np.nan, np.float32)
        sources = [item.uri or b"" for item in items]
        for positions, vectors in encoder.encode_batches(sources, on_error=lambda position, error: None):
            rows[positions] = vectors
        return rows

    if gallery.check_canary(encode, fingerprint=space.fingerprint) is not None and not gallery.storage.readonly:
        gallery.storage.remember_canary(space.fingerprint, passed)


def add_images(
    gallery: Gallery,
    encoder: Any,
    images: Sequence[Any],
    *,
    ids: Sequence[str],
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
    existing: str = "error",
    on_error: str = "raise",
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Added:
    """Encode images (videos, where the encoder takes these) and add them, in commits of ``COMMIT_ITEMS``. Repeat an
    interrupted call with ``existing="update"``.

    Besides its metadata a video has ``start`` and ``end`` in seconds: of its moment, where the path names one
    (``bowerbird.data.moments``), else of the whole.

    Args:
        images: Paths (kept as ``uri``, made absolute), addresses of data set items, bytes or ``PIL.Image``; N of them.
        ids: N distinct ids.
        existing: What to do with ids that are in the gallery: ``error``, ``skip``, or ``update``: replace those whose
            content
            changed, skip the others.
        on_error: ``raise`` or ``skip`` images that cannot be read; the skipped ones are listed in the result.
        progress: Called with the number of images that are done.

    Raises:
        SpaceError: If ``encoder`` is not the gallery's.
        DataError: If an image cannot be read and ``on_error`` is ``raise``; names it.
    """
    check_arguments(images, ids, metadata, existing, on_error)
    check_encoder(gallery, encoder)
    result = Added()
    for start in range(0, len(ids), COMMIT_ITEMS):
        chunk = slice(start, start + COMMIT_ITEMS)
        rows = None if metadata is None else metadata[chunk]
        part = _Chosen(images, range(start, start + len(ids[chunk])))
        _add_chunk(gallery, encoder, part, list(ids[chunk]), rows, existing, on_error, batch_size, result)
        if progress is not None:
            progress(len(ids[chunk]))
    return result


def check_arguments(
    images: Sequence[Any], ids: Sequence[str], metadata: Sequence[Any] | None, existing: str, on_error: str
) -> None:
    """Raise ``InputError`` for choices that there are not, and for numbers of images, ids and metadata that differ."""
    if existing not in EXISTING or on_error not in ("raise", "skip"):
        raise InputError(
            f"existing is {existing!r} (accepted: {', '.join(EXISTING)}), on_error {on_error!r} (raise, skip)"
        )
    if not len(images) == len(ids) == len(metadata if metadata is not None else ids):
        raise InputError(f"{len(images)} images need as many ids and metadata; got {len(ids)} ids")


def _add_chunk(
    gallery: Gallery,
    encoder: Any,
    images: _Chosen,
    ids: list[str],
    metadata: Sequence[Mapping[str, Any] | None] | None,
    existing: str,
    on_error: str,
    batch_size: int,
    result: Added,
) -> None:
    hashes = [content_hash(image) for image in images] if images.given else [None] * len(ids)
    known = gallery.get_many(ids)
    wanted = []
    for position, item in enumerate(known):
        unchanged = item is not None and item.content_hash == hashes[position]  # without a hash the id is all we have
        if item is not None and (existing == "skip" or (existing == "update" and unchanged)):
            result.unchanged += 1
        else:
            wanted.append(position)
    there = [ids[position] for position in wanted if known[position] is not None]
    if there and existing == "error":
        raise InputError(
            f"{len(there)} ids are in the gallery already ({', '.join(map(repr, there[:5]))}). Say what to do with "
            "them: "
            "skip them, or update those whose content changed."
        )

    def keep(position: int, error: DataError) -> None:
        result.skipped[ids[wanted[position]]] = str(error)

    def refuse(position: int, error: DataError) -> None:
        done = result.added + result.replaced
        raise DataError(
            f"{error} {done} items were written before and stay. Repair or remove it and repeat the call, or leave "
            "such images out: --on-error skip (on_error='skip')."
        ) from error

    good: list[int] = []
    vectors: list[np.ndarray] = []
    of_videos = getattr(encoder, "frames", None) is not None
    policy = keep if on_error == "skip" else refuse
    if wanted:
        sources = images.only(wanted)
        for positions, rows in encoder.encode_batches(sources, batch_size=batch_size, on_error=policy):
            good.extend(wanted[position] for position in positions)
            vectors.append(rows)
    if not good:
        return
    gallery.add(
        [ids[position] for position in good],
        np.concatenate(vectors),
        uris=[uri_of(images[position]) for position in good] if images.given else None,
        metadata=_with_times(images, metadata, good) if of_videos else _at(metadata, good),
        content_hashes=[hashes[position] for position in good],
        space=encoder.fingerprint,
        replace=existing == "update",
    )
    replaced = sum(known[position] is not None for position in good)
    result.replaced += replaced
    result.added += len(good) - replaced


def search_images(
    gallery: Gallery, encoder: Any, images: Sequence[Any], k: int = 10, *, where: Mapping[str, Any] | None = None
) -> SearchResult:
    """Search by images: paths, bytes or ``PIL.Image``. During an upgrade use ``Upgrade.serve``, which has both
    encoders.

    Raises:
        SpaceError: If ``encoder`` is not the gallery's, or an upgrade is half-way.
        DataError: If an image cannot be read; names it.
    """
    check_encoder(gallery, encoder, fingerprint=encoder.fingerprint if _serves(gallery, encoder) else None)
    return gallery.search({encoder.fingerprint: encoder.encode(images)}, k, where=where)


def search_texts(
    gallery: Gallery, encoder: Any, texts: Sequence[str], k: int = 10, *, where: Mapping[str, Any] | None = None
) -> SearchResult:
    """Search by sentences, with an encoder that was trained with texts.

    Raises:
        SpaceError: If ``encoder`` is not the gallery's, or an upgrade is half-way.
        InputError: If the encoder takes no texts, or one is empty.
    """
    check_encoder(gallery, encoder, fingerprint=encoder.fingerprint if _serves(gallery, encoder) else None)
    return gallery.search({encoder.fingerprint: encoder.encode_texts(texts)}, k, where=where)


def _serves(gallery: Gallery, encoder: Any) -> bool:
    return any(part.count and part.space.fingerprint == encoder.fingerprint for part in gallery.snapshot().parts)


def content_hash(image: Any) -> str | None:
    """sha256 of the bytes; ``None`` where there are none (a decoded image) or they cannot be read."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if not isinstance(image, str | Path):
        return None
    try:
        whole, part = split_part(image)
    except DataError:  # the encoder reports it, with the name
        return None
    return part_hashes(whole, [part])[0]


def split_part(source: str | Path) -> tuple[str, Region | Moment | None]:
    """A path or address without its region or moment, and these. Raises ``DataError`` where one is malformed."""
    whole, moment = split_moment(source)
    return (whole, moment) if moment is not None else split_region(source)


def part_hashes(source: str | Path, parts: Sequence[Region | Moment | None]) -> list[str | None]:
    """``content_hash`` of regions of one picture, or moments of one video; ``None`` among them is the whole.

    Two parts are two contents, also where their pixels are equal.
    """
    try:
        digest = _digest(source)
    except (OSError, DataError):  # the encoder reports it, with the name
        return [None] * len(parts)
    hashes: list[str | None] = []
    for part in parts:
        own = digest.copy()
        if part is not None:
            own.update(str(part).encode())
        hashes.append(own.hexdigest())
    return hashes


def _digest(source: str | Path) -> Any:
    """sha256 of a file, or of what a data set gives for an address."""
    if not is_dataset_uri(source):
        path = Path(source)
        status = path.stat()
        return _file_digest(path, status.st_mtime_ns, status.st_size)
    item = dataset_item(str(source))
    if "video" in item:
        whole, moment = split_moment(item["video"])
        digest = _digest(whole).copy()
        digest.update(str(moment or "").encode())
        return digest
    return hashlib.sha256(item["image"].tobytes())


@functools.lru_cache(maxsize=256)  # of a long video every clip asks for it
def _file_digest(path: Path, modified: int, size: int) -> Any:
    del modified, size
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def uri_of(image: Any) -> str | None:
    """Where the image is, from whatever folder it is read; ``None`` for what has no place (bytes, a decoded one)."""
    if not isinstance(image, str | Path):
        return None
    whole, part = split_part(image)
    address = whole if is_dataset_uri(whole) else str(Path(whole).resolve())
    if part is None:
        return address
    return moment_uri(address, part) if isinstance(part, Moment) else region_uri(address, part)


def _at(metadata: Sequence[Any] | None, positions: Sequence[int]) -> list[Any] | None:
    return None if metadata is None else [metadata[position] for position in positions]


def _with_times(images: Sequence[Any], metadata: Sequence[Any] | None, positions: Sequence[int]) -> list[Any]:
    """The metadata at ``positions``, that of videos with their ``start`` and ``end`` in seconds."""
    from bowerbird.data.videos import video_times

    found = []
    for position, own in zip(positions, _at(metadata, positions) or [None] * len(positions), strict=True):
        times = video_times(images[position])
        found.append(own if times is None else {**(own or {}), "start": times[0], "end": times[1]})
    return found
