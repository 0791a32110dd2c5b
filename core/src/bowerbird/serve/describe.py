"""A gallery and its spaces as clients see them: without the folders of the server."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import bowerbird
from bowerbird.gallery.open import folder_of
from bowerbird.serve.schemas import Accepts, GalleryInfo, Role, SpaceInfo, UpgradeBrief

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.protocol import Snapshot
    from bowerbird.gallery.space import Space
    from bowerbird.serve.settings import ServeSettings

SAMPLE = 200  # oldest items, and as many of the newest, whose metadata keys are offered as filters
MOST_KEYS = 100
_OF_RUN = re.compile(r"(?<=[^/\\])[/\\]encoder$")
_FOLDERS = re.compile(r"[^\s?&=:,;]*[/\\](?=[^\s?&=:,;])")


def encoder_name(reference: str) -> str:
    """A reference of an encoder without folders: ``/srv/models/new`` is ``new``, settings keep the names of files.

    A run has its encoder in a folder of that name: ``runs/new/encoder`` is ``new``, too.
    """
    return _FOLDERS.sub("", _OF_RUN.sub("", reference.rstrip("/\\"))) or "encoder"


def space_info(space: Space, items: int) -> SpaceInfo:
    """``items``: how many are searched in it now."""
    return SpaceInfo(
        fingerprint=space.fingerprint,
        encoder=encoder_name(space.encoder),
        dim=space.dim,
        items=items,
        lifted=space.lifted,
    )


def spaces_of(snapshot: Snapshot) -> list[SpaceInfo]:
    """Every known space: those that are searched now first, the oldest of them first."""
    counts = {part.space.fingerprint: part.count for part in snapshot.parts}
    order = [*snapshot.stack, *sorted(name for name in snapshot.spaces if name not in snapshot.stack)]
    return [space_info(snapshot.spaces[name], counts.get(name, 0)) for name in order]


def upgrade_brief(gallery: Gallery, snapshot: Snapshot) -> UpgradeBrief | None:
    """The upgrade that is under way in ``snapshot``; ``complete`` where no task of it is left."""
    upgrade = snapshot.upgrade
    if upgrade is None:
        return None
    counts = [part.count for part in snapshot.parts]
    now = gallery.store.upgrade_state()  # pausing is no commit of the gallery's contents
    paused = (now or upgrade).state == "paused"
    complete = now is not None and gallery.store.progress().complete
    return UpgradeBrief(
        id=upgrade.id,
        state="complete" if complete else "paused" if paused else "running",
        old=upgrade.old,
        new=upgrade.new,
        share=counts[-1] / sum(counts) if sum(counts) else 1.0,
    )


def gallery_name(location: str) -> str:
    """The last part of the folder's path; of a URL its gallery, or what its path ends with."""
    folder = folder_of(location)
    if folder is not None:
        return folder.resolve().name
    url = urlsplit(location)
    named = parse_qs(url.query).get("gallery")
    return named[0] if named else encoder_name(url.path) if url.path.strip("/") else url.scheme


def metadata_keys(gallery: Gallery, snapshot: Snapshot) -> list[str]:
    """Keys with values that can be filtered by, in a sample of the items."""
    storage = gallery.storage
    sample = storage.scan(snapshot.epoch, -1, SAMPLE)
    if snapshot.live > SAMPLE:
        sample += storage.scan(snapshot.epoch, snapshot.num_limit - SAMPLE - 1, SAMPLE)
    keys = {key for item in sample for key, value in item.metadata.items() if isinstance(value, str | int | float)}
    return sorted(keys)[:MOST_KEYS]


def gallery_info(settings: ServeSettings, gallery: Gallery, accepts: Accepts, role: Role) -> GalleryInfo:
    """What a client learns first. Blocks for some milliseconds."""
    snapshot: Any = gallery.snapshot()
    return GalleryInfo(
        name=gallery_name(settings.gallery),
        version=bowerbird.__version__,
        items=snapshot.live,
        pending=len(gallery.pending()),
        epoch=snapshot.epoch,
        serving=snapshot.serving,
        spaces=spaces_of(snapshot),
        accepts=accepts,
        upgrade=upgrade_brief(gallery, snapshot),
        candidates=sorted(settings.candidates),
        label_key=settings.label_key,
        metadata_keys=metadata_keys(gallery, snapshot),
        read_only=settings.read_only,
        role=role,
        max_upload_bytes=settings.max_upload_bytes,
        max_files=settings.max_files,
    )
