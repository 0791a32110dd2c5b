"""Approximate indexes of a gallery: made by where the vectors are, with an effort that is chosen by measured recall.

The server keeps an index up to date by itself. A search with a filter, and of a space that has none, is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import GalleryError, InputError, did_you_mean
from bowerbird_scale.postgres.connection import Connection
from bowerbird_scale.postgres.snapshot import Index, PostgresPart

if TYPE_CHECKING:
    from bowerbird_scale.postgres.storage import PostgresStorage

SAMPLE, K = 50, 10


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
        rows = db.execute("SELECT value FROM setting WHERE starts_with(name, 'index:')").fetchall()
    settings = _checked(storage.db.vectors, kind, config)
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
        for (value,) in rows:
            storage.db.vectors.drop_index(db, json.loads(value)["index"])
    return storage.index_status()["files"]


def _setting(db: Connection) -> tuple[str, dict[str, Any]]:
    row = db.execute("SELECT value FROM setting WHERE name = 'index'").fetchone()
    value: dict[str, Any] = json.loads(row[0]) if row else {"kind": "exact", "config": {}}
    return value["kind"], value["config"]


def _checked(vectors: Any, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    kinds = ("exact", *vectors.index_settings)
    if kind not in kinds:
        raise InputError(
            f"no index of kind {kind!r} in this store; accepted: {', '.join(kinds)}.{did_you_mean(str(kind), kinds)}"
        )
    known = {} if kind == "exact" else {"target_recall": 0.95, **vectors.index_settings[kind]}
    for name, value in config.items():
        if name not in known:
            raise InputError(
                f"an index of kind {kind!r} has no setting {name!r} in this store; it has "
                f"{', '.join(known) or 'none'}.{did_you_mean(name, known)}"
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
    if progress is not None:
        progress(f"building {kind} ({part.count} items of {part.space.fingerprint[:12]})")
    options = {name: int(value) for name, value in settings.items() if name != "target_recall"}
    with storage.db.outside() as db:
        name, efforts = storage.db.vectors.make_index(db, part, kind, options)
    if progress is not None:
        progress("measuring recall")
    effort, recall = _least_effort(part, kind, efforts, float(settings["target_recall"]))
    return {
        "kind": kind, "index": name, "items": part.count, "recall": recall, "epoch": part.epoch, "effort": effort,
    }  # fmt: skip


def _least_effort(
    part: PostgresPart, kind: str, efforts: Sequence[Mapping[str, str]], target: float
) -> tuple[Mapping[str, str], float]:
    """The first effort with which a sample of stored vectors finds its true neighbours, and the recall@10 measured."""
    nums = part.nums[np.linspace(0, part.count - 1, min(SAMPLE, part.count), dtype=np.int64)]
    queries = part.vectors_of(nums)
    truth = replace(part, index=None).search(queries, K).ids
    effort, recall = efforts[0], 0.0
    for effort in efforts:
        found = replace(part, index=Index(kind, effort)).search(queries, K).ids
        hits = [len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, truth, strict=True)]
        recall = float(sum(hits) / max(1, int((truth >= 0).sum())))
        if recall >= target:
            break
    return effort, recall
