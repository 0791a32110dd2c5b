"""Approximate indexes of a gallery in PostgreSQL: pgvector's HNSW and IVFFlat, with a measured recall.

The server keeps an index up to date by itself. A search with a filter, and of a space that has none, is exact.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from psycopg import sql

from bowerbird.errors import GalleryError, InputError, did_you_mean
from bowerbird_scale.postgres.connection import Connection
from bowerbird_scale.postgres.snapshot import Index, PostgresPart
from bowerbird_scale.postgres.vectors import TYPES, table_of

if TYPE_CHECKING:
    from bowerbird_scale.postgres.storage import PostgresStorage

# Kind -> pgvector's name, its settings with defaults, and the efforts that are tried, least first.
METHODS: dict[str, tuple[str, dict[str, int], str, tuple[int, ...]]] = {
    "hnsw": ("hnsw", {"m": 16, "ef_construction": 64}, "hnsw.ef_search", (40, 80, 160, 320, 640, 1000)),
    "ivf": ("ivfflat", {"lists": 0}, "ivfflat.probes", (1, 2, 4, 8, 16, 32, 64, 128)),
}
KINDS = ("exact", *METHODS)
MAX_INDEXED_DIM = {"float32": 2000, "float16": 4000}
SAMPLE, K = 50, 10
# Without these the planner, which does not know what a distance costs, may prefer to compute all of them.
_ORDERED = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off", "enable_sort": "off"}


def read(db: Connection) -> dict[str, Index]:
    """Fingerprint -> its index."""
    rows = db.execute("SELECT name, value FROM setting WHERE starts_with(name, 'index:')").fetchall()
    found = {name.removeprefix("index:"): json.loads(value) for name, value in rows}
    return {fingerprint: Index(value["kind"], value["effort"]) for fingerprint, value in found.items()}


def status(db: Connection, path: str) -> dict[str, Any]:
    """Plain data: kind, settings, and per index what it covers."""
    kind, config = _setting(db)
    rows = db.execute("SELECT name, value FROM setting WHERE starts_with(name, 'index:') ORDER BY name").fetchall()
    files = []
    for name, text in rows:
        value = json.loads(text)
        size = db.value("SELECT coalesce(pg_relation_size(to_regclass(%s)), 0)", (value["index"],))
        files.append(
            {
                "space": name.removeprefix("index:"),
                "bytes": size,
                "path": f"{path}: {value['index']}",
                **{key: value[key] for key in ("kind", "items", "recall", "epoch", "effort")},
            }
        )
    return {"kind": kind, "config": config, "files": files}


def build(
    storage: PostgresStorage, kind: str | None, config: Mapping[str, Any], progress: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """See ``Gallery.set_index``. Readers and writers go on while an index is built."""
    if storage.readonly:
        raise GalleryError(f"gallery {storage.path} was opened readonly; open it with readonly=False to index it")
    with storage.db.reading() as db:
        if kind is None:
            kind, config = _setting(db)
        before = {row[0]: json.loads(row[1]) for row in db.execute("SELECT name, value FROM setting").fetchall()}
    settings = _checked(kind, config)
    built = {}
    for part in storage.snapshot().parts if kind != "exact" else ():
        if part.count:
            built[f"index:{part.space.fingerprint}"] = _build_part(storage, part, kind, settings, progress)
    with storage.db.writing("note an index") as db:
        db.execute("DELETE FROM setting WHERE name = 'index' OR starts_with(name, 'index:')")
        spaces = {row[0] for row in db.execute("SELECT fingerprint FROM space WHERE items > 0").fetchall()}
        built = {name: value for name, value in built.items() if name.removeprefix("index:") in spaces}
        for name, value in ("index", {"kind": kind, "config": dict(config)}), *built.items():
            db.execute("INSERT INTO setting VALUES (%s, %s)", (name, json.dumps(value)))
        db.execute("UPDATE head SET version = version + 1")
    with storage.db.outside() as db:
        for name, value in before.items():
            if name.startswith("index:"):
                _drop(db, value["index"])
    return storage.index_status()["files"]


def _setting(db: Connection) -> tuple[str, dict[str, Any]]:
    row = db.execute("SELECT value FROM setting WHERE name = 'index'").fetchone()
    value: dict[str, Any] = json.loads(row[0]) if row else {"kind": "exact", "config": {}}
    return value["kind"], value["config"]


def _checked(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if kind not in KINDS:
        raise InputError(f"no index of kind {kind!r}; accepted: {', '.join(KINDS)}.{did_you_mean(str(kind), KINDS)}")
    known = {} if kind == "exact" else {"target_recall": 0.95, **METHODS[kind][1]}
    for name, value in config.items():
        if name not in known:
            raise InputError(
                f"a {kind} index of PostgreSQL has no setting {name!r}; it has {', '.join(known) or 'none'}."
                f"{did_you_mean(name, known)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{name} is {value!r}; it must be a number above 0")
    settings = {**known, **config}
    if kind != "exact" and not settings["target_recall"] <= 1:
        raise InputError(f"target_recall is {settings['target_recall']}; it must be above 0 and at most 1")
    return settings


def _build_part(
    storage: PostgresStorage,
    part: PostgresPart,
    kind: str,
    settings: Mapping[str, Any],
    progress: Callable[[str], None] | None,
) -> dict[str, Any]:
    if part.space.dim > MAX_INDEXED_DIM[part.dtype]:
        raise InputError(
            f"pgvector indexes at most {MAX_INDEXED_DIM[part.dtype]} dimensions of {part.dtype}, and {part.space} has "
            f"{part.space.dim}; searches of it stay exact"
        )
    method, defaults, effort_name, efforts = METHODS[kind]
    options = {name: int(settings[name]) for name in defaults}
    if kind == "ivf":
        options["lists"] = options["lists"] or max(1, min(part.count // 1000, 2000) or int(part.count**0.5))
    if progress is not None:
        progress(f"building {kind} ({part.count} items of {part.space.fingerprint[:12]})")
    name = f"idx_{part.number}_{secrets.token_hex(4)}"
    with storage.db.outside() as db:
        db.execute("SET lock_timeout = 0")
        try:
            db.execute(
                sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} USING {} (vec {}) WITH ({})").format(
                    sql.Identifier(name),
                    sql.Identifier(table_of(part.number)),
                    sql.SQL(method),
                    sql.SQL(f"{TYPES[part.dtype][0]}_ip_ops"),
                    sql.SQL(", ".join(f"{option} = {value}" for option, value in options.items())),
                )
            )
        except BaseException:
            _drop(db, name)
            raise
    if progress is not None:
        progress("measuring recall")
    effort, recall = _effort(part, kind, method, effort_name, efforts, options, float(settings["target_recall"]))
    return {
        "kind": kind, "index": name, "items": part.count, "recall": recall, "epoch": part.epoch, "effort": effort,
    }  # fmt: skip


def _effort(
    part: PostgresPart, kind: str, method: str, name: str, efforts: tuple[int, ...], options: Mapping[str, int],
    target: float,
) -> tuple[dict[str, str], float]:  # fmt: skip
    """The least effort with which a sample of stored vectors finds its true neighbours, and the recall@10 measured."""
    nums = part.nums[np.linspace(0, part.count - 1, min(SAMPLE, part.count), dtype=np.int64)]
    queries = part.vectors_of(nums)
    forced = replace(part, index=None)
    truth = forced.search(queries, K, None).ids
    best: dict[str, str] = {}
    recall = 0.0
    for value in efforts:
        if kind == "ivf" and value > options["lists"]:
            value = options["lists"]
        best = {**_ORDERED, name: str(value), f"{method}.iterative_scan": "relaxed_order"}
        tried = replace(part, index=Index(kind, best))
        found = tried.search(queries, K, None).ids
        hits = [len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, truth, strict=True)]
        recall = float(sum(hits) / max(1, int((truth >= 0).sum())))
        if recall >= target:
            break
    return best, recall


def _drop(db: Connection, name: str) -> None:
    db.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(name)))
