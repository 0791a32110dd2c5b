"""Opening a gallery wherever it is: a folder, or the URL of another store.

open_gallery("photos")                                    a folder; also file:photos
open_gallery("postgresql://host/db?gallery=photos")       the store whose record names the scheme postgresql
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from bowerbird.errors import InputError, did_you_mean, without_passwords
from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.storage import Storage

if TYPE_CHECKING:
    from bowerbird.gallery.space import Space

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")  # two characters at least: C: is a drive


def open_gallery(url: str | Path, *, readonly: bool = False, lock_timeout: float = 10.0) -> Gallery:
    """Open the gallery at a path or URL.

    Args:
        url: A folder, ``file:`` and a folder, or a URL whose scheme a store record names.
        lock_timeout: Seconds that a write waits for another writer before it is refused.

    Raises:
        InputError: If no installed store has the scheme; names those that are installed.
        GalleryError: If there is no gallery, or it cannot be opened.
    """
    return _driver(url).open(str(url), readonly=readonly, lock_timeout=lock_timeout)


def create_gallery(url: str | Path, space: Space, *, dtype: str = "float32", lock_timeout: float = 10.0) -> Gallery:
    """A new gallery at a path or URL, for vectors of ``space`` stored as ``dtype``."""
    return _driver(url).create(str(url), space, dtype=dtype, lock_timeout=lock_timeout)


class EmbeddedGalleries:
    """The store ``core:embedded``: a gallery in a folder."""

    features = Storage.features

    @classmethod
    def open(cls, url: str, *, readonly: bool = False, lock_timeout: float = 10.0) -> Gallery:
        return Gallery.open(_folder(url), readonly=readonly, lock_timeout=lock_timeout)

    @classmethod
    def create(cls, url: str, space: Space, *, dtype: str = "float32", lock_timeout: float = 10.0) -> Gallery:
        return Gallery.create(_folder(url), space, dtype=dtype, lock_timeout=lock_timeout)


def scheme_of(url: str | Path) -> str | None:
    """``None`` for a path."""
    found = _SCHEME.match(url) if isinstance(url, str) else None
    return found[1].lower() if found else None


def folder_of(url: str | Path) -> Path | None:
    """The folder of a path or ``file:`` URL; ``None`` for other URLs."""
    scheme = scheme_of(url)
    if scheme is None:
        return Path(url)
    if scheme != "file":
        return None
    rest = str(url)[len("file:") :]
    return Path(unquote(urlsplit(rest).path) if rest.startswith("//") else rest)


def _folder(url: str) -> Path:
    folder = folder_of(url)
    if folder is None:
        raise InputError(f"{safe_url(url)!r} is not a folder")
    return folder


def safe_url(url: str | Path) -> str:
    """The URL without its passwords, for messages."""
    return without_passwords(str(url))


def _driver(url: str | Path) -> Any:
    """The class that opens this URL."""
    scheme = scheme_of(url)
    if scheme is None or scheme == "file":
        return EmbeddedGalleries  # without a look at the plugins
    from bowerbird.records import RetrieverRecord
    from bowerbird.registry import get_registry

    registry = get_registry()
    by_scheme = {
        known: record
        for record in registry.records(kind="retriever", role="store")
        if isinstance(record, RetrieverRecord)
        for known in record.schemes
    }
    if scheme in by_scheme:
        return registry.load(by_scheme[scheme])
    known = sorted(by_scheme)
    hint = " PostgreSQL and Qdrant come with: pip install bowerbird-scale." if known == ["file"] else ""
    raise InputError(
        f"no installed store opens {safe_url(url)!r}: its scheme is {scheme!r}, known are {', '.join(known)}."
        f"{did_you_mean(scheme, known)}{hint} A folder whose name has a colon is written ./{safe_url(url)}"
    )
