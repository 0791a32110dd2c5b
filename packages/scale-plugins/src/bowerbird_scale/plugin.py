"""Records of this package. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    yield RetrieverRecord(
        name="scale:postgres",
        role="store",
        target="bowerbird_scale.postgres.driver:PostgresGalleries",
        schemes=("postgresql", "postgres"),
        summary="A gallery in PostgreSQL with pgvector: many writers, and workers on any host.",
        extras={"psycopg": "bowerbird-scale[postgres]"},
    )
    yield RetrieverRecord(
        name="scale:qdrant",
        role="store",
        target="bowerbird_scale.qdrant:QdrantGalleries",
        schemes=("qdrant+postgresql",),
        summary="A gallery with its vectors in Qdrant and its catalogue in PostgreSQL.",
        extras={"psycopg": "bowerbird-scale[qdrant]", "qdrant_client": "bowerbird-scale[qdrant]"},
    )
    yield RetrieverRecord(
        name="scale:ray",
        role="executor",
        target="bowerbird_scale.ray_executor:RayExecutor",
        summary="Workers of an upgrade on a Ray cluster; each leases from the gallery as any other does.",
        extras={"ray": "bowerbird-scale[ray]"},
    )
