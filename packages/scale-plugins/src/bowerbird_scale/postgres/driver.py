"""The store ``scale:postgres``: what opens and creates galleries by URL."""

from __future__ import annotations

from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.space import Space
from bowerbird_scale.postgres.connection import Address
from bowerbird_scale.postgres.storage import PostgresStorage
from bowerbird_scale.postgres.store import PostgresStore
from bowerbird_scale.postgres.vectors import Tables


class PostgresGalleries:
    """``postgresql://user@host/database?gallery=NAME``; each gallery has a schema of its own, ``bowerbird_NAME``."""

    features = Tables.features

    @classmethod
    def open(cls, url: str, *, readonly: bool = False, lock_timeout: float = 10.0) -> Gallery:
        """
        Raises:
            GalleryError: If there is no such gallery.
            StoreUnavailableError: If the server does not answer.
        """
        storage = PostgresStorage(Address.parse(url), Tables(), readonly=readonly, lock_timeout=lock_timeout)
        return Gallery(storage, PostgresStore(storage))

    @classmethod
    def create(cls, url: str, space: Space, *, dtype: str = "float32", lock_timeout: float = 10.0) -> Gallery:
        """
        Raises:
            GalleryError: If there is one already, or the server has no pgvector.
        """
        PostgresStorage.create(Address.parse(url), Tables(), space, dtype=dtype)
        return cls.open(url, lock_timeout=lock_timeout)
