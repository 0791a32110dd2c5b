"""Connections and transactions of one gallery: its URL, the errors of the server in words, and who may write.

Every write is one transaction that locks the single row of ``head`` first. That gives each commit its epoch, in the
order of the commits, and lets no two transactions wait for each other. Nothing is retried here: a connection that was
ended while it rested is replaced, but a server that is away, or goes in the middle, is a ``StoreUnavailableError``; the
next call connects again, and `run` decides how long to be patient.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import psycopg
from psycopg import sql
from psycopg.errors import IdleInTransactionSessionTimeout

from bowerbird.errors import (
    GalleryError,
    GalleryLockedError,
    InputError,
    SnapshotGoneError,
    StoreUnavailableError,
    without_passwords,
)

GALLERY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,49}")
HOSTS = re.compile(r"((\[[^\]]*\]|[^:\[\],]*)(:\d*)?(,|$))*")
NO_ESCAPE = re.compile(r"%(?!(?!00)[0-9A-Fa-f]{2})")
SECRETS = {"password", "passfile", "sslpassword", "sslkey", "qdrant_api_key"}
OWN = ("gallery", "qdrant", "qdrant_api_key")  # parameters of the URL that libpq does not know
# A worker whose machine vanished in the middle of a commit holds the lock of all commits for this long at most.
IDLE_SECONDS = 60
# A server that is gone is noticed within a minute; the URL may say otherwise.
DEFAULTS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
COMMIT_LOCK_SECONDS = 120  # a worker's commit waits behind a large add


class Connection(psycopg.Connection[Any]):
    """A connection with the two questions that are asked most."""

    def row(self, query: Any, parameters: Any = None) -> Any:
        """The one row of the answer."""
        found = self.execute(query, parameters).fetchone()
        assert found is not None, "a query that always has a row"
        return found

    def value(self, query: Any, parameters: Any = None) -> Any:
        """The one value of the answer."""
        return self.row(query, parameters)[0]


@dataclass(frozen=True)
class Address:
    """Where a gallery is.

    Attributes:
        conninfo: For libpq, with the password if the URL has one.
        schema: Of all its tables.
        options: Of ``OWN``.
        name: The URL without secrets, for messages.
    """

    conninfo: str = field(repr=False)
    schema: str
    name: str
    options: Mapping[str, str] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """``postgresql://user@host:5432/database?gallery=photos`` and libpq's other parameters; gallery: `main`."""
        scheme, found, rest = url.partition("://")
        try:
            parts = urlsplit(f"//{rest}", allow_fragments=False)
        except ValueError as exc:
            raise InputError(f"a URL of a gallery cannot be read: {exc}") from None
        query = parse_qsl(parts.query, keep_blank_values=True)
        options = {key: value for key, value in query if key in OWN}
        gallery = options.get("gallery", "main")
        user, at, place = parts.netloc.rpartition("@")
        # What does not fit may be a piece of a password, and libpq would quote it: nothing of it is said.
        misplaced = not found or "@" in parts.path or any("@" in key for key, _ in query)
        if misplaced or not HOSTS.fullmatch(place) or NO_ESCAPE.search(parts.netloc + parts.path):
            raise InputError(
                "a URL of a gallery cannot be read: it is postgresql://USER:PASSWORD@HOST:PORT/DATABASE?gallery=NAME, "
                "and what is not a letter or digit in a user or password is written as %40 (@), %2F (/), %3A (:), "
                "%3F (?), %23 (#) or %25 (%)"
            )
        if not GALLERY_NAME.fullmatch(gallery):
            raise InputError(
                f"the gallery's name is {gallery!r}; accepted: 1 to 50 of a-z, 0-9, _ and -, as in ?gallery=photos"
            )
        libpq = [(key, value) for key, value in query if key not in OWN]
        shown = [(key, without_passwords(value)) for key, value in query if key not in {*SECRETS, "gallery"}]
        public = user.split(":")[0] + at + place
        conninfo = f"postgresql://{parts.netloc}{parts.path}?{urlencode(libpq, quote_via=quote)}"
        named = urlencode([*shown, ("gallery", gallery)], quote_via=quote, safe="/:@*")
        name = f"{'postgresql' if scheme == 'postgres' else scheme}://{public}{parts.path}?{named}"
        try:
            psycopg.conninfo.conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError as exc:
            raise InputError(f"the URL {name} cannot be read: {_text(exc)}") from None
        return cls(conninfo, f"bowerbird_{gallery}", name, options)


class Database:
    """One read and one write connection to the database of a gallery. Thread-safe; not usable across ``fork``.

    Attributes:
        vectors: Where the vectors of the gallery are, see ``bowerbird_scale.postgres.vectors.Tables``.
    """

    def __init__(self, address: Address, vectors: Any, *, readonly: bool = False, lock_timeout: float = 10.0) -> None:
        self.address, self.readonly, self.lock_timeout = address, readonly, lock_timeout
        self.vectors = vectors  # a `Tables`, or what has its methods
        self.pid = os.getpid()
        self._connections: dict[str, Connection] = {}
        self._locks = {"read": threading.RLock(), "write": threading.RLock()}

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One transaction in which everything seen belongs to one moment (repeatable read)."""
        with self._locks["read"], self._errors("read"):
            connection = self._connection("read")
            with connection.transaction():
                yield connection

    @contextmanager
    def writing(self, purpose: str, *, wait: float | None = None, head: bool = True) -> Iterator[Connection]:
        """One transaction, committed at the end of the block and undone if the block raises.

        Args:
            wait: Seconds to wait for another writer; default: ``lock_timeout``.
            head: Lock ``head`` first, which everything does that readers can see.

        Raises:
            GalleryLockedError: If another writer was busy for longer; names it.
        """
        if self.readonly:
            raise GalleryError(f"gallery {self.address.name} was opened readonly; {purpose} needs readonly=False")
        with self._locks["write"], self._errors(purpose):
            connection = self._connection("write")
            with connection.transaction():
                milliseconds = int(1000 * (self.lock_timeout if wait is None else wait))
                settings = {"lock_timeout": f"{milliseconds}ms", "application_name": _application(purpose)}
                for name, value in settings.items():
                    connection.execute("SELECT set_config(%s, %s, true)", (name, value))
                if head:
                    connection.execute("SELECT 1 FROM head FOR UPDATE")
                yield connection

    @contextmanager
    def outside(self) -> Iterator[Connection]:
        """The write connection outside a transaction, for what PostgreSQL does not do inside one."""
        with self._locks["write"], self._errors("maintain"):
            yield self._connection("write")

    def _connection(self, role: str) -> Connection:
        if os.getpid() != self.pid:
            raise GalleryError("a gallery that was opened before fork() cannot be used in the child; open it again")
        connection = self._connections.get(role)
        if connection is not None and not _open(connection):
            connection.close()
        if connection is None or connection.closed:
            connection = connect(self.address)
            if role == "read":
                connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                connection.read_only = True
            self._connections[role] = connection
        return connection

    @contextmanager
    def _errors(self, purpose: str) -> Iterator[None]:
        """What the server says, as errors that say what to do."""
        name = self.address.name
        try:
            yield
        except psycopg.errors.LockNotAvailable as exc:
            raise GalleryLockedError(
                f"cannot {purpose}: gallery {name} is being written by {self._writer()}. Waited {self.lock_timeout:g} "
                "s; try again when it is done, or wait longer (--lock-timeout)."
            ) from exc
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName) as exc:
            raise SnapshotGoneError(
                f"a table of gallery {name} was dropped meanwhile ({exc.diag.message_primary}); look again"
            ) from exc
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as exc:
            raise GalleryError(f"the server does not let this user {purpose} in {name}: {_text(exc)}") from exc
        except (psycopg.DataError, psycopg.errors.ProgramLimitExceeded) as exc:
            raise InputError(f"PostgreSQL cannot {purpose}: {_text(exc)}. Nothing was changed.") from exc
        except (psycopg.OperationalError, psycopg.InterfaceError, IdleInTransactionSessionTimeout) as exc:
            raise StoreUnavailableError(
                f"the server of {name} cannot {purpose} now: {_text(exc)}. What was committed is safe."
            ) from exc

    def _writer(self) -> str:
        """The application that holds ``head``, as it named itself."""
        with suppress(psycopg.Error), connect(self.address) as other:
            row = other.execute(
                "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE granted AND "
                "relation = 'head'::regclass AND mode = 'RowShareLock' AND application_name <> '' LIMIT 1"
            ).fetchone()
            if row is not None:
                return str(row[0])
        return "another connection"


def connect(address: Address) -> Connection:
    """A connection that finds the gallery's tables, in autocommit outside ``transaction()`` blocks.

    Raises:
        InputError: If a parameter of the URL has a value that libpq does not know.
        psycopg.OperationalError: If the server does not answer.
    """
    given = psycopg.conninfo.conninfo_to_dict(address.conninfo)
    defaults = {name: value for name, value in DEFAULTS.items() if name not in given}
    try:
        connection = Connection.connect(
            address.conninfo, autocommit=True, application_name=_application("idle"), **defaults
        )
    except psycopg.ProgrammingError as exc:
        raise InputError(f"the URL {address.name} cannot be used: {_text(exc)}") from None
    try:
        # pgvector's types may lie in any schema.
        row = connection.execute(
            "SELECT nspname FROM pg_extension JOIN pg_namespace n ON n.oid = extnamespace WHERE extname = 'vector'"
        ).fetchone()
        path = sql.SQL(", ").join(sql.Identifier(part) for part in (address.schema, row[0] if row else "public"))
        connection.execute(sql.SQL("SET search_path = {}").format(path))
        connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    except BaseException:
        connection.close()
        raise
    return connection


def _open(connection: Connection) -> bool:
    """Whether the server has not ended it while nobody asked, as a restart, a failover or a pooler does. Costs no round
    trip: on a connection at rest there is nothing to read but the server's farewell."""
    if connection.closed or connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        return not connection.closed
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        return not selector.select(0)


def _application(purpose: str) -> str:
    return f"bowerbird {purpose[:20]}, {socket.gethostname()[:20]}:{os.getpid()}"  # PostgreSQL cuts at 63 bytes


def _text(exc: psycopg.Error) -> str:
    return " ".join(str(exc).split()).rstrip(".")
