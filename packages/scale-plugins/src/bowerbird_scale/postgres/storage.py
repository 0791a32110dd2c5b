"""What a gallery in PostgreSQL keeps, and how it is read."""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from psycopg import sql

from bowerbird.errors import GalleryError, InputError, SpaceError
from bowerbird.gallery.snapshot import UpgradeState
from bowerbird.gallery.space import DTYPES, Item, Relation, Space
from bowerbird.gallery.storage import check_same_space
from bowerbird.gallery.vectors import checked_filter, is_utf8
from bowerbird.gallery.verify import Report
from bowerbird_scale.postgres import indexes, verify
from bowerbird_scale.postgres.connection import Address, Connection, Database, connect
from bowerbird_scale.postgres.schema import FORMAT, TABLES
from bowerbird_scale.postgres.snapshot import PostgresSnapshot
from bowerbird_scale.postgres.vectors import Filter

ITEM = "id, num, uri, content_hash, metadata"


class PostgresStorage:
    """An open gallery. Thread-safe; not usable across ``fork``."""

    def __init__(self, address: Address, vectors: Any, *, readonly: bool = False, lock_timeout: float = 10.0) -> None:
        self.db = Database(address, vectors, readonly=readonly, lock_timeout=lock_timeout)
        self.features = vectors.features
        self._snapshot: PostgresSnapshot | None = None
        self._seen_version = -1
        self._lock = threading.Lock()
        try:
            self._check_format()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, address: Address, vectors: Any, space: Space, *, dtype: str = "float32") -> None:
        """A new, empty gallery; it appears as a whole or not at all.

        Raises:
            GalleryError: If there is one already, or the server has no pgvector.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; accepted: {', '.join(DTYPES)}")
        vectors.check(space)
        database = Database(address, vectors)
        schema = sql.Identifier(address.schema)
        try:
            with database._errors("create a gallery"), connect(address) as db, db.transaction():
                db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (address.schema,))  # two that create at once
                if db.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (address.schema,)).fetchone():
                    raise GalleryError(
                        f"cannot create a gallery at {address.name}: the schema {address.schema} is there already. "
                        "Choose another name (?gallery=NAME), or drop that schema."
                    )
                _install_pgvector(db, address)
                db.execute(sql.SQL("CREATE SCHEMA {}").format(schema))
                db.execute(TABLES)
                db.execute("INSERT INTO head VALUES (1, %s, 0, 0, 0, 0, 0, %s, %s)", (FORMAT, space.fingerprint, dtype))
                insert_space(db, vectors, space, parent=None, dtype=dtype)
        finally:
            database.close()

    def _check_format(self) -> None:
        address = self.db.address
        with self.db.reading() as db:
            found = db.value("SELECT to_regclass(%s)", (f'"{address.schema}".head',))
            if found is None:
                raise GalleryError(
                    f"there is no gallery at {address.name}: the database has no schema {address.schema}. Create one "
                    f"with `bowerbird gallery create '{address.name}'`."
                )
            version = db.value("SELECT format FROM head")
        if version > FORMAT:
            raise GalleryError(
                f"gallery {address.name} has format {version}; this bowerbird reads formats up to {FORMAT}. Upgrade "
                "bowerbird-scale."
            )

    def close(self) -> None:
        self._snapshot = None
        self.db.close()

    @property
    def path(self) -> str:
        return self.db.address.name

    @property
    def readonly(self) -> bool:
        return self.db.readonly

    @property
    def dtype(self) -> str:
        return self.snapshot().dtype

    # ------------------------------------------------------------------------------------------------- reading

    def snapshot(self) -> PostgresSnapshot:
        """The newest committed state; one short question to the server while nothing changed."""
        with self._lock, self.db.reading() as db:
            version = db.value("SELECT version FROM head")
            if self._snapshot is None or version != self._seen_version:
                self._snapshot = self._load(db)
                self._seen_version = version
            return self._snapshot

    def _load(self, db: Connection) -> PostgresSnapshot:
        epoch, live, num_limit, serving, dtype = db.row("SELECT epoch, live, next_num, serving, dtype FROM head")
        rows = db.execute("SELECT fingerprint, encoder, dim, metric, no, items FROM space ORDER BY no").fetchall()
        return PostgresSnapshot(
            self.db,
            epoch=epoch,
            live=live,
            num_limit=num_limit,
            serving=serving,
            dtype=dtype,
            spaces={row[0]: Space(*row[:4]) for row in rows},
            upgrades=active_upgrades(db),
            relations=_relations(db),
            numbers={row[0]: row[4] for row in rows},
            counts={row[0]: row[5] for row in rows},
            indexes=indexes.read(db),
        )

    def find(self, ids: Sequence[str]) -> list[Item | None]:
        """Live items in the order of ``ids``."""
        known = [name for name in ids if "\0" not in name and is_utf8(name)]
        with self.db.reading() as db:
            rows = db.execute(f"SELECT {ITEM} FROM item WHERE deleted_epoch = 0 AND id = ANY(%s)", (known,)).fetchall()
        found = {row[0]: item_of_row(row) for row in rows}
        return [found.get(name) for name in ids]

    def items(self, nums: Iterable[int]) -> dict[int, Item]:
        """Items by number, deleted ones included."""
        with self.db.reading() as db:
            rows = db.execute(f"SELECT {ITEM} FROM item WHERE num = ANY(%s)", ([int(num) for num in nums],)).fetchall()
        return {row[1]: item_of_row(row) for row in rows}

    def names(self, nums: Iterable[int]) -> dict[int, str]:
        """Ids by number, deleted items included."""
        with self.db.reading() as db:
            return dict(db.execute("SELECT num, id FROM item WHERE num = ANY(%s)", (list(set(nums)),)).fetchall())

    def close_id(self, name: str) -> str:
        """`` Did you mean 'x'?`` among the neighbours of ``name`` in the order of ids, or an empty string."""
        query = "SELECT id FROM item WHERE deleted_epoch = 0 AND left(id, 200) {} %s ORDER BY left(id, 200) {} LIMIT 50"
        with self.db.reading() as db:
            near = [row[0] for row in db.execute(query.format("<", "DESC"), (name[:200],))]
            near += [row[0] for row in db.execute(query.format(">=", "ASC"), (name[:200],))]
        close = difflib.get_close_matches(name, near, n=1, cutoff=0.6)
        return f" Did you mean {close[0]!r}?" if close else ""

    def scan(self, epoch: int, after: int, limit: int) -> list[Item]:
        """The next ``limit`` items that are live at ``epoch``, by number, from number ``after`` + 1 on."""
        with self.db.reading() as db:
            rows = db.execute(
                f"SELECT {ITEM} FROM item WHERE num > %s AND added_epoch <= %s "
                "AND (deleted_epoch = 0 OR deleted_epoch > %s) ORDER BY num LIMIT %s",
                (after, epoch, epoch, limit),
            ).fetchall()
        return [item_of_row(row) for row in rows]

    def pending(self) -> list[Item]:
        with self.db.reading() as db:
            rows = db.execute(f"SELECT {ITEM} FROM item JOIN pending USING (num) ORDER BY num").fetchall()
        return [item_of_row(row) for row in rows]

    def allowed(self, snapshot: PostgresSnapshot, where: Mapping[str, Any]) -> Filter:
        """``{"key": value}`` (equal), ``{"key": [values]}`` (any of them); all must hold; a missing key is null."""
        clauses: list[str] = []
        parameters: list[Any] = []
        for key, values in checked_filter(where).items():
            either = []
            if None in values:
                either.append("coalesce(metadata -> %s, 'null') = 'null'")
                parameters.append(key)
            # As in SQLite, true is 1 and false is 0. No item here has a NUL in a text.
            given = [value for value in values if value is not None and not (isinstance(value, str) and "\0" in value)]
            scalars = {json.dumps(same) for value in given for same in _same(value)}
            if scalars:
                either.append("metadata -> %s = ANY(%s::jsonb[])")
                parameters.extend([key, sorted(scalars)])
            clauses.append(f"({' OR '.join(either)})" if either else "false")
        return Filter(" AND ".join(clauses) or "true", tuple(parameters))

    def relations(self) -> list[Relation]:
        with self.db.reading() as db:
            return _relations(db)

    # ------------------------------------------------------------------------------------------------- writing

    def check_space(self, space: Space) -> None:
        """Raises ``SpaceError`` where its vectors are wider than the server can keep."""
        self.db.vectors.check(space)

    def register_space(self, space: Space, *, parent: str | None = None) -> None:
        """Remember a space. Idempotent."""
        known = self.snapshot().spaces.get(space.fingerprint)
        if known is not None:
            check_same_space(known, space)
            return
        self.db.vectors.check(space)
        with self.db.writing("register a space") as db:
            if db.execute("SELECT 1 FROM space WHERE fingerprint = %s", (space.fingerprint,)).fetchone() is None:
                insert_space(db, self.db.vectors, space, parent=parent)
                changed(db)

    def relate(self, relation: Relation) -> None:
        """Register a relation; replaces the evidence of an earlier registration."""
        spaces = self.snapshot().spaces
        for fingerprint in (relation.new, relation.old):
            if fingerprint not in spaces:
                known = ", ".join(map(str, spaces.values()))
                raise SpaceError(f"this gallery knows no space {fingerprint[:12]!r}; known: {known}")
        if relation.new == relation.old:
            raise SpaceError("a space is related to itself anyway; a relation needs two different spaces")
        with self.db.writing("register a relation") as db:
            db.execute(
                "INSERT INTO relation VALUES (%s, %s, %s, %s) "
                "ON CONFLICT (kind, new, old) DO UPDATE SET evidence = excluded.evidence",
                (relation.kind, relation.new, relation.old, json.dumps(dict(relation.evidence))),
            )
            changed(db)

    def unrelate(self, relation: Relation) -> None:
        with self.db.writing("forget a relation") as db:
            key = (relation.kind, relation.new, relation.old)
            db.execute("DELETE FROM relation WHERE kind = %s AND new = %s AND old = %s", key)
            changed(db)

    def canary_passed(self, fingerprint: str) -> str | None:
        with self.db.reading() as db:
            row = db.execute("SELECT canary FROM space WHERE fingerprint = %s", (fingerprint,)).fetchone()
        return None if row is None else row[0]

    def remember_canary(self, fingerprint: str, passed: str) -> None:
        with self.db.writing("note a canary", head=False) as db:
            db.execute("UPDATE space SET canary = %s WHERE fingerprint = %s", (passed, fingerprint))

    def read_file(self, name: str) -> bytes | None:
        with self.db.reading() as db:
            row = db.execute("SELECT content FROM file WHERE name = %s", (name,), binary=True).fetchone()
            if row is not None:
                return bytes(row[0])
            lines = db.execute("SELECT line FROM line WHERE name = %s ORDER BY no", (name,)).fetchall()
        return "".join(line + "\n" for (line,) in lines).encode() if lines else None

    def write_file(self, name: str, content: bytes) -> None:
        with self.db.writing("write a file", head=False) as db:
            db.execute(
                "INSERT INTO file VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET content = excluded.content",
                (name, content),
            )

    def append_line(self, name: str, line: str) -> None:
        with self.db.writing("append a line", head=False) as db:
            db.execute("INSERT INTO line(name, line) VALUES (%s, %s)", (name, line))

    def files(self, folder: str) -> list[str]:
        with self.db.reading() as db:
            rows = db.execute(
                "SELECT name FROM file WHERE starts_with(name, %s) UNION SELECT name FROM line "
                "WHERE starts_with(name, %s) ORDER BY 1",
                (f"{folder}/", f"{folder}/"),
            ).fetchall()
        return [row[0] for row in rows]

    # -------------------------------------------------------------------------------------------------- health

    def build_index(
        self, kind: str | None, config: Mapping[str, Any], progress: Callable[[str], None] | None
    ) -> list[Any]:
        return indexes.build(self, kind, config, progress)

    def index_status(self) -> dict[str, Any]:
        with self.db.reading() as db:
            return indexes.status(db, self.path)

    def verify(self) -> Report:
        return verify.verify(self)

    def size(self) -> dict[str, int]:
        with self.db.reading() as db:
            rows, searched = db.row(
                "SELECT (SELECT count(*) FROM member), (SELECT coalesce(sum(items), 0)::bigint FROM space)"
            )
            size = db.value(
                "SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c "
                "WHERE c.relnamespace = %s::regnamespace AND c.relkind = 'r'",
                (f'"{self.db.address.schema}"',),
            )
            tables = db.value("SELECT count(DISTINCT space) FROM member")
        return {"segments": tables, "rows": rows, "dead_rows": rows - searched, "bytes": size}


def active_upgrades(db: Connection) -> list[UpgradeState]:
    """The upgrades under way, each on top of the one before it."""
    rows = db.execute(
        "SELECT id, old, new, state, strategy, merger, order_name, plan_rows, settings, started_at FROM upgrade "
        "WHERE state IN ('running', 'paused', 'covered') ORDER BY id"
    ).fetchall()
    return [
        UpgradeState(number, old, new, state, strategy, merger, order, plan_rows, json.loads(settings), started_at)
        for number, old, new, state, strategy, merger, order, plan_rows, settings, started_at in rows
    ]


def item_of_row(row: tuple[str, int, str | None, str | None, dict[str, Any] | None]) -> Item:
    item_id, num, uri, content_hash, metadata = row
    return Item(item_id, num, uri, content_hash, metadata or {})


def insert_space(db: Connection, vectors: Any, space: Space, *, parent: str | None, dtype: str | None = None) -> int:
    """Its row and the table of its vectors; returns its number."""
    number: int = db.value(
        "INSERT INTO space(fingerprint, encoder, dim, metric, parent) VALUES (%s, %s, %s, %s, %s) RETURNING no",
        (space.fingerprint, space.encoder, space.dim, space.metric, parent),
    )
    dtype = dtype or db.value("SELECT dtype FROM head")
    vectors.create(db, number, space.dim, dtype)
    return number


def changed(db: Connection) -> None:
    """Inside a writing transaction: what snapshots show of it is another, apart from items."""
    db.execute("UPDATE head SET version = version + 1")


def next_epoch(db: Connection, *, dropped: bool = False) -> int:
    """Inside a writing transaction; ``dropped``: earlier epochs cannot be read any more."""
    floor = "epoch + 1" if dropped else "floor"
    return db.value(f"UPDATE head SET version = version + 1, epoch = epoch + 1, floor = {floor} RETURNING epoch")


def _relations(db: Connection) -> list[Relation]:
    rows = db.execute("SELECT kind, new, old, evidence FROM relation ORDER BY kind, new, old").fetchall()
    return [Relation(kind, new, old, json.loads(evidence)) for kind, new, old, evidence in rows]


def _same(value: Any) -> list[Any]:
    if isinstance(value, str) or value not in (0, 1):
        return [value]
    return [int(value), bool(value)]


def _install_pgvector(db: Connection, address: Address) -> None:
    installed = "SELECT 1 FROM pg_extension WHERE extname = 'vector'"
    if db.execute(installed).fetchone() is not None:
        return
    if db.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'").fetchone() is None:
        raise GalleryError(f"the server of {address.name} has no pgvector: install it there (0.7 or newer)")
    db.execute("SELECT pg_advisory_xact_lock(hashtext('bowerbird pgvector'))")  # the first galleries of a database
    if db.execute(installed).fetchone() is None:
        db.execute("CREATE EXTENSION vector SCHEMA public")
